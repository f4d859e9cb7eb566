"""What Wanda and SparseGPT have in common: rules, statistics by weight, and pruned parameter trees.

A method prunes a weight laid out as (out, in), comparing along its input features, the axes that an op contracts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import qconfig
from qwix._src.core import qarray, sparsity
from qwix._src.providers import ptq
from qwix.contrib import calibration, observing


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningRule(qconfig.QuantizationRule):
    """A rule whose weights are pruned. `weight_qtype` only has to be there if they are quantized as well.

    Attributes:
      n, m: n of each m neighbouring input features stay; m = 0: unstructured.
      prune_rate: share of the elements that is pruned, if unstructured.
    """

    weight_qtype: jax.typing.DTypeLike | None = "int8"
    n: int = 2
    m: int = 4
    prune_rate: float = 0.5


def kept(scores: jax.Array, n: int, m: int, prune_rate: float) -> jax.Array:
    """The mask of the elements (rows, columns) with the largest scores: n of m columns, or a share of each row.

    >>> kept(jnp.array([[3.0, 1.0, 2.0, 4.0]]), 1, 2, 0).tolist()
    [[True, False, False, True]]
    >>> kept(jnp.array([[3.0, 1.0, 2.0, 4.0]]), 0, 0, 0.25).tolist()
    [[True, False, True, True]]
    """
    if m:
        return sparsity.get_sparsity_mask(scores, n, m)
    count = scores.shape[1] - round(prune_rate * scores.shape[1])
    return jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1, stable=True) < count


def prune_params(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any,
    suffix: str,
    prune_weight: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array],
) -> Any:
    """A float parameter tree with the weights that have statistics pruned.

    Args:
      params: pure nested dict of float arrays, see `ptq.quantize_params`.
      abstract_quantized_params: the quantized model (NNX) or its abstract parameters (Linen): they tell which axes are
        input features; the number format does not matter.
      quant_stats: what the method's calibration provider collected.
      suffix: of the method's statistics.
      prune_weight: (weight (out, in), statistics) -> the pruned weight.

    Returns:
      The tree with its paths and shapes unchanged; of a transformed model (`contrib.rotation`), what is inside.

    Raises:
      ValueError: as `calibration.extract_calibrated_quant_context`; or there are no statistics.
    """
    template = ptq.Template(abstract_quantized_params)
    stats = dict(ptq.flatten(quant_stats, is_leaf=lambda x: "count" in x))
    if not any(str(path[-1]).endswith(suffix) for path in stats):
        raise ValueError(f"quant_stats has no statistic named <weight>{suffix}: run the calibration model first")
    result: dict[Any, Any] = {}
    for path, value, target, given in template.weights(params):
        stat = stats.get((*path[:-1], f"{path[-1]}{suffix}"))
        new = given[1]
        if stat is not None and isinstance(target, ptq.WithAux) and isinstance(target.array, qarray.QArray):
            new = _pruned(path, value, target, stat, prune_weight)
        node = result
        for key in given[0][:-1]:
            node = node.setdefault(key, {})
        node[given[0][-1]] = new
    return result


def _pruned(path: Any, weight: jax.Array, target: ptq.WithAux, stat: Mapping[str, jax.Array], prune_weight: Any) -> Any:
    if jnp.ndim(stat["count"]):  # layers that a scan or vmap stacked, one after the other
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), target)
        layers = range(stat["count"].shape[0])
        stats = [{name: x[i] for name, x in stat.items()} for i in layers]
        return jnp.stack([_pruned(path, weight[i], layer, stats[i], prune_weight) for i in layers])
    context = calibration.extract_calibrated_quant_context(path, weight, target, stat)
    if context is None:
        return weight
    pruned = prune_weight(context.weight, context.calibration_stats)
    return context.restore_shape(pruned).reshape(weight.shape).astype(weight.dtype)


def prune_model(
    model: nn.Module | nnx.Module,
    rules: Sequence[PruningRule],
    batches: Iterable[Any],
    provider: calibration.SinglePassCalibrationProvider,
    prune_weight: Callable[[PruningRule], Callable[..., jax.Array]],
    variables: Any = None,
) -> Any:
    """A copy of an NNX model (in Linen its variables) with the weights under each rule pruned, in float."""
    rules = list(rules)
    alike = {(r.n, r.m, r.prune_rate): r for r in rules if isinstance(r, PruningRule) and r.weight_qtype is not None}
    if not alike:
        raise ValueError("no rule prunes: PruningRule(...) for the weights that are to be pruned")
    if len(alike) > 1:
        raise ValueError("all rules of one call prune alike: prune once for each n, m and prune_rate")
    stats, first = observing.observe(model, batches, provider, variables)
    layout = observing.abstract_params(model, ptq.PtqProvider(rules), first)
    params = observing.params_of(model, variables)
    (rule,) = alike.values()
    pruned = prune_params(params, layout, stats, provider.get_stats_suffix(), prune_weight(rule))
    if isinstance(model, nn.Module):
        return {**variables, "params": pruned}
    model = nnx.clone(model)
    nnx.update(model, pruned)
    return model
