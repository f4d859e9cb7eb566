"""The number formats: which values a quantized element can take, and how a float becomes one.

A *qtype* names a format. It is a dtype (`jnp.int8`, `jnp.float8_e4m3fn`, ...) or one of these
names, for formats that NumPy has no dtype for:

| name | stored as | values |
|---|---|---|
| `int2` .. `int7` | int4 (up to 4 bits) or int8 | -2^(b-1) .. 2^(b-1) - 1 |
| `nf4` | uint4, the index of a code point | the 16 code points of `get_nf4_buckets` |
| `mxfp8`, `mxfp8_16` | float8_e4m3fn | those of e4m3fn; scales are powers of two |
| `mxfp4` | float4_e2m1fn | those of e2m1fn; scales are powers of two |
| `nvfp4` | float4_e2m1fn | those of e2m1fn; scales are values of e4m3fn |

Everything here works on elements that are already divided by their scale, which `qarray.py` finds.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

QType = Any
NoiseFn = Callable[[tuple[int, ...]], jax.Array]

_BLOCK_FLOAT_FORMATS = {
    "mxfp8": np.dtype(jnp.float8_e4m3fn),
    "mxfp8_16": np.dtype(jnp.float8_e4m3fn),
    "mxfp4": np.dtype(jnp.float4_e2m1fn),
    "nvfp4": np.dtype(jnp.float4_e2m1fn),
}
# The name int4 means the same as the dtype. The name int2 is stored as int4, unlike jnp.int2.
_NAMED_INTEGERS = {f"int{bits}": bits for bits in (2, 3, 5, 6, 7)}
_QUANTIZABLE = tuple(map(np.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))
_FLOAT4 = np.dtype(jnp.float4_e2m1fn)

# QLoRA (arXiv 2305.14314), appendix E.
_NF4_CODE_POINTS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def canonical_qtype(qtype: QType) -> str | np.dtype:
    """One object per format: `jnp.int8`, 'int8' and `np.dtype('int8')` all give the last.

    Returns the name of a format without a dtype, or else an `np.dtype`; both compare equal to what
    was given. Raises ValueError if `qtype` is neither.

    >>> canonical_qtype(jnp.int8), canonical_qtype("int8"), canonical_qtype("nf4")
    (dtype('int8'), dtype('int8'), 'nf4')
    """
    if isinstance(qtype, str) and (qtype == "nf4" or qtype in _NAMED_INTEGERS or qtype in _BLOCK_FLOAT_FORMATS):
        return qtype
    try:
        if qtype is None:  # which NumPy takes to mean float64
            raise TypeError
        return np.dtype(qtype)
    except TypeError as e:
        raise ValueError(
            f"{qtype!r} is no number format: use a dtype such as jnp.int8, or one of nf4, "
            f"{', '.join([*_NAMED_INTEGERS, *_BLOCK_FLOAT_FORMATS])}."
        ) from e


def storage_dtype(qtype: QType) -> np.dtype:
    """The dtype that elements of the format are stored in (see the table above)."""
    qtype = canonical_qtype(qtype)
    if isinstance(qtype, np.dtype):
        return qtype
    if qtype == "nf4":
        return np.dtype(jnp.uint4)
    if qtype in _BLOCK_FLOAT_FORMATS:
        return _BLOCK_FLOAT_FORMATS[qtype]
    return np.dtype(jnp.int4 if _NAMED_INTEGERS[qtype] <= 4 else jnp.int8)


def integer_range(qtype: QType) -> tuple[int, int] | None:
    """(smallest, largest) value of an integer format; None for nf4 and float formats."""
    qtype = canonical_qtype(qtype)
    if isinstance(qtype, np.dtype):
        if not jnp.issubdtype(qtype, jnp.integer):
            return None
        info = jnp.iinfo(qtype)
        return int(info.min), int(info.max)
    if qtype in _NAMED_INTEGERS:
        half = 1 << (_NAMED_INTEGERS[qtype] - 1)
        return -half, half - 1
    return None


def should_quantize(dtype: Any) -> bool:
    """Whether arrays of this dtype are quantized: float16, bfloat16, float32 and float64 only.

    >>> should_quantize(jnp.bfloat16), should_quantize(jnp.int32), should_quantize(jnp.float8_e5m2)
    (True, False, False)
    """
    return np.dtype(dtype) in _QUANTIZABLE


def can_dequant_on_output(qtype: QType) -> bool:
    """Whether a matmul may run on stored elements and be scaled afterwards.

    False for nf4, whose elements are indices; True for every other format.

    >>> can_dequant_on_output("nf4"), can_dequant_on_output(jnp.int4)
    (False, True)
    """
    return canonical_qtype(qtype) != "nf4"


def get_symmetric_bound(qtype: QType) -> float:
    """B, such that symmetric quantization fills [-B, B]: scale = absmax / B.

    An integer format reaches half a step beyond its largest value, B = qmax + 0.5, so that the
    largest value is rounded to from both sides, like others; int16 has 32768, since 32767.5 is no
    bfloat16 or float16. A float format has its largest finite value, nf4 has 1. Raises ValueError
    for a dtype that nothing is quantized to.

    >>> get_symmetric_bound(jnp.int8), get_symmetric_bound("int3"), get_symmetric_bound("mxfp4")
    (127.5, 3.5, 6.0)
    """
    canonical = canonical_qtype(qtype)
    if canonical == "nf4":
        return 1.0
    dtype = storage_dtype(canonical)
    bounds = integer_range(canonical)
    if bounds is not None:
        if not 2 <= jnp.iinfo(dtype).bits <= 16:
            raise ValueError(f"Cannot quantize to {qtype}: use an integer of 2 to 16 bits.")
        return 32768.0 if bounds[1] == 32767 else bounds[1] + 0.5
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 1:
        raise ValueError(f"Cannot quantize to {qtype}: it is no 8-bit or 4-bit float format.")
    if dtype == jnp.float8_e8m0fnu:
        raise ValueError(f"Cannot quantize to {qtype}: without zero and sign, it is for scales.")
    return float(jnp.finfo(dtype).max)


def get_asymmetric_bound(qtype: QType) -> tuple[float, float]:
    """(qmin, qmax), the range that asymmetric quantization fills; int4, int8 and int16 only.

    scale = (max - min) / (qmax - qmin). Raises ValueError for other formats.

    >>> get_asymmetric_bound(jnp.int8)
    (-128.0, 127.0)
    """
    if canonical_qtype(qtype) in (np.dtype(jnp.int4), np.dtype(np.int8), np.dtype(np.int16)):
        info = jnp.iinfo(canonical_qtype(qtype))
        return float(info.min), float(info.max)
    raise ValueError(
        f"{qtype} has no asymmetric quantization: use int4, int8 or int16, or a symmetric calibration method."
    )


def convert_to(x: jax.Array, qtype: QType, noise_fn: NoiseFn | None = None) -> jax.Array:
    """Rounds floats, already divided by their scale, to the nearest values of a format.

    Integers round half to even and saturate. Floats are clipped to the largest finite value, then
    round half to even. nf4 gives the index of the nearest code point, the lower one on a tie. NaN
    stays NaN in a format that has one; in others it becomes some value, so that a caller keeps it
    elsewhere (`qarray.quantize` does in the scale).

    Args:
        x: float array.
        qtype: the format.
        noise_fn: shape -> noise, added in float32 before rounding to integers (stochastic
            rounding). Other formats do not have steps of 1: it is ignored there, with a warning.

    Returns:
        An array of x's shape in the format's storage dtype.

    >>> convert_to(jnp.array([0.5, 1.5, -200.0]), jnp.int8)
    Array([   0,    2, -128], dtype=int8)
    """
    return narrow(encode(x, qtype, noise_fn), qtype)


def encode(x: jax.Array, qtype: QType, noise_fn: NoiseFn | None = None) -> jax.Array:
    """`convert_to` without the last step: elements of 4 bits or fewer still have a byte each.

    Integers come as int8 (uint8 if unsigned), nf4 and float4 as their codes in uint8. Wider formats
    are as from `convert_to`.
    """
    canonical = canonical_qtype(qtype)
    dtype = storage_dtype(canonical)
    bounds = integer_range(canonical)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if noise_fn is not None:
        if bounds is None:
            warnings.warn(f"noise_fn is ignored: {qtype} is no integer format.", stacklevel=3)
        else:
            x = x + noise_fn(x.shape)
    if bounds is not None:
        return jnp.clip(jnp.round(x), *bounds).astype(_byte_dtype(dtype))
    if canonical == "nf4":
        return _nf4_index(x)
    if dtype == _FLOAT4:
        return _float4_code(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Cannot quantize to {qtype}: it is no integer or float format.")
    if jnp.dtype(dtype).name.endswith("fnuz"):
        # There is no negative zero, its code is NaN: which not all of XLA's code generators heed.
        x = jnp.where(jnp.abs(x) <= float(jnp.finfo(dtype).smallest_subnormal) / 2, 0.0, x)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def narrow(codes: jax.Array, qtype: QType) -> jax.Array:
    """Brings what `encode` returns into the format's storage dtype."""
    dtype = storage_dtype(qtype)
    if codes.dtype == dtype:
        return codes
    if dtype == _FLOAT4:
        return jax.lax.bitcast_convert_type(codes.astype(jnp.uint4), dtype)
    return codes.astype(dtype)


