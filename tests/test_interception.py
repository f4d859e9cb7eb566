"""Every clause of the contract in `qwix._src.interception`, with ops of JAX and of a module made here."""

import sys
import threading
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import dot_general
from jax.numpy import dot, einsum

from qwix._src import interception, qconfig

DIMS = (((1,), (0,)), ((), ()))
ONES = np.ones((2, 2), np.float32)


def intercepted(func, mapping, ident=None, **kwargs):
    interceptor = interception.Interceptor(mapping, id=ident if ident is not None else object())
    return interception.wrap_func_intercepted(func, lambda: interceptor, disable_jit=False, **kwargs)


def constant(value):
    return lambda *args, **kwargs: value


@pytest.fixture
def library(monkeypatch):
    """A module with the kinds of callables that a library has."""
    monkeypatch.setattr(interception, "interception_manager", interception._InterceptionManager())
    module = types.ModuleType("qwix_test_library")
    source = """
import functools

def plain(x, y=1, *rest, z=2, **options): return ("plain", x, y, rest, z, options)
alias = plain
def closure():
    hidden = 5
    def inner(x): return ("inner", x + hidden)
    return inner
closed = closure()
partial_ = functools.partial(plain, 7)
def caller(x): return plain(x)

class Base:
    def method(self, x): return ("method", x)
class Class(Base):
    def method(self, x): return ("sub",) + super().method(x)
    @staticmethod
    def static(x): return ("static", x)
    @classmethod
    def of_class(cls, x): return (cls.__name__, x)
"""
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize(
    "call",
    [
        lambda x: jax.lax.dot_general(x, x, DIMS),
        lambda x: dot_general(x, x, DIMS),
        lambda x: partial(dot_general, dimension_numbers=DIMS)(x, x),
    ],
    ids=["attribute", "imported before", "partial"],
)
def test_plain_function_by_any_reference(call):
    assert intercepted(call, {"jax.lax.dot_general": constant(7)})(ONES) == 7
    np.testing.assert_array_equal(call(ONES), ONES @ ONES)


@pytest.mark.parametrize(
    "call,name",
    [
        (lambda x: einsum("ij->", x), "jax.numpy.einsum"),
        (lambda x: dot(x, x), "jax.numpy.dot"),  # a jitted function
        (lambda x: jnp.dot(x, x), "jax.numpy.dot"),
        (lambda x: jax.lax.scan(None, x), "jax.lax.scan"),  # a decorated one
    ],
)
def test_other_functions_of_jax(call, name):
    assert intercepted(call, {name: constant(7)})(ONES) == 7


def test_arguments_pass_as_they_are(library):
    seen = []
    handler = lambda *args, **kwargs: seen.append((args, kwargs))  # noqa: E731
    call = intercepted(lambda: library.plain(1, 2, 3, z=4, w=5), {"qwix_test_library.plain": handler})
    call()
    assert seen == [((1, 2, 3), {"z": 4, "w": 5})]
    assert library.plain(1, 2, 3, z=4, w=5) == ("plain", 1, 2, (3,), 4, {"w": 5})


def test_original_keeps_defaults_and_closure(library):
    original = interception.interception_manager.original
    names = {f"qwix_test_library.{n}": constant(0) for n in ("plain", "closed")}

    def call():
        assert library.plain(1) == 0 and library.closed(1) == 0
        return original("qwix_test_library.plain")(1), original("qwix_test_library.closed")(1)

    assert intercepted(call, names)() == (("plain", 1, 1, (), 2, {}), ("inner", 6))


def test_class_attributes(library):
    names = [f"qwix_test_library.Class.{n}" for n in ("method", "static", "of_class")]
    obj = library.Class()
    calls = {n: (lambda *a, n=n: n.rpartition(".")[2]) for n in names}
    run = lambda: (obj.method(1), obj.static(1), library.Class.static(1), obj.of_class(1))  # noqa: E731
    assert intercepted(run, calls)() == ("method", "static", "static", "of_class")
    assert run() == (("sub", "method", 1), ("static", 1), ("static", 1), ("Class", 1))


