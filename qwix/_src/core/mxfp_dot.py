"""dot_general of two block-scaled operands (mxfp8, nvfp4, ...), in hardware where there is some.

Microscaling formats (OCP MX v1.0; nvfp4 by NVIDIA) have one scale for 32 or 16 neighbours on the
contracting axis. Blackwell GPUs multiply them as they are, by `jax.nn.scaled_matmul`; elsewhere
they are dequantized first: `element * scale` is exact in float32, and in bfloat16, so that both
ways sum the same products.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src.core import operands, qarray
from qwix._src.core.qarray import QArray

# What cuDNN has: format -> (block size, dtype of its scales).
_NATIVE_FORMATS = {
    "mxfp8": (32, jnp.float8_e8m0fnu),
    "nvfp4": (16, jnp.float8_e4m3fn),
}


def mxfp_dot_general(
    lhs: operands.MaybeQArray,
    rhs: operands.MaybeQArray,
    dimension_numbers: Any,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of block-scaled operands.

    Args:
      lhs: a QArray in a block-scaled format. Any other array or QArray works, never in hardware.
      rhs: likewise.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)).
      preferred_element_type: the result's dtype. Default: the promotion of the dequantized
        operands' dtypes.

    Returns:
      A float array: batch axes, remaining axes of lhs, remaining axes of rhs; sums are in float32.

    >>> x = qarray.quantize_api(jnp.ones((1, 64)), "mxfp8", tiled_axes={1: 32})
    >>> mxfp_dot_general(x, x, (((1,), (1,)), ((), ())))
    Array([[64.]], dtype=float32)
    """
    lhs, rhs = qarray.unwrap(lhs), qarray.unwrap(rhs)
    dims = operands.canonical_dimension_numbers(dimension_numbers, (lhs.ndim, rhs.ndim))
    dtype = operands.result_dtype(lhs, rhs, preferred_element_type=preferred_element_type)
    if is_native(lhs, rhs, dims):
        assert isinstance(lhs, QArray) and isinstance(rhs, QArray)
        return _native(lhs, rhs, dims, dtype)
    lhs, rhs = operands.float_operands(lhs, rhs)
    return lax.dot_general(lhs, rhs, dims, preferred_element_type=dtype)


def is_native(lhs: Any, rhs: Any, dims: operands.DotDimensionNumbers) -> bool:
    """Whether `jax.nn.scaled_matmul` runs this dot_general in hardware."""
    if not isinstance(lhs, QArray) or not isinstance(rhs, QArray):
        return False
    if lhs.qtype not in _NATIVE_FORMATS or lhs.qtype != rhs.qtype or not _has_scaled_matmul():
        return False
    block, _ = _NATIVE_FORMATS[lhs.qtype]
    (lhs_ca, rhs_ca), _ = dims
    if len(lhs_ca) != 1:
        return False
    return all(x.scale_tile_shape[a] == block for x, a in ((lhs, lhs_ca[0]), (rhs, rhs_ca[0])))


@functools.cache
def _has_scaled_matmul() -> bool:
    if jax.default_backend() != "gpu":
        return False
    # Blackwell (10.0) is the first with block-scaled matrix units.
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return float(capability) >= 10


def _native(lhs: QArray, rhs: QArray, dims: operands.DotDimensionNumbers, dtype: Any) -> jax.Array:
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = dims
    lhs_values, lhs_scales, lhs_shape = _flatten(lhs, lhs_ca, lhs_ba)
    rhs_values, rhs_scales, rhs_shape = _flatten(rhs, rhs_ca, rhs_ba)
    out = jax.nn.scaled_matmul(lhs_values, rhs_values, lhs_scales, rhs_scales, preferred_element_type=jnp.float32)
    batch = lhs_shape[: len(lhs_ba)]
    shape = (*batch, *lhs_shape[len(lhs_ba) :], *rhs_shape[len(rhs_ba) :])
    return lax.convert_element_type(lax.reshape(out, shape), dtype)


def _flatten(array: QArray, contracting: Any, batch: Any) -> tuple[jax.Array, jax.Array, tuple]:
    """Elements (batch, remaining, contracting), scales likewise; shape of batch + remaining."""
    _, scale_dtype = _NATIVE_FORMATS[array.qtype]
    remaining = [a for a in range(array.ndim) if a not in contracting and a not in batch]
    order = (*batch, *remaining, *contracting)
    kept = tuple(array.shape[a] for a in order[:-1])
    axis = contracting[0]
    # The hardware wants a scale for each row, also where rows share one.
    shared = list(array.shape)
    shared[axis] = array.scale.shape[axis]
    scale = qarray.broadcast_to(array.scale.astype(scale_dtype), tuple(shared))
    sizes = (math.prod(kept[: len(batch)]), math.prod(kept[len(batch) :]))
    return (
        lax.transpose(array.qvalue, order).reshape(*sizes, -1),
        lax.transpose(scale, order).reshape(*sizes, -1),
        kept,
    )
