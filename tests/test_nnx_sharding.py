"""A quantized NNX model on eight devices keeps its partition specs, and nothing is gathered."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from qwix._src import model as qwix_model
from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers import ptq

FEATURES, HIDDEN = 16, 32
UP, DOWN, WHOLE = jax.P(None, "model"), jax.P("model", None), jax.P(None, None)
DATA = jax.P("data", None)


class MLP(nnx.Module):
    """A feed-forward block in tensor parallelism: the hidden features are sharded."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(
            FEATURES,
            HIDDEN,
            rngs=rngs,
            kernel_metadata={"out_sharding": tuple(UP)},
            bias_metadata={"out_sharding": ("model",)},
        )
        self.down = nnx.Linear(
            HIDDEN,
            FEATURES,
            rngs=rngs,
            kernel_metadata={"out_sharding": tuple(DOWN)},
            bias_metadata={"out_sharding": (None,)},
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        # Only with explicit axes does JAX want to be told that the sum over hidden features ends here.
        explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        return x + self.down(nnx.relu(self.up(x)), out_sharding=DATA if explicit else None)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A rule, and the spec of the scale of the kernel whose contracting axis is sharded."""

    rule: dict[str, Any]
    down_scale: jax.P = WHOLE
    # A tile that lies on two devices: its scale needs both, and so they exchange scales.
    gathers_scales: bool = False

    def model(self, seed: int = 0) -> nnx.Module:
        provider = ptq.PtqProvider([qconfig.QuantizationRule(**self.rule)])
        model = MLP(nnx.Rngs(seed))
        return qwix_model.quantize_model(model, provider, jnp.ones((2, FEATURES)))


RECIPES = {
    "int8": Recipe({"weight_qtype": "int8"}),
    "w8a8": Recipe({"weight_qtype": "int8", "act_qtype": "int8"}),
    "asymmetric": Recipe({"weight_qtype": "int8", "weight_calibration_method": "minmax"}),
    "int4-tiles-within-shards": Recipe({"weight_qtype": "int4", "tile_size": 4}, DOWN),
    "int4-tiles-across-shards": Recipe({"weight_qtype": "int4", "tile_size": HIDDEN // 2}, gathers_scales=True),
    "nf4": Recipe({"weight_qtype": "nf4", "tile_size": 4}, DOWN),
}
FEW = ["w8a8", "int4-tiles-across-shards", "nf4"]
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


# Enough for what does not depend on the format.
few_recipes = pytest.mark.parametrize("recipe", [RECIPES[name] for name in FEW], ids=FEW)
recipes_and_axis_types = pytest.mark.parametrize(
    ("recipe", "mesh"),
    [
        pytest.param(recipe, axis_type, id=f"{name}-{axis_type}")
        for name, recipe in RECIPES.items()
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        if not (recipe.gathers_scales and axis_type == AxisType.Explicit)
    ],
    indirect=["mesh"],
)


@pytest.fixture
def mesh(request) -> Iterator[jax.sharding.Mesh]:
    assert jax.device_count() == 8
    axis_type = getattr(request, "param", AxisType.Auto)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def inputs(mesh: jax.sharding.Mesh) -> jax.Array:
    x = jax.random.normal(jax.random.key(1), (4, FEATURES))
    return jax.device_put(x, NamedSharding(mesh, DATA))


def expected_spec(path: tuple[str, ...], recipe: Recipe) -> jax.P:
    layer, parameter, *field = path
    if parameter == "bias":
        return jax.P("model") if layer == "up" else jax.P(None)
    if layer == "down" and field[-1] in ("scale", "zero_point"):
        return recipe.down_scale
    return UP if layer == "up" else DOWN


def assert_sharded(arrays: Any, recipe: Recipe) -> None:
    """Every array of a nested dict lies as its path says; one device holds its part only."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    assert len(leaves) >= 6
    for path, array in leaves:
        spec = expected_spec(tuple(key.key for key in path), recipe)
        sharding = NamedSharding(jax.sharding.get_mesh(), spec)
        assert array.sharding.is_equivalent_to(sharding, array.ndim), (path, array.sharding)
        shards = 4 if "model" in spec else 1
        for shard in array.addressable_shards:
            assert shard.data.size == array.size // shards


def assert_model_sharded(model: nnx.Module, recipe: Recipe) -> None:
    """As `assert_sharded`, and the metadata of each parameter says the same."""
    state = nnx.state(model)
    assert_sharded(nnx.to_pure_dict(state), recipe)
    for path, param in nnx.to_flat_state(state):
        assert jax.P(*param.get_metadata("out_sharding")) == expected_spec(path, recipe), path


def abstract(recipe: Recipe) -> nnx.Module:
    return nnx.eval_shape(recipe.model)


def gathered(compiled: jax.stages.Compiled) -> list[int]:
    """Numbers of elements of what a program gathers from, or exchanges between, devices."""
    pattern = r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)"
    shapes = re.findall(pattern, compiled.as_text())
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


def test_gathered_sees_a_gather(mesh):
    x = jax.device_put(jnp.ones((HIDDEN, FEATURES)), NamedSharding(mesh, DOWN))
    replicated = NamedSharding(mesh, jax.P())
    compiled = jax.jit(lambda x: x * 2, out_shardings=replicated).lower(x).compile()
    assert max(gathered(compiled)) == x.size


