"""What calibrated methods share: statistics next to each weight, and weights laid out for a method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers import ptq
from qwix.contrib import calibration, padded_ptq


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(qwix.QuantizationRule):
    pass


class Provider(calibration.SinglePassCalibrationProvider):
    """Keeps the sum of squares of each feature, and the second moments."""

    def get_rule_type(self):
        return Rule

    def get_stats_suffix(self):
        return "_test"

    def compute_stats(self, lhs):
        assert lhs.ndim == 2
        return {"square": (lhs**2).sum(1), "moment": lhs @ lhs.T}


RULES = [Rule(weight_qtype="int8")]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + 0.1, jnp.float32)


def stats_of(model: nnx.Module, *inputs: Any, rules: Any = None, calls: int = 1) -> dict[str, Any]:
    """The statistics of an NNX model after some calls, by '/'-joined path."""
    observed = qwix.quantize_model(model, Provider(rules or RULES), *inputs)
    for _ in range(calls):
        found = observed(*inputs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, model(*inputs))
    pure = nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat))
    flat = ptq.flatten(pure, is_leaf=lambda x: "count" in x)
    return {"/".join(map(str, path)): stat for path, stat in flat}


def assert_features(stat: dict[str, jax.Array], features: Any) -> None:
    """The statistics of one call with activations (in, samples)."""
    x = np.asarray(features, np.float64)
    assert int(stat["count"]) == 1
    np.testing.assert_allclose(stat["sum_of_square"], (x**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(stat["sum_of_moment"], x @ x.T, rtol=1e-4, atol=1e-5)


class Op(nnx.Module):
    """A parameter `w`, and what is done with it."""

    def __init__(self, shape, fn):
        self.w, self.fn = nnx.Param(normal(*shape, seed=9)), fn

    def __call__(self, x):
        return self.fn(x, self.w[...])


# --- collecting


X = normal(5, 2, 6)
# name -> (x's shape, w's shape, the op, the activations as (in, samples))
OPS = {
    "matmul": ((5, 6), (6, 3), lambda x, w: x @ w, lambda x: x.T),
    "dot_general": (
        (5, 2, 6),
        (6, 3),
        lambda x, w: jax.lax.dot_general(x, w, (((2,), (0,)), ((), ()))),
        lambda x: x.reshape(10, 6).T,
    ),
    "weight on the left": ((6, 5), (3, 6), lambda x, w: w @ x, lambda x: x),
    "transposed": ((5, 6), (3, 6), lambda x, w: x @ w.T, lambda x: x.T),
    "cast": ((5, 6), (6, 3), lambda x, w: x @ jnp.asarray(w, jnp.float32).astype(jnp.float32), lambda x: x.T),
    "reshaped": ((5, 6), (2, 3, 4), lambda x, w: x @ w.reshape(6, 4), lambda x: x.T),
    "sliced": ((5, 6), (6, 8), lambda x, w: x @ w[:, 2:5], lambda x: x.T),
    "indexed": ((5, 6), (4, 6, 3), lambda x, w: x @ w[2], lambda x: x.T),
    "einsum": ((5, 2, 6), (6, 3, 4), lambda x, w: jnp.einsum("btd,dnh->bnth", x, w), lambda x: x.reshape(10, 6).T),
    "einsum on the left": ((5, 6), (3, 6), lambda x, w: jnp.einsum("ed,...d->...e", w, x), lambda x: x.T),
    "two contracted": (
        (5, 2, 6),
        (2, 6, 3),
        lambda x, w: jnp.einsum("bkd,kdo->bo", x, w),
        lambda x: x.reshape(5, 12).T,
    ),
    "two contracted, in another order": (
        (5, 6, 2),
        (2, 6, 3),
        lambda x, w: jnp.einsum("bdk,kdo->bo", x, w),
        lambda x: x.transpose(2, 1, 0).reshape(12, 5),
    ),
    "two contracted, transposed": (
        (5, 2, 6),
        (6, 3, 2),
        lambda x, w: jnp.einsum("bkd,kdo->bo", x, w.transpose(2, 0, 1)),
        lambda x: x.transpose(2, 1, 0).reshape(12, 5),
    ),
    "two contracted, as one": (
        (5, 12),
        (3, 2, 6),
        lambda x, w: x @ w.transpose(1, 2, 0).reshape(12, 3),
        lambda x: x.T,
    ),
    "batch axis": (
        (5, 2, 6),
        (2, 6, 3),
        lambda x, w: jnp.einsum("bhd,hdo->bho", x, w),
        lambda x: x.reshape(10, 6).T,
    ),
    "a summed axis of the activations": (
        (5, 2, 6),
        (6, 3),
        lambda x, w: jnp.einsum("btd,do->bo", x, w),
        lambda x: x.sum(1).T,
    ),
    "three operands": (
        (5, 6),
        (6, 3),
        lambda x, w: jnp.einsum("bd,do,b->bo", x, w, jnp.arange(5.0)),
        None,
    ),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_activations_of_an_op(op):
    x_shape, w_shape, fn, features = op
    x = normal(*x_shape)
    stats = stats_of(Op(w_shape, fn), x)
    assert set(stats) == {"w_test"}
    if features is not None:
        assert_features(stats["w_test"], features(x))
    else:
        assert stats["w_test"]["sum_of_square"].shape == (6,)


def test_concatenated_weights():
    class Fused(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Param(normal(6, 3)), nnx.Param(normal(6, 2))
            self.c, self.d = nnx.Param(normal(4, 3)), nnx.Param(normal(2, 3))

        def __call__(self, x):
            columns = x @ jnp.concatenate([self.a[...], self.b[...]], axis=1)
            return columns, x @ jnp.concatenate([self.c[...], self.d[...]], axis=0)

    x = normal(5, 6)
    stats = stats_of(Fused(), x)
    for name, features in {"a": x.T, "b": x.T, "c": x.T[:4], "d": x.T[4:]}.items():
        assert_features(stats[f"{name}_test"], features)


def test_each_call_counts():
    x = normal(5, 6)
    stats = stats_of(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), x, calls=3)
    assert int(stats["kernel_test"]["count"]) == 3
    np.testing.assert_allclose(stats["kernel_test"]["sum_of_square"], 3 * (x**2).sum(0), rtol=1e-5)


def test_a_module_that_is_called_twice_averages_both():
    class Twice(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.linear(self.linear(x))

    model, x = Twice(), normal(5, 6)
    stats = stats_of(model, x)
    assert int(stats["linear/kernel_test"]["count"]) == 2
    expected = (x**2).sum(0) + (model.linear(x) ** 2).sum(0)
    np.testing.assert_allclose(stats["linear/kernel_test"]["sum_of_square"], expected, rtol=1e-5)


def test_a_weight_of_another_module():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(7, 6, rngs=nnx.Rngs(0))

        def __call__(self, ids):
            return jnp.dot(self.embed(ids), self.embed.embedding[...].T), self.embed.attend(self.embed(ids))

    model = Tied()
    stats = stats_of(model, jnp.array([1, 5]))
    assert set(stats) == {"embed/embedding_test"}
    assert int(stats["embed/embedding_test"]["count"]) == 2


def test_rules_decide():
    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b, self.c = (nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(3))

        def __call__(self, x):
            return self.c(self.b(self.a(x)))

    rules = [
        qwix.QuantizationRule(module_path="a", weight_qtype="int8"),
        Rule(module_path="b"),
        Rule(module_path="c", weight_qtype="int8"),
    ]
    assert set(stats_of(Two(), normal(5, 6), rules=rules)) == {"c/kernel_test"}


def test_ops_without_one_weight_are_passed_over():
    class Products(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Param(normal(6, 6)), nnx.Param(normal(6, 6))

        def __call__(self, x):
            return self.a[...] @ self.b[...], x @ x.T, jnp.einsum("bd->db", x)

    assert stats_of(Products(), normal(5, 6)) == {}


def test_a_part_of_the_contracted_axis_has_no_statistics():
    op = Op((6, 3), lambda x, w: x[:, :4] @ w[:4])
    with pytest.warns(qconfig.QuantizationWarning, match=r"w, dot_general0.*rounded to nearest.*4 elements"):
        assert stats_of(op, normal(5, 6)) == {}


def test_low_precision_activations():
    model = nnx.Linear(6, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    stats = stats_of(model, normal(5, 6))["kernel_test"]
    assert {k: v.dtype for k, v in stats.items()} == {
        "count": jnp.int32,
        "sum_of_square": jnp.float32,
        "sum_of_moment": jnp.float32,
    }


def test_output_dtype_and_preferred_element_type():
    fn = lambda x, w: jnp.einsum("bd,do->bo", x, w, preferred_element_type=jnp.bfloat16)  # noqa: E731
    observed = qwix.quantize_model(Op((6, 3), fn), Provider(RULES), normal(5, 6))
    assert observed(normal(5, 6)).dtype == jnp.bfloat16


def test_under_jit():
    model, x = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), normal(5, 6)
    observed = qwix.quantize_model(model, Provider(RULES), x, skip_nnx_init=True)
    call = nnx.jit(lambda model, x: model(x))
    call(observed, x)
    call(observed, 2 * x)
    stat = observed.kernel_test.get_value()
    assert int(stat["count"]) == 2
    np.testing.assert_allclose(stat["sum_of_square"], 5 * (x**2).sum(0), rtol=1e-5)


def test_stacked_layers_under_nnx_scan():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs))(rngs.split(3))

        def __call__(self, x):
            step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, self.layers)

    model, x = Stack(nnx.Rngs(0)), normal(5, 6)
    stat = stats_of(model, x)["layers/kernel_test"]
    assert stat["count"].tolist() == [1, 1, 1]
    np.testing.assert_allclose(stat["sum_of_square"][0], (x**2).sum(0), rtol=1e-5)
    second = x @ model.layers.kernel[0] + model.layers.bias[0]
    np.testing.assert_allclose(stat["sum_of_square"][1], (second**2).sum(0), rtol=1e-4)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="a")(x)
        w = self.param("w", nn.initializers.normal(), (3, 4))
        return jnp.einsum("bd,ed->be", x, w)


def test_linen():
    model, x = LinenNet(), normal(5, 6)
    variables = model.init(jax.random.key(0), x)
    observed = qwix.quantize_model(model, Provider(RULES))
    y, updated = observed.apply(variables, x, mutable="quant_stats")
    np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-5)
    assert_features(updated["quant_stats"]["a"]["kernel_test"], x.T)
    hidden = nn.Dense(4).apply({"params": variables["params"]["a"]}, x)
    assert_features(updated["quant_stats"]["w_test"], hidden.T)
    _, again = observed.apply(variables | updated, x, mutable="quant_stats")
    assert int(again["quant_stats"]["w_test"]["count"]) == 2
    np.testing.assert_allclose(observed.apply(variables | updated, x), y, rtol=1e-6)


def test_linen_init_makes_empty_statistics():
    observed = qwix.quantize_model(LinenNet(), Provider(RULES))
    stats = observed.init(jax.random.key(0), normal(5, 6))["quant_stats"]
    assert int(stats["a"]["kernel_test"]["count"]) == 0
    assert not np.any(stats["a"]["kernel_test"]["sum_of_square"])


def test_linen_layers_under_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6)(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "quant_stats": 0}
            scanned = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scanned()(x, None)[0]

    x = normal(5, 6)
    variables = Stack().init(jax.random.key(0), x)
    observed = qwix.quantize_model(Stack(), Provider(RULES))
    _, updated = observed.apply(variables, x, mutable="quant_stats")
    (stat,) = (s for _, s in ptq.flatten(updated["quant_stats"], is_leaf=lambda s: "count" in s))
    assert stat["count"].tolist() == [1, 1, 1]
    np.testing.assert_allclose(stat["sum_of_square"][0], (x**2).sum(0), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite(bad):
    model, x = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), normal(5, 6)
    observed = qwix.quantize_model(model, Provider(RULES), x)
    with pytest.raises(ValueError, match="kernel, dot_general0: the activations hold NaN or inf"):
        observed(x.at[1, 2].set(bad))
    # Under jit nobody can look, but quantize_params does.
    nnx.jit(lambda model, x: model(x))(observed, x.at[1, 2].set(bad))
    with pytest.raises(ValueError, match="of kernel is not finite"):
        run(model, quantized_linear(), nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat)))


def test_a_weight_in_a_list_has_no_place_for_statistics():
    class Listed(nnx.Module):
        def __init__(self):
            self.ws = nnx.List([nnx.Param(normal(6, 3))])

        def __call__(self, x):
            return x @ self.ws[0][...]

    with pytest.raises(ValueError, match="ws/0: there is no module to keep its statistics in"):
        stats_of(Listed(), normal(5, 6))


def test_ops_that_contract_different_axes_of_a_weight():
    op = Op((6, 3), lambda x, w: (x @ w) @ w.T)
    with pytest.raises(ValueError, match="w is used by ops that contract different axes"):
        stats_of(op, normal(5, 6))


# --- weights as matrices


@pytest.mark.parametrize("axes", [0, 1, 2, -1, (0, 1), (2, 0), (0, 1, 2)])
def test_normalize_weight(axes):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    matrix, restore = calibration.normalize_weight(x, axes)
    contracted = sorted(axis % 3 for axis in ([axes] if isinstance(axes, int) else axes))
    rest = [axis for axis in range(3) if axis not in contracted]
    expected = x.transpose(*rest, *contracted).reshape(int(np.prod([x.shape[a] for a in rest], initial=1)), -1)
    assert np.array_equal(matrix, expected)
    assert np.array_equal(restore(matrix), x)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_a_quantized_matrix_in_the_shape_of_the_weight(axis, method):
    x = normal(4, 8, 12)
    matrix, restore = calibration.normalize_weight(x, axis)
    how = {"qtype": jnp.int8, "calibration_method": method}
    q = restore(qarray.quantize(matrix, qarray.HowToQuantize(channelwise_axes=(0,), tiled_axes={1: 4}, **how)))
    rest = [a for a in range(3) if a != axis]
    expected = qarray.quantize(x, qarray.HowToQuantize(channelwise_axes=rest, tiled_axes={axis: 4}, **how))
    for found, leaf in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(found, leaf)


# --- quantizing with statistics


def round_to_nearest(context: calibration.CalibratedQuantContext) -> ptq.WithAux:
    quantized = context.restore_shape(qarray.quantize(context.weight, context.how))
    return ptq.WithAux(quantized, context.abs_w.how)


def quantized_linear(**kwargs: Any) -> nnx.Module:
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    return qwix.quantize_model(model, ptq.PtqProvider([dataclasses.replace(RULES[0], **kwargs)]), normal(5, 6))


def run(model: nnx.Module, quantized: nnx.Module, stats: Any, fn: Any = round_to_nearest, **kwargs: Any) -> Any:
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return calibration.quantize_params_with_calibration(params, quantized, stats, "_test", fn, **kwargs)


CONTRACTED = {  # w's shape, rule, op
    "one axis": ((6, 3), {}, lambda x, w: x @ w),
    "one axis in tiles": ((6, 3), {"tile_size": 2}, lambda x, w: x @ w),
    "tied": ((3, 6), {"tile_size": 2}, lambda x, w: x @ w.T),
    "two axes": ((2, 6, 3), {}, lambda x, w: jnp.einsum("...kd,kdo->...o", x.reshape(5, 2, 6), w)),
    "two axes in tiles": ((2, 6, 3), {"tile_size": 3}, lambda x, w: jnp.einsum("bkd,kdo->bo", x.reshape(5, 2, 6), w)),
    "two axes, float tile": (
        (6, 3, 2),
        {"tile_size": 0.5},
        lambda x, w: jnp.einsum("bkd,kod->bo", x.reshape(5, 6, 2), w),
    ),
    "one feature": ((1, 3), {}, lambda x, w: x[:, :1] @ w),
}


@pytest.mark.parametrize("case", CONTRACTED.values(), ids=CONTRACTED)
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_the_layout_keeps_groups_together(case, method):
    """Rounding to nearest the matrix that a method sees is rounding to nearest the weight."""
    shape, settings, fn = case
    x = normal(5, 12 if len(shape) == 3 else 6)
    model = Op(shape, fn)
    rules = [dataclasses.replace(RULES[0], weight_calibration_method=method, **settings)]
    stats = {"w_test": stats_of(model, x, rules=rules)["w_test"]}
    quantized = qwix.quantize_model(model, ptq.PtqProvider(rules), x)
    seen = []
    result = run(model, quantized, stats, lambda context: seen.append(context) or round_to_nearest(context))
    for found, leaf in zip(jax.tree.leaves(result["w"]), jax.tree.leaves(quantized.w.array), strict=True):
        assert np.array_equal(found, leaf)
    (context,) = seen
    assert context.path == ("w",)
    columns = context.weight.shape[1]
    assert context.calibration_stats["square"].shape == (columns,)
    # A column has the statistics of its feature: those of the operand that it multiplies.
    moment = context.calibration_stats["moment"]
    np.testing.assert_allclose(jnp.diag(moment), context.calibration_stats["square"], rtol=1e-5)
    order = np.asarray(context.restore_shape(context.calibration_stats["square"][None])).ravel()
    np.testing.assert_allclose(order, stats["w_test"]["sum_of_square"], rtol=1e-6)
    contracted = context.contracting_axis
    assert int(np.prod([shape[a] for a in ([contracted] if isinstance(contracted, int) else contracted)])) == columns


def test_statistics_are_averaged():
    context = calibration.extract_calibrated_quant_context(
        ("a", "w"),
        normal(6, 3),
        quantized_linear().kernel.value,
        {"count": jnp.array(2), "sum_of_square": jnp.arange(6.0)},
    )
    assert context.calibration_stats["square"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert context.how == qarray.HowToQuantize(qtype="int8", channelwise_axes=(0,))
    assert (context.contracting_axis, context.path) == (0, ("a", "w"))


def test_a_weight_that_contracts_nothing():
    how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(0, 1))
    target = ptq.WithAux(qarray.quantize(normal(6, 3), how), how)
    stats = {"count": jnp.array(1), "sum_of_square": jnp.ones(6)}
    assert calibration.extract_calibrated_quant_context(("w",), normal(6, 3), target, stats) is None


def test_weights_without_statistics_are_rounded_to_nearest():
    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(2))

        def __call__(self, x):
            return self.b(self.a(x))

    model, x = Two(), normal(5, 6)
    quantized = qwix.quantize_model(model, ptq.PtqProvider(RULES), x)
    stats = {"b": {"kernel_test": {"count": jnp.array(1), "sum_of_square": jnp.ones(6)}}}
    paths = []

    def zeros(context):
        paths.append(context.path)
        return jax.tree.map(jnp.zeros_like, round_to_nearest(context))

    result = run(model, quantized, stats, zeros)
    assert paths == [("b", "kernel")]
    assert np.array_equal(result["a"]["kernel"]["array"]["qvalue"], quantized.a.kernel.array.qvalue)
    assert not np.any(result["b"]["kernel"]["array"]["qvalue"])
    assert np.array_equal(result["b"]["bias"], model.b.bias)
    expected = ptq.quantize_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)), quantized)
    assert jax.tree.structure(result) == jax.tree.structure(expected)


def test_default_statistics():
    model, seen = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), []
    default = {"count": jnp.array(1), "sum_of_square": jnp.ones(6)}
    fn = lambda context: seen.append(context) or round_to_nearest(context)  # noqa: E731
    run(model, quantized_linear(), {}, fn, default_stats=lambda target: default)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_stacked_weights_are_quantized_layer_by_layer(kind):
    how = qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,) if kind == "linen" else (0, 2), tiled_axes={})
    w = normal(2, 6, 3)
    full = dataclasses.replace(how, channelwise_axes=(0, 2))
    target = ptq.WithAux(jax.eval_shape(lambda w: qarray.quantize(w, full), w), how)
    stats = {"w_test": {"count": jnp.array([1, 2]), "sum_of_square": jnp.stack([jnp.ones(6), 4 * jnp.ones(6)])}}
    seen = []
    result = calibration.quantize_params_with_calibration(
        {"w": w}, {"w": target}, stats, "_test", lambda c: seen.append(c) or round_to_nearest(c)
    )
    assert [c.calibration_stats["square"][0] for c in seen] == [1, 2]
    assert [c.weight.shape for c in seen] == [(3, 6)] * 2
    assert jax.tree.structure(result["w"]) == jax.tree.structure(target)
    expected = qarray.quantize(w, full)
    assert np.array_equal(result["w"].array.qvalue, expected.qvalue)
    assert np.array_equal(result["w"].array.scale, expected.scale)


STAT = {"count": jnp.array(1), "sum_of_square": jnp.ones(6)}


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"kernel_test": STAT | {"count": jnp.array(0)}}, "of kernel are of no call: run the calibration model"),
        (
            {"kernel_test": STAT | {"sum_of_square": jnp.ones(5)}},
            r"square of kernel has shape \(5,\).*6 input features",
        ),
        ({"kernel_test": STAT | {"sum_of_square": jnp.full(6, jnp.nan)}}, "square of kernel is not finite"),
        ({"kernel_test": {"count": jnp.array(1)}}, "statistics of kernel are {count}"),
        ({"kernel_other": STAT}, "no statistic named <weight>_test, but kernel_other"),
    ],
    ids=["no call", "other shape", "nan", "empty", "other method"],
)
def test_statistics_that_do_not_fit(stats, message):
    with pytest.raises(ValueError, match=message):
        run(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), quantized_linear(), stats)


def test_params_that_do_not_fit():
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"kernel has shape \(4, 3\)"):
        calibration.quantize_params_with_calibration(
            {"kernel": normal(4, 3)}, quantized_linear(), {"kernel_test": STAT}, "_test", round_to_nearest
        )
    params = {"more": jnp.ones(2)} | nnx.to_pure_dict(nnx.state(model, nnx.Param))
    args = (params, quantized_linear(), {"kernel_test": STAT}, "_test", round_to_nearest)
    with pytest.raises(ValueError, match="more is not found"):
        calibration.quantize_params_with_calibration(*args)
    result = calibration.quantize_params_with_calibration(*args, allow_extra_params=True)
    assert set(result) == {"more", "kernel", "bias"}


def test_padded_weights_are_refused():
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    rules = [dataclasses.replace(RULES[0], tile_size=4)]
    quantized = qwix.quantize_model(model, padded_ptq.PaddedPtqProvider(rules), normal(5, 6))
    with pytest.raises(ValueError, match="kernel is a PaddedQArray: calibrated methods"):
        run(model, quantized, {"kernel_test": STAT})


def test_a_sharded_weight_stays_sharded():
    mesh = jax.make_mesh((3,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    for spec in (jax.P(None, "x"), jax.P("x", None)):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        params = {"kernel": jax.device_put(normal(6, 3), sharding), "bias": jnp.zeros(3)}
        result = calibration.quantize_params_with_calibration(
            params, quantized_linear(), {"kernel_test": STAT}, "_test", round_to_nearest
        )
        qvalue = result["kernel"]["array"]["qvalue"]
        assert qvalue.sharding.is_equivalent_to(sharding, 2)


def test_contexts_are_the_same_under_eval_shape():
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    abstract = nnx.eval_shape(quantized_linear)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    fn = lambda params, stats: calibration.quantize_params_with_calibration(  # noqa: E731
        params, abstract, stats, "_test", round_to_nearest
    )
    shapes = jax.eval_shape(fn, params, {"kernel_test": STAT})
    found = fn(params, {"kernel_test": STAT})
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, found)


def test_methods_are_named_by_the_subclass():
    base = calibration.SinglePassCalibrationProvider([])
    for method in (base.get_rule_type, base.get_stats_suffix, lambda: base.compute_stats(normal(2, 3))):
        with pytest.raises(NotImplementedError):
            method()
