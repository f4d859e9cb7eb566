"""QtProvider on Linen and NNX models: which ops are quantized how, statistics, training, and the way to PTQ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import qwix
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt
from qwix._src.core.sparsity import SparsityRule

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
    found = jax.grad(jax.jit(lambda p: (linen.apply({"params": p}, x) ** 2).sum()))(params)
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


# ------------------------------------------------------------------ every op


class Ops(nn.Module):
    """An einsum with a weight on either side, attention, a convolution, and a mixture of experts."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1), (8, 6))
        experts = self.param("experts", nn.initializers.normal(1), (2, 6, 8))
        h = jnp.einsum("ab,bc->ac", x, w)
        h = jnp.einsum("bc,ab->ac", w, x) + h
        h = jax.nn.softmax(jnp.einsum("ac,dc->ad", h, h)) @ h
        h = jax.lax.ragged_dot(h, experts, jnp.array([1, 3]))
        return nn.Conv(3, (3,))(h[None])[0]


@pytest.mark.parametrize("bwd", [None, "int8"])
def test_every_op_is_quantized_and_differentiable(x, bwd):
    float_model = Ops()
    variables = float_model.init(jax.random.key(0), x)
    model = quantized(float_model, weight_qtype="int16", act_qtype="int16", bwd_qtype=bwd and "int16")
    grad = lambda model: jax.jit(jax.grad(lambda v: (model.apply(v, x) ** 2).sum()))(variables)  # noqa: E731
    for a, b in zip(jax.tree.leaves(grad(model)), jax.tree.leaves(grad(float_model)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.abs(b).max()))
    stats = quantized(float_model, act_static_scale=True, **W8A8).init(jax.random.key(0), x)["quant_stats"]
    names = {"einsum0_lhs", "einsum1_rhs", "einsum2_lhs", "einsum2_rhs", "dot_general0_lhs", "dot_general0_rhs"}
    assert set(stats) == names | {"ragged_dot0_lhs", "Conv_0"}
    assert set(stats["Conv_0"]) == {"conv_general_dilated0_lhs"}


def test_einsums_of_more_operands_and_of_one(x):
    class Three(nn.Module):
        @nn.compact
        def __call__(self, x):
            a, b = (self.param(n, nn.initializers.normal(1), s) for n, s in (("a", (8, 5)), ("b", (5, 3))))
            return jnp.einsum("xi,ij,jk->xk", x, jnp.einsum("ij->ij", a), b)

    variables = Three().init(jax.random.key(0), x)
    truth = Three().apply(variables, x)
    out = quantized(Three(), weight_qtype="int8").apply(variables, x)
    error = np.linalg.norm(out - truth) / np.linalg.norm(truth)
    assert 1e-4 < error < 0.03


def test_no_rule_no_change(x):
    variables = Ops().init(jax.random.key(0), x)
    model = qwix.quantize_model(Ops(), qwix.QtProvider([qwix.QtRule(module_path="nowhere", weight_qtype="int8")]))
    np.testing.assert_array_equal(model.apply(variables, x), Ops().apply(variables, x))


# ------------------------------------------------------------------ statistics, and the way to PTQ

STATIC = W8A8 | {"act_static_scale": True}


def test_statistics_average_over_calls_and_not_during_init(x):
    model = quantized(Mlp(nnx.Rngs(0)), x, **STATIC)
    stat = model.up.dot_general0_lhs
    assert isinstance(stat, qwix.QuantStat) and int(stat.get_value()["count"]) == 0
    model(x), model(3 * x)
    assert int(model.up.dot_general0_lhs.get_value()["count"]) == 2
    total = np.abs(np.asarray(x)).max(1).mean() * 4
    np.testing.assert_allclose(model.up.dot_general0_lhs.get_value()["sum_of_absmax"], [[total]], rtol=1e-6)

    linen = quantized(LinenMlp(), **STATIC)
    variables = linen.init(jax.random.key(0), x)
    assert int(variables["quant_stats"]["up"]["dot_general0_lhs"]["count"]) == 0
    _, updated = linen.apply(variables, x, mutable="quant_stats")
    _, updated = linen.apply({**variables, **updated}, 3 * x, mutable="quant_stats")
    np.testing.assert_allclose(updated["quant_stats"]["up"]["dot_general0_lhs"]["sum_of_absmax"], [[total]], rtol=1e-6)
    # Without it being mutable, they are used as they are.
    linen.apply({**variables, **updated}, 100 * x)


