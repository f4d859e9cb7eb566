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
from qwix.contrib import calibration, observing, segments, sequential


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
    stats = dict(ptq.flatten(quant_stats, is_leaf=lambda x: "count" in x))
    if not any(str(path[-1]).endswith(suffix) for path in stats):
        raise ValueError(f"quant_stats has no statistic named <weight>{suffix}: run the calibration model first")
    result = {}
    for weight in ptq.Template(abstract_quantized_params).weights(params):
        stat = stats.get((*weight.path[:-1], f"{weight.path[-1]}{suffix}"))
        result[weight.given[0]] = weight.given[1]
        if stat is not None and _is_quantized(weight.target):
            result[weight.given[0]] = _pruned(weight.path, weight.value, weight.target, stat, prune_weight)
    return calibration.nested(result)


def _is_quantized(target: Any) -> bool:
    return isinstance(target, ptq.WithAux) and isinstance(target.array, qarray.QArray)


def _pruned(path: Any, weight: jax.Array, target: Any, stat: Mapping[str, jax.Array], prune_weight: Any) -> jax.Array:
    def of_context(context: calibration.CalibratedQuantContext) -> ptq.WithAux:
        pruned = prune_weight(context.weight, context.calibration_stats)
        return ptq.WithAux(context.restore_shape(pruned), context.abs_w.how)

    pruned = calibration.quantize_weight(path, weight, target, stat, of_context)
    return weight if pruned is None else pruned.array.reshape(weight.shape).astype(weight.dtype)


def _pruned_by_stage(runner: sequential.Runner, layout: Any, params: Any, prune_weight: Any) -> Any:
    """A float parameter tree pruned stage by stage: a weight sees the inputs that the pruned ones before it give it."""
    weights = {tuple(map(str, weight.path)): weight for weight in ptq.Template(layout).weights(params)}
    found: dict[Any, dict[Any, jax.Array]] = {}
    for k in range(len(runner.plan.stages)):
        for name, stat in runner.run_stage(k).items():
            path, value, target, (given, _) = weights[segments.stem(name)]
            if target is None or not _is_quantized(target):
                continue
            layer: Any = name[len(path) :]
            if layer:
                value, target = value[layer], calibration.layer_of(target, len(layer))
            pruned = found.setdefault(given, {})[layer] = _pruned(path, value, target, stat, prune_weight)
            runner.replace(name, pruned)
    result = {given: value for _, _, _, (given, value) in weights.values()}
    return calibration.nested(result | {given: sequential.stacked(layers) for given, layers in found.items()})


def prune_model(
    model: nn.Module | nnx.Module,
    rules: Sequence[PruningRule],
    batches: Iterable[Any],
    provider: calibration.SinglePassCalibrationProvider,
    prune_weight: Callable[[PruningRule], Callable[..., jax.Array]],
    variables: Any = None,
) -> Any:
    """A copy of an NNX model (in Linen its variables) with the weights under each rule pruned, in float.

    Stage by stage as in `sequential`; where the model cannot be cut, with statistics of the float model.
    """
    rules = list(rules)
    alike = {(r.n, r.m, r.prune_rate): r for r in rules if isinstance(r, PruningRule) and r.weight_qtype is not None}
    if not alike:
        raise ValueError("no rule prunes: PruningRule(...) for the weights that are to be pruned")
    if len(alike) > 1:
        raise ValueError("all rules of one call prune alike: prune once for each n, m and prune_rate")
    runner, first, batches = sequential.start_if_cuttable(model, batches, provider, variables)
    layout = observing.abstract_params(model, ptq.PtqProvider(rules), first)
    params = observing.params_of(model, variables)
    (rule,) = alike.values()
    if runner is not None:
        pruned = _pruned_by_stage(runner, layout, params, prune_weight(rule))
    else:
        stats, _ = observing.observe(model, batches, provider, variables)
        pruned = prune_params(params, layout, stats, provider.get_stats_suffix(), prune_weight(rule))
    if isinstance(model, nn.Module):
        return {**variables, "params": pruned}
    model = nnx.clone(model)
    nnx.update(model, pruned)
    return model
