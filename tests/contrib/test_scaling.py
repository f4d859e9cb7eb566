"""AWQ and SmoothQuant in one call: folded scales, shared ones, and those that stay with their weight."""

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
from qwix.contrib import awq, awq_core, input_scale, smooth_quant

WIDTH = 64
AWQ = [awq.AwqRule(weight_qtype="int4", tile_size=32)]
SQ = [smooth_quant.SqRule(weight_qtype="int8", act_qtype="int8")]


class Block(nnx.Module):
    """A norm before a gated perceptron; what goes in has features of very different sizes."""

    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        sizes = np.exp(1.5 * np.random.default_rng(9).normal(size=WIDTH))
        self.norm.scale.set_value(jnp.asarray(sizes, jnp.float32))
        make = lambda i, o: nnx.Linear(i, o, use_bias=False, rngs=rngs)  # noqa: E731
        self.gate, self.up, self.down = make(WIDTH, 96), make(WIDTH, 96), make(96, WIDTH)
        self.first = make(WIDTH, WIDTH)

    def __call__(self, x):
        y = self.norm(self.first(x))
        return self.down(nnx.silu(self.gate(y)) * self.up(y))


def batches(count: int = 3, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(5).normal(size=(WIDTH, WIDTH)) / 8
    return [jnp.asarray(rng.normal(size=(32, WIDTH)) @ mixing, jnp.float32) for _ in range(count)]


def error(found: Any, expected: Any) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.fixture(scope="module")
def block() -> nnx.Module:
    return Block(nnx.Rngs(0))


CASES = {"awq": (awq, AWQ, awq.WithAwqScale, 0.95), "smooth_quant": (smooth_quant, SQ, smooth_quant.WithSqScale, 0.9)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_call(case, block):
    method, rules, scaled, limit = case
    quantized = method.quantize(block, iter(batches()), rules)
    # The input of the model has nothing before it that could take a scale.
    assert type(quantized.first.kernel) is scaled
    assert all(type(layer.kernel) is ptq.WithAux for layer in (quantized.gate, quantized.up, quantized.down))
    (x,) = batches(1, seed=1)
    nearest = qwix.quantize_model(block, ptq.PtqProvider(rules), x)
    assert error(quantized(x), block(x)) < limit * error(nearest(x), block(x))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_smoothed_models_have_the_same_outputs(case, block):
    method, rules, _, _ = case
    smoothed, left = method.smooth(block, batches(), rules)
    assert list(left) == ["first/kernel"]
    (x,) = batches(1, seed=1)
    np.testing.assert_allclose(smoothed(x), block(x), rtol=1e-3, atol=1e-4)
    up, gate, down = (getattr(smoothed, n).kernel[...] / getattr(block, n).kernel[...] for n in ("up", "gate", "down"))
    np.testing.assert_allclose(gate[:, 0] * smoothed.norm.scale[...], block.norm.scale[...], rtol=1e-4)
    # The weights of one input have one scale; the columns of `up` have that of `down` as well.
    np.testing.assert_allclose(up, gate / down[:, 0], rtol=1e-4)
    assert not np.allclose(gate, 1, atol=0.1)


def test_smoothing_scales_in_numpy(block):
    smoothed, _ = smooth_quant.smooth(block, batches(), SQ)
    inputs = [np.asarray(block.norm(block.first(x)), np.float64) for x in batches()]
    act = np.mean([np.abs(x).max(0) for x in inputs], 0)
    weights = np.maximum(*(np.abs(layer.kernel[...]).max(1) for layer in (block.gate, block.up)))
    expected = np.sqrt(act / weights)
    ratio = smoothed.gate.kernel[...] / block.gate.kernel[...]
    np.testing.assert_allclose(ratio, np.broadcast_to(expected[:, None], ratio.shape), rtol=1e-3)


def test_searched_alphas_make_the_smallest_error(block):
    """Of the candidates, on the layer whose samples are those of the one batch; against NumPy's idea of the error."""
    (x,) = batches(1)
    found = smooth_quant.quantize(block, [x], SQ, n_grid=5).first.kernel.value.inv_sq_scale
    w, act = np.asarray(block.first.kernel[...], np.float64), np.asarray(x, np.float64)

    def nearest(a: Any, axis: int) -> Any:
        scale = np.abs(a).max(axis, keepdims=True) / 127.5
        return np.clip(np.round(a / scale), -128, 127) * scale

    candidates, errors = [], []
    for alpha in np.linspace(0, 1, 5):
        s = np.abs(act).max(0) ** alpha / np.abs(w).max(1) ** (1 - alpha)
        candidates.append(s)
        errors.append(np.linalg.norm(nearest(act / s, 1) @ nearest(w * s[:, None], 0) - act @ w))
    np.testing.assert_allclose(1 / found, candidates[int(np.argmin(errors))], rtol=1e-3)


def test_one_grid_point_without_clipping_is_round_to_nearest(block):
    rules = [awq.AwqRule(weight_qtype="int4", tile_size=32, n_grid=1)]
    quantized = awq.quantize(block, batches(1), rules, n_clip=0)
    nearest = qwix.quantize_model(block, ptq.PtqProvider(rules), batches(1)[0])
    assert np.array_equal(quantized.up.kernel.array.qvalue[...], nearest.up.kernel.array.qvalue[...])
    assert np.all(quantized.first.kernel.value.awq_scale == 1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linen(case):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, flip=False):
            x = nn.LayerNorm(name="norm")(-x if flip else x)
            return nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(WIDTH, name="up")(x)))

    method, rules, _, _ = case
    model, (x,) = Net(), batches(1)
    variables = model.init(jax.random.key(0), x)
    quantized, result = method.quantize(model, [{"x": b} for b in batches()], rules, variables=variables)
    assert type(result["params"]["up"]["kernel"]) is ptq.WithAux
    expected = model.apply(variables, x)
    assert error(quantized.apply(result, x), expected) < 0.2
    smoothed, left = method.smooth(model, batches(), rules, variables=variables)
    assert not left
    np.testing.assert_allclose(model.apply(smoothed, x), expected, rtol=1e-3, atol=1e-4)