@pytest.mark.parametrize(("static", "dtype"), [(True, jnp.float32), (True, jnp.bfloat16), (False, jnp.float32)])
def test_qat_to_ptq_nnx(x, static, dtype):
    ranges = {"act_static_scale": static}
    model = quantized(Mlp(nnx.Rngs(0)), x, **W8A8 | ranges)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(loss)(model, x))
    x = x.astype(dtype)
    for _, module in nnx.iter_modules(model):
        module.disable_quant_stats_update = True
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, qwix.QuantStat))
    ptq = qwix.quantize_model(Mlp(nnx.Rngs(1)), qwix.PtqProvider([qwix.QuantizationRule(**W8A8 | ranges)]), x)
    nnx.update(ptq, qwix.quantize_params(params, ptq, stats))
    assert ptq.up.kernel.array.qvalue.dtype == jnp.int8
    np.testing.assert_allclose(
        np.asarray(ptq(x), np.float32), np.asarray(model(x), np.float32), rtol=1e-5 if dtype == jnp.float32 else 2e-2
    )


@pytest.mark.parametrize("static", [True, False])
def test_qat_to_ptq_linen(x, static):
    ranges = {"act_static_scale": static}
    qat = quantized(LinenMlp(), **W8A8 | ranges)
    variables = qat.init(jax.random.key(0), x)
    for scale in (1, 2):
        _, updated = qat.apply(variables, scale * x, mutable="quant_stats")
        variables = {**variables, **updated}
    ptq = qwix.quantize_model(LinenMlp(), qwix.PtqProvider([qwix.QuantizationRule(**W8A8 | ranges)]))
    abstract = jax.eval_shape(ptq.init, jax.random.key(0), x)["params"]
    params = qwix.quantize_params(variables["params"], abstract, variables.get("quant_stats", {}))
    np.testing.assert_allclose(ptq.apply({"params": params}, x), qat.apply(variables, x), rtol=1e-5)


# ------------------------------------------------------------------ training loops


def test_training_with_everything(x):
    """bf16 model, f32 masters in the optimizer, gradient accumulation, donation, a jitted step."""
    model = quantized(Mlp(nnx.Rngs(0)), x, bwd_qtype="int8", **STATIC)
    transform = optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x):
        model, optimizer = nnx.merge(graphdef, state)

        def loss(model):
            half = nnx.clone(model)
            nnx.update(half, jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(half, nnx.Param)))
            out = half(x.astype(jnp.bfloat16))
            # What the call found out about activations belongs to the model.
            nnx.update(model, nnx.state(half, qwix.QuantStat))
            return ((out.astype(jnp.float32) - 1) ** 2).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value

    losses = []
    for _ in range(40):
        state, value = step(state, x)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    model, _ = nnx.merge(graphdef, state)
    assert model.up.kernel.dtype == jnp.float32 and int(model.up.dot_general0_lhs.get_value()["count"]) == 40


def test_float8_and_mxfp8_train_as_float_does(x):
    """Forward in e4m3 and backward in e5m2, or in blocks that share a power of two: the loss falls as in float."""
    formats = {
        "float": {},
        "float8": {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn", "bwd_qtype": "float8_e5m2"},
        "mxfp8": dict.fromkeys(("weight_qtype", "act_qtype", "bwd_qtype"), "mxfp8")
        | {"tile_size": 8, "bwd_weight_grad_tile_size": 4},
    }
    target = jnp.sin(3 * x)

    @nnx.jit
    def train(model, optimizer):
        def step(_, carry):
            model, optimizer, _ = carry
            value, grads = nnx.value_and_grad(lambda model: ((model(x) - target) ** 2).mean())(model)
            optimizer.update(model, grads)
            return model, optimizer, value

        return nnx.fori_loop(0, 30, step, (model, optimizer, jnp.zeros(())))[2]

    losses = {}
    for name, rule in formats.items():
        model = quantized(Mlp(nnx.Rngs(0)), x, **rule) if rule else Mlp(nnx.Rngs(0))
        before = float(((model(x) - target) ** 2).mean())
        losses[name] = float(train(model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)))
        assert losses[name] < 0.05 * before
        # An element in e4m3, of 3 bits of mantissa, is off by at most 2^-4 of itself; four quantized operands, two a
        # layer, act on the output independently, so that it is off by at most 2 x 2^-4 of itself.
        rounding = 2 * 2**-4 * float(jnp.sqrt((target**2).mean()))
        assert losses[name] < (losses["float"] ** 0.5 + rounding) ** 2


