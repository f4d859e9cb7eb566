"""Wanda and SparseGPT against NumPy in float64, and in models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix import recipes
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix.contrib import gptq_core, observing, pruning, rotation, sparsegpt, wanda
from qwix.contrib.pruning import PruningRule


def problem(rows=6, columns=16, samples=64):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(rows, columns))
    x = (
        rng.normal(size=(columns, columns))
        @ rng.normal(size=(columns, samples))
        * np.exp(rng.normal(size=(columns, 1)))
    )
    return w, x


def sparsegpt_oracle(w, h, n, m, rate, size, quantize=lambda w, j: w, damp=0.01):
    """Algorithm 1 of the paper, column by column, in float64."""
    w = w.copy()
    rows, columns = w.shape
    h = h + damp * np.mean(np.diag(h)) * np.eye(columns)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    v, mask = np.zeros_like(w), np.ones(w.shape, bool)
    for j in range(columns):
        if m and j % m == 0:
            scores = (w[:, j : j + m] / np.diag(u)[j : j + m]) ** 2
            order = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
            mask[:, j : j + m] = order < n
        elif not m and j % size == 0:
            scores = (w[:, j : j + size] / np.diag(u)[j : j + size]) ** 2
            number = round(rate * scores.size)
            mask[:, j : j + size] = scores > np.sort(scores.ravel())[number - 1]
        v[:, j] = np.where(mask[:, j], quantize(w[:, j], j), 0)
        w[:, j:] -= np.outer((w[:, j] - v[:, j]) / u[j, j], u[j, j:])
    return v, mask


def output_error(w, v, x):
    return np.linalg.norm((np.asarray(w) - np.asarray(v)) @ x) / np.linalg.norm(np.asarray(w) @ x)


@pytest.mark.parametrize(("n", "m", "rate", "size"), [(2, 4, 0.0, 8), (0, 0, 0.5, 8), (0, 0, 0.4, 12)])
def test_sparsegpt_is_the_paper_s(n, m, rate, size):
    w, x = problem()
    h = x @ x.T / x.shape[1]
    expected, mask = sparsegpt_oracle(w, h, n, m, rate, size)
    found, found_mask = sparsegpt.prune_weight(
        jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), n=n, m=m, prune_rate=rate, blocksize=size
    )
    np.testing.assert_array_equal(found_mask, mask)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    magnitude = np.where(pruning.kept(jnp.abs(jnp.asarray(w)), n, m, rate), w, 0)
    assert output_error(w, found, x) < output_error(w, magnitude, x)


def test_sparsegpt_with_quantization():
    w, x = problem()
    h = x @ x.T / x.shape[1]
    how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(0,), tiled_axes={1: 8})
    scale = np.asarray(gptq_core.find_params(jnp.asarray(w, jnp.float32), how)[0], np.float64)

    def rounded(column, j):
        return np.clip(np.round(column / scale[:, j // 8]), -8, 7) * scale[:, j // 8]

    expected, mask = sparsegpt_oracle(w, h, 2, 4, 0.0, 8, rounded)
    found, found_mask = sparsegpt.prune_weight(
        jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), how=how, blocksize=8
    )
    np.testing.assert_array_equal(found_mask, mask)
    np.testing.assert_allclose(qwix.dequantize(found), expected, atol=1e-3)
    assert found.qvalue.dtype == jnp.int4
    after = qarray.quantize(jnp.where(mask, jnp.asarray(w, jnp.float32), 0), how)
    assert output_error(w, qwix.dequantize(found), x) < output_error(w, qwix.dequantize(after), x)


def test_wanda_is_the_paper_s():
    w, x = problem()
    norms = np.linalg.norm(x, axis=1)
    scores = np.abs(w) * norms
    found = wanda.prune_weight(jnp.asarray(w, jnp.float32), jnp.asarray(norms, jnp.float32), m=0, prune_rate=0.25)
    expected = np.where(scores >= np.sort(scores, 1)[:, 4:5], w, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    equal = wanda.prune_weight(jnp.asarray(w, jnp.float32), jnp.ones(16), n=2, m=4)
    np.testing.assert_array_equal(np.asarray(equal) != 0, pruning.kept(jnp.abs(jnp.asarray(w)), 2, 4, 0))


@pytest.fixture(scope="module")
def layer():
    w, x = problem(8, 16, 64)
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.asarray(w.T, jnp.float32))
    return layer, jnp.asarray(x.T, jnp.float32)


def test_models(layer):
    model, x = layer
    batches = [x[:32], x[32:]]
    by_wanda = wanda.prune(model, [PruningRule()], batches)
    by_sparsegpt = sparsegpt.prune(model, [PruningRule()], iter(batches))
    h = np.asarray(x, np.float64).T @ np.asarray(x, np.float64) / 64
    expected = sparsegpt_oracle(np.asarray(model.kernel.get_value(), np.float64).T, h, 2, 4, 0, 8)[0].T
    np.testing.assert_allclose(by_sparsegpt.kernel.get_value(), expected, atol=2e-3)
    for pruned in (by_wanda, by_sparsegpt):
        groups = np.asarray(pruned.kernel.get_value()).T.reshape(8, 4, 4)
        assert np.all((groups != 0).sum(-1) == 2)
    error = lambda m: float(jnp.linalg.norm(m(x) - model(x)))  # noqa: E731
    assert error(by_sparsegpt) < error(by_wanda)
    assert np.all(np.asarray(model.kernel.get_value()) != 0)


class Experts(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 4)), jnp.float32))

    def __call__(self, x):
        return jax.lax.ragged_dot(x, self.w[...], jnp.array([24, 0]))


def test_experts_have_statistics_of_their_own():
    """Against each expert's matrix by itself; one without inputs is pruned by magnitude, and not to nothing."""
    _, x = problem(8, 8, 24)
    model, rows = Experts(), jnp.asarray(x.T, jnp.float32)
    w = np.asarray(model.w[...])
    by_wanda, by_sparsegpt = (np.asarray(m.prune(model, [PruningRule()], [rows]).w[...]) for m in (wanda, sparsegpt))
    norms, h = jnp.linalg.norm(rows, axis=0), rows.T @ rows / 24
    np.testing.assert_array_equal(by_wanda[0], wanda.prune_weight(w[0].T, norms).T)
    np.testing.assert_array_equal(by_wanda[1], wanda.prune_weight(w[1].T, jnp.ones(8)).T)
    np.testing.assert_allclose(by_sparsegpt[0], sparsegpt.prune_weight(w[0].T, h)[0].T, atol=1e-5)
    np.testing.assert_array_equal(by_sparsegpt[1], by_wanda[1])


