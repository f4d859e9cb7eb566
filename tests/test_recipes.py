import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix import applying, methods, recipes
from qwix.contrib import input_scale
from qwix.models import bert, quantized
from qwix.recipes import Recipe, RecipeError

# Bits of a linear weight with its scale in a checkpoint: code, and scale over the group (float32
# scales, but e8m0 for MX and e4m3 for NVFP4). Channels of the toy model have 128 or 256 weights.
BITS = {
    "int8": 8,
    "int8-weight-only": 8,
    "fp8": 8,
    "fp8-weight-only": 8,
    "mxfp8": 8 + 8 / 32,
    "int4-g32": 4 + 32 / 32,
    "int4-g128": 4 + 32 / 128,
    "nf4": 4 + 32 / 64,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16,
    "smoothquant-int8": 8,
    "rotate-int8": 8,
    # int3 is held in int4
    **{name: 4 + 32 / 128 for name in recipes.RECIPES if name.endswith(("-int4-g128", "int3-g128"))},
}
# Bounds of the relative error of a normally distributed weight.
ERRORS = {"8": 0.04, "4": 0.15, "3": 0.3}


def bound(name):
    """What the relative error of a weight stays under."""
    return ERRORS["3" if "int3" in name else "4" if "4" in name else "8"]


class Mlp(nnx.Module):
    """An embedding, two linear layers, and a norm that no recipe touches."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 128, rngs=rngs)
        self.up = nnx.Linear(128, 256, rngs=rngs)
        self.norm = nnx.LayerNorm(256, rngs=rngs)
        self.down = nnx.Linear(256, 128, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        return self.down(self.norm(jax.nn.relu(self.up(self.embed(ids)))))


IDS = jnp.arange(12).reshape(3, 4)

run = nnx.jit(lambda model, *inputs: model(*inputs))


@pytest.fixture(scope="module")
def model():
    return Mlp(nnx.Rngs(0))


@pytest.fixture(scope="module")
def applied(model):
    """What a preset makes of the toy model."""
    batches = [(IDS + i,) for i in range(3)]
    return functools.cache(lambda name: qwix.apply_recipe(model, name, IDS, calibration=batches))


# A calibrated method's preset at 3 bits differs from that at 4 in nothing but a number.
DISTINCT = [name for name in recipes.RECIPES if "int3" not in name or name in ("int3-g128", "gptq-int3-g128")]


@pytest.mark.parametrize("name", DISTINCT)
def test_presets_quantize_the_weights_and_little_else(model, applied, name):
    result, report = applied(name)
    assert [w.path for w in report.weights] == ["down/kernel", "embed/embedding", "up/kernel"]
    assert [w.path for w in report.in_float] == ["norm/bias", "norm/scale", "up/bias"]
    down, table, up = report.weights
    assert table.format == "int8"
    assert table.bytes_after == 50 * 128 + 50 * 4
    assert 0 < table.relative_error < 0.01
    per_output = 4 if BITS[name] == 8 else 0  # A float32 scale for each output channel.
    for weight, layer in ((down, result.down), (up, result.up)):
        n_in, n_out = weight.shape
        # And what each input is divided by, where nothing before it takes that; the norm before `down` does.
        per_input = 4 if isinstance(layer.kernel, input_scale.WithInputScale) else 0
        assert not (per_input and weight is down)
        assert weight.bytes_before == 4 * n_in * n_out
        assert weight.bytes_after == n_in * n_out * BITS[name] / 8 + per_output * n_out + per_input * n_in
        assert 0 < weight.relative_error < bound(name)
    expected, got = model(IDS), result(IDS)
    error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 2.5 * bound(name)


@pytest.mark.parametrize("name", DISTINCT)
def test_templates_have_the_structure_of_the_quantized_model(model, applied, name):
    result, report = applied(name)
    abstract = nnx.eval_shape(lambda: Mlp(nnx.Rngs(1)))
    template = applying.template(abstract, report.recipe, IDS)
    want, got = nnx.state(result), nnx.state(template)
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_plain_json(name):
    recipe = recipes.get_recipe(name)
    copy = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert json.dumps(copy.to_dict()) == json.dumps(recipe.to_dict())
    assert recipe.name == name
    assert recipe.description


def test_the_model_is_left_alone(applied, model):
    applied("int8")
    assert isinstance(model.up.kernel, nnx.Param)
    same = Mlp(nnx.Rngs(0))
    np.testing.assert_array_equal(model.up.kernel[...], same.up.kernel[...])


def test_relative_errors_are_those_of_the_dequantized_weight(model, applied):
    result, report = applied("int4-g32")
    weight = next(w for w in report.weights if w.path == "up/kernel")
    value = np.asarray(model.up.kernel[...], np.float64)
    back = np.asarray(qwix.dequantize(result.up.kernel.value.array), np.float64)
    expected = np.linalg.norm(back - value) / np.linalg.norm(value)
    assert weight.relative_error == pytest.approx(expected, rel=1e-5)


def test_rules_choose_by_path_and_the_first_wins(model):
    recipe = Recipe(
        name="mixed",
        rules=(
            {"module_path": "up", "weight_qtype": "int4", "tile_size": 64},
            {"weight_qtype": "float8_e5m2"},
        ),
    )
    _, report = qwix.apply_recipe(model, recipe, IDS)
    formats = {w.path: w.format for w in report.weights}
    assert formats == {"up/kernel": "int4", "down/kernel": "float8_e5m2"}
    assert "embed/embedding" in [w.path for w in report.in_float]


def test_tables_follow_their_rule(model):
    tables = {"op_names": ["take"], "weight_qtype": "nf4", "tile_size": 32}
    recipe = Recipe(name="tables", rules=(tables, {"weight_qtype": "int8"}))
    result, report = qwix.apply_recipe(model, recipe, IDS)
    table = next(w for w in report.weights if w.path == "embed/embedding")
    assert (table.format, table.bytes_after) == ("nf4", 50 * 128 // 2 + 50 * 4 * 4)
    rows = qwix.dequantize(result.embed.embedding.value.array)[IDS]
    np.testing.assert_array_equal(result.embed(IDS), rows)
    assert not np.array_equal(rows, model.embed(IDS))
    other = Recipe(name="none", rules=({**tables, "module_path": "x"}, {"weight_qtype": "int8"}))
    _, report = qwix.apply_recipe(model, other, IDS)
    assert "embed/embedding" in [w.path for w in report.in_float]


def test_a_tied_table_is_quantized_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, 64, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(self.embed(ids))

    model = Tied(nnx.Rngs(0))
    result, report = qwix.apply_recipe(model, "int4-g32", IDS)
    assert [(w.path, w.format) for w in report.weights] == [("embed/embedding", "int4")]
    expected = model(IDS)
    error = jnp.linalg.norm(result(IDS) - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.3


def test_calibration_takes_arrays_tuples_and_dictionaries_and_is_consumed_once(model):
    seen = []

    def batches():
        for i, batch in enumerate([IDS, (IDS,), {"ids": IDS}]):
            seen.append(i)
            yield batch

    qwix.apply_recipe(model, "awq-int4-g128", IDS, calibration=batches())
    assert seen == [0, 1, 2]


def test_empty_calibration_data_is_an_error(model):
    with pytest.raises(RecipeError, match="calibration data is empty"):
        qwix.apply_recipe(model, "awq-int4-g128", IDS, calibration=iter(()))


def test_awq_is_better_than_rounding_where_activations_differ():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 2, 256)).astype(np.float32)
    model = nnx.Linear(256, 64, use_bias=False, rngs=nnx.Rngs(0))
    x, fresh = (jnp.asarray(rng.normal(size=(64, 256)) * scale, jnp.float32) for _ in range(2))
    errors = {}
    for name in ("int4-g128", "awq-int4-g128"):
        result, _ = qwix.apply_recipe(model, name, x, calibration=[x])
        errors[name] = float(jnp.linalg.norm(result(fresh) - model(fresh)))
    assert errors["awq-int4-g128"] < 0.9 * errors["int4-g128"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int5", "unknown recipe 'int5': use one of int8,"),
        ("awq-int4-g128", "needs data"),
        (Recipe("r", ({"weight_qtype": "int4", "tile_size": 48},)), "round-to-nearest does not fit.*48"),
        (Recipe("r", ({"module_path": "nowhere", "weight_qtype": "int8"},)), "nothing.*nowhere"),
        (Recipe("r", ({"act_qtype": "int8"},)), "quantized no weight"),
    ],
)
def test_what_cannot_be_applied_is_named(model, recipe, message):
    with pytest.raises(RecipeError, match=message):
        qwix.apply_recipe(model, recipe, IDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "r", "rules": [{}], "stages": ["magic"]}, r"stages\[0\]: method 'magic' is none of round-to"),
        ({"name": "r", "rules": [{}], "stages": [{"n_grid": 3}]}, r"stages\[0\]: is the name of a method"),
        ({"name": "r", "rules": [{}], "stages": [{"method": "awq", "grid": 3}]}, r"stages\[0\]: awq: .*`grid`"),
        ({"name": "r", "rules": [{}], "stages": [{"method": "awq", "n_grid": "3"}]}, r"awq: Expected `int`.*n_grid"),
        ({"name": "r", "rules": [{}], "stages": ["awq", "awq"]}, r"stages\[0\]: awq has to be last"),
        ({"name": "r", "rules": [{}], "stages": []}, "has no stages"),
        ({"name": "r", "rules": []}, "has no rules"),
        ({"name": "r", "rules": "int8"}, "Expected `array`"),
        ({"name": "r", "rules": [{}, 3]}, r"rules\[1\]: Expected `object`"),
        ({"name": "r", "rules": [{"weights": "int8"}]}, r"rules\[0\]: .*unknown field `weights`"),
        ({"name": "r", "rules": [{"weight_qtype": "int99"}]}, r"rules\[0\]: weight_qtype: 'int99' is no number format"),
        ({"name": "r", "rules": [{"tile_size": "big"}]}, r"rules\[0\]: Expected `int \| float \| null`.*tile_size"),
        ({"name": "r", "rules": [{"module_path": "("}]}, r"rules\[0\]: module_path '\(' is no regular"),
        ({"rules": [{}]}, "missing required field `name`"),
        ({"name": "r", "rules": [{}], "extra": 1}, "unknown field `extra`"),
        ([], "Expected `object`"),
    ],
)
def test_wrong_recipes_are_named(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(settings)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_hold_recipes(tmp_path, suffix):
    recipe = recipes.get_recipe("awq-int4-g128")
    path = tmp_path / f"recipe.{suffix}"
    recipe.save(path)
    assert recipes.get_recipe(path) == recipe
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_as_a_person_writes_it(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "name: mixed\nstages: [{method: awq, n_grid: 5}]\nrules:\n- {op_names: take, weight_qtype: int8}\n"
        "- {module_path: up}\n- {weight_qtype: nf4, tile_size: 64}\n"
    )
    recipe = Recipe.load(path)
    assert recipe.stages == ({"method": "awq", "n_grid": 5},)
    assert recipe.needs_data
    assert [rule.weight_qtype for rule in recipe.rules] == ["int8", None, "nf4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("name: [", "cannot be read"), ("name: r", "rules"), ("name: r\nrules: [{tile: 3}]", r"rules\[0\].*tile")],
)
def test_wrong_files_are_named(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=f"recipe.yaml.*{message}"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="nowhere.yaml.*cannot be read"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_every_group_size_has_a_name():
    recipe = recipes.get_recipe("awq-int3-g64")
    assert (recipe.name, recipe.rules[1].tile_size, recipe.rules[1].weight_qtype) == ("awq-int3-g64", 64, "int3")
    assert "groups of 64" in recipe.description
    for name in ("int8-g64", "magic-g64", "awq-int5-g64"):
        with pytest.raises(RecipeError, match=name):
            recipes.get_recipe(name)


class LinenMlp(nn.Module):
    """The same as `Mlp`."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(50, 128, name="embed")(ids)
        x = nn.LayerNorm(name="norm")(jax.nn.relu(nn.Dense(256, name="up")(x)))
        return nn.Dense(128, use_bias=False, name="down")(x)


