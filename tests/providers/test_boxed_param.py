"""An op that a rule matched is quantized whatever its form, and each operand by what it is.

Each case is a function of x and parameters. What it should compute is the function itself, run in float on the
dequantized parameters; which axes have scales of their own is written down beside it.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import qwix
from qwix._src import qconfig
from qwix._src.core import qarray
from qwix._src.providers import boxed_param, with_aux
from qwix._src.providers.ptq import WithAux

DIMS = (((1,), (0,)), ((), ()))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", qconfig.QuantizationWarning)
        yield


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


class NnxModel(nnx.Module):
    def __init__(self, function, shapes):
        self.function = function
        self.names = sorted(shapes)
        for i, name in enumerate(self.names):
            setattr(self, name, nnx.Param(normal(*shapes[name], seed=i + 1)))

    def __call__(self, x):
        return self.function(x, *(getattr(self, name)[...] for name in self.names))


class LinenModel(nn.Module):
    function: object
    shapes: tuple

    @nn.compact
    def __call__(self, x):
        params = [self.param(name, nn.initializers.normal(1.0), shape) for name, shape in self.shapes]
        return self.function(x, *params)


def provider(**rule):
    return qwix.PtqProvider([qwix.QuantizationRule(**({"weight_qtype": jnp.int8} | rule))])


def fake(w, own):
    return w if own is None else qwix.dequantize(qwix.quantize(w, jnp.int8, channelwise_axes=own))


def check(function, x, params, rule=None, rtol=1e-4):
    """`params`: name -> (shape, axes with scales of their own, or None: the parameter stays in float)."""
    rule = rule or {}
    shapes = {name: shape for name, (shape, _) in params.items()}
    model = NnxModel(function, shapes)
    quantized = qwix.quantize_model(model, provider(**rule), x)
    for name, (shape, own) in params.items():
        weight = getattr(quantized, name)
        assert isinstance(weight, WithAux) == (own is not None), name
        if own is not None:
            scale_shape = tuple(n if i in own else 1 for i, n in enumerate(shape))
            assert weight.shape == shape and weight.array.scale.shape == scale_shape
    expected = function(x, *(fake(getattr(model, name)[...], params[name][1]) for name in model.names))
    np.testing.assert_allclose(quantized(x), expected, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(jax.jit(lambda x: quantized(x))(x), expected, rtol=rtol, atol=rtol)

    linen = LinenModel(function, tuple(sorted(shapes.items())))
    variables = linen.init(jax.random.key(0), x)
    q = qwix.quantize_model(linen, provider(**rule))
    q_variables = q.init(jax.random.key(0), x)
    for name, (_, own) in params.items():
        assert isinstance(q_variables["params"][name], WithAux) == (own is not None), name
    expected = function(x, *(fake(variables["params"][name], params[name][1]) for name in model.names))
    np.testing.assert_allclose(q.apply(q_variables, x), expected, rtol=rtol, atol=rtol)
    abstract = jax.eval_shape(q.init, jax.random.key(0), x)["params"]
    from_params = qwix.quantize_params(variables["params"], abstract)
    np.testing.assert_allclose(q.apply({"params": from_params}, x), expected, rtol=rtol, atol=rtol)


W = {"w": ((4, 6), (1,))}
OPS = {
    "operator": (lambda x, w: x @ w, W),
    "operator, weight left": (lambda x, w: w @ x.T, {"w": ((6, 4), (0,))}),
    "dot": (jnp.dot, W),
    "matmul": (jnp.matmul, W),
    "tensordot": (lambda x, w: jnp.tensordot(x, w, 1), W),
    "tensordot of axes": (lambda x, w: jnp.tensordot(x, w, ((1,), (1,))), {"w": ((6, 4), (0,))}),
    "inner": (jnp.inner, {"w": ((6, 4), (0,))}),
    "vdot": (lambda x, w: jnp.vdot(x[0], w), {"w": ((4,), ())}),
    "vecdot": (lambda x, w: jnp.vecdot(x, w), {"w": ((3, 4), (0,))}),
    "matvec": (lambda x, w: jnp.matvec(w, x[0]), {"w": ((6, 4), (0,))}),
    "lax.dot": (lambda x, w: jax.lax.dot(x, w), W),
    "lax.dot_general": (lambda x, w: jax.lax.dot_general(x, w, DIMS), W),
    "lax.batch_matmul": (lambda x, w: jax.lax.batch_matmul(x[None], w), {"w": ((1, 4, 6), (0, 2))}),
    "batched matmul": (lambda x, w: x[None] @ w, {"w": ((5, 4, 6), (0, 2))}),
    "einsum": (lambda x, w: jnp.einsum("bi,io->bo", x, w), W),
    "einsum, weight left": (lambda x, w: jnp.einsum("io,bi->bo", w, x), W),
    "einsum, implicit output": (lambda x, w: jnp.einsum("bi,io", x, w), W),
    "einsum, spaces and ellipsis": (lambda x, w: jnp.einsum("... i , i o -> ... o", x, w), W),
    "einsum, numpy's other form": (lambda x, w: jnp.einsum(x, [0, 1], w, [1, 2], [0, 2]), W),
    "einsum of three": (
        lambda x, v, w: jnp.einsum("bi,ij,jo->bo", x, v, w),
        {"v": ((4, 5), ()), "w": ((5, 6), (1,))},
    ),
    "einsum of one weight and two activations": (lambda x, w: jnp.einsum("bi,bi,io->bo", x, x, w), W),
    "both weights": (lambda x, v, w: x @ (v @ w), {"v": ((4, 5), (0,)), "w": ((5, 4), (1,))}),
    "both weights by einsum": (
        lambda x, v, w: jnp.einsum("ij,jk->ik", v, w) + x.sum(),
        {"v": ((4, 5), (0,)), "w": ((5, 4), (1,))},
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_form_of_the_op(name):
    if name == "both weights":
        # The product is computed from parameters, so x @ (...) is an op without a weight: that is warned of.
        with pytest.warns(qconfig.QuantizationWarning, match="computed from v, w"):
            model = NnxModel(OPS[name][0], {"v": (4, 5), "w": (5, 4)})
            quantized = qwix.quantize_model(model, provider(), normal(3, 4))
        assert isinstance(quantized.v, WithAux) and isinstance(quantized.w, WithAux)
        expected = normal(3, 4) @ (fake(model.v[...], (0,)) @ fake(model.w[...], (1,)))
        np.testing.assert_allclose(quantized(normal(3, 4)), expected, rtol=1e-4, atol=1e-4)
        return
    function, params = OPS[name]
    check(function, normal(3, 4), params)


VIEWS = {
    "transpose": (lambda x, w: x @ w.T, {"w": ((6, 4), (0,))}),
    "jnp.transpose": (lambda x, w: x @ jnp.transpose(w), {"w": ((6, 4), (0,))}),
    "mT": (lambda x, w: x @ w.mT, {"w": ((6, 4), (0,))}),
    "swapaxes": (lambda x, w: x @ jnp.swapaxes(w, 0, 1), {"w": ((6, 4), (0,))}),
    "moveaxis": (lambda x, w: x @ jnp.moveaxis(w, 0, 1), {"w": ((6, 4), (0,))}),
    "lax.transpose": (lambda x, w: x @ jax.lax.transpose(w, (1, 0)), {"w": ((6, 4), (0,))}),
    "cast": (lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), W),
    "jnp.asarray": (lambda x, w: x @ jnp.asarray(w, jnp.float32), W),
    "stop_gradient": (lambda x, w: x @ jax.lax.stop_gradient(w), W),
    "checkpoint_name": (lambda x, w: x @ checkpoint_name(w, "w"), W),
    "squeezed": (lambda x, w: x @ w.squeeze(0), {"w": ((1, 4, 6), (2,))}),
    "expanded": (lambda x, w: (x[None] @ w[None])[0], W),
    "expanded by function": (lambda x, w: (x[None] @ jnp.expand_dims(w, 0).mT)[0], {"w": ((6, 4), (0,))}),
    "indexed": (lambda x, w: x @ w[1], {"w": ((2, 4, 6), (0, 2))}),
    "indexed from the end": (lambda x, w: x @ w[-1], {"w": ((2, 4, 6), (0, 2))}),
    "two slices of one": (lambda x, w: x @ w[:, :3] + x @ w[:, 3:], W),
    "lax.slice": (lambda x, w: x @ jax.lax.slice(w, (0, 1), (4, 5)), W),
    "slice_in_dim": (lambda x, w: x @ jax.lax.slice_in_dim(w, 1, 5, axis=1), W),
    "split": (lambda x, w: sum(x @ part for part in jnp.split(w, 2, axis=1)), W),
    "unstacked": (lambda x, w: sum(x @ part for part in jnp.unstack(w)), {"w": ((2, 4, 6), (0, 2))}),
    "concatenated outputs": (
        lambda x, v, w: x @ jnp.concatenate([v, w], axis=1),
        {"v": ((4, 5), (1,)), "w": ((4, 6), (1,))},
    ),
    "transposed, then concatenated": (
        lambda x, v, w: x @ jnp.concatenate([v.T, w.T], axis=1),
        {"v": ((5, 4), (0,)), "w": ((6, 4), (0,))},
    ),
    "identity einsum": (lambda x, w: x @ jnp.einsum("ij->ji", w), {"w": ((6, 4), (0,))}),
    "tied": (lambda x, w: (x @ w) @ w.T, None),
    "vmap over experts": (lambda x, w: jax.vmap(lambda w: x @ w)(w), {"w": ((2, 4, 6), (0, 2))}),
    "vmap over the last axis": (lambda x, w: jax.vmap(lambda w: x @ w, 2)(w), {"w": ((4, 6, 2), (1, 2))}),
}


@pytest.mark.parametrize("name", VIEWS)
def test_weight_that_was_changed_in_layout_first(name):
    function, params = VIEWS[name]
    if params is None:
        # One weight, two ops that share its scales along different axes: nothing fits both.
        with pytest.raises(ValueError, match="w is used by two ops that want it quantized in different ways"):
            qwix.quantize_model(NnxModel(function, {"w": (4, 6)}), provider(), normal(3, 4))
        return
    check(function, normal(3, 4), params, rtol=0.05 if name == "cast" else 1e-4)


def test_reshaped_weights_are_stored_in_the_shape_of_the_op():
    x = normal(3, 4)
    for function, shape, stored, own in (
        (lambda x, w: x @ w.reshape(4, 6), (4, 2, 3), (4, 6), (1,)),
        (lambda x, w: x @ w.reshape(4, -1), (2, 2, 6), (4, 6), (1,)),
        (lambda x, w: x[0] @ w.ravel(), (2, 2), (4,), ()),
        (lambda x, w: jnp.dot(x, jnp.reshape(w, (4, 6)).astype(jnp.float32)), (24,), (4, 6), (1,)),
    ):
        model = NnxModel(function, {"w": shape})
        quantized = qwix.quantize_model(model, provider(), x)
        assert quantized.w.shape == stored
        expected = function(x, fake(model.w[...].reshape(stored), own))
        np.testing.assert_allclose(quantized(x), expected, rtol=1e-4, atol=1e-4)
        fresh = qwix.quantize_params({"w": model.w[...]}, quantized)
        np.testing.assert_array_equal(fresh["w"]["array"]["qvalue"], quantized.w.array.qvalue[...])


def test_tiles_follow_a_transposed_and_an_indexed_weight():
    x = normal(3, 8)
    for function, shape, scale_shape in (
        (lambda x, w: x @ w.T, (6, 8), (6, 2)),
        (lambda x, w: x @ w[0], (2, 8, 6), (2, 2, 6)),
        (lambda x, w: jnp.einsum("bi,oi->bo", x, w), (6, 8), (6, 2)),
    ):
        model = NnxModel(function, {"w": shape})
        quantized = qwix.quantize_model(model, provider(tile_size=4), x)
        assert quantized.w.array.scale.shape == scale_shape
        expected = function(x, qwix.dequantize(quantized.w.value.array))
        np.testing.assert_allclose(quantized(x), expected, rtol=1e-4, atol=1e-4)


CONVS = {
    "NHWC": ((2, 6, 6, 4), (3, 3, 4, 5), ("NHWC", "HWIO", "NHWC"), 1, 3),
    "NCHW": ((2, 4, 6, 6), (5, 4, 3, 3), ("NCHW", "OIHW", "NCHW"), 1, 0),
    "1D grouped": ((2, 6, 4), (3, 2, 6), ("NWC", "WIO", "NWC"), 2, 2),
    "depthwise": ((2, 6, 4), (3, 1, 4), ("NWC", "WIO", "NWC"), 4, 2),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("rule", [{}, {"act_qtype": jnp.int8}, {"weight_qtype": jnp.int4, "act_qtype": jnp.int8}])
def test_convolutions(name, rule):
    x_shape, w_shape, numbers, groups, out_axis = CONVS[name]

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,) * (x.ndim - 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    x, model = normal(*x_shape), NnxModel(conv, {"w": w_shape})
    quantized = qwix.quantize_model(model, provider(**rule), x)
    assert quantized.w.array.scale.shape == tuple(n if i == out_axis else 1 for i, n in enumerate(w_shape))
    fake_x = fake(x, (0,)) if rule else x
    expected = conv(fake_x, qwix.dequantize(quantized.w.value.array))
    np.testing.assert_allclose(quantized(x), expected, rtol=1e-4, atol=1e-4)


def test_precision_and_dtype_are_passed_on():
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return qwix.dot_general(*args, **kwargs)

    class Provider(qwix.PtqProvider):
        def __init__(self, rules):
            super().__init__(rules, _dot_general_fn=spy)

    def call(x, w):
        return jax.lax.dot_general(x, w, DIMS, jax.lax.Precision.HIGHEST, jnp.bfloat16)

    p = Provider([qwix.QuantizationRule(weight_qtype=jnp.int8)])
    quantized = qwix.quantize_model(NnxModel(call, {"w": (4, 6)}), p, normal(3, 4))
    assert quantized(normal(3, 4)).dtype == jnp.bfloat16
    assert seen[-1]["precision"] == jax.lax.Precision.HIGHEST
    assert seen[-1]["preferred_element_type"] == jnp.bfloat16


# --- what is a weight -----------------------------------------------------------------------------


def test_parameters_of_equal_shape_are_told_apart():
    def call(x, a, b):
        return (x @ a) * b[0, 0]  # b is no weight of a matmul

    check(call, normal(3, 4), {"a": ((4, 4), (1,)), "b": ((4, 4), None)})


def test_activation_of_a_parameters_shape_is_an_activation():
    x = normal(4, 4)
    model = NnxModel(lambda x, w: (x @ x) @ w, {"w": (4, 4)})
    quantized = qwix.quantize_model(model, provider(act_qtype=jnp.int8), x)
    first = fake(x, (0,)) @ fake(x, (1,))
    expected = fake(first, (0,)) @ fake(model.w[...], (1,))
    np.testing.assert_allclose(quantized(x), expected, rtol=1e-3, atol=1e-3)


def test_parameters_of_parents_and_of_other_modules():
    class Child(nnx.Module):
        def __call__(self, x, w):
            return x @ w

    class Parent(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(normal(4, 4, seed=1))
            self.child = Child()
            self.table = nnx.List([nnx.Param(normal(4, 4, seed=2))])
            self.named = nnx.Dict({"w": nnx.Param(normal(4, 4, seed=3))})

        def __call__(self, x):
            return self.child(self.child(self.child(x, self.w[...]), self.table[0]), self.named["w"][...])

    x, model = normal(3, 4), Parent()
    quantized = qwix.quantize_model(model, provider(module_path="child"), x)
    assert all(isinstance(w, WithAux) for w in (quantized.w, quantized.table[0], quantized.named["w"]))
    expected = x @ fake(model.w[...], (1,)) @ fake(model.table[0][...], (1,)) @ fake(model.named["w"][...], (1,))
    np.testing.assert_allclose(quantized(x), expected, rtol=1e-4, atol=1e-4)


def test_rules_for_activations_only_leave_weights():
    x, model = normal(3, 4), NnxModel(jnp.dot, {"w": (4, 6)})
    rule = {"weight_qtype": None, "act_qtype": jnp.int8}
    quantized = qwix.quantize_model(model, provider(**rule), x)
    assert isinstance(quantized.w, nnx.Param)
    np.testing.assert_allclose(quantized(x), fake(x, (0,)) @ model.w[...], rtol=1e-4, atol=1e-4)


def test_integer_operands_and_unmatched_ops_stay():
    x = jnp.arange(12).reshape(3, 4)
    model = NnxModel(lambda x, w: (x @ x.T).astype(jnp.float32) @ jnp.einsum("ij->ij", w), {"w": (3, 6)})
    quantized = qwix.quantize_model(model, provider(act_qtype=jnp.int8), x)
    assert isinstance(quantized.w, WithAux)
    np.testing.assert_allclose(quantized(x), model(x), rtol=0.05, atol=60)
    untouched = qwix.quantize_model(model, provider(op_names=("conv_general_dilated",)), x)
    assert isinstance(untouched.w, nnx.Param)
    np.testing.assert_array_equal(untouched(x), model(x))


def test_weight_used_in_another_way_is_its_float_self():
    def call(x, w):
        return x @ w + jnp.sum(w) + jnp.linalg.norm(w) + (w * 2).mean() + jnp.take(w, jnp.array([0]), axis=0).sum()

    check(call, normal(3, 4), W)


# --- WithAux --------------------------------------------------------------------------------------


def weight(shape=(4, 6), tile=None, boxed=False):
    how = qarray.HowToQuantize(
        qtype=jnp.int8, channelwise_axes=(1,), tiled_axes={0: tile} if tile else {}, calibration_method="absmax"
    )
    array = qarray.quantize(normal(*shape), how)
    return WithAux(jax.tree.map(nnx.Param, array) if boxed else array, how)


@pytest.mark.parametrize("boxed", [False, True])
def test_with_aux_looks_like_a_variable(boxed):
    w = weight(boxed=boxed)
    full = qwix.dequantize(w.value.array)
    assert (w.shape, w.ndim, w.dtype) == ((4, 6), 2, jnp.float32)
    assert isinstance(w.value.array.qvalue, jax.Array) and isinstance(w.get_value(), WithAux)
    assert w[...].shape == (4, 6) and w.astype(jnp.bfloat16).dtype == jnp.bfloat16
    for changed, expected in (
        (w.T, full.T),
        (w.mT, full.mT),
        (w.transpose(1, 0), full.T),
        (w.swapaxes(0, 1), full.T),
        (w[1:3], full[1:3]),
        (w[:, 2], full[:, 2]),
        (w.reshape(4, 6), full),
        (w.reshape((4, 2, 3)), full.reshape(4, 2, 3)),
        (w.apply_layout(jnp.expand_dims, 0), full[None]),
        (WithAux.concatenate([w, w], axis=1), jnp.concatenate([full, full], 1)),
    ):
        np.testing.assert_array_equal(qwix.dequantize(changed.array), expected)
    np.testing.assert_array_equal(jnp.asarray(w), full)
    for result, expected in (
        (w * 2, full * 2),
        (1 - w, 1 - full),
        (-w, -full),
        (w / w, full / full),
        (jnp.ones(6) + w, full + 1),
        (w @ w.T, full @ full.T),
        (jnp.ones((2, 4)) @ w, jnp.ones((2, 4)) @ full),
    ):
        np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert isinstance(jax.tree.map(lambda x: x, w), WithAux)


def test_with_aux_refuses_what_scales_cannot_follow():
    w = weight((8, 6), tile=4)
    with pytest.raises(ValueError, match=r"already have the target shape.*self.shape=\(8, 6\)"):
        w.reshape(6, 8)
    with pytest.raises(TypeError, match="not a layout change"):
        w.apply_layout(jnp.flip)


def test_concatenation_of_tiled_and_shared_scales():
    parts = [weight((8, 6), tile=4), weight((4, 6), tile=4), weight((4, 6))]
    expected = jnp.concatenate([qwix.dequantize(p.array) for p in parts], 0)
    joined = WithAux.concatenate(parts, 0)
    np.testing.assert_array_equal(qwix.dequantize(joined.array), expected)
    int4 = qarray.quantize(normal(4, 6), qarray.HowToQuantize(qtype=jnp.int4))
    with pytest.raises(ValueError, match="different formats"):
        with_aux.concatenate_qarrays([parts[0].array, int4], 0)


def test_create_quantized_param_in_a_module_of_ones_own():
    class Own(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(normal(4, 6))

        def __call__(self, x):
            how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(1,))
            w = self.w
            if not isinstance(w, WithAux):
                w = boxed_param.create_quantized_param("w", w[...], how)
            return x @ qwix.dequantize(w.value.array)

    model = Own()
    y = model(normal(3, 4))
    assert isinstance(model.w, WithAux) and isinstance(model.w.array.qvalue, nnx.Param)
    np.testing.assert_array_equal(model(normal(3, 4)), y)
