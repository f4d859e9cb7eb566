r"""GPTQ on one weight matrix (arXiv 2210.17323).

With a layer y = W x and inputs X (one column a sample), it minimizes the error of the layer's output,

    ||(W - Q) X||_F^2 = tr((W - Q) H (W - Q)^T),        H = X X^T        (section 2, eq. 1)

greedily, one column after the other: quantize column j, and change the columns not yet quantized so that they make up
for it,

    e_j = (w_j - q_j) / U_jj,        W_{:,k} -= e_j U_jk   for k > j     (section 3, eq. 2 with step 3)

where U is the upper Cholesky factor of H^-1 = U^T U. As in section 3, step 2, columns go in blocks: inside of a block
each column catches up with the block's earlier ones just before its turn, and after a block one matmul updates the
rest.

Two things are different from the paper's algorithm, and change no result beyond rounding. U is found without inverting
H: with J the reversal of the order, J H J = L L^T gives U = (J L J)^-1, one Cholesky factorization and one triangular
inverse. And a group's scale is always computed from its columns as they are when its first column's turn comes.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src.core import numerics, qarray


def compute_hessian(X: jax.Array) -> jax.Array:
    """H = X X^T in float32, for inputs X of shape (in_features, samples).

    >>> compute_hessian(jnp.array([[1.0, 2.0]]))
    Array([[5.]], dtype=float32)
    """
    X = X.astype(jnp.float32)
    return jnp.matmul(X, X.T, precision=lax.Precision.HIGHEST)


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
) -> tuple[qarray.QArray, jax.Array]:
    """Quantizes a weight by GPTQ.

    Args:
      W: (rows = out_features, columns = in_features).
      H: (columns, columns), X X^T up to a factor; see `compute_hessian`. A column whose diagonal is 0 is dead: no input
        ever used it, and its weights become 0.
      how: channelwise on axis 0 or not, tiled on axis 1 or not; any format and calibration method.
      blocksize: columns between two updates of the whole matrix; changes speed only.
      percdamp: share of H's mean diagonal that is added to the diagonal. Where that leaves H without a Cholesky factor
        it is multiplied by ten until there is one, and a warning says so.
      act_order: quantize the columns in order of falling diagonal. Group scales then come from the unchanged W, since a
        group's columns are no longer neighbours in time; they stay neighbours in the result.

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
    q, losses, damping = _gptq(W, H, jnp.float32(percdamp), how, blocksize, act_order)
    if not isinstance(damping, jax.core.Tracer) and damping > percdamp * 1.5:
        warnings.warn(
            f"H has no Cholesky factor with a damping of {percdamp}: {float(damping):g} was used. More or other "
            "calibration samples make it better conditioned.",
            stacklevel=2,
        )
    return q, losses


