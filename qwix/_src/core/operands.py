"""What every quantized op does with its operands, written once.

An op `sum_k l[.., k] r[k, ..]` (dot_general, conv, ragged_dot) of `l = (ql - zl) sl`, `r = (qr -
zr) sr`, whose scales and zero points do not depend on k, is

    (sum_k ql qr  -  zl sum_k qr  -  zr sum_k ql) sl sr       (one of zl, zr is None)

with the sums on stored elements, exact in int32 for integers. `contract` does that for any op that
says how to sum and how an operand's scale lies on the output. An op whose operands do not allow it
runs on `float_operands`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwix._src.core import numerics, pytree, qarray
from qwix._src.core.qarray import QArray

MaybeQArray = jax.Array | QArray
DotDimensionNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

_INT8 = np.dtype(np.int8)
_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)
_E4M3 = np.dtype(jnp.float8_e4m3fn)
_BFLOAT16 = np.dtype(jnp.bfloat16)


def own_ops(*operands: Any) -> Any:
    """The `QArray.own_ops` of the first operand that has some, else None."""
    for x in operands:
        if isinstance(x, QArray) and (ops := x.own_ops) is not None:
            return ops
    return None


def unwrap(*operands: Any) -> list[Any]:
    """The operands by `qarray.unwrap`; only without their boxes where one of them has ops of its own."""
    unboxed = [pytree.unwrap(x) for x in operands]
    return unboxed if own_ops(*unboxed) is not None else [qarray.unwrap(x) for x in unboxed]


def float_operands(*operands: MaybeQArray) -> list[jax.Array]:
    """The operands dequantized and promoted to one dtype; a QArray is rounded once, to that one."""
    arrays = [x if isinstance(x, QArray) else jnp.asarray(x) for x in operands]
    dtypes = {np.dtype(x.dtype) for x in arrays}
    if len(dtypes) > 1 or any(x.weak_type for x in arrays if not isinstance(x, QArray)):
        dtype = jnp.result_type(*(x.dtype if isinstance(x, QArray) else x for x in arrays))
    else:
        (dtype,) = dtypes
    floats = []
    for x in arrays:
        if isinstance(x, QArray):
            floats.append(qarray.dequantize(x if x.dtype == dtype else x.astype(dtype)))
        else:
            floats.append(_convert(x, dtype))
    return floats


def result_dtype(*operands: MaybeQArray, preferred_element_type: Any) -> np.dtype:
    """The dtype of an op's output: `preferred_element_type`, or the promotion of the operands'.

    Raises:
      ValueError: `preferred_element_type` is no float, so that the scaled result does not fit it.
    """
    _, dtype = qarray.get_accumulator_and_result_type(*operands, preferred_element_type=preferred_element_type)
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact) and any(isinstance(x, QArray) for x in operands):
        raise ValueError(
            f"preferred_element_type={dtype} with a quantized operand: the result of a "
            "quantized op is scaled, use a float dtype."
        )
    return dtype


def canonical_dimension_numbers(dimension_numbers: Any, ndims: tuple[int, int]) -> DotDimensionNumbers:
    """The dimension numbers of a dot_general as tuples of non-negative axes."""
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = dimension_numbers
    lhs_ndim, rhs_ndim = ndims
    return (
        (tuple(a % lhs_ndim for a in lhs_ca), tuple(a % rhs_ndim for a in rhs_ca)),
        (tuple(a % lhs_ndim for a in lhs_ba), tuple(a % rhs_ndim for a in rhs_ba)),
    )


def scale_transposes(dims: DotDimensionNumbers, ndims: tuple[int, int]) -> tuple[list, list]:
    """For lhs and rhs, which of its axes each axis of a dot_general's output is (None: the
    other's).

    >>> scale_transposes((((2,), (1,)), ((0,), (0,))), (3, 3))
    ([0, 1, None], [0, None, 2])
    """
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = dims
    lhs_ra = [a for a in range(ndims[0]) if a not in lhs_ca and a not in lhs_ba]
    rhs_ra = [a for a in range(ndims[1]) if a not in rhs_ca and a not in rhs_ba]
    return [*lhs_ba, *lhs_ra, *[None] * len(rhs_ra)], [*rhs_ba, *[None] * len(lhs_ra), *rhs_ra]


def keepdims_sum(values: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The sum over axes that stay with size 1, in int32: for stored integers."""
    values = lax.convert_element_type(values, _INT32)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(values.shape))
    return lax.reshape(lax.reduce_sum(values, tuple(axes)), shape)


