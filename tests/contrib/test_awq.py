"""AWQ in models: from calibration to outputs, in NNX and in Linen."""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix.contrib import awq, awq_core
from qwix.contrib.awq import WithAwqScale

WIDTH = 64


def rule(**kwargs: Any) -> awq.AwqRule:
    return awq.AwqRule(**{"weight_qtype": "int4", "tile_size": 32} | kwargs)


RULES = [rule()]


def activations(*shape: int, seed: int = 0) -> jax.Array:
    """Correlated, with some features much larger than others: as in language models."""
    rng = np.random.default_rng(seed)
    width = shape[-1]
    sizes = np.exp(1.5 * np.random.default_rng(99).normal(size=width))
    mixed = rng.normal(size=(*shape[:-1], 8)) @ np.random.default_rng(98).normal(size=(8, width))
    return jnp.asarray((0.3 * mixed + rng.normal(size=shape)) * sizes, jnp.float32)


def quantized_with(model: nnx.Module, *inputs: Any, rules: Any = None, **kwargs: Any) -> nnx.Module:
    """All of AWQ on an NNX model."""
    rules = rules or RULES
    observed = qwix.quantize_model(model, awq.AwqCalibrationProvider(rules), *inputs)
    observed(*inputs)
    stats = nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat))
    quantized = qwix.quantize_model(model, awq.AwqInferenceProvider(rules), *inputs)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, awq.quantize_params(params, quantized, stats, **kwargs))
    return quantized


def rounded(model: nnx.Module, *inputs: Any, rules: Any = None) -> nnx.Module:
    return qwix.quantize_model(model, ptq.PtqProvider(rules or RULES), *inputs)


def error(found: Any, expected: Any) -> float:
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.fixture(scope="module")
def mlp() -> tuple[nnx.Module, nnx.Module, jax.Array]:
    model, x = MLP(nnx.Rngs(0)), activations(64, WIDTH)
    return model, quantized_with(model, x), x


# --- the whole way


def test_better_than_round_to_nearest(mlp):
    model, quantized, x = mlp
    nearest = rounded(model, x)
    fresh = activations(256, WIDTH, seed=1)
    for inputs in (x, fresh):
        assert error(quantized(inputs), model(inputs)) < error(nearest(inputs), model(inputs))
        assert error(quantized.up(inputs), model.up(inputs)) < 0.97 * error(nearest.up(inputs), model.up(inputs))


@pytest.mark.parametrize(
    ("kwargs", "limit"),
    [({"weight_qtype": "nf4"}, 0.8), ({"weight_qtype": "int3"}, 0.97), ({"tile_size": None}, 0.97)],
)
def test_other_formats_and_granularities(kwargs, limit):
    model, x = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), activations(64, WIDTH)
    rules = [rule(**kwargs)]
    quantized, nearest = quantized_with(model, x, rules=rules), rounded(model, x, rules=rules)
    assert error(quantized(x), model(x)) < limit * error(nearest(x), model(x))


def test_statistics_and_scales_are_those_of_the_core(mlp):
    model, quantized, x = mlp
    how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,), tiled_axes={1: 32})
    array, scale = awq_core.quantize_weight(model.up.kernel.T, awq_core.compute_act_scale(x), how)
    kernel = quantized.up.kernel.value
    np.testing.assert_allclose(kernel.awq_scale, scale[0], rtol=1e-6)
    assert kernel.contracting_axis == 0
    assert np.mean(kernel.array.qvalue == array.qvalue.T) > 0.99
    np.testing.assert_allclose(kernel.array.scale, array.scale.T, rtol=1e-5)


def test_the_weight_is_the_array_over_the_scale(mlp):
    model, quantized, x = mlp
    up, down = jnp.asarray(quantized.up.kernel), jnp.asarray(quantized.down.kernel)
    np.testing.assert_allclose(up, model.up.kernel, atol=0.15)
    hidden = nnx.relu(x @ up + model.up.bias)
    np.testing.assert_allclose(quantized(x), hidden @ down + model.down.bias, rtol=1e-3, atol=1e-3)


