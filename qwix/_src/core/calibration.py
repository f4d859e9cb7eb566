"""The range of values that quantization keeps, and the scale that maps it to a number format.

A calibration is {"absmax": a}, the symmetric range -a .. a, or {"min": a, "max": b}, in the shape
of the scale that it leads to.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src.core import numerics, tiling
from qwix._src.core.pytree import unwrap
from qwix._src.core.tiling import call_with_generic_broadcast

# absmax / this = absmax / B * c (arXiv 2603.08713), with c = 12/7 for mxfp4 and 60/31 for mxfp8.
_MXFP_FULL_SCALE = {"mxfp4": 3.5, "mxfp8": 448 * 31 / 60, "mxfp8_16": 448 * 31 / 60}

_CALIBRATION_ARGUMENT_COUNTS = {"absmax": (0, 1), "minmax": (0, 1), "rms": (1,), "fixed": (1, 2)}


def find_range(array: jax.Array, method: str, scale_shape: Sequence[int]) -> dict[str, jax.Array]:
    """The calibration of an array, in its dtype, for scales of the given shape.

    See `qarray.HowToQuantize` for the methods and their formulas. Raises ValueError for others.
    """
    name, args = parse_calibration_method(method)
    if name == "fixed":
        bounds = {"absmax": args[1]} if args[0] == -args[1] else {"min": args[0], "max": args[1]}
        # The range is known, but a NaN has to reach the scale.
        poison = jnp.where(jnp.isnan(array).any(), jnp.nan, 1).astype(array.dtype)
        ones = (1,) * array.ndim
        return {name: jnp.full(ones, v, array.dtype) * poison for name, v in bounds.items()}

    factor = args[0] if args else 1
    if name == "absmax":
        return {"absmax": _tile_max(jnp.abs(array), scale_shape) * factor}
    if name == "minmax":
        low = -_tile_max(-array, scale_shape)
        return {"min": low * factor, "max": _tile_max(array, scale_shape) * factor}
    tiles = tiling.regroup(array, tiling.interleaved_shape(array.shape, scale_shape))
    squares = jnp.square(tiles.astype(compute_dtype(array.dtype)))
    rms = tiling.regroup(jnp.sqrt(squares.mean(range(1, tiles.ndim, 2))), scale_shape)
    return {"absmax": (rms * factor).astype(array.dtype)}


def _tile_max(array: jax.Array, scale_shape: Sequence[int]) -> jax.Array:
    """max(0, the largest element) of each tile, NaN if it holds one; in the scale's shape.

    XLA's CPU backend (jaxlib 0.10.2) drops NaN in `max` of any but small arrays, and takes ten
    times as long for it over an array that it has to compute first, such as abs(x). So the first
    axis within a tile is cut into a few parts that are compared element by element, which
    vectorizes, and only what is left, an eighth, is reduced and looked through for NaN. Parts of
    consecutive elements keep the axes after this one whole: of each channel's maximum over tokens,
    that is five times as fast as parts of neighbours.
    """
    if array.size == 0:
        return jnp.zeros(scale_shape, array.dtype)
    interleaved = tiling.interleaved_shape(array.shape, scale_shape)
    # Axes of size 1 are left out, so that XLA sees a reduction in its simplest form.
    shape = [n for n in interleaved if n != 1]
    within = [sum(n != 1 for n in interleaved[:i]) for i in range(1, len(interleaved), 2) if interleaved[i] != 1]
    tiles = tiling.regroup(array, shape)
    # Each part has to lie on one device, even if the axis is sharded over all of them.
    devices = jax.device_count()
    sizes = (1,) if any(jax.typeof(array).sharding.spec) else range(2, 9)
    for axis in within:
        few = max((n for n in sizes if shape[axis] % (n * devices) == 0), default=1)
        if few > 1:
            cut = (devices, few, shape[axis] // (few * devices))
            tiles = tiles.reshape(*shape[:axis], *cut, *shape[axis + 1 :])
            # Not `lax.reduce`: where a part lies on several devices, they could not reduce by it.
            parts = [jax.lax.index_in_dim(tiles, i, axis + 1, keepdims=False) for i in range(few)]
            while len(parts) > 1:
                parts = [functools.reduce(jnp.maximum, parts[i : i + 2]) for i in range(0, len(parts), 2)]
            tiles = parts[0].reshape(*shape[:axis], -1, *shape[axis + 1 :])
            break
    tiles = jnp.maximum(tiles, 0)
    # Nothing in it is negative, so its sum is NaN only where there is one; that compiles faster than a search.
    largest = jnp.where(jnp.isnan(tiles.sum(within)), jnp.nan, tiles.max(within, initial=0))
    return tiling.regroup(largest, scale_shape)


def compute_scale_zero_point(calibration: Mapping[str, jax.Array], qtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The scale, and the zero point if the range is asymmetric, that map a range to a format.

    Symmetric: scale = absmax / B. Asymmetric: scale = (max - min) / (qmax - qmin) and zero_point =
    qmin - min / scale, rounded into the format. A scale below sqrt(smallest normal number) becomes
    1, so that a group of zeros stays one; in float16, where that would be as large as 2^-7, only a
    scale of 0 does, and others do not round to 0.

    mxfp formats: the largest power of two up to absmax / B * c, c = 12/7 for mxfp4 and 60/31 for
    mxfp8, with which the largest elements saturate a little for finer steps below (outlier-aware
    scaling, arXiv 2603.08713). nvfp4: absmax / B rounded to a value of e4m3fn; where that would
    overflow or vanish, to its 4 significant bits.

    Args:
        calibration: what `calibrate` returns.
        qtype: the format.

    Returns:
        The scale in the range's dtype, and the zero point in the format's storage dtype or None.

    >>> bounds = {"min": jnp.array([-1.0]), "max": jnp.array([4.1])}
    >>> compute_scale_zero_point(bounds, jnp.int8)
    (Array([0.02], dtype=float32), Array([-78], dtype=int8))
    """
    if set(calibration) not in ({"absmax"}, {"min", "max"}):
        raise ValueError(f"A calibration is {{absmax}} or {{min, max}}, got {set(calibration)}.")
    return _compute_scale_zero_point(
        {name: unwrap(value) for name, value in calibration.items()},
        numerics.canonical_qtype(qtype),
    )


