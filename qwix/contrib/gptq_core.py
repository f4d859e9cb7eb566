r"""GPTQ on one weight matrix (arXiv 2210.17323).

With a layer y = W x and inputs X (one column a sample), it minimizes the error of the layer's output,

    ||(W - Q) X||_F^2 = tr((W - Q) H (W - Q)^T),        H = X X^T        (section 2, eq. 1)

greedily, one column after the other: quantize column j, and change the columns not yet quantized so that they make up
for it,

    e_j = (w_j - q_j) / U_jj,        W_{:,k} -= e_j U_jk   for k > j     (section 3, eq. 2 with step 3)

where U is the upper Cholesky factor of H^-1 = U^T U. As in section 3, step 2, columns go in blocks: inside of a block
each column catches up with the block's earlier ones just before its turn, and after a block one matmul updates the
rest.

Three things differ from the paper's algorithm, and change no result beyond rounding. U is found without inverting
H: with J the reversal of the order, J H J = L L^T gives U = (J L J)^-1, one Cholesky factorization and one triangular
inverse. A block catches up with all earlier ones when its turn comes, instead of changing all later ones after it, so
that no more than the block is written. And a group's scale is always computed from its columns as they are when its
first column's turn comes.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src import qconfig
from qwix._src.core import numerics, qarray


def compute_hessian(X: jax.Array) -> jax.Array:
    """H = X X^T in float32, for inputs X of shape (in_features, samples).

    >>> compute_hessian(jnp.array([[1.0, 2.0]]))
    Array([[5.]], dtype=float32)
    """
    # Contracting the first axis reads activations as they lie in memory; with the last one XLA copies them transposed.
    samples = X.astype(jnp.float32).T
    features = samples.shape[1]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    if features < 512:
        return product(samples, samples)
    # H is symmetric: half of the products of blocks of features are enough. With eight it was no quicker.
    parts = 4
    size = features // parts
    blocks = [samples[:, i * size : (i + 1) * size if i < parts - 1 else None] for i in range(parts)]
    products = {(i, j): product(blocks[i], blocks[j]) for i in range(parts) for j in range(i + 1)}
    square = [[products[i, j] if j <= i else products[j, i].T for j in range(parts)] for i in range(parts)]
    return jnp.block(square)


def cholesky_inverse(L: jax.Array) -> jax.Array:
    """Inverse of A = L L^T, given its lower Cholesky factor L.

    >>> cholesky_inverse(jnp.array([[2.0]]))
    Array([[0.25]], dtype=float32)
    """
    inverse = lax.linalg.triangular_solve(L, jnp.eye(L.shape[0], dtype=L.dtype), left_side=True, lower=True)
    return inverse.T @ inverse


def find_params(w: jax.Array, how: qarray.HowToQuantize) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of a matrix (rows, columns): one a row if axis 0 is channelwise, one for each tile.

    >>> find_params(jnp.array([[-1.0, 127.5]]), qarray.HowToQuantize(qtype=jnp.int8))[0]
    Array([[1.]], dtype=float32)
    """
    return qarray.compute_scale_zero_point(qarray.calibrate(w, how), how.qtype)


