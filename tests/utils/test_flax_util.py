"""Questions about the running module, asked inside Linen and NNX modules alike; boxes and partition specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwix._src import provenance
from qwix._src.core import qarray
from qwix._src.utils import flax_util

KEY = jax.random.key(0)


def in_linen(function):
    """Runs a function inside a Linen module with parameters a (2, 3), b (3,) and c (2, 3)."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self):
            params = {n: self.param(n, nn.initializers.normal(), s) for n, s in SHAPES.items()}
            return function(params)

    return Model().init_with_output(KEY)


SHAPES = {"a": (2, 3), "b": (3,), "c": (2, 3)}


class NnxModel(nnx.Module):
    def __init__(self, function):
        self.function = function
        for name, shape in SHAPES.items():
            setattr(self, name, nnx.Param(jax.random.normal(KEY, shape)))
        self.qwix_path = ("here", 0)

    def __call__(self):
        return self.function({n: getattr(self, n)[...] for n in SHAPES})


def run(framework, function):
    """(result, what the module holds afterwards)."""
    if framework == "linen":
        output, variables = in_linen(function)
        return output, variables
    model = NnxModel(function)
    return model(), model


BOTH = pytest.mark.parametrize("framework", ["linen", "nnx"])


@BOTH
def test_current_module(framework):
    module, path = run(framework, lambda _: (flax_util.get_current_module(), flax_util.get_current_module_path()))[0]
    assert isinstance(module, nn.Module if framework == "linen" else nnx.Module)
    assert path == (() if framework == "linen" else ("here", 0))


def test_outside_of_a_module():
    with pytest.raises(ValueError, match="no current module"):
        flax_util.get_current_module()

    class Unknown(nnx.Module):
        def __call__(self):
            return flax_util.get_current_module_path()

    with pytest.raises(ValueError, match="Unknown has no path.*Quantize the model again"):
        Unknown()()


@BOTH
def test_innermost_module_is_current(framework):
    if framework == "linen":

        class Inner(nn.Module):
            def __call__(self):
                return flax_util.get_current_module_path()

        class Outer(nn.Module):
            @nn.compact
            def __call__(self):
                return Inner(name="inner")(), flax_util.get_current_module_path()

        assert Outer().apply({}) == (("inner",), ())
    else:
        inner = NnxModel(lambda _: flax_util.get_current_module())
        outer = NnxModel(lambda _: (inner(), flax_util.get_current_module()))
        assert outer() == (inner, outer)


@BOTH
def test_find_param_without_interception(framework):
    def function(params):
        found = [flax_util.find_param(params[n]) for n in SHAPES]
        found.append(flax_util.find_param(params["b"].astype(jnp.bfloat16)))  # the only one of this shape
        found.append(flax_util.find_param(jnp.ones((7, 7))))
        with pytest.raises(ValueError, match=r"may be any of the parameters \['a', 'c'\]"):
            flax_util.find_param(params["a"] * 2)
        return found

    assert run(framework, function)[0] == ["a", "b", "c", "b", None]


@BOTH
def test_find_param_in_a_session_is_by_identity(framework):
    def function(params):
        with provenance.session():
            copies = [flax_util.find_param(2 * params[n]) for n in SHAPES]
            return [flax_util.find_param(params[n]) for n in SHAPES] + copies

    assert run(framework, function)[0] == ["a", "b", "c", None, None, None]


@BOTH
def test_get_or_create_param(framework):
    def function(params):
        first = flax_util.get_or_create_param("new", lambda: jnp.full((2,), 3.0))
        again = flax_util.get_or_create_param("new", lambda: jnp.full((2,), 4.0))
        random = flax_util.get_or_create_param("a", lambda: jnp.zeros((2, 3)))
        np.testing.assert_array_equal(random, params["a"])
        return first, again

    (first, again), state = run(framework, function)
    np.testing.assert_array_equal(first, [3.0, 3.0])
    np.testing.assert_array_equal(again, first)
    new = state["params"]["new"] if framework == "linen" else state.new[...]
    np.testing.assert_array_equal(new, first)
    if framework == "nnx":
        assert type(state.new) is nnx.Param
        with pytest.raises(ValueError, match=r"here/0/new has shape \(2,\), but \(5,\) is needed"):
            NnxModel.__call__(_with(state, lambda _: flax_util.get_or_create_param("new", lambda: jnp.ones(5))))


