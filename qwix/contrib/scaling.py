"""One pass over calibration data, one scale for each activation, and a model that has them: for AWQ and SmoothQuant.

Both methods choose a scale for the input features of weights, and differ in how. What they share is here:

1. `calibrate` runs the model on the batches, which it reads once and one after the other, under a calibration provider.
2. `choose` asks the method for the scale of each site (`folding.find_sites`): of all weights with one input at once.
3. `smooth` folds into the float model what can be folded; the function of the model stays the same.
4. `quantize` quantizes after that. Scales that could not be folded stay with their weights, and activations take them
   at inference (`input_scale`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import model as model_lib
from qwix._src.providers import ptq
from qwix._src.utils import flax_util
from qwix.contrib import calibration, folding, input_scale, observing

Context = calibration.CalibratedQuantContext


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A float model, and what was seen of its activations.

    Attributes:
      model: NNX or Linen.
      variables: of a Linen model.
      inputs: arguments of the first call.
      stats: pure nested dict.
      suffix: of the statistics.
      sites: of the model.
    """

    model: Any
    variables: Any
    inputs: observing.Call
    stats: Any
    suffix: str
    sites: list[folding.Site]

    @property
    def params(self) -> Any:
        """The float parameters, as a pure dictionary."""
        return observing.params_of(self.model, self.variables)

    def weights(self, provider: input_scale.InputScaleProvider) -> dict[folding.Path, list[Context]]:
        """The weights that have statistics; a stacked one has a context for each layer."""
        template = ptq.Template(observing.abstract_params(self.model, provider, self.inputs))
        params, found = dict(ptq.flatten(self.params)), {}
        for key, stats in ptq.flatten(self.stats, is_leaf=lambda x: "count" in x):
            if not str(key[-1]).endswith(self.suffix):
                continue
            path = (*key[:-1], str(key[-1]).removesuffix(self.suffix))
            target = template.get(path)
            rank = jnp.ndim(stats["count"])
            if rank > 1 or path not in params or not isinstance(target, ptq.WithAux):
                continue
            layers = [(flax_util.unbox(params[path]), target, stats)]
            if rank:
                layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), target)
                layers = [
                    (layers[0][0][i], layer, {name: value[i] for name, value in stats.items()})
                    for i in range(stats["count"].shape[0])
                ]
            contexts = [calibration.extract_calibrated_quant_context(path, *layer) for layer in layers]
            if None not in contexts:
                found[path] = [context for context in contexts if context is not None]
        return found


def calibrate(
    model: Any,
    batches: Iterable[Any],
    provider: calibration.SinglePassCalibrationProvider,
    variables: Any = None,
) -> Calibrated:
    """Runs a model on calibration batches, once; see `observing.observe`."""
    stats, inputs = observing.observe(model, batches, provider, variables)
    sites = folding.find_sites(model, *inputs[0], variables=variables, **inputs[1])
    return Calibrated(model, variables, inputs, stats, provider.get_stats_suffix(), sites)


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


def choose(
    calibrated: Calibrated,
    weights: Mapping[folding.Path, Sequence[Context]],
    scale_of: Callable[[Sequence[Member]], jax.Array],
) -> Chosen:
    """The scale of each site, (*stacked, features).

    Args:
      calibrated: the model.
      weights: those that get a scale.
      scale_of: the members of a site (of one layer) -> the scale, (features,).
    """
    chosen = []
    for site in calibrated.sites:
        paths = [path for path in site.weights if path in weights]
        if not paths or any(site.weights[p].ids.size != weights[p][0].weight.shape[1] for p in paths):
            continue
        layers = [
            scale_of([Member(context, site, path) for path, context in zip(paths, contexts, strict=True)])
            for contexts in zip(*(weights[path] for path in paths), strict=True)
        ]
        chosen.append((site, jnp.stack(layers) if site.stacked else layers[0]))
    return chosen


def smooth(calibrated: Calibrated, chosen: Chosen) -> tuple[Any, dict[str, str]]:
    """The float model (in Linen its variables) with the scales that can be folded; why the others cannot, by path."""
    folded = [(site, scale) for site, scale in chosen if site.reason is None]
    unfolded = {
        "/".join(map(str, path)): site.reason for site, _ in chosen if site.reason is not None for path in site.weights
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


def quantize(
    calibrated: Calibrated,
    chosen: Chosen,
    provider: input_scale.InputScaleProvider,
    quantize_weight: Callable[[Context, jax.Array, jax.Array], Any],
) -> Quantized:
    """Quantizes a model with its scales.

    Args:
      calibrated: the model.
      chosen: the scales.
      provider: of the quantized model.
      quantize_weight: (context, scaled weight, scale of its columns) -> QArray (out, in).
    """
    smoothed, _ = smooth(calibrated, chosen)
    is_linen = isinstance(calibrated.model, nn.Module)
    model = calibrated.model if is_linen else smoothed
    args, kwargs = calibrated.inputs
    quantized = model_lib.quantize_model(model, provider, *(() if is_linen else args), **({} if is_linen else kwargs))
    abstract = quantized
    if is_linen:
        abstract = jax.eval_shape(quantized.init, jax.random.key(0), *args, **kwargs)["params"]
    scales = {path: (site, scale) for site, scale in chosen for path in site.weights}
    layer: dict[folding.Path, int] = {}

    def quantize_one(context: Context) -> Any:
        path, columns = context.path, context.weight.shape[1]
        i = layer[path] = layer.get(path, -1) + 1
        if path not in scales:
            array = quantize_weight(context, context.weight, jnp.ones(columns))
            return ptq.WithAux(context.restore_shape(array), context.abs_w.how)
        site, scale = scales[path]
        scale = Member(context, site, path).to_columns(scale[i] if site.stacked else scale)
        if site.reason is None:
            array = quantize_weight(context, context.weight, scale)
            return ptq.WithAux(context.restore_shape(array), context.abs_w.how)
        array = quantize_weight(context, (context.weight * scale).astype(context.weight.dtype), scale)
        make = provider.weight_type
        return input_scale.with_scale(context, make, array, make.stored_scale(scale))

    if not is_linen:  # only these keep a place for a scale
        runtime = {path for path, (site, _) in scales.items() if site.reason is not None}
        _drop_scales(quantized, runtime)
    params = calibration.quantize_params_with_calibration(
        observing.params_of(model, smoothed),
        abstract,
        calibrated.stats,
        calibrated.suffix,
        quantize_one,
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
            if isinstance(value, input_scale.WithInputScale) and (*path, name) not in keep:
                setattr(module, name, value.without_scale())