def convert_from(x: jax.Array, qtype: QType) -> jax.Array:
    """Turns stored elements into the numbers that they stand for.

    nf4 indices become float32 code points. Elements of every other format are numbers already, and
    are returned as they are.

    >>> convert_from(jnp.array([0, 15], jnp.uint4), "nf4")
    Array([-1.,  1.], dtype=float32)
    """
    return nf4_to_fp(x) if canonical_qtype(qtype) == "nf4" else x


def get_nf4_buckets() -> jax.Array:
    """The 16 code points of nf4, ascending, float32 (16,) (QLoRA, arXiv 2305.14314, appendix E)."""
    return jnp.array(_NF4_CODE_POINTS, jnp.float32)


def fp_to_nf4(array: jax.Array) -> jax.Array:
    """The index (uint4) of the nf4 code point nearest to each element; the lower one on a tie.

    >>> fp_to_nf4(jnp.array([-3.0, 0.0, 0.1, 1.0]))
    Array([0, 7, 8, 15], dtype=uint4)
    """
    return convert_to(array, "nf4")


def nf4_to_fp(array: jax.Array) -> jax.Array:
    """The float32 code point of each nf4 index; the inverse of `fp_to_nf4`."""
    index = array.astype(jnp.int32)
    points = [np.float32(point) for point in _NF4_CODE_POINTS]
    return _select(points, [index & (8 >> level) != 0 for level in range(4)])