def test_one_grid_point_is_round_to_nearest(mlp):
    model, _, x = mlp
    np.testing.assert_allclose(quantized_with(model, x, n_grid=1)(x), rounded(model, x)(x), rtol=1e-5, atol=1e-5)


def test_before_the_update_it_is_round_to_nearest(mlp):
    model, _, x = mlp
    fresh = qwix.quantize_model(model, awq.AwqInferenceProvider(RULES), x)
    assert isinstance(fresh.up.kernel, WithAwqScale)
    assert np.all(fresh.up.kernel.value.awq_scale == 1)
    np.testing.assert_allclose(fresh(x), rounded(model, x)(x), rtol=1e-6, atol=1e-6)


def test_weights_without_statistics(mlp):
    model, quantized, x = mlp
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    again = copy.deepcopy(quantized)
    # The scales of an earlier round do not stay.
    nnx.update(again, awq.quantize_params(params, again, {}))
    np.testing.assert_allclose(again(x), rounded(model, x)(x), rtol=1e-5, atol=1e-5)


def test_part_of_the_parameters(mlp):
    model, quantized, x = mlp
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    result = awq.quantize_params({"down": params["down"]}, quantized, {})
    assert set(result) == {"down"}
    with pytest.raises(ValueError, match="other is not found"):
        awq.quantize_params({"other": jnp.ones(2)}, quantized, {})
    assert awq.quantize_params({"other": jnp.ones(2)}, quantized, {}, allow_extra_params=True)["other"].shape == (2,)


def test_statistics_but_no_place_for_a_scale(mlp):
    model, _, x = mlp
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    stats = {"up": {"kernel_awq": {"count": jnp.array(1), "sum_of_act_scale": jnp.ones(WIDTH)}}}
    with pytest.raises(ValueError, match="up/kernel has statistics.*AwqInferenceProvider"):
        awq.quantize_params(params, rounded(model, x), stats)


def test_rules_of_another_type_are_rounded_to_nearest():
    model, x = MLP(nnx.Rngs(0)), activations(8, WIDTH)
    rules = [qwix.QuantizationRule(module_path="up", weight_qtype="int8"), *RULES]
    quantized = quantized_with(model, x, rules=rules)
    assert type(quantized.up.kernel) is ptq.WithAux
    assert type(quantized.down.kernel) is WithAwqScale
    assert error(quantized(x), model(x)) < 0.2


def test_convolutions_are_rounded_to_nearest():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.out = nnx.Conv(4, 8, (3,), rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(self.conv(x))

    model, x = Net(nnx.Rngs(0)), activations(2, 6, 4)
    quantized = quantized_with(model, x, rules=[rule(tile_size=None)])
    assert type(quantized.conv.kernel) is ptq.WithAux
    assert error(quantized(x), model(x)) < 0.2


# --- the compiled program


@functools.cache
def program(**kwargs: Any) -> str:
    model = nnx.Linear(WIDTH, 48, use_bias=False, rngs=nnx.Rngs(0))
    x = activations(4, WIDTH)
    quantized = qwix.quantize_model(model, awq.AwqInferenceProvider([rule(**kwargs)]), x)
    graphdef, state = nnx.split(quantized)
    return str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x))


def test_with_quantized_activations_the_weight_stays_in_its_format():
    text = program(weight_qtype="int8", tile_size=None, act_qtype="int8")
    assert "f32[64,48]" not in text
    assert "preferred_element_type=int32" in text


def test_weight_only_dequantizes_once_and_divides_activations():
    text = program(weight_qtype="int8", tile_size=None)
    full = [line for line in text.splitlines() if ":f32[64,48]" in line]
    assert len(full) == 2, full  # the conversion, and the product with its own scale
    assert ":f32[4,64] = div" in text


@pytest.mark.parametrize("act_qtype", ["int8", "float8_e4m3fn"])
def test_quantized_activations(act_qtype):
    model, x = MLP(nnx.Rngs(0)), activations(64, WIDTH)
    rules = [rule(weight_qtype="int8", tile_size=None, act_qtype=act_qtype)]
    assert error(quantized_with(model, x, rules=rules)(x), model(x)) < 0.05


