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
from qwix.cpu import native


def compute_hessian(X: jax.Array) -> jax.Array:
    """H = X X^T in float32, for inputs X of shape (in_features, samples).

    >>> compute_hessian(jnp.array([[1.0, 2.0]]))
    Array([[5.]], dtype=float32)
    """
    samples = X.astype(jnp.float32).T
    # One device: a sharded operand would be gathered for the kernel.
    if jax.default_backend() == "cpu" and jax.device_count() == 1 and native.is_available():
        return lax.platform_dependent(samples, cpu=native.second_moments, default=_second_moments)
    return _second_moments(samples)


def _second_moments(samples: jax.Array) -> jax.Array:
    """X^T X of (samples, features), on XLA."""
    features = samples.shape[1]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        # Contracting the first axis reads activations as they lie in memory; of the last one XLA makes copies.
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    if features < 1024:
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
    diagonal = _diagonal(H)
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal)
    if act_order:
        order = _order(diagonal)
        H, diagonal = H[order][:, order], diagonal[order]
    mean = jnp.mean(diagonal)

    # A failed factorization is NaN. A share of 1e6 always works on finite input; NaN input ends there as well.
    def failed(state):
        attempts, share, V = state
        return (attempts == 0) | (jnp.isnan(V[0, 0]) & (share < 1e6))

    def attempt(state):
        attempts, share, _ = state
        share = jnp.where(attempts == 0, share, jnp.maximum(share * 10, 1e-6))
        return attempts + 1, share, _inverse_factor(H, diagonal + share * mean)

    _, share, V = lax.while_loop(failed, attempt, (0, percdamp, H))
    return V, share


