"""`apply_recipe`: one call from a float model to a quantized one, whatever the method.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
>>> quantized, report = apply_recipe(model, "int4-g32", jnp.ones((1, 64)))
>>> [(w.path, w.format, w.bytes_before, w.bytes_after) for w in report.weights]
[('kernel', 'int4', 8192, 1280)]
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
from flax import linen as nn
from flax import nnx, traverse_util

from qwix import checkpoint, methods
from qwix._src.core import qarray
from qwix._src.providers import quantized_param
from qwix._src.providers.boxed_param import WithAux
from qwix._src.utils import flax_util
from qwix.methods import LinenModel, RecipeError
from qwix.recipes import Recipe, get_recipe

__all__ = ["Report", "WeightReport", "apply_recipe", "template"]


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """What became of one parameter.

    Attributes:
      path: '/'-joined path in the model.
      shape: of the float parameter.
      format: its number format now.
      bytes_before: of the float parameter.
      bytes_after: as a checkpoint holds it, scales included.
      relative_error: ||W - dequantize(Q)|| / ||W|| in the Frobenius norm, where W is the float weight that the last
        stage was given and Q what it made of it; 0 if left as it was.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a recipe did to a model: the weights that were quantized or pruned, and those left as they were."""

    recipe: Recipe
    weights: tuple[WeightReport, ...]
    in_float: tuple[WeightReport, ...]


def apply_recipe(
    model: Any,
    recipe: str | Recipe,
    *model_inputs: Any,
    calibration: Iterable[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> tuple[Any, Report]:
    """Quantizes a model by a recipe.

    Args:
      model: a float NNX or Linen module; it is not changed, whatever happens.
      recipe: a `Recipe`, the name of one, or the path of a file with one; see `recipes.get_recipe`.
      *model_inputs: what the model is called with; values do not matter, shapes and dtypes do.
      calibration: for methods that need data, an iterable of inputs: arrays, tuples of arguments, or dictionaries of
        keyword arguments. It is consumed once, in a stream.
      variables: of a Linen model, with the collection "params".
      progress: whether to show a progress bar while calibrating; None: if standard error is a terminal.

    Returns:
      The quantized model, ready to be called, and what was done to it. For Linen the model is a `LinenModel`, a pair
      of the module and its variables.

    Raises:
      RecipeError: the recipe is unknown, does not fit the model, or lacks its calibration data.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    float_model = _float_model(model, variables)
    if recipe.needs_data and calibration is None:
        raise RecipeError(f"recipe {recipe.name!r}: it needs data, as in apply_recipe(..., calibration=batches)")
    with _progress_bar(progress if recipe.needs_data else False, recipe.name) as track:
        prepared, quantized = _apply(float_model, recipe, recipe.stages, model_inputs, calibration or (), track)
    return quantized, _report(float_model, prepared, quantized, recipe)


def template(model: Any, recipe: Recipe, *model_inputs: Any) -> Any:
    """An abstract model (`nnx.eval_shape`) of the structure that `apply_recipe` gives.

    Args:
      model: the float NNX model, which may be abstract.
      recipe: the recipe.
      *model_inputs: what the model is called with.
    """
    graphdef, state = nnx.split(model)

    def build(state: Any) -> Any:
        # The inputs do for calibration: its values have no influence on the structure.
        stages = methods.structural(recipe.stages)
        return _apply(nnx.merge(graphdef, state), recipe, stages, model_inputs, [model_inputs], _silent)[1]

    return nnx.eval_shape(build, state)


def _float_model(model: Any, variables: Mapping[str, Any] | None) -> Any:
    if isinstance(model, nn.Module):
        if variables is None or "params" not in variables:
            raise RecipeError("a Linen model is quantized with its variables: apply_recipe(..., variables=variables)")
        return LinenModel(model, variables)
    if variables is not None:
        raise RecipeError(f"variables are for Linen models; {type(model).__name__} is none")
    return model


def _apply(
    model: Any,
    recipe: Recipe,
    stages: Iterable[Mapping[str, Any]],
    inputs: tuple[Any, ...],
    calibration: Iterable[Any],
    track: Any,
) -> tuple[Any, Any]:
    """The float model whose weights the last stage quantizes, and what it makes of that."""
    stages = tuple(stages)
    batches = _Batches(calibration, keep=sum(methods.needs_data(stage["method"]) for stage in stages) > 1)
    reference = model
    for stage in stages:
        job = methods.Job(model, recipe.rules, inputs, batches, track)
        try:
            model = methods.run(stage, job)
        except RecipeError as error:
            raise RecipeError(f"recipe {recipe.name!r}: {stage['method']}: {error}") from error
        except (ValueError, TypeError) as error:
            raise RecipeError(f"recipe {recipe.name!r}: {stage['method']} does not fit this model: {error}") from error
        reference = job.reference
    return reference, _quantize_tables(model, recipe, inputs)


class _Batches:
    """Calibration inputs as (args, kwargs). The source is consumed once; they are kept if more than one stage reads."""

    def __init__(self, source: Iterable[Any], keep: bool):
        self._source: Any = source
        self._kept: list[Any] | None = [] if keep else None

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        count = 0
        for batch in self._source:
            if self._kept is not None and self._source is not self._kept:
                self._kept.append(batch)
            count += 1
            if isinstance(batch, Mapping):
                yield (), dict(batch)
            else:
                yield (batch if isinstance(batch, tuple) else (batch,)), {}
        if not count:
            raise RecipeError("the calibration data is empty")
        if self._kept is not None:
            self._source = self._kept


