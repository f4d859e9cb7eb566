"""Recipes: quantization as data.

A recipe lists stages, each a method with its settings, and rules. The stages before the last one change the
float model and not what it computes (rotation, smoothing), or prune it; the last one quantizes, or prunes.
Rules say which weights get which number format, first match first, with formats by name. All of it is plain
data, which a YAML or a JSON file holds as well::

    name: mixed
    description: rotated, then GPTQ; attention finer than the rest, the first block in float
    stages:
      - rotate
      - {method: gptq, act_order: true}
    rules:
      - {op_names: [take], weight_qtype: int8}
      - {module_path: layers/0/.*}
      - {module_path: .*/attn/.*, weight_qtype: int4, tile_size: 64}
      - {weight_qtype: nf4, tile_size: 64}

A rule without formats leaves what it matches in float, and unpruned. A rule with `op_names: [take]` is for
embedding tables (`Embed`), whose rows are looked up and not multiplied; without such a rule they stay in float.

`qwix.apply_recipe` carries a recipe out; `methods.py` has the methods.

>>> recipe = get_recipe("int4-g32")
>>> recipe.stages, recipe.rules[1].weight_qtype, recipe.rules[1].tile_size
(({'method': 'round-to-nearest'},), 'int4', 32)
>>> get_recipe("gptq-int3-g64").rules[1].tile_size  # every group size has a name
64
"""

import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import msgspec

from qwix import methods
from qwix._src import qconfig
from qwix._src.core import numerics

__all__ = ["RECIPES", "Recipe", "RecipeError", "Rule", "get_recipe"]

