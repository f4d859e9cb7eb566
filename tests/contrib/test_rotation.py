"""Rotated models: equal in float, better when quantized, and an ordinary model to every other provider."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.providers import ptq
from qwix.contrib import awq, hadamard, rotation
from qwix.contrib.rotation import RotationRule, WithInputTransform

WIDTH = 64
W8A4 = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int4")]


def with_outliers(*shape: int) -> jax.Array:
    x = np.random.default_rng(0).normal(size=shape)
    x[..., [5, 17]] *= 20
    return jnp.asarray(x, jnp.float32)


def error(found, expected) -> float:
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class DenseMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(nn.relu(nn.Dense(2 * WIDTH)(x)))


@pytest.fixture(scope="module")
def mlp():
    model, x = MLP(nnx.Rngs(0)), with_outliers(64, WIDTH)
    return model, rotation.rotate(model, x), x


def test_equal_in_float_and_undone(mlp):
    model, rotated, x = mlp
    assert isinstance(rotated.up.kernel, WithInputTransform)
    matrix = hadamard.HadamardTransform(WIDTH).matrix()
    np.testing.assert_allclose(rotated.up.kernel.value.array, matrix @ model.up.kernel.get_value(), atol=1e-5)
    np.testing.assert_allclose(jnp.asarray(rotated.up.kernel), model.up.kernel.get_value(), atol=1e-6)
    np.testing.assert_allclose(rotated(x), model(x), atol=1e-4)
    assert isinstance(model.up.kernel, nnx.Param)


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        ({"weight_qtype": "int8", "act_qtype": "int8"}, 0.8),
        ({"weight_qtype": "int4", "act_qtype": "int4"}, 0.8),
        ({"weight_qtype": "int8", "act_qtype": "int4"}, 0.7),
    ],
)
def test_better_when_quantized(mlp, rule, limit):
    model, rotated, x = mlp
    rules = [qwix.QuantizationRule(**rule)]
    plain = qwix.quantize_model(model, qwix.PtqProvider(rules), x)
    after = qwix.quantize_model(rotated, qwix.PtqProvider(rules), x)
    assert error(after(x), model(x)) < limit * error(plain(x), model(x))
    assert after.up.kernel.array.qvalue.get_value().dtype == rule["weight_qtype"]
    ops = qwix.summarize(after).ops
    assert [op.path for op in ops] == ["up/dot_general0", "down/dot_general0"]  # as in a model without rotation


def test_a_quantized_rotated_model_is_like_any_other(mlp):
    model, rotated, x = mlp
    quantized = qwix.quantize_model(rotated, qwix.PtqProvider(W8A4), x)
    expected = quantized(x)
    np.testing.assert_allclose(nnx.jit(quantized)(x), expected, rtol=1e-3, atol=1e-3)
    graphdef, state = nnx.split(quantized)
    np.testing.assert_allclose(nnx.merge(graphdef, pickle.loads(pickle.dumps(state)))(x), expected)
    assert {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)} >= {"up/kernel/array/qvalue"}
    # Parameters of before and of after the rotation both quantize to the same.
    for params in (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, rotated)):
        again = qwix.quantize_model(rotated, qwix.PtqProvider(W8A4), x)
        again.up.kernel.array.qvalue.set_value(jnp.zeros_like(again.up.kernel.array.qvalue.get_value()))
        nnx.update(again, ptq.quantize_params(params, again))
        np.testing.assert_allclose(again(x), expected, rtol=1e-2, atol=1e-2)


def test_rotated_parameters_alone(mlp):
    model, rotated, x = mlp
    again = rotation.rotate(MLP(nnx.Rngs(1)), x)
    nnx.update(again, ptq.quantize_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)), again))
    np.testing.assert_allclose(again(x), model(x), atol=1e-4)


def test_calibration_sees_rotated_activations(mlp):
    model, rotated, x = mlp
    rules = [awq.AwqRule(weight_qtype="int8", act_qtype="int4")]
    observed = qwix.quantize_model(rotated, awq.AwqCalibrationProvider(rules), x)
    np.testing.assert_allclose(observed(x), model(x), atol=1e-4)
    stats = nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat))
    matrix = hadamard.HadamardTransform(WIDTH).matrix()
    expected = np.abs(np.asarray(x, np.float64) @ matrix.T).mean(0)
    np.testing.assert_allclose(stats["up"]["kernel_awq"]["sum_of_act_scale"], expected, rtol=1e-4)
    quantized = qwix.quantize_model(rotated, awq.AwqInferenceProvider(rules), x)
    params = nnx.to_pure_dict(nnx.state(rotated, nnx.Param))
    nnx.update(quantized, awq.quantize_params(params, quantized, stats))
    assert isinstance(quantized.up.kernel, WithInputTransform)
    assert isinstance(quantized.up.kernel.array, awq.WithAwqScale)
    plain = qwix.quantize_model(model, qwix.PtqProvider(rules), x)
    assert error(quantized(x), model(x)) < 0.7 * error(plain(x), model(x))


def test_linen():
    model, x = DenseMLP(), with_outliers(64, WIDTH)
    variables = model.init(jax.random.key(0), x)
    expected = model.apply(variables, x)
    rotated, rotated_variables = rotation.rotate(model, x, variables=variables)
    np.testing.assert_allclose(rotated.apply(rotated_variables, x), expected, atol=1e-4)
    with pytest.raises(ValueError, match="Dense_[01]/kernel is a float array"):
        rotated.apply(variables, x)
    provider = qwix.PtqProvider(W8A4)
    quantized = qwix.quantize_model(rotated, provider)
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    plain = qwix.quantize_model(model, provider)
    abstract_plain = jax.eval_shape(plain.init, jax.random.key(0), x)["params"]
    params_plain = ptq.quantize_params(variables["params"], abstract_plain)
    limit = 0.7 * error(plain.apply({"params": params_plain}, x), expected)
    for params in (variables["params"], rotated_variables["params"]):
        quantized_params = ptq.quantize_params(params, abstract)
        assert jax.tree.structure(quantized_params) == jax.tree.structure(abstract)
        assert error(quantized.apply({"params": quantized_params}, x), expected) < limit


class Attention(nnx.Module):
    """Several contracted axes, a batch axis in the weight, a transposed and a tied weight, a convolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(10, 12, rngs=rngs)
        self.qkv = nnx.Param(jax.random.normal(rngs(), (3, 12, 4, 6)))
        self.out = nnx.Param(jax.random.normal(rngs(), (4, 6, 12)))
        self.gate = nnx.Param(jax.random.normal(rngs(), (8, 12)))
        self.per_head = nnx.Param(jax.random.normal(rngs(), (4, 6, 6)))
        self.conv = nnx.Conv(12, 5, (3,), rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        q, _, v = jnp.einsum("btd,sdhk->sbthk", x, self.qkv[...])
        y = jnp.einsum("bthk,hkj->bthj", q * v, self.per_head[...])
        x = x + jnp.einsum("bthk,hkd->btd", y, self.out[...])
        gate = x @ self.gate[...].T
        return self.embed.attend(x), self.conv(x), gate


def test_layouts():
    model, ids = Attention(nnx.Rngs(0)), jnp.arange(10).reshape(2, 5)
    rotated = rotation.rotate(model, ids, seed=7)
    axes = {name: [a for a, _ in getattr(rotated, name).transforms] for name in ("qkv", "out", "per_head", "gate")}
    assert axes == {"qkv": [-3], "out": [-3, -2], "per_head": [-2], "gate": [-1]}
    assert [a for a, _ in rotated.conv.kernel.transforms] == [-2]
    assert [a for a, _ in rotated.embed.embedding.transforms] == [-1]
    for found, expected in zip(rotated(ids), model(ids), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)
    quantized = qwix.quantize_model(rotated, qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="int8")]), ids)
    for found, expected in zip(quantized(ids), model(ids), strict=True):
        assert error(found, expected) < 0.03


