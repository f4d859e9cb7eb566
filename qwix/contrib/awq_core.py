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

Where the second moments H = X X^T of the activations are known, the error of the output itself is taken instead,

    L(alpha) = tr(E H E^T) = ||E X||^2,        E = Q(W diag(s)) diag(s)^-1 - W

and each group of a row may clip its range, as the later versions of the reference implementation do: its scale is that
of a share of the largest magnitude, the share on a grid below 1 that minimizes the error that the group alone makes,
e_g H_gg e_g^T.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwix._src.core import numerics, qarray
from qwix.contrib import input_scale

# How many rows of a weight are enough to choose the scales that all of them share.
MAX_ROWS = 1024


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
    w: jax.Array,
    activation_scales: jax.Array,
    how: qarray.HowToQuantize,
    n_grid: int = 20,
    *,
    second_moments: jax.Array | None = None,
    n_clip: int = 0,
) -> tuple[qarray.QArray, jax.Array]:
    """Quantizes a weight with AWQ.

    Args:
      w: (out, in), a float array.
      activation_scales: (in,), see `compute_act_scale`.
      how: how to quantize, in terms of the axes of `w`.
      n_grid: see `search_optimal_scales`.
      second_moments: X X^T of the activations, (in, in), up to a factor; with them, scales are searched for on the
        error of the output.
      n_clip: with second moments, the number of shares that ranges are clipped to, see `clip`.

    Returns:
      Q(W diag(s)), which dequantizes to the dtype of `w`, and s, float32 (1, in):
      w ~ dequantize(array) / scales.

    >>> how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,))
    >>> w = jax.random.normal(jax.random.key(0), (4, 8))
    >>> array, scales = quantize_weight(w, jnp.arange(1.0, 9.0), how)
    >>> bool(jnp.allclose(qarray.dequantize(array) / scales, w, atol=0.05))
    True
    """
    if second_moments is not None:
        return _with_second_moments(w, activation_scales, second_moments, how, n_grid, n_clip)
    scales = search_optimal_scales(w, activation_scales, how, n_grid)
    return input_scale.quantize_scaled(w, scales, how), scales


@functools.partial(jax.jit, static_argnames=("how", "n_grid", "n_clip"))
def _with_second_moments(
    w: jax.Array,
    activation_scales: jax.Array,
    second_moments: jax.Array,
    how: qarray.HowToQuantize,
    n_grid: int,
    n_clip: int,
) -> tuple[qarray.QArray, jax.Array]:
    candidates = grid(activation_scales, n_grid)
    scales = candidates[jnp.argmin(output_errors(w, second_moments, candidates, how))][None]
    if not n_clip:
        return input_scale.quantize_scaled(w, scales, how), scales
    return clip(w * scales, of_scaled(diagonal_blocks(second_moments, how), scales[0]), how, n_clip), scales


@functools.partial(jax.jit, static_argnames=("n_grid", "min_scale"))
def grid(activation_scales: jax.Array, n_grid: int, min_scale: float = 1e-4) -> jax.Array:
    """The scales of each alpha, (n_grid, in); see `search_optimal_scales`. NaN if `activation_scales` are not finite.

    >>> grid(jnp.array([4.0, 1.0]), 3).tolist()
    [[1.0, 1.0], [1.4142135381698608, 0.7071067690849304], [2.0, 0.5]]
    """
    if n_grid < 1:
        raise ValueError(f"n_grid={n_grid}: the grid needs at least one point.")
    _, base = _magnitudes(activation_scales, min_scale)
    scales = jax.vmap(functools.partial(_normalized, base))(jnp.linspace(0, 1, n_grid, dtype=jnp.float32))
    return jnp.where(jnp.isfinite(activation_scales).all(), scales, jnp.nan)