@pytest.mark.parametrize("name", ["int4-g32", "awq-int4-g128"])
def test_a_linen_model_becomes_what_its_nnx_twin_does(model, applied, name):
    """Same weights, same recipe: the same outputs, formats and bytes."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    batches = [(IDS + i,) for i in range(3)]
    result, report = qwix.apply_recipe(LinenMlp(), name, IDS, variables={"params": params}, calibration=batches)
    twin, twin_report = applied(name)
    np.testing.assert_allclose(result(IDS), twin(IDS), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result(IDS), result.module.apply(result.variables, IDS))
    assert [(w.path, w.format, w.bytes_after) for w in report.weights] == [
        (w.path, w.format, w.bytes_after) for w in twin_report.weights
    ]
    assert params["up"]["kernel"].dtype == jnp.float32


def test_alpha_is_searched_in_linen_as_in_nnx(model):
    recipe = Recipe("searched", [{"weight_qtype": "int4"}], [{"method": "smooth-quant", "n_grid": 3}])
    batches = [IDS + i for i in range(2)]
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    result, _ = qwix.apply_recipe(model, recipe, IDS, calibration=batches)
    twin, _ = qwix.apply_recipe(LinenMlp(), recipe, IDS, variables={"params": params}, calibration=batches)
    np.testing.assert_allclose(result(IDS), twin(IDS), rtol=1e-4, atol=1e-5)


def test_linen_wants_variables_and_nnx_none(model):
    with pytest.raises(RecipeError, match="with its variables"):
        qwix.apply_recipe(LinenMlp(), "int8", IDS)
    with pytest.raises(RecipeError, match="variables are for Linen"):
        qwix.apply_recipe(model, "int8", IDS, variables={})


def test_an_interrupted_calibration_leaves_the_model_as_it_was(model):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))

    def batches():
        yield IDS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwix.apply_recipe(model, "awq-int4-g128", IDS, calibration=batches(), progress=True)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


@pytest.fixture
def doubling():
    """A method that prepares, looks at the data, and keeps outputs; gone after the test."""
    seen = []

    @methods.method("doubling", quantizes=False, needs_data=True)
    def run(job, *, factor: float = 2.0):
        seen.append(len(list(job.progress(job.batches, "looking"))))
        prepared = nnx.clone(job.model)
        prepared.up.kernel[...] *= factor
        prepared.up.bias[...] *= factor
        prepared.norm.epsilon *= factor**2
        return prepared

    yield seen
    del methods._METHODS["doubling"]


def test_stages_run_in_order_on_one_reading_of_the_data(model, doubling):
    rules = ({"weight_qtype": "int8"},)
    recipe = Recipe("staged", rules, stages=({"method": "doubling", "factor": 4.0}, "doubling", "awq"))
    batches = iter([IDS, IDS + 1])
    result, report = qwix.apply_recipe(model, recipe, IDS, calibration=batches)
    assert doubling == [2, 2]
    assert next(batches, None) is None
    up = np.asarray(jnp.asarray(result.up.kernel))
    np.testing.assert_allclose(up, 8 * np.asarray(model.up.kernel[...]), rtol=0.2, atol=0.02)
    np.testing.assert_allclose(result(IDS), model(IDS), atol=0.1)
    with pytest.raises(RecipeError, match="doubling prepares a float model, and something"):
        Recipe("staged", rules, stages=("doubling",))


@pytest.mark.parametrize("stages", [("rotate", "smooth", "gptq"), ("rotate", "awq")])
def test_stages_follow_rotation(stages):
    """What stands rotated in the model is calibrated and quantized as other weights are."""
    model, x = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (32, 16))
    result, _ = qwix.apply_recipe(model, Recipe("r", [{"weight_qtype": "int4"}], stages), x, calibration=[x])
    assert 0 < jnp.linalg.norm(result(x) - model(x)) < 0.15 * jnp.linalg.norm(model(x))


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_checkpoint_gives_the_same_outputs(tiny_bert, tmp_path, name):
    ids, mask = jnp.array([[2, 5, 7, 3]]), jnp.ones((1, 4), bool)
    recipe = Recipe(name=name, rules=recipes.get_recipe(name).rules)
    model, report = qwix.apply_recipe(bert.load(tiny_bert), recipe, ids, mask)
    quantized.write(tmp_path, model, report.recipe, tiny_bert)
    restored = quantized.load(tmp_path)
    np.testing.assert_array_equal(run(restored, ids, mask), run(model, ids, mask))
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny_bert / "tokenizer.json").read_bytes()


def test_weight_only_is_the_float_model_with_rounded_weights(tiny_bert):
    """Against NumPy: symmetric, scales of absmax / 7.5 (int4) and absmax / 127.5 (int8 tables)."""

    def weights(model):
        """(variable, its value in groups that share a scale along axis 1, largest code) of each."""
        for _, module in nnx.iter_graph(model):
            if isinstance(module, nnx.Linear):
                w = np.array(module.kernel[...], np.float64)
                yield module.kernel, w.reshape(-1, 32, w.shape[1]), 7
            elif isinstance(module, nnx.Embed):
                yield module.embedding, np.array(module.embedding[...], np.float64), 127

    def put(variable, value):
        variable[...] = jnp.asarray(value.reshape(variable.shape), jnp.float32)

    model, rounded = bert.load(tiny_bert), bert.load(tiny_bert)
    for (variable, w, _), (other, _, _) in zip(weights(model), weights(rounded), strict=True):
        # -absmax is a tie between two codes, which float32 and float64 break differently.
        flipped = np.where(w == -np.abs(w).max(axis=1, keepdims=True), -w, w)
        put(variable, flipped)
        put(other, flipped)
    for variable, w, top in weights(rounded):
        scale = np.abs(w).max(axis=1, keepdims=True) / (top + 0.5)
        put(variable, np.clip(np.round(w / scale), -top - 1, top) * scale)
    ids, mask = jnp.array([[2, 5, 7, 3], [2, 9, 3, 0]]), jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    result, _ = qwix.apply_recipe(model, "int4-g32", ids, mask)
    np.testing.assert_allclose(run(result, ids, mask), run(rounded, ids, mask), atol=2e-6)
    assert np.abs(run(result, ids, mask) - run(model, ids, mask)).max() > 1e-3


def test_pruning_alone():
    model, x = (
        nnx.Linear(8, 4, rngs=nnx.Rngs(0)),
        jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32),
    )
    recipe = Recipe("sparse", [{"weight_qtype": "int8"}], ["wanda"])
    pruned, report = qwix.apply_recipe(model, recipe, x, calibration=[x])
    assert int((pruned.kernel[...] == 0).sum()) == 16
    (weight,) = report.weights
    assert (weight.path, weight.format, weight.bytes_after) == ("kernel", "float32", 128) and weight.relative_error > 0
    assert applying.template(model, recipe, x).kernel.shape == (8, 4)
