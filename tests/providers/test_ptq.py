"""PTQ of whole layers and models, against quantize-dequantize written out in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.core import qarray
from qwix._src.providers.ptq import WithAux

KEY = jax.random.key(0)


def settle(tree):
    """Makes the large values of arrays positive. A negative peak is -(qmax + 0.5) * scale, a tie that XLA rounds as it
    happens to compute the quotient; a positive one saturates either way."""
    return jax.tree.map(lambda x: jnp.where(jnp.abs(x) < 0.2 * jnp.std(x), x, jnp.abs(x)), tree)


def settled(model):
    """An NNX model with such parameters."""
    nnx.update(model, settle(nnx.state(model, nnx.Param)))
    return model


def normal(*shape, seed=0, dtype=jnp.float32):
    return settle(jax.random.normal(jax.random.key(seed), shape, dtype))


def provider(**rule):
    return qwix.PtqProvider([qwix.QuantizationRule(**(rule or {"weight_qtype": jnp.int8}))])


def fake64(x, own=(), tile=None, bits=8, axis=None):
    """Symmetric integers of a NumPy array: scale = absmax / (qmax + 0.5), a scale for each index of the axes `own`, and
    for each tile of `tile` along `axis`."""
    x = np.asarray(x, np.float32).astype(np.float64)
    shape = x.shape
    if tile is not None:
        axis %= x.ndim
        x = x.reshape(*shape[:axis], shape[axis] // tile, tile, *shape[axis + 1 :])
        own = (*(a if a < axis else a + 1 for a in (o % len(shape) for o in own)), axis)
    else:
        own = tuple(o % x.ndim for o in own)
    reduced = tuple(a for a in range(x.ndim) if a not in own)
    absmax = np.abs(x).max(axis=reduced, keepdims=True)
    qmax = 2 ** (bits - 1) - 1
    # In float32 as stored; XLA divides by a constant through its reciprocal.
    scale = np.where(absmax == 0, 1, absmax).astype(np.float32) * np.float32(1 / (qmax + 0.5))
    q = np.clip(np.round(x.astype(np.float32) / scale), -qmax - 1, qmax)
    return (q * scale.astype(np.float64)).reshape(shape)


def close(a, b, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


def quantized_linen(model, rule_provider, params, *args, **kwargs):
    quantized = qwix.quantize_model(model, rule_provider)
    abstract = jax.eval_shape(functools.partial(quantized.init, **kwargs), KEY, *args)["params"]
    return quantized, qwix.quantize_params(params, abstract)


# --- dense layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize(
    "rule,bits,tile",
    [
        ({"weight_qtype": jnp.int8}, 8, None),
        ({"weight_qtype": jnp.int4}, 4, None),
        ({"weight_qtype": "int3"}, 3, None),
        ({"weight_qtype": jnp.int4, "tile_size": 4}, 4, 4),
        ({"weight_qtype": jnp.int4, "tile_size": 1 / 4}, 4, 2),
    ],
)
def test_weight_only_dense(framework, rule, bits, tile, use_bias):
    x = normal(3, 8)
    if framework == "linen":
        model = nn.Dense(5, use_bias=use_bias, bias_init=nn.initializers.normal())
        params = settle(model.init(KEY, x)["params"])
        quantized, q = quantized_linen(model, provider(**rule), params, x)
        y = quantized.apply({"params": q}, x)
        kernel, bias = params["kernel"], params.get("bias", 0.0)
    else:
        model = nnx.Linear(8, 5, use_bias=use_bias, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
        quantized = qwix.quantize_model(settled(model), provider(**rule), x)
        y = quantized(x)
        kernel, bias = model.kernel[...], model.bias[...] if use_bias else 0.0
    w = fake64(kernel, own=(1,), bits=bits, tile=tile, axis=0)
    close(y, np.asarray(x, np.float64) @ w + np.asarray(bias, np.float64))


def test_dynamic_range_has_a_scale_a_row():
    x, model = normal(3, 8) * jnp.array([[1], [10], [100]]), settled(nnx.Linear(8, 5, rngs=nnx.Rngs(0)))
    quantized = qwix.quantize_model(model, provider(weight_qtype=jnp.int8, act_qtype=jnp.int8), x)
    expected = fake64(x, own=(0,)) @ fake64(model.kernel[...], own=(1,))
    close(quantized(x), expected, atol=1e-4)
    close(jax.jit(lambda x: quantized(x))(x), expected, atol=1e-4)


def test_dtypes_are_those_of_the_float_model():
    x = normal(3, 8, dtype=jnp.bfloat16)
    for dtype, param_dtype in ((jnp.bfloat16, jnp.float32), (None, jnp.bfloat16), (jnp.float32, jnp.bfloat16)):
        for model in (
            nnx.Linear(8, 5, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)),
            nnx.LinearGeneral((8,), (5,), dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)),
            nnx.Einsum("ab,bc->ac", (8, 5), dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)),
        ):
            for rule in ({"weight_qtype": jnp.int8}, {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}):
                quantized = qwix.quantize_model(model, provider(**rule), x)
                assert isinstance(quantized.kernel, WithAux)
                assert quantized.kernel.array.scale.dtype == param_dtype
                assert quantized(x).dtype == model(x).dtype
                close(quantized(x), model(x), rtol=0.1, atol=0.1)


# --- the same weights from everywhere -------------------------------------------------------------

RULES = {
    "int8": {"weight_qtype": jnp.int8},
    "int4 tiles": {"weight_qtype": jnp.int4, "tile_size": 4},
    "minmax": {"weight_qtype": jnp.int8, "weight_calibration_method": "minmax"},
    "nf4": {"weight_qtype": "nf4", "tile_size": 8},
    "fp8": {"weight_qtype": jnp.float8_e4m3fn, "act_qtype": jnp.float8_e4m3fn},
    "mxfp4": {"weight_qtype": "mxfp4", "tile_size": 32},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_first_run_init_and_quantize_params_agree_bit_for_bit(rule):
    x = normal(3, 32)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 32), name="general")(x)
            x = nn.DenseGeneral(32, axis=(-2, -1), name="joined")(x)
            return nn.Dense(8, name="out")(x)

    class Nnx(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.general = nnx.LinearGeneral(32, (2, 32), rngs=rngs)
            self.joined = nnx.LinearGeneral((2, 32), 32, axis=(-2, -1), rngs=rngs)
            self.out = nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, x):
            return self.out(self.joined(self.general(x)))

    params = Linen().init(KEY, x)["params"]
    quantized, from_params = quantized_linen(Linen(), provider(**rule), params, x)
    from_init = quantized.init(KEY, x)["params"]
    assert jax.tree.structure(from_init) == jax.tree.structure(from_params)
    jax.tree.map(np.testing.assert_array_equal, from_init, from_params)

    model = Nnx()
    for name in ("general", "joined", "out"):
        getattr(model, name).kernel[...] = params[name]["kernel"]
    from_run = qwix.quantize_model(model, provider(**rule), x)
    abstract = nnx.eval_shape(lambda: qwix.quantize_model(Nnx(), provider(**rule), x))
    nnx.update(abstract, qwix.quantize_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)), abstract))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(abstract))) == jax.tree.structure(
        nnx.to_pure_dict(nnx.state(from_run))
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(abstract), nnx.state(from_run))
    for name in ("general", "joined", "out"):
        linen = jax.tree.leaves(from_params[name]["kernel"])
        same = jax.tree.leaves(getattr(from_run, name).kernel.value)
        jax.tree.map(np.testing.assert_array_equal, linen, same)
    # Linen and NNX jit nothing here, and run the same ops.
    close(quantized.apply({"params": from_params}, x), from_run(x))


# --- static range ---------------------------------------------------------------------------------

STATIC = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8, "act_static_scale": True}


def stats(x, count=1, asymmetric=False):
    reduce = functools.partial(np.mean, axis=0, keepdims=True)
    x = np.asarray(x)
    if asymmetric:
        return {
            "count": jnp.int32(count),
            "sum_of_min": count * reduce(np.minimum(x.min(-1, keepdims=True), 0)),
            "sum_of_max": count * reduce(np.maximum(x.max(-1, keepdims=True), 0)),
        }
    return {"count": jnp.int32(count), "sum_of_absmax": count * reduce(np.abs(x).max(-1, keepdims=True))}


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["absmax", "minmax"])
def test_static_range(framework, asymmetric):
    x, seen = normal(3, 8), normal(16, 8, seed=5)
    rule = STATIC | ({"act_calibration_method": "minmax"} if asymmetric else {})
    stat = stats(seen, count=7, asymmetric=asymmetric)
    if framework == "linen":
        model = nn.Dense(5)
        params = settle(model.init(KEY, x)["params"])
        quantized = qwix.quantize_model(model, provider(**rule))
        abstract = jax.eval_shape(quantized.init, KEY, x)["params"]
        q = qwix.quantize_params(params, abstract, {"dot_general0_lhs": stat})
        assert jax.tree.structure(q) == jax.tree.structure(abstract)
        y = quantized.apply({"params": q}, x)
        kernel, scale, zero_point = params["kernel"], q["dot_general0_lhs_scale"], q.get("dot_general0_lhs_zero_point")
    else:
        model = settled(nnx.Linear(8, 5, rngs=nnx.Rngs(0)))
        quantized = qwix.quantize_model(model, provider(**rule), x)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        nnx.update(quantized, qwix.quantize_params(params, quantized, {"dot_general0_lhs": stat}))
        y = quantized(x)
        kernel, scale = model.kernel[...], quantized.dot_general0_lhs_scale
        zero_point = getattr(quantized, "dot_general0_lhs_zero_point", None)
    assert isinstance(scale, WithAux) and scale.array.dtype == jnp.float32 and scale.shape == (1, 1)
    assert (zero_point is not None) == asymmetric
    x64 = np.asarray(x, np.float64)
    if asymmetric:
        low, high = float(stat["sum_of_min"][0, 0]) / 7, float(stat["sum_of_max"][0, 0]) / 7
        s = (high - low) / 255
        z = np.clip(np.round(-128 - low / s), -128, 127)
        x_fake = (np.clip(np.round(x64 / s + z), -128, 127) - z) * s
    else:
        s = float(stat["sum_of_absmax"][0, 0]) / 7 / 127.5
        x_fake = np.clip(np.round(x64 / s), -128, 127) * s
    close(y, x_fake @ fake64(kernel, own=(1,)), atol=2e-2 if asymmetric else 1e-4)


def test_static_range_without_statistics():
    x, model = normal(3, 8), nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    quantized = qwix.quantize_model(model, provider(**STATIC), x)
    # The first run's inputs gave the scales.
    expected = np.abs(np.asarray(x)).max(-1).mean() / 127.5
    close(quantized.dot_general0_lhs_scale.value.array, [[expected]])
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    empty = {"dot_general0_lhs": stats(x, count=0)}
    with pytest.raises(ValueError, match="dot_general0_lhs: its count is 0"):
        qwix.quantize_params(params, quantized, empty)
    wrong = {"dot_general0_lhs": {"count": 1, "sum_of_absmax": jnp.ones((3, 1))}}
    with pytest.raises(ValueError, match=r"dot_general0_lhs has shape \(3, 1\), the quantized model wants \(1, 1\)"):
        qwix.quantize_params(params, quantized, wrong)
    # Statistics that the model has no use for are left out, those of one path set only that.
    assert "other" not in qwix.quantize_params({}, quantized, {"other": stats(x)})


def test_static_range_in_a_shared_helper_uses_each_modules_scale():
    helper = jax.jit(lambda x, w: x @ w)

    class Layer(nnx.Module):
        def __init__(self, scale):
            self.w = nnx.Param(scale * jnp.eye(4))

        def __call__(self, x):
            return helper(x, self.w[...])

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([Layer(100.0), Layer(1.0)])

        def __call__(self, x):
            return self.layers[1](self.layers[0](x))

    x = jnp.tile(normal(1, 4), (3, 1))
    with pytest.raises(ValueError, match="layers/0/dot_general0_lhs_scale cannot be created inside of a jitted"):
        qwix.quantize_model(Model(), provider(**STATIC), x)
    # Given the scales, each layer uses its own.
    with jax.disable_jit():
        quantized = qwix.quantize_model(Model(), provider(**STATIC), x)
    close(quantized(x), 100 * x, rtol=0.05, atol=5)
    scales = [float(layer.dot_general0_lhs_scale.value.array[0, 0]) for layer in quantized.layers]
    assert scales[1] > 50 * scales[0]


# --- parameter trees ------------------------------------------------------------------------------


class Mlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.fixture
def mlp():
    model = Mlp()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return model, params, qwix.quantize_model(model, provider(), normal(3, 4))


def test_partial_trees_update_what_they_hold(mlp):
    model, params, quantized = mlp
    zeroed = jax.tree.map(jnp.zeros_like, params)
    part = {"layers": {1: {"kernel": zeroed["layers"][1]["kernel"]}}}
    nnx.update(quantized, qwix.quantize_params(part, quantized))
    assert not np.any(quantized.layers[1].kernel.array.qvalue[...])
    assert np.any(quantized.layers[0].kernel.array.qvalue[...])


def test_extra_parameters(mlp):
    _, params, quantized = mlp
    extra = {"layers": {0: {"kernel": params["layers"][0]["kernel"], "extra": jnp.ones(2)}}}
    with pytest.raises(ValueError, match="layers/0/extra is not found.*allow_extra_params"):
        qwix.quantize_params(extra, quantized)
    result = qwix.quantize_params(extra, quantized, allow_extra_params=True)
    np.testing.assert_array_equal(result["layers"][0]["extra"], jnp.ones(2))
    with pytest.raises(ValueError, match="layers/7/kernel is not found"):
        qwix.quantize_params({"layers": {7: {"kernel": jnp.ones(2)}}}, quantized)


def test_boxed_parameters_are_refused():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    model = nn.Dense(8, kernel_init=init)
    params = model.init(jax.random.key(0), normal(1, 4))["params"]
    quantized = qwix.quantize_model(model, provider())
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), normal(1, 4))["params"]
    with pytest.raises(ValueError, match=r"^kernel is a Partitioned, not an array: give flax.linen.unbox"):
        qwix.quantize_params(params, abstract)
    found = qwix.quantize_params(nn.unbox(params), abstract)
    assert isinstance(found["kernel"], WithAux)


def test_wrong_size(mlp):
    _, _, quantized = mlp
    with pytest.raises(ValueError, match=r"layers/0/kernel has shape \(4, 7\), which cannot become the \(4, 8\)"):
        qwix.quantize_params({"layers": {0: {"kernel": jnp.ones((4, 7))}}}, quantized)
    with pytest.raises(ValueError, match=r"layers/0/bias has shape \(7,\)"):
        qwix.quantize_params({"layers": {0: {"bias": jnp.ones(7)}}}, quantized)


def test_flattened_weights_are_reshaped(mlp):
    _, params, quantized = mlp
    flat = {"layers": {0: {"kernel": params["layers"][0]["kernel"].reshape(-1)}}}
    result = qwix.quantize_params(flat, quantized)["layers"][0]["kernel"]["array"]
    np.testing.assert_array_equal(result["qvalue"], quantized.layers[0].kernel.array.qvalue[...])


def test_quantize_params_works_under_jit_and_abstractly(mlp):
    _, params, quantized = mlp
    run = lambda p: qwix.quantize_params(p, quantized)  # noqa: E731
    eager, jitted, shapes = run(params), jax.jit(run)(params), jax.eval_shape(run, params)
    jax.tree.map(lambda a, b: close(a, b, atol=1), eager, jitted)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), eager) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


# --- boxed and sharded parameters -----------------------------------------------------------------


def mesh():
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("logical", [False, True])
def test_linen_boxes_stay_around_each_leaf(logical):
    with_names = nn.with_logical_partitioning if logical else nn.with_partitioning
    box = nn.LogicallyPartitioned if logical else nn.Partitioned
    model = nn.Dense(6, kernel_init=with_names(nn.initializers.normal(), ("a", "b")))
    x = normal(3, 8)
    with jax.set_mesh(mesh()):
        quantized = qwix.quantize_model(model, provider(weight_qtype=jnp.int4, tile_size=4))
        variables = quantized.init(KEY, x)
        kernel = variables["params"]["kernel"]
        assert isinstance(kernel.array.qvalue, box) and kernel.array.qvalue.names == ("a", "b")
        assert isinstance(kernel.array.scale, box) and kernel.array.scale.names == ("a", "b")
        abstract = jax.eval_shape(quantized.init, KEY, x)
        params = model.init(KEY, x)["params"]
        q = qwix.quantize_params(nn.unbox(params), abstract["params"])
        close(quantized.apply({"params": q}, x), quantized.apply(variables, x))
        spec = nn.get_partition_spec(abstract)["params"]["kernel"]
        assert spec.array.qvalue == jax.P("a", "b")
        whole = qwix.quantize_model(model, provider()).init(KEY, x)["params"]["kernel"]
        assert whole.array.scale.names == (None, "b")  # its axis has the size 1


def test_nnx_metadata_stays_on_each_leaf():
    with jax.set_mesh(mesh()):
        init = nnx.with_partitioning(nnx.initializers.normal(), ("a", "b"))
        model = nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0))
        settled(model)
        quantized = qwix.quantize_model(model, provider(), normal(4, 8))
    kernel = quantized.kernel.array
    assert kernel.qvalue.get_metadata()["out_sharding"] == ("a", "b")
    assert kernel.scale.get_metadata()["out_sharding"] == (None, "b")
    assert kernel.qvalue[...].sharding.spec == jax.P("a", "b")
    assert kernel.scale[...].sharding.spec == jax.P(None, "b")
    close(quantized(normal(4, 8)), np.asarray(normal(4, 8), np.float64) @ fake64(model.kernel[...], own=(1,)))


# --- embeddings -----------------------------------------------------------------------------------


def test_nnx_embedding_with_lookup_and_attend():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(10, 4, rngs=nnx.Rngs(0))

        def __call__(self, ids):
            return self.embed.attend(self.embed(ids))

    ids, model = jnp.array([[1, 2, 9]]), settled(Tied())
    quantized = qwix.quantize_model(model, provider(), ids)
    table = quantized.embed.embedding
    assert isinstance(table, WithAux) and table.shape == (10, 4) and table.array.scale.shape == (10, 1)
    expected = fake64(model.embed.embedding[...], own=(0,))
    close(quantized(ids), expected[np.asarray(ids)] @ expected.T)


def test_linen_embedding_with_lookup_and_attend():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(10, 4)
            return embed.attend(embed(ids))

    ids = jnp.array([[1, 2, 9]])
    params = settle(Tied().init(KEY, ids)["params"])
    quantized, q = quantized_linen(Tied(), provider(), params, ids)
    assert isinstance(q["Embed_0"]["embedding"], WithAux)
    expected = fake64(params["Embed_0"]["embedding"], own=(0,))
    close(quantized.apply({"params": q}, ids), expected[np.asarray(ids)] @ expected.T)


def test_embedding_that_is_only_looked_up_stays_in_float():
    model = nnx.Embed(10, 4, rngs=nnx.Rngs(0))
    quantized = qwix.quantize_model(model, provider(), jnp.array([1]))
    assert isinstance(quantized.embedding, nnx.Param)


def test_numpy_takes_a_quantized_weight_for_the_float_one():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    weight = qwix.quantize_model(model, provider(), jnp.ones((1, 8))).kernel
    want = np.asarray(qwix.dequantize(weight.array))
    found = np.asarray(weight, np.float64)
    assert found.dtype == np.float64 and np.asarray(weight).dtype == np.float32
    np.testing.assert_array_equal(found, want)
    x = np.arange(8, dtype=np.float32)[None]
    for result in (x @ weight, x.T * weight):
        assert isinstance(result, jax.Array)
    np.testing.assert_allclose(x @ weight, x @ want, rtol=1e-5)
    with pytest.raises(ValueError, match="as a copy only"):
        np.array(weight, copy=False)


# --- layers of Flax -------------------------------------------------------------------------------


def with_fake_weights(params, axes):
    """Linen params or an NNX pure dict with the named weights quantized and dequantized; `axes`: name -> own axes."""

    def change(path, x):
        keys = [str(getattr(k, "key", k)) for k in path]
        for name, own in axes.items():
            if "/".join(keys).endswith(name):
                return jnp.asarray(fake64(x, own=own), jnp.float32)
        return x

    return jax.tree.map_with_path(change, params)


LAYERS = {
    "conv1d": (lambda: nn.Conv(6, (3,)), (2, 9, 4), {"kernel": (2,)}),
    "conv2d": (lambda: nn.Conv(6, (3, 2), strides=2, padding="VALID"), (2, 7, 6, 4), {"kernel": (3,)}),
    "dilated": (lambda: nn.Conv(6, (3,), kernel_dilation=2), (2, 9, 4), {"kernel": (2,)}),
    "grouped": (lambda: nn.Conv(6, (3,), feature_group_count=2), (2, 9, 4), {"kernel": (2,)}),
    "depthwise": (lambda: nn.Conv(4, (3,), feature_group_count=4), (2, 9, 4), {"kernel": (2,)}),
    "einsum": (lambda: nn.Einsum((4, 2, 3), "...a,abc->...bc"), (2, 5, 4), {"kernel": (1, 2)}),
    "general": (lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 4, 2), {"kernel": (2, 3)}),
    "attention": (
        lambda: nn.MultiHeadDotProductAttention(2, qkv_features=8),
        (2, 5, 4),
        {"query/kernel": (1, 2), "key/kernel": (1, 2), "value/kernel": (1, 2), "out/kernel": (2,)},
    ),
    "lstm": (lambda: nn.RNN(nn.LSTMCell(5)), (2, 3, 4), {"kernel": (1,)}),
    "optimized lstm": (lambda: nn.RNN(nn.OptimizedLSTMCell(5)), (2, 3, 4), {"kernel": (1,)}),
    "gru": (lambda: nn.RNN(nn.GRUCell(5)), (2, 3, 4), {"kernel": (1,)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_linen_layers_weight_only(name):
    make, shape, axes = LAYERS[name]
    x, model = normal(*shape), make()
    params = model.init(KEY, x)["params"]
    quantized, q = quantized_linen(model, provider(), params, x)
    close_leaves(q, quantized.init(KEY, x)["params"])
    params = settle(params)
    quantized, q = quantized_linen(model, provider(), params, x)
    kernels = [p for p, _ in jax.tree.leaves_with_path(params) if p[-1].key == "kernel"]
    found = [x for x in jax.tree.leaves(q, is_leaf=lambda x: isinstance(x, WithAux)) if isinstance(x, WithAux)]
    assert len(found) == len(kernels)
    expected = model.apply({"params": with_fake_weights(params, axes)}, x)
    close(quantized.apply({"params": q}, x), expected, atol=1e-5)


def close_leaves(a, b):
    """Equal up to the rounding that XLA does otherwise where `init` runs in a scan."""
    jax.tree.map(lambda a, b: close(a, b, atol=1 if a.dtype == jnp.int8 else 1e-6), a, b)


R = nnx.Rngs
NNX_LAYERS = {
    "conv1d": (lambda: nnx.Conv(4, 6, (3,), rngs=R(0)), (2, 9, 4), {"kernel": (2,)}),
    "conv2d": (lambda: nnx.Conv(4, 6, (3, 2), strides=2, rngs=R(0)), (2, 7, 6, 4), {"kernel": (3,)}),
    "grouped": (lambda: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=R(0)), (2, 9, 4), {"kernel": (2,)}),
    "depthwise": (lambda: nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=R(0)), (2, 9, 4), {"kernel": (2,)}),
    "einsum": (lambda: nnx.Einsum("...a,abc->...bc", (4, 2, 3), (2, 3), rngs=R(0)), (2, 5, 4), {"kernel": (1, 2)}),
    "general": (lambda: nnx.LinearGeneral((4, 2), (2, 3), axis=(-2, -1), rngs=R(0)), (5, 4, 2), {"kernel": (2, 3)}),
    "attention": (
        lambda: nnx.MultiHeadAttention(2, 4, 8, decode=False, rngs=R(0)),
        (2, 5, 4),
        {"query/kernel": (1, 2), "key/kernel": (1, 2), "value/kernel": (1, 2), "out/kernel": (2,)},
    ),
    "lstm": (lambda: nnx.RNN(nnx.LSTMCell(4, 5, rngs=R(0)), rngs=R(1)), (2, 3, 4), {"kernel": (1,)}),
    "optimized lstm": (lambda: nnx.RNN(nnx.OptimizedLSTMCell(4, 5, rngs=R(0)), rngs=R(1)), (2, 3, 4), {"kernel": (1,)}),
    "gru": (lambda: nnx.RNN(nnx.GRUCell(4, 5, rngs=R(0)), rngs=R(1)), (2, 3, 4), {"kernel": (1,)}),
    "lora": (lambda: nnx.LoRALinear(4, 5, lora_rank=2, rngs=R(0)), (3, 4), {"kernel": (1,)}),
}


@pytest.mark.parametrize("name", NNX_LAYERS)
def test_nnx_layers_weight_only(name):
    make, shape, axes = NNX_LAYERS[name]
    x, model = normal(*shape), settled(make())
    rule = {"weight_qtype": jnp.int8} | ({"module_path": ""} if name == "lora" else {})
    quantized = qwix.quantize_model(model, provider(**rule), x)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    kernels = {p for p, _ in nnx.to_flat_state(nnx.state(model)) if p[-1] == "kernel"}
    found = {p[:-2] for p, _ in nnx.to_flat_state(nnx.state(quantized)) if p[-1] == "qvalue"}
    assert kernels <= found
    if name == "lora":
        axes = axes | {"lora_a": (1,), "lora_b": (1,)}
    expected = nnx.clone(model)
    nnx.update(expected, with_fake_weights(params, axes))
    close(quantized(x), expected(x), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_with_quantized_activations(groups):
    x, model = normal(2, 9, 4), nnx.Conv(4, 8, (3,), feature_group_count=groups, use_bias=False, rngs=R(0))
    settled(model)
    for weight, bits in ((jnp.int8, 8), (jnp.int4, 4)):
        quantized = qwix.quantize_model(model, provider(weight_qtype=weight, act_qtype=jnp.int8), x)
        expected = nnx.clone(model)
        expected.kernel[...] = jnp.asarray(fake64(model.kernel[...], own=(2,), bits=bits), jnp.float32)
        close(quantized(x), expected(jnp.asarray(fake64(x, own=(0,)), jnp.float32)), atol=1e-4)


def test_attention_with_quantized_activations_and_decode():
    model = nnx.MultiHeadAttention(2, 4, 8, decode=True, rngs=R(0))
    model.init_cache((2, 5, 4))
    x = normal(2, 1, 4)
    quantized = qwix.quantize_model(model, provider(weight_qtype=jnp.int8, act_qtype=jnp.int8), x)
    assert isinstance(quantized.query.kernel, WithAux)
    assert isinstance(quantized.cached_key, nnx.Cache) and model.cache_index[...] == 0
    assert quantized.cache_index[...] == 0  # the first run is not one of the user's
    close(quantized(x), nnx.clone(model)(x), rtol=0.1, atol=0.05)
    assert quantized.cache_index[...] == 1


# --- tiles that do not divide ---------------------------------------------------------------------


def test_tile_that_does_not_divide_says_where():
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(6, 5, rngs=R(0))])

        def __call__(self, x):
            return self.layers[0](x)

    rule = {"weight_qtype": jnp.int4, "tile_size": 4}
    with pytest.raises(ValueError, match=r"(?s)layers/0/kernel.*dot_general0.*\b6\b.*\b4\b.*PaddedPtqProvider"):
        qwix.quantize_model(Net(), provider(**rule), normal(2, 6))
    with pytest.raises(ValueError, match=r"(?s)layers_0/kernel.*dot_general0.*PaddedPtqProvider"):
        qwix.quantize_model(nn.Sequential([nn.Dense(5)]), provider(**rule)).init(KEY, normal(2, 6))
    with pytest.raises(ValueError, match="tile_size is not supported for a convolution"):
        qwix.quantize_model(nnx.Conv(4, 8, (3,), rngs=R(0)), provider(**rule), normal(2, 9, 4))


def test_memory_of_quantize_params_is_one_parameter_at_a_time(mlp):
    _, params, quantized = mlp
    seen = []

    class Recording:
        @staticmethod
        def quantize(value, how):
            seen.append(value.shape)
            return qarray.quantize(value, how)

    qwix.quantize_params(params, quantized, _qarray_module=Recording)
    assert seen == [(4, 8), (8, 4)]


class LinenExperts(nn.Module):
    @nn.compact
    def __call__(self, x, sizes):
        return jax.lax.ragged_dot(x, self.param("w", nn.initializers.normal(), (3, 8, 5)), sizes)


class Experts(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(normal(3, 8, 5))

    def __call__(self, x, sizes):
        return jax.lax.ragged_dot(x, self.w[...], sizes)


@pytest.mark.parametrize("act_qtype", [None, jnp.int8])
def test_experts_of_a_ragged_dot(act_qtype):
    model, x, sizes = Experts(), normal(6, 8, seed=1), jnp.array([2, 0, 3])
    tile = None if act_qtype else 4
    rule = {"weight_qtype": jnp.int8, "act_qtype": act_qtype, "tile_size": tile}
    w = fake64(model.w[...], own=(0, 2), tile=tile, axis=1)
    rows = fake64(x, own=(0,)) if act_qtype else np.asarray(x, np.float64)
    want = np.concatenate([rows[:2] @ w[0], rows[2:5] @ w[2], np.zeros((1, 5))])
    quantized = qwix.quantize_model(model, provider(**rule), x, sizes)
    assert quantized.w.array.scale.shape == (3, 2 if tile else 1, 5)
    close(nnx.jit(lambda m, *a: m(*a))(quantized, x, sizes), want)
    linen = qwix.quantize_model(LinenExperts(), provider(**rule))
    abstract = jax.eval_shape(linen.init, KEY, x, sizes)["params"]
    params = qwix.quantize_params({"w": model.w[...]}, abstract)
    close(linen.apply({"params": params}, x, sizes), want)
