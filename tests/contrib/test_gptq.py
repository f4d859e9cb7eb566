"""GPTQ of whole models: Hessians of every kind of op, and the quantized tree, for NNX and Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import qwix
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix.contrib import gptq, gptq_core

RULES = [gptq.GptqRule(weight_qtype=jnp.int4)]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Op(nnx.Module):
    def __init__(self, shape, fn):
        self.w, self.fn = nnx.Param(normal(*shape, seed=9)), fn

    def __call__(self, x):
        return self.fn(x, self.w[...])


def stats_of(model, *inputs):
    observed = qwix.quantize_model(model, gptq.GptqCalibrationProvider(RULES), *inputs)
    found = nnx.jit(lambda m, *a: m(*a))(observed, *inputs)
    np.testing.assert_allclose(found, model(*inputs), rtol=1e-4, atol=1e-4)
    return nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat))


def quantized(model, stats, *inputs):
    result = qwix.quantize_model(model, qwix.PtqProvider(RULES), *inputs)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(result, gptq.quantize_params(params, result, stats))
    return result


def gram(x):
    """x (samples, features)."""
    x = np.asarray(x, np.float64)
    return x.T @ x


def per_row(**kwargs):
    return qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), **kwargs)


def expected(w, hessian):
    """Codes of a weight (in, out), by `gptq_core` alone."""
    q, _ = gptq_core.quantize_weight(jnp.asarray(w).T, jnp.asarray(hessian, jnp.float32), per_row())
    return np.asarray(qarray.dequantize(q)).T


def patches(x, kernel):
    """Valid patches of (batch, length, channels), stride 1: (batch * positions, kernel * channels)."""
    x = np.asarray(x)
    rows = [x[:, i : i + kernel].reshape(len(x), -1) for i in range(x.shape[1] - kernel + 1)]
    return np.concatenate(rows)


def conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x, w, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=groups
    )


# name -> shape of x, shape of w, the op, [(index of a matrix (in, out) of w, its activations (samples, in))]
CASES = {
    "matmul": ((5, 6), (6, 3), lambda x, w: x @ w, lambda x: [((), x)]),
    "a batch axis": (
        (5, 2, 6),
        (2, 6, 3),
        lambda x, w: jnp.einsum("bhd,hdo->bho", x, w),
        lambda x: [(0, x[:, 0]), (1, x[:, 1])],
    ),
    "a batch axis in the middle": (
        (5, 2, 6),
        (6, 2, 3),
        lambda x, w: jnp.einsum("bhd,dho->bho", x, w),
        lambda x: [(np.s_[:, 0], x[:, 0]), (np.s_[:, 1], x[:, 1])],
    ),
    "a batch axis, transposed": (
        (5, 2, 6),
        (6, 3, 2),
        lambda x, w: jnp.einsum("bhd,hdo->bho", x, w.transpose(2, 0, 1)),
        lambda x: [(np.s_[:, :, 0], x[:, 0]), (np.s_[:, :, 1], x[:, 1])],
    ),
    "two call sites": ((5, 6), (6, 6), lambda x, w: (x @ w + x) @ w, None),
    "conv": ((2, 8, 3), (3, 3, 4), conv, lambda x: [((), patches(x, 3))]),
    "conv in feature groups": (
        (2, 8, 4),
        (3, 2, 6),
        lambda x, w: conv(x, w, 2),
        lambda x: [(np.s_[..., :3], patches(x[..., :2], 3)), (np.s_[..., 3:], patches(x[..., 2:], 3))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_matrix_has_its_hessian(name):
    x_shape, w_shape, fn, matrices = CASES[name]
    model, x = Op(w_shape, fn), normal(*x_shape)
    stats = stats_of(model, x)
    if matrices is None:
        first, second = np.asarray(x), np.asarray(x @ model.w[...] + x)
        matrices = lambda _: [((), np.sqrt(0.5) * np.concatenate([first, second]))]  # noqa: E731
    result = jnp.asarray(quantized(model, stats, x).w)
    for index, activations in matrices(np.asarray(x)):
        w = np.asarray(model.w[...])[index]
        matrix = w.reshape(-1, w.shape[-1])
        want = expected(matrix, gram(activations)).reshape(w.shape)
        np.testing.assert_allclose(result[index], want, atol=1e-5, err_msg=str(index))


SIZES = jnp.array([2, 0, 4])  # of the rows of each expert; one has none


class LinenExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        return lax.ragged_dot(x, self.param("w", nn.initializers.normal(), (3, 4, 5)), SIZES)


@pytest.mark.parametrize("linen", [False, True])
def test_experts(linen):
    x, model = normal(7, 4), Op((3, 4, 5), lambda x, w: lax.ragged_dot(x, w, SIZES))
    w = model.w[...]
    if linen:
        result = gptq.quantize(LinenExperts(), [x], RULES, variables={"params": {"w": w}})
        found, out = result.params["w"], result.model.apply({"params": result.params}, x)
    else:
        stat = stats_of(model, x)["w_gptq"]
        assert stat["count"].shape == (3, 1, 1)
        result = gptq.quantize(model, [x], RULES)
        found, out = result.model.w, result.model(x)
    found = jnp.asarray(found)
    for expert, rows in enumerate([x[:2], x[2:2], x[2:6]]):
        np.testing.assert_allclose(found[expert], expected(w[expert], gram(rows)), atol=1e-5)
        if not linen:
            np.testing.assert_allclose(stat["sum_of_hessian"][expert, 0, 0], gram(rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out, lax.ragged_dot(x, found, SIZES), rtol=1e-5, atol=1e-5)


def test_a_group_without_samples_is_rounded_to_nearest():
    w, how = normal(3, 8), per_row(calibration_method="absmax,1.02")  # so that no element lies on a rounding tie
    q, _ = gptq_core.quantize_weight(w, jnp.zeros((8, 8)), how)
    np.testing.assert_array_equal(q.qvalue, qarray.quantize(w, how).qvalue)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="a")(x))
        return nn.DenseGeneral(4, axis=(-2, -1), name="b")(x.reshape(x.shape[0], 4, 4))


def test_linen():
    x = normal(32, 8)
    model = Net()
    params = model.init(jax.random.key(0), x)["params"]
    rules = [gptq.GptqRule(weight_qtype=jnp.int4, tile_size=4)]
    observed = qwix.quantize_model(model, gptq.GptqCalibrationProvider(rules))
    stats = {}
    for batch in (x[:16], x[16:]):
        variables = {"params": params, "quant_stats": stats} if stats else {"params": params}
        _, new = observed.apply(variables, batch, mutable="quant_stats")
        stats = new["quant_stats"]
    np.testing.assert_allclose(stats["a"]["kernel_gptq"]["sum_of_hessian"], gram(x), rtol=1e-4)
    ptq_model = qwix.quantize_model(model, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(ptq_model.init, jax.random.key(0), x)["params"]
    by_gptq = gptq.quantize_params(params, abstract, stats, act_order=True)
    nearest = ptq.quantize_params(params, abstract)
    assert by_gptq["b"]["kernel"].array.scale.shape == nearest["b"]["kernel"].array.scale.shape
    want = model.apply({"params": params}, x)
    errors = [np.linalg.norm(ptq_model.apply({"params": p}, x) - want) for p in (by_gptq, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_other_rules_round_to_nearest():
    model, x = Op((6, 3), lambda x, w: x @ w), normal(5, 6)
    rules = [qwix.QuantizationRule(weight_qtype=jnp.int4)]
    observed = qwix.quantize_model(model, gptq.GptqCalibrationProvider(rules), x)
    observed(x)
    assert not nnx.state(observed, qwix.QuantStat)
    result = qwix.quantize_model(model, qwix.PtqProvider(rules), x)
    nearest = jnp.asarray(result.w)
    nnx.update(result, gptq.quantize_params({"w": model.w[...]}, result, {}))
    np.testing.assert_array_equal(jnp.asarray(result.w), nearest)
