r"""Wanda: pruning by weights and activations (arXiv 2306.11695).

An element matters as much as it is large, and its input feature active (section 3, eq. 1):

    S_ij = |W_ij| ||X_j||_2

Within each row (output), the elements with the smallest S are pruned: a share of them, or all but n of each m
neighbours. Those that stay are not changed. With equal norms it is pruning by magnitude.

    pruned = wanda.prune(model, [PruningRule(n=2, m=4)], batches)      # float; to be quantized or trained next
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import qconfig
from qwix.contrib import calibration, pruning
from qwix.contrib.pruning import PruningRule

__all__ = ["PruningRule", "WandaCalibrationProvider", "prune", "prune_params", "prune_weight"]


class WandaCalibrationProvider(calibration.SinglePassCalibrationProvider):
    """Collects the mean square of the input features of each weight under a `PruningRule`."""

    per_group = True

    def get_rule_type(self) -> type[qconfig.QuantizationRule]:
        return PruningRule

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        return {"square": jnp.mean(jnp.square(lhs.astype(jnp.float32)), axis=1)}

    def get_stats_suffix(self) -> str:
        return "_wanda"


def prune_weight(w: jax.Array, norms: jax.Array, *, n: int = 2, m: int = 4, prune_rate: float = 0.5) -> jax.Array:
    """Prunes a weight (out, in), given ||X_j|| (in,) up to a factor.

    Args:
      w: (out, in).
      norms: (in,). If all are 0, there were no inputs, and it is pruned by magnitude.
      n, m, prune_rate: see `PruningRule`.

    >>> prune_weight(jnp.array([[3.0, 1.0]]), jnp.array([1.0, 9.0]), n=1, m=2).tolist()
    [[0.0, 1.0]]
    """
    if norms.shape != w.shape[1:]:
        raise ValueError(f"a weight {w.shape} (out, in) and norms {norms.shape} do not fit: they must be (in,)")
    norms = jnp.where((norms == 0).all(), 1, norms)  # of an expert without inputs nothing is known
    return jnp.where(pruning.kept(jnp.abs(w.astype(jnp.float32)) * norms, n, m, prune_rate), w, 0)


def prune_params(
    params: Any,
    abstract_quantized_params: Any,
    wanda_quant_stats: Any,
    *,
    n: int = 2,
    m: int = 4,
    prune_rate: float = 0.5,
) -> Any:
    """A float parameter tree, NNX or Linen, with weights that have statistics pruned; see `pruning.prune_params`."""

    def of_weight(w: jax.Array, stats: Mapping[str, jax.Array]) -> jax.Array:
        return prune_weight(w, jnp.sqrt(stats["square"]), n=n, m=m, prune_rate=prune_rate)

    return pruning.prune_params(params, abstract_quantized_params, wanda_quant_stats, "_wanda", of_weight)


def prune(
    model: nn.Module | nnx.Module, rules: Sequence[PruningRule], batches: Iterable[Any], *, variables: Any = None
) -> Any:
    """A pruned copy of a float NNX model; of a Linen model its variables, pruned.

    Args:
      model: it is not changed.
      rules: which weights, and how; all alike.
      batches: what the model is called with: arrays, tuples of arguments, dictionaries of keyword arguments; read once.
      variables: Linen only.

    >>> layer, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
    >>> int((prune(layer, [PruningRule(n=2, m=4)], [x]).kernel.get_value() == 0).sum())
    16
    """

    def of_rule(rule: PruningRule) -> Any:
        return lambda w, stats: prune_weight(
            w, jnp.sqrt(stats["square"]), n=rule.n, m=rule.m, prune_rate=rule.prune_rate
        )

    return pruning.prune_model(model, rules, batches, WandaCalibrationProvider(rules), of_rule, variables)
