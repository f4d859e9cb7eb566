"""`jax.lax.conv_general_dilated` on operands that it quantizes, with gradients that may be quantized too.

    >>> import jax.numpy as jnp
    >>> config = ConvGeneralQtConfig(lhs_qtype=jnp.int8, rhs_qtype=jnp.int8, drhs_grad_qtype=jnp.int8)
    >>> image, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4))
    >>> conv = lambda kernel: conv_general_qt(
    ...     image, kernel, config, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ... )
    >>> jax.grad(lambda kernel: conv(kernel).sum())(kernel).shape
    (3, 3, 2, 4)

`qt.py` says what is computed, forward and backward.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src.core import numerics, qt
from qwix._src.core.contraction import ConvGeneral


@qt.pytree_config
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvGeneralQtConfig:
    """How to quantize a convolution and its derivatives; see `qt.QtConfig` for the fields."""

    lhs_qtype: Any = None
    rhs_qtype: Any = None
    lhs_calibration_method: str = "absmax"
    rhs_calibration_method: str = "absmax"
    lhs_collect_quant_stat: qt.CollectFn | None = None
    rhs_collect_quant_stat: qt.CollectFn | None = None
    lhs_disable_channelwise_axes: bool = False
    rhs_disable_channelwise_axes: bool = False
    dlhs_grad_qtype: Any = None
    drhs_grad_qtype: Any = None
    dlhs_grad_calibration_method: str = "absmax"
    drhs_grad_calibration_method: str = "absmax"
    dlhs_grad_disable_channelwise_axes: bool = False
    drhs_grad_disable_channelwise_axes: bool = False
    dlhs_stochastic_rounding_noise_fn: numerics.NoiseFn | None = None
    drhs_stochastic_rounding_noise_fn: numerics.NoiseFn | None = None
    disable_gradient_clipping: bool = False
    use_original_residuals: bool = False
    dlhs_residual_qtype: Any = None
    dlhs_residual_calibration_method: str = "absmax"
    dlhs_residual_disable_channelwise_axes: bool = False
    drhs_residual_qtype: Any = None
    drhs_residual_calibration_method: str = "absmax"
    drhs_residual_disable_channelwise_axes: bool = False
    sparsity_rule: Any = None


def conv_general_qt(
    lhs: jax.Array,
    rhs: jax.Array,
    config: ConvGeneralQtConfig,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    out_sharding: Any = None,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of operands quantized as the config says, differentiable.

    Args:
      lhs: the input, a float array.
      rhs: the kernel, likewise.
      config: how to quantize: the input with a scale for each batch index, the kernel with one for each out-feature.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count,
        out_sharding, precision, preferred_element_type: as of `jax.lax.conv_general_dilated`.

    Returns:
      A float array. Cotangents come in the operands' dtypes.
    """
    op = _op(
        (lhs.shape, rhs.shape),
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        out_sharding,
        precision,
        preferred_element_type,
    )
    return qt.contract(op, lhs, rhs, qt.full_config(config))


def conv_general_qt_fwd(
    lhs: jax.Array,
    rhs: jax.Array,
    config: ConvGeneralQtConfig,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    out_sharding: Any = None,
) -> tuple[jax.Array, qt.Residuals]:
    """The forward alone: the output, and the residuals for `conv_general_qt_bwd`."""
    op = _op(
        (lhs.shape, rhs.shape),
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        out_sharding,
    )
    full = qt.full_config(config)
    return qt.forward(op, lhs, rhs, (), *qt.collect(op, lhs, rhs, full), full)


def conv_general_qt_bwd(
    config: ConvGeneralQtConfig,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    out_sharding: Any,
    res: qt.Residuals,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The backward alone: cotangents of lhs and rhs."""
    del config  # the residuals have it
    op = _op(
        (res.lhs.shape, res.rhs.shape),
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        out_sharding,
    )
    return qt.backward(op, res, g)


def _op(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    out_sharding: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> ConvGeneral:
    return ConvGeneral(
        window_strides=tuple(window_strides),
        padding=padding if isinstance(padding, str) else tuple((int(low), int(high)) for low, high in padding),
        lhs_dilation=None if lhs_dilation is None else tuple(lhs_dilation),
        rhs_dilation=None if rhs_dilation is None else tuple(rhs_dilation),
        dimension_numbers=lax.conv_dimension_numbers(*shapes, dimension_numbers),
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=tuple(precision) if isinstance(precision, list) else precision,
        preferred_element_type=None if preferred_element_type is None else jnp.dtype(preferred_element_type),
        out_sharding=out_sharding,
    )