@functools.partial(jax.jit, static_argnames=("how", "blocksize", "act_order"))
def _gptq(
    W: jax.Array,
    H: jax.Array,
    percdamp: jax.Array,
    how: qarray.HowToQuantize,
    blocksize: int,
    act_order: bool,
) -> tuple[qarray.QArray, jax.Array, jax.Array]:
    rows, columns = W.shape
    groups = qarray.get_scale_shape(W.shape, how)[1]
    group = columns // groups
    # Transposed from here on: a column of W is a contiguous row.
    dead = jnp.diag(H) == 0
    H = H.astype(jnp.float32) + jnp.diag(dead.astype(jnp.float32))
    Wt = jnp.where(dead[:, None], 0, W.T.astype(jnp.float32))
    params = _group_params(Wt.reshape(groups, group, rows), how)
    params_are_final = act_order or groups == 1
    order = jnp.argsort(-jnp.diag(H)) if act_order else jnp.arange(columns)
    if act_order:
        Wt, H = Wt[order], H[order][:, order]
    U, damping = _inverse_factor(H, percdamp)

    size = _block_size(min(blocksize, columns), group, params_are_final)
    padding = -columns % size
    # Columns that fill up the last block, and those that a slice of a group's width may reach over the end.
    Wt = jnp.pad(Wt, ((0, padding + group), (0, 0)))
    U = jnp.pad(U, ((0, padding), (0, padding + group)))
    diagonal = jnp.where(jnp.arange(columns + padding) < columns, jnp.diag(U), 1.0)
    group_of = jnp.pad(order // group, (0, padding), mode="edge")

    def block_step(carry, start):
        Wt, params = carry
        rows_of_U = lax.dynamic_slice_in_dim(U, start, size, 0)
        if not params_are_final:  # no block holds the first columns of two groups
            new = lambda: _group_params(lax.dynamic_slice_in_dim(Wt, start, group, 0)[None], how)  # noqa: E731
            put = lambda p, n: lax.dynamic_update_slice_in_dim(p, n, start // group, 0)  # noqa: E731
            params = lax.cond(
                (start % group == 0) & (start < columns),
                lambda: jax.tree.map(put, params, new()),
                lambda: params,
            )
        groups_of_block = lax.dynamic_slice_in_dim(group_of, start, size, 0)
        if not params_are_final or groups == 1:
            of_block = jax.tree.map(lambda p: p[groups_of_block[0]], params)

        def column_step(errors, x):
            j, stale, factors, pivot, group = x
            w = stale[None] - factors[None] @ errors  # catches up with the columns of this block before it
            ours = jax.tree.map(lambda p: p[group], params) if params_are_final and groups > 1 else of_block
            codes, dequantized = _round(w, how.qtype, *ours)
            error = (w - dequantized) / pivot
            return lax.dynamic_update_slice_in_dim(errors, error, j, 0), (codes[0], error[0] ** 2)

        xs = (
            jnp.arange(size),
            lax.dynamic_slice_in_dim(Wt, start, size, 0),
            lax.dynamic_slice_in_dim(rows_of_U, start, size, 1).T,
            lax.dynamic_slice_in_dim(diagonal, start, size, 0),
            groups_of_block,
        )
        errors, out = lax.scan(column_step, jnp.zeros((size, rows), jnp.float32), xs)
        # U is upper triangular: no column before the block changes. Those of the block are not read again.
        return (Wt - rows_of_U.T @ errors, params), out

    starts = jnp.arange(0, columns + padding, size)
    (_, params), out = lax.scan(block_step, (Wt, params), starts)
    codes, losses = (x.reshape(columns + padding, rows)[:columns] for x in out)
    if act_order:
        codes, losses = (jnp.zeros_like(x).at[order].set(x) for x in (codes, losses))
    scale, zero_point = jax.tree.map(lambda p: p[:, 0].T, params)
    q = qarray.QArray(numerics.narrow(codes.T, how.qtype), scale.astype(W.dtype), zero_point, how.qtype)
    return q, losses.T, damping


def _round(w: jax.Array, qtype: Any, scale: jax.Array, zero_point: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`quantize` for the inside of the loop: codes stay in bytes, XLA's CPU is slow with narrower ones."""
    offset = 0.0 if zero_point is None else zero_point.astype(jnp.float32)
    codes = numerics.encode(w / scale + offset, qtype)
    values = numerics.convert_from(codes, qtype)
    if codes.dtype != numerics.storage_dtype(qtype) and not jnp.issubdtype(numerics.storage_dtype(qtype), jnp.integer):
        values = numerics.narrow(codes, qtype)
    return codes, (values.astype(jnp.float32) - offset) * scale


def _group_params(columns: jax.Array, how: qarray.HowToQuantize) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zero points (groups, 1, rows or 1) of groups of columns (groups, columns of one, rows)."""
    channelwise = (0, 2) if 0 in how.channelwise_axes else (0,)
    return find_params(columns, dataclasses.replace(how, channelwise_axes=channelwise, tiled_axes={}))


def _block_size(size: int, group: int, params_are_final: bool) -> int:
    """The largest size up to `size` with which each group starts with a block, and at most one in a block."""
    if params_are_final:
        return size
    return max(n for n in range(1, min(size, group) + 1) if group % n == 0)


def _inverse_factor(H: jax.Array, percdamp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper U with (H + damping)^-1 = U^T U, and the share of the mean diagonal that the damping took."""
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
    return lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False), share