def test_quantized_jointly_and_after_rotation(layer):
    model, x = layer
    for float_model in (model, rotation.rotate(model, x)):
        rules = [PruningRule(weight_qtype="int4")]
        stats, ((first,), _) = observing.observe(float_model, [x], sparsegpt.SparseGptCalibrationProvider(rules))
        quantized = qwix.quantize_model(float_model, ptq.PtqProvider(rules), first)
        params = nnx.to_pure_dict(nnx.state(float_model, nnx.Param))
        nnx.update(quantized, sparsegpt.quantize_params(params, quantized, stats))
        assert np.sum(np.asarray(quantized.kernel.value.array.qvalue) == 0) >= 64
        pruned = sparsegpt.prune_params(params, quantized, stats)
        leaf = pruned["kernel"]["array"] if float_model is not model else pruned["kernel"]
        assert np.sum(np.asarray(leaf) == 0) == 64


def test_errors(layer):
    model, x = layer
    with pytest.raises(ValueError, match="no calibration batch"):
        wanda.prune(model, [PruningRule()], [])
    with pytest.raises(ValueError, match="no rule prunes"):
        wanda.prune(model, [], [x])
    with pytest.raises(ValueError, match="all rules of one call"):
        wanda.prune(model, [PruningRule(module_path="a"), PruningRule(n=1)], [x])
    with pytest.raises(ValueError, match="no statistic named <weight>_wanda"):
        wanda.prune_params({}, model, {})
    with pytest.raises(ValueError, match="m must divide"):
        sparsegpt.prune_weight(jnp.ones((2, 6)), jnp.eye(6))


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x)))


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.mark.parametrize(("prune", "then"), [("wanda", "round-to-nearest"), ("sparsegpt", "gptq")])
def test_recipe_stages(layer, prune, then):
    """Two of four weights are zero after quantization too, in NNX as in Linen."""
    x = layer[1]
    recipe = recipes.Recipe(prune, [{"weight_qtype": "int8"}], [prune, then])
    model = Mlp(nnx.Rngs(0))
    quantized, _ = qwix.apply_recipe(model, recipe, x, calibration=[x[:32], x[32:]])
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    twin, _ = qwix.apply_recipe(LinenMlp(), recipe, x, variables=variables, calibration=[x[:32], x[32:]])
    np.testing.assert_allclose(quantized(x), twin(x), rtol=1e-4, atol=1e-5)
    for side in (quantized.up, quantized.down):
        codes = np.asarray(side.kernel.array.qvalue).T
        assert np.all((codes.reshape(len(codes), 4, 4) != 0).sum(-1) <= 2)
        assert np.mean(codes == 0) < 0.6