def _with(model, function):
    model.function = function
    return model


@BOTH
def test_get_or_create_param_with_structure_and_key(framework):
    def function(_):
        quantized = flax_util.get_or_create_param("q", lambda: qarray.quantize_api(jnp.ones((2, 2)), jnp.int8))
        if framework == "nnx":
            flax_util.get_current_module().qwix_rngs = nnx.data(nnx.Rngs(params=3))
        drawn = flax_util.get_or_create_param("r", lambda key: jax.random.normal(key, (2,)), need_rng=True)
        return quantized, drawn

    (quantized, drawn), state = run(framework, function)
    assert isinstance(quantized, qarray.QArray) and isinstance(quantized.qvalue, jax.Array)
    assert np.any(drawn)
    if framework == "nnx":
        assert isinstance(state.q, qarray.QArray) and isinstance(state.q.qvalue, nnx.Param)
        param_type = type("Mine", (nnx.Param,), {})
        _with(state, lambda _: flax_util.get_or_create_param("m", lambda: jnp.ones(1), nnx_param_type=param_type))()
        assert type(state.m) is param_type


def set_value(variable, value):
    if isinstance(variable, nnx.Variable):
        variable.set_value(value)
    else:
        variable.value = value


@BOTH
def test_variables(framework):
    def function(_):
        stat = flax_util.get_or_create_variable("quant_stats", "s", lambda: {"count": jnp.zeros((), jnp.int32)})
        set_value(stat, {"count": jnp.int32(4)})
        same = flax_util.get_or_create_variable("quant_stats", "s", lambda: {"count": jnp.zeros((), jnp.int32)})
        with pytest.raises(ValueError, match="s has shape"):
            flax_util.get_or_create_variable("quant_stats", "s", lambda: {"count": jnp.zeros((3,), jnp.int32)})
        value = same.value if framework == "linen" else same.get_value()
        deleted = flax_util.get_and_delete_variable("quant_stats", "s")
        assert flax_util.get_and_delete_variable("quant_stats", "s") is None
        return value["count"], deleted["count"], isinstance(stat, flax_util.QuantStat)

    (value, deleted, is_stat), state = run(framework, function)
    assert value == deleted == 4 and is_stat == (framework == "nnx")
    assert not state.get("quant_stats") if framework == "linen" else not hasattr(state, "s")


def test_make_rng():
    with pytest.raises(ValueError, match="stream 'dropout' is needed in here/0: pass rngs"):
        run("nnx", lambda _: flax_util.make_rng("dropout"))

    def draw(_):
        flax_util.get_current_module().qwix_rngs = nnx.data(nnx.Rngs(0, dropout=1))
        return [flax_util.make_rng(s) for s in ("dropout", "other", "other")]

    keys = run("nnx", draw)[0]
    assert len({str(jax.random.key_data(k)) for k in keys}) == 3
    assert isinstance(run("linen", lambda _: flax_util.make_rng("params"))[0], jax.Array)


def test_should_update_quant_stats():
    assert run("nnx", lambda _: flax_util.should_update_quant_stats())[0]
    assert not run("linen", lambda _: flax_util.should_update_quant_stats())[0]  # init

    class Model(nn.Module):
        def __call__(self):
            return flax_util.should_update_quant_stats()

    assert Model().apply({}, mutable=["quant_stats"])[0]
    assert not Model().apply({})

    def disabled(_):
        flax_util.get_current_module().disable_quant_stats_update = True
        return flax_util.should_update_quant_stats()

    assert not run("nnx", disabled)[0]


