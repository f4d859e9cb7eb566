"""Steps from a parameter to an operand: what they do to shapes, to granularity and to quantized arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwix._src import interception, provenance
from qwix._src.core import qarray
from qwix._src.provenance import ParamRef, View

run = interception.wrap_func_intercepted
LAYOUT = interception.Interceptor(provenance.LAYOUT_INTERCEPTS, id="layout")


def follow(function, shape, **kwargs):
    """The ref of what `function` makes of a parameter of a shape."""
    w = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    with provenance.session():
        provenance.track(w, ParamRef(None, ("blocks", 0, "w"), w))
        out = run(function, lambda: LAYOUT, disable_jit=False)(w)
        return provenance.lookup(out), out, w


STEPS = {
    "same": (lambda w: w, ()),
    "cast": (lambda w: w.astype(jnp.bfloat16), ()),
    "asarray": (jnp.asarray, ()),
    "transpose": (lambda w: w.T, ("transpose",)),
    "transpose of axes": (lambda w: jnp.transpose(w, (1, 0)), ("transpose",)),
    "reshape": (lambda w: w.reshape(2, 2, 6), ("reshape",)),
    "reshape to the same": (lambda w: w.reshape(4, 6), ()),
    "ravel": (lambda w: w.ravel(), ("reshape",)),
    "expand": (lambda w: w[None], ("unit",)),
    "newaxis by function": (lambda w: jnp.expand_dims(w, (0, 2)), ("unit",)),
    "expand and squeeze": (lambda w: jnp.squeeze(jnp.expand_dims(w, 0), 0), ("unit", "unit")),
    "slice": (lambda w: w[1:3], ("index",)),
    "int": (lambda w: w[2], ("index", "unit")),
    "strides": (lambda w: w[::2, 1], ("index", "unit")),
    "lax.slice": (lambda w: jax.lax.slice(w, (0, 1), (4, 3)), ("index",)),
    "index_in_dim": (lambda w: jax.lax.index_in_dim(w, 1, keepdims=False), ("index", "unit")),
    "split": (lambda w: jnp.split(w, 2, axis=1)[1], ("index",)),
    "lax.split": (lambda w: jax.lax.split(w, (1, 3))[1], ("index",)),
    "unstack": (lambda w: jnp.unstack(w)[3], ("index",)),
    "chain": (lambda w: jnp.moveaxis(w.T.reshape(2, 3, 4), 0, 1)[:, 1], ("transpose", "reshape", "transpose", "index")),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_followed(name):
    function, kinds = STEPS[name]
    ref, out, w = follow(function, (4, 6))
    assert isinstance(ref, ParamRef), "lost"
    assert tuple(v.kind for v in ref.views)[: len(kinds)] == kinds
    assert (ref.name, ref.path) == ("w", "blocks/0/w")
    np.testing.assert_array_equal(ref.apply(w).astype(out.dtype), out)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w * 2,
        lambda w: w[::-1],
        lambda w: w[jnp.array([0, 1])],
        lambda w: w.astype(jnp.int32),
        lambda w: jnp.pad(w, 1),
        lambda w: jnp.broadcast_to(w, (2, 4, 6)),
        lambda w: w.sum(0),
    ],
)
def test_what_is_no_layout_change_is_no_parameter(function):
    ref, out, w = follow(function, (4, 6))
    if ref is not None:  # a negative stride is one, if the array is what the steps say
        np.testing.assert_array_equal(ref.apply(w), out)
    else:
        assert out is not w


def test_two_parameters_joined():
    a, b = jnp.ones((2, 3)), jnp.zeros((4, 3))
    with provenance.session():
        for name, w in (("a", a), ("b", b)):
            provenance.track(w, ParamRef(None, (name,), w))
        out = run(lambda: jnp.concatenate([a, b]), lambda: LAYOUT, disable_jit=False)()
        ref = provenance.lookup(out)
        assert isinstance(ref, provenance.ConcatRef)
        assert [p.path for p in ref.parts] == ["a", "b"] and ref.sizes == (2, 4) and ref.axis == 0
        mixed = run(lambda: jnp.concatenate([a, jnp.ones((1, 3))]), lambda: LAYOUT, disable_jit=False)()
        assert provenance.lookup(mixed) is None


def test_transformations_hide_nothing():
    seen = []
    w = jnp.ones((2, 4, 6))

    def look(x):
        seen.append(provenance.lookup(x))
        return x.sum()

    with provenance.session():
        provenance.track(w, ParamRef(None, ("w",), w))
        jax.vmap(look)(w)
        jax.vmap(look, in_axes=2)(w)
        jax.vmap(jax.vmap(look))(w)
        jax.grad(look)(w)
        jax.jvp(look, (w,), (w,))
        jax.linearize(look, w)
    kinds = [[(v.kind, v.arg) for v in ref.views] for ref in seen]
    assert kinds[:3] == [[("map", (0,))], [("map", (2,))], [("map", (0,)), ("map", (0,))]]
    assert all(k == [] for k in kinds[3:]) and len(kinds) >= 6


def test_nothing_is_known_outside_of_a_session():
    w = jnp.ones(2)
    provenance.track(w, ParamRef(None, ("w",), w))
    assert provenance.lookup(w) is None and provenance.book() is None
    with provenance.session() as outer, provenance.session() as inner:
        assert outer is inner is provenance.book()


# --- granularity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out_shape,granularity,in_shape,expected",
    [
        ((4, 6), (None, 1), (4, 2, 3), (None, 1, 1)),
        ((4, 6), (1, None), (4, 2, 3), (1, None, None)),
        ((4, 6), (None, 1), (2, 2, 6), (None, None, 1)),
        ((4, 2, 3), (None, 1, 1), (4, 6), (None, 1)),
        ((4, 2, 3), (None, None, 1), (24,), None),
        ((4, 6), (2, 1), (2, 2, 6), (1, None, 1)),
        ((8, 6), (4, None), (2, 4, 6), (1, None, None)),
        ((8,), (4,), (4, 2), (2, None)),
        ((1, 4, 6), (None, None, 1), (4, 6), (None, 1)),
        ((24,), (1,), (4, 6), (1, 1)),
        ((24,), (None,), (4, 6), (None, None)),
    ],
)
def test_pulling_granularity_through_a_reshape(out_shape, granularity, in_shape, expected):
    view = View("reshape", out_shape, in_shape)
    if expected is None:
        with pytest.raises(ValueError, match="scales do not follow a reshape"):
            view.pull(granularity)
        return
    plain = lambda shape, g: tuple(n if t is None else t for n, t in zip(shape, g, strict=True))  # noqa: E731
    assert plain(in_shape, view.pull(granularity)) == plain(in_shape, expected)


def test_pull_names_the_parameter():
    w = jnp.ones((4, 6))
    ref = ParamRef(None, ("a", "w"), w, (View("reshape", (24,), (4, 6)),))
    with pytest.raises(ValueError, match="a/w: scales do not follow.*Store the parameter in the shape"):
        ParamRef(None, ("a", "w"), w, (View("reshape", (3, 8), (4, 6)),)).pull_axes((1, None))
    assert ref.pull_axes((None,)) in ((None, None), (4, 6))


SHAPES = st.sampled_from([(4, 6), (2, 3, 4), (8, 2), (2, 2, 2, 3)])


@given(SHAPES, st.randoms(use_true_random=False), st.data())
def test_quantizing_the_parameter_is_quantizing_the_operand(shape, random, data):
    """quantize(view(w), how) == view(quantize(w, how pulled through the view)), bit for bit."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    views, current = [], w
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["transpose", "index", "reshape", "unit"]))
        if kind == "transpose":
            arg = tuple(random.sample(range(current.ndim), current.ndim))
        elif kind == "index" and current.ndim > 1:
            arg = (data.draw(st.integers(0, current.shape[0] - 1)), *[slice(None)] * (current.ndim - 1))
        elif kind == "reshape" and current.ndim > 1:
            arg = (current.shape[0] * current.shape[1], *current.shape[2:])
        else:
            kind, arg = "unit", (1, *current.shape)
        view = View(kind, arg, tuple(current.shape))
        views.append(view)
        current = view.apply(current)
    ref = ParamRef(None, ("w",), w, tuple(views))
    own = [data.draw(st.booleans()) for _ in range(current.ndim)]
    granularity = tuple(1 if o else None for o in own)
    try:
        pulled = ref.pull_axes(granularity)
    except ValueError:
        return  # says so

    def how(shape, granularity):
        return qarray.HowToQuantize(
            qtype=jnp.int8,
            channelwise_axes=tuple(i for i, g in enumerate(granularity) if g == 1),
            tiled_axes={i: g for i, (n, g) in enumerate(zip(shape, granularity, strict=True)) if g not in (None, 1, n)},
        )

    direct = qarray.quantize(current, how(current.shape, granularity))
    stored = qarray.quantize(w, how(w.shape, pulled))
    np.testing.assert_array_equal(qarray.dequantize(ref.apply(stored)), qarray.dequantize(direct))