def test_activations_keep_their_dtype():
    model = nnx.Linear(WIDTH, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = activations(4, WIDTH).astype(jnp.bfloat16)
    quantized = quantized_with(model, x)
    assert quantized.kernel.value.array.dtype == jnp.bfloat16
    assert quantized(x).dtype == jnp.bfloat16
    assert error(quantized(x).astype(jnp.float32), model(x).astype(jnp.float32)) < 0.2


# --- ops


class Op(nnx.Module):
    def __init__(self, shape, fn):
        self.w, self.fn = nnx.Param(jax.random.normal(jax.random.key(1), shape)), fn

    def __call__(self, x):
        return self.fn(x, self.w if self.fn.__code__.co_varnames[1] == "variable" else self.w[...])


OPS = {
    "matmul": ((32, 6), (32,), lambda x, w: x @ w),
    "variable": ((32, 6), (32,), lambda x, variable: jnp.dot(x, variable)),
    "on the left": ((6, 32), (32,), lambda x, w: w @ x.T),
    "transposed": ((6, 32), (32,), lambda x, w: x @ w.T),
    "swapped": ((6, 32), (32,), lambda x, w: x @ jnp.swapaxes(w, 0, 1)),
    "cast": ((32, 6), (32,), lambda x, w: x @ jnp.asarray(w, jnp.float32)),
    "reshaped": ((32, 2, 3), (32,), lambda x, w: x @ w.reshape(32, 6)),
    "sliced": ((32, 6), (32,), lambda x, w: x @ w[:, 1:4]),
    "split": ((32, 6), (32,), lambda x, w: jnp.concatenate([x @ part for part in jnp.split(w, 2, axis=1)], -1)),
    "two slices": ((32, 6), (32,), lambda x, w: (x @ w[:, :2]) * (x @ w[:, 4:])),
    "indexed": ((3, 32, 6), (32,), lambda x, w: x @ w[2]),
    "einsum": ((32, 2, 3), (5, 32), lambda x, w: jnp.einsum("btd,dnh->bnth", x, w)),
    "einsum, implicit": ((32, 6), (32,), lambda x, w: jnp.einsum("ij,jk", x, w)),
    "einsum, ellipsis": ((6, 32), (5, 32), lambda x, w: jnp.einsum("ed,...d->...e", w, x)),
    "two contracted": ((4, 8, 6), (4, 8), lambda x, w: jnp.einsum("bkd,kdo->bo", x, w)),
    "two contracted, swapped": ((8, 6, 4), (4, 8), lambda x, w: jnp.einsum("bkd,dok->bo", x, w)),
    "two contracted, dot_general": (
        (4, 6, 8),
        (4, 8),
        lambda x, w: jax.lax.dot_general(x, w, (((2, 1), (2, 0)), ((), ()))),
    ),
    "batched": ((4, 8, 6), (4, 8), lambda x, w: jnp.einsum("bhd,hdo->bho", x, w)),
    "dot_general, batched": (
        (4, 8, 6),
        (4, 8),
        lambda x, w: jax.lax.dot_general(x, w, (((2,), (1,)), ((1,), (0,)))),
    ),
    "three operands": ((32, 6), (32,), lambda x, w: jnp.einsum("bd,do,o->bo", x, w, jnp.arange(6.0))),
    "broadcast": ((32, 6), (32,), lambda x, w: jnp.einsum("bd,do->bo", x.sum(1, keepdims=True), w)),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_ops(op):
    """The output is that of the float op with the weight that the quantized one stands for."""
    shape, features, fn = op
    x, rules = activations(7, *features), [rule(weight_qtype="nf4", tile_size=4)]
    quantized = quantized_with(Op(shape, fn), x, rules=rules)
    assert isinstance(quantized.w, WithAwqScale)
    if op is not OPS["broadcast"]:
        assert len(np.unique(quantized.w.value.awq_scale)) > 1
    expected = fn(x, jnp.asarray(quantized.w))
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(jnp.abs(expected).max())}
    np.testing.assert_allclose(quantized(x), expected, **tolerance)
    np.testing.assert_allclose(nnx.jit(quantized)(x), expected, **tolerance)


def test_scales_that_no_activations_can_take():
    """Where there are no activations, or the scaled axis is not theirs, the float weight is used."""
    how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(1,))
    array, scale = awq_core.quantize_weight(
        activations(6, 8).T.T, jnp.arange(1.0, 9), qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,))
    )
    w = WithAwqScale(array.T, how, awq_scale=scale[0], contracting_axis=0)

    class Uses(nnx.Module):
        def __init__(self):
            self.w, self.v = w, nnx.Param(jnp.ones((6, 8)))

        def __call__(self, x):
            kernel = self.w.value
            return (
                jnp.einsum("di,dj->ij", kernel, kernel),
                jnp.einsum("bi,di->bd", x, kernel),
                jnp.concatenate([kernel, kernel], axis=1)[:, :3],
                jnp.asarray(kernel),
            )

    model, x = Uses(), jnp.ones((2, 6))
    for act_qtype in (None, "int8"):
        run = qwix.quantize_model(model, awq.AwqInferenceProvider([rule(tile_size=None, act_qtype=act_qtype)]), x)
        f = jnp.asarray(w)
        for found, expected in zip(run(x), (f.T @ f, x @ f.T, f[:, :3], f), strict=True):
            assert error(found, expected) < (0.02 if act_qtype else 1e-5)