def quantize(
    w: jax.Array, qtype: jax.typing.DTypeLike, scale: jax.Array, zero_point: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes of w in a format, and what they stand for: (codes, dequantized w).

    >>> [float(x[0, 0]) for x in quantize(jnp.array([[2.4]]), jnp.int8, jnp.ones((1, 1)), None)]
    [2.0, 2.0]
    """
    q = qarray.quantize_with_scale_zero_point(w, qtype, scale, zero_point)
    return q.qvalue, qarray.dequantize(q)


def quantize_weight(
    W: jax.Array,
    H: jax.Array,
    how: qarray.HowToQuantize,
    blocksize: int = 128,
    percdamp: float = 0.01,
    *,
    act_order: bool = False,
    scale_search: int = 0,
    keep_zeros: bool = False,
    static_scales: bool = False,
    name: str = "H",
) -> tuple[qarray.QArray, jax.Array]:
    """Quantizes a weight by GPTQ.

    Args:
      W: (rows = out_features, columns = in_features).
      H: (columns, columns), X X^T up to a factor; see `compute_hessian`. A column whose diagonal is 0 is dead: no input
        ever used it, and its weights become 0. If all are, there were no inputs, and W is rounded to nearest.
      how: channelwise on axis 0 or not, tiled on axis 1 or not; any format and calibration method.
      blocksize: columns between two updates of the rest; changes speed only. A block holds whole groups.
      percdamp: share of H's mean diagonal that is added to the diagonal. Where that leaves H without a Cholesky factor
        it is multiplied by ten until there is one, and a warning says so.
      act_order: quantize the columns in order of falling diagonal. Group scales then come from the unchanged W, since a
        group's columns are no longer neighbours in time; they stay neighbours in the result.
      scale_search: number of ranges that are tried for each scale, from the one that `how` finds down to half of it.
        The one with the smallest error, each column weighted with its diagonal of H, is kept. 0: the first.
      keep_zeros: elements of W that are 0, those of a pruned weight, stay 0, and the others make up for their errors.
      static_scales: group scales come from the unchanged W, as they always do with `act_order`.
      name: of the weight, for messages.

    Returns:
      The QArray (rows, columns), and the loss of each element, ((w - q) / U_jj)^2, whose sum is
      tr((W - Q) H (W - Q)^T) with the damped H.

    Raises:
      ValueError: if the shapes do not fit, or `how` tiles or splits an axis that GPTQ cannot.

    >>> W, X = jnp.array([[0.3, 0.1]]), jnp.array([[1.0, 2.0], [2.0, 1.0]])
    >>> how = qarray.HowToQuantize(qtype=jnp.int4, calibration_method="fixed,0.75")
    >>> q, loss = quantize_weight(W, compute_hessian(X), how)
    >>> q.qvalue, q.scale
    (Array([[3, 1]], dtype=int4), Array([[0.1]], dtype=float32))
    """
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"GPTQ takes W (rows, columns) and H (columns, columns), got {W.shape} and {H.shape}")
    if set(how.channelwise_axes) - {0} or set(how.tiled_axes) - {1}:
        raise ValueError(f"GPTQ scales rows (axis 0) and groups of columns (axis 1 tiled), got {how}")
    qarray.get_scale_shape(W.shape, how)  # raises where a tile does not divide
    options = (act_order, scale_search, keep_zeros, static_scales)
    q, losses, damping = _gptq(W, H, jnp.float32(percdamp), how, blocksize, *options)
    if not isinstance(damping, jax.core.Tracer) and float(damping) > percdamp * 1.5:
        warnings.warn(
            f"{name} has no Cholesky factor with a damping of {percdamp}: {float(damping):g} was used. More or other "
            "calibration samples make it better conditioned.",
            qconfig.QuantizationWarning,
            stacklevel=2,
        )
    return q, losses


@functools.partial(jax.jit, static_argnames="act_order")
def inverse_factor(H: jax.Array, act_order: bool, percdamp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lower V = U^T with (H + damping)^-1 = V V^T, and the share of the mean diagonal that the damping took.

    In the order in which the columns are quantized.
    """
    H = H.astype(jnp.float32)
    eye = jnp.eye(H.shape[0], dtype=bool)
    H = H + jnp.where(eye & (H == 0), 1.0, 0.0)
    diagonal = _diagonal(H)
    if act_order:
        order = _order(diagonal)
        H = H[order][:, order]
    mean = jnp.mean(diagonal)

    # A failed factorization is NaN. A share of 1e6 always works on finite input; NaN input ends there as well.
    def failed(state):
        attempts, share, L = state
        return (attempts == 0) | (jnp.isnan(L[-1, -1]) & (share < 1e6))

    def attempt(state):
        attempts, share, _ = state
        share = jnp.where(attempts == 0, share, jnp.maximum(share * 10, 1e-6))
        damped = jnp.where(eye, H + share * mean, H)
        return attempts + 1, share, lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)

    _, share, L = lax.while_loop(failed, attempt, (0, percdamp, H))
    return _inverse_of_lower(L).T[::-1, ::-1], share


