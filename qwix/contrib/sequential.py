"""Calibrated quantization of a model in one call, each weight with the inputs that earlier quantized weights give it.

    result = quantize(model, batches, GptqCalibrationProvider(rules), gptq.quantize_with_context, PtqProvider(rules))

Stage by stage (see `segments`): every batch runs up to the inputs of the stage's weights, whose statistics add up; the
weights are quantized; and the batches go on with what the quantized weights stand for. The values between two stages
are carried along, so that all of it is one pass of the model for each batch, and only one stage's statistics are in
memory. This is the order of GPTQ's experiments (arXiv 2210.17323, section 4, "Setup").

A method is a calibration provider, whose `compute_stats` says what is kept of the activations, and a function that
quantizes a weight with it (`calibration.CalibratedQuantContext` -> `WithAux`), so that any may ride on this driver.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from qwix._src import averaging, qconfig
from qwix._src import model as model_lib
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix._src.utils import flax_util
from qwix.contrib import calibration, input_features, observing, segments

_average = averaging.SimpleMovingAverage()
QuantizeFn = Callable[[calibration.CalibratedQuantContext], ptq.WithAux]


@dataclasses.dataclass(frozen=True)
class Result:
    """What `quantize` made.

    Attributes:
      model: the quantized model; in Linen, the module, to be called with `params`.
      params: the quantized parameters, as `ptq.quantize_params` returns them.
      stages: paths of the weights of each stage; those of layers that a scan runs over have an index at the end.
      quant_stats: the statistics of each weight, nested as a provider leaves them; empty unless asked for.
    """

    model: Any
    params: Any
    stages: tuple[tuple[segments.Path, ...], ...]
    quant_stats: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)


def quantize(
    model: nn.Module | nnx.Module,
    batches: Iterable[Any],
    provider: calibration.SinglePassCalibrationProvider,
    quantize_weight: QuantizeFn,
    inference_provider: qconfig.QuantizationProvider,
    *,
    variables: Mapping[str, Any] | None = None,
    method: str = "__call__",
    sequential: bool = True,
    pair_stats: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None = None,
    keep_stats: bool = False,
    abstract_quantized: Any = None,
    allow_extra_params: bool = False,
    progress: Callable[[int, int], None] = lambda done, stages: None,
) -> Result:
    """Quantizes a model stage by stage.

    Args:
      model: float NNX model, or Linen module with `variables`. It is left alone.
      batches: inputs of `method`: arrays, tuples (positional) or dicts (keywords). Read once.
      provider: says which ops are calibrated, and what is kept of their activations.
      quantize_weight: quantizes one weight.
      inference_provider: what the quantized model runs under. Weights without statistics are rounded to nearest.
      variables: of a Linen module, with 'params'.
      method: which is called.
      sequential: statistics see quantized earlier weights; else those of the float model, at the same cost.
      pair_stats: instead of `provider.compute_stats`, with the activations (in, samples) in the model so far quantized
        and in the float one, which then runs as well.
      keep_stats: put the statistics into the result.
      abstract_quantized: what says how parameters are quantized, see `ptq.quantize_params`; found out if None.
      allow_extra_params: see `ptq.quantize_params`.
      progress: called with the number of stages done, and of all.

    Raises:
      ValueError: there are no batches, an op inside of a loop is calibrated, or its activations are not finite.

    >>> import qwix
    >>> from qwix.contrib import gptq
    >>> model, rules = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), [gptq.GptqRule(weight_qtype="int4")]
    >>> provider = gptq.GptqCalibrationProvider(rules)
    >>> batches = [jnp.eye(4), jnp.ones((1, 4))]
    >>> result = quantize(model, batches, provider, gptq.quantize_with_context, qwix.PtqProvider(rules))
    >>> result.stages, result.model.kernel.array.qvalue.dtype
    (((('kernel',),),), dtype(int4))
    """
    runner = start(model, batches, provider, variables=variables, method=method, pair_stats=pair_stats)
    source, suffix = runner.source, provider.get_stats_suffix()
    abstract = abstract_quantized
    if abstract is None:
        abstract = source.abstract(inference_provider, runner.first_call)
    template = ptq.Template(abstract)
    original = {tuple(map(str, weight.path)): weight for weight in template.weights(source.params)}
    found: dict[Any, dict[tuple[int, ...], ptq.WithAux]] = {}  # by layer; of a weight that is not stacked, by ()
    how: dict[Any, qarray.HowToQuantize] = {}
    kept: dict[Any, dict[tuple[int, ...], Any]] = {}
    plan = runner.plan
    for k, weights in enumerate(plan.stages):
        stats = runner.run_stage(k)
        for name in weights:
            path, value, target, _ = original[segments.stem(name)]
            layer: Any = name[len(path) :]
            if keep_stats:
                kept.setdefault((*path[:-1], f"{path[-1]}{suffix}"), {})[layer] = stats[name]
            if not isinstance(target, ptq.WithAux) or not isinstance(target.array, qarray.QArray):
                continue
            if layer:
                value, target = value[layer], calibration.layer_of(target, len(layer))
            quantized = calibration.quantize_weight(path, value, target, stats[name], quantize_weight)
            if quantized is None:
                continue
            found.setdefault(path, {})[layer], how[path] = quantized, target.how
            if sequential:
                runner.replace(name, quantized.__jax_array__().reshape(value.shape).astype(value.dtype))
        progress(k + 1, len(plan.stages))
    calibrated = {path: stacked(layers).replace(how=how[path]) for path, layers in found.items()}
    runner.batches.clear()  # before the quantized model is made
    params = calibration.assemble(source.params, abstract, calibrated, allow_extra_params=allow_extra_params)
    quantized_model = source.quantized(inference_provider, runner.first_call)
    if isinstance(quantized_model, nnx.Module):
        nnx.update(quantized_model, params)
    return Result(
        quantized_model,
        params,
        plan.stages,
        calibration.nested({path: stacked(layers) for path, layers in kept.items()}),
    )


def stacked(layers: Mapping[tuple[Any, ...], Any]) -> Any:
    """Trees by layer as one tree, in which the axes of layers are in front."""
    if () in layers:
        return layers[()]
    inner: dict[int, dict[tuple[int, ...], Any]] = {}
    for (i, *rest), tree in layers.items():
        inner.setdefault(i, {})[tuple(rest)] = tree
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(stacked(inner[i]) for i in sorted(inner)))


def start(
    model: nn.Module | nnx.Module,
    batches: Iterable[Any],
    provider: calibration.SinglePassCalibrationProvider,
    *,
    variables: Mapping[str, Any] | None = None,
    method: str = "__call__",
    pair_stats: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None = None,
) -> Runner:
    """A model cut into stages, with batches at its input; see `quantize` for arguments and errors."""
    runner = Runner(_Source(model, variables, provider, method), provider, pair_stats)
    for batch in batches:
        runner.start(*observing.as_call(batch))
    if not runner.batches:
        raise ValueError("there is nothing to calibrate with: batches is empty")
    return runner


def start_if_cuttable(
    model: nn.Module | nnx.Module,
    batches: Iterable[Any],
    provider: calibration.SinglePassCalibrationProvider,
    variables: Mapping[str, Any] | None,
) -> tuple[Runner | None, observing.Call, Iterator[Any]]:
    """`start`, and the arguments of the first call; where the model cannot be cut, None, and the batches once more."""
    observing.check(model, variables)
    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    if not first:
        raise ValueError("no calibration batch: the method needs to see activations")
    call = observing.as_call(first[0])
    try:
        return start(model, itertools.chain(first, batches), provider, variables=variables), call, iter(())
    except segments.CannotCut:
        return None, call, itertools.chain(first, batches)


class _Source:
    """A float model as a pure function of its parameters, for NNX and Linen."""

    def __init__(
        self, model: Any, variables: Mapping[str, Any] | None, provider: calibration.CalibrationProvider, method: str
    ):
        self._model, self._variables, self._method = model, variables, method
        marking = segments.marking(provider)
        if isinstance(model, nn.Module):
            if variables is None or "params" not in variables:
                raise ValueError("a Linen module needs its variables: pass variables={'params': ...}")
            self._observed = model_lib.quantize_model(model, marking, methods=(method,))
            self.params = flax_util.unbox(variables["params"])
        else:
            observed = model_lib.quantize_nnx_model(model, marking, call_method=method, skip_nnx_init=True)
            self._split: Any = nnx.split(observed, nnx.Param, ...)
            self.params = nnx.to_pure_dict(self._split[1])

    def call(self, params: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(self._model, nn.Module):
            variables = {**self._variables, "params": params}  # type: ignore[dict-item]
            return self._observed.apply(variables, *args, method=self._method, **kwargs)
        graphdef, state, rest = self._split
        state = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(state, params)
        model = nnx.merge(graphdef, state, rest)
        return getattr(model, self._method)(*args, **kwargs)

    def abstract(self, provider: qconfig.QuantizationProvider, inputs: observing.Call) -> Any:
        """What says how parameters are quantized; it holds no values, which would be in memory with the batches."""
        return observing.abstract_params(self._model, provider, inputs, self._method)

    def quantized(self, provider: qconfig.QuantizationProvider, inputs: observing.Call) -> Any:
        """The quantized model, an NNX one with its weights rounded to nearest."""
        args, kwargs = ((), {}) if isinstance(self._model, nn.Module) else inputs
        return model_lib.quantize_model(self._model, provider, *args, methods=(self._method,), **kwargs)


class Runner:
    """The batches on their way through the segments.

    Attributes:
      source: the model.
      batches: for each the plan, the values of variables of the model so far quantized, and those of the float one.
      first_call: arguments of the first batch.
    """

    def __init__(
        self,
        source: _Source,
        provider: calibration.SinglePassCalibrationProvider,
        pair_stats: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None,
    ):
        self.source, self._provider, self._pair_stats = source, provider, pair_stats
        self._plans: dict[Any, segments.Plan] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._float = dict(segments.leaves(source.params))
        self._current: dict[segments.Path, jax.Array] = {}
        self.batches: list[tuple[segments.Plan, dict[Any, Any], dict[Any, Any] | None]] = []
        self.first_call: tuple[Any, Any] = ((), {})

    @property
    def plan(self) -> segments.Plan:
        return self.batches[0][0]

    @property
    def names(self) -> list[segments.Path]:
        """The weights of all stages."""
        return [name for stage in self.plan.stages for name in stage]

    def start(self, args: Any, kwargs: Any) -> None:
        """Takes a batch in."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_array = [hasattr(x, "shape") for x in leaves]
        static = tuple(x for x, a in zip(leaves, is_array, strict=True) if not a)
        arrays = [jnp.asarray(x) for x, a in zip(leaves, is_array, strict=True) if a]
        key = (structure, static, tuple((x.shape, x.dtype) for x in arrays))
        if key not in self._plans:

            def call(params: Any, arrays: Any) -> Any:
                rest, given = iter(static), iter(arrays)
                merged = [next(given) if a else next(rest) for a in is_array]
                args, kwargs = jax.tree.unflatten(structure, merged)
                return self.source.call(params, args, kwargs)

            plan = segments.trace(call, self.source.params, arrays)
            if self._plans and plan.stages != self.plan.stages:
                raise ValueError("batches of different shapes run different ops: calibrate with batches of one shape")
            self._plans[key] = plan
        if not self.batches:
            self.first_call = (args, kwargs)
        plan = self._plans[key]
        values = {**plan.constants, **dict(zip(plan.inputs, arrays, strict=True))}
        self.batches.append((plan, values, None if self._pair_stats is None else dict(values)))

    def replace(self, path: segments.Path, value: jax.Array) -> None:
        """From now on a weight has this value; of a transformed one, what is inside of it."""
        self._current[segments.array_path(path, self.plan.params)] = value

    def run_stage(self, k: int) -> dict[segments.Path, dict[str, jax.Array]]:
        """Brings every batch to stage k; returns the statistics of its weights."""
        totals: Any = None
        for plan, values, floats in self.batches:
            segment = plan.segments[k]
            step = self._step(segment)
            if totals is None:
                totals = step(None, *self._inputs(plan, segment, values, floats), init=True)
            outputs, float_outputs, totals = step(totals, *self._inputs(plan, segment, values, floats))
            self._put(plan, segment, k, values, outputs)
            if floats is not None:
                self._put(plan, segment, k, floats, float_outputs)
        segment = self.plan.segments[k]
        stats: dict[segments.Path, dict[str, jax.Array]] = {}
        for mark in segment.marks:
            total = totals[segment.features().index((mark.variables, mark.groups))]
            segments.check_finite(total, mark)
            previous = stats.get(mark.path)
            stats[mark.path] = total if previous is None else jax.tree.map(jnp.add, previous, total)
        still_read = {p for p, v in self.plan.params.items() if self.plan.last_use.get(v, 0) > k}
        self._current = {p: v for p, v in self._current.items() if p in still_read}
        return stats

    def _inputs(self, plan: segments.Plan, segment: segments.Segment, values: Any, floats: Any) -> tuple[Any, Any]:
        names = {v: path for path, v in plan.params.items()}

        def take(values: Any, params: Mapping[segments.Path, Any]) -> list[Any]:
            return [self._param(names[v], params) if v in names else values[v] for v in segment.inputs]

        return take(values, self._current), None if floats is None else take(floats, {})

    def _param(self, path: segments.Path, replaced: Mapping[segments.Path, Any]) -> jax.Array:
        name = segments.stem(path)
        value, layer = self._float[name], path[len(name) :]
        return replaced[path] if path in replaced else value[layer] if layer else value

    @staticmethod
    def _put(plan: segments.Plan, segment: segments.Segment, k: int, values: dict[Any, Any], outputs: Any) -> None:
        values.update(zip(segment.outputs, outputs, strict=True))
        for v in [v for v in values if plan.last_use.get(v, -1) <= k]:
            del values[v]

    def _step(self, segment: segments.Segment) -> Callable[..., Any]:
        """(totals, inputs, inputs of the float model) -> (outputs, those of the float model, new totals), jitted."""
        shardings = tuple(map(self._sharding, segment.features(), itertools.repeat(segment)))
        key = (segment.key, shardings)
        if key in self._compiled:
            return self._compiled[key]

        def stats_of(inputs: Any, float_inputs: Any) -> tuple[Any, Any, list[Any]]:
            outputs, found = segment.run(inputs)
            if float_inputs is None or self._pair_stats is None:
                return outputs, None, [f.map_groups(self._provider.compute_stats) for f in found]
            float_outputs, references = segment.run(float_inputs)
            pairs = zip(found, references, strict=True)
            return outputs, float_outputs, [_map_pairs(f, r, self._pair_stats) for f, r in pairs]

        @functools.partial(jax.jit, donate_argnums=0)
        def update(totals: Any, inputs: Any, float_inputs: Any) -> Any:
            outputs, float_outputs, stats = stats_of(inputs, float_inputs)
            totals = [_average.update(total, new) for total, new in zip(totals, stats, strict=True)]
            return outputs, float_outputs, list(map(input_features.sharded, totals, shardings))

        def step(totals: Any, inputs: Any, float_inputs: Any, *, init: bool = False) -> Any:
            if init:
                shapes = jax.eval_shape(stats_of, inputs, float_inputs)[2]
                groups = [groups for _, groups in segment.features()]
                return list(map(input_features.sharded, map(calibration.init_stats, shapes, groups), shardings))
            return update(totals, inputs, float_inputs)

        self._compiled[key] = step
        return step

    def _sharding(self, feature: Any, segment: segments.Segment) -> jax.sharding.NamedSharding | None:
        """That of the statistics of a feature: as the first weight that they are for."""
        mark = next(mark for mark in segment.marks if (mark.variables, mark.groups) == feature)
        return input_features.sharding_of(
            self._float[segments.stem(segments.array_path(mark.path, self.plan.params))], mark.axes, mark.groups
        )


def _map_pairs(
    features: input_features.Features,
    reference: input_features.Features,
    pair_stats: Callable[[jax.Array, jax.Array], dict[str, jax.Array]],
) -> dict[str, jax.Array]:
    """pair_stats of a model's features and the float model's, group by group."""
    both = dataclasses.replace(features, x=jnp.stack([features.x, reference.x], axis=-1))
    return both.map_groups(lambda x: pair_stats(x[..., 0], x[..., 1]))