def test_scanned_layers():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.vmap(lambda key: Layer(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    model, x = Stack(), with_outliers(8, WIDTH)
    rotated = rotation.rotate(model, x)
    assert rotated.layers.linear.kernel.shape == (3, WIDTH, WIDTH)
    np.testing.assert_allclose(rotated(x), model(x), atol=1e-4)
    quantized = qwix.quantize_model(rotated, qwix.PtqProvider(W8A4), x)
    assert error(quantized(x), model(x)) < 0.3


def test_shared_inputs_are_rotated_once():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.q, self.k = nnx.Linear(64, 4, rngs=rngs), nnx.Linear(64, 4, rngs=rngs)

        def __call__(self, x):
            return self.q(x), self.k(x)

    x = jnp.ones((2, 64))
    rotated = rotation.rotate(Shared(nnx.Rngs(0)), x)
    text = nnx.jit(lambda m, x: m(x)).lower(rotated, x).compile().as_text()
    assert text.count(" dot(") <= 3  # one of the rotation, two of the layers


def test_rules_choose(mlp):
    model, _, x = mlp
    rotated = rotation.rotate(model, x, rules=[RotationRule(module_path="down", block_size=32)])
    assert isinstance(rotated.up.kernel, nnx.Param)
    assert rotated.down.kernel.transforms[0][1].block_size == 32
    with pytest.raises(ValueError, match="matched nothing"):
        rotation.rotate(model, x, rules=[RotationRule(module_path="no_such")])
    with pytest.raises(ValueError, match="give the variables"):
        rotation.rotate(DenseMLP(), x)


# --- the array structure


def transformed(shape=(4, 6), axis=-1) -> WithInputTransform:
    how = qwix._src.core.qarray.HowToQuantize(qtype=jnp.float32)
    weight = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    transform = hadamard.HadamardTransform(shape[axis])
    return WithInputTransform(transform(weight, axis), how, transforms=((axis, transform),))


def test_layout_changes_follow():
    w = transformed()
    plain = np.arange(24.0).reshape(4, 6)
    cases = [
        (w.T, plain.T, -2),
        (w.swapaxes(0, 1), plain.T, -2),
        (w.reshape(2, 2, 6), plain.reshape(2, 2, 6), -1),
        (w[1:3], plain[1:3], -1),
        (w[2], plain[2], -1),
        (w[jnp.array([3, 0])], plain[[3, 0]], -1),
        (w.apply_layout(jnp.expand_dims, 2), plain[:, :, None], -2),
        (WithInputTransform.concatenate([w, w], 0), np.concatenate([plain, plain]), -1),
        (w.apply_layout(jnp.split, 2, axis=0)[1], plain[2:], -1),
        (w.astype(jnp.bfloat16), plain, -1),
    ]
    for found, expected, axis in cases:
        assert found.transforms[0][0] == axis
        np.testing.assert_allclose(jnp.asarray(found), expected, atol=1e-5 if found.dtype == jnp.float32 else 0.2)
    joined = WithInputTransform.concatenate([w, w], 1)  # along the transformed axis: back in float
    np.testing.assert_allclose(joined, np.concatenate([plain, plain], 1), atol=1e-5)
    with pytest.raises(ValueError, match="would not be whole"):
        w.reshape(4, 2, 3)
    with pytest.raises(ValueError, match="would not be whole"):
        w[:, 0]