RecipeError = methods.RecipeError


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The fields of `qwix.QuantizationRule`, with number formats by name."""

    module_path: str = ".*"
    op_names: tuple[str, ...] = ()
    weight_qtype: str | None = None
    act_qtype: str | None = None
    tile_size: int | float | None = None
    act_static_scale: bool | None = None
    weight_calibration_method: str = "absmax"
    act_calibration_method: str | None = None
    act_batch_axes: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for field in ("weight_qtype", "act_qtype"):
            if (name := getattr(self, field)) is not None:
                try:
                    numerics.get_symmetric_bound(_qtype(name))
                except ValueError as error:
                    raise ValueError(f"{field}: {error}") from error
        try:
            re.compile(self.module_path)
        except re.error as error:
            raise ValueError(f"module_path {self.module_path!r} is no regular expression: {error}") from error

    @property
    def is_for_tables(self) -> bool:
        """Whether it is about embedding tables."""
        return "take" in self.op_names

    def as_rule(self, rule_type: type = qconfig.QuantizationRule) -> Any:
        """The same as a `QuantizationRule`, or a subclass of it."""
        values = msgspec.structs.asdict(self)
        for field in ("weight_qtype", "act_qtype"):
            values[field] = None if values[field] is None else _qtype(values[field])
        return rule_type(**values)


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What to do to a model.

    Attributes:
      name: what it is called in tables and checkpoints.
      rules: `Rule`s, or dictionaries of their fields; the first that matches an op decides.
      stages: what is done, in order: {"method": a name in `methods.names()`, and its settings}, or just the name. The
        last one quantizes or prunes, those before prepare the float model.
      description: one line for people.

    Raises:
      RecipeError: a field is missing, unknown or of the wrong type, a method or a number format is unknown.
    """

    name: str
    rules: Sequence[Any]
    stages: Sequence[Any] = ("round-to-nearest",)
    description: str = ""

    def __post_init__(self) -> None:
        where = f"recipe {self.name!r}"
        if not isinstance(self.rules, list | tuple) or not isinstance(self.stages, list | tuple):
            raise RecipeError(f"{where}: rules and stages have to be lists")
        if not self.rules:
            raise RecipeError(f"{where}: has no rules, so nothing would be quantized")
        if not self.stages:
            raise RecipeError(f"{where}: has no stages: leave them out to round to nearest")
        rules = tuple(_rule(rule, f"{where}: rules[{i}]") for i, rule in enumerate(self.rules))
        stages = tuple(_stage(stage, f"{where}: stages[{i}]") for i, stage in enumerate(self.stages))
        for i, stage in enumerate(stages):
            last = i == len(stages) - 1
            if methods.may_end(stage["method"]) < last or methods.quantizes(stage["method"]) > last:
                what = "prepares a float model, and something has to quantize it after" if last else "has to be last"
                raise RecipeError(f"{where}: stages[{i}]: {stage['method']} {what}")
        msgspec.structs.force_setattr(self, "rules", rules)
        msgspec.structs.force_setattr(self, "stages", stages)

    @property
    def needs_data(self) -> bool:
        """Whether a stage looks at calibration inputs."""
        return any(methods.needs_data(stage["method"]) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data: dictionaries, lists, strings, numbers; defaults are left out."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; raises `RecipeError`."""
        return _convert(settings, cls, "a recipe")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe to a file, as JSON if its name ends so, else as YAML.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     get_recipe("nf4").save(f"{directory}/nf4.yaml")
        ...     Recipe.load(f"{directory}/nf4.yaml") == get_recipe("nf4")
        True
        """
        path = pathlib.Path(path)
        if path.suffix == ".json":
            content = msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
        else:
            content = msgspec.yaml.encode(self.to_dict())
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Reads a recipe from a YAML or JSON file.

        Raises:
          RecipeError: the file cannot be read, or is no recipe; the message names the field.
        """
        try:
            settings = msgspec.yaml.decode(pathlib.Path(path).read_bytes())  # JSON is YAML
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: the recipe cannot be read ({error})") from error
        return _convert(settings, cls, str(path))


def _convert(settings: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        # An error of __post_init__ comes with its own message first and the place after it.
        raise RecipeError(f"{where}: {error}") from error


def _rule(rule: Any, where: str) -> Rule:
    if isinstance(rule, Rule):
        return rule
    settings = dict(rule) if isinstance(rule, Mapping) else rule
    if isinstance(settings, dict) and isinstance(settings.get("op_names"), str):
        settings["op_names"] = (settings["op_names"],)
    return _convert(settings, Rule, where)


def _stage(stage: Any, where: str) -> dict[str, Any]:
    stage = {"method": stage} if isinstance(stage, str) else stage
    if not isinstance(stage, Mapping) or not isinstance(stage.get("method"), str):
        raise RecipeError(f"{where}: is the name of a method, or a mapping with 'method' and its settings: {stage!r}")
    settings = {key: value for key, value in stage.items() if key != "method"}
    try:
        methods.check_settings(stage["method"], settings)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    return {"method": stage["method"], **settings}


def _qtype(name: str) -> Any:
    """A dtype where JAX has one of this name, else the name itself ('nf4', 'int3', 'mxfp4')."""
    try:
        return jnp.dtype(name)
    except TypeError:
        return name


# --- presets --------------------------------------------------------------------------------------


def get_recipe(name: str | os.PathLike[str]) -> Recipe:
    """A recipe by its name, or from a file.

    Args:
      name: a key of `RECIPES`; one of them with another group size, such as 'gptq-int3-g64'; or the path of a YAML or
        JSON file.

    Raises:
      RecipeError: there is none.
    """
    text = os.fspath(name)
    if text in RECIPES:
        return RECIPES[text]
    if os.sep in text or text.endswith((".yaml", ".yml", ".json")):
        return Recipe.load(text)
    if match := re.fullmatch(r"(.+)-g(\d+)", text):
        for known, recipe in RECIPES.items():
            if re.sub(r"-g\d+$", "", known) == match[1]:
                return _with_tile_size(recipe, text, int(match[2]))
    raise RecipeError(
        f"unknown recipe {text!r}: use one of {', '.join(RECIPES)}, one of those with another group size (-g64), or "
        "the path of a file that ends in .yaml or .json"
    )


def _with_tile_size(recipe: Recipe, name: str, size: int) -> Recipe:
    tables, rule = recipe.rules
    if isinstance(rule.tile_size, int) and size > 0:
        description = recipe.description.replace(f"groups of {rule.tile_size}", f"groups of {size}")
        rules = (tables, msgspec.structs.replace(rule, tile_size=size))
        return Recipe(name=name, rules=rules, stages=recipe.stages, description=description)
    raise RecipeError(f"unknown recipe {name!r}: {recipe.name!r} has no groups of {size}")


# Embedding tables are int8 in all of them, a scale a row: on MiniLM that moves the embeddings by
# less than a third of what int8 weights do, and the table is half of the model.
_TABLES = Rule(op_names=("take",), weight_qtype="int8")


def _preset(name: str, description: str, *stages: Any, **rule: Any) -> Recipe:
    return Recipe(name=name, rules=(_TABLES, rule), stages=stages or ("round-to-nearest",), description=description)


def _calibrated(prefix: str, how: str, *stages: Any) -> list[Recipe]:
    return [
        _preset(
            f"{prefix}-int{bits}-g128",
            f"int{bits} weights, groups of 128, {how}",
            *stages,
            weight_qtype=f"int{bits}",
            tile_size=128,
        )
        for bits in (4, 3)
    ]


_INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
_FP8 = {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _preset("int8", "int8 weights per channel; int8 activations, ranges found in each call", **_INT8),
        _preset("int8-weight-only", "int8 weights per channel", weight_qtype="int8"),
        _preset("fp8", "float8 e4m3 weights per channel; float8 activations, ranges found in each call", **_FP8),
        _preset("fp8-weight-only", "float8 e4m3 weights per channel", weight_qtype="float8_e4m3fn"),
        _preset("mxfp8", "MXFP8 weights, groups of 32", weight_qtype="mxfp8", tile_size=32),
        _preset("int4-g32", "int4 weights, groups of 32", weight_qtype="int4", tile_size=32),
        _preset("int4-g128", "int4 weights, groups of 128", weight_qtype="int4", tile_size=128),
        _preset("int3-g128", "int3 weights, groups of 128", weight_qtype="int3", tile_size=128),
        _preset("nf4", "4-bit NormalFloat weights, groups of 64", weight_qtype="nf4", tile_size=64),
        _preset("mxfp4", "MXFP4 weights, groups of 32", weight_qtype="mxfp4", tile_size=32),
        _preset("nvfp4", "NVFP4 weights, groups of 16", weight_qtype="nvfp4", tile_size=16),
        *_calibrated("hqq", "scales by half-quadratic splitting (HQQ)", "hqq"),
        *_calibrated("awq", "scaled by their activations (AWQ)", "awq"),
        *_calibrated("gptq", "each error made up for by the next columns (GPTQ)", "gptq"),
        *_calibrated("qep", "GPTQ with earlier layers' errors corrected (QEP)", "qep"),
        *_calibrated("awq-gptq", "scaled by their activations, then GPTQ", "awq-scale", "gptq"),
        *_calibrated("rotate-gptq", "rotated (QuaRot), then GPTQ", "rotate", "gptq"),
        _preset(
            "smoothquant-int8", "int8 weights and activations, outliers moved into the weights", "smooth-quant", **_INT8
        ),
        _preset("rotate-int8", "int8 weights and activations, both rotated", "rotate", "round-to-nearest", **_INT8),
    )
}
