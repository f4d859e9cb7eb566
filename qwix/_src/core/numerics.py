"""The number formats: which values a quantized element can take, and how a float becomes one of them.

A *qtype* names a format. It is a dtype (`jnp.int8`, `jnp.float8_e4m3fn`, ...) or one of the names below, for formats
that NumPy has no dtype for:

| name | stored as | values |
|---|---|---|
| `int2` .. `int7` | int4 (up to 4 bits) or int8 | -2^(b-1) .. 2^(b-1) - 1 |
| `nf4` | uint4, the index of a code point | the 16 code points of `get_nf4_buckets` |
| `mxfp8`, `mxfp8_16` | float8_e4m3fn | those of e4m3fn; scales are powers of two |
| `mxfp4` | float4_e2m1fn | those of e2m1fn; scales are powers of two |
| `nvfp4` | float4_e2m1fn | those of e2m1fn; scales are values of e4m3fn |

Everything here works on elements that are already divided by their scale; `qarray.py` finds the scale.
"""

import functools
import warnings
from collections.abc import Callable
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
# int4 is the one named integer that is also the dtype it is stored in; int2 the name is stored as int4, unlike jnp.int2.
_NAMED_INTEGERS = ("int2", "int3", "int5", "int6", "int7")
_QUANTIZABLE_DTYPES = tuple(
    np.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
)

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
    """One object for each format, so that `jnp.int8`, 'int8' and `np.dtype('int8')` compare and hash equal.

    Returns the name of a format without a dtype, or else an `np.dtype`. Raises ValueError if `qtype` is neither.

    >>> canonical_qtype(jnp.int8) == canonical_qtype('int8')
    True
    """
    if isinstance(qtype, str) and (
        qtype == "nf4" or qtype in _NAMED_INTEGERS or qtype in _BLOCK_FLOAT_FORMATS
    ):
        return qtype
    try:
        if qtype is None:  # which NumPy takes to mean float64
            raise TypeError
        return np.dtype(qtype)
    except TypeError as e:
        raise ValueError(
            f"{qtype!r} is no number format: use a dtype such as jnp.int8, or one of nf4, int2 .. int7, "
            f"{', '.join(_BLOCK_FLOAT_FORMATS)}."
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
    return np.dtype(jnp.int4 if int(qtype.removeprefix("int")) <= 4 else jnp.int8)


def integer_range(qtype: QType) -> tuple[int, int] | None:
    """(smallest, largest) value of an integer format, or None for nf4 and float formats."""
    qtype = canonical_qtype(qtype)
    if isinstance(qtype, np.dtype):
        if not jnp.issubdtype(qtype, jnp.integer):
            return None
        info = jnp.iinfo(qtype)
        return int(info.min), int(info.max)
    if qtype in _NAMED_INTEGERS:
        half = 1 << (int(qtype.removeprefix("int")) - 1)
        return -half, half - 1
    return None


def should_quantize(dtype: Any) -> bool:
    """Whether arrays of this dtype are quantized: only float16, bfloat16, float32 and float64.

    >>> should_quantize(jnp.bfloat16), should_quantize(jnp.int32), should_quantize(jnp.float8_e4m3fn)
    (True, False, False)
    """
    return np.dtype(dtype) in _QUANTIZABLE_DTYPES


def can_dequant_on_output(qtype: QType) -> bool:
    """Whether a matmul may run on stored elements and be scaled afterwards.

    False for nf4, whose elements are indices; True for every other format.

    >>> can_dequant_on_output('nf4'), can_dequant_on_output(jnp.int4)
    (False, True)
    """
    return canonical_qtype(qtype) != "nf4"


def get_symmetric_bound(qtype: QType) -> float:
    """B such that [-B, B] is the range which symmetric quantization fills: scale = absmax / B.

    An integer format reaches half a step beyond its largest value, B = qmax + 0.5, so that rounding spreads evenly
    over it; int16 is the exception (32768, as 32767.5 is lost in float16 and bfloat16 arithmetic). A float format
    has B = its largest finite value; nf4 has 1. Raises ValueError for anything that is not a quantized format.

    >>> get_symmetric_bound(jnp.int8), get_symmetric_bound('int3'), get_symmetric_bound('mxfp4')
    (127.5, 3.5, 6.0)
    """
    canonical = canonical_qtype(qtype)
    if canonical == "nf4":
        return 1.0
    dtype = storage_dtype(canonical)
    bounds = integer_range(canonical)
    if bounds is not None:
        bits = jnp.iinfo(dtype).bits
        if bits == 1 or bits > 16:
            raise ValueError(f"Cannot quantize to {qtype}: integers of 2 to 16 bits are supported.")
        return 32768.0 if bounds[1] == 32767 else bounds[1] + 0.5
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 1:
        raise ValueError(f"Cannot quantize to {qtype}: it is no 8-bit or 4-bit float format.")
    if dtype == jnp.float8_e8m0fnu:
        raise ValueError(
            f"Cannot quantize to {qtype}: it has no zero and no sign, it is for scales."
        )
    return float(jnp.finfo(dtype).max)


def get_asymmetric_bound(qtype: QType) -> tuple[float, float]:
    """(qmin, qmax), the range that asymmetric quantization fills: scale = (max - min) / (qmax - qmin).

    Only int4, int8 and int16; ValueError for other formats.

    >>> get_asymmetric_bound(jnp.int8)
    (-128.0, 127.0)
    """
    canonical = canonical_qtype(qtype)
    if canonical in (np.dtype(jnp.int4), np.dtype(np.int8), np.dtype(np.int16)):
        low, high = integer_range(canonical)  # type: ignore[misc]
        return float(low), float(high)
    raise ValueError(
        f"{qtype} has no asymmetric quantization: use int4, int8 or int16, or a symmetric calibration method."
    )


def convert_to(x: jax.Array, qtype: QType, noise_fn: NoiseFn | None = None) -> jax.Array:
    """Rounds floats, already divided by their scale, to the nearest values of a format.

    Integers round half to even and saturate. Floats are clipped to the largest finite value, then rounded half to
    even. nf4 gives the index of the nearest code point, the lower one on a tie. NaN stays NaN in formats that have
    one and is an arbitrary value in others, so that a caller has to keep it elsewhere (`qarray.quantize` puts it in
    the scale).

    Args:
        x: float array.
        qtype: the format.
        noise_fn: shape -> noise, added in float32 before rounding to an integer (stochastic rounding). Other formats
            do not have steps of 1, so that it is ignored with a warning.

    Returns:
        An array of the format's storage dtype and x's shape.

    >>> convert_to(jnp.array([0.5, 1.5, -200.0]), jnp.int8)
    Array([   0,    2, -128], dtype=int8)
    """
    canonical = canonical_qtype(qtype)
    dtype = storage_dtype(canonical)
    bounds = integer_range(canonical)
    if noise_fn is not None:
        if bounds is None:
            warnings.warn(f"noise_fn is ignored: {qtype} is no integer format.", stacklevel=2)
        else:
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) + noise_fn(x.shape)
    if bounds is not None:
        return jnp.clip(jnp.round(x), *bounds).astype(dtype)
    if canonical == "nf4":
        return fp_to_nf4(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Cannot quantize to {qtype}: it is no integer or float format.")
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def convert_from(x: jax.Array, qtype: QType) -> jax.Array:
    """Turns stored elements into the numbers that they stand for.

    nf4 indices become float32 code points; every other format's elements are numbers already and are returned as is.

    >>> convert_from(jnp.array([0, 15], jnp.uint4), 'nf4')
    Array([-1.,  1.], dtype=float32)
    """
    return nf4_to_fp(x) if canonical_qtype(qtype) == "nf4" else x


def get_nf4_buckets() -> jax.Array:
    """The 16 code points of nf4 as float32 (16,), ascending (QLoRA, arXiv 2305.14314, appendix E)."""
    return jnp.array(_NF4_CODE_POINTS, jnp.float32)


@functools.cache
def _nf4_thresholds() -> tuple[float, ...]:
    """For each neighbouring pair of code points the largest float32 that is not nearer to the upper one."""
    points = np.array(_NF4_CODE_POINTS, np.float32).astype(np.float64)
    midpoints = (points[1:] + points[:-1]) / 2
    rounded = midpoints.astype(np.float32)
    below = np.nextafter(rounded, np.float32(-2))
    return tuple(float(t) for t in np.where(rounded > midpoints, below, rounded))


def fp_to_nf4(array: jax.Array) -> jax.Array:
    """The index (uint4) of the nf4 code point nearest to each element; the lower one on a tie, 0 for NaN.

    >>> fp_to_nf4(jnp.array([-3.0, 0.0, 0.1, 1.0]))
    Array([ 0,  7,  8, 15], dtype=uint4)
    """
    # The index is the number of thresholds below x: comparisons fuse into one loop, without a copy for each.
    index = sum((array > t).astype(jnp.uint8) for t in _nf4_thresholds())
    return index.astype(jnp.uint4)  # type: ignore[union-attr]


def nf4_to_fp(array: jax.Array) -> jax.Array:
    """The float32 code point of each nf4 index; the inverse of `fp_to_nf4`."""
    return get_nf4_buckets()[array.astype(jnp.uint8)]