@recipes_and_axis_types
def test_quantize_model(mesh, recipe):
    assert_model_sharded(recipe.model(), recipe)


@pytest.mark.parametrize("mesh", [AxisType.Explicit], indirect=True)
def test_with_explicit_axes_no_data_moves_unasked(mesh):
    recipe = RECIPES["int4-tiles-across-shards"]
    with pytest.raises(ValueError, match=r"down/kernel.*tiles divide what lies on each"):
        recipe.model()


@recipes
def test_an_abstract_model_has_the_specs(mesh, recipe):
    for path, param in nnx.to_flat_state(nnx.state(abstract(recipe))):
        assert isinstance(param.get_value(), jax.ShapeDtypeStruct)
        assert param.get_value().sharding.spec == expected_spec(path, recipe), path


@recipes
def test_quantize_params(mesh, recipe):
    params = nnx.to_pure_dict(nnx.state(MLP(nnx.Rngs(1)), nnx.Param))
    model = abstract(recipe)
    quantized = ptq.quantize_params(params, model)
    assert_sharded(quantized, recipe)
    nnx.update(model, quantized)
    assert_model_sharded(model, recipe)
    unsharded = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), params)
    expected = ptq.quantize_params(unsharded, abstract(recipe))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(e, np.float32), rtol=1e-6),
        quantized,
        expected,
    )


@recipes
def test_quantize_params_in_jit_gathers_no_weight(mesh, recipe):
    params = nnx.to_pure_dict(nnx.state(MLP(nnx.Rngs(1)), nnx.Param))
    model = abstract(recipe)
    compiled = jax.jit(lambda p: ptq.quantize_params(p, model)).lower(params).compile()
    scales = 2 * FEATURES if recipe.gathers_scales else 0
    assert all(size <= scales for size in gathered(compiled))
    assert_sharded(compiled(params), recipe)


@recipes_and_axis_types
def test_jit_with_in_and_out_shardings(mesh, recipe):
    model = recipe.model()
    x = inputs(mesh)
    expected = model(x)
    graphdef, state = nnx.split(model)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    data = NamedSharding(mesh, DATA)

    def forward(state: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model)

    jitted = jax.jit(forward, in_shardings=(shardings, data), out_shardings=(data, shardings))
    assert gathered(jitted.lower(state, x).compile()) == []
    y, state = jitted(state, x)
    assert y.sharding.is_equivalent_to(data, 2)
    # Where activations are quantized as well, another order of sums rounds some of them elsewhere.
    tolerance = 0.02 if "act_qtype" in recipe.rule else 1e-5
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    assert_model_sharded(nnx.merge(graphdef, state), recipe)


@few_recipes
def test_update_in_nnx_jit(mesh, recipe):
    model, other = recipe.model(0), recipe.model(1)
    nnx.jit(nnx.update)(model, nnx.state(other))
    assert_model_sharded(model, recipe)
    x = inputs(mesh)
    np.testing.assert_allclose(model(x), other(x), rtol=1e-6)


@few_recipes
def test_creation_in_jit(mesh, recipe):
    model = nnx.jit(recipe.model)()
    assert_model_sharded(model, recipe)


@few_recipes
def test_orbax(mesh, recipe, tmp_path):
    def dtype_in_file(dtype: jnp.dtype) -> jnp.dtype:
        # Orbax 0.11 has no uint4, which is what NF4 codes are.
        return jnp.dtype(jnp.uint8) if dtype == jnp.uint4 else dtype

    def in_file(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, array.sharding.spec)
        dtype = dtype_in_file(array.dtype)
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)

    model = recipe.model(1)
    saved = jax.tree.map(lambda array: array.astype(dtype_in_file(array.dtype)), nnx.state(model))
    restored = abstract(recipe)
    template = nnx.state(restored)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", saved)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "model", jax.tree.map(in_file, template))
    nnx.update(restored, jax.tree.map(lambda a, like: a.astype(like.dtype), state, template))
    assert_model_sharded(restored, recipe)
    x = inputs(mesh)
    np.testing.assert_array_equal(restored(x), model(x))


@pytest.mark.parametrize("size", [4, 12, 24, 2736])
@pytest.mark.parametrize("method", ["absmax", "minmax", "rms,3"])
def test_shards_of_any_size(mesh, size, method):
    how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(1,), calibration_method=method)
    x = jax.random.normal(jax.random.key(size), (size, FEATURES))
    expected = qarray.quantize(x, how)
    array = qarray.quantize(jax.device_put(x, NamedSharding(mesh, DOWN)), how)
    assert array.qvalue.sharding.is_equivalent_to(NamedSharding(mesh, DOWN), 2)
    np.testing.assert_allclose(array.scale, expected.scale, rtol=1e-6)
    # Where the scale differs in its last bit, a value half-way between two may go either way.
    difference = np.asarray(array.qvalue, np.int32) - np.asarray(expected.qvalue, np.int32)
    assert np.abs(difference).max() <= 1
    compiled = jax.jit(qarray.quantize, static_argnums=1).lower(array.qvalue * 1.0, how).compile()
    assert gathered(compiled) == []
