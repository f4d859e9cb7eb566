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
    X = X.astype(jnp.float32)
    size = X.shape[0] // _PARTS
    if size < 128:
        return jnp.matmul(X, X.T, precision=lax.Precision.HIGHEST)
    # H is symmetric: half of the products of blocks of rows are enough.
    blocks = [X[i * size : (i + 1) * size if i < _PARTS - 1 else None] for i in range(_PARTS)]
    products = {
        (i, j): jnp.matmul(blocks[i], blocks[j].T, precision=lax.Precision.HIGHEST)
        for i in range(_PARTS)
        for j in range(i + 1)
    }
    square = [[products[i, j] if j <= i else products[j, i].T for j in range(_PARTS)] for i in range(_PARTS)]
    return jnp.block(square)


# Blocks of rows in which a large Hessian is computed.
_PARTS = 4


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
    V, damping = inverse_factor(H, act_order, jnp.float32(percdamp))
    q, losses = _gptq(W, H, V, how, blocksize, act_order, scale_search, keep_zeros)
    if not isinstance(damping, jax.core.Tracer) and damping > percdamp * 1.5:
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
    diagonal = jnp.diag(H)
    H = H + jnp.diag((diagonal == 0).astype(jnp.float32))
    if act_order:
        order = _order(diagonal)
        H = H[order][:, order]
    mean = jnp.mean(jnp.diag(H))

    def factor(share):
        damped = H + jnp.diag(jnp.full(H.shape[0], share * mean))
        return lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)

    # A failed factorization is NaN. A share of 1e6 always works on finite input; NaN input ends there as well.
    def failed(state):
        share, L = state
        return jnp.isnan(L[-1, -1]) & (share < 1e6)

    def grow(state):
        share = jnp.maximum(state[0] * 10, 1e-6)
        return share, factor(share)

    share, L = lax.while_loop(failed, grow, (percdamp, factor(percdamp)))
    upper = L[::-1, ::-1]
    eye = jnp.eye(H.shape[0], dtype=H.dtype)
    return lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False, transpose_a=True), share


def _order(diagonal: jax.Array) -> jax.Array:
    """Columns by falling diagonal of H; those that no input uses count as they do after damping, as 1."""
    return jnp.argsort(-jnp.where(diagonal == 0, 1.0, diagonal))