def test_primitive_bind_is_interceptable():
    seen = []

    def bind(primitive, *args, **params):
        seen.append(primitive.name)
        return interception.interception_manager.original(interception.PRIMITIVE_BIND_KEY)(primitive, *args, **params)

    jax.make_jaxpr(intercepted(jnp.sin, {interception.PRIMITIVE_BIND_KEY: bind}))(1.0)
    assert "sin" in seen


def test_unknown_name_says_so_and_patches_nothing(library):
    code = library.plain.__code__
    with pytest.raises(AttributeError, match="no_such"):
        intercepted(lambda: None, {"qwix_test_library.plain": constant(0), "jax.lax.no_such": constant(0)})()
    assert library.plain.__code__ is code
    with pytest.raises(AttributeError, match="no_module_of_this_name"):
        intercepted(lambda: None, {"no_module_of_this_name.f": constant(0)})()


def test_not_recursive():
    calls = []

    def handler(*args, **kwargs):
        calls.append(args)
        return dot_general(*args, **kwargs)

    intercepted(lambda x: dot_general(x, x, DIMS), {"jax.lax.dot_general": handler})(ONES)
    assert len(calls) == 1


def test_innermost_first_and_unmatched_to_the_outer(library):
    order = []

    def passing(label):
        def handler(*args, **kwargs):
            order.append(label)
            return library.plain(*args, **kwargs)

        return handler

    def run():
        return library.plain(1), library.closed(1)

    inner = intercepted(run, {"qwix_test_library.plain": passing("inner")})
    outer = intercepted(
        inner, {"qwix_test_library.plain": passing("outer"), "qwix_test_library.closed": constant("outer's")}
    )
    result = outer()
    assert order == ["inner", "outer"]
    assert result == (("plain", 1, 1, (), 2, {}), "outer's")
    order.clear()
    inner()
    assert order == ["inner"]


def test_a_name_and_its_alias_are_one_function(library):
    code = library.plain.__code__
    names = {"qwix_test_library.alias": constant(1), "qwix_test_library.plain": constant(2)}
    assert intercepted(lambda: library.plain(0), names)() in (1, 2)
    assert library.plain.__code__ is code
    assert library.plain(0)[0] == "plain"


def test_passive_handler_of_an_inner_does_not_hide_an_outer(library):
    seen = []

    @interception.passive
    def watch(original, *args):
        seen.append(args)
        return original(*args)

    name = "qwix_test_library.plain"
    run = intercepted(lambda: library.plain(3), {name: watch})
    assert run() == ("plain", 3, 1, (), 2, {})
    assert intercepted(run, {name: constant("outer")})() == "outer"
    assert seen == [(3,), (3,)]


def test_reentrant_handler_leaves_others_on(library):
    names = {
        "qwix_test_library.caller": interception.reentrant(library.plain),
        "qwix_test_library.plain": constant("seen"),
    }
    assert intercepted(lambda: library.caller(1), names)() == "seen"
    names["qwix_test_library.caller"] = library.plain
    assert intercepted(lambda: library.caller(1), names)()[0] == "plain"


def test_exception_restores_everything(library):
    codes = library.plain.__code__, jax.lax.dot_general.__code__, jnp.dot
    names = {"qwix_test_library.plain": constant(0), "jax.lax.dot_general": constant(0), "jax.numpy.dot": constant(0)}

    def fails():
        assert library.plain(1) == 0
        raise KeyError("from the model")

    with pytest.raises(KeyError, match="from the model"):
        intercepted(fails, names)()
    assert (library.plain.__code__, jax.lax.dot_general.__code__, jnp.dot) == codes
    assert interception.interception_manager.active == ()

    def handler(*args):
        raise KeyError("from the handler")

    def swallows():
        with pytest.raises(KeyError, match="from the handler"):
            library.plain(1)
        return len(interception.interception_manager.active)

    assert intercepted(swallows, {"qwix_test_library.plain": handler})() == 1