def _nf4_index(x: jax.Array) -> jax.Array:
    # A binary search of 4 comparisons: element-wise, so that it fuses into one loop without copies.
    thresholds = _nf4_thresholds(x.dtype)
    bits: list[jax.Array] = []
    for step in (8, 4, 2, 1):
        bits.append(x > _select(thresholds[step - 1 :: 2 * step], bits))
    return sum((bit * jnp.int32(8 >> i) for i, bit in enumerate(bits)), jnp.int32(0)).astype(jnp.uint8)


def _nf4_thresholds(dtype: Any) -> list[np.floating]:
    """For each two neighbouring code points the largest number that is not nearer to the upper."""
    points = np.array(_NF4_CODE_POINTS, np.float32).astype(np.float64)
    midpoints = (points[1:] + points[:-1]) / 2
    rounded = midpoints.astype(dtype)
    return list(np.where(rounded > midpoints, np.nextafter(rounded, dtype.type(-2)), rounded))


def _select(values: Sequence[Any], bits: Sequence[jax.Array]) -> Any:
    """values[i], where i has the given bits, the highest first."""
    for bit in reversed(bits):
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(bit, upper, lower) for lower, upper in pairs]
    return values[0]


def _float4_code(x: jax.Array) -> jax.Array:
    """The bits of x rounded to float4_e2m1fn: a sign, and the index of 0, .5, 1, 1.5, 2, 3, 4, 6.

    Comparisons vectorize on every backend, while XLA's CPU backend converts to float4 element by
    element (jaxlib 0.10.2).
    """
    magnitude = jnp.abs(x)
    # A tie goes to the even code: down from an odd one's lower threshold, up from the next.
    index = sum(
        (magnitude > t if lower % 2 == 0 else magnitude >= t).astype(jnp.uint8)
        for lower, t in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    )
    return jnp.where(jnp.signbit(x), jnp.uint8(8), jnp.uint8(0)) | index


def _byte_dtype(dtype: np.dtype) -> np.dtype:
    """The integer dtype of at least a byte that holds values of an integer dtype."""
    if jnp.iinfo(dtype).bits >= 8:
        return dtype
    return np.dtype(np.uint8 if jnp.issubdtype(dtype, jnp.unsignedinteger) else np.int8)
