"""Float64 NumPy truths for the quantized ops: dequantize element by element, then contract."""

import string
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix._src.core import numerics, qarray


def repeat_to(x: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`x` in float64, each axis repeated to its size in `shape`."""
    x = np.asarray(x).astype(np.float64)
    for axis, size in enumerate(shape):
        x = np.repeat(x, size // x.shape[axis] if x.shape[axis] else 1, axis=axis)
    return x


def dequantize(x: Any) -> np.ndarray:
    """An array or QArray in float64."""
    if not isinstance(x, qarray.QArray):
        return np.asarray(x).astype(np.float64)
    values = np.asarray(x.qvalue).astype(np.float64)
    if x.qtype == "nf4":
        values = np.asarray(numerics.get_nf4_buckets())[values.astype(int)].astype(np.float64)
    if x.zero_point is not None:
        values = values - repeat_to(x.zero_point, x.shape)
    return values * repeat_to(x.scale, x.shape)


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, magnitude: bool = False) -> np.ndarray:
    """The dot_general in float64; of absolute values (a bound of the rounding) on request."""
    lhs, rhs = dequantize(lhs), dequantize(rhs)
    if magnitude:
        lhs, rhs = np.abs(lhs), np.abs(rhs)
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = dimension_numbers
    letters = iter(string.ascii_letters)
    lhs_labels = [next(letters) for _ in range(lhs.ndim)]
    rhs_labels = [next(letters) for _ in range(rhs.ndim)]
    for lhs_axis, rhs_axis in zip((*lhs_ca, *lhs_ba), (*rhs_ca, *rhs_ba), strict=True):
        rhs_labels[rhs_axis] = lhs_labels[lhs_axis]
    shared = [*(lhs_labels[a] for a in lhs_ca), *(lhs_labels[a] for a in lhs_ba)]
    out = [lhs_labels[a] for a in lhs_ba]
    out += [c for c in lhs_labels + rhs_labels if c not in shared]
    return np.einsum(f"{''.join(lhs_labels)},{''.join(rhs_labels)}->{''.join(out)}", lhs, rhs)


def assert_close(found: Any, truth: np.ndarray, magnitude: Any = None, *, rounded_inputs: bool = False) -> None:
    """Equal up to a few roundings of the result in its dtype and of partial sums in float32.

    `magnitude` bounds the sum of absolute values. `rounded_inputs` allows for operands that were
    rounded to the result's dtype, as dequantized ones are.
    """
    eps = float(jnp.finfo(found.dtype).eps)
    if magnitude is None:
        magnitude = np.max(np.abs(truth), initial=0)
    error = np.abs(np.asarray(found).astype(np.float64) - truth)
    bound = 4 * eps * np.abs(truth) + 32 * float(np.finfo(np.float32).eps) * magnitude + 1e-30
    bound += 4 * eps * magnitude if rounded_inputs else 0
    assert found.shape == truth.shape, (found.shape, truth.shape)
    assert np.all(error <= bound), f"error {error.max()} beyond {bound.flat[np.argmax(error - bound)]}"


def quantized(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    qtype: Any,
    *,
    dtype: Any = jnp.float32,
    zero_mean: bool = True,
    **how: Any,
) -> qarray.QArray:
    """A random quantized array."""
    x = rng.normal(size=shape) + (0 if zero_mean else 0.7)
    return qarray.quantize(jnp.asarray(x, dtype), qarray.HowToQuantize(qtype=qtype, **how))
