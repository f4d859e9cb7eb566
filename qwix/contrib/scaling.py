"""One pass over calibration data, one scale for each activation, and a model that has them: for AWQ and SmoothQuant.

Both methods choose a scale for the input features of weights, and differ in how. What they share is here:

1. `calibrate` reads the batches once. Stage by stage it gets the statistics of some weights, asks the method for the
   scale of each site (`folding.find_sites`), that is of all weights with one input at once, and lets the statistics go,
   so that those of all weights are never in memory together.
2. `smooth` folds into the float model what can be folded; the function of the model stays the same.
3. `quantize` quantizes after that. Scales that could not be folded stay with their weights, and activations take them
   at inference (`input_scale`).
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import model as model_lib
from qwix._src.providers import ptq
from qwix._src.providers.input_transform import WithInputTransform
from qwix._src.utils import flax_util
from qwix.contrib import calibration, folding, input_scale, observing, segments, sequential

Context = calibration.CalibratedQuantContext


@dataclasses.dataclass(frozen=True)
class Member:
    """A weight of a site.

    Attributes:
      context: the weight (of one layer), and its statistics.
      site: with the other weights that have the same input.
      path: of the weight.
    """

    context: Context
    site: folding.Site
    path: folding.Path

    def _column_of_feature(self) -> jax.Array:
        return self.context.restore_shape(jnp.arange(self.context.weight.shape[1])[None]).reshape(-1)

    def to_site(self, values: jax.Array) -> jax.Array:
        """One number for each feature of the site, from one for each column of the weight."""
        return self.site.from_weight(self.path, values[self._column_of_feature()])

    def to_columns(self, scale: jax.Array) -> jax.Array:
        """(..., columns of the weight), from (..., features of the site)."""
        return self.site.of_weight(self.path, scale)[..., jnp.argsort(self._column_of_feature())]


Chosen = list[tuple[folding.Site, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A float model, and the scales of its activations.

    Attributes:
      model: NNX or Linen.
      variables: of a Linen model.
      inputs: arguments of the first call.
      provider: that the quantized model runs under.
      suffix: of the statistics.
      chosen: the scale of each site, (*stacked, features).
      stats: path -> the statistics of the weight, but for matrices.
      kept: path -> what `keep` made of the weight and its statistics, layer by layer.
    """

    model: Any
    variables: Any
    inputs: observing.Call
    provider: input_scale.InputScaleProvider
    suffix: str
    chosen: Chosen
    stats: Mapping[folding.Path, Mapping[str, jax.Array]]
    kept: Mapping[folding.Path, Sequence[Any]]


def calibrate(
    model: Any,
    batches: Iterable[Any],
    observer: calibration.SinglePassCalibrationProvider,
    provider: input_scale.InputScaleProvider,
    scale_of: Callable[[Sequence[Member]], jax.Array],
    *,
    variables: Any = None,
    keep: Callable[[Context], Any] = lambda context: None,
    by_stage: bool = True,
) -> Calibrated:
    """Runs a model on calibration batches, once, and chooses scales.

    Args:
      model: NNX or Linen.
      batches: see `observing`.
      observer: takes the statistics.
      provider: of the quantized model.
      scale_of: the members of a site (of one layer) -> the scale, (features,).
      variables: Linen only.
      keep: what `quantize` will need of the statistics of a weight (of one layer).
      by_stage: see `observe`.

    Raises:
      ValueError: as `observe`.
    """
    inputs, paths, stages = observe(model, batches, observer, variables, by_stage=by_stage)
    sites = folding.find_sites(model, *inputs[0], variables=variables, **inputs[1])
    weights = Weights(model, variables, inputs, provider)
    chosen: Chosen = []
    stats: dict[folding.Path, Mapping[str, jax.Array]] = {}
    kept: dict[folding.Path, list[Any]] = {}
    waiting: dict[folding.Path, list[Context]] = {}  # for the rest of their site
    for stage in stages:
        for path, found in stage.items():
            contexts = weights.contexts(path, found)
            stats[path] = {n: x for n, x in found.items() if jnp.ndim(x) < jnp.ndim(found["count"]) + 2}
            if contexts:
                waiting[path], kept[path] = contexts, [keep(context) for context in contexts]
        for site in sites:
            members = [path for path in site.weights if path in waiting]
            if not members or any(path in paths and path not in stats for path in site.weights):
                continue
            of_members = [waiting.pop(path) for path in members]
            if any(site.weights[c[0].path].ids.size != c[0].weight.shape[1] for c in of_members):
                continue
            layers = [scale_of([Member(c, site, c.path) for c in layer]) for layer in zip(*of_members, strict=True)]
            chosen.append((site, jnp.stack(layers) if site.stacked else layers[0]))
        in_sites = {path for site in sites for path in site.weights}
        waiting = {path: contexts for path, contexts in waiting.items() if path in in_sites}
    return Calibrated(model, variables, inputs, provider, observer.get_stats_suffix(), chosen, stats, kept)