# --- progress -------------------------------------------------------------------------------------


def _silent(items: Iterable[Any], description: str) -> Iterator[Any]:
    del description
    return iter(items)


class _progress_bar:
    """A context manager that gives `Job.progress`; on the terminal's stderr, and gone at the end."""

    def __init__(self, shown: bool | None, title: str):
        console = rich.console.Console(stderr=True)
        self._title = title
        self._bar = rich.progress.Progress(
            console=console, transient=True, disable=not (console.is_terminal if shown is None else shown)
        )

    def __enter__(self) -> Callable[[Iterable[Any], str], Iterator[Any]]:
        self._bar.start()
        return lambda items, description: iter(self._bar.track(items, description=f"{self._title}: {description}"))

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()


# --- embedding tables -----------------------------------------------------------------------------


def _quantize_tables(model: Any, recipe: Recipe, inputs: tuple[Any, ...]) -> Any:
    """Quantizes the embedding tables that a rule for `take` matches.

    A row has a scale of its own, or one a tile. A table that an op multiplies with as well (a tied output layer) is
    quantized already, by that op's rule.
    """
    rules = [rule for rule in recipe.rules if rule.is_for_tables and rule.weight_qtype is not None]

    def replacement(path: str, shape: tuple[int, ...]) -> Any:
        rule = next((rule for rule in rules if re.fullmatch(rule.module_path, path)), None)
        if rule is None:
            return None
        how = qarray.HowToQuantize(
            qtype=rule.as_rule().weight_qtype,
            channelwise_axes=(0,),
            tiled_axes={1: rule.tile_size} if rule.tile_size else {},
            calibration_method=rule.weight_calibration_method,
        )
        return quantized_param.Replacement(how, shape, shape)

    if not rules:
        return model
    if isinstance(model, LinenModel):
        return _quantize_linen_tables(model, replacement, inputs)
    for path, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Embed) and not isinstance(module.embedding, WithAux):
            replace = replacement("/".join(map(str, path)), tuple(module.embedding.shape))
            if replace is not None:
                module.embedding = replace(module.embedding)
    return model


def _quantize_linen_tables(model: LinenModel, replacement: Callable[..., Any], inputs: tuple[Any, ...]) -> LinenModel:
    tables = set()

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Embed):
            tables.add(context.module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(model.module.apply, model.variables, *inputs)
    params = traverse_util.flatten_dict(model.variables["params"], is_leaf=lambda _, x: not isinstance(x, Mapping))
    for path in tables:
        table = params[(*path, "embedding")]
        if not isinstance(table, WithAux):
            replace = replacement("/".join(path), tuple(flax_util.unbox(table).shape))
            if replace is not None:
                params[(*path, "embedding")] = replace(table)
    return LinenModel(model.module, {**model.variables, "params": traverse_util.unflatten_dict(params)})


# --- what was done --------------------------------------------------------------------------------


def _report(model: Any, prepared: Any, quantized: Any, recipe: Recipe) -> Report:
    sizes = checkpoint.stored_bytes(quantized.variables["params"] if isinstance(quantized, LinenModel) else quantized)
    prunes = not methods.quantizes(recipe.stages[-1]["method"])
    weights, in_float = [], []
    for name, value, before, now in _parameters(model, prepared, quantized):
        entry = WeightReport(
            path=name,
            shape=tuple(value.shape),
            format=str(value.dtype),
            bytes_before=value.nbytes,
            bytes_after=sum(n for key, n in sizes.items() if f"{key}/".startswith(f"{name}/")),
            relative_error=0.0,
        )
        innermost = now
        while isinstance(innermost, WithAux):  # a rotated and scaled weight is one in the other
            innermost, qtype = innermost.array, innermost.how.qtype
        if isinstance(innermost, qarray.QArray):
            error = _relative_error(*(jnp.asarray(x).reshape(value.shape) for x in (now, before)))
            qtype_name = qtype if isinstance(qtype, str) else jnp.dtype(qtype).name
            weights.append(dataclasses.replace(entry, format=qtype_name, relative_error=error))
        elif prunes and (error := _relative_error(now, before)):
            weights.append(dataclasses.replace(entry, relative_error=error))
        else:
            in_float.append(entry)
    if not weights:
        raise RecipeError(f"recipe {recipe.name!r}: quantized no weight of this model")
    return Report(recipe, tuple(weights), tuple(in_float))


def _parameters(model: Any, *later: Any) -> Iterator[tuple[Any, ...]]:
    """(path, the float array, what stands in its place in each of the later models) of each parameter."""
    if isinstance(model, LinenModel):
        old, *new = (
            traverse_util.flatten_dict(m.variables["params"], is_leaf=lambda _, x: not isinstance(x, Mapping), sep="/")
            for m in (model, *later)
        )
        for name, value in sorted(old.items()):
            yield name, flax_util.unbox(value), *(flax_util.unbox(params[name]) for params in new)
        return
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        keys: Any = path
        found = (flax_util.unbox(flax_util.get_value_from_path(m, keys)) for m in later)
        yield "/".join(map(str, path)), variable.get_value(), *found


def _relative_error(value: jax.Array, reference: jax.Array) -> float:
    norm = jnp.linalg.norm(reference.ravel())
    return float(jnp.linalg.norm((value - reference).ravel()) / jnp.where(norm == 0, 1, norm))