def clip_to_calibration(
    array: jax.Array,
    calibration: Mapping[str, jax.Array],
    tiled_axes: Mapping[int, int | float],
) -> jax.Array:
    """Clips an array to the range that `calibrate` found.

    `tiled_axes` (axis -> tile size) are those of the calibration, whose shape must agree with them
    (ValueError).
    """
    low, high = _range(calibration)
    for key, tile in tiled_axes.items():
        axis = tiling.axis_index(array.shape, key)
        tiles = array.shape[axis] // tiling.tile_size(array.shape, axis, tile)
        if low.shape[axis] not in (1, tiles):
            raise ValueError(
                f"A calibration of shape {low.shape} does not fit {array.shape} tiled as {dict(tiled_axes)}."
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

    Returns g itself where the range holds every element: absmax or minmax with a factor >= 1.
    """
    method, args = parse_calibration_method(calibration_method)
    if method in ("absmax", "minmax") and (not args or args[0] >= 1):
        return g
    low, high = _range(calibration)
    inside = call_with_generic_broadcast(jnp.greater_equal, array, low)
    inside &= call_with_generic_broadcast(jnp.less_equal, array, high)
    return jnp.where(inside, g, jnp.zeros_like(g))


def compute_dtype(dtype: Any) -> np.dtype:
    """The dtype of arithmetic on arrays of `dtype`: float32, or float64 for float64."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


def parse_calibration_method(method: str) -> tuple[str, tuple[float, ...]]:
    """("absmax,0.8") -> ("absmax", (0.8,)); raises ValueError for what is no method."""
    name, *rest = (part.strip() for part in method.lower().split(","))
    if name not in _CALIBRATION_ARGUMENT_COUNTS:
        names = ", ".join(_CALIBRATION_ARGUMENT_COUNTS)
        raise ValueError(f"Unknown calibration method {method!r}: use one of {names}.")
    try:
        args = tuple(float(part) for part in rest)
    except ValueError as e:
        raise ValueError(f"Calibration method {method!r}: arguments must be numbers.") from e
    counts = _CALIBRATION_ARGUMENT_COUNTS[name]
    if len(args) not in counts:
        wanted = " or ".join(map(str, counts))
        raise ValueError(f"Calibration method {method!r}: {name} takes {wanted} argument(s).")
    if name == "fixed":
        low, high = args if len(args) == 2 else (-args[0], args[0])
        if not (low <= 0 <= high and low < high and math.isfinite(high - low)):
            raise ValueError(f"Calibration method {method!r}: the range must hold 0, low < high.")
        return name, (low, high)
    if args and not 0 < args[0] < math.inf:
        raise ValueError(f"Calibration method {method!r}: the factor must be positive.")
    return name, args


def _range(calibration: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    if "absmax" in calibration:
        return -calibration["absmax"], calibration["absmax"]
    return calibration["min"], calibration["max"]


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _compute_scale_zero_point(calibration: Mapping[str, jax.Array], qtype: Any) -> tuple[jax.Array, jax.Array | None]:
    low, high = _range(calibration)
    dtype = high.dtype
    low, high = (bound.astype(compute_dtype(dtype)) for bound in (low, high))
    if "absmax" in calibration:
        bound = numerics.get_symmetric_bound(qtype)
        if qtype in _MXFP_FULL_SCALE:
            scale = _floor_quotient_to_power_of_two(high, _MXFP_FULL_SCALE[qtype])
        elif qtype == "nvfp4":
            scale = _round_to_e4m3(_divide(high, bound))
        else:
            scale = _divide(high, bound)
        return _storable_scale(scale, dtype), None
    qmin, qmax = numerics.get_asymmetric_bound(qtype)
    scale = _storable_scale(_divide(high - low, qmax - qmin), dtype)
    return scale, numerics.convert_to(qmin - low / scale.astype(low.dtype), qtype)


def _divide(x: jax.Array, constant: float) -> jax.Array:
    """x / constant, correctly rounded, so that scales are the same bits wherever they are computed.

    XLA (jaxlib 0.10.2) multiplies by the rounded 1 / constant instead if it sees a constant.
    """
    return x / jnp.where(jnp.isfinite(x), constant, 1)


def _storable_scale(scale: jax.Array, dtype: Any) -> jax.Array:
    """Casts a scale to the dtype of its array; that of a group of zeros becomes 1."""
    if dtype == jnp.float16:
        return jnp.where(scale == 0, 1, cast_above_zero(scale, dtype))
    return jnp.where(scale < math.sqrt(jnp.finfo(dtype).tiny), 1, scale).astype(dtype)


def cast_above_zero(scale: jax.Array, dtype: Any) -> jax.Array:
    """Casts a scale; one that would vanish becomes the dtype's smallest number."""
    cast = scale.astype(dtype)
    smallest = jnp.full((), jnp.finfo(dtype).smallest_subnormal, dtype)
    return jnp.where((cast == 0) & (scale != 0), smallest, cast)


def _floor_quotient_to_power_of_two(x: jax.Array, unit: float) -> jax.Array:
    """The largest power of two up to x / unit, for x > 0; 0, inf and NaN stay as they are."""
    bits = jnp.finfo(x.dtype).bits
    uint = np.dtype(f"uint{bits}")
    exponent = uint.type((1 << bits) - (1 << jnp.finfo(x.dtype).nmant))
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, uint) & exponent, x.dtype)
    # With unit = u 2^k, 1 <= u < 2, only comparisons and exact multiplications.
    k = math.floor(math.log2(unit))
    quotient = jnp.where(x >= power * (unit / 2**k), power, power / 2) * 0.5**k
    return jnp.where(jnp.isfinite(x), quotient, x)


def _round_to_e4m3(x: jax.Array) -> jax.Array:
    """x > 0 rounded to a value of e4m3fn, or to its 4 significant bits beyond their range."""
    e4m3 = x.astype(jnp.float8_e4m3fn).astype(x.dtype)
    nexp = jnp.finfo(x.dtype).nexp
    four_bits = jax.lax.reduce_precision(x, exponent_bits=nexp, mantissa_bits=3)
    return jnp.where((e4m3 > 0) & (x <= 448), e4m3, four_bits)