def test_embedding_tied_to_the_output():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, WIDTH, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return x, self.embed.attend(x * jnp.exp(jnp.linspace(0, 4, WIDTH)))

    model, ids = Tied(nnx.Rngs(0)), jnp.array([[1, 10, 3]])
    quantized = quantized_with(model, ids)
    table = quantized.embed.embedding
    assert (table.contracting_axis, table.awq_scale.shape) == (1, (WIDTH,))
    assert len(np.unique(table.value.awq_scale)) > 1
    weight = jnp.asarray(table)
    rows, logits = quantized(ids)
    np.testing.assert_allclose(rows, weight[ids], rtol=1e-5)
    np.testing.assert_allclose(logits, (rows * jnp.exp(jnp.linspace(0, 4, WIDTH))) @ weight.T, rtol=1e-4, atol=1e-4)


def test_stacked_layers():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))(rngs.split(3))

        def __call__(self, x):
            step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, self.layers)

    model, x = Stack(nnx.Rngs(0)), activations(64, WIDTH)
    quantized = quantized_with(model, x)
    kernel = quantized.layers.kernel.value
    assert kernel.awq_scale.shape == (3, WIDTH)
    assert len(np.unique(kernel.awq_scale[0])) > 1
    expected = x
    for weight, bias in zip(jnp.asarray(kernel), model.layers.bias[...], strict=True):
        expected = expected @ weight + bias
    np.testing.assert_allclose(quantized(x), expected, rtol=1e-3, atol=1e-3)
    first, nearest = jnp.asarray(kernel)[0], jnp.asarray(rounded(model, x).layers.kernel)[0]
    truth = x @ model.layers.kernel[0]
    assert error(x @ first, truth) < 0.97 * error(x @ nearest, truth)


# --- the structure


def with_scale(*shape: int, axis: int | tuple[int, ...] = 1) -> WithAwqScale:
    how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,))
    w = jax.random.normal(jax.random.key(0), shape)
    size = np.prod([shape[a] for a in ((axis,) if isinstance(axis, int) else axis)])
    return WithAwqScale(qarray.quantize(w, how), how, awq_scale=jnp.arange(1.0, size + 1), contracting_axis=axis)


