"""QEP against its formula in float64, and on models: nearer to the float model than without the correction."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import qwix
from qwix.contrib import qep, qep_core


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_core_is_the_formula():
    X_q, X, W = (np.asarray(normal(*s, seed=i), np.float64) for i, s in enumerate([(6, 40), (6, 40), (3, 6)]))
    stats = qep_core.compute_qep_stats(jnp.asarray(X_q, jnp.float32), jnp.asarray(X, jnp.float32))
    H, H_delta = X_q @ X_q.T, (X - X_q) @ X_q.T
    np.testing.assert_allclose(stats["hessian"], H, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["hessian_delta"], H_delta, rtol=1e-4, atol=1e-4)
    damped = H + np.eye(6) * 0.01 * np.mean(np.diag(H))
    want = W + 0.5 * W @ H_delta @ np.linalg.inv(damped)
    W32 = jnp.asarray(W, jnp.float32)
    np.testing.assert_allclose(qep_core.weight_correct(W32, *stats.values()), want, rtol=1e-4, atol=1e-4)
    # In full and without damping it is the least-squares solution.
    full = qep_core.weight_correct(W32, *stats.values(), correction_factor=1.0, damping_factor=0.0)
    least_squares = np.linalg.lstsq(X_q.T, (W @ X).T, rcond=None)[0].T
    np.testing.assert_allclose(full, least_squares, rtol=1e-3, atol=1e-4)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(4)])

    def __call__(self, x):
        for layer in self.layers:
            x = x + nnx.relu(layer(x))
        return x


def rules(**kwargs):
    return [qep.QepRule(weight_qtype="int3", **kwargs)]


def test_nnx():
    model, x = Net(), normal(256, 16)
    batches = [{"x": x[:128]}, {"x": x[128:]}]
    want = model(x)
    errors, results = {}, {}
    for name, rule in {"qep": rules(correction_factor=1.0), "gptq": rules(apply_correction=False)}.items():
        results[name] = qep.quantize(model, iter(batches), rule)
        errors[name] = float(jnp.linalg.norm(results[name].model(x) - want))
    assert errors["qep"] < 0.97 * errors["gptq"]
    result = results["qep"]
    assert [stage.index for stage in result.stages] == [0, 1, 2, 3]
    assert result.stages[1].param_paths == (("layers", "1", "kernel"),)
    assert result.stages[1].module_paths == ("layers/1",)
    first = result.quant_stats["layers"][0]["kernel_qep"]
    np.testing.assert_array_equal(first["sum_of_hessian_delta"], 0)
    # The statistics are all that `quantize_params` needs for the same weights.
    again = qwix.quantize_model(model, qwix.PtqProvider(rules()), x)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(again, qep.quantize_params(params, again, result.quant_stats, correction_factor=1.0))
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state(result.model))
    )


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.relu(nn.Dense(16, name="a")(x)))


def test_linen_and_a_batch_adapter():
    model, x = LinenNet(), normal(64, 8)
    variables = model.init(jax.random.key(0), x)
    result = qep.quantize(
        model, [{"inputs": x}], rules(), variables=variables, batch_adapter=lambda batch: (batch["inputs"],)
    )
    assert [stage.module_paths for stage in result.stages] == [("a",), ("b",)]
    assert result.model.apply({"params": result.params}, x).shape == (64, 4)


def test_zeros_are_kept():
    model, x = Net(), normal(256, 16)
    zeros = np.asarray(normal(16, 16, seed=3)) < 0
    model.layers[1].kernel[...] = jnp.where(zeros, 0, model.layers[1].kernel[...])
    result = qep.quantize(model, [x[:128], x[128:]], rules(), keep_zeros=True)
    np.testing.assert_array_equal(np.asarray(result.model.layers[1].kernel.array.qvalue[...])[zeros], 0)
