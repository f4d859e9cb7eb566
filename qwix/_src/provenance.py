"""Which parameter an array is: by what it is, not by its shape.

While a quantized model runs, this module remembers the very array that each parameter handed out, and follows it
through casts, reshapes, transposes, sharding constraints, static indexing and concatenation, in eager code and under
any trace::

    kernel = self.kernel[...]                     # handed out: ref = (this module, 'kernel', no views)
    jnp.dot(x, kernel.T.astype(jnp.bfloat16))     # found:      ref = (this module, 'kernel', (transpose (1, 0),))

- `session()` opens the book for one top-level call; nested calls share it.
- `lookup(x)` gives the `ParamRef` of an array, or None: it is not known to be a parameter. (`flax_util.find_ref` looks
  at the running modules as well.)
- `LAYOUT_INTERCEPTS` are the passive handlers (see `interception`) that follow a parameter from call to call. What a
  function did is read off its jaxpr, so that one handler serves them all.
- `ParamRef.pull_axes` carries the granularity that an op wants back to the layout that the parameter is stored in, and
  `ParamRef.apply` the stored, quantized parameter to the op.

How Flax modules hold parameters is known to `flax_util` alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from qwix._src import interception
from qwix._src.core import qarray

# What an axis of a weight shares its scale with: an int is a tile size, None the whole axis; 1 is channelwise.
Granularity = int | None


@dataclasses.dataclass(frozen=True)
class View:
    """One step from a stored parameter to the array that an op sees.

    Attributes:
      kind: 'transpose' (arg: permutation), 'reshape' (arg: new shape), 'unit' (arg: new shape; axes of size 1 come or
        go), 'index' (arg: a tuple of slices and ints, one an axis) or 'map' (arg: the axis that `vmap` took away).
      arg: see `kind`.
      in_shape: shape before the step.
    """

    kind: str
    arg: tuple
    in_shape: tuple[int, ...]

    def pull(self, granularity: Sequence[Granularity]) -> tuple[Granularity, ...]:
        """Granularity of the axes before the step, given that of the axes after it.

        A transpose permutes, an index gives a scale of its own to each index of an axis that it drops, and a reshape
        splits or merges. Raises ValueError if no granularity of the input axes means the same.
        """
        if self.kind == "transpose":
            result: list[Granularity] = [None] * len(self.in_shape)
            for axis, old in enumerate(self.arg):
                result[old] = granularity[axis]
            return tuple(result)
        if self.kind == "map":
            result = list(granularity)
            result.insert(self.arg[0], 1)
            return tuple(result)
        if self.kind == "index":
            remaining = iter(granularity)
            kept = [1 if isinstance(i, int) else next(remaining) for i in self.arg]
            # x[2] is a slice of one and a reshape: one element can have a scale of its own.
            entries = zip(self.arg, self.in_shape, kept, strict=True)
            return tuple(1 if isinstance(i, int) or len(range(n)[i]) == 1 else tile for i, n, tile in entries)
        return _pull_reshape(granularity, self.arg, self.in_shape)

    def apply(self, array: Any) -> Any:
        """The step on an array or QArray."""
        if self.kind == "transpose":
            return array.transpose(*self.arg)
        if self.kind in ("reshape", "unit"):
            return array.reshape(*self.arg)
        if self.kind == "index":
            return qarray.rewriting_take(array, self.arg)
        raise ValueError("a mapped axis cannot be taken from outside of the map")


def _pull_reshape(
    granularity: Sequence[Granularity], out_shape: Sequence[int], in_shape: Sequence[int]
) -> tuple[Granularity, ...]:
    # Both shapes are cut into the same row-major sequence of factors; each is either shared or has its own scales.
    factors: list[tuple[int, bool]] = []  # (size, has own scales), most significant first
    for size, tile in zip(out_shape, granularity, strict=True):
        tile = size if tile is None else tile
        factors += [(size // tile, True), (tile, False)]
    factors = [f for f in factors if f[0] != 1]
    result: list[Granularity] = []
    for size in in_shape:
        own, shared, left = 1, 1, size
        while left > 1:
            factor, is_own = factors.pop(0)
            taken = math.gcd(factor, left) if factor % left and left % factor else min(factor, left)
            if taken == 1:
                raise ValueError(f"scales do not follow a reshape of {in_shape} to {out_shape}")
            if taken < factor:
                factors.insert(0, (factor // taken, is_own))
            left //= taken
            if is_own and shared > 1:
                raise ValueError(f"scales do not follow a reshape of {in_shape} to {out_shape}")
            own, shared = (own * taken, shared) if is_own else (own, shared * taken)
        result.append(None if own == 1 else shared)
    return tuple(result)


@dataclasses.dataclass(frozen=True)
class ParamRef:
    """A parameter, and the steps from it to an operand.

    Attributes:
      module: the Linen module that holds it; None in NNX, where `keys` say where it is.
      keys: keys from the root of the model to it, such as ('blocks', 0, 'attn', 'kernel').
      value: the array as the module handed it out (maybe a tracer).
      views: what was done to it since, first step first; casts and sharding constraints are no steps.
      depth: how deep in nested traces the module handed it out, see `_Book.depth`.
    """

    module: Any
    keys: tuple[str | int, ...]
    value: Any
    views: tuple[View, ...] = ()
    depth: int = 0

    @property
    def name(self) -> str:
        """Its name in its module."""
        return str(self.keys[-1])

    @property
    def path(self) -> str:
        """Its path, for messages: 'blocks/0/attn/kernel'."""
        return "/".join(map(str, self.keys))

    def pull_axes(self, granularity: Sequence[Granularity]) -> tuple[Granularity, ...]:
        """Granularity of the stored axes, given that of the operand's."""
        for view in reversed(self.views):
            try:
                granularity = view.pull(granularity)
            except ValueError as e:
                raise ValueError(f"{self.path}: {e}. Store the parameter in the shape that the op uses.") from e
        return tuple(granularity)

    def apply(self, array: Any) -> Any:
        """The operand, given the stored parameter (an array or a QArray)."""
        for view in self.views:
            array = view.apply(array)
        return array


