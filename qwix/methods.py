"""The methods that recipes name, and what a new one has to be.

A method is a function of a `Job`, registered by name. Its keyword-only parameters are its settings: their
annotations and defaults are what a recipe's stage is checked against. This is a whole one::

    @method("round-up")
    def round_up(job, *, bits: int = 8):
        \"\"\"Quantizes to `bits`, whatever the rules say.\"\"\"
        rules = [dataclasses.replace(rule, weight_qtype=f"int{bits}") for rule in job.rules()]
        return job.quantize(ptq.PtqProvider(rules))

A method that prepares the float model for the one after it says so, ``@method("rotate", quantizes=False)``, and
returns a float model with the same outputs. One that looks at inputs says ``needs_data=True``, and finds
them in `Job.batches`.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import msgspec
from flax import linen as nn
from flax import nnx

from qwix._src import model as model_lib
from qwix._src import qconfig
from qwix._src.providers import ptq

__all__ = [
    "Job",
    "LinenModel",
    "RecipeError",
    "check_settings",
    "may_end",
    "method",
    "names",
    "needs_data",
    "quantizes",
    "run",
]


class RecipeError(ValueError):
    """A recipe that is unknown, wrong in itself or no match for the model; the message says how."""


class LinenModel(NamedTuple):
    """A Linen module with its variables: what `apply_recipe` makes of a Linen model.

    Calling it is ``module.apply(variables, ...)``.
    """

    module: nn.Module
    variables: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.apply(self.variables, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Method:
    run: Callable[..., Any]
    quantizes: bool
    may_end: bool
    needs_data: bool
    structure: str | None
    settings: type[msgspec.Struct]


_METHODS: dict[str, _Method] = {}


def method(
    name: str,
    *,
    quantizes: bool = True,
    may_end: bool = False,
    needs_data: bool = False,
    structure: str | None = None,
) -> Callable[..., Any]:
    """Registers a function of a `Job` as a method for recipes; see the module's docstring.

    Args:
      name: what recipes call it.
      quantizes: whether it is a recipe's last stage; otherwise it prepares a float model.
      may_end: whether it may be the last one though it quantizes nothing, as pruning may.
      needs_data: whether it reads `Job.batches`.
      structure: a method whose result has the same arrays, but for their values, and which can be traced by
        `nnx.eval_shape`; "" if the result has those of the model that it is given. None: the method itself.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        fields = [
            (p.name, p.annotation, p.default)
            for p in signature.parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        settings = msgspec.defstruct(f"{name} settings", fields, forbid_unknown_fields=True)
        _METHODS[name] = _Method(function, quantizes, may_end, needs_data, structure, settings)
        return function

    return register


def names() -> list[str]:
    """The methods that there are."""
    return list(_METHODS)


def _get(name: str) -> _Method:
    if name not in _METHODS:
        raise RecipeError(f"method {name!r} is none of {', '.join(_METHODS)}")
    return _METHODS[name]


def quantizes(name: str) -> bool:
    """Whether a method quantizes, and so comes last; otherwise it prepares."""
    return _get(name).quantizes


def may_end(name: str) -> bool:
    """Whether a method may come last."""
    return _get(name).quantizes or _get(name).may_end


def needs_data(name: str) -> bool:
    """Whether a method looks at calibration inputs."""
    return _get(name).needs_data


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raises `RecipeError` if there is no such method, or a setting is unknown or of the wrong type."""
    try:
        msgspec.convert(dict(settings), _get(name).settings)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{name}: {error}") from error


def structural(stages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Stages that give the same arrays but for their values, without looking at any value."""
    found: list[Mapping[str, Any]] = []
    for stage in stages:
        structure = _get(stage["method"]).structure
        if structure != "":
            found.append(stage if structure is None else {"method": structure})
    return found


def run(stage: Mapping[str, Any], job: "Job") -> Any:
    """Carries out one stage of a recipe; returns the model after it."""
    settings = msgspec.convert({k: v for k, v in stage.items() if k != "method"}, _get(stage["method"]).settings)
    return _get(stage["method"]).run(job, **msgspec.structs.asdict(settings))


class Job:
    """What a method works on.

    Attributes:
      model: the float NNX module, or a `LinenModel`; not to be changed.
      inputs: arguments of a call, whose values do not matter.
      batches: calibration inputs as (args, kwargs), to iterate over once; empty without calibration data.
      progress: progress(iterable, description) yields from an iterable, and shows how far it is.
      reference: the float model whose weights the result has quantized: `model`, unless a method changes them itself
        before it quantizes, and says so here for the report.
    """

    def __init__(
        self,
        model: Any,
        rules: Sequence[Any],
        inputs: tuple[Any, ...],
        batches: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
        progress: Callable[[Iterable[Any], str], Iterator[Any]],
    ):
        self.model = model
        self._rules = rules
        self.inputs = inputs
        self.batches = batches
        self.progress = progress
        self.reference = model

    def rules(self, rule_type: type = qconfig.QuantizationRule) -> list[Any]:
        """The recipe's rules for ops that multiply, as rules of a provider."""
        return [rule.as_rule(rule_type) for rule in self._rules if not rule.is_for_tables]

    @property
    def float_module(self) -> Any:
        """The model without a Linen model's variables."""
        return self.model.module if isinstance(self.model, LinenModel) else self.model

    @property
    def variables(self) -> Any:
        """A Linen model's; None in NNX."""
        return self.model.variables if isinstance(self.model, LinenModel) else None

    def raw_batches(self) -> Iterator[Any]:
        """The batches as tuples of positional or dictionaries of keyword arguments."""
        return (kwargs or args for args, kwargs in self.progress(self.batches, "calibration"))

    def finished(self, module: Any, params: Any) -> Any:
        """What a method returns that has the quantized module and, for Linen, its parameters."""
        if isinstance(self.model, LinenModel):
            return LinenModel(module, {**self.model.variables, "params": params})
        return module

    def scaled(self, result: Any) -> Any:
        """What a method returns that scales the model before it quantizes it (`contrib.scaling.Quantized`)."""
        check_used(result.provider)
        if isinstance(self.model, LinenModel):
            self.reference = LinenModel(self.model.module, result.smoothed)
            return LinenModel(*result.model)
        self.reference = result.smoothed
        return result.model

    def prepared(self, model: Any, left: Mapping[str, str]) -> Any:
        """What a method returns that has a float model (in Linen its variables), and why weights were left alone."""
        if left:
            warnings.warn(
                "left as they were: " + "; ".join(f"{path}: {why}" for path, why in left.items()),
                qconfig.QuantizationWarning,
                stacklevel=2,
            )
        return LinenModel(self.model.module, model) if isinstance(self.model, LinenModel) else model

    def quantize(
        self, provider: qconfig.QuantizationProvider, quantize_params: Callable[..., Any] | None = None
    ) -> Any:
        """The model under a provider.

        Args:
          provider: has the weights in the model that it makes, as `PtqProvider` does.
          quantize_params: (params, abstract quantized params) -> quantized params, as pure dictionaries; None: round to
            nearest.
        """
        if isinstance(self.model, LinenModel):
            module, variables = self.model
            quantized = model_lib.quantize_model(module, provider)
            abstract = jax.eval_shape(quantized.init, jax.random.key(0), *self.inputs)
            params = (quantize_params or ptq.quantize_params)(variables["params"], abstract["params"])
            return LinenModel(quantized, {**variables, "params": params})
        quantized = model_lib.quantize_model(self.model, provider, *self.inputs)
        if quantize_params is not None:
            nnx.update(quantized, quantize_params(self.params(), quantized))
        return quantized

    def params(self) -> Any:
        """The float parameters as a pure dictionary."""
        if isinstance(self.model, LinenModel):
            return self.model.variables["params"]
        return nnx.to_pure_dict(nnx.state(self.model, nnx.Param))


def check_used(provider: qconfig.QuantizationProvider) -> None:
    """Raises `RecipeError` if a rule matched nothing."""
    if unused := provider.get_unused_rules():
        raise RecipeError(f"matched nothing in this model: {unused[0]}")


# --- the methods of this package -------------------------------------------------------------------


@method("round-to-nearest")
def _round_to_nearest(job: Job) -> Any:
    provider = ptq.PtqProvider(job.rules())
    quantized = job.quantize(provider)
    check_used(provider)
    return quantized


@method("awq", needs_data=True)
def _awq(job: Job, *, n_grid: int = 20, n_clip: int = 10) -> Any:
    from qwix.contrib import awq

    rules = [dataclasses.replace(rule, n_grid=n_grid) for rule in job.rules(awq.AwqRule)]
    result = awq.scale_and_quantize(job.float_module, job.raw_batches(), rules, variables=job.variables, n_clip=n_clip)
    return job.scaled(result)


@method("smooth-quant", needs_data=True)
def _smooth_quant(job: Job, *, alpha: float = 0.5, n_grid: int = 0) -> Any:
    from qwix.contrib import smooth_quant

    rules = [dataclasses.replace(rule, alpha=alpha) for rule in job.rules(smooth_quant.SqRule)]
    result = smooth_quant.scale_and_quantize(
        job.float_module, job.raw_batches(), rules, variables=job.variables, n_grid=n_grid
    )
    return job.scaled(result)


@method("gptq", needs_data=True, structure="round-to-nearest")
def _gptq(
    job: Job,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
    scale_search: int = 20,
    sequential: bool = True,
    keep_zeros: bool = True,
) -> Any:
    from qwix.contrib import gptq

    result = gptq.quantize(
        job.float_module,
        job.raw_batches(),
        job.rules(gptq.GptqRule),
        variables=job.variables,
        sequential=sequential,
        blocksize=block_size,
        percdamp=damping,
        act_order=act_order,
        scale_search=scale_search,
        keep_zeros=keep_zeros,
    )
    return job.finished(result.model, result.params)


@method("qep", needs_data=True, structure="round-to-nearest")
def _qep(
    job: Job,
    *,
    correction: float = 0.5,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
    scale_search: int = 20,
    keep_zeros: bool = True,
) -> Any:
    from qwix.contrib import qep

    result = qep.quantize(
        job.float_module,
        job.raw_batches(),
        [dataclasses.replace(rule, correction_factor=correction) for rule in job.rules(qep.QepRule)],
        variables=job.variables,
        gptq_block_size=block_size,
        gptq_damping_factor=damping,
        act_order=act_order,
        scale_search=scale_search,
        keep_zeros=keep_zeros,
    )
    return job.finished(result.model, result.params)


@method("hqq", structure="round-to-nearest")
def _hqq(job: Job, *, p: float = 2.0, beta: float = 10.0, kappa: float = 1.01) -> Any:
    from qwix.contrib import hqq

    def quantize_params(params: Any, abstract: Any) -> Any:
        return hqq.quantize_params(params, abstract, p=p, beta=beta, kappa=kappa)

    provider = ptq.PtqProvider(job.rules())
    quantized = job.quantize(provider, quantize_params)
    check_used(provider)
    return quantized


@method("smooth", quantizes=False, needs_data=True, structure="")
def _smooth(job: Job, *, alpha: float = 0.5, n_grid: int = 0) -> Any:
    from qwix.contrib import smooth_quant

    rules = [dataclasses.replace(rule, alpha=alpha) for rule in job.rules(smooth_quant.SqRule)]
    smoothed = smooth_quant.smooth(job.float_module, job.raw_batches(), rules, variables=job.variables, n_grid=n_grid)
    return job.prepared(*smoothed)


@method("awq-scale", quantizes=False, needs_data=True, structure="")
def _awq_scale(job: Job, *, n_grid: int = 20) -> Any:
    from qwix.contrib import awq

    rules = [dataclasses.replace(rule, n_grid=n_grid) for rule in job.rules(awq.AwqRule)]
    return job.prepared(*awq.smooth(job.float_module, job.raw_batches(), rules, variables=job.variables))


def _prune(job: Job, prune: Callable[..., Any], n: int, m: int, prune_rate: float) -> Any:
    from qwix.contrib import pruning

    rules = [dataclasses.replace(r, n=n, m=m, prune_rate=prune_rate) for r in job.rules(pruning.PruningRule)]
    return job.prepared(prune(job.float_module, rules, job.raw_batches(), variables=job.variables), {})


@method("wanda", quantizes=False, may_end=True, needs_data=True, structure="")
def _wanda(job: Job, *, n: int = 2, m: int = 4, prune_rate: float = 0.5) -> Any:
    from qwix.contrib import wanda

    return _prune(job, wanda.prune, n, m, prune_rate)


@method("sparsegpt", quantizes=False, may_end=True, needs_data=True, structure="")
def _sparsegpt(job: Job, *, n: int = 2, m: int = 4, prune_rate: float = 0.5) -> Any:
    from qwix.contrib import sparsegpt

    return _prune(job, sparsegpt.prune, n, m, prune_rate)


@method("rotate", quantizes=False)
def _rotate(job: Job, *, seed: int = 0, block_size: int | None = None) -> Any:
    from qwix.contrib import rotation

    rules = job.rules(rotation.RotationRule)
    rules = [dataclasses.replace(r, seed=seed, block_size=block_size) for r in rules if r.weight_qtype is not None]
    if isinstance(job.model, LinenModel):
        module, variables = job.model
        return LinenModel(*rotation.rotate(module, *job.inputs, variables=variables, rules=rules))
    return rotation.rotate(job.model, *job.inputs, rules=rules)