def _inverse_of_lower(L: jax.Array) -> jax.Array:
    """Inverse of a lower triangular matrix, halves at a time: [[A, 0], [B, C]] has [[A', 0], [-C' B A', C']].

    A solve with the identity for the right side knows nothing of the half of it that stays 0.
    """
    n = L.shape[0]
    if n <= 512:
        return lax.linalg.triangular_solve(L, jnp.eye(n, dtype=L.dtype), left_side=True, lower=True)
    half = 512
    while 2 * half < n:
        half *= 2
    A, C = _inverse_of_lower(L[:half, :half]), _inverse_of_lower(L[half:, half:])
    B = -C @ (L[half:, :half] @ A)
    return jnp.block([[A, jnp.zeros((half, n - half), L.dtype)], [B, C]])


def _diagonal(H: jax.Array) -> jax.Array:
    """`jnp.diag`, which is slower to compile than all the rest of what is done with it here."""
    return jnp.sum(jnp.where(jnp.eye(H.shape[0], dtype=bool), H, 0), axis=0, dtype=jnp.float32)


def _order(diagonal: jax.Array) -> jax.Array:
    """Columns by falling diagonal of H."""
    return jnp.argsort(-diagonal)


_OPTIONS = ("how", "blocksize", "act_order", "scale_search", "keep_zeros", "static_scales")