def keeps_storage(lhs: MaybeQArray, rhs: MaybeQArray) -> bool:
    """Whether an op may run on stored elements: both are quantized, in formats that are numbers."""
    return (
        isinstance(lhs, QArray)
        and isinstance(rhs, QArray)
        and numerics.can_dequant_on_output(lhs.qtype)
        and numerics.can_dequant_on_output(rhs.qtype)
    )


def tile_count(array: QArray, axis: int) -> int:
    """The least number of equal parts of an axis on which scale and zero point are constant."""
    count = array.scale.shape[axis]
    if array.zero_point is None:
        return count
    return merged_tile_count(array.shape[axis], count, array.zero_point.shape[axis])


def is_untiled(array: MaybeQArray, axes: Iterable[int]) -> bool:
    """Whether scale and zero point are constant along each of the axes."""
    return isinstance(array, QArray) and all(tile_count(array, axis) == 1 for axis in axes)


def merged_tile_count(size: int, count: int, other: int) -> int:
    """The least number of equal parts that refines two ways of tiling an axis."""
    if count == other:
        return count
    return size // math.gcd(size // count, size // other)


def place(array: jax.Array, transpose: Sequence[int | None]) -> jax.Array:
    """`qarray.transpose_array`, of a scale onto the output; often nothing is to be done."""
    shape = tuple(1 if axis is None else array.shape[axis] for axis in transpose)
    if shape == array.shape:
        varying = [axis for axis in transpose if axis is not None and array.shape[axis] != 1]
        if varying == sorted(varying):
            return array
    return qarray.transpose_array(array, transpose)


class _Values(NamedTuple):
    lhs: jax.Array
    rhs: jax.Array
    lhs_zero_point: jax.Array | None
    rhs_zero_point: jax.Array | None
    accumulator: np.dtype


def contract(
    lhs: QArray,
    rhs: QArray,
    op: Callable[[jax.Array, jax.Array, np.dtype], jax.Array],
    *,
    terms: int,
    lhs_to_out: Callable[[jax.Array], jax.Array],
    rhs_to_out: Callable[[jax.Array], jax.Array],
    sum_lhs: Callable[[jax.Array], jax.Array],
    sum_rhs: Callable[[jax.Array], jax.Array],
    same_dtype: bool = False,
) -> jax.Array:
    """An op of two quantized operands, run on their stored elements (formula at the top of this
    module).

    Args:
      lhs: quantized, with one scale and zero point over whatever is summed for an output element.
      rhs: likewise.
      op: (values, values, accumulator dtype) -> sums in that dtype, in the output's shape.
      terms: how many products are summed for one output element; int32 must not overflow.
      lhs_to_out: array of the shape of lhs.scale -> the same with the output's axes, each 1 or a
        divisor of the output's.
      rhs_to_out: likewise.
      sum_lhs: values of lhs -> their int32 sum over whatever is summed for an output element, with
        the output's axes. Used if rhs has zero points.
      sum_rhs: likewise.
      same_dtype: whether `op` wants both values in one dtype.

    Returns:
      float32 (float64 if a scale is) of the output's shape.

    Raises:
      ValueError: both operands have zero points.
    """
    values = _values(lhs, rhs, terms, same_dtype)
    acc = op(values.lhs, values.rhs, values.accumulator)
    if values.lhs_zero_point is not None:
        acc = _subtract(acc, sum_rhs(values.rhs), lhs_to_out(values.lhs_zero_point))
    elif values.rhs_zero_point is not None:
        acc = _subtract(acc, sum_lhs(values.lhs), rhs_to_out(values.rhs_zero_point))
    dtype = functools.reduce(jnp.promote_types, (lhs.scale.dtype, rhs.scale.dtype), _FLOAT32)
    acc = lax.convert_element_type(acc, dtype)
    for scale in (lhs_to_out(lhs.scale), rhs_to_out(rhs.scale)):
        acc = multiply(acc, lax.convert_element_type(scale, dtype))
    return acc


def multiply(acc: jax.Array, factor: jax.Array) -> jax.Array:
    """acc * factor of one dtype, where each axis of acc is a multiple of the same one of factor."""
    return _broadcast_call(lax.mul, acc, factor)


def _broadcast_call(op: Callable, x: jax.Array, y: jax.Array) -> jax.Array:
    """op(x, y), where each axis of x is a multiple of the same one of y."""
    if all(ny in (1, nx) for nx, ny in zip(x.shape, y.shape, strict=True)):
        return op(x, _stretch(y, x.shape))
    return qarray.call_with_generic_broadcast(lambda x, y: op(x, _stretch(y, x.shape)), x, y)