def test_nothing_is_patched_when_idle(library):
    codes = library.plain.__code__, jax.lax.dot_general.__code__
    before = jnp.dot
    names = {"qwix_test_library.plain": constant(0), "jax.lax.dot_general": constant(0), "jax.numpy.dot": constant(0)}

    def run():
        assert library.plain.__code__ is not codes[0] and jnp.dot is not before

    for _ in range(2):
        intercepted(intercepted(run, names), names)()
    assert (library.plain.__code__, jax.lax.dot_general.__code__) == codes
    assert jnp.dot is before and dot is before


def test_a_module_imported_meanwhile_gets_the_original_back(monkeypatch):
    late = types.ModuleType("qwix_test_late")

    def run():
        exec("from jax.numpy import dot", late.__dict__)
        monkeypatch.setitem(sys.modules, late.__name__, late)

    intercepted(run, {"jax.numpy.dot": constant(0)})()
    assert late.dot is jnp.dot


def test_code_exchanged_by_others_is_respected(library):
    name = "qwix_test_library.plain"
    intercepted(lambda: None, {name: constant(0)})()
    library.plain.__code__ = (lambda x: ("mended", x)).__code__
    run = intercepted(lambda: library.plain(1), {name: library.plain})
    assert run() == ("mended", 1)
    assert library.plain(1) == ("mended", 1)


def test_a_function_put_in_its_place_is_the_new_original(library):
    name = "qwix_test_library.plain"
    intercepted(lambda: None, {name: constant(0)})()
    library.plain = lambda x: ("new", x)
    run = intercepted(lambda: library.plain(1), {name: lambda x: (*library.plain(x), "handled")})
    assert run() == ("new", 1, "handled")
    assert library.plain(1) == ("new", 1)


def test_threads_have_their_own():
    started, results = threading.Barrier(3), {}

    def run(label):
        started.wait(10)
        for _ in range(20):
            results.setdefault(label, set()).add(dot_general(ONES, ONES, DIMS).tolist()[0][0])
        started.wait(10)

    def returning(value):
        return {"jax.lax.dot_general": constant(np.full((2, 2), value))}

    threads = [
        threading.Thread(target=intercepted(run, returning(10.0)), args=("a",)),
        threading.Thread(target=intercepted(run, returning(20.0)), args=("b",)),
        threading.Thread(target=run, args=("none",)),
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert results == {"a": {10.0}, "b": {20.0}, "none": {2.0}}


def test_jit_cache_does_not_cross_the_border():
    traces = []

    @jax.jit
    def helper(x):
        traces.append(None)
        return dot_general(x, x, DIMS)

    inside = intercepted(helper, {"jax.lax.dot_general": lambda x, *_: 5 * x}, ident="one")
    other = intercepted(helper, {"jax.lax.dot_general": lambda x, *_: 6 * x}, ident="two")
    for _ in range(2):
        np.testing.assert_array_equal(helper(ONES), 2 * ONES)
        np.testing.assert_array_equal(inside(ONES), 5 * ONES)
        np.testing.assert_array_equal(other(ONES), 6 * ONES)
    np.testing.assert_array_equal(jax.jit(inside)(ONES), 5 * ONES)
    np.testing.assert_array_equal(jax.jit(helper)(ONES), 2 * ONES)
    assert len(traces) == 3


def test_bare_mapping_has_an_identity_of_its_own():
    @jax.jit
    def helper(x):
        return dot_general(x, x, DIMS)

    for factor in (3, 4):  # a collected mapping's id would be the next one's
        mapping = {"jax.lax.dot_general": lambda x, *_, factor=factor: factor * x}
        run = interception.wrap_func_intercepted(helper, lambda m=mapping: m, disable_jit=False)
        del mapping
        np.testing.assert_array_equal(run(ONES), factor * ONES)
        del run


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.vmap,
        jax.checkpoint,
        lambda f: lambda x: jax.lax.scan(lambda c, row: (c, f(row)), 0, x)[1],
        lambda f: lambda x: jax.lax.map(f, x),
        lambda f: lambda x: jax.jvp(f, (x,), (x,))[0],
        lambda f: lambda x: jax.vjp(f, x)[0],
    ],
)
def test_inside_of_transforms(transform):
    def f(x):
        return jnp.einsum("...i->...", x)

    expected = transform(lambda x: 3 * x)(ONES)
    run = intercepted(transform(f), {"jax.numpy.einsum": lambda _, x: 3 * x})
    np.testing.assert_array_equal(run(ONES), expected)
    np.testing.assert_array_equal(jax.jit(run)(ONES), expected)