@functools.partial(jax.jit, static_argnames=_OPTIONS)
def _gptq(
    W: jax.Array,
    H: jax.Array,
    percdamp: jax.Array,
    how: qarray.HowToQuantize,
    blocksize: int,
    act_order: bool,
    scale_search: int,
    keep_zeros: bool,
    static_scales: bool,
) -> tuple[qarray.QArray, jax.Array, jax.Array]:
    """`quantize_weight`, and the damping that it took: one program, which compiles sooner than two."""
    V, damping = inverse_factor(H, act_order, percdamp)
    rows, columns = W.shape
    groups = qarray.get_scale_shape(W.shape, how)[1]
    group = columns // groups
    diagonal = _diagonal(H)
    dead = (diagonal == 0) & (diagonal != 0).any()
    weights = jnp.where((diagonal == 0).all(), 1.0, diagonal)
    # Transposed from here on: a column of W is a contiguous row.
    Wt = jnp.where(dead[:, None], 0, W.T.astype(jnp.float32))

    known = act_order or static_scales or groups == 1  # scales, before the first column is quantized
    params = None
    if known:
        params = _group_params(Wt.reshape(groups, group, rows), how, weights.reshape(groups, group), scale_search)
    group_of = jnp.arange(columns) // group if known and groups > 1 else None
    if act_order:
        order = _order(jnp.where(diagonal == 0, 1.0, diagonal))  # as it is after damping
        Wt = Wt[order]
        group_of = None if group_of is None else group_of[order]

    # Blocks of columns: a group each, or some columns whose scales are known. Runs of columns within a block.
    size = min(blocksize, columns) if known else group
    run = max(n for n in range(1, min(_RUN, size) + 1) if size % n == 0)
    blocks = -(-columns // size)
    chunk = max(blocksize // size, 1) * size  # columns that a block catches up with at once
    length = -(-columns // chunk) * chunk
    if length > columns:
        V = jnp.pad(V, ((0, length - columns), (0, length - columns)))
        V = jnp.where(jnp.eye(length, dtype=bool) & (V == 0), 1, V)

    def by_block(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        padded = jnp.pad(x, ((0, blocks * size - columns), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(blocks, size, *x.shape[1:])

    def block_step(errors, x):
        b, tile, kept, weights, group_of = x
        start = b * size

        def catch_up(i, tile):
            factors = lax.dynamic_slice(V, (start, i * chunk), (size, chunk))
            return tile - factors @ lax.dynamic_slice_in_dim(errors, i * chunk, chunk, 0)

        # The errors of this block and those after it are still 0.
        tile = lax.fori_loop(0, (start + chunk - 1) // chunk, catch_up, tile)
        ours = params if known else _group_params(tile[None], how, weights[None], scale_search)

        def column_step(part, x):
            j, square, kept, group = x
            mine = jax.tree.map(lambda p: p[0 if group is None else group, 0], ours)
            w = part[j] if kept is None else jnp.where(kept, part[j], 0)
            code, value = _round(w, how.qtype, *mine)
            error = (w - value) / square[j]
            return part - square[:, None] * error, (code, error)

        def run_step(tile, x):
            at, *others = x
            factors = lax.dynamic_slice(V, (start, start + at), (size, run))
            square = lax.dynamic_slice_in_dim(factors, at, run, 0).T
            part = lax.dynamic_slice_in_dim(tile, at, run, 0)
            _, (codes, found) = lax.scan(column_step, part, (jnp.arange(run), square, *others))
            return tile - factors @ found, (codes, found)

        by_run = jax.tree.map(lambda x: x.reshape(-1, run, *x.shape[1:]), (kept, group_of))
        _, (codes, found) = lax.scan(run_step, tile, (jnp.arange(0, size, run), *by_run))
        codes, found = codes.reshape(size, rows), found.reshape(size, rows)
        errors = lax.dynamic_update_slice_in_dim(errors, found, start, 0)
        return errors, (codes, None if known else ours)

    xs = (Wt, Wt != 0 if keep_zeros else None, None if known else weights, group_of)
    errors = jnp.zeros((length, rows), jnp.float32)
    errors, (codes, found) = lax.scan(block_step, errors, (jnp.arange(blocks), *map(by_block, xs)))
    codes = codes.reshape(blocks * size, rows)[:columns]
    losses = errors[:columns] ** 2
    if not known:
        params = jax.tree.map(lambda p: p[:, 0], found)
    if act_order:
        codes, losses = (jnp.zeros_like(x).at[order].set(x) for x in (codes, losses))
    scale, zero_point = jax.tree.map(lambda p: p[:, 0].T, params)
    q = qarray.QArray(numerics.narrow(codes.T, how.qtype), scale.astype(W.dtype), zero_point, how.qtype)
    return q, losses.T, damping


# Columns of a block after which one matmul changes the rest of it.
_RUN = 16


def _round(w: jax.Array, qtype: Any, scale: jax.Array, zero_point: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`quantize` for the inside of the loop: codes stay in bytes, XLA's CPU is slow with narrower ones."""
    offset = 0.0 if zero_point is None else zero_point.astype(jnp.float32)
    codes = numerics.encode(w / scale + offset, qtype)
    values = numerics.convert_from(codes, qtype)
    if codes.dtype != numerics.storage_dtype(qtype) and not jnp.issubdtype(numerics.storage_dtype(qtype), jnp.integer):
        values = numerics.narrow(codes, qtype)
    return codes, (values.astype(jnp.float32) - offset) * scale


def _group_params(
    columns: jax.Array, how: qarray.HowToQuantize, weights: jax.Array, scale_search: int
) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zero points (groups, 1, rows or 1) of groups of columns (groups, columns of one, rows).

    `weights` (groups, columns of one) are those of the columns in the error that `scale_search` makes small.
    """
    channelwise = (0, 2) if 0 in how.channelwise_axes else (0,)
    how = dataclasses.replace(how, channelwise_axes=channelwise, tiled_axes={})
    calibration = qarray.calibrate(columns, how)
    params = qarray.compute_scale_zero_point(calibration, how.qtype)
    if scale_search < 2:
        return params
    axes = (1,) if 0 in how.channelwise_axes and 2 in how.channelwise_axes else (1, 2)

    def try_factor(best, factor):
        least, params = best
        tried = qarray.compute_scale_zero_point(jax.tree.map(lambda c: c * factor, calibration), how.qtype)
        _, values = _round(columns, how.qtype, *tried)
        error = jnp.sum(weights[:, :, None] * (columns - values) ** 2, axes, keepdims=True)
        keep = lambda new, old: jnp.where(error < least, new, old)  # noqa: E731
        return (jnp.minimum(error, least), jax.tree.map(keep, tried, params)), None

    worst = jnp.full(params[0].shape, jnp.inf, jnp.float32)
    (_, params), _ = lax.scan(try_factor, (worst, params), jnp.linspace(1.0, 0.5, scale_search))
    return params