def _inverse_factor(H: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Lower V with (V V^T)^-1 = H, symmetric, whose diagonal is given apart.

    By halves, so that nearly all of it is matmuls: LAPACK's factorization runs on one core in some builds, and knows
    nothing of a triangle's zeros where it inverts one. With M = V^-1 and H = M^T M,

        H_22 = M_22^T M_22,   M_21 = V_22^T H_21,   H_11 - M_21^T M_21 = M_11^T M_11,   V_21 = -V_22 M_21 V_11.
    """
    n = H.shape[0]
    if n <= _SMALL:
        eye = jnp.eye(n, dtype=jnp.float32)
        H = jnp.where(eye == 1, diagonal, H.T)[::-1, ::-1]  # LAPACK's layout is the transposed one
        L = lax.linalg.cholesky(H, symmetrize_input=False)
        return lax.linalg.triangular_solve(L, eye, left_side=True, lower=True)[::-1, ::-1].T
    half = _SMALL
    while 2 * half < n:
        half *= 2
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    V_22 = _inverse_factor(H[half:, half:], diagonal[half:])
    a = (n - half) // 2  # the quarter of a triangular factor that is 0 is left out of its products
    B = H[half:, :half]
    M_21 = jnp.concatenate([product(V_22[:, :a].T, B), product(V_22[a:, a:].T, B[a:])])
    rest = H[:half, :half] - product(M_21.T, M_21)
    V_11 = _inverse_factor(rest, diagonal[:half] - jnp.sum(M_21**2, axis=0))
    b = half // 2
    B = jnp.concatenate([product(V_22[:a, :a], M_21[:a]), product(V_22[a:], M_21)])
    V_21 = -jnp.concatenate([product(B, V_11[:, :b]), product(B[:, b:], V_11[b:, b:])], 1)
    return jnp.block([[V_11, jnp.zeros((half, n - half), jnp.float32)], [V_21, V_22]])


# Columns of the largest block that LAPACK factors.
_SMALL = 512


def _diagonal(H: jax.Array) -> jax.Array:
    """`jnp.diag`, which is slow to compile."""
    return H.reshape(-1)[:: H.shape[0] + 1].astype(jnp.float32)


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
    # Transposed from here on: a column of W is a contiguous row. Nothing may be fused with the transposition, since
    # XLA's loop over the elements takes four times as long: dead columns become 0 where they are read.
    Wt = W.T.astype(jnp.float32)
    known = act_order or static_scales or groups == 1  # scales, before the first column is quantized
    params = None
    if known:
        alive = jnp.where(dead[:, None], 0, Wt).reshape(groups, group, rows)
        params = _group_params(alive, how, weights.reshape(groups, group), scale_search)
    group_of = jnp.arange(columns) // group if known and groups > 1 else None
    if act_order:
        order = _order(jnp.where(diagonal == 0, 1.0, diagonal))  # as it is after damping
        Wt, dead = Wt[order], dead[order]
        group_of = None if group_of is None else group_of[order]

    block, parts = _parts(columns, blocksize, None if known else group)
    length = -(-columns // parts[0]) * parts[0]
    if length > columns:
        V = jnp.pad(V, ((0, length - columns), (0, length - columns)), constant_values=1)

    def at_columns(x: jax.Array, start: Any, count: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, count, 0)

    pad: Any = lambda x: jnp.pad(x, ((0, length - columns), *[(0, 0)] * (x.ndim - 1)))  # noqa: E731
    Wt, dead, weights, group_of = jax.tree.map(pad, (Wt, dead, weights, group_of))

    # In both, `tile` (columns, rows) has caught up with all columns before `start`, and the errors of `start` and later
    # are 0. They return all errors, the codes, and the scales if they come from the changed W.
    def quantize_parts(errors, start, tile, parts, ours):
        part = parts[0]

        def step(errors, i):
            at = start + i * part

            def catch_up(k, mine):
                before = start + k * part
                return mine - lax.dynamic_slice(V, (at, before), (part, part)) @ at_columns(errors, before, part)

            mine = lax.fori_loop(0, i, catch_up, at_columns(tile, i * part, part))
            scales, found = ours, None
            if part == block:
                mine = jnp.where(at_columns(dead, at, part)[:, None], 0, mine)
                if not known:
                    scales = found = _group_params(mine[None], how, at_columns(weights, at, part)[None], scale_search)
            if len(parts) == 1:
                errors, codes = quantize_columns(errors, at, mine, scales)
                return errors, (codes, found)
            errors, codes, inner = quantize_parts(errors, at, mine, parts[1:], scales)
            return errors, (codes, found if part == block else inner)

        errors, outs = lax.scan(step, errors, jnp.arange(tile.shape[0] // part))
        return errors, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outs)

    def quantize_columns(errors, start, tile, ours):
        run = tile.shape[0]
        square = lax.dynamic_slice(V, (start, start), (run, run))

        def step(found, j):
            w = tile[j] - sum(square[j, k] * found[k] for k in range(run))
            if keep_zeros:
                w = jnp.where(Wt[start + j] == 0, 0, w)
            group = 0 if group_of is None else group_of[start + j]
            code, error = _round(w, how.qtype, *jax.tree.map(lambda p: p[group, 0], ours))
            return lax.dynamic_update_index_in_dim(found, error / square[j, j], j, 0), code

        found, codes = lax.scan(step, jnp.zeros_like(tile), jnp.arange(run))
        return lax.dynamic_update_slice_in_dim(errors, found, start, 0), codes

    errors, codes, found = quantize_parts(jnp.zeros((length, rows), jnp.float32), 0, Wt, parts, params)
    # Apart from the narrowing and the squares, which XLA would do in the transposed layout and then copy.
    codes, errors = lax.optimization_barrier((codes[:columns].T, errors[:columns].T))
    if not known:
        params = jax.tree.map(lambda p: p[:groups], found)
    if act_order:
        codes, errors = (jnp.zeros_like(x).at[:, order].set(x) for x in (codes, errors))
    scale, zero_point = jax.tree.map(lambda p: p[:, 0].T, params)
    q = qarray.QArray(numerics.narrow(codes, how.qtype), scale.astype(W.dtype), zero_point, how.qtype)
    return q, errors**2, damping


def _parts(columns: int, blocksize: int, group: int | None) -> tuple[int, list[int]]:
    """Columns of a block, and of the parts, and the parts of parts, in which the columns catch up with earlier ones.

    A block is a group whose scale is computed when its turn comes, or any columns whose scales are known. Matmuls of
    large parts are quicker, and within the smallest part each column catches up alone. Parts divide one another.
    """
    block = group or min(blocksize, columns)
    parts = [max(n for n in range(1, min(_RUN, block) + 1) if block % n == 0), block]
    for size in (blocksize, 8 * blocksize):
        count = max(round(columns / size), 1)
        part = -(-columns // count // parts[-1]) * parts[-1]
        if count > 1 and part > parts[-1]:
            parts.append(part)
    return block, list(dict.fromkeys(reversed(parts)))


# Columns after which a matmul changes the rest of their block.
_RUN = 16


def _round(w: jax.Array, qtype: Any, scale: jax.Array, zero_point: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Codes of w, and how far w is from what they stand for.

    `quantize` for the inside of the loop: codes stay in bytes, XLA's CPU is slow with narrower ones; and w is used
    once, so that XLA does not compute it twice.
    """
    offset = 0.0 if zero_point is None else zero_point.astype(jnp.float32)
    scaled = w / scale
    codes = numerics.encode(scaled + offset, qtype)
    values = numerics.convert_from(codes, qtype)
    if codes.dtype != numerics.storage_dtype(qtype) and not jnp.issubdtype(numerics.storage_dtype(qtype), jnp.integer):
        values = numerics.narrow(codes, qtype)
    return codes, (scaled - (values.astype(jnp.float32) - offset)) * scale


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
        _, errors = _round(columns, how.qtype, *tried)
        error = jnp.sum(weights[:, :, None] * errors**2, axes, keepdims=True)
        keep = lambda new, old: jnp.where(error < least, new, old)  # noqa: E731
        return (jnp.minimum(error, least), jax.tree.map(keep, tried, params)), None

    worst = jnp.full(params[0].shape, jnp.inf, jnp.float32)
    (_, params), _ = lax.scan(try_factor, (worst, params), jnp.linspace(1.0, 0.5, scale_search))
    return params