def test_grad_through_interception():
    def f(x):
        return dot_general(x, x, DIMS).sum()

    names = {"jax.lax.dot_general": lambda x, y, dims, **kw: 2 * dot_general(x, y, dims, **kw)}
    expected = 2 * jax.grad(f)(ONES)
    np.testing.assert_allclose(jax.grad(intercepted(f, names))(ONES), expected)
    np.testing.assert_allclose(jax.jit(jax.grad(intercepted(f, names)))(ONES), expected)
    # The rule for the gradient of dot_general calls dot_general, which is not the model's op.
    np.testing.assert_allclose(intercepted(jax.grad(f), names)(ONES), expected)


def test_custom_vjp_inside():
    @jax.custom_vjp
    def f(x):
        return dot_general(x, x, DIMS).sum()

    f.defvjp(lambda x: (f(x), x), lambda x, g: (g * 9 * x,))
    run = intercepted(f, {"jax.lax.dot_general": lambda x, *_, **__: 7 * x})
    assert run(ONES) == 28
    value, grad = jax.value_and_grad(run)(ONES)
    assert value == 28
    np.testing.assert_array_equal(grad, 9 * ONES)


def test_disable_interceptions():
    names = {"jax.lax.dot_general": constant(7)}

    @jax.jit
    def helper(x):
        return dot_general(x, x, DIMS)

    def run(x):
        off = interception.disable_interceptions(lambda: (dot_general(x, x, DIMS), helper(x)))
        assert dot_general(x, x, DIMS) == 7
        first = off()
        assert dot_general(x, x, DIMS) == 7
        return first

    for result in intercepted(run, names)(ONES):
        np.testing.assert_array_equal(result, 2 * ONES)
    assert interception.disable_interceptions(lambda x, y=2: x + y)(1) == 3


def test_transforms_of_input_and_output_run_inside(library):
    names = {"qwix_test_library.plain": lambda x: 10 * x}
    run = intercepted(
        library.plain,
        names,
        input_transform=lambda args, kwargs: ((library.plain(args[0]),), kwargs),
        output_transform=lambda out: library.plain(out) + 1,
    )
    assert run(1) == 1001


def test_should_intercept(library):
    wanted = [False, True]
    run = intercepted(
        lambda: library.plain(1), {"qwix_test_library.plain": constant("on")}, should_intercept=wanted.pop
    )
    assert run() == "on"
    assert run()[0] == "plain"


def test_disable_jit(library):
    @jax.jit
    def helper(x):
        return isinstance(x, jax.core.Tracer)

    names = {"qwix_test_library.plain": constant(0)}
    interceptor = interception.Interceptor(names, id="disable_jit")
    run = interception.wrap_func_intercepted(helper, lambda: interceptor, disable_jit=True)
    assert run(ONES) is False
    assert helper(ONES).item() is True


def test_wrapped_function_keeps_its_looks():
    def f(a, b=2):
        """What it does."""

    run = intercepted(f, {})
    assert run.__name__ == "f" and run.__doc__ == "What it does."


def test_interceptor_is_a_mapping_and_equal_by_id():
    one = interception.Interceptor({"a.b": constant(0)}, id=1)
    assert list(one) == ["a.b"] and len(one) == 1 and "a.b" in one
    assert one == interception.Interceptor({}, id=1) and hash(one) == hash(interception.Interceptor({}, id=1))
    assert one != interception.Interceptor(one.mapping, id=2) and one != {"a.b": 0}


def test_current_rule_outside_is_none():
    assert qconfig.get_current_rule("dot_general") is None