Stats = dict[folding.Path, dict[str, jax.Array]]


def observe(
    model: Any,
    batches: Iterable[Any],
    observer: calibration.SinglePassCalibrationProvider,
    variables: Any,
    *,
    by_stage: bool,
) -> tuple[observing.Call, Collection[folding.Path], Iterator[Stats]]:
    """The statistics of a float model's weights, by path, some weights at a time.

    Args:
      model, batches, observer, variables: see `calibrate`.
      by_stage: those of a stage of the model (`sequential`), where weights with one input share them, which is not for
        an observer whose statistics depend on the rule. Else, and where a model cannot be cut, those of all weights.

    Returns:
      Arguments of the first call, which weights have statistics, and these.

    Raises:
      ValueError: there is no batch; a Linen model came without variables; or activations are not finite.
    """
    if by_stage:
        runner, inputs, batches = sequential.start_if_cuttable(model, batches, observer, variables)
        if runner is not None:
            paths = [path for path, _ in ptq.flatten(observing.params_of(model, variables))]
            paths += [path[:-1] for path in paths if path[-1] == "array"]  # of transformed weights, in NNX
            named: dict[segments.Path, folding.Path] = {tuple(map(str, path)): path for path in paths}
            return inputs, {named[segments.stem(n)] for n in runner.names}, _stages(runner, named)
    tree, inputs = observing.observe(model, batches, observer, variables)
    suffix, found = observer.get_stats_suffix(), {}
    for key, stats in ptq.flatten(tree, is_leaf=lambda x: "count" in x):
        if str(key[-1]).endswith(suffix):
            found[(*key[:-1], str(key[-1]).removesuffix(suffix))] = stats
    return inputs, found.keys(), iter([found])


def _stages(runner: sequential.Runner, named: Mapping[segments.Path, folding.Path]) -> Iterator[Stats]:
    """The statistics of each stage; those of layers that a scan runs over together, once all of them are there."""
    missing: collections.Counter[segments.Path] = collections.Counter(map(segments.stem, runner.names))
    layers: dict[segments.Path, dict[Any, Any]] = {}
    for k in range(len(runner.plan.stages)):
        for name, stats in runner.run_stage(k).items():
            path = segments.stem(name)
            layers.setdefault(path, {})[name[len(path) :]] = stats
        done = [path for path, found in layers.items() if len(found) == missing[path]]
        yield {named[path]: sequential.stacked(layers.pop(path)) for path in done}


class Weights:
    """The weights of a float model as they will be quantized.

    Args:
      model, variables: NNX, or Linen.
      inputs: arguments of a call.
      provider: of the quantized model.
    """

    def __init__(self, model: Any, variables: Any, inputs: observing.Call, provider: input_scale.InputScaleProvider):
        self._template = ptq.Template(observing.abstract_params(model, provider, inputs))
        weights = self._template.weights(observing.params_of(model, variables))
        self._params = {weight.path: weight.value for weight in weights}

    def contexts(self, path: folding.Path, stats: Mapping[str, jax.Array]) -> list[Context]:
        """A weight and its statistics, of a stacked one for each layer; none if it will not be quantized by them."""
        target = self._template.get(path)
        rank = jnp.ndim(stats["count"])
        if rank > 1 or path not in self._params or not isinstance(target, ptq.WithAux):
            return []
        weight = flax_util.unbox(self._params[path])
        layers = [(weight, target, stats)]
        if rank:
            layer = calibration.layer_of(target)
            layers = [
                (weight[i], layer, {name: value[i] for name, value in stats.items()})
                for i in range(stats["count"].shape[0])
            ]
        contexts = [calibration.extract_calibrated_quant_context(path, *layer) for layer in layers]
        return [context for context in contexts if context is not None] if None not in contexts else []


