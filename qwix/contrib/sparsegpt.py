r"""SparseGPT: pruning that makes up for what it prunes (arXiv 2301.00774).

Like GPTQ (`gptq_core`), it goes through the columns of W (rows = out, columns = in) from left to right, minimizes

    ||(W - V) X||_F^2 = tr((W - V) H (W - V)^T),      H = X X^T

and changes the columns to come so that they make up for the error made so far, with H^-1 = U^T U:

    e_j = (w_j - v_j) / U_jj,      W_{:,k} -= e_j U_jk  for k > j            (section 3.2)

v_j is 0 where the element is pruned, else w_j or, jointly with quantization, w_j rounded (section 3.5). What is pruned
is decided on the weights as they are then, by the smallest w_ij^2 / U_jj^2 (section 3.4): all but n of the next m
columns in each row, or the share `prune_rate` of the next block of columns.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from qwix._src import qconfig
from qwix._src.core import numerics, qarray
from qwix.contrib import calibration, gptq_core, pruning
from qwix.contrib.pruning import PruningRule

__all__ = ["PruningRule", "SparseGptCalibrationProvider", "prune", "prune_params", "prune_weight"]


class SparseGptCalibrationProvider(calibration.SinglePassCalibrationProvider):
    """Collects H = X X^T / samples of each weight under a `PruningRule`."""

    per_group = True

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        return PruningRule

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        return {"hessian": gptq_core.compute_hessian(lhs) / lhs.shape[1]}

    def get_stats_suffix(self) -> str:
        return "_sparsegpt"


def prune_weight(
    W: jax.Array,
    H: jax.Array,
    *,
    n: int = 2,
    m: int = 4,
    prune_rate: float = 0.5,
    how: qarray.HowToQuantize | None = None,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> tuple[Any, jax.Array]:
    """Prunes a weight by SparseGPT, and quantizes it with `how`.

    Args:
      W: (rows = out, columns = in).
      H: (columns, columns), X X^T up to a factor.
      n, m, prune_rate: see `PruningRule`.
      how: channelwise on axis 0 or not, tiled on axis 1 or not; scales are those of the unpruned W. None: float.
      blocksize: columns between two updates of the whole matrix, made a multiple of m; unstructured, also the columns
        that compete.
      percdamp: share of H's mean diagonal that is added to the diagonal; it grows where H has no Cholesky factor.

    Returns:
      The pruned weight, an array of the dtype of W or a QArray, and the mask of what stays.

    Raises:
      ValueError: shapes do not fit, or m does not divide the columns.

    >>> W, H = jnp.array([[4.0, 1.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> pruned, mask = prune_weight(W, H, n=1, m=2, percdamp=0.0)
    >>> mask.tolist()
    [[True, False]]
    """
    columns = W.shape[1]
    if W.ndim != 2 or H.shape != (columns, columns):
        raise ValueError(f"SparseGPT takes W (rows, columns) and H (columns, columns), got {W.shape} and {H.shape}")
    if m and (columns % m or not 0 <= n <= m):
        raise ValueError(f"{n}:{m} sparsity of {columns} columns: m must divide them, and n be at most m")
    if how is not None:
        qarray.get_scale_shape(W.shape, how)  # raises where a tile does not divide
    size = min(blocksize, columns)
    size = max(m, size // m * m) if m else size
    values, mask, scale, zero = _prune(W, H, jnp.float32(percdamp), n, m, prune_rate, how, size)
    if how is None:
        return values.astype(W.dtype), mask
    return qarray.QArray(numerics.narrow(values, how.qtype), scale, zero, how.qtype), mask


@functools.partial(jax.jit, static_argnames=("n", "m", "prune_rate", "how", "size"))
def _prune(W: jax.Array, H: jax.Array, percdamp: Any, n: int, m: int, prune_rate: float, how: Any, size: int) -> Any:
    rows, columns = W.shape
    dead = (jnp.diag(H) == 0) & (jnp.diag(H) != 0).any()  # of an expert without inputs nothing is known
    scale, zero = (None, None) if how is None else gptq_core.find_params(W.astype(jnp.float32), how)
    U = gptq_core.inverse_factor(H, False, percdamp)[0].T
    padding = -columns % size
    # Transposed from here on: a column of W is a contiguous row.
    Wt = jnp.pad(jnp.where(dead[:, None], 0, W.T.astype(jnp.float32)), ((0, padding), (0, 0)))
    U = jnp.pad(U, ((0, padding), (0, padding))) + jnp.diag((jnp.arange(columns + padding) >= columns) * 1.0)
    along: list[Any] = [None, None]
    for i, param in enumerate((scale, zero)):
        if param is not None:  # one for each column
            wide = jnp.repeat(param.T, columns // param.shape[1], axis=0)
            along[i] = jnp.pad(wide, ((0, padding), (0, 0)), mode="edge")

    def block_step(Wt: jax.Array, start: jax.Array) -> Any:
        of_block: Any = lambda x: None if x is None else lax.dynamic_slice_in_dim(x, start, size, 0)  # noqa: E731
        rows_of_U = of_block(U)
        factors = lax.dynamic_slice_in_dim(rows_of_U, start, size, 1)
        pivots = jnp.diag(factors)
        scales, zeros = map(of_block, along)
        block = of_block(Wt)
        is_real = (start + jnp.arange(size) < columns)[:, None]
        mask = jnp.ones(block.shape, bool)
        if not m:
            scores = jnp.where(is_real, (block / pivots[:, None]) ** 2, -1)
            number = jnp.round(prune_rate * rows * jnp.minimum(size, columns - start)).astype(jnp.int32)
            order = jnp.argsort(jnp.argsort(jnp.where(is_real, scores, jnp.inf).ravel(), stable=True), stable=True)
            mask = (order >= number).reshape(block.shape)

        def column_step(j: jax.Array, state: Any) -> Any:
            block, mask, errors, values = state
            if m:

                def choose() -> jax.Array:
                    group = lax.dynamic_slice_in_dim(block, j, m, 0)
                    scores = (group / lax.dynamic_slice_in_dim(pivots, j, m, 0)[:, None]) ** 2
                    return lax.dynamic_update_slice_in_dim(mask, pruning.kept(scores.T, n, m, 0).T, j, 0)

                mask = lax.cond(j % m == 0, choose, lambda: mask)
            w = block[j]
            new = jnp.where(mask[j], w, 0)
            if how is None:
                code = new
            else:
                code, error = gptq_core._round(new, how.qtype, scales[j], None if zeros is None else zeros[j])
                new -= error
            error = (w - new) / pivots[j]
            later = jnp.where(jnp.arange(size) > j, factors[j], 0)
            return block - later[:, None] * error, mask, errors.at[j].set(error), values.at[j].set(code)

        dtype = jnp.float32 if how is None else numerics.encode(jnp.zeros(1), how.qtype).dtype
        state = (block, mask, jnp.zeros_like(block), jnp.zeros(block.shape, dtype))
        _, mask, errors, values = lax.fori_loop(0, size, column_step, state)
        return Wt - rows_of_U.T @ errors, (values, mask)

    _, (values, mask) = lax.scan(block_step, Wt, jnp.arange(0, columns + padding, size))
    values, mask = (x.reshape(columns + padding, rows)[:columns].T for x in (values, mask))
    return values, mask & ~dead[None], None if scale is None else scale.astype(W.dtype), zero


def _row(x: jax.Array | None, j: jax.Array) -> jax.Array | None:
    return None if x is None else x[j][None]


def prune_params(
    params: Any,
    abstract_quantized_params: Any,
    sparsegpt_quant_stats: Any,
    *,
    n: int = 2,
    m: int = 4,
    prune_rate: float = 0.5,
) -> Any:
    """A float parameter tree, NNX or Linen, with weights that have statistics pruned; see `pruning.prune_params`."""

    def of_weight(w: jax.Array, stats: Mapping[str, jax.Array]) -> jax.Array:
        return prune_weight(w, stats["hessian"], n=n, m=m, prune_rate=prune_rate)[0]

    return pruning.prune_params(params, abstract_quantized_params, sparsegpt_quant_stats, "_sparsegpt", of_weight)


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    sparsegpt_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
    n: int = 2,
    m: int = 4,
    prune_rate: float = 0.5,
) -> Any:
    """Prunes and quantizes jointly: the tree for `PtqProvider`, see `ptq.quantize_params`."""

    def of_weight(context: calibration.CalibratedQuantContext) -> Any:
        hessian = context.calibration_stats["hessian"]
        array, _ = prune_weight(context.weight, hessian, n=n, m=m, prune_rate=prune_rate, how=context.how)
        return context.abs_w.replace(array=context.restore_shape(array))

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        sparsegpt_quant_stats,
        "_sparsegpt",
        of_weight,
        allow_extra_params=allow_extra_params,
    )


def prune(
    model: nn.Module | nnx.Module, rules: Sequence[PruningRule], batches: Iterable[Any], *, variables: Any = None
) -> Any:
    """A pruned copy of a float NNX model, or the variables of a Linen one; see `wanda.prune`.

    >>> layer, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (16, 8))
    >>> int((prune(layer, [PruningRule(n=2, m=4)], [x]).kernel.get_value() == 0).sum())
    16
    """

    def of_rule(rule: PruningRule) -> Any:
        return lambda w, stats: prune_weight(w, stats["hessian"], n=rule.n, m=rule.m, prune_rate=rule.prune_rate)[0]

    return pruning.prune_model(model, rules, batches, SparseGptCalibrationProvider(rules), of_rule, variables)