LAYOUTS = {
    "transpose": (lambda w: w.transpose(1, 0, 2), 0),
    "T": (lambda w: w.T, 1),
    "mT": (lambda w: w.mT, 2),
    "swapaxes": (lambda w: w.swapaxes(0, 1), 0),
    "split": (lambda w: w.reshape(2, 2, 3, 2), (1, 2)),
    "split another": (lambda w: w.reshape(2, 6, 2, 1), 1),
    "merge others": (lambda w: w.transpose(1, 0, 2).reshape(6, 4), 0),
    "merge": (lambda w: w.reshape(2, 12), 1),
    "slice": (lambda w: w[:, 1:5], 1),
    "int": (lambda w: w[1], 0),
    "int on the axis": (lambda w: w[:, 2], ()),
    "indices": (lambda w: w[jnp.array([[1, 0, 1]])], 2),
    "indices on the axis": (lambda w: w[:, jnp.array([5, 0, 5])], 1),
    "new axis": (lambda w: w[None], 2),
    "all": (lambda w: w[...], 1),
    "same shape": (lambda w: w.reshape(2, 6, 2), 1),
    "astype": (lambda w: w.astype(jnp.float32), 1),
    "moveaxis": (lambda w: layout(jnp.moveaxis, w, 0, -1), 0),
    "split in parts": (lambda w: layout(jnp.split, w, 2, axis=1)[1], 1),
}


def layout(function: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
    return w.apply_layout(function, *args, **kwargs) if isinstance(w, WithAwqScale) else function(w, *args, **kwargs)


@pytest.mark.parametrize(("change", "axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout(change, axis):
    w = with_scale(2, 6, 2)
    changed, expected = change(w), change(jnp.asarray(w))
    assert isinstance(changed, WithAwqScale)
    assert changed.shape == expected.shape
    assert changed.contracting_axis == axis
    assert changed.awq_scale.ndim == 1
    np.testing.assert_allclose(jnp.asarray(changed), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 2), (24,)])
def test_reshape_that_the_scale_cannot_follow(shape):
    with pytest.raises(ValueError, match="Cannot reshape"):
        with_scale(2, 6, 2).reshape(shape)


def test_several_axes():
    w = with_scale(2, 3, 4, axis=(1, 2))
    scale = jnp.arange(1.0, 13).reshape(1, 3, 4)
    np.testing.assert_allclose(jnp.asarray(w), qarray.dequantize(w.array) / scale, rtol=1e-6)
    turned = w.transpose(2, 0, 1)
    assert turned.contracting_axis == (0, 2)
    np.testing.assert_allclose(jnp.asarray(turned), jnp.asarray(w).transpose(2, 0, 1), rtol=1e-6)


def test_stacked_scales():
    layers = [with_scale(3, 6), with_scale(3, 6).replace(awq_scale=jnp.full(6, 2.0))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    np.testing.assert_allclose(jnp.asarray(stacked), jnp.stack([jnp.asarray(w) for w in layers]), rtol=1e-6)
    with pytest.raises(ValueError, match="stacked weights with input scales"):
        _ = stacked.T


def test_it_is_a_tree_with_static_fields():
    w = with_scale(3, 6)
    doubled = jax.tree.map(lambda leaf: leaf * 2, w)
    assert isinstance(doubled, WithAwqScale)
    assert len(jax.tree.leaves(w)) == 3
    assert w.replace(contracting_axis=0).contracting_axis == 0
    paths = ["".join(map(str, path)) for path, _ in jax.tree.flatten_with_path(w)[0]]
    assert paths == [".array.qvalue", ".array.scale", ".awq_scale"]


# --- NNX


def test_nnx_state_and_abstract_model(mlp, tmp_path):
    model, quantized, x = mlp
    build = lambda: qwix.quantize_model(model, awq.AwqInferenceProvider(RULES), x)  # noqa: E731
    abstract = nnx.eval_shape(build)
    assert jax.tree.structure(abstract.up.kernel) == jax.tree.structure(quantized.up.kernel)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(quantized))
        checkpointer.wait_until_finished()
        nnx.update(abstract, checkpointer.restore(tmp_path / "state", nnx.state(abstract, graph=False)))
    assert np.array_equal(abstract(x), quantized(x))
    flat = dict(nnx.to_flat_state(nnx.state(quantized)))
    assert ("up", "kernel", "awq_scale") in flat
    assert np.array_equal(nnx.merge(*nnx.split(quantized))(x), quantized(x))


def test_scales_are_sharded_like_the_contracted_axis():
    metadata = {"out_sharding": ("model", None), "eager_sharding": False}
    model = nnx.Linear(WIDTH, 8, kernel_metadata=metadata, rngs=nnx.Rngs(0))
    quantized = qwix.quantize_model(model, awq.AwqInferenceProvider(RULES), activations(2, WIDTH))
    assert quantized.kernel.awq_scale.get_metadata()["out_sharding"] == ("model",)


def test_sharded_weights():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    model, x = MLP(nnx.Rngs(0)), activations(64, WIDTH)
    expected = quantized_with(model, x)(x)
    for kernel, spec in ((model.up.kernel, jax.P(None, "model")), (model.down.kernel, jax.P("model", None))):
        kernel.set_value(jax.device_put(kernel[...], jax.sharding.NamedSharding(mesh, spec)))
    quantized = quantized_with(model, x)
    for kernel, spec in ((quantized.up.kernel, jax.P(None, "model")), (quantized.down.kernel, jax.P("model", None))):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        assert kernel.value.array.qvalue.sharding.is_equivalent_to(sharding, 2)
    # A sum in another order may move an element to the next step.
    assert error(jax.jit(lambda m, x: m(x))(quantized, x), expected) < 0.02


# --- Linen


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(WIDTH, name="a")(x))
        x = nn.DenseGeneral((2, 32), name="split")(x)
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="merge")(x)
        return jnp.einsum("bd,ed->be", x, self.param("w", nn.initializers.normal(), (6, WIDTH)))


