"""Parameters that go through the arguments of a JAX transform inside a model.

    @jax.jit
    def project(x, w):         # inside, w is another tracer than the one that was passed
        return x @ w

    project(x, self.kernel[...])

`jax.jit`, `jax.checkpoint`, `jax.lax.scan` and their like call a function with arrays of their own in the place of the
arguments, and reuse what they traced before. So that an op in there is seen with its weight, and counted in each module
that runs it, `INTERCEPTS` follows the arguments into the function, and lets a function that holds ops be traced anew by
each call. (`vmap`, `grad` and NNX's and Linen's own transforms need none of this, see `provenance` and `flax_util`.)

`unknown_weight(x)` tells what is known of an operand that is no parameter, though it may have been meant as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend

from qwix._src import interception, provenance

_JIT = "jax._src.pjit._infer_params"
_JIT_FAST_PATH = "jax._src.pjit._get_fastpath_data"
_CHECKPOINT = "jax._src.ad_checkpoint._remat_static_argnums"
_CHECKPOINT_TRACED = "jax._src.ad_checkpoint._remat_bind"

# Jitted functions that were seen to run ops of a model.
_with_ops: weakref.WeakSet[Any] = weakref.WeakSet()
# Those of JAX that were seen to run none. (A user's may do so in the next call, for other arguments.)
_without_ops: weakref.WeakSet[Any] = weakref.WeakSet()


def _enter(outer: Any, inner: Any, stacked: bool = False, may_change: bool = False) -> None:
    """Remembers that the leaves of `inner` stand for those of `outer`.

    `stacked`: for the slices along their first axis. `may_change`: only at first (a loop's carry), so that they are
    known to be no new inputs, but not to be parameters.
    """
    book = provenance.book()
    outer_leaves, inner_leaves = jax.tree.leaves(outer), jax.tree.leaves(inner)
    if book is None or len(outer_leaves) != len(inner_leaves):
        return
    for old, new in zip(outer_leaves, inner_leaves, strict=True):
        old, new = provenance.unwrapped(old), provenance.unwrapped(new)
        if new is old or not isinstance(new, jax.core.Tracer):
            continue
        book.outer[id(new)] = (new, old)
        ref = None if may_change else provenance.lookup(old)
        if stacked and isinstance(ref, provenance.ParamRef):
            view = provenance.View("map", (0,), tuple(old.shape))
            ref = dataclasses.replace(ref, views=(*ref.views, view))
        elif stacked:
            ref = None
        if ref is not None:
            provenance.track(new, ref)


def _calling(fun: Callable[..., Any], enter: Callable[..., None]) -> Callable[..., Any]:
    """`fun`, with `enter` called on its arguments first. A new function, so that it is traced anew."""

    @functools.wraps(fun, updated=())
    def run(*args, **kwargs):
        enter(*args, **kwargs)
        with _deeper():
            return fun(*args, **kwargs)

    return run


@contextlib.contextmanager
def _deeper(without_parameters: bool = False) -> Iterator[None]:
    """One trace further in."""
    book = provenance.book()
    if book is None:
        yield
        return
    book.depth += 1
    book.without_parameters += without_parameters
    try:
        yield
    finally:
        book.depth -= 1
        book.without_parameters -= without_parameters


def _original(name: str) -> Callable[..., Any]:
    """The function itself. What its inner trace wants to be put into a module is done once it is left."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = interception.interception_manager.original(name)(*args, **kwargs)
        book = provenance.book()
        if book is not None:
            book.carry_out()
        return result

    return run


def _jit(fun: Any, info: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    book = provenance.book()
    original = interception.interception_manager.original(_JIT)
    if book is None:
        return original(fun, info, args, kwargs)
    if fun in _without_ops:
        book.jit_has_ops = False
        return original(fun, info, args, kwargs)
    ops_before = book.ops
    body = interception.interception_manager.stand_in(fun)
    if body is None and fun not in _with_ops and not any(map(_of_parameters, jax.tree.leaves((args, kwargs)))):
        with _deeper(without_parameters=True):
            result = original(fun, info, args, kwargs)
    else:
        run = _calling(body or fun, lambda *inner, **inner_kwargs: _enter((args, kwargs), (inner, inner_kwargs)))
        result = original(run, info, args, kwargs)
    book.carry_out()
    book.jit_has_ops = book.ops > ops_before
    if book.jit_has_ops:
        _with_ops.add(fun)
    elif str(getattr(fun, "__module__", "")).startswith("jax.") and fun not in _with_ops:
        _without_ops.add(fun)  # jax.numpy.add and its like
    return result


def _jit_fast_path(*args: Any, **kwargs: Any) -> Any:
    """Without this data, each call of a jitted function comes by `_jit`; jax asks for it after that function."""
    book = provenance.book()
    if book is not None and book.jit_has_ops:
        return None
    return interception.interception_manager.original(_JIT_FAST_PATH)(*args, **kwargs)


def _checkpoint(fun: Callable[..., Any], static_argnums: Any, args: tuple[Any, ...]) -> Any:
    fun, args = _original(_CHECKPOINT)(fun, static_argnums, args)
    return _calling(fun, lambda *inner, **_: _enter(args, inner)), args


def _checkpoint_traced(*args: Any, **kwargs: Any) -> Any:
    book = provenance.book()
    if book is not None:
        book.carry_out()
    return _original(_CHECKPOINT_TRACED)(*args, **kwargs)


def _scan(f: Callable[..., Any], init: Any, xs: Any = None, *args: Any, **kwargs: Any) -> Any:
    def enter(carry: Any, x: Any) -> None:
        _enter(init, carry, may_change=True)
        _enter(xs, x, stacked=True)

    return _original("jax.lax.scan")(_calling(f, enter), init, xs, *args, **kwargs)


def _while_loop(cond_fun: Callable[..., Any], body_fun: Callable[..., Any], init_val: Any) -> Any:
    def enter(value: Any) -> None:
        _enter(init_val, value, may_change=True)

    return _original("jax.lax.while_loop")(_calling(cond_fun, enter), _calling(body_fun, enter), init_val)


def _cond(pred: Any, true_fun: Any, false_fun: Any, *operands: Any, **kwargs: Any) -> Any:
    if not (callable(true_fun) and callable(false_fun)):  # the old form with an operand for each branch
        return _original("jax.lax.cond")(pred, true_fun, false_fun, *operands, **kwargs)
    true_fun, false_fun = _branches([true_fun, false_fun], operands, kwargs)
    return _original("jax.lax.cond")(pred, true_fun, false_fun, *operands, **kwargs)


def _switch(index: Any, branches: Sequence[Any], *operands: Any, **kwargs: Any) -> Any:
    return _original("jax.lax.switch")(index, _branches(branches, operands, kwargs), *operands, **kwargs)


def _branches(branches: Sequence[Any], operands: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    outer = (kwargs["operand"],) if "operand" in kwargs else operands
    return [_calling(branch, lambda *inner: _enter(outer, inner)) for branch in branches]


def _custom_derivative(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(_of_parameters, jax.tree.leaves((args, kwargs)))):
            fun = _calling(self.fun, lambda *inner, **inner_kwargs: _enter((args, kwargs), (inner, inner_kwargs)))
            copy: Any = type(self).__new__(type(self), fun)
            for attribute, value in vars(self).items():
                setattr(copy, attribute, value)
            copy.fun = fun
            self = copy
        return _original(name)(self, *args, **kwargs)

    return call


def _intercepts() -> Mapping[str, Callable[..., Any]]:
    handlers: dict[str, Callable[..., Any]] = {
        _JIT: _jit,
        _JIT_FAST_PATH: _jit_fast_path,
        _CHECKPOINT: _checkpoint,
        _CHECKPOINT_TRACED: _checkpoint_traced,
        "jax.lax.scan": _scan,
        "jax.lax.while_loop": _while_loop,
        "jax.lax.cond": _cond,
        "jax.lax.switch": _switch,
    }
    for name in ("jax.custom_vjp.__call__", "jax.custom_jvp.__call__"):
        handlers[name] = _custom_derivative(name)
    return {name: interception.reentrant(h) for name, h in handlers.items() if interception.has_attribute(name)}


# The names with an underscore are those of jax 0.9 and 0.10. Where one is missing, parameters are not followed there.
INTERCEPTS = _intercepts()


# --- what an operand is that is no parameter ------------------------------------------------------


def _of_parameters(x: Any) -> bool:
    """Whether an array is a parameter, or was computed from parameters and constants alone."""
    if not hasattr(x, "shape"):
        return False
    x = provenance.unwrapped(x)
    if provenance.may_be_parameter(x):
        return True
    book = provenance.book()
    return book is not None and book.initializing and bool(parameters_of(x))


def parameters_of(x: Any) -> frozenset[str]:
    """Paths of the parameters that a tracer was computed from; empty if anything else than constants went in as well.

    Only in the traces of `jax.make_jaxpr`, `jax.eval_shape` and `jax.jit` of jax 0.9 and 0.10, whose tracers know their
    equation; an array of its own was computed already, and nobody knows how.
    """
    book = provenance.book()
    if book is None:
        return frozenset()
    memo = book.sources
    stack = [x]
    while stack:
        array = stack[-1]
        if id(array) in memo:
            stack.pop()
            continue
        known = provenance.lookup(array)
        if known is not None:
            refs = known.parts if isinstance(known, provenance.ConcatRef) else (known,)
            memo[id(array)] = (array, frozenset(ref.path for ref in refs))
            continue
        sources = _sources(array)
        if sources is None:
            memo[id(array)] = (array, None)
            continue
        found = [memo[id(s)][1] for s in sources if id(s) in memo]
        if any(f is None for f in found):  # something else went in: no need to look at the rest
            memo[id(array)] = (array, None)
            continue
        missing = [s for s in sources if id(s) not in memo]
        if missing:
            stack.append(missing[-1])
            continue
        memo[id(array)] = (array, frozenset(path for paths in found for path in paths or ()))
    return memo[id(x)][1] or frozenset()


def _sources(array: Any) -> Sequence[Any] | None:
    """The tracers that an array was computed from; () for a constant, None if that is not known."""
    if not isinstance(array, jax.core.Tracer):
        return ()
    inner = provenance._inner(array)
    if inner is not None:
        return (inner[0],)
    parent = getattr(array, "parent", None)
    if parent is not None and hasattr(parent, "in_tracers"):
        return [t for t in parent.in_tracers if isinstance(t, jax.core.Tracer)]
    book = provenance.book()
    if book is not None and id(array) in book.outer:
        return (book.outer[id(array)][1],)
    if isinstance(getattr(array, "val", None), jax.extend.core.Literal):
        return ()
    # What a trace closes over: a constant, or a tracer of the trace around it.
    constant = array.get_const() if hasattr(array, "get_const") else None
    return None if constant is None else (constant,)


def not_of_parameters(inputs: Any) -> None:
    """Remembers that the arrays in a pytree are inputs of the model. Those inside of another model may be anything."""
    book = provenance.book()
    if book is not None and len(book.roots) == 1:
        for leaf in jax.tree.leaves(inputs):
            book.inputs[id(leaf)] = leaf


def lost_parameters(x: Any) -> frozenset[str]:
    """Paths of the parameters that an argument of a traced function may be, by shape and dtype; empty if it is none.

    This is a guess, for the arguments of functions that this module does not follow, such as `jax.shard_map`'s.
    """
    book = provenance.book()
    if (
        book is None
        or book.without_parameters
        or not isinstance(x, jax.core.Tracer)
        or id(x) in book.outer
        or id(x) in book.inputs
        or _sources(x) is not None
    ):
        return frozenset()
    refs = [ref for _, ref in book.known.values() if isinstance(ref, provenance.ParamRef) and not ref.views]
    return frozenset(
        ref.path
        for ref in refs
        if (ref.value.shape, ref.value.dtype) == (x.shape, x.dtype)
        and getattr(ref.value, "_trace", None) is not x._trace
    )