def smooth(calibrated: Calibrated) -> tuple[Any, dict[str, str]]:
    """The float model (in Linen its variables) with the scales that can be folded; why the others cannot, by path."""
    folded = [(site, scale) for site, scale in calibrated.chosen if site.reason is None]
    unfolded = {
        "/".join(map(str, path)): site.reason
        for site, _ in calibrated.chosen
        if site.reason is not None
        for path in site.weights
    }
    return folding.apply_scales(calibrated.model, folded, variables=calibrated.variables), unfolded


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What became of a model.

    Attributes:
      model: the quantized model; in Linen a pair of it and its variables.
      smoothed: the float model with the scales that could be folded (in Linen its variables), which was quantized.
      provider: that the quantized model runs under.
    """

    model: Any
    smoothed: Any
    provider: input_scale.InputScaleProvider


def quantize(calibrated: Calibrated, quantize_weight: Callable[[Context, jax.Array, jax.Array, Any], Any]) -> Quantized:
    """Quantizes a model with its scales.

    Args:
      calibrated: the model.
      quantize_weight: (context, scaled weight, scale of its columns, what was kept of it) -> QArray (out, in).
    """
    smoothed, _ = smooth(calibrated)
    provider = calibrated.provider
    is_linen = isinstance(calibrated.model, nn.Module)
    model = calibrated.model if is_linen else smoothed
    args, kwargs = calibrated.inputs
    quantized = model_lib.quantize_model(model, provider, *(() if is_linen else args), **({} if is_linen else kwargs))
    abstract = quantized
    if is_linen:
        abstract = jax.eval_shape(quantized.init, jax.random.key(0), *args, **kwargs)["params"]
    scales = {path: (site, scale) for site, scale in calibrated.chosen for path in site.weights}
    layer: dict[folding.Path, int] = {}

    def quantize_one(context: Context) -> Any:
        path, columns = context.path, context.weight.shape[1]
        i = layer[path] = layer.get(path, -1) + 1
        kept = calibrated.kept[path][i]
        if path not in scales:
            array = quantize_weight(context, context.weight, jnp.ones(columns), kept)
            return ptq.WithAux(context.restore_shape(array), context.abs_w.how)
        site, scale = scales[path]
        scale = Member(context, site, path).to_columns(scale[i] if site.stacked else scale)
        if site.reason is None:
            array = quantize_weight(context, context.weight, scale, kept)
            return ptq.WithAux(context.restore_shape(array), context.abs_w.how)
        array = quantize_weight(context, (context.weight * scale).astype(context.weight.dtype), scale, kept)
        make = provider.weight_type
        return input_scale.with_scale(context, make, array, make.stored_scale(scale))

    if not is_linen:  # only these keep a place for a scale
        runtime = {path for path, (site, _) in scales.items() if site.reason is not None}
        _drop_scales(quantized, runtime)
    stats = {(*path[:-1], f"{path[-1]}{calibrated.suffix}"): found for path, found in calibrated.stats.items()}
    params = calibration.quantize_params_with_calibration(
        observing.params_of(model, smoothed), abstract, calibration.nested(stats), calibrated.suffix, quantize_one
    )
    if is_linen:
        return Quantized((quantized, {**smoothed, "params": params}), smoothed, provider)
    nnx.update(quantized, params)
    return Quantized(quantized, smoothed, provider)


def _drop_scales(model: nnx.Module, keep: set[folding.Path]) -> None:
    """Takes the places for scales out of an NNX model, but for the weights in `keep`."""
    for path, module in list(nnx.iter_graph(model)):
        if not isinstance(module, nnx.Module):
            continue
        for name, value in list(vars(module).items()):
            transformed = isinstance(value, WithInputTransform)
            weight = value.inner() if transformed else value
            if isinstance(weight, input_scale.WithInputScale) and (*path, name) not in keep:
                plain = weight.without_scale()
                setattr(module, name, value.holding(plain) if transformed else plain)