@functools.partial(jax.jit, static_argnames=("how",))
def output_errors(w: jax.Array, second_moments: jax.Array, scales: jax.Array, how: qarray.HowToQuantize) -> jax.Array:
    """tr(E H E^T) of the module's docstring for several choices of scales.

    Args:
      w: (out, in).
      second_moments: H, (in, in).
      scales: (choices, in).
      how: how the scaled weight will be quantized.

    All rows share the scales, and the error of a row costs in^2 multiplications: of a large weight only some rows,
    evenly spaced, are looked at.

    Returns:
      float32 (choices,).

    >>> how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,))
    >>> errors = output_errors(jnp.array([[7.5, 0.4]]), jnp.diag(jnp.array([1.0, 9.0])), jnp.array([[1.0, 1.0]]), how)
    >>> round(float(errors[0]), 2)  # 7.5 becomes 7, and 0.4 becomes 0
    1.69
    """
    rows = some_rows(w, max(64, min(256, 2**28 // w.shape[1] ** 2))).astype(jnp.float32)
    h = second_moments.astype(jnp.float32)

    e = jax.lax.map(lambda s: round_trip(rows * s, how) / s - rows, scales)
    products = jnp.matmul(e.reshape(-1, w.shape[1]), h).reshape(e.shape)  # one large matmul is quicker than many
    return jnp.sum(products * e, (1, 2))


@functools.partial(jax.jit, static_argnames=("how",))
def diagonal_blocks(second_moments: jax.Array, how: qarray.HowToQuantize) -> jax.Array:
    """The blocks on the diagonal of H that `clip` looks at: whole groups, or equal parts of at most 128 columns of one.

    Args:
      second_moments: H, (in, in).
      how: of a weight (out, in).

    Returns:
      (blocks, columns of one, columns of one): little next to H, where that has to be kept.

    >>> how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,), tiled_axes={1: 2})
    >>> diagonal_blocks(jnp.arange(16.0).reshape(4, 4), how).tolist()
    [[[0.0, 1.0], [4.0, 5.0]], [[10.0, 11.0], [14.0, 15.0]]]
    """
    size = second_moments.shape[0]
    columns = size // qarray.get_scale_shape((1, size), how)[1]
    block = max(n for n in range(1, min(128, columns) + 1) if columns % n == 0)
    blocks = size // block
    diagonal = jnp.arange(blocks)
    return second_moments.reshape(blocks, block, blocks, block)[diagonal, :, diagonal].astype(jnp.float32)


@jax.jit
def of_scaled(blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """`diagonal_blocks` of the inputs of a weight whose columns are multiplied by a scale (in,), which divides them."""
    scale = scale.reshape(blocks.shape[:2])
    return blocks / (scale[:, :, None] * scale[:, None, :])


@functools.partial(jax.jit, static_argnames=("how", "n_clip", "least"))
def clip(
    w: jax.Array, second_moments: jax.Array, how: qarray.HowToQuantize, n_clip: int = 10, least: float = 0.5
) -> qarray.QArray:
    """Quantizes a weight, the range of each scale clipped to the share that makes the smallest error of the output.

    Shares are 1, and n_clip evenly spaced ones down to `least`. The errors of different scales are taken as
    independent, and within one that spans more than 128 columns, those of blocks of at most 128.

    Args:
      w: (out, in).
      second_moments: H of its inputs, (in, in), or its `diagonal_blocks`.
      how: channelwise on axis 0 or not, tiled on axis 1 or not.
      n_clip: number of shares below 1.
      least: the smallest share.

    Returns:
      The QArray, which dequantizes to the dtype of `w`.

    >>> how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,))
    >>> w = jnp.array([[1.0, 1.0, 1.0, 9.0]])
    >>> clip(w, jnp.diag(jnp.array([1.0, 1.0, 1.0, 1e-3])), how).scale < qarray.quantize(w, how).scale
    Array([[ True]], dtype=bool)
    """
    x = w.astype(jnp.float32)
    h = second_moments if second_moments.ndim == 3 else diagonal_blocks(second_moments, how)
    groups = qarray.get_scale_shape(x.shape, how)[1]
    h = h.reshape(groups, -1, *h.shape[1:])
    is_by_row = 0 in how.channelwise_axes
    # Groups in front and rows last: one product with a block of H is a plain matmul, and a row of memory has one share.
    of_group = dataclasses.replace(how, channelwise_axes=(2,) if is_by_row else (), tiled_axes={})
    shares = jnp.linspace(1, least, n_clip + 1, dtype=jnp.float32)

    def best_of(group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        x, h = group  # (blocks, columns of one, rows), (blocks, columns, columns)
        unclipped = qarray.calibrate(x, of_group)

        def parameters_of(share: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            clipped = {name: value * share for name, value in unclipped.items()}
            return qarray.compute_scale_zero_point(clipped, how.qtype)

        def error(share: jax.Array) -> jax.Array:
            e = round_trip(x, of_group, parameters_of(share)) - x
            return jnp.sum(jnp.matmul(h, e) * e, (0, 1) if is_by_row else None, keepdims=True)

        def better(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            found = error(share)
            is_better = found < best[0]
            return (jnp.where(is_better, found, best[0]), jnp.where(is_better, share, best[1])), None

        first = error(shares[0])
        (_, best), _ = jax.lax.scan(better, (first, jnp.ones_like(first)), shares[1:])
        return parameters_of(best)

    found = jax.lax.map(best_of, (x.T.reshape(*h.shape[:3], x.shape[0]), h))
    scale, zero_point = jax.tree.map(lambda p: p.reshape(groups, -1).T, found)
    return qarray.quantize_with_scale_zero_point(x, how.qtype, scale, zero_point).astype(w.dtype)


def some_rows(w: jax.Array, count: int) -> jax.Array:
    """About `count` rows, evenly spaced."""
    return w[:: max(w.shape[0] // count, 1)]


def _magnitudes(activation_scales: jax.Array, min_scale: float) -> tuple[jax.Array, jax.Array]:
    """a_j as a share of the largest one, and the same clipped."""
    largest = activation_scales.max()
    magnitudes = jnp.where(largest > 0, activation_scales.astype(jnp.float32) / largest, 1)
    return magnitudes, jnp.maximum(magnitudes, min_scale)


def _normalized(base: jax.Array, alpha: jax.Array) -> jax.Array:
    scales = base**alpha
    return scales / jnp.sqrt(scales.max() * scales.min())


@functools.partial(jax.jit, static_argnames=("how", "n_grid", "min_scale"))
def _search(
    w: jax.Array, activation_scales: jax.Array, how: qarray.HowToQuantize, n_grid: int, min_scale: float
) -> jax.Array:
    w = some_rows(w, MAX_ROWS).astype(jnp.float32)
    magnitudes, base = _magnitudes(activation_scales, min_scale)

    def scales_of(alpha: jax.Array) -> jax.Array:
        return _normalized(base, alpha)[None, :]

    def loss(alpha: jax.Array) -> jax.Array:
        scales = scales_of(alpha)
        error = (round_trip(w * scales, how) / scales - w) * magnitudes
        return jnp.mean(error**2)

    alphas = jnp.linspace(0, 1, n_grid, dtype=jnp.float32)
    # One grid point after the other: all at once would hold n_grid copies of the weight.
    best = scales_of(alphas[jnp.argmin(jax.lax.map(loss, alphas))])
    # NaN^0 is 1, which would hide that there is something wrong.
    return jnp.where(jnp.isfinite(activation_scales).all(), best, jnp.nan)


def round_trip(x: jax.Array, how: qarray.HowToQuantize, parameters: Any = None) -> jax.Array:
    """dequantize(quantize(x)) in float32, without packing elements into 4 bits on the way.

    `parameters` are the scale and zero point; None: those that `how` finds.
    """
    if parameters is None:
        parameters = qarray.compute_scale_zero_point(qarray.calibrate(x, how), how.qtype)
    scale, zero_point = parameters
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
