"""QtProvider on Linen and NNX models: which ops are quantized how, statistics, training, and the way to PTQ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

DENSE = (((1,), (0,)), ((), ()))
W8A8 = {"weight_qtype": "int8", "act_qtype": "int8"}
FORMATS = {"lhs_qtype": "int8", "rhs_qtype": "int8"}


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x)))


def quantized(model, *inputs, **rule):
    return qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(**rule)]), *inputs)


def loss(model, x):
    return (model(x) ** 2).sum()


# ------------------------------------------------------------------ what runs


@pytest.mark.parametrize("bwd", [{}, {"bwd_qtype": "int8"}])
def test_nnx_and_linen_run_the_op(x, bwd):
    """Both give what `dot_general_qt` gives, forward and backward."""
    gradients = {f"{part}_grad_qtype": qtype for part in ("dlhs", "drhs") for qtype in bwd.values()}
    op = functools.partial(dot_general_qt, dimension_numbers=DENSE, config=DotGeneralQtConfig(**FORMATS, **gradients))

    def by_hand(params, x):
        hidden = nnx.relu(op(x, params["up"]["kernel"]) + params["up"]["bias"])
        return ((op(hidden, params["down"]["kernel"]) + params["down"]["bias"]) ** 2).sum()

    model = quantized(Mlp(nnx.Rngs(0)), x, **W8A8, **bwd)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    truth = jax.grad(by_hand)(params, x)
    found = nnx.to_pure_dict(nnx.grad(loss)(model, x))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, truth)
    linen = quantized(LinenMlp(), **W8A8, **bwd)
    found = jax.grad(lambda p: (linen.apply({"params": p}, x) ** 2).sum())(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, truth)


def test_parameters_stay_float_and_the_model_is_left_alone(x):
    model = Mlp(nnx.Rngs(0))
    before = model(x)
    copy = quantized(model, x, **W8A8)
    assert jax.tree.structure(nnx.state(copy)) == jax.tree.structure(nnx.state(model))
    np.testing.assert_array_equal(model(x), before)
    assert not np.array_equal(copy(x), before)


def test_rules_decide_about_weights_and_activations(x):
    rules = [
        qwix.QtRule(module_path="up", weight_qtype="int4", bwd_qtype="int8", bwd_weight_grad_tile_size=2),
        qwix.QuantizationRule(module_path="down", weight_qtype="int8"),
        qwix.QtRule(module_path="none"),
    ]
    provider = qwix.QtProvider(rules)
    model = qwix.quantize_model(Mlp(nnx.Rngs(0)), provider, x)
    assert [rule.module_path for rule in provider.get_unused_rules()] == ["none"]
    up = functools.partial(
        dot_general_qt,
        dimension_numbers=DENSE,
        config=DotGeneralQtConfig(rhs_qtype="int4", dlhs_grad_qtype="int8", drhs_grad_qtype="int8", drhs_tile_size=2),
    )
    kernel = model.up.kernel[...]
    found = nnx.grad(lambda m, x: m.up(x).sum())(qwix.quantize_model(model, provider, x), x).up.kernel[...]
    # Quantized twice over by the same rules would not be the same: the outer provider sees the op first.
    assert found.shape == kernel.shape
    direct = nnx.grad(lambda m, x: (m(x)).sum())(model, x).up.kernel[...]

    def by_hand(kernel):
        hidden = nnx.relu(up(x, kernel) + model.up.bias[...])
        config = DotGeneralQtConfig(rhs_qtype="int8")
        return dot_general_qt(hidden, model.down.kernel[...], DENSE, config).sum()

    np.testing.assert_allclose(direct, jax.grad(by_hand)(kernel), rtol=1e-5, atol=1e-5)
