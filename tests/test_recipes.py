import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix import recipes
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
    "awq-int4-g128": 4 + 32 / 128,
}
# Bounds of the relative error of a normally distributed weight.
ERRORS = {"8": 0.04, "4": 0.15}


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


@pytest.fixture(scope="module")
def model():
    return Mlp(nnx.Rngs(0))


@pytest.fixture(scope="module")
def applied(model):
    """What a preset makes of the toy model."""
    batches = [(IDS + i,) for i in range(3)]
    return functools.cache(lambda name: recipes.apply_recipe(model, name, IDS, calibration=batches))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_presets_quantize_the_weights_and_little_else(model, applied, name):
    result, report = applied(name)
    assert [w.path for w in report.weights] == ["down/kernel", "embed/embedding", "up/kernel"]
    assert [w.path for w in report.in_float] == ["norm/bias", "norm/scale", "up/bias"]
    down, table, up = report.weights
    assert table.format == "int8"
    assert table.bytes_after == 50 * 128 + 50 * 4
    assert 0 < table.relative_error < 0.01
    per_output = 4 if BITS[name] == 8 else 0  # A float32 scale for each output channel.
    per_input = 4 if name.startswith("awq") else 0  # And what AWQ divides each input by.
    for weight in (down, up):
        n_in, n_out = weight.shape
        assert weight.bytes_before == 4 * n_in * n_out
        assert weight.bytes_after == n_in * n_out * BITS[name] / 8 + per_output * n_out + per_input * n_in
        assert 0 < weight.relative_error < ERRORS["4" if "4" in name else "8"]
    expected, got = model(IDS), result(IDS)
    error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 2.5 * ERRORS["4" if "4" in name else "8"]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_templates_have_the_structure_of_the_quantized_model(model, applied, name):
    result, report = applied(name)
    abstract = nnx.eval_shape(lambda: Mlp(nnx.Rngs(1)))
    template = recipes.template(abstract, report.recipe, IDS)
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
    _, report = recipes.apply_recipe(model, recipe, IDS)
    formats = {w.path: w.format for w in report.weights}
    assert formats == {"up/kernel": "int4", "down/kernel": "float8_e5m2"}
    assert "embed/embedding" in [w.path for w in report.in_float]


def test_tables_follow_their_rule(model):
    tables = {"op_names": ["take"], "weight_qtype": "nf4", "tile_size": 32}
    recipe = Recipe(name="tables", rules=(tables, {"weight_qtype": "int8"}))
    result, report = recipes.apply_recipe(model, recipe, IDS)
    table = next(w for w in report.weights if w.path == "embed/embedding")
    assert (table.format, table.bytes_after) == ("nf4", 50 * 128 // 2 + 50 * 4 * 4)
    rows = qwix.dequantize(result.embed.embedding.value.array)[IDS]
    np.testing.assert_array_equal(result.embed(IDS), rows)
    assert not np.array_equal(rows, model.embed(IDS))
    other = Recipe(name="none", rules=({**tables, "module_path": "x"}, {"weight_qtype": "int8"}))
    _, report = recipes.apply_recipe(model, other, IDS)
    assert "embed/embedding" in [w.path for w in report.in_float]


def test_a_tied_table_is_quantized_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, 64, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(self.embed(ids))

    model = Tied(nnx.Rngs(0))
    result, report = recipes.apply_recipe(model, "int4-g32", IDS)
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

    recipes.apply_recipe(model, "awq-int4-g128", IDS, calibration=batches())
    assert seen == [0, 1, 2]


def test_empty_calibration_data_is_an_error(model):
    with pytest.raises(RecipeError, match="calibration data is empty"):
        recipes.apply_recipe(model, "awq-int4-g128", IDS, calibration=iter(()))


def test_awq_is_better_than_rounding_where_activations_differ():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 2, 256)).astype(np.float32)
    model = nnx.Linear(256, 64, use_bias=False, rngs=nnx.Rngs(0))
    x, fresh = (jnp.asarray(rng.normal(size=(64, 256)) * scale, jnp.float32) for _ in range(2))
    errors = {}
    for name in ("int4-g128", "awq-int4-g128"):
        result, _ = recipes.apply_recipe(model, name, x, calibration=[x])
        errors[name] = float(jnp.linalg.norm(result(fresh) - model(fresh)))
    assert errors["awq-int4-g128"] < 0.9 * errors["int4-g128"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int5", "unknown recipe 'int5': use one of int8,"),
        ("awq-int4-g128", "needs calibration data"),
        (Recipe("r", ({"weight_qtype": "int4", "tile_size": 48},)), "does not fit.*48"),
        (Recipe("r", ({"weight_qtype": "int99"},)), "'r' does not fit.*int99"),
        (Recipe("r", ({"weights": "int8"},)), "no field 'weights'"),
        (Recipe("r", ({"module_path": "nowhere", "weight_qtype": "int8"},)), "nothing.*nowhere"),
        (Recipe("r", ({"act_qtype": "int8"},)), "quantized no weight"),
    ],
)
def test_what_cannot_be_applied_is_named(model, recipe, message):
    with pytest.raises(RecipeError, match=message):
        recipes.apply_recipe(model, recipe, IDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "r", "rules": [{}], "method": "magic"}, "method 'magic' is none of round-to"),
        ({"name": "r", "rules": []}, "has no rules"),
        ({"name": "r", "rules": "int8"}, "rules has to be a list"),
        ({"name": "r", "rules": [3]}, "rules has to be a list"),
        ({"rules": [{}]}, "a recipe has the fields"),
        ({"name": "r", "rules": [{}], "extra": 1}, "a recipe has the fields"),
        ([], "a recipe has the fields"),
    ],
)
def test_wrong_recipes_are_named(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(settings)


@pytest.mark.parametrize("name", ["int8", "nf4", "mxfp4"])
def test_a_checkpoint_gives_the_same_outputs(tiny_bert, tmp_path, name):
    ids, mask = jnp.array([[2, 5, 7, 3]]), jnp.ones((1, 4), bool)
    rules = [dict(rule) for rule in recipes.get_recipe(name).rules]
    model, report = recipes.apply_recipe(bert.load(tiny_bert), Recipe(name=name, rules=tuple(rules)), ids, mask)
    quantized.write(tmp_path, model, report.recipe, tiny_bert)
    restored = quantized.load(tmp_path)
    np.testing.assert_array_equal(restored(ids, mask), model(ids, mask))
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
    result, _ = recipes.apply_recipe(model, "int4-g32", ids, mask)
    np.testing.assert_allclose(result(ids, mask), rounded(ids, mask), atol=2e-6)
    assert np.abs(result(ids, mask) - model(ids, mask)).max() > 1e-3