def _stretch(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x if x.shape == shape else lax.broadcast_in_dim(x, shape, tuple(range(len(shape))))


def _subtract(acc: jax.Array, total: jax.Array, zero_point: jax.Array) -> jax.Array:
    """acc - total * zero_point. int32 terms may wrap around, the difference, in range, is exact."""
    total = qarray.broadcast_to(lax.convert_element_type(total, acc.dtype), acc.shape)
    return lax.sub(acc, multiply(total, lax.convert_element_type(zero_point, acc.dtype)))


def _values(lhs: QArray, rhs: QArray, terms: int, same_dtype: bool) -> _Values:
    if lhs.zero_point is not None and rhs.zero_point is not None:
        raise ValueError(
            "Both operands are asymmetric (have a zero_point): at most one may be. "
            "Quantize one with a symmetric calibration method such as absmax, or dequantize it."
        )
    dtypes = [np.dtype(x.qvalue.dtype) for x in (lhs, rhs)]
    if all(jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes):
        largest = math.prod(_largest(x, dtype) for x, dtype in zip((lhs, rhs), dtypes, strict=True))
        if terms * largest < 2**31:
            types = _integer_types(dtypes, same_dtype)
            left, right = (_convert(x.qvalue, t) for x, t in zip((lhs, rhs), types, strict=True))
            return _Values(left, right, lhs.zero_point, rhs.zero_point, _INT32)
        # 16-bit products, and 8-bit ones beyond some 131000 terms, overflow int32.
        types = [_FLOAT32, _FLOAT32]
    else:
        types = _float_types(dtypes, same_dtype)
    accumulator = functools.reduce(jnp.promote_types, [t for t in types if t.itemsize > 1], _FLOAT32)
    # Differences are exact: of 8-bit integers in bfloat16, of 16-bit ones in float32.
    left, right = (_shifted(x, t) for x, t in zip((lhs, rhs), types, strict=True))
    return _Values(left, right, None, None, np.dtype(accumulator))


def _largest(array: QArray, dtype: np.dtype) -> int:
    """The largest magnitude of qvalue - zero_point."""
    low, high = numerics.integer_range(dtype)  # type: ignore[misc]
    return max(-low, high) if array.zero_point is None else high - low


def _integer_types(dtypes: list[np.dtype], same_dtype: bool) -> list[np.dtype]:
    """The dtypes in which two integer operands are multiplied."""
    bits = [jnp.iinfo(dtype).bits for dtype in dtypes]
    # XLA's CPU and GPU backends (jax 0.10) reject dots and convs of two sub-byte operands; TPUs
    # have them.
    if dtypes[0] != dtypes[1] or (bits[0] < 8 and jax.default_backend() != "tpu"):
        dtypes = [_INT8 if b < 8 else dtype for b, dtype in zip(bits, dtypes, strict=True)]
    return [np.dtype(jnp.promote_types(*dtypes))] * 2 if same_dtype else dtypes


def _float_types(dtypes: list[np.dtype], same_dtype: bool) -> list[np.dtype]:
    """The dtypes in which two operands, not both integers, are multiplied; each one exact."""
    wide = [_at_least_bfloat16(dtype) for dtype in dtypes]
    if all(dtype == _BFLOAT16 for dtype in wide) and all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        # float4_e2m1fn is a subset of e4m3fn, and sub-byte dots fail as integer ones do.
        narrow = [_E4M3 if jnp.finfo(dtype).bits < 8 else dtype for dtype in dtypes]
        if narrow[0] == narrow[1] or (not same_dtype and all(t.itemsize == 1 for t in narrow)):
            return narrow
    return [np.dtype(jnp.promote_types(*wide))] * 2


def _at_least_bfloat16(dtype: np.dtype) -> np.dtype:
    """The narrowest of bfloat16, float32, ... that holds every value of the dtype."""
    if jnp.issubdtype(dtype, jnp.integer):
        return _BFLOAT16 if jnp.iinfo(dtype).bits <= 8 else _FLOAT32
    return _BFLOAT16 if jnp.finfo(dtype).bits <= 8 else dtype


def _shifted(array: QArray, dtype: np.dtype) -> jax.Array:
    """qvalue - zero_point in a float dtype."""
    values = _convert(array.qvalue, dtype)
    if array.zero_point is None:
        return values
    return _broadcast_call(lax.sub, values, lax.convert_element_type(array.zero_point, dtype))


def _convert(x: jax.Array, dtype: np.dtype) -> jax.Array:
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)