# --- boxes ----------------------------------------------------------------------------------------


def test_unbox_to_any_depth():
    x = jnp.ones((2, 2))
    q = qarray.quantize_api(x, jnp.int8)
    for boxed, expected in (
        (x, x),
        (nnx.Param(x), x),
        (nn.Partitioned(x, ("a", None)), x),
        (nn.LogicallyPartitioned(nn.Partitioned(x, ("a", None)), ("b", None)), x),
        ({"a": nnx.Param(x)}, {"a": x}),
        (jax.tree.map(nnx.Param, q), q),
        (nnx.Param(q), q),
        (None, None),
        (jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)),
    ):
        result = flax_util.unbox(boxed)
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.shape(a), np.shape(b)), result, expected)
    assert flax_util.unbox(nnx.Param(x)) is x and flax_util.unbox(nn.Partitioned(x, ("a", None))) is x


@pytest.mark.parametrize(
    "spec,change,expected",
    [
        (("a", "b"), {}, ("a", "b")),
        (("a", "b"), {"shape": (1, 8)}, (None, "b")),
        (P("a", "b"), {"shape": (8, 1)}, P("a", None)),
        (("a", "b", "c"), {"split": (1,)}, ("a", "b", None, "c")),
        (("a", "b"), {"split": (0, 1)}, ("a", None, "b", None)),
        (("a", "b", None, "c"), {"merge": (1,)}, ("a", "b", "c")),
        (("a", None, "b", None), {"merge": (0, 1)}, ("a", "b")),
        (("a", "b"), {"transpose": (1, 0)}, ("b", "a")),
        (("a", "b"), {"transpose": (1, None, 0)}, ("b", None, "a")),
        (("a",), {"transpose": (0, 2)}, ("a", None)),
        (("a", ("b", "c")), {"transpose": (1, 0), "shape": (4, 1)}, (("b", "c"), None)),
    ],
)
def test_update_sharding(spec, change, expected):
    result = flax_util.update_sharding(spec, **change)
    assert result == expected and type(result) is type(spec)


def test_update_sharding_takes_one_change():
    with pytest.raises(ValueError, match="one of split, merge and transpose"):
        flax_util.update_sharding(("a",), split=(0,), merge=(0,))


def test_update_boxed():
    x = jnp.ones((4, 6))
    for box in (nn.Partitioned(x, ("a", "b")), nn.LogicallyPartitioned(x, ("a", "b"))):
        new = flax_util.update_boxed(box, value=jnp.ones((6, 1)), transpose=(1, 0))
        assert type(new) is type(box) and new.names == ("b", None) and new.value.shape == (6, 1)
        assert box.names == ("a", "b")
        assert flax_util.update_boxed(box).value is x
    metadata = nnx.Param(x, note="kept").get_metadata() | {"out_sharding": ("a", "b")}
    param = nnx.Param.from_metadata(x, metadata)  # checks no mesh
    new = flax_util.update_boxed(param, value=jnp.ones((4, 1)))
    assert type(new) is nnx.Param and new[...].shape == (4, 1)
    assert new.get_metadata()["out_sharding"] == ("a", None) and new.get_metadata()["note"] == "kept"
    assert param.get_metadata()["out_sharding"] == ("a", "b")
    assert flax_util.update_boxed(x, value=2 * x, split=(0,)).shape == (4, 6)


def test_get_value_from_path():
    tree = {"layers": [{"w": 3}, nnx.Dict(b=4)], "items": 5}
    get = flax_util.get_value_from_path
    assert get(tree, ("layers", 0, "w")) == 3
    assert get(tree, ("layers", 1, "b")) == 4
    assert get(tree, ("items",)) == 5  # a key, not the method of dict
    assert get(tree, ()) is tree
    for nowhere in (("no",), ("layers", 7), ("layers", 0, "w", "x"), ("layers", "w")):
        assert get(tree, nowhere) is None
