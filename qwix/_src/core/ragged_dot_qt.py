"""`jax.lax.ragged_dot` (mixtures of experts) on operands that it quantizes, with gradients that may be quantized too.

    >>> config = RaggedDotQtConfig(lhs_qtype=jnp.int8, rhs_qtype=jnp.int8, drhs_grad_qtype=jnp.int8)
    >>> tokens, experts, sizes = jnp.ones((5, 4)), jnp.ones((2, 4, 3)), jnp.array([2, 3])
    >>> loss = lambda experts: ragged_dot_qt(tokens, experts, sizes, config).sum()
    >>> jax.grad(loss)(experts)[:, 0, 0].round(1)
    Array([2., 3.], dtype=float32)

`qt.py` says what is computed, forward and backward.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src.core import numerics, qt, ragged_dot
from qwix._src.core.contraction import RaggedDotGeneral, ragged_dot_general_of


@qt.pytree_config
@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedDotQtConfig:
    """How to quantize a ragged dot and its derivatives; see `qt.QtConfig` for the fields."""

    lhs_qtype: Any
    rhs_qtype: Any
    dlhs_grad_qtype: Any = None
    drhs_grad_qtype: Any = None
    tile_size: int | float | None = None
    lhs_calibration_method: str = "absmax"
    rhs_calibration_method: str = "absmax"
    lhs_collect_quant_stat: qt.CollectFn | None = None
    rhs_collect_quant_stat: qt.CollectFn | None = None
    lhs_disable_channelwise_axes: bool = False
    rhs_disable_channelwise_axes: bool = False
    dlhs_grad_calibration_method: str = "absmax"
    dlhs_tile_size: int | float | None = None
    dlhs_stochastic_rounding_noise_fn: numerics.NoiseFn | None = None
    dlhs_grad_disable_channelwise_axes: bool = False
    drhs_grad_calibration_method: str = "absmax"
    drhs_tile_size: int | float | None = None
    drhs_stochastic_rounding_noise_fn: numerics.NoiseFn | None = None
    drhs_grad_disable_channelwise_axes: bool = False
    disable_gradient_clipping: bool = False
    use_original_residuals: bool = False
    dlhs_residual_qtype: Any = None
    dlhs_residual_calibration_method: str = "absmax"
    dlhs_residual_disable_channelwise_axes: bool = False
    drhs_residual_qtype: Any = None
    drhs_residual_calibration_method: str = "absmax"
    drhs_residual_disable_channelwise_axes: bool = False
    sparsity_rule: Any = None


def ragged_dot_qt(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    config: RaggedDotQtConfig,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` of operands quantized as the config says, differentiable.

    Args:
      lhs: (m, k), rows sorted by group, a float array.
      rhs: (g, k, n), likewise.
      group_sizes: (g,) integers.
      config: how to quantize: lhs with a scale for each row, rhs with one for each group and column.
      precision, preferred_element_type, group_offset: as of `qwix.ragged_dot`.

    Returns:
      (m, n), float. Cotangents come in the operands' dtypes.
    """
    if group_offset is not None:
        sizes, start = ragged_dot.window_of_groups(group_sizes, rhs.shape[0], group_offset)
        rolled = jnp.roll(lhs, -start, axis=0)
        return jnp.roll(ragged_dot_qt(rolled, rhs, sizes, config, precision, preferred_element_type), start, axis=0)
    op = _op(precision, preferred_element_type)
    return qt.contract(op, lhs, rhs, qt.full_config(config), group_sizes)


def ragged_dot_qt_fwd(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    config: RaggedDotQtConfig,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
) -> tuple[jax.Array, qt.Residuals]:
    """The forward alone: the output, and the residuals for `ragged_dot_qt_bwd`."""
    _no_offset(group_offset)
    op, full = _op(precision, preferred_element_type), qt.full_config(config)
    return qt.forward(op, lhs, rhs, (group_sizes,), *qt.collect(op, lhs, rhs, full), full)


def ragged_dot_qt_bwd(
    config: RaggedDotQtConfig,
    precision: lax.PrecisionLike,
    preferred_element_type: Any,
    group_offset: jax.Array | None,
    residuals: qt.Residuals,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    """The backward alone: cotangents of lhs and rhs, and None for the group sizes."""
    del config  # the residuals have it
    _no_offset(group_offset)
    return (*qt.backward(_op(precision, preferred_element_type), residuals, g), None)


def _no_offset(group_offset: jax.Array | None) -> None:
    if group_offset is not None:
        raise NotImplementedError("group_offset in the forward or backward alone: use ragged_dot_qt, which takes it.")


def _op(precision: Any, preferred_element_type: Any) -> RaggedDotGeneral:
    return ragged_dot_general_of(
        ragged_dot.RAGGED_DOT,
        precision=tuple(precision) if isinstance(precision, list) else precision,
        preferred_element_type=None if preferred_element_type is None else jnp.dtype(preferred_element_type),
    )
