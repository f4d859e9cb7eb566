"""AWQ, activation-aware weight quantization (arXiv 2306.00978): the scales of one weight.

A weight W (rows = out, columns = in) is multiplied by a scale s_j for each column before it is
quantized, and the activations are divided by it, which leaves the product as it is:

    y = W x = (W diag(s)) (diag(s)^-1 x)  ~  Q(W diag(s)) (diag(s)^-1 x)

A column with large activations gets a larger scale, so that its elements are rounded in finer steps
relative to their size. With a_j the mean of |x_j|, section 3.2 of the paper looks for scales of the form

    s_j = a_j^alpha,  alpha on a grid over [0, 1],  divided by sqrt(max_j s_j min_j s_j),

that minimize the error of the output. As the reference implementation of its first version does, that
error is taken from the mean magnitudes alone, without the samples:

    L(alpha) = mean over i, j of ((Q(W diag(s))_ij / s_j - W_ij) a_j)^2

alpha = 0 is rounding to nearest, so the result is never worse than that, as L measures it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src.core import numerics, qarray
from qwix.contrib import input_scale


def compute_act_scale(x: jax.Array, axis: int = 0) -> jax.Array:
    """The mean magnitude of each input feature, a_j = mean of |x_j| over the samples.

    Args:
      x: activations, (samples, in) for axis 0, (in, samples) for axis 1.
      axis: that of the samples.

    Returns:
      float32 (in,); the mean is taken in float32.

    >>> compute_act_scale(jnp.array([[1.0, -2.0], [3.0, 4.0]])).tolist()
    [2.0, 3.0]
    """
    return jnp.mean(jnp.abs(x), axis=axis, dtype=jnp.float32)


def search_optimal_scales(
    w: jax.Array,
    activation_scales: jax.Array,
    how: qarray.HowToQuantize,
    n_grid: int = 20,
    min_scale: float = 1e-4,
) -> jax.Array:
    """The scales with the smallest L(alpha) of the module's docstring.

    Args:
      w: (out, in), a float array.
      activation_scales: a_j, (in,), see `compute_act_scale`.
      how: how the scaled weight will be quantized.
      n_grid: number of alphas, evenly spaced from 0 to 1. With 1, all scales are 1.
      min_scale: a_j is clipped to at least this share of the largest one, so that a feature that was
        hardly ever active does not ruin the range of the others.

    Returns:
      float32 (1, in). NaN if `activation_scales` are not finite; 1 if they are all zero.

    Raises:
      ValueError: shapes do not fit, or `n_grid` is not positive.

    >>> how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,))
    >>> w = jax.random.normal(jax.random.key(0), (4, 8))
    >>> scales = search_optimal_scales(w, jnp.array([9.0] + 7 * [0.1]), how)
    >>> scales.shape, bool(scales[0, 0] > scales[0, 1])
    ((1, 8), True)
    """
    if w.ndim != 2 or activation_scales.shape != w.shape[1:]:
        raise ValueError(
            f"A weight of shape {w.shape} and activation_scales of shape {activation_scales.shape} do not fit: "
            "they must be (out, in) and (in,)."
        )
    if n_grid < 1:
        raise ValueError(f"n_grid={n_grid}: the grid needs at least one point.")
    return _search(w, activation_scales, how, n_grid, min_scale)


def quantize_weight(
    w: jax.Array, activation_scales: jax.Array, how: qarray.HowToQuantize, n_grid: int = 20
) -> tuple[qarray.QArray, jax.Array]:
    """Quantizes a weight with AWQ.

    Args:
      w: (out, in), a float array.
      activation_scales: (in,), see `compute_act_scale`.
      how: how to quantize, in terms of the axes of `w`.
      n_grid: see `search_optimal_scales`.

    Returns:
      Q(W diag(s)), which dequantizes to the dtype of `w`, and s, float32 (1, in):
      w ~ dequantize(array) / scales.

    >>> how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,))
    >>> w = jax.random.normal(jax.random.key(0), (4, 8))
    >>> array, scales = quantize_weight(w, jnp.arange(1.0, 9.0), how)
    >>> bool(jnp.allclose(qarray.dequantize(array) / scales, w, atol=0.05))
    True
    """
    scales = search_optimal_scales(w, activation_scales, how, n_grid)
    array = input_scale.quantize_scaled(w, scales, how)
    return array, scales


@functools.partial(jax.jit, static_argnames=("how", "n_grid", "min_scale"))
def _search(
    w: jax.Array, activation_scales: jax.Array, how: qarray.HowToQuantize, n_grid: int, min_scale: float
) -> jax.Array:
    w = w.astype(jnp.float32)
    largest = activation_scales.max()
    magnitudes = jnp.where(largest > 0, activation_scales.astype(jnp.float32) / largest, 1)
    base = jnp.maximum(magnitudes, min_scale)

    def scales_of(alpha: jax.Array) -> jax.Array:
        scales = base**alpha
        return (scales / jnp.sqrt(scales.max() * scales.min()))[None, :]

    def loss(alpha: jax.Array) -> jax.Array:
        scales = scales_of(alpha)
        error = (_round_trip(w * scales, how) / scales - w) * magnitudes
        return jnp.mean(error**2)

    alphas = jnp.linspace(0, 1, n_grid, dtype=jnp.float32)
    # One grid point after the other: all at once would hold n_grid copies of the weight.
    best = scales_of(alphas[jnp.argmin(jax.lax.map(loss, alphas))])
    # NaN^0 is 1, which would hide that there is something wrong.
    return jnp.where(jnp.isfinite(activation_scales).all(), best, jnp.nan)


def _round_trip(x: jax.Array, how: qarray.HowToQuantize) -> jax.Array:
    """dequantize(quantize(x)) in float32, without packing elements into 4 bits on the way."""
    scale, zero_point = qarray.compute_scale_zero_point(qarray.calibrate(x, how), how.qtype)
    x = qarray.call_with_generic_broadcast(jnp.divide, x, scale)
    if zero_point is not None:
        x = qarray.call_with_generic_broadcast(jnp.add, x, zero_point.astype(x.dtype))
    x = _nearest(x, how.qtype)
    if zero_point is not None:
        x = qarray.call_with_generic_broadcast(jnp.subtract, x, zero_point.astype(x.dtype))
    return qarray.call_with_generic_broadcast(jnp.multiply, x, scale)


def _nearest(x: jax.Array, qtype: Any) -> jax.Array:
    """The values of a format that are nearest to x."""
    codes = numerics.encode(x, qtype)
    if numerics.integer_range(qtype) is None and qtype != "nf4":
        codes = numerics.narrow(codes, qtype)
    return numerics.convert_from(codes, qtype).astype(x.dtype)
