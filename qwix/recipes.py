"""Recipes: quantization as data, and one call that applies one to a model.

A recipe names a method and lists the rules for it, each rule a dictionary of `QuantizationRule`
settings with number formats by name, so that a recipe is plain JSON. The first rule that matches
an op wins. A rule with `op_names=["take"]` is for embedding tables (`nnx.Embed`), whose rows are
looked up and not multiplied; without such a rule they stay in float.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
>>> quantized, report = apply_recipe(model, "int4-g32", jnp.ones((1, 64)))
>>> [(w.path, w.format, w.bytes_before, w.bytes_after) for w in report.weights]
[('kernel', 'int4', 8192, 1280)]
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwix import checkpoint
from qwix._src import model as model_lib
from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers import ptq, quantized_param
from qwix._src.providers.boxed_param import WithAux
from qwix._src.utils import flax_util


class RecipeError(ValueError):
    """A recipe that is unknown, wrong in itself or no match for the model; the message says how."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
      name: what it is called in tables and checkpoints.
      rules: settings of `QuantizationRule` (or of the method's own rule), first match first.
      method: a key of `METHODS`.
      description: one line for people.
    """

    name: str
    rules: tuple[Mapping[str, Any], ...]
    method: str = "round-to-nearest"
    description: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"recipe {self.name!r}: method {self.method!r} is none of {', '.join(METHODS)}")
        if not self.rules:
            raise RecipeError(f"recipe {self.name!r}: has no rules, so nothing would be quantized")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`.

        Raises:
          RecipeError: a field is missing, unknown or of the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(settings, Mapping) or not {"name", "rules"} <= settings.keys() <= known:
            raise RecipeError(f"a recipe has the fields {', '.join(sorted(known))}: {settings!r}")
        rules = settings["rules"]
        if not isinstance(rules, list | tuple) or not all(isinstance(r, Mapping) for r in rules):
            raise RecipeError(f"recipe {settings['name']!r}: rules has to be a list of settings")
        return cls(**{**settings, "rules": tuple(dict(rule) for rule in rules)})


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """What became of one parameter.

    Attributes:
      path: '/'-joined path in the model.
      shape: of the float parameter.
      format: its number format now.
      bytes_before: of the float parameter.
      bytes_after: as a checkpoint holds it, scales included.
      relative_error: ||W - dequantize(Q)|| / ||W|| in the Frobenius norm; 0 if left in float.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a recipe did to a model: the weights that were quantized, and those left in float."""

    recipe: Recipe
    weights: tuple[WeightReport, ...]
    in_float: tuple[WeightReport, ...]


def apply_recipe(
    model: Any,
    recipe: str | Recipe,
    *model_inputs: Any,
    calibration: Iterable[Any] | None = None,
) -> tuple[Any, Report]:
    """Quantizes an NNX model.

    Args:
      model: a float model; it is not changed.
      recipe: a `Recipe`, or the name of one in `RECIPES`.
      *model_inputs: what the model is called with; values do not matter, shapes and dtypes do.
      calibration: an iterable of inputs (arrays, tuples of arguments, dictionaries of keyword
        arguments) for methods that need data; it is consumed once.

    Returns:
      The quantized model, and what was done to it.

    Raises:
      RecipeError: the recipe is unknown, does not fit the model, or lacks its calibration data.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    try:
        quantized = _apply(model, recipe, model_inputs, calibration)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"recipe {recipe.name!r} does not fit this model: {error}") from error
    return quantized, _report(model, quantized, recipe)