class Stack(nnx.Module):
    """Layers under nnx.scan, each under nnx.remat if asked for."""

    def __init__(self, rngs, remat=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = create(rngs)
        self.remat = remat

    def __call__(self, x):
        def layer(x, layer):
            return nnx.tanh(layer(x))

        layer = nnx.remat(layer) if self.remat else layer
        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@pytest.mark.parametrize("remat", [False, True])
def test_nnx_scan_and_remat_give_the_numbers_of_the_unrolled_model(x, remat):
    stack = Stack(nnx.Rngs(0), remat)
    # No negative numbers, whose largest lie on a tie: how XLA fuses a division would decide it.
    x, stack.layers.kernel[...] = jnp.abs(x), jnp.abs(stack.layers.kernel[...])
    model = quantized(stack, x, bwd_qtype="int8", **W8A8)
    op_config = {f"{part}_grad_qtype": "int8" for part in ("dlhs", "drhs")} | FORMATS
    op = functools.partial(dot_general_qt, dimension_numbers=DENSE, config=DotGeneralQtConfig(**op_config))

    def unrolled(kernels):
        h = x
        for i in range(3):
            h = nnx.tanh(op(h, kernels[i]) + stack.layers.bias[...][i])
        return (h**2).sum()

    truth = jax.jit(jax.grad(unrolled))(stack.layers.kernel[...])
    found = nnx.jit(nnx.grad(loss))(model, x).layers.kernel[...]
    assert np.linalg.norm(found - truth) < 1e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("remat", [False, True])
def test_statistics_of_stacked_layers(x, remat):
    """Each layer has its own, counted once a step, with a gradient taken as well."""
    model = quantized(Stack(nnx.Rngs(0), remat), x, **STATIC)
    stat = model.layers.dot_general0_lhs
    assert not stat.get_value()["count"].any()
    ranges, h = [], x
    for i in range(3):
        ranges.append(np.abs(np.asarray(h)).max(1).mean())
        h = nnx.tanh(h @ model.layers.kernel[...][i] + model.layers.bias[...][i])
    nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param)))(model, x)
    found = model.layers.dot_general0_lhs.get_value()
    np.testing.assert_array_equal(found["count"], [1, 1, 1])
    # Inputs of later layers are those of quantized ones.
    np.testing.assert_allclose(found["sum_of_absmax"].reshape(3), ranges, rtol=0.05)


