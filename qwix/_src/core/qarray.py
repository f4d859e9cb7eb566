"""QArray, the quantized array, and the way to it: calibrate, compute the scale, round.

    calibration = calibrate(x, how)                                   # range of each group of elements that share a scale
    scale, zero_point = compute_scale_zero_point(calibration, qtype)  # maps that range onto the format's
    q = quantize_with_scale_zero_point(x, qtype, scale, zero_point)   # q.qvalue = round(x / scale + zero_point)
    dequantize(q)                                                     # (qvalue - zero_point) * scale ~ x

`quantize(x, how)` does the first three in one. A scale has the rank of x, and every axis of x is a multiple of the same
axis of the scale: 1 on an axis that shares one scale, x's own size on a channelwise axis, the number of tiles on a tiled
one. "Generic broadcasting" below means an element-wise operation between such shapes.

NaN and inf are never turned into a finite number in silence: a NaN in x makes the scale of its group NaN, an inf makes it
inf, and so that whole group dequantizes to NaN or inf. Only where a range was given by the caller (`fixed`, or a scale
passed to `quantize_with_scale_zero_point`) does inf saturate like any other value beyond it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src.core import numerics
from qwix._src.core.pytree import array_structure, static, unwrap

__all__ = [  # what other modules use; `unwrap` is here because operations on QArrays start with it
    "USE_RECIPROCAL_FOR_QUANTIZATION",
    "HowToQuantize",
    "QArray",
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

# Whether x is multiplied by 1 / scale instead of divided by scale: faster on some hardware, up to one step off.
USE_RECIPROCAL_FOR_QUANTIZATION = False


@array_structure
class QArray:
    """A quantized array: x ~ (qvalue - zero_point) * scale, with generic broadcasting.

    Attributes:
        qvalue: the elements in the format's storage dtype, in x's shape.
        scale: rank of x; each axis of qvalue is a multiple of the same axis of scale. Its dtype is the dtype of the
            dequantized array.
        zero_point: the qvalue that stands for 0, in qvalue's dtype; rank and divisibility as for the scale. None if
            quantization is symmetric.
        qtype: the format (static). None means qvalue's dtype.

    The leaves may be boxes of arrays (`nnx.Param`); shape and dtype work on those as well, `unwrap` takes the arrays out.

    >>> q = quantize(jnp.array([[1.0, -2.0], [3.0, 4.0]]), HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,)))
    >>> q.shape, q.scale.shape, q.T.scale.shape, q[0].shape
    ((2, 2), (2, 1), (1, 2), (2,))
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: Any = static(default=None)

    def __post_init__(self) -> None:
        # The qvalue may be anything that a caller puts in a tree: an axis number, a PartitionSpec, None.
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
    def T(self) -> "QArray":  # noqa: N802 (NumPy's name)
        return self.transpose()

    @property
    def mT(self) -> "QArray":  # noqa: N802 (NumPy's name)
        return self.swapaxes(-1, -2)

    @property
    def scale_tile_shape(self) -> tuple[int, ...]:
        """How many elements share one scale along each axis."""
        return _tile_shape(self.qvalue.shape, self.scale.shape)

    @property
    def zero_point_tile_shape(self) -> tuple[int, ...] | None:
        """How many elements share one zero point along each axis; None without zero points."""
        if self.zero_point is None:
            return None
        return _tile_shape(self.qvalue.shape, self.zero_point.shape)

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
        raise TypeError(
            "A QArray is not converted to a NumPy array in silence: call dequantize(array) first."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HowToQuantize:
    """How to quantize an array. Hashable, compared by value (`noise_fn` by identity).

    Attributes:
        qtype: the number format, see `numerics`.
        channelwise_axes: axes with a scale for each index.
        tiled_axes: axis -> tile size: a scale for each tile of that many elements. A float f means 1 / (number of
            tiles): the size is round(axis size * f). Other axes share one scale. Negative axes count from the end.
        calibration_method: which range of values is kept; scales are found per group of elements that share one.
            - `absmax[,s]`: +- s * max |x|;
            - `minmax[,s]`: s * [min(x, 0), max(x, 0)], asymmetric;
            - `rms,s`: +- s * sqrt(mean x^2);
            - `fixed,m`, `fixed,lo,hi`: that range for the whole array, which must hold 0; symmetric if lo == -hi.
        noise_fn: shape -> noise that is added before rounding (stochastic rounding).
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
        tiled_axes = tuple(self.tiled_axes.items())
        return hash(
            (self.qtype, self.channelwise_axes, tiled_axes, self.calibration_method, self.noise_fn)
        )


# ---------------------------------------------------------------- quantize and dequantize


def quantize(array: jax.Array, how: HowToQuantize) -> QArray:
    """Quantizes an array with scales found from its own values.

    Args:
        array: float16, bfloat16, float32 or float64; other dtypes raise ValueError.
        how: format, granularity and calibration method.

    Returns:
        A QArray whose scale has array's dtype and the shape `get_scale_shape(array.shape, how)`.

    >>> q = quantize(jnp.array([[0.1, -0.5, 4.0, 2.0]]), HowToQuantize(qtype='int4', tiled_axes={1: 2}))
    >>> q.qvalue.tolist(), q.scale.shape
    ([[2, -8, 7, 4]], (1, 2))
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
    """Quantizes an array; this is `qwix.quantize`.

    Args:
        array: float16, bfloat16, float32 or float64; other dtypes raise ValueError.
        qtype: the format, e.g. `jnp.int8`, `'nf4'`.
        channelwise_axes: axes with a scale for each index.
        tiled_axes: axis -> tile size, see `HowToQuantize`.
        calibration_method: see `HowToQuantize`.
        scale_dtype: the scale's dtype, and with it the dtype of the dequantized array. None means array's dtype. The
            elements are rounded against the scale as stored.

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

    The arithmetic is in float32 (float64 for a float64 scale) and rounds once at the end.

    >>> dequantize(QArray(jnp.array([[2, -4]], jnp.int8), jnp.array([[0.5]])))
    Array([[ 1., -2.]], dtype=float32)
    """
    return _dequantize_jit(unwrap(array))


def quantize_with_scale_zero_point(
    array: jax.Array,
    qtype: Any,
    scale: jax.Array,
    zero_point: jax.Array | None,
    noise_fn: numerics.NoiseFn | None = None,
) -> QArray:
    """Quantizes with a given scale: qvalue = round(array / scale + zero_point), saturating.

    The division is in float32 (float64 for a float64 array). A NaN in `array` that the format cannot hold (integers,
    nf4, float4) is lost, since the scale is taken as it is; `quantize` keeps it.

    Args:
        array: float16, bfloat16, float32 or float64; other dtypes raise ValueError.
        qtype: the format.
        scale: rank of array; each axis of array must be a multiple of the same axis of scale, or ValueError.
        zero_point: None, or likewise.
        noise_fn: shape -> noise that is added before rounding.
    """
    array, scale, zero_point = unwrap(array), unwrap(scale), unwrap(zero_point)
    _check_dtype(array)
    for name, leaf in (("scale", scale), ("zero_point", zero_point)):
        if leaf is not None:
            _check_divides(name, leaf.shape, array.shape)
    if zero_point is not None:
        numerics.get_asymmetric_bound(qtype)
    return _quantize_with_scale_zero_point(array, qtype, scale, zero_point, noise_fn)


def calibrate(array: jax.Array, how: HowToQuantize) -> dict[str, jax.Array]:
    """Finds the range of values to keep, for each group of elements that share a scale.

    Returns:
        {'absmax': a} for symmetric quantization or {'min': a, 'max': b}, in array's dtype and the scale's shape (all
        ones for `fixed`), by the formulas in `HowToQuantize`. A NaN in a group makes its range NaN.

    Raises:
        ValueError: for an unknown method, a wrong number of arguments, or a fixed range that does not hold 0.

    >>> how = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), calibration_method='absmax,0.5')
    >>> calibrate(jnp.array([[1.0, -4.0], [2.0, 0.0]]), how)['absmax'].tolist()
    [[2.0], [1.0]]
    """
    array = unwrap(array)
    method, args = _parse_calibration_method(how.calibration_method)
    shape = get_scale_shape(array.shape, how)
    if method == "fixed":
        # The range is known, but a NaN has to reach the scale.
        poison = jnp.where(jnp.isnan(array).any(), jnp.nan, 0).astype(array.dtype)
        low, high = args if len(args) == 2 else (-args[0], args[0])
        bounds = {"absmax": high} if low == -high else {"min": low, "max": high}
        ones = (1,) * array.ndim
        return {k: jnp.full(ones, v, array.dtype) + poison for k, v in bounds.items()}

    tiles = array.reshape(_tiled_shape(array.shape, shape))
    within = tuple(range(1, tiles.ndim, 2))

    def reduce(op: Callable, x: jax.Array, **kwargs: Any) -> jax.Array:
        return op(x, axis=within, **kwargs).reshape(shape)

    factor = args[0] if args else 1
    if method == "absmax":
        return {"absmax": reduce(jnp.max, jnp.abs(tiles), initial=0) * factor}
    if method == "minmax":
        low = reduce(jnp.min, tiles, initial=0) * factor
        return {"min": low, "max": reduce(jnp.max, tiles, initial=0) * factor}
    square = jnp.square(tiles.astype(_compute_dtype(array.dtype)))
    return {"absmax": (jnp.sqrt(reduce(jnp.mean, square)) * factor).astype(array.dtype)}


def compute_scale_zero_point(
    calibration: Mapping[str, jax.Array], qtype: Any
) -> tuple[jax.Array, jax.Array | None]:
    """The scale, and the zero point if the range is asymmetric, that map a range onto the format.

    Symmetric: scale = absmax / B. Asymmetric: scale = (max - min) / (qmax - qmin), zero_point = qmin - min / scale,
    rounded into the format. A scale below sqrt(smallest normal number) becomes 1, so that an all-zero group stays zero
    (in float16, whose numbers all can be scales: only a zero one, and others never round to zero).

    mxfp formats: the largest power of two <= absmax / B * c, with c = 12/7 for mxfp4 and 60/31 for mxfp8, which lets
    the largest element saturate a little for a finer step below (outlier-aware scaling, arXiv 2603.08713). nvfp4:
    absmax / B rounded to a value of e4m3fn; where that would overflow or vanish, to its 4 significant bits.

    Args:
        calibration: what `calibrate` returns.
        qtype: the format.

    Returns:
        (scale in the range's dtype, zero_point in the format's storage dtype or None).

    >>> scale, zero_point = compute_scale_zero_point({'min': jnp.array([-1.0]), 'max': jnp.array([4.1])}, jnp.int8)
    >>> scale, zero_point
    (Array([0.02], dtype=float32), Array([-78], dtype=int8))
    """
    canonical = numerics.canonical_qtype(qtype)
    if "absmax" in calibration:
        absmax = unwrap(calibration["absmax"])
        dtype = absmax.dtype
        absmax = absmax.astype(_compute_dtype(dtype))
        bound = numerics.get_symmetric_bound(canonical)
        if canonical in _MXFP_FULL_SCALE:
            scale = _floor_to_power_of_two(absmax / _MXFP_FULL_SCALE[canonical])
        elif canonical == "nvfp4":
            scale = _round_to_e4m3(absmax / bound)
        else:
            scale = absmax / bound
        return _storable_scale(scale, dtype), None
    if not {"min", "max"} <= calibration.keys():
        raise ValueError(
            f"A calibration is {{'absmax'}} or {{'min', 'max'}}, got {set(calibration)}."
        )
    qmin, qmax = numerics.get_asymmetric_bound(canonical)
    low, high = unwrap(calibration["min"]), unwrap(calibration["max"])
    dtype = low.dtype
    low, high = (v.astype(_compute_dtype(dtype)) for v in (low, high))
    scale = _storable_scale((high - low) / (qmax - qmin), dtype)
    zero_point = numerics.convert_to(qmin - low / scale.astype(low.dtype), canonical)
    return scale, zero_point


def validate_qarray(array: QArray) -> None:
    """Raises ValueError where the parts of a QArray do not fit together: ranks, divisibility, dtypes."""
    array = unwrap(array)
    dtype = numerics.storage_dtype(array.qtype)
    if array.qvalue.dtype != dtype:
        raise ValueError(
            f"{array.qtype} is stored as {dtype}, but qvalue has {array.qvalue.dtype}."
        )
    if not jnp.issubdtype(array.scale.dtype, jnp.floating):
        raise ValueError(f"scale must be a float array, but has {array.scale.dtype}.")
    _check_divides("scale", array.scale.shape, array.shape)
    if array.zero_point is not None:
        if array.zero_point.dtype != dtype:
            raise ValueError(
                f"zero_point must have qvalue's dtype {dtype}, but has {array.zero_point.dtype}."
            )
        _check_divides("zero_point", array.zero_point.shape, array.shape)


def sparsify(array: jax.Array, how: Any) -> jax.Array:
    """Applies an N:M sparsity rule; returns the array unchanged if `how` holds none.

    `how` is anything that may have `weight_sparsity_n` and `weight_sparsity_m` (see `core/sparsity.py`).
    """
    n = getattr(how, "weight_sparsity_n", 0)
    m = getattr(how, "weight_sparsity_m", 0)
    if not n or not m:
        return array
    raise NotImplementedError(f"{n}:{m} sparsity is not there yet.")


def clip_to_calibration(
    array: jax.Array,
    calibration: Mapping[str, jax.Array],
    tiled_axes: Mapping[int, int | float],
) -> jax.Array:
    """Clips an array to the range that `calibrate` found, with generic broadcasting.

    `tiled_axes` (axis -> tile size) must agree with the calibration's shape; ValueError if not.
    """
    low, high = _calibration_range(calibration)
    for axis, tile in tiled_axes.items():
        count = array.shape[axis] // _tile_size(array.shape, axis, tile)
        if low.shape[axis] not in (1, count):
            raise ValueError(
                f"Calibration of shape {low.shape} does not fit {array.shape} tiled as {dict(tiled_axes)}."
            )
    array = call_with_generic_broadcast(jnp.maximum, array, low)
    return call_with_generic_broadcast(jnp.minimum, array, high)


def clip_gradient_to_calibration(
    g: jax.Array,
    array: jax.Array,
    calibration: Mapping[str, jax.Array],
    calibration_method: str,
) -> jax.Array:
    """The straight-through gradient: zero where `array` lies outside of its calibrated range.

    Returns g itself for methods whose range holds every element (absmax and minmax with a factor of at least 1).
    """
    method, args = _parse_calibration_method(calibration_method)
    if method in ("absmax", "minmax") and (not args or args[0] >= 1):
        return g
    low, high = _calibration_range(calibration)
    inside = call_with_generic_broadcast(jnp.greater_equal, array, low)
    inside &= call_with_generic_broadcast(jnp.less_equal, array, high)
    return jnp.where(inside, g, 0)


def get_accumulator_and_result_type(
    *args: jax.Array | QArray, preferred_element_type: Any
) -> tuple[Any, Any]:
    """The dtypes in which a matmul of the operands accumulates, and of its result.

    Result: `preferred_element_type`, or the promotion of the operands' dtypes (of the dequantized array for QArrays).
    Accumulator, if the matmul runs on stored elements (all operands integers or 4- and 8-bit floats): int32 for
    integers of up to 8 bits, whose sums int32 holds for contractions up to 131071 long; float32 otherwise, 16-bit
    integers included, whose products would overflow int32 soon. With a float operand: the result type.

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
    if all(jnp.issubdtype(d, jnp.integer) for d in stored):
        narrow = all(d.itemsize == 1 for d in stored) or not any(
            isinstance(a, QArray) for a in args
        )
        return np.dtype(jnp.int32 if narrow else jnp.float32), result
    return np.dtype(jnp.float32), result


# ---------------------------------------------------------------- shapes


def get_scale_shape(array_shape: Sequence[int], how: HowToQuantize) -> tuple[int, ...]:
    """The scale's shape for an array: 1, or the axis size if channelwise, or the number of tiles if tiled.

    Raises ValueError if an axis does not exist, is both channelwise and tiled, or is not divided by its tile.

    >>> get_scale_shape((4, 6, 8), HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes={-1: 2}))
    (4, 1, 4)
    """
    shape = tuple(array_shape)
    if not how.channelwise_axes and not how.tiled_axes:
        return (1,) * len(shape)
    scale_shape = [1] * len(shape)
    channelwise = {_axis(shape, axis) for axis in how.channelwise_axes}
    for axis in channelwise:
        scale_shape[axis] = shape[axis]
    for axis, tile in how.tiled_axes.items():
        axis = _axis(shape, axis)
        if axis in channelwise:
            raise ValueError(
                f"Axis {axis} of {shape} cannot be both channelwise and tiled: drop it from one."
            )
        scale_shape[axis] = shape[axis] // _tile_size(shape, axis, tile)
    return tuple(scale_shape)


def get_tiled_axes(array: QArray) -> dict[int, int]:
    """{axis: tile size} of the axes where a scale covers more than one element and less than all.

    >>> get_tiled_axes(QArray(jnp.ones((4, 6, 8), jnp.int8), jnp.ones((4, 1, 2))))
    {2: 4}
    """
    sizes = enumerate(zip(array.shape, array.scale.shape, strict=True))
    return {axis: size // count for axis, (size, count) in sizes if 1 < count < size}


def split_axis(array: Any, tiled_axes: Mapping[int, int | float]) -> Any:
    """Reshapes each tiled axis into two, (number of tiles, tile size). Takes arrays and QArrays.

    >>> split_axis(jnp.ones((4, 6)), {1: 2}).shape
    (4, 3, 2)
    """
    tiles = {_axis(array.shape, axis): tile for axis, tile in tiled_axes.items()}
    new_shape: list[int] = []
    for axis, size in enumerate(array.shape):
        if axis in tiles:
            tile = _tile_size(array.shape, axis, tiles[axis])
            new_shape += [size // tile, tile]
        else:
            new_shape.append(size)
    return array.reshape(tuple(new_shape))


def call_with_generic_broadcast(
    op: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, y: jax.Array
) -> jax.Array:
    """op(x, y) element-wise, where on each axis one size divides the other: an element meets a whole tile.

    Nothing is repeated in memory: a longer axis is viewed as (tiles, tile size). ValueError if ranks differ or sizes do
    not divide.

    >>> call_with_generic_broadcast(jnp.multiply, jnp.ones((2, 4)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]
    """
    if x.ndim != y.ndim:
        raise ValueError(f"Cannot broadcast {x.shape} and {y.shape}: they have different ranks.")
    split: tuple[list[int], list[int]] = ([], [])
    out_shape = []
    for nx, ny in zip(x.shape, y.shape, strict=True):
        out_shape.append(ny if nx == 1 else nx if ny == 1 else max(nx, ny))
        small, large = min(nx, ny), max(nx, ny)
        if small in (1, large):
            split[0].append(nx)
            split[1].append(ny)
        elif small and large % small == 0:
            split[0].extend((small, nx // small))
            split[1].extend((small, ny // small))
        else:
            raise ValueError(
                f"Cannot broadcast {x.shape} and {y.shape}: {small} does not divide {large}."
            )
    if len(split[0]) == x.ndim:
        return op(x, y)
    return op(x.reshape(split[0]), y.reshape(split[1])).reshape(out_shape)


def broadcast_to(operand: Any, target_shape: Sequence[int]) -> Any:
    """Broadcasts an array or a QArray to a shape, generically: an axis whose size divides the target repeats elements.

    Missing leading axes are added. A QArray's scale is not repeated. ValueError names both shapes.

    >>> broadcast_to(jnp.arange(2), (4,)).tolist()
    [0, 0, 1, 1]
    """
    target = tuple(target_shape)
    operand = unwrap(operand)
    shape = (1,) * (len(target) - operand.ndim) + tuple(operand.shape)
    if isinstance(operand, QArray):
        qvalue = broadcast_to(operand.qvalue, target)
        # A tile of the scale grows with its axis, so that the scale stays as it is.
        lead = len(target) - operand.ndim
        operand = _map_leaves(operand, lambda leaf: leaf.reshape((1,) * lead + leaf.shape))
        return operand.replace(qvalue=qvalue)
    if len(shape) != len(target) or any(
        n != t and (n == 0 or t % n) for n, t in zip(shape, target, strict=True)
    ):
        raise ValueError(f"Cannot broadcast {operand.shape} to {target}.")
    if all(n in (1, t) for n, t in zip(shape, target, strict=True)):
        return jnp.broadcast_to(operand, target)
    split = [n for size in shape for n in (size, 1)]
    repeated = [n for size, t in zip(shape, target, strict=True) for n in (size, t // size)]
    return jnp.broadcast_to(operand.reshape(split), repeated).reshape(target)


def transpose_array(array: jax.Array, transpose: Sequence[int | None]) -> jax.Array:
    """Transposes; axes that are not listed (of size 1, or ValueError) go, and None makes a new axis of size 1.

    >>> transpose_array(jnp.ones((2, 1, 3)), (2, None, 0)).shape
    (3, 1, 2)
    """
    kept = [axis for axis in transpose if axis is not None]
    dropped = [axis for axis in range(array.ndim) if axis not in kept]
    if (
        len(set(kept)) != len(kept)
        or any(not 0 <= axis < array.ndim for axis in kept)
        or any(array.shape[axis] != 1 for axis in dropped)
    ):
        raise ValueError(
            f"Cannot transpose {array.shape} as {tuple(transpose)}: "
            "each axis is listed at most once, and one that is not listed must have size 1."
        )
    order = sorted(kept)
    array = array.reshape(tuple(array.shape[axis] for axis in order))
    array = array.transpose([order.index(axis) for axis in kept])
    shape = iter(array.shape)
    return array.reshape(tuple(1 if axis is None else next(shape) for axis in transpose))


def reshape(array: QArray, *new_shape: Any) -> QArray:
    """Reshapes a QArray where its scale can follow without being repeated.

    Axes may be merged and split as long as each new axis is made of whole tiles, or lies within one. -1 stands for one
    size. ValueError names both shapes.

    >>> q = QArray(jnp.ones((4, 6), jnp.int8), jnp.ones((4, 3)))
    >>> q.reshape(2, 2, 6).scale.shape, q.reshape(4, 3, 2).scale.shape, q.reshape(-1).scale.shape
    ((2, 2, 3), (4, 3, 1), (12,))
    """
    array = unwrap(array)
    sizes = new_shape[0] if len(new_shape) == 1 and not isinstance(new_shape[0], int) else new_shape
    target = tuple(int(n) for n in (sizes if isinstance(sizes, Sequence) else (sizes,)))
    if target.count(-1) == 1:
        known = -math.prod(target)
        if known and array.size % known == 0:
            target = tuple(array.size // known if n == -1 else n for n in target)
    if any(n < 0 for n in target) or math.prod(target) != array.size:
        raise ValueError(f"Cannot reshape a QArray of shape {array.shape} to {target}.")

    def reshape_shared(leaf: jax.Array) -> jax.Array:
        shape = _reshaped_scale_shape(array.shape, leaf.shape, target)
        if shape is None:
            raise ValueError(
                f"Cannot reshape a QArray of shape {array.shape} to {target}: its scale or zero point of shape "
                f"{leaf.shape} cannot follow. Dequantize it first, or choose another tile size."
            )
        return leaf.reshape(shape)

    return array.replace(
        qvalue=array.qvalue.reshape(target),
        scale=reshape_shared(array.scale),
        zero_point=None if array.zero_point is None else reshape_shared(array.zero_point),
    )


def rewriting_take(array: Any, idx: Any) -> Any:
    """array[idx] for an array or a QArray, with any index that `jax.Array` takes.

    On a tiled axis, a slice keeps the largest tiles that divide its start and length and the tile; single indices and
    index arrays get the scale of each element.

    >>> q = QArray(jnp.ones((4, 8), jnp.int8), jnp.ones((1, 2)))
    >>> q[:, 4:].scale.shape, q[:, 2:6].scale.shape, q[:, 5].scale.shape, q[:, jnp.array([0, 5, 7])].scale.shape
    ((1, 1), (1, 2), (1,), (1, 3))
    """
    array = unwrap(array)
    if not isinstance(array, QArray):
        return array[idx]
    idx = _expand_index(idx, array.shape)
    return array.replace(
        qvalue=array.qvalue[idx],
        scale=_take_shared(array.scale, idx, array.shape),
        zero_point=(
            None if array.zero_point is None else _take_shared(array.zero_point, idx, array.shape)
        ),
    )


# ---------------------------------------------------------------- internals


# absmax / these is absmax / B * c of arXiv 2603.08713: mxfp4 6 * 7/12, mxfp8 448 * 31/60.
_MXFP_FULL_SCALE = {"mxfp4": 3.5, "mxfp8": 448 * 31 / 60, "mxfp8_16": 448 * 31 / 60}


def _compute_dtype(dtype: Any) -> np.dtype:
    """Where arithmetic on an array of this dtype happens: float32, or float64 for float64."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


def _check_dtype(array: Any) -> None:
    dtype = getattr(array, "dtype", None)
    if dtype is None or isinstance(array, QArray) or not numerics.should_quantize(dtype):
        what = "a QArray" if isinstance(array, QArray) else f"an array of {dtype}"
        raise ValueError(
            f"Cannot quantize {what}: only float16, bfloat16, float32 and float64 arrays are quantized."
        )


def _check_divides(name: str, shape: tuple[int, ...], array_shape: tuple[int, ...]) -> None:
    if len(shape) != len(array_shape):
        raise ValueError(
            f"{name} of shape {shape} must have the rank of the array of shape {array_shape}."
        )
    if any(n != s and (s == 0 or n % s) for n, s in zip(array_shape, shape, strict=True)):
        raise ValueError(
            f"{name} of shape {shape} does not fit an array of shape {array_shape}: "
            "each axis of the array must be a multiple."
        )


def _quantize(array: jax.Array, how: HowToQuantize, scale_dtype: np.dtype | None) -> QArray:
    array = unwrap(array)
    _check_dtype(array)
    # A noise function may close over tracers, which must not get into the cache of a jitted function.
    body = _quantize_jit if how.noise_fn is None else _quantize_body
    return body(array, how, scale_dtype, USE_RECIPROCAL_FOR_QUANTIZATION)


def _quantize_body(
    array: jax.Array, how: HowToQuantize, scale_dtype: np.dtype | None, reciprocal: bool
) -> QArray:
    scale, zero_point = compute_scale_zero_point(calibrate(array, how), how.qtype)
    if scale_dtype is not None:
        scale = _nonzero(scale, scale_dtype)
    return _quantize_with_scale_zero_point(
        array, how.qtype, scale, zero_point, how.noise_fn, reciprocal
    )


# Jitted, so that a call outside of jit is one or two fused loops instead of an operation and a copy for each step.
_quantize_jit = jax.jit(_quantize_body, static_argnums=(1, 2, 3), inline=True)


def _quantize_with_scale_zero_point(
    array: jax.Array,
    qtype: Any,
    scale: jax.Array,
    zero_point: jax.Array | None,
    noise_fn: numerics.NoiseFn | None,
    reciprocal: bool | None = None,
) -> QArray:
    reciprocal = USE_RECIPROCAL_FOR_QUANTIZATION if reciprocal is None else reciprocal
    dtype = _compute_dtype(array.dtype)
    x = array.astype(dtype)
    divisor = scale.astype(dtype)
    if reciprocal:
        x = call_with_generic_broadcast(jnp.multiply, x, 1 / divisor)
    else:
        x = call_with_generic_broadcast(jnp.divide, x, divisor)
    if zero_point is not None:
        x = call_with_generic_broadcast(jnp.add, x, zero_point.astype(dtype))
    return QArray(numerics.convert_to(x, qtype, noise_fn), scale, zero_point, qtype)


@functools.partial(jax.jit, inline=True)
def _dequantize_jit(array: QArray) -> jax.Array:
    dtype = _compute_dtype(array.scale.dtype)
    x = numerics.convert_from(array.qvalue, array.qtype).astype(dtype)
    if array.zero_point is not None:
        x = call_with_generic_broadcast(jnp.subtract, x, array.zero_point.astype(dtype))
    x = call_with_generic_broadcast(jnp.multiply, x, array.scale.astype(dtype))
    return x.astype(array.scale.dtype)


def _parse_calibration_method(method: str) -> tuple[str, tuple[float, ...]]:
    """('absmax,0.8') -> ('absmax', (0.8,)); raises ValueError for what is no calibration method."""
    name, *rest = (part.strip() for part in method.lower().split(","))
    counts = {"absmax": (0, 1), "minmax": (0, 1), "rms": (1,), "fixed": (1, 2)}
    if name not in counts:
        raise ValueError(f"Unknown calibration method {method!r}: use one of {', '.join(counts)}.")
    try:
        args = tuple(float(part) for part in rest)
    except ValueError as e:
        raise ValueError(f"Calibration method {method!r}: its arguments must be numbers.") from e
    if len(args) not in counts[name]:
        wanted = " or ".join(map(str, counts[name]))
        raise ValueError(f"Calibration method {method!r}: {name} takes {wanted} arguments.")
    if name == "fixed":
        low, high = args if len(args) == 2 else (-args[0], args[0])
        if not (low <= 0 <= high and low < high and math.isfinite(high - low)):
            raise ValueError(
                f"Calibration method {method!r}: the range must hold 0 and have low < high."
            )
    elif args and not (args[0] > 0 and math.isfinite(args[0])):
        raise ValueError(f"Calibration method {method!r}: the factor must be positive.")
    return name, args


def _calibration_range(calibration: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    if "absmax" in calibration:
        return -calibration["absmax"], calibration["absmax"]
    return calibration["min"], calibration["max"]


def _storable_scale(scale: jax.Array, dtype: Any) -> jax.Array:
    """Casts a scale to its dtype, and makes the scales of all-zero groups 1."""
    if dtype == jnp.float16:
        return jnp.where(scale == 0, 1, _nonzero(scale, dtype))
    return jnp.where(scale < math.sqrt(float(jnp.finfo(dtype).tiny)), 1, scale).astype(dtype)


def _nonzero(scale: jax.Array, dtype: Any) -> jax.Array:
    """Casts scales to a dtype; those that would vanish there become its smallest number."""
    cast = scale.astype(dtype)
    smallest = jnp.finfo(dtype).smallest_subnormal.astype(dtype)
    return jnp.where((cast == 0) & (scale != 0), smallest, cast)


def _floor_to_power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two <= x, for x > 0; inf, NaN and 0 stay as they are."""
    bits = x.dtype.itemsize * 8
    uint = jnp.dtype(f"uint{bits}")
    nmant = jnp.finfo(x.dtype).nmant
    mask = np.array((1 << bits) - (1 << nmant), uint)
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, uint) & mask, x.dtype)
    return jnp.where(jnp.isfinite(x), power, x)


def _round_to_e4m3(x: jax.Array) -> jax.Array:
    """x > 0 rounded to a value of e4m3fn; beyond its range to 4 significant bits, so that it stays finite and nonzero."""
    e4m3 = x.astype(jnp.float8_e4m3fn).astype(x.dtype)
    # Adding and subtracting 2^k * 1.5 would be shorter but is simplified away; reduce_precision is not.
    bits = jnp.finfo(x.dtype).nexp
    four_bits = jax.lax.reduce_precision(x, exponent_bits=bits, mantissa_bits=3)
    return jnp.where((e4m3 > 0) & (x <= 448), e4m3, four_bits)


def _axis(shape: Sequence[int], axis: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"There is no axis {axis} in an array of shape {tuple(shape)}.")
    return axis % len(shape)


def _tile_size(shape: Sequence[int], axis: int, tile: int | float) -> int:
    size = round(shape[axis] * tile) if isinstance(tile, float) else tile
    if size <= 0 or shape[axis] % size:
        raise ValueError(
            f"Axis {axis} of size {shape[axis]} in shape {tuple(shape)} cannot be tiled by {tile}: "
            "the tile must divide it."
        )
    return size


def _tile_shape(shape: tuple[int, ...], shared: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // s if s else 0 for n, s in zip(shape, shared, strict=True))


def _tiled_shape(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Each axis as (number of tiles, tile size)."""
    tiles = _tile_shape(shape, scale_shape)
    return tuple(n for pair in zip(scale_shape, tiles, strict=True) for n in pair)


def _map_leaves(array: QArray, fn: Callable[[jax.Array], jax.Array]) -> QArray:
    array = unwrap(array)
    zero_point = None if array.zero_point is None else fn(array.zero_point)
    return array.replace(qvalue=fn(array.qvalue), scale=fn(array.scale), zero_point=zero_point)


def _reshaped_scale_shape(
    shape: tuple[int, ...], shared: tuple[int, ...], target: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The scale's shape after a reshape of its array, or None if there is none.

    In row-major order the array is a sequence of factors, alternately the number of tiles of an axis (the scale varies
    along it) and the tile size (it does not). A new axis takes factors from the front, splitting one where it has to;
    it is tiled if it takes varying ones first and then others.
    """
    if shape == target:
        return shared
    if math.prod(shape) == 0:
        return None
    factors: list[list[int]] = []  # [varies, size], neighbours of a kind merged, last one first
    for tiles, size in zip(shared, _tile_shape(shape, shared), strict=True):
        for varies, n in ((1, tiles), (0, size)):
            if n > 1 and factors and factors[-1][0] == varies:
                factors[-1][1] *= n
            elif n > 1:
                factors.append([varies, n])
    factors.reverse()
    result = []
    for size in target:
        tiles, seen_tile = 1, False
        while size > 1:
            varies, n = factors[-1]
            taken = math.gcd(size, n)
            if taken not in (size, n) or (varies and seen_tile):
                return None
            factors[-1][1] //= taken
            if factors[-1][1] == 1:
                factors.pop()
            size //= taken
            seen_tile |= not varies
            tiles *= taken if varies else 1
        result.append(tiles)
    return tuple(result)


def _expand_index(idx: Any, shape: tuple[int, ...]) -> tuple:
    """An index as a tuple of None, ints, slices and integer arrays, with one entry for each axis but for the Nones."""
    entries: list = list(idx) if isinstance(idx, tuple) else [idx]
    result: list = []
    for entry in entries:
        if isinstance(entry, (list, np.ndarray, jax.Array)) and not isinstance(
            entry, jax.core.Tracer
        ):
            entry = np.asarray(entry) if isinstance(entry, list) else entry
        if getattr(entry, "dtype", None) == jnp.bool_ or isinstance(entry, bool):
            result.extend(np.nonzero(np.asarray(entry)))
        else:
            result.append(entry)
    used = sum(entry is not None and entry is not Ellipsis for entry in result)
    if used > len(shape) or sum(entry is Ellipsis for entry in result) > 1:
        raise IndexError(f"Too many indices for a QArray of shape {shape}: {idx}.")
    fill = [slice(None)] * (len(shape) - used)
    where = next((i for i, entry in enumerate(result) if entry is Ellipsis), None)
    if where is None:
        return tuple(result + fill)
    return tuple(result[:where] + fill + result[where + 1 :])


def _take_shared(leaf: jax.Array, idx: tuple, shape: tuple[int, ...]) -> jax.Array:
    """leaf[idx] for a scale or zero point of an array of the given shape, with `idx` as `_expand_index` makes it."""
    new_idx: list = []
    axis = 0
    for entry in idx:
        if entry is None:
            new_idx.append(None)
            continue
        size, count = shape[axis], leaf.shape[axis]
        if isinstance(entry, slice):
            if count > 1 and entry != slice(None):
                leaf = jnp.take(leaf, _slice_of_tiles(entry, size, size // count), axis=axis)
            new_idx.append(slice(None))
        elif count == size:
            new_idx.append(entry)
        elif count == 1:
            # Zeros rather than a slice keep the entry advanced, and with it the place of the result's axes.
            new_idx.append(np.zeros((1,) * np.ndim(entry), int) if np.ndim(entry) else 0)
        elif isinstance(entry, (int, np.integer)):
            new_idx.append(
                min(max(entry + size if entry < 0 else entry, 0), size - 1) // (size // count)
            )
        else:
            entry = jnp.asarray(entry)
            entry = jnp.clip(jnp.where(entry < 0, entry + size, entry), 0, size - 1)
            new_idx.append(entry // (size // count))
        axis += 1
    return leaf[tuple(new_idx)]


def _slice_of_tiles(entry: slice, size: int, tile: int) -> np.ndarray:
    """Which tiles' scales a slice of a tiled axis needs: one for each of its own tiles, the largest that fit."""
    start, stop, step = entry.indices(size)
    elements = np.arange(start, stop, step)
    if not len(elements):
        return elements
    if step != 1:
        return elements // tile
    if start // tile == (stop - 1) // tile:
        return np.array([start // tile])
    return elements[:: math.gcd(tile, start, stop - start)] // tile