def _apply(model: Any, recipe: Recipe, inputs: tuple[Any, ...], calibration: Any) -> Any:
    quantized = METHODS[recipe.method](model, recipe, inputs, calibration)
    _quantize_tables(quantized, recipe)
    return quantized


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
      RecipeError: there is none.
    """
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}: use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _rules(recipe: Recipe, rule_type: type) -> list[Any]:
    """The rules for ops that multiply."""
    return [_rule(recipe, r, rule_type) for r in recipe.rules if not _is_for_tables(r)]


def _is_for_tables(settings: Mapping[str, Any]) -> bool:
    return "take" in settings.get("op_names", ())


def _rule(recipe: Recipe, settings: Mapping[str, Any], rule_type: type) -> Any:
    fields = {field.name for field in dataclasses.fields(rule_type)}
    if unknown := settings.keys() - fields:
        raise RecipeError(f"recipe {recipe.name!r}: a rule has no field {min(unknown)!r}")
    values = dict(settings)
    for key in ("weight_qtype", "act_qtype"):
        if isinstance(values.get(key), str):
            values[key] = _qtype(values[key])
    return rule_type(**values)


def _quantize_tables(model: Any, recipe: Recipe) -> None:
    """Quantizes, in place, the embedding tables that a rule for `take` matches.

    A row has a scale of its own, or one a tile. A table that an op multiplies with as well (a tied
    output layer) is quantized already, by that op's rule.
    """
    rules = [_rule(recipe, r, qconfig.QuantizationRule) for r in recipe.rules if _is_for_tables(r)]
    for path, module in nnx.iter_graph(model):
        if not isinstance(module, nnx.Embed) or isinstance(module.embedding, WithAux):
            continue
        name = "/".join(map(str, path))
        rule = next((r for r in rules if re.fullmatch(r.module_path, name)), None)
        if rule is None or rule.weight_qtype is None:
            continue
        how = qarray.HowToQuantize(
            qtype=rule.weight_qtype,
            channelwise_axes=(0,),
            tiled_axes={1: rule.tile_size} if rule.tile_size else {},
            calibration_method=rule.weight_calibration_method,
        )
        shape = tuple(module.embedding.shape)
        module.embedding = quantized_param.Replacement(how, shape, shape)(module.embedding)  # type: ignore[assignment]


def _qtype(name: str) -> Any:
    """A dtype where JAX has one of this name, else the name itself ('nf4', 'int3', 'mxfp4')."""
    try:
        return jnp.dtype(name)
    except TypeError:
        return name


def _check_used(recipe: Recipe, provider: Any) -> None:
    if unused := provider.get_unused_rules():
        raise RecipeError(f"recipe {recipe.name!r}: matched nothing in this model: {unused[0]}")


def _round_to_nearest(model: Any, recipe: Recipe, inputs: tuple[Any, ...], calibration: Any) -> Any:
    del calibration  # The weights are all it looks at.
    provider = ptq.PtqProvider(_rules(recipe, qconfig.QuantizationRule))
    quantized = model_lib.quantize_model(model, provider, *inputs)
    _check_used(recipe, provider)
    return quantized


def _awq(model: Any, recipe: Recipe, inputs: tuple[Any, ...], calibration: Any) -> Any:
    from qwix.contrib import awq

    if calibration is None:
        raise RecipeError(f"recipe {recipe.name!r}: {recipe.method} needs calibration data")
    rules = _rules(recipe, awq.AwqRule)
    provider = awq.AwqCalibrationProvider(rules)
    observed = model_lib.quantize_model(model, provider, *inputs, skip_nnx_init=True)
    if not _run(observed, calibration):
        raise RecipeError(f"recipe {recipe.name!r}: the calibration data is empty")
    _check_used(recipe, provider)
    stats = nnx.to_pure_dict(nnx.state(observed, flax_util.QuantStat))
    quantized = model_lib.quantize_model(model, awq.AwqInferenceProvider(rules), *inputs)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, awq.quantize_params(params, quantized, stats))
    return quantized


METHODS: dict[str, Callable[[Any, Recipe, tuple[Any, ...], Any], Any]] = {
    "round-to-nearest": _round_to_nearest,
    "awq": _awq,
}


def _run(model: Any, calibration: Iterable[Any]) -> int:
    """Calls a model that collects statistics on every batch; returns how many there were."""
    count = 0
    call = nnx.jit(lambda model, args, kwargs: model(*args, **kwargs))
    for batch in calibration:
        if isinstance(batch, Mapping):
            call(model, (), dict(batch))
        else:
            call(model, batch if isinstance(batch, tuple) else (batch,), {})
        count += 1
    return count


def template(model: Any, recipe: Recipe, *model_inputs: Any) -> Any:
    """An abstract model (`nnx.eval_shape`) of the structure that `apply_recipe` gives.

    Args:
      model: the float model, which may be abstract.
      recipe: the recipe.
      *model_inputs: what the model is called with.
    """
    graphdef, state = nnx.split(model)

    def build(state: Any) -> Any:
        # The inputs do for calibration: its values have no influence on the structure.
        return _apply(nnx.merge(graphdef, state), recipe, model_inputs, [model_inputs])

    return nnx.eval_shape(build, state)


def _report(model: Any, quantized: Any, recipe: Recipe) -> Report:
    sizes = checkpoint.stored_bytes(quantized)
    weights, in_float = [], []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        value = variable.get_value()
        keys: Any = path
        now = flax_util.unbox(flax_util.get_value_from_path(quantized, keys))
        entry = WeightReport(
            path=name,
            shape=tuple(value.shape),
            format=str(value.dtype),
            bytes_before=value.nbytes,
            bytes_after=sum(n for key, n in sizes.items() if f"{key}/".startswith(f"{name}/")),
            relative_error=0.0,
        )
        if isinstance(now, WithAux) and isinstance(now.array, qarray.QArray):
            error = _relative_error(jnp.asarray(now).reshape(value.shape), value)
            qtype = now.how.qtype
            qtype_name = qtype if isinstance(qtype, str) else jnp.dtype(qtype).name
            weights.append(dataclasses.replace(entry, format=qtype_name, relative_error=error))
        else:
            in_float.append(entry)
    if not weights:
        raise RecipeError(f"recipe {recipe.name!r}: quantized no weight of this model")
    return Report(recipe, tuple(weights), tuple(in_float))


def _relative_error(value: jax.Array, reference: jax.Array) -> float:
    norm = jnp.linalg.norm(reference.ravel())
    return float(jnp.linalg.norm((value - reference).ravel()) / jnp.where(norm == 0, 1, norm))


def _preset(name: str, description: str, method: str = "round-to-nearest", **rule: Any) -> Recipe:
    tables = {"op_names": ("take",), "weight_qtype": "int8"}
    return Recipe(name=name, rules=(tables, rule), method=method, description=description)


# Embedding tables are int8 in all of them, a scale a row: on MiniLM that moves the embeddings by
# less than a third of what int8 weights do, and the table is half of the model.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _preset(
            "int8",
            "int8 weights per channel; int8 activations, ranges found in each call",
            weight_qtype="int8",
            act_qtype="int8",
        ),
        _preset("int8-weight-only", "int8 weights per channel", weight_qtype="int8"),
        _preset(
            "fp8",
            "float8 e4m3 weights per channel; float8 activations, ranges found in each call",
            weight_qtype="float8_e4m3fn",
            act_qtype="float8_e4m3fn",
        ),
        _preset("fp8-weight-only", "float8 e4m3 weights per channel", weight_qtype="float8_e4m3fn"),
        _preset("mxfp8", "MXFP8 weights, groups of 32", weight_qtype="mxfp8", tile_size=32),
        _preset("int4-g32", "int4 weights, groups of 32", weight_qtype="int4", tile_size=32),
        _preset("int4-g128", "int4 weights, groups of 128", weight_qtype="int4", tile_size=128),
        _preset("nf4", "4-bit NormalFloat weights, groups of 64", weight_qtype="nf4", tile_size=64),
        _preset("mxfp4", "MXFP4 weights, groups of 32", weight_qtype="mxfp4", tile_size=32),
        _preset("nvfp4", "NVFP4 weights, groups of 16", weight_qtype="nvfp4", tile_size=16),
        _preset(
            "awq-int4-g128",
            "int4 weights, groups of 128, scaled by their activations (AWQ)",
            method="awq",
            weight_qtype="int4",
            tile_size=128,
        ),
    )
}