@functools.partial(jax.jit, static_argnames=("how", "blocksize", "act_order", "scale_search", "keep_zeros"))
def _gptq(
    W: jax.Array,
    H: jax.Array,
    V: jax.Array,
    how: qarray.HowToQuantize,
    blocksize: int,
    act_order: bool,
    scale_search: int,
    keep_zeros: bool,
) -> tuple[qarray.QArray, jax.Array]:
    rows, columns = W.shape
    groups = qarray.get_scale_shape(W.shape, how)[1]
    group = columns // groups
    diagonal = jnp.diag(H).astype(jnp.float32)
    dead = (diagonal == 0) & (diagonal != 0).any()
    weights = jnp.where((diagonal == 0).all(), 1.0, diagonal)
    # Transposed from here on: a column of W is a contiguous row.
    Wt = jnp.where(dead[:, None], 0, W.T.astype(jnp.float32))

    def group_params(columns: jax.Array, weights: jax.Array) -> Any:
        return _group_params(columns, how, weights, scale_search)

    known = act_order or groups == 1  # scales, before the first column is quantized
    params = group_params(Wt.reshape(groups, group, rows), weights.reshape(groups, group)) if known else None
    order = _order(diagonal) if act_order else jnp.arange(columns)
    if act_order:
        Wt, weights = Wt[order], weights[order]

    # Blocks of columns, and runs of columns within a block. A group starts with a run, and lies in one block.
    unit = 1 if known else group
    size = max(min(blocksize, columns) // unit, 1) * unit
    run = _RUN if known else max(n for n in range(1, min(_RUN, group) + 1) if group % n == 0)
    size += -size % run
    blocks = -(-columns // size)
    padding = blocks * size - columns
    Wt = jnp.pad(Wt, ((0, padding), (0, 0))).reshape(blocks, size, rows)
    kept = Wt != 0 if keep_zeros else None
    weights = jnp.pad(weights, (0, padding)).reshape(blocks, size)
    V = jnp.pad(V, ((0, padding), (0, padding)))
    V = V + jnp.diag((jnp.arange(blocks * size) >= columns).astype(jnp.float32))
    group_of = jnp.pad(order // group, (0, padding)).reshape(blocks, size)

    def block_step(errors, x):
        b, tile, kept, weights, group_of = x
        start = b * size

        def catch_up(i, tile):  # with the columns of block i
            factors = lax.dynamic_slice(V, (start, i * size), (size, size))
            return tile - factors @ lax.dynamic_slice_in_dim(errors, i * size, size, 0)

        tile = lax.fori_loop(0, b, catch_up, tile)
        factors = lax.dynamic_slice(V, (start, start), (size, size))

        def run_step(carry, at):
            tile, ours = carry
            if not known:
                new = lambda: group_params(  # noqa: E731
                    lax.dynamic_slice_in_dim(tile, at, group, 0)[None],
                    lax.dynamic_slice_in_dim(weights, at, group, 0)[None],
                )
                ours = lax.cond(at % group == 0, new, lambda: ours)
            elif groups > 1:
                ours = jax.tree.map(lambda p: p[lax.dynamic_slice_in_dim(group_of, at, run, 0), 0], params)
            part = lax.dynamic_slice_in_dim(tile, at, run, 0)
            stays = None if kept is None else lax.dynamic_slice_in_dim(kept, at, run, 0)
            square = lax.dynamic_slice(factors, (at, at), (run, run))
            codes: list[jax.Array] = []
            found: list[jax.Array] = []
            for j in range(run):  # each catches up with those of the run before it
                w = part[j] - sum(square[j, i] * error for i, error in enumerate(found))
                mine = jax.tree.map(lambda p, j=j: p[j] if known and groups > 1 else p[0, 0], ours)
                code, value = _round(w if stays is None else jnp.where(stays[j], w, 0), how.qtype, *mine)
                codes.append(code)
                found.append((w - value) / square[j, j])
            errors = jnp.stack(found)
            tile = tile - lax.dynamic_slice_in_dim(factors, at, run, 1) @ errors
            # With known scales there is nothing to carry, nor to collect.
            return (tile, None if known and groups > 1 else ours), (jnp.stack(codes), errors, None if known else ours)

        if known:
            ours = None if groups > 1 else params
        else:
            ours = jax.eval_shape(group_params, tile[None, :group], weights[None, :group])
            ours = jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), ours)
        _, (codes, found, ours) = lax.scan(run_step, (tile, ours), jnp.arange(0, size, run))
        found = found.reshape(size, rows)
        if not known:
            ours = jax.tree.map(lambda p: p[:: group // run, 0], ours)
        errors = lax.dynamic_update_slice_in_dim(errors, found, start, 0)
        return errors, (codes.reshape(size, rows), ours)

    errors = jnp.zeros((blocks * size, rows), jnp.float32)
    errors, (codes, found) = lax.scan(block_step, errors, (jnp.arange(blocks), Wt, kept, weights, group_of))
    codes = codes.reshape(blocks * size, rows)[:columns]
    losses = errors[:columns] ** 2
    if not known:
        params = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:])[:groups], found)
    if act_order:
        codes, losses = (jnp.zeros_like(x).at[order].set(x) for x in (codes, losses))
    scale, zero_point = jax.tree.map(lambda p: p[:, 0].T, params)
    q = qarray.QArray(numerics.narrow(codes.T, how.qtype), scale.astype(W.dtype), zero_point, how.qtype)
    return q, losses.T


# Columns that are quantized by one unrolled piece of code.
_RUN = 8


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
