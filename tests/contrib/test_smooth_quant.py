"""SmoothQuant in models: from calibration to outputs, in NNX and in Linen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix.contrib import smooth_quant
from qwix.contrib.smooth_quant import SqRule, WithSqScale

WIDTH = 64


def rule(**kwargs: Any) -> SqRule:
    return SqRule(**{"weight_qtype": "int8", "act_qtype": "int8"} | kwargs)


def activations(*shape: int, seed: int = 0) -> jax.Array:
    """Four features of the last axis are some fifty times as large as the others, as in language models."""
    x = np.random.default_rng(seed).normal(size=shape)
    x[..., [3, 17, 20, 31]] *= 50
    return jnp.asarray(x, jnp.float32)


def quantized_with(model: nnx.Module, *inputs: Any, rules: Any = None) -> nnx.Module:
    """All of SmoothQuant on an NNX model."""
    rules = rules or [rule()]
    observed = qwix.quantize_model(model, smooth_quant.SqCalibrationProvider(rules), *inputs)
    observed(*inputs)
    stats = nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat))
    quantized = qwix.quantize_model(model, smooth_quant.SqInferenceProvider(rules), *inputs)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, smooth_quant.quantize_params(params, quantized, stats))
    return quantized


def rounded(model: nnx.Module, *inputs: Any, rules: Any = None) -> nnx.Module:
    return qwix.quantize_model(model, ptq.PtqProvider(rules or [rule()]), *inputs)


def error(found: Any, expected: Any) -> float:
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


class Norms(nnx.Module):
    """Parameters of other names than `kernel`, in two layouts, used by einsum and dot."""

    def __init__(self, rngs: nnx.Rngs):
        self.w_up = nnx.Param(jax.random.normal(rngs.params(), (4, 16, WIDTH)) / 8)
        self.w_down = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, 8)) / 8)

    def __call__(self, x):
        hidden = jnp.einsum("btd,khd->btkh", x, self.w_up[...])
        return jnp.dot(nnx.relu(hidden.reshape(*x.shape[:-1], -1)), self.w_down[...])


# --- the formula


def test_scales_balance_activations_and_weights():
    rng = np.random.default_rng(0)
    a, w = np.exp(rng.normal(size=(2, 16)))
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = smooth_quant.compute_scales_ratio(jnp.asarray(a), jnp.asarray(w), alpha)
        np.testing.assert_allclose(found, a**alpha / w ** (1 - alpha), rtol=1e-5)
    half = smooth_quant.compute_scales_ratio(jnp.asarray(a), jnp.asarray(w), 0.5)
    np.testing.assert_allclose(a / half, w * half, rtol=1e-5)  # equation 4 at 0.5: equal ranges on both sides


def test_features_without_activations_or_weights_are_left():
    found = smooth_quant.compute_scales_ratio(jnp.array([0.0, 4.0, 0.0, 9.0]), jnp.array([0.0, 0.0, 2.0, 1.0]), 0.5)
    assert found.tolist() == [1, 1, 1, 3]


# --- the whole way


@pytest.fixture(scope="module")
def model_and_inputs() -> tuple[nnx.Module, nnx.Module, jax.Array]:
    model, x = Norms(nnx.Rngs(0)), activations(2, 16, WIDTH)
    return model, quantized_with(model, x), x


def test_better_than_round_to_nearest(model_and_inputs):
    model, quantized, x = model_and_inputs
    nearest = rounded(model, x)
    for inputs in (x, activations(2, 16, WIDTH, seed=1)):
        assert error(quantized(inputs), model(inputs)) < 0.75 * error(nearest(inputs), model(inputs))


def test_weights_and_scales_in_numpy(model_and_inputs):
    model, quantized, x = model_and_inputs
    weight = np.asarray(model.w_up[...], np.float64)
    absmax = np.abs(np.asarray(x, np.float64)).max((0, 1))
    scale = np.sqrt(absmax / np.abs(weight).max((0, 1)))
    found = quantized.w_up.value
    assert type(found) is WithSqScale
    assert found.contracting_axis == 2
    np.testing.assert_allclose(found.inv_sq_scale, 1 / scale, rtol=1e-5)
    steps = np.abs(weight * scale).max(-1, keepdims=True) / 127.5
    np.testing.assert_allclose(found.array.scale, steps, rtol=1e-5)
    np.testing.assert_allclose(found.array.qvalue, np.round(weight * scale / steps), atol=1)
    np.testing.assert_allclose(jnp.asarray(found), weight, atol=float((steps / scale).max()))


def test_activations_are_quantized_after_the_scale(model_and_inputs):
    """In NumPy: int8 activations of a token after the multiplication, an integer matmul, and both scales."""
    model, _, _ = model_and_inputs
    linear, x = nnx.Linear(WIDTH, 8, use_bias=False, rngs=nnx.Rngs(0)), activations(16, WIDTH)
    quantized = quantized_with(linear, x)
    kernel = quantized.kernel.value
    smooth = np.asarray(x) * np.asarray(kernel.inv_sq_scale)
    steps = np.abs(smooth).max(1, keepdims=True) / np.float32(127.5)
    codes = np.clip(np.round(smooth / steps), -128, 127)
    expected = codes @ np.asarray(kernel.array.qvalue, np.float64) * steps * np.asarray(kernel.array.scale)
    # A largest element lies on a tie, and float32 decides which way it goes.
    assert error(quantized(x), expected) < 0.5 * error(linear(x), expected)
    graphdef, state = nnx.split(quantized)
    text = str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x))
    assert "preferred_element_type=int32" in text


def test_alpha_is_that_of_each_rule(model_and_inputs):
    model, _, x = model_and_inputs
    rules = [rule(module_path="up", alpha=0.8), rule(alpha=0.25)]

    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 4, rngs=rngs)

        def __call__(self, x):
            return self.down(self.up(x))

    two = Two(nnx.Rngs(0))
    quantized = quantized_with(two, x, rules=rules)
    for layer, inputs, alpha in (("up", x, 0.8), ("down", two.up(x), 0.25)):
        weights = np.abs(getattr(two, layer).kernel[...]).max(1)
        expected = np.abs(np.asarray(inputs)).max((0, 1)) ** alpha / weights ** (1 - alpha)
        np.testing.assert_allclose(1 / getattr(quantized, layer).kernel.value.inv_sq_scale, expected, rtol=1e-4)


def test_several_batches_are_averaged():
    model, batches = nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0)), [activations(4, WIDTH, seed=i) for i in range(3)]
    observed = qwix.quantize_model(model, smooth_quant.SqCalibrationProvider([rule()]), batches[0])
    for batch in batches:
        observed(batch)
    stat = observed.kernel_sq.get_value()
    assert int(stat["count"]) == 3
    np.testing.assert_allclose(stat["sum_of_act_absmax"], sum(np.abs(b).max(0) for b in batches), rtol=1e-6)


def test_weights_without_statistics_and_other_rules():
    model, x = nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0)), activations(4, WIDTH)
    quantized = qwix.quantize_model(model, smooth_quant.SqInferenceProvider([rule()]), x)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, smooth_quant.quantize_params(params, quantized, {}))
    assert np.all(quantized.kernel.value.inv_sq_scale == 1)
    np.testing.assert_allclose(quantized(x), rounded(model, x)(x), rtol=1e-5, atol=1e-5)
    plain = qwix.quantize_model(
        model, smooth_quant.SqInferenceProvider([qwix.QuantizationRule(weight_qtype="int8")]), x
    )
    assert type(plain.kernel) is ptq.WithAux
    stats = {
        "kernel_sq": {"count": jnp.array(1), "sum_of_act_absmax": jnp.ones(WIDTH), "sum_of_alpha": jnp.ones(WIDTH)}
    }
    with pytest.raises(ValueError, match="kernel has statistics.*SqInferenceProvider.*SqRule"):
        smooth_quant.quantize_params(params, plain, stats)


def test_layouts_carry_the_scale():
    how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,))
    array = qarray.quantize(jax.random.normal(jax.random.key(0), (3, 6)), how)
    w = WithSqScale(array, how, inv_sq_scale=jnp.arange(1.0, 7), contracting_axis=1)
    expected = qarray.dequantize(array) * jnp.arange(1.0, 7)
    np.testing.assert_allclose(jnp.asarray(w.T), expected.T, rtol=1e-6)
    np.testing.assert_allclose(jnp.asarray(w.reshape(3, 2, 3)), expected.reshape(3, 2, 3), rtol=1e-6)
    assert (w.T.contracting_axis, w.reshape(3, 2, 3).contracting_axis) == (0, (1, 2))
    assert len(jax.tree.leaves(w)) == 3


def test_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(WIDTH, name="a")(x))
            return jnp.einsum("bd,ed->be", x, self.param("w", nn.initializers.normal(), (6, WIDTH)))

    model, x = Net(), activations(16, WIDTH)
    params = model.init(jax.random.key(0), x)["params"]
    observed = qwix.quantize_model(model, smooth_quant.SqCalibrationProvider([rule()]))
    _, updated = observed.apply({"params": params}, x, mutable="quant_stats")
    quantized = qwix.quantize_model(model, smooth_quant.SqInferenceProvider([rule()]))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    result = smooth_quant.quantize_params(params, abstract, updated["quant_stats"])
    assert type(result["a"]["kernel"]) is type(result["w"]) is WithSqScale
    expected = model.apply({"params": params}, x)
    nearest = quantized.apply({"params": ptq.quantize_params(params, abstract)}, x)
    assert error(quantized.apply({"params": result}, x), expected) < 0.75 * error(nearest, expected)