@dataclasses.dataclass(frozen=True)
class ConcatRef:
    """An operand that is a concatenation of parameters along one axis."""

    parts: tuple[ParamRef, ...]
    sizes: tuple[int, ...]
    axis: int


@dataclasses.dataclass(frozen=True)
class _Made:
    """An array that a function made of others. Most never reach an op, so what they are is found out when one does.

    `function` is a layout function of the first base, or None: the bases were joined along `axis`.
    """

    function: Callable[..., Any] | None
    bases: tuple[Any, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axis: int = 0

    def resolve(self) -> ParamRef | ConcatRef | None:
        refs = [lookup(base) for base in self.bases]
        if not all(isinstance(ref, ParamRef) for ref in refs):
            return None
        if self.function is None:
            return ConcatRef(tuple(refs), tuple(base.shape[self.axis] for base in self.bases), self.axis)  # type: ignore[arg-type]
        views = _views_of(self.function, self.bases[0], self.args, self.kwargs)
        return None if views is None else dataclasses.replace(refs[0], views=refs[0].views + views)  # type: ignore


class _Book:
    def __init__(self) -> None:
        # id -> (the array, kept alive so that its id stays its own; what it is, or how it was made)
        self.known: dict[int, tuple[Any, ParamRef | ConcatRef | _Made | None]] = {}
        # Modules whose parameters are known; kept alive so that their ids stay their own.
        self.modules: dict[int, Any] = {}
        # id of a module -> (the module, op name -> how many of it ran there)
        self.op_counts: dict[int, tuple[Any, dict[str, int]]] = {}
        # (provider, keys of the model that it quantizes, records of that model's ops), outermost first
        self.roots: list[tuple[Any, tuple[str | int, ...], dict[Any, Any]]] = []
        # keys of an NNX parameter -> what has to stand there (filled by providers, carried out by `model`)
        self.replacements: dict[tuple[str | int, ...], Any] = {}
        # keys of an NNX parameter -> what has to be created beside it, before it is replaced
        self.additions: dict[tuple[str | int, ...], Any] = {}
        self.keep_replacements = False
        # Whether this call finds out which weights there are: `init` in Linen, the first run in NNX.
        self.initializing = False
        # The provider that an NNX model is given in this call.
        self.first_run_of: Any = None
        # How many ops ran so far.
        self.ops = 0
        # --- filled by `transforms` ---
        # id of an input of the model -> the input
        self.inputs: dict[int, Any] = {}
        # id of an argument of a traced function -> (the argument, what was passed for it)
        self.outer: dict[int, tuple[Any, Any]] = {}
        # id of an array -> (the array, paths of the parameters that it was computed from, None if not from them alone)
        self.sources: dict[int, tuple[Any, frozenset[str] | None]] = {}
        # How many traces the running code is in, below the call of the model.
        self.depth = 0
        # (depth, what is to be done once the running code is no deeper)
        self.pending: list[tuple[int, Callable[[], Any]]] = []
        self.jit_has_ops = False
        # In how many jitted functions the running code is that were given no parameters.
        self.without_parameters = 0

    def carry_out(self) -> None:
        """Does what was waiting for the trace that was left just now."""
        ready = [action for depth, action in self.pending if depth >= self.depth]
        self.pending = [(depth, action) for depth, action in self.pending if depth < self.depth]
        for action in ready:
            action()


class _State(threading.local):
    book: _Book | None = None


_state = _State()


@contextlib.contextmanager
def session():
    """Remembers parameters until the outermost session of this thread ends."""
    if _state.book is not None:
        yield _state.book
        return
    _state.book = _Book()
    try:
        yield _state.book
    finally:
        _state.book = None


def book() -> _Book | None:
    """The open book of this thread, if any."""
    return _state.book


def track(array: Any, ref: ParamRef | ConcatRef) -> None:
    """Remembers that `array` is this parameter; no-op outside of a session."""
    if _state.book is not None:
        _state.book.known[id(array)] = (array, ref)


def _track_made(array: Any, made: _Made) -> None:
    # A tracer may come from a module that is not known yet, see `origins`. Other arrays are not worth keeping alive.
    known = _state.book.known  # type: ignore[union-attr]
    if any(isinstance(base, jax.core.Tracer) or id(base) in known for base in made.bases):
        known[id(array)] = (array, made)


def origins(array: Any) -> list[Any]:
    """The arrays that `array` was made of by layout changes: those that a module may have handed out."""
    found = _state.book.known.get(id(array)) if _state.book is not None else None
    if found is not None and isinstance(found[1], _Made):
        return [origin for base in found[1].bases for origin in origins(base)]
    inner = None if found is not None else _inner(array)
    return [array] if inner is None else origins(inner[0])


def may_be_parameter(array: Any) -> bool:
    """Whether an array was made by layout changes of parameters that are known; cheaper than `lookup`."""
    if _state.book is None:
        return False
    return all(
        (found := _state.book.known.get(id(origin))) is not None and found[1] is not None for origin in origins(array)
    )


def is_known(array: Any) -> bool:
    """Whether it is known, of an array out of `origins`, that it is a parameter."""
    return _state.book is not None and id(array) in _state.book.known


def lookup(array: Any) -> ParamRef | ConcatRef | None:
    """What an array is, as far as it follows from what was tracked."""
    if _state.book is None:
        return None
    found = _state.book.known.get(id(array))
    if found is not None:
        if isinstance(found[1], _Made):
            found = (array, found[1].resolve())
            _state.book.known[id(array)] = found
        return found[1]  # type: ignore[return-value]
    # A transformation's tracer around a known array: under vmap an axis is hidden, under grad nothing changes.
    inner = _inner(array)
    if inner is None:
        return None
    value, batch_axis = inner
    ref = lookup(value)
    if isinstance(ref, ParamRef) and batch_axis is not None:
        view = View("map", (batch_axis,), tuple(value.shape))
        ref = dataclasses.replace(ref, views=(*ref.views, view))
    return ref


def _inner(tracer: Any) -> tuple[Any, int | None] | None:
    """What a BatchTracer, JVPTracer or LinearizeTracer of jax 0.10 stands for, with the axis that vmap hides."""
    if not isinstance(tracer, jax.core.Tracer):
        return None
    kind = type(tracer).__name__
    if kind == "BatchTracer":
        axis = tracer.batch_dim
        return tracer.val, (axis if isinstance(axis, int) else None)
    if kind in ("JVPTracer", "LinearizeTracer"):
        return tracer.primal, None
    return None


def _views_of(fn: Callable[..., Any], array: Any, args, kwargs) -> tuple[View, ...] | None:
    """The steps that a layout function takes with its first argument; None if it does something else as well."""
    if fn is _same:
        return ()
    aval = jax.ShapeDtypeStruct(array.shape, array.dtype)
    try:
        closed = jax.make_jaxpr(lambda x: fn(x, *args, **kwargs))(aval)
    except (
        TypeError,
        jax.errors.JAXTypeError,
    ):  # other operands are tracers: not a static layout change
        return None
    return _views_of_jaxpr(closed.jaxpr)


def _views_of_jaxpr(jaxpr: Any) -> tuple[View, ...] | None:
    """The steps from the only input of a jaxpr to its only output."""
    current = jaxpr.invars[0]
    views: tuple[View, ...] = ()
    producers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    steps = []
    out = jaxpr.outvars[0]
    while out is not current:
        eqn = producers.get(out) if isinstance(out, jax.extend.core.Var) else None
        step = _views_of_eqn(eqn, eqn.outvars.index(out)) if eqn is not None else None
        if eqn is None or step is None:
            return None
        steps.append(step)
        out = eqn.invars[0]
    for step in reversed(steps):
        views += step
    return views


def _views_of_eqn(eqn: Any, output: int) -> tuple[View, ...] | None:
    name, params = eqn.primitive.name, eqn.params
    in_shape = tuple(eqn.invars[0].aval.shape)
    out_shape = tuple(eqn.outvars[output].aval.shape)
    if name in ("jit", "pjit"):
        return _views_of_jaxpr(params["jaxpr"].jaxpr)
    if name in (
        "convert_element_type",
        "sharding_constraint",
        "copy",
        "copy_p",
        "optimization_barrier",
    ):
        return ()
    if name == "transpose":
        return (View("transpose", tuple(params["permutation"]), in_shape),)
    if name == "slice":
        strides = params["strides"] or (1,) * len(in_shape)
        starts_limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        return (View("index", tuple(slice(*bounds) for bounds in starts_limits), in_shape),)
    if name == "unstack":
        index = tuple(output if i == params["axis"] else slice(None) for i in range(len(in_shape)))
        return (View("index", index, in_shape),)
    if name == "split":
        start = sum(params["sizes"][:output])
        bounds = slice(start, start + params["sizes"][output], 1)
        index = tuple(bounds if i == params["axis"] else slice(None) for i in range(len(in_shape)))
        return (View("index", index, in_shape),)
    if name in ("reshape", "squeeze", "expand_dims") or (
        name == "broadcast_in_dim" and math.prod(in_shape) == math.prod(out_shape)
    ):
        kind = "reshape" if name == "reshape" else "unit"
        return () if in_shape == out_shape else (View(kind, out_shape, in_shape),)
    return None


def apply_layout(function: Callable[..., Any], array: Any, args, kwargs) -> Any:
    """A layout function of `jax.numpy` on a QArray; a list if it returns several, None if it is no layout change."""
    out = jax.eval_shape(lambda x: function(x, *args, **kwargs), jax.ShapeDtypeStruct(array.shape, array.dtype))
    several = isinstance(out, Sequence)
    results = []
    for part in _parts(function, several, len(out) if several else 1):
        views = _views_of(part, array, args, kwargs)
        if views is None:
            return None
        result = array
        for view in views:
            result = view.apply(result)
        results.append(result)
    return results if several else results[0]


def _parts(function: Callable[..., Any], several: bool, count: int) -> list[Callable[..., Any]]:
    """Functions that return one of a function's results each."""
    if not several:
        return [function]
    return [lambda *a, i=i, **k: function(*a, **k)[i] for i in range(count)]


def follow_same(array: Any, out: Any) -> None:
    """Remembers that `out` is what `array` is, cast or placed otherwise."""
    if _state.book is not None and out is not array and hasattr(out, "dtype") and _is_float(out):
        _track_made(out, _Made(_same, (unwrapped(array),)))


def follow_quantized(array: Any, out: Any, change: Callable[[Any], Any]) -> None:
    """Remembers that a quantized array is another one in another layout, known by their elements (`qvalue`)."""
    base, made = getattr(array, "qvalue", None), getattr(out, "qvalue", None)
    if _state.book is not None and base is not None and made is not base:
        _track_made(made, _Made(change, (base,)))


def _same(array: Any) -> Any:
    return array


def follow_views(function: Callable[..., Any], array: Any, *args, **kwargs) -> Any:
    """Calls a layout function, and remembers its results if `array` is a parameter."""
    if hasattr(array, "apply_layout"):
        return array.apply_layout(function, *args, **kwargs)
    out = function(array, *args, **kwargs)
    if _state.book is None or out is array:
        return out
    base = (unwrapped(array),)
    if isinstance(out, Sequence):
        for part, result in zip(_parts(function, True, len(out)), out, strict=True):
            _track_made(result, _Made(part, base, args, kwargs))
    else:
        _track_made(out, _Made(function, base, args, kwargs))
    return out


@interception.passive
def _same_handler(original, array, *args, **kwargs):
    out = original(array, *args, **kwargs)
    follow_same(array, out)
    return out


@interception.passive
def _views_handler(original, array, *args, **kwargs):
    return follow_views(original, array, *args, **kwargs)


@interception.passive
def _concatenate_handler(original, arrays, *args, **kwargs):
    if isinstance(arrays, Sequence) and arrays and hasattr(arrays[0], "concatenate"):
        return arrays[0].concatenate(arrays, *args, **kwargs)
    out = original(arrays, *args, **kwargs)
    if _state.book is not None and isinstance(arrays, Sequence) and arrays:
        axis = kwargs.get("axis", kwargs.get("dimension", args[0] if args else 0))
        if axis is not None:
            bases = tuple(unwrapped(a) for a in arrays)
            _track_made(out, _Made(None, bases, axis=axis % out.ndim))
    return out


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, np.floating)