def test_no_batches(block):
    with pytest.raises(ValueError, match="no calibration batch"):
        awq.quantize(block, [], AWQ)
    with pytest.raises(ValueError, match="needs variables"):
        awq.quantize(nn.Dense(2), [], AWQ)


# --- the search on the error of the output


def problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(32, 200)) + rng.normal(size=(1, 200))) * np.exp(rng.normal(size=(32, 1)))
    w = rng.normal(size=(8, 32))
    return tuple(jnp.asarray(a, jnp.float32) for a in (w, x @ x.T, np.abs(x).mean(1)))


HOW = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,), tiled_axes={1: 8})


def test_output_errors_are_those_of_the_result():
    w, h, a = problem()
    candidates = awq_core.grid(a, 5)
    found = awq_core.output_errors(w, h, candidates, HOW)
    for s, loss in zip(candidates, found, strict=True):
        e = np.asarray(qarray.dequantize(input_scale.quantize_scaled(w, s, HOW)) / s - w, np.float64)
        np.testing.assert_allclose(loss, np.trace(e @ np.asarray(h, np.float64) @ e.T), rtol=1e-3)


@pytest.mark.parametrize("how", [HOW, qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,))])
def test_clipping_is_the_best_share_of_each_group(how):
    w, h, _ = problem()
    found = awq_core.clip(w, h, how, n_clip=5)
    shares = np.linspace(1, 0.5, 6)
    tile, nearest = how.tiled_axes.get(1, 32), qarray.quantize(w, how).scale
    losses = []
    for share in shares:
        rounded = qarray.dequantize(qarray.quantize_with_scale_zero_point(w, "int4", nearest * share, None))
        e = np.asarray(rounded - w, np.float64).reshape(8, -1, tile)
        blocks = np.stack([np.asarray(h, np.float64)[i : i + tile, i : i + tile] for i in range(0, 32, tile)])
        losses.append(np.einsum("rgi,gij,rgj->rg", e, blocks, e))
    chosen = np.abs(shares[:, None, None] - np.asarray(found.scale / nearest)).argmin(0)
    best = np.min(losses, 0)
    assert np.all(np.take_along_axis(np.stack(losses), chosen[None], 0)[0] <= best * 1.001)
    assert np.mean(best < losses[0]) > 0.3


def test_second_moments_in_the_provider_level_statistics(block):
    (x,) = batches(1)
    observed = qwix.quantize_model(block, awq.AwqCalibrationProvider(AWQ, second_moments=True), x)
    observed(x)
    stats = nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat))
    np.testing.assert_allclose(stats["first"]["kernel_awq"]["sum_of_hessian"], x.T @ x, rtol=1e-4, atol=1e-4)
    quantized = qwix.quantize_model(block, awq.AwqInferenceProvider(AWQ), x)
    nnx.update(quantized, awq.quantize_params(nnx.to_pure_dict(nnx.state(block, nnx.Param)), quantized, stats))
    nearest = qwix.quantize_model(block, ptq.PtqProvider(AWQ), x)
    assert error(quantized.first(x), block.first(x)) <= error(nearest.first(x), block.first(x)) * 1.001
