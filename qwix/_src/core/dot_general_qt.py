"""`jax.lax.dot_general` on operands that it quantizes, with gradients that may be quantized too.

    >>> config = DotGeneralQtConfig(
    ...     lhs_qtype=jnp.int8, rhs_qtype=jnp.int8, dlhs_grad_qtype=jnp.int8, drhs_grad_qtype=jnp.int8
    ... )
    >>> dims = (((1,), (0,)), ((), ()))
    >>> loss = lambda x, w: dot_general_qt(x, w, dims, config).sum()
    >>> jax.grad(loss)(jnp.ones((2, 4)), jnp.ones((4, 3))).shape
    (2, 4)

`qt.py` says what is computed, forward and backward.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src.core import operands, qt
from qwix._src.core.contraction import DotGeneral
from qwix._src.core.dot_general import DimensionNumbers


@qt.pytree_config
@dataclasses.dataclass(frozen=True, kw_only=True)
class DotGeneralQtConfig(qt.QtConfig):
    """How to quantize a dot_general and its derivatives; the fields are those of `qt.QtConfig`."""


def dot_general_qt(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    config: DotGeneralQtConfig,
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of operands quantized as the config says, differentiable.

    Args:
      lhs, rhs: float arrays.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)).
      config: how to quantize.
      precision, preferred_element_type, out_sharding: as of `jax.lax.dot_general`; precision is that of float
        arithmetic.

    Returns:
      A float array of `preferred_element_type`, or the promotion of the operands' dtypes. Cotangents come in the
      operands' dtypes.

    Raises:
      ValueError: a tile size does not divide its axis, or a calibration method is none.

    >>> config = DotGeneralQtConfig(lhs_qtype=jnp.int8, rhs_qtype=jnp.int8)
    >>> dot_general_qt(jnp.ones((1, 2)), jnp.ones((2, 1)), (((1,), (0,)), ((), ())), config).shape
    (1, 1)
    """
    op = _op(dimension_numbers, lhs, rhs, precision, preferred_element_type, out_sharding)
    return qt.contract(op, lhs, rhs, config)


def dot_general_qt_fwd_bwd(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_calibration: qt.Calibration | None,
    rhs_calibration: qt.Calibration | None,
    dimension_numbers: DimensionNumbers,
    config: DotGeneralQtConfig,
) -> jax.Array:
    """`dot_general_qt` with given calibrations (None: found from the operands); those get no gradient."""
    op = _op(dimension_numbers, lhs, rhs)
    return qt.contract_calibrated(op, lhs, rhs, lhs_calibration, rhs_calibration, config)


def dot_general_qt_fwd(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_calibration: qt.Calibration | None,
    rhs_calibration: qt.Calibration | None,
    dimension_numbers: DimensionNumbers,
    config: DotGeneralQtConfig,
) -> tuple[jax.Array, qt.Residuals]:
    """The forward alone: the output, and the residuals for `dot_general_qt_bwd`."""
    return qt.forward(_op(dimension_numbers, lhs, rhs), lhs, rhs, (), lhs_calibration, rhs_calibration, config)


def dot_general_qt_bwd(
    fwd_dimension_numbers: DimensionNumbers, residuals: qt.Residuals, g: jax.Array
) -> tuple[jax.Array, jax.Array, None, None, None]:
    """The backward alone: cotangents of lhs and rhs, and None for the calibrations and the config."""
    op = _op(fwd_dimension_numbers, residuals.lhs, residuals.rhs)
    return (*qt.backward(op, residuals, g), None, None, None)


def _op(
    dimension_numbers: DimensionNumbers | Sequence[Any],
    lhs: Any,
    rhs: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> DotGeneral:
    dims = operands.canonical_dimension_numbers(dimension_numbers, (lhs.ndim, rhs.ndim))
    if isinstance(precision, list):
        precision = tuple(precision)
    dtype = None if preferred_element_type is None else jnp.dtype(preferred_element_type)
    return DotGeneral(dims, precision, dtype, out_sharding)
