"""QArray, the quantized array, and the way to it: calibrate, compute the scale, round.

    calibration = calibrate(x, how)                    # the range of each group that shares a scale
    scale, zero_point = compute_scale_zero_point(calibration, how.qtype)   # maps it to the format's
    q = quantize_with_scale_zero_point(x, how.qtype, scale, zero_point)    # round(x / scale + zp)
    dequantize(q)                                      # (qvalue - zero_point) * scale ~ x

`quantize(x, how)` does the first three at once. The scale has the rank of x; each axis has size 1
where all of x shares a scale, x's own size where each index has one (channelwise), or the number of
tiles (tiled); `tiling.py` has the arithmetic of such shapes.

NaN and inf never become a finite number in silence. A NaN in x makes the scale of its group NaN, an
inf makes it inf, and then the whole group dequantizes to NaN or inf. Two exceptions, both asked for
by the caller: inf saturates, like any other value outside of it, in a `fixed` range; and a scale
given to `quantize_with_scale_zero_point` is used as it is.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src.core import calibration, numerics, pytree, tiling
from qwix._src.core.calibration import (
    clip_gradient_to_calibration,
    clip_to_calibration,
    compute_scale_zero_point,
)
from qwix._src.core.pytree import array_structure, static
from qwix._src.core.tiling import call_with_generic_broadcast, split_axis, transpose_array

__all__ = [
    "USE_RECIPROCAL_FOR_QUANTIZATION",
    "HowToQuantize",
    "QArray",
    "UnquantizedQArray",
    "broadcast_to",
    "calibrate",
    "call_with_generic_broadcast",
    "clip_gradient_to_calibration",
    "clip_to_calibration",
    "compute_scale_zero_point",
    "dequantize",
    "get_accumulator_and_result_type",
    "get_scale_shape",
    "get_tiled_axes",
    "quantize",
    "quantize_api",
    "quantize_with_scale_zero_point",
    "reshape",
    "rewriting_take",
    "sparsify",
    "split_axis",
    "transpose_array",
    "unwrap",
    "validate_qarray",
]

# Multiply by 1 / scale instead of dividing: faster on some hardware, and up to one step off. XLA
# (jaxlib 0.10.2) does that by itself on the CPU where a scale is shared by several elements.
USE_RECIPROCAL_FOR_QUANTIZATION = False

# See `UnquantizedQArray`.
QUANTIZES_ALIKE = True


@array_structure
class QArray:
    """A quantized array: x ~ (qvalue - zero_point) * scale, by generic broadcasting.

    Attributes:
        qvalue: the elements, in x's shape and the format's storage dtype.
        scale: of x's rank; each axis of qvalue is a multiple of scale's. Its dtype is the dtype of
            the dequantized array.
        zero_point: the qvalue that stands for 0, in qvalue's dtype and a shape like scale's. None
            in symmetric quantization.
        qtype: the format (static). None, the default, means qvalue's dtype.

    Leaves may be boxes of arrays (`nnx.Param`): shape and dtype work on them too, and `unwrap`
    takes the arrays out.

    >>> how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,))
    >>> q = quantize(jnp.array([[1.0, -2.0], [3.0, 4.0]]), how)
    >>> q.shape, q.scale.shape, q.T.scale.shape, q[0].shape
    ((2, 2), (2, 1), (1, 2), (2,))
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: Any = static(default=None)
    replace: ClassVar[Callable[..., "QArray"]]  # array_structure adds it

    def __post_init__(self) -> None:
        # The qvalue is whatever a caller has in a tree: an axis number, a PartitionSpec, None.
        qtype = getattr(self.qvalue, "dtype", None) if self.qtype is None else self.qtype
        if qtype is not None:
            object.__setattr__(self, "qtype", numerics.canonical_qtype(qtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return len(self.qvalue.shape)

    @property
    def size(self) -> int:
        return math.prod(self.qvalue.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized array, which is the scale's."""
        return self.scale.dtype

    @property
    def T(self) -> "QArray":
        return self.transpose()

    @property
    def mT(self) -> "QArray":
        return self.swapaxes(-1, -2)

    @property
    def scale_tile_shape(self) -> tuple[int, ...]:
        """How many elements share a scale along each axis."""
        return tiling.tile_shape(self.qvalue.shape, self.scale.shape)

    @property
    def zero_point_tile_shape(self) -> tuple[int, ...] | None:
        """How many elements share a zero point along each axis; None in symmetric quantization."""
        if self.zero_point is None:
            return None
        return tiling.tile_shape(self.qvalue.shape, self.zero_point.shape)

    @property
    def own_ops(self) -> Any:
        """None; a subclass with kernels of its own returns what has the ops of `core/` that use them.

        Those are called as the ones in `core/`, with operands that are not in `plain` form.
        """
        return None

    def plain(self) -> "QArray":
        """Itself; a subclass that is laid out in another way returns an equal array of this class.

        The functions of this module and the ops call it on every QArray that they are given.
        """
        return self

    def reshape(self, *new_shape: Any) -> "QArray":
        """See `reshape`."""
        return reshape(self, *new_shape)

    def transpose(self, *args: Any) -> "QArray":
        """Permutes the axes, as `jax.Array.transpose` does."""
        return _map_leaves(self, lambda leaf: leaf.transpose(*args))

    def swapaxes(self, axis1: int, axis2: int) -> "QArray":
        """Exchanges two axes."""
        return _map_leaves(self, lambda leaf: leaf.swapaxes(axis1, axis2))

    def astype(self, dtype: Any) -> "QArray":
        """Changes the dtype of the dequantized array; the qvalue stays as it is."""
        array = unwrap(self)
        if array.scale.dtype == np.dtype(dtype):
            return array
        return array.replace(scale=array.scale.astype(dtype))

    def __getitem__(self, idx: Any) -> "QArray":
        return rewriting_take(self, idx)

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of a QArray without axes.")
        return self.shape[0]

    def __iter__(self) -> Iterator["QArray"]:
        return (self[i] for i in range(len(self)))

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("A QArray does not turn into a NumPy array by itself: dequantize it first.")


class UnquantizedQArray(QArray):
    """A float array and how to quantize it, for an op with kernels of its own that quantizes as it computes.

    To everything else it is `plain`, the quantized array. It lives within one op and is no pytree. `module` is this
    one, or another whose `quantize` does the same to whole tiles (`QUANTIZES_ALIKE`).

    >>> x = UnquantizedQArray(jnp.array([1.0, -2.0]), HowToQuantize(qtype=jnp.int8))
    >>> dequantize(x).round(1)
    Array([ 1., -2.], dtype=float32)
    """

    how: "HowToQuantize"
    module: Any

    def __init__(self, array: jax.Array, how: "HowToQuantize", module: Any = None) -> None:
        for name, value in {
            "qvalue": array,
            "scale": array,
            "zero_point": None,
            "qtype": how.qtype,
            "how": how,
            "module": module or sys.modules[__name__],
        }.items():
            object.__setattr__(self, name, value)

    def plain(self) -> QArray:
        return unwrap(self.module.quantize(self.qvalue, self.how))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HowToQuantize:
    """How to quantize an array: the format, what shares a scale, and which range is kept.

    Hashable and compared by value (`noise_fn` by identity).

    Attributes:
        qtype: the number format, see `numerics.py`.
        channelwise_axes: axes with a scale for each index. Negative ones count from the end.
        tiled_axes: axis -> tile size, a scale for each tile. A float f means 1 / (number of tiles):
            the size is round(axis size * f). All other axes share one scale.
        calibration_method: the range that is kept, of each group of elements with one scale:
            - "absmax" or "absmax,s": -+ s max |x|;
            - "minmax" or "minmax,s": s min(x, 0) .. s max(x, 0), asymmetric;
            - "rms,s": -+ s sqrt(mean x^2);
            - "fixed,m" or "fixed,lo,hi": the same for the whole array; it must hold 0, and is
              symmetric if lo == -hi.
        noise_fn: shape -> noise, added before rounding (stochastic rounding).
    """

    qtype: Any
    channelwise_axes: Collection[int] = ()
    tiled_axes: Mapping[int, int | float] = dataclasses.field(default_factory=dict)
    calibration_method: str = "absmax"
    noise_fn: numerics.NoiseFn | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "qtype", numerics.canonical_qtype(self.qtype))
        object.__setattr__(self, "channelwise_axes", tuple(sorted(self.channelwise_axes)))
        object.__setattr__(self, "tiled_axes", dict(sorted(self.tiled_axes.items())))

    def __hash__(self) -> int:
        tiles = tuple(self.tiled_axes.items())
        return hash((self.qtype, self.channelwise_axes, tiles, self.calibration_method, self.noise_fn))


def unwrap(obj: Any) -> Any:
    """`pytree.unwrap`, and of a QArray the `QArray.plain`: what functions of arrays start with."""
    obj = pytree.unwrap(obj)
    return obj.plain() if isinstance(obj, QArray) else obj


def quantize(array: jax.Array, how: HowToQuantize) -> QArray:
    """Quantizes an array with scales found from its own values.

    Args:
        array: float16, bfloat16, float32 or float64; ValueError for other dtypes.
        how: format, granularity and calibration method.

    Returns:
        A QArray whose scale has array's dtype and the shape `get_scale_shape(array.shape, how)`.

    >>> how = HowToQuantize(qtype="int4", tiled_axes={1: 2})
    >>> q = quantize(jnp.array([[0.2, -0.5, 4.0, 2.1]]), how)
    >>> q.qvalue.tolist(), q.scale.shape
    ([[3, -7, 7, 4]], (1, 2))
    """
    return _quantize(array, how, None)


def quantize_api(
    array: jax.Array,
    qtype: Any,
    *,
    channelwise_axes: Collection[int] = (),
    tiled_axes: Mapping[int, int | float] | None = None,
    calibration_method: str = "absmax",
    scale_dtype: Any = None,
) -> QArray:
    """Quantizes an array with scales found from its own values; this is `qwix.quantize`.

    Args:
        array: float16, bfloat16, float32 or float64; ValueError for other dtypes.
        qtype: the format, such as `jnp.int8` or `"nf4"`.
        channelwise_axes: axes with a scale for each index.
        tiled_axes: axis -> tile size, see `HowToQuantize`.
        calibration_method: see `HowToQuantize`.
        scale_dtype: the scale's dtype, and with it the dtype of the dequantized array. None means
            array's dtype. Elements are rounded against the scale in this dtype.

    >>> quantize_api(jnp.ones((4, 8)), jnp.int8, channelwise_axes=(0,)).scale.shape
    (4, 1)
    """
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=channelwise_axes,
        tiled_axes=tiled_axes or {},
        calibration_method=calibration_method,
    )
    return _quantize(array, how, None if scale_dtype is None else np.dtype(scale_dtype))


def dequantize(array: QArray) -> jax.Array:
    """(qvalue - zero_point) * scale, in the scale's dtype.

    The arithmetic is in float32 (float64 for a float64 scale) and rounds once, at the end.

    >>> dequantize(QArray(jnp.array([[2, -4]], jnp.int8), jnp.array([[0.5]])))
    Array([[ 1., -2.]], dtype=float32)
    """
    array = unwrap(array)
    if not isinstance(array, QArray):
        raise TypeError(f"dequantize takes a QArray, got {type(array).__name__}.")
    return _dequantize(array)


def quantize_with_scale_zero_point(
    array: jax.Array,
    qtype: Any,
    scale: jax.Array,
    zero_point: jax.Array | None,
    noise_fn: numerics.NoiseFn | None = None,
) -> QArray:
    """Quantizes with a given scale: qvalue = round(array / scale + zero_point), saturating.

    The arithmetic is in float32 (float64 for a float64 array). A NaN in `array` is lost if the
    format has none (integers, nf4, float4), since the scale stays as it is; `quantize` keeps it.

    Args:
        array: float16, bfloat16, float32 or float64; ValueError for other dtypes.
        qtype: the format.
        scale: of array's rank, each axis of array a multiple of scale's; ValueError if not.
        zero_point: None or likewise.
        noise_fn: shape -> noise, added before rounding.

    >>> scale = jnp.array([[0.5]])
    >>> quantize_with_scale_zero_point(jnp.array([[1.0, -2.0]]), jnp.int8, scale, None).qvalue
    Array([[ 2, -4]], dtype=int8)
    """
    array, scale, zero_point = unwrap(array), unwrap(scale), unwrap(zero_point)
    _check_dtype(array)
    tiling.check_divides("scale", scale.shape, array.shape)
    if zero_point is not None:
        tiling.check_divides("zero_point", zero_point.shape, array.shape)
        numerics.get_asymmetric_bound(qtype)
    narrow = not _views_instead_of_narrowing(array, qtype)
    round_fn = _round_jit if noise_fn is None else _round
    quantized = round_fn(
        array,
        numerics.canonical_qtype(qtype),
        scale,
        zero_point,
        noise_fn,
        USE_RECIPROCAL_FOR_QUANTIZATION,
        narrow,
    )
    return quantized if narrow else _view(quantized)


def calibrate(array: jax.Array, how: HowToQuantize) -> dict[str, jax.Array]:
    """Finds the range that is kept, of each group of elements that share a scale.

    Returns:
        {"absmax": a} for symmetric quantization, {"min": a, "max": b} for asymmetric, in array's
        dtype and the scale's shape (all ones for "fixed"), by the formulas in `HowToQuantize`. A
        NaN in a group makes its range NaN.

    Raises:
        ValueError: the method is unknown, has a wrong number of arguments, or is a fixed range that
            does not hold 0.

    >>> how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), calibration_method="absmax,0.5")
    >>> calibrate(jnp.array([[1.0, -4.0], [2.0, 0.0]]), how)["absmax"].tolist()
    [[2.0], [1.0]]
    """
    # Without noise_fn, which the cache of a jitted function would keep alive, tracers and all.
    return _calibrate(unwrap(array), dataclasses.replace(how, noise_fn=None))


def get_scale_shape(array_shape: Sequence[int], how: HowToQuantize) -> tuple[int, ...]:
    """The scale's shape: by axis the size if channelwise, the number of tiles if tiled, or 1.

    Raises ValueError if an axis does not exist, is both, or is not divided by its tile.

    >>> how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes={-1: 2})
    >>> get_scale_shape((4, 6, 8), how)
    (4, 1, 4)
    """
    shape = tuple(array_shape)
    scale_shape = [1] * len(shape)
    channelwise = {tiling.axis_index(shape, axis) for axis in how.channelwise_axes}
    for axis in channelwise:
        scale_shape[axis] = shape[axis]
    for key, tile in how.tiled_axes.items():
        axis = tiling.axis_index(shape, key)
        if axis in channelwise:
            raise ValueError(f"Axis {axis} of {shape} is both channelwise and tiled: drop one.")
        scale_shape[axis] = shape[axis] // tiling.tile_size(shape, axis, tile)
    return tuple(scale_shape)


def get_tiled_axes(array: QArray) -> dict[int, int]:
    """{axis: tile size} of the axes along which a scale covers several elements, but not all.

    >>> get_tiled_axes(QArray(jnp.ones((4, 6, 8), jnp.int8), jnp.ones((4, 1, 2))))
    {2: 4}
    """
    sizes = enumerate(zip(array.shape, array.scale.shape, strict=True))
    return {axis: size // count for axis, (size, count) in sizes if 1 < count < size}


def validate_qarray(array: QArray) -> None:
    """Raises ValueError where ranks, sizes or dtypes of a QArray's parts do not fit together."""
    array = unwrap(array)
    dtype = numerics.storage_dtype(array.qtype)
    if array.qvalue.dtype != dtype:
        raise ValueError(f"{array.qtype} is stored as {dtype}, qvalue is {array.qvalue.dtype}.")
    if not jnp.issubdtype(array.scale.dtype, jnp.floating):
        raise ValueError(f"scale must be a float array, but is {array.scale.dtype}.")
    tiling.check_divides("scale", array.scale.shape, array.shape)
    if array.zero_point is not None:
        if array.zero_point.dtype != dtype:
            raise ValueError(f"zero_point must be {dtype}, but is {array.zero_point.dtype}.")
        tiling.check_divides("zero_point", array.zero_point.shape, array.shape)


def sparsify(array: jax.Array, how: Any) -> jax.Array:
    """Applies the N:M sparsity that `how` asks for; the array itself if it asks for none.

    `how` may have `weight_sparsity_n` and `weight_sparsity_m`, as a sparsity rule does.
    """
    n, m = (getattr(how, f"weight_sparsity_{name}", 0) for name in "nm")
    if not (n and m):
        return array
    from qwix._src.core import sparsity  # which knows QArrays

    order, offset = getattr(how, "weight_sparsity_order", "R"), getattr(how, "weight_sparsity_offset", 0)
    block_size = getattr(how, "weight_sparsity_block_size", 0)
    mask = sparsity.get_sparsity_mask(array, n, m, order, block_size, offset)
    return sparsity.apply_sparsity(array, mask)


def get_accumulator_and_result_type(
    *args: jax.Array | QArray, preferred_element_type: Any
) -> tuple[np.dtype, np.dtype]:
    """The dtypes in which a matmul of the operands accumulates, and of its result.

    Result: `preferred_element_type`, or the promotion of the operands' dtypes (of a QArray, its
    dequantized one). Accumulator: the result's if any operand is stored in 16 bits or more of
    float; int32 for integers, whose products of two bytes it sums exactly up to 131071 terms, but
    float32 for quantized 16-bit integers, whose sums it does not hold; and float32 for formats of 8
    and 4 bits.

    >>> q = quantize_api(jnp.ones((2, 2), jnp.bfloat16), jnp.int8)
    >>> get_accumulator_and_result_type(q, q, preferred_element_type=None)
    (dtype('int32'), dtype(bfloat16))
    """
    result = preferred_element_type
    if result is None:
        result = functools.reduce(jnp.promote_types, (arg.dtype for arg in args))
    result = np.dtype(result)
    stored = [np.dtype(a.qvalue.dtype if isinstance(a, QArray) else a.dtype) for a in args]
    if any(numerics.should_quantize(dtype) for dtype in stored):
        return result, result
    exact = all(jnp.issubdtype(dtype, jnp.integer) for dtype in stored)
    if any(isinstance(a, QArray) for a in args):
        exact &= all(dtype.itemsize == 1 for dtype in stored)
    return np.dtype(jnp.int32 if exact else jnp.float32), result


def broadcast_to(operand: Any, target_shape: Sequence[int]) -> Any:
    """Broadcasts an array or a QArray: an axis whose size divides the target's repeats elements.

    Missing leading axes are added. A QArray's scale is not repeated, as its tiles grow with the
    axes. Raises ValueError if a size does not divide.

    >>> broadcast_to(jnp.arange(2), (4,)).tolist()
    [0, 0, 1, 1]
    """
    operand = unwrap(operand)
    if not isinstance(operand, QArray):
        return tiling.broadcast_array_to(operand, target_shape)
    qvalue = tiling.broadcast_array_to(operand.qvalue, target_shape)
    lead = (1,) * (qvalue.ndim - operand.ndim)
    operand = _map_leaves(operand, lambda leaf: leaf.reshape(lead + leaf.shape))
    return operand.replace(qvalue=qvalue)


def reshape(array: QArray, *new_shape: Any) -> QArray:
    """Reshapes a QArray where its scale can follow without being repeated.

    Axes may be merged and split, as long as each new axis consists of whole tiles or lies in one.
    One size may be -1. Raises ValueError, naming both shapes, where that cannot be.

    >>> q = QArray(jnp.ones((4, 6), jnp.int8), jnp.ones((4, 3)))
    >>> q.reshape(2, 2, 6).scale.shape, q.reshape(4, 3, 2).scale.shape, q.reshape(-1).scale.shape
    ((2, 2, 3), (4, 3, 1), (12,))
    """
    array = unwrap(array)
    single = new_shape[0] if len(new_shape) == 1 else new_shape
    target = tuple(map(int, single if isinstance(single, Sequence) else new_shape))
    if target.count(-1) == 1:
        rest = -math.prod(target)
        if rest and array.size % rest == 0:
            target = tuple(array.size // rest if n == -1 else n for n in target)
    if any(n < 0 for n in target) or math.prod(target) != array.size:
        raise ValueError(f"Cannot reshape a QArray of shape {array.shape} to {target}.")

    def follow(leaf: jax.Array) -> jax.Array:
        shape = tiling.reshaped_scale_shape(array.shape, leaf.shape, target)
        if shape is None:
            raise ValueError(
                f"Cannot reshape a QArray of shape {array.shape} to {target}: its scale or zero "
                f"point of shape {leaf.shape} cannot follow. Dequantize it first, or choose "
                "another tile size."
            )
        return tiling.regroup(leaf, shape)

    shared = _map_leaves(array.replace(qvalue=array.scale), follow)
    return shared.replace(qvalue=tiling.regroup(array.qvalue, target))


def rewriting_take(array: Any, idx: Any) -> Any:
    """array[idx] for an array or a QArray, with any index that a `jax.Array` takes.

    On a tiled axis, a slice keeps the largest tiles that divide its start and length and the old
    tile; single indices and index arrays get each element's scale.

    >>> q = QArray(jnp.ones((4, 8), jnp.int8), jnp.ones((1, 2)))
    >>> q[:, 4:].scale.shape, q[:, 2:6].scale.shape, q[:, 5].scale.shape
    ((1, 1), (1, 2), (1,))
    >>> q[:, jnp.array([0, 5, 7])].scale.shape
    (1, 3)
    """
    if isinstance(array, QArray) and array.own_ops is not None:
        return array[idx]  # which knows its layout, and need not be `plain`
    array = unwrap(array)
    if not isinstance(array, QArray):
        return array[idx]
    entries = tiling.expand_index(idx, array.shape)
    shape = array.shape
    shared = _map_leaves(array.replace(qvalue=array.scale), lambda leaf: tiling.take_shared(leaf, entries, shape))
    return shared.replace(qvalue=array.qvalue[entries])


def _map_leaves(array: QArray, fn: Callable[[jax.Array], jax.Array]) -> QArray:
    array = unwrap(array)
    zero_point = None if array.zero_point is None else fn(array.zero_point)
    return array.replace(qvalue=fn(array.qvalue), scale=fn(array.scale), zero_point=zero_point)


def _check_dtype(array: Any) -> None:
    if isinstance(array, QArray):
        raise ValueError("Cannot quantize a QArray: it is quantized already; dequantize it first.")
    if not numerics.should_quantize(array.dtype):
        raise ValueError(
            f"Cannot quantize an array of {array.dtype}: only float16, bfloat16, float32 and float64 are quantized."
        )


# ---------------------------------------------------------------- what runs on the device
#
# Pure functions, jitted, so that a call outside of jit is one or two fused loops instead of an
# operation and a copy for each line. `inline` leaves no trace of that in a caller's jaxpr.


def _round(
    array: jax.Array,
    qtype: Any,
    scale: jax.Array,
    zero_point: jax.Array | None,
    noise_fn: numerics.NoiseFn | None,
    reciprocal: bool,
    narrow: bool,
) -> QArray:
    dtype = calibration.compute_dtype(array.dtype)
    x, divisor = array.astype(dtype), scale.astype(dtype)
    if reciprocal:
        x = call_with_generic_broadcast(jnp.multiply, x, 1 / divisor)
    else:
        x = call_with_generic_broadcast(jnp.divide, x, divisor)
    if zero_point is not None:
        x = call_with_generic_broadcast(jnp.add, x, zero_point.astype(dtype))
    qvalue = numerics.encode(x, qtype, noise_fn)
    return QArray(numerics.narrow(qvalue, qtype) if narrow else qvalue, scale, zero_point, qtype)


def _calibrate_and_round(
    array: jax.Array,
    how: HowToQuantize,
    scale_dtype: np.dtype | None,
    reciprocal: bool,
    narrow: bool,
) -> QArray:
    scale, zero_point = compute_scale_zero_point(calibrate(array, how), how.qtype)
    if scale_dtype is not None:
        scale = calibration.cast_above_zero(scale, scale_dtype)
    return _round(array, how.qtype, scale, zero_point, how.noise_fn, reciprocal, narrow)


_round_jit = jax.jit(_round, static_argnums=(1, 4, 5, 6), inline=True)
_calibrate_and_round_jit = jax.jit(_calibrate_and_round, static_argnums=(1, 2, 3, 4), inline=True)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _calibrate(array: jax.Array, how: HowToQuantize) -> dict[str, jax.Array]:
    scale_shape = get_scale_shape(array.shape, how)
    return calibration.find_range(array, how.calibration_method, scale_shape)


@functools.partial(jax.jit, inline=True)
def _dequantize(array: QArray) -> jax.Array:
    dtype = calibration.compute_dtype(array.scale.dtype)
    x = numerics.convert_from(array.qvalue, array.qtype).astype(dtype)
    if array.zero_point is not None:
        x = call_with_generic_broadcast(jnp.subtract, x, array.zero_point.astype(dtype))
    x = call_with_generic_broadcast(jnp.multiply, x, array.scale.astype(dtype))
    return x.astype(array.scale.dtype)


def _quantize(array: jax.Array, how: HowToQuantize, scale_dtype: np.dtype | None) -> QArray:
    array = unwrap(array)
    _check_dtype(array)
    narrow = not _views_instead_of_narrowing(array, how.qtype)
    # The cache of a jitted function would keep a noise function alive, and tracers that it holds.
    quantize_fn = _calibrate_and_round_jit if how.noise_fn is None else _calibrate_and_round
    quantized = quantize_fn(array, how, scale_dtype, USE_RECIPROCAL_FOR_QUANTIZATION, narrow)
    return quantized if narrow else _view(quantized)


def _views_instead_of_narrowing(array: Any, qtype: Any) -> bool:
    """Whether to bring bytes into a 4- or 2-bit dtype with a NumPy view, outside of XLA.

    XLA's CPU backend (jaxlib 0.10.2) keeps such elements in a byte each, but converts to them one
    by one, which takes longer than all the rest of quantizing. Once that loop vectorizes, this and
    `_view` can go.
    """
    return (
        jax.dtypes.itemsize_bits(numerics.storage_dtype(qtype)) < 8
        and isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and array.is_fully_addressable
        and [device.platform for device in array.devices()] == ["cpu"]
    )


def _view(array: QArray) -> QArray:
    dtype = numerics.storage_dtype(array.qtype)
    codes = array.qvalue
    if isinstance(codes, jax.core.Tracer):  # of an array from outside of a trace
        return array.replace(qvalue=numerics.narrow(codes, array.qtype))
    device = codes.sharding if codes.committed else None
    return array.replace(qvalue=jax.device_put(np.asarray(codes).view(dtype), device))