def unwrapped(array: Any) -> Any:
    """The raw array in an `nnx.Variable`, or `array` itself."""
    get = getattr(array, "get_raw_value", None)
    return get() if get is not None else array


_SAME = (
    "jax.numpy.array",
    "jax.numpy.asarray",
    "jax.numpy.astype",
    "jax.numpy.copy",
    "jax.lax.convert_element_type",
    "jax.lax.with_sharding_constraint",
    "jax.lax.stop_gradient",
    "jax.ad_checkpoint.checkpoint_name",
    "jax.sharding.reshard",
)
_VIEWS = (
    "jax.numpy.transpose",
    "jax.numpy.permute_dims",
    "jax.numpy.matrix_transpose",
    "jax.numpy.swapaxes",
    "jax.numpy.moveaxis",
    "jax.numpy.reshape",
    "jax.numpy.ravel",
    "jax.numpy.squeeze",
    "jax.numpy.expand_dims",
    "jax.lax.transpose",
    "jax.lax.reshape",
    "jax.lax.squeeze",
    "jax.lax.expand_dims",
    "jax.lax.collapse",
    "jax.lax.slice",
    "jax.lax.slice_in_dim",
    "jax.lax.index_in_dim",
    "jax.lax.split",
    "jax.numpy.split",
    "jax.numpy.unstack",
    "jax._src.numpy.indexing.rewriting_take",  # x[...] of jax 0.10; has_attribute guards it
)
_CONCATENATE = ("jax.numpy.concatenate", "jax.lax.concatenate")


def _layout_intercepts() -> Mapping[str, Callable[..., Any]]:
    handlers = {
        **dict.fromkeys(_SAME, _same_handler),
        **dict.fromkeys(_VIEWS, _views_handler),
        **dict.fromkeys(_CONCATENATE, _concatenate_handler),
    }
    return {name: h for name, h in handlers.items() if interception.has_attribute(name)}


LAYOUT_INTERCEPTS = _layout_intercepts()
