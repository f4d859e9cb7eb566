"""Weights that go through the arguments of JAX's transforms inside a model, and operands that only look like some."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src import qconfig

X = jax.random.normal(jax.random.key(0), (3, 4))
INT8 = {"weight_qtype": jnp.int8}


@jax.jit
def jitted(x, w):
    return x @ w


@jax.checkpoint
def checkpointed(x, w):
    return jnp.dot(x, w)


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def scanned(x, w):
    return jax.lax.scan(lambda c, w: (c, x @ w), 0, w[None])[1][0]


CALLS = {
    "jit": jitted,
    "jit by keyword": lambda x, w: jitted(x=x, w=w),
    "jit in jit": jax.jit(lambda x, w: jitted(x, w.T.T)),
    "jit with static arguments": lambda x, w: jax.jit(lambda n, x, w: x @ w, static_argnums=0)("static", x, w),
    "jit of a tree": lambda x, w: jax.jit(lambda tree: tree["x"] @ tree["w"])({"x": x, "w": w}),
    "jit around": lambda x, w: jax.jit(lambda x: x @ w)(x),
    "jit of jnp.dot": jax.jit(jnp.dot),
    "checkpoint": checkpointed,
    "jit of checkpoint": jax.jit(checkpointed),
    "custom_vjp": with_vjp,
    "cond": lambda x, w: jax.lax.cond(x[0, 0] < 9, lambda x, w: x @ w, lambda x, w: 2 * (x @ w), x, w),
    "switch": lambda x, w: jax.lax.switch(0, [lambda x, w: x @ w] * 2, x, w),
    "vmap": lambda x, w: jax.vmap(lambda x, w: x @ w, (0, None))(x, w),
    "scan around": lambda x, w: jax.lax.scan(lambda c, x: (c, x @ w), 0, x)[1],
    "map around": lambda x, w: jax.lax.map(lambda x: x @ w, x),
    "fori_loop around": lambda x, w: jax.lax.fori_loop(0, 1, lambda _, y: x @ w, jnp.zeros((3, 5))),
    "value_and_grad": lambda x, w: jax.value_and_grad(lambda x: ((y := x @ w).sum(), y), has_aux=True)(x)[0][1],
}


class NnxModel(nnx.Module):
    def __init__(self, call, shape=(4, 5), rngs=None):
        self.call = call
        self.w = nnx.Param(jax.random.normal(jax.random.key(1), shape))

    def __call__(self, x):
        return self.call(x, self.w[...])


class LinenModel(nn.Module):
    call: object
    shape: tuple = (4, 5)

    @nn.compact
    def __call__(self, x):
        return self.call(x, self.param("w", nn.initializers.normal(), self.shape))


def provider(**rule):
    return qwix.PtqProvider([qwix.QuantizationRule(**(rule or INT8))])


def dequantized(w, **kwargs):
    return qwix.dequantize(qwix.quantize(w, jnp.int8, **kwargs))


@pytest.mark.parametrize("name", CALLS)
def test_nnx_weight_through_a_transform(name):
    model = NnxModel(CALLS[name])
    quantized = qwix.quantize_model(model, provider(), X)
    assert isinstance(quantized.w, qwix._src.providers.ptq.WithAux), "the weight was not found"
    expected = X @ dequantized(model.w[...], channelwise_axes=(1,))
    np.testing.assert_allclose(quantized(X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(quantized, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("traced", [True, False], ids=["eval_shape", "eager"])
@pytest.mark.parametrize("name", CALLS)
def test_linen_weight_through_a_transform(name, traced):
    model = LinenModel(CALLS[name])
    params = model.init(jax.random.key(2), X)["params"]
    quantized = qwix.quantize_model(model, provider())
    init = functools.partial(quantized.init, jax.random.key(2), X)
    variables = jax.eval_shape(init) if traced else init()
    assert isinstance(variables["params"]["w"], qwix._src.providers.ptq.WithAux), "the weight was not found"
    q = qwix.quantize_params(params, variables["params"])
    if not traced:
        jax.tree.map(np.testing.assert_array_equal, q, variables["params"])
    expected = X @ dequantized(params["w"], channelwise_axes=(1,))
    np.testing.assert_allclose(quantized.apply({"params": q}, X), expected, rtol=1e-5, atol=1e-5)


def test_weights_as_the_xs_of_a_scan():
    def call(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    model = NnxModel(call, (2, 4, 4))
    quantized = qwix.quantize_model(model, provider(), X)
    assert quantized.w.array.scale.shape == (2, 1, 4)
    expected = X
    for w in model.w[...]:
        expected = expected @ dequantized(w, channelwise_axes=(1,))
    np.testing.assert_allclose(quantized(X), expected, rtol=1e-5)

    linen = LinenModel(call, (2, 4, 4))
    for variables in (
        qwix.quantize_model(linen, provider()).init(jax.random.key(0), X),
        jax.eval_shape(qwix.quantize_model(linen, provider()).init, jax.random.key(0), X),
    ):
        assert variables["params"]["w"].array.scale.shape == (2, 1, 4)


class TwoRules(nnx.Module):
    """Two layers that share a jitted helper, and have equal shapes."""

    def __init__(self, call):
        self.a = NnxModel(call, (4, 4))
        self.b = NnxModel(call, (4, 4))
        self.c = NnxModel(call, (4, 4))

    def __call__(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("name", ["jit", "checkpoint", "custom_vjp", "jit of jnp.dot", "jit of checkpoint"])
def test_a_shared_helper_follows_the_rule_of_each_module(name):
    rules = [
        qwix.QuantizationRule(module_path="a", weight_qtype=jnp.int8, act_qtype=jnp.int8),
        qwix.QuantizationRule(module_path="b", weight_qtype=jnp.int4),
    ]
    p = qwix.PtqProvider(rules)
    quantized = qwix.quantize_model(TwoRules(CALLS[name]), p, X)
    assert not p.get_unused_rules()
    assert quantized.a.w.array.qvalue.dtype == jnp.int8
    assert quantized.b.w.array.qvalue.dtype == jnp.int4
    assert isinstance(quantized.c.w, nnx.Param)
    plain = qwix.quantize_model(TwoRules(lambda x, w: x @ w), p, X)
    for _ in range(2):  # a second time with warm caches
        np.testing.assert_allclose(quantized(X), plain(X), rtol=1e-5)
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(quantized, X), plain(X), rtol=1e-5)


def test_jit_of_activations_follows_the_rule_of_each_module():
    """As `jax.nn.dot_product_attention` does: no weight, but quantized activations."""

    class Attend(nnx.Module):
        def __call__(self, q, k):
            return jitted(q, k)

    class Model(nnx.Module):
        def __init__(self):
            self.a, self.b, self.c = Attend(), Attend(), Attend()

        def __call__(self, x):
            return self.a(x, x.T), self.b(x, x.T), self.c(x, x.T)

    rules = [
        qwix.QuantizationRule(module_path="a", act_qtype=jnp.int8),
        qwix.QuantizationRule(module_path="b", act_qtype=jnp.int4),
    ]
    quantized = qwix.quantize_model(Model(), qwix.PtqProvider(rules), X)
    exact = X @ X.T
    for run in (lambda: quantized(X), lambda: jax.jit(quantized)(X)):
        for _ in range(2):
            a, b, c = (np.abs(y - exact).max() for y in run())
            assert c < 1e-5
            assert 1e-4 < a < b
    np.testing.assert_array_equal(jitted(X, X.T), exact)


def test_op_ids_count_calls_of_a_jitted_helper():
    class Model(nnx.Module):
        def __init__(self):
            self.w1 = nnx.Param(jnp.ones((4, 4)))
            self.w2 = nnx.Param(jnp.ones((4, 4)))

        def __call__(self, x):
            return jitted(jitted(x, self.w1[...]), self.w2[...])

    p = provider(**INT8)
    quantized = qwix.quantize_model(Model(), p, X)
    assert [op for _, op in type(quantized)._qwix_records[p]] == ["dot_general0", "dot_general1"]
    assert quantized.w1.array.qvalue.dtype == quantized.w2.array.qvalue.dtype == jnp.int8


COMPUTED = {
    "mask": lambda x, w: x @ (w * (w > 0)),
    "weight norm": lambda x, w: x @ (w / jnp.linalg.norm(w, axis=0)),
    "through jit": lambda x, w: jitted(x, w * 2),
    "result of jit": lambda x, w: x @ jax.jit(lambda w: 2 * w)(w),
    "in scan": lambda x, w: jax.lax.scan(lambda c, x: (c, x @ (w * 2)), 0, x)[1],
    "einsum": lambda x, w: jnp.einsum("ij,jk", x, w + 1),
    "flipped": lambda x, w: x @ w[::-1],
    "in vmap": jax.vmap(lambda x, w: x @ (2 * w), (0, None)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weight_is_warned_of(name):
    with pytest.warns(qconfig.QuantizationWarning, match=r"the root module, \w+0: .* computed from w,.* activation"):
        qwix.quantize_model(NnxModel(COMPUTED[name]), provider(), X)
    quantized = qwix.quantize_model(LinenModel(COMPUTED[name]), provider())
    with pytest.warns(qconfig.QuantizationWarning, match="computed from w,"):
        jax.eval_shape(quantized.init, jax.random.key(0), X)


def test_argument_of_a_transform_that_is_not_followed_is_warned_of():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P()

    def call(x, w):
        return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(x, w)

    with pytest.warns(qconfig.QuantizationWarning, match="may be.* w, "):
        qwix.quantize_model(NnxModel(call), provider(), X)


class Attention(nnx.Module):
    def __init__(self):
        self.q = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.latents = nnx.Param(jnp.ones((3, 4)))

    def __call__(self, x):
        q = self.q(x)
        scores = jax.nn.softmax(jnp.einsum("ik,jk->ij", q, q) + jnp.tril(jnp.ones((3, 3))))
        scores = scores @ jnp.eye(3)
        x = jax.lax.fori_loop(0, 2, lambda _, y: scores @ y, x)  # x has the shape of the latents
        x = jax.jit(lambda x: scores @ x)(x)
        x, _ = jax.lax.scan(lambda c, _: (scores @ c, None), x, None, 2)
        return x + self.q(self.latents[...])  # a weight is there: the latents are the activation


def test_no_false_alarms():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qwix.quantize_model(Attention(), provider(), X)
        model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
        qwix.quantize_model(model, provider(), X)
        linen = qwix.quantize_model(nn.MultiHeadDotProductAttention(2), provider())
        jax.eval_shape(linen.init, jax.random.key(0), X)
        linen.init(jax.random.key(0), X)