def test_explicit_mesh(x):
    """On a mesh with explicit axes, gradients have the types of what they are gradients of, and the same values."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    config = DotGeneralQtConfig(**{f"{part}_qtype": "int8" for part in ("lhs", "rhs", "dlhs_grad", "drhs_grad")})
    # No negative numbers: their largest, at -127.5 steps, lie on a tie, which the last bit of a division decides.
    x, kernel = jnp.abs(x), jnp.abs(jax.random.normal(jax.random.key(1), (8, 16)))
    gradient = jax.grad(lambda kernel, x: (dot_general_qt(x, kernel, DENSE, config) ** 2).sum(), (0, 1))
    truth = jax.jit(gradient)(kernel, x)
    with jax.set_mesh(mesh):
        sharded = [
            jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in ((kernel, P(None, "model")), (x, P("data")))
        ]
        found = jax.jit(gradient)(*sharded)
        for gradients, operand in zip(found, sharded, strict=True):
            assert jax.typeof(gradients).sharding.spec == jax.typeof(operand).sharding.spec
    for a, b in zip(found, truth, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_stochastic_rounding_takes_keys_from_its_stream(x):
    rule = W8A8 | {"bwd_qtype": "int4", "bwd_stochastic_rounding": "uniform", "channelwise_noise_axes": (0, 1)}
    model = quantized(Mlp(nnx.Rngs(0)), x, **rule)
    with pytest.raises(ValueError, match="set_attributes\\(qwix_rngs="):
        model(x)
    model.set_attributes(qwix_rngs=nnx.Rngs(stochastic_rounding=0))
    grad = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param)))
    first, second = (grad(model, x).up.kernel[...] for _ in range(2))
    assert not np.array_equal(first, second)
    model.set_attributes(qwix_rngs=nnx.Rngs(stochastic_rounding=0))
    np.testing.assert_array_equal(grad(model, x).up.kernel[...], first)

    linen = quantized(LinenMlp(), **rule)
    variables = linen.init(jax.random.key(0), x)
    apply = lambda v, seed: linen.apply(v, x, rngs={"stochastic_rounding": jax.random.key(seed)}).sum()  # noqa: E731
    first, again, second = (jax.grad(apply)(variables, seed)["params"]["up"]["kernel"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)


def test_recomputing_draws_the_same_noise(x):
    """Under nnx.remat the forward runs twice, and the gradients are those of one run."""
    rule = W8A8 | {"bwd_qtype": "int4", "bwd_stochastic_rounding": "uniform", "channelwise_noise_axes": (0, 1)}
    model = quantized(Mlp(nnx.Rngs(0)), x, **rule)

    def gradients(call):
        model.set_attributes(qwix_rngs=nnx.Rngs(stochastic_rounding=0))
        loss = lambda model: (call(model, x) ** 2).sum()  # noqa: E731
        found = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param)))(model)
        return nnx.to_pure_dict(found), model.up.qwix_rngs.stochastic_rounding.count.get_value()

    once, twice = gradients(lambda model, x: model(x)), gradients(nnx.remat(lambda model, x: model(x)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), twice, once)


def test_every_field_of_a_rule_reaches_the_op(x, monkeypatch):
    configs = []

    def spy(lhs, rhs, dimension_numbers, config, **kwargs):
        configs.append(config)
        return jax.lax.dot_general(lhs, rhs, dimension_numbers)

    monkeypatch.setattr("qwix._src.core.dot_general_qt.dot_general_qt", spy)
    rule = {
        "weight_qtype": "int4",
        "act_qtype": "int8",
        "tile_size": 4,
        "weight_calibration_method": "rms,3",
        "act_calibration_method": "absmax,0.9",
        "bwd_qtype": "float8_e5m2",
        "bwd_calibration_method": "absmax,0.8",
        "bwd_weight_grad_tile_size": 2,
        "disable_channelwise_axes": True,
        "bwd_stochastic_rounding": "low_bit_uniform",
        "channelwise_noise_axes": (0, 1),
        "additional_qt_config": {"use_original_residuals": True},
    }
    model = quantized(Mlp(nnx.Rngs(0)), x, **rule)
    model.set_attributes(qwix_rngs=nnx.Rngs(stochastic_rounding=0))
    model(x)
    found = dataclasses.asdict(configs[-1])
    noise = [getattr(configs[-1], f"{part}_stochastic_rounding_noise_fn") for part in ("dlhs", "drhs")]
    assert all((fn.method, fn.channelwise_noise_axes) == ("low_bit_uniform", (0, 1)) for fn in noise)
    assert not np.array_equal(*(jax.random.key_data(fn.key) for fn in noise))
    expected = {"lhs_qtype": "int8", "rhs_qtype": "int4", "tile_size": 4, "use_original_residuals": True}
    expected |= {"lhs_calibration_method": "absmax,0.9", "rhs_calibration_method": "rms,3", "drhs_tile_size": 2}
    expected |= {f"{part}_disable_channelwise_axes": True for part in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}
    for part in ("dlhs_grad", "drhs_grad"):
        expected |= {f"{part}_qtype": "float8_e5m2", f"{part}_calibration_method": "absmax,0.8"}
    default = dataclasses.asdict(DotGeneralQtConfig())
    noise_fields = {"dlhs_stochastic_rounding_noise_fn", "drhs_stochastic_rounding_noise_fn"}
    assert {k: v for k, v in found.items() if k not in noise_fields and v != default[k]} == expected


# ------------------------------------------------------------------ errors and reports


def test_errors_and_reports(x):
    with pytest.raises(ValueError, match="set bwd_qtype"):
        quantized(Mlp(nnx.Rngs(0)), x, weight_qtype="int8", bwd_stochastic_rounding="uniform")
    with pytest.raises(ValueError, match="additional_qt_config has no_such_field"):
        quantized(Mlp(nnx.Rngs(0)), x, weight_qtype="int8", additional_qt_config={"no_such_field": 1})
    with pytest.raises(ValueError, match="conv_general_dilated0: tile_size is not supported"):
        quantized(nn.Conv(3, (3,)), weight_qtype="int8", tile_size=2).init(jax.random.key(0), x)
    sparse = {"sparsity_rule": SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4)}
    with pytest.raises(ValueError, match="prunes the second operand"):
        quantized(Ops(), weight_qtype="int8", additional_qt_config=sparse).init(jax.random.key(0), x)
    model = quantized(Mlp(nnx.Rngs(0)), x, additional_qt_config=sparse, **W8A8)
    assert float((nnx.grad(loss)(model, x).up.kernel[...] == 0).mean()) >= 0.5
    model = quantized(Mlp(nnx.Rngs(0)), x, additional_qt_config={"lhs_qtype": "int4"}, **W8A8)
    assert "up" in str(qwix.summarize(model))