def test_linen():
    model, x = LinenNet(), activations(64, WIDTH)
    params = model.init(jax.random.key(0), x)["params"]
    observed = qwix.quantize_model(model, awq.AwqCalibrationProvider(RULES))
    _, updated = observed.apply({"params": params}, x, mutable="quant_stats")
    quantized = qwix.quantize_model(model, awq.AwqInferenceProvider(RULES))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    result = awq.quantize_params(params, abstract, updated["quant_stats"])
    kernels = {name: result[name]["kernel"] for name in ("a", "split", "merge")} | {"w": result["w"]}
    assert all(isinstance(kernel, WithAwqScale) for kernel in kernels.values())
    assert [k.contracting_axis for k in kernels.values()] == [0, 0, (0, 1), 1]
    nearest = ptq.quantize_params(params, abstract)
    first = x @ params["a"]["kernel"]
    errors = [error(x @ jnp.asarray(tree["a"]["kernel"]), first) for tree in (result, nearest)]
    assert errors[0] < 0.97 * errors[1]
    # The whole model is the float one with the weights that the quantized ones stand for.
    is_weight = lambda leaf: isinstance(leaf, ptq.WithAux)  # noqa: E731
    floats = jax.tree.map(jnp.asarray, result, is_leaf=is_weight)
    found = quantized.apply({"params": result}, x)
    np.testing.assert_allclose(found, model.apply({"params": floats}, x), rtol=1e-3, atol=1e-4)
    without = awq.quantize_params(params, abstract, {})
    assert jax.tree.structure(without) == jax.tree.structure(nearest)
    expected = quantized.apply({"params": nearest}, x)
    np.testing.assert_allclose(quantized.apply({"params": without}, x), expected, rtol=1e-6)


def test_linen_layers_under_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(WIDTH)(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "quant_stats": 0}
            return nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)()(x, None)[0]

    model, x = Stack(), activations(64, WIDTH)
    params = model.init(jax.random.key(0), x)["params"]
    observed = qwix.quantize_model(model, awq.AwqCalibrationProvider(RULES))
    _, updated = observed.apply({"params": params}, x, mutable="quant_stats")
    quantized = qwix.quantize_model(model, awq.AwqInferenceProvider(RULES))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    result = awq.quantize_params(params, abstract, updated["quant_stats"])
    (kernel,) = (v for _, v in ptq.flatten(result) if isinstance(v, WithAwqScale))
    assert kernel.awq_scale.shape == (2, WIDTH)
    floats = jax.tree.map(jnp.asarray, result, is_leaf=lambda leaf: isinstance(leaf, ptq.WithAux))
    found, expected = quantized.apply({"params": result}, x), model.apply({"params": floats}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert error(expected, model.apply({"params": params}, x)) < 0.2
