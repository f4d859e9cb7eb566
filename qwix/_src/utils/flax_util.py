"""The one place that knows how Linen and NNX modules hold their parameters.

The same calls work inside a Linen and inside an NNX module: which module is running, which of its parameters an array
is, and how a parameter or a statistic is created next to it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax
import jax
from flax import linen as nn
from flax import nnx

from qwix._src import provenance
from qwix._src.core import pytree


class QuantStat(nnx.Variable):
    """NNX variable that holds a quantization statistic (the collection 'quant_stats' in Linen)."""


# --- the running module ---------------------------------------------------------------------------


def get_current_module() -> nn.Module | nnx.Module:
    """Returns the innermost module whose method is running in this thread.

    Linen keeps a stack of its own. For NNX it is the first `self` up the Python stack that is an `nnx.Module`.

    Raises:
      ValueError: outside of any module.
    """
    module = _current_linen_module()
    if module is not None:
        return module
    for module in running_nnx_modules():
        return module
    raise ValueError("not inside of a Linen or NNX module: there is no current module")


def _current_linen_module() -> nn.Module | None:
    # flax 0.10 to 0.12 have no public way to ask; this module-level context is what nn.Module uses itself.
    stack = nn.module._context.module_stack
    return stack[-1]


def running_nnx_modules():
    """NNX modules whose methods are running, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    seen = None
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            module = frame.f_locals.get("self")
            if isinstance(module, nnx.Module) and module is not seen:
                seen = module
                yield module
        frame = frame.f_back


def get_current_module_path() -> tuple[str, ...]:
    """Returns the path of the current module from the root: () for the root itself.

    Raises:
      ValueError: outside of any module, or in an NNX module that `quantize_model` has not seen.
    """
    return module_path(get_current_module())


def module_path(module: nn.Module | nnx.Module) -> tuple[str, ...]:
    """The path of a module from the root."""
    if isinstance(module, nn.Module):
        return module.path
    try:
        return module.qwix_path  # type: ignore[attr-defined]
    except AttributeError:
        raise ValueError(
            f"{type(module).__name__} has no path: it is no part of a model that went through quantize_model, "
            "or was put into it afterwards. Quantize the model again."
        ) from None


# --- which parameter is this array ----------------------------------------------------------------


def find_ref(x: Any) -> provenance.ParamRef | provenance.ConcatRef | None:
    """Which parameter `x` is, and the steps from it to `x`; None for anything else.

    Looks at what the interception of this call has followed, then, by identity, at the parameters of the modules that
    are running. A quantized parameter (`WithAux`) is known by its elements: the `value` of its ref is their array.
    """
    if isinstance(x, nnx.Variable):
        x = x.get_raw_value()
    if provenance.book() is None:
        return None
    x = _elements(x)
    if not all(map(provenance.is_known, provenance.origins(x))):
        _track_running_modules()
    return provenance.lookup(x)


def _elements(value: Any) -> Any:
    """The array that a parameter is known by: itself, or what a `WithAux` holds, of a quantized one the `qvalue`."""
    while hasattr(value, "apply_layout"):  # a WithAux, which may hold another
        value = value.array
    return unbox(getattr(value, "qvalue", value))


def _track_running_modules() -> None:
    book = provenance.book()
    assert book is not None
    module = _current_linen_module()
    if module is not None:
        _track_linen_params(module)
        return
    for depth, module in enumerate(running_nnx_modules()):
        # The values of a module that was seen may have changed since, which is worth a look at the innermost only.
        if id(module) not in book.modules or depth == 0:
            _track_nnx_params(module, book.modules)


def track_nnx_model(model: nnx.Module) -> None:
    """Remembers the parameters of a model that is about to run."""
    book = provenance.book()
    assert book is not None
    _track_nnx_params(model, book.modules)


def _track_nnx_params(module: nnx.Module, seen: dict[int, Any]) -> None:
    root = getattr(module, "qwix_path", ())
    if id(module) in seen:
        pairs = [((name,), v) for name, v in vars(module).items() if _kind(type(v)) in ("variable", "quantized")]
    else:
        pairs = list(_walk_variables(module, (), seen))
    for path, variable in pairs:
        value = variable.get_raw_value() if isinstance(variable, nnx.Variable) else _elements(variable)
        if not provenance.is_known(value) and hasattr(value, "shape"):
            provenance.track(value, provenance.ParamRef(None, (*root, *path), value))


def _kind_of_type(cls: type) -> str:
    # Once a type: `isinstance` of NNX's classes is slow, and this sees every attribute of every module.
    if issubclass(cls, nnx.Variable):
        return "variable" if issubclass(cls, nnx.Param) else ""  # a cache or a statistic is no weight
    if hasattr(cls, "apply_layout"):  # WithAux
        return "quantized"
    if issubclass(cls, nnx.Pytree):  # nnx.Module is one, a class of the user's may be another
        return "module"
    if issubclass(cls, (nnx.Dict, dict)):
        return "mapping"
    return "sequence" if issubclass(cls, (nnx.List, list, tuple)) else ""


_kind: Callable[[type], str] = functools.cache(_kind_of_type)


def _walk_variables(node: Any, path: tuple[str | int, ...], seen: dict[int, Any]):
    """(path, parameter) of the parameters below an NNX module, each once; a quantized one is a whole."""
    kind = _kind(type(node))
    if kind in ("variable", "quantized"):
        yield path, node
        return
    if not kind or id(node) in seen:
        return
    seen[id(node)] = node
    if kind == "module":
        items: Any = vars(node).items()
    else:
        items = node.items() if kind == "mapping" else enumerate(node)
    for key, child in list(items):
        if _kind(type(child)):
            yield from _walk_variables(child, (*path, key), seen)


def _track_linen_params(module: nn.Module) -> None:
    if module.scope is None:
        return
    for name, boxed in module.scope._collection("params").items():
        if not isinstance(boxed, (dict, flax.core.FrozenDict)):
            track_linen_param(module, name, unbox(boxed))


def track_linen_param(module: nn.Module, name: str, value: Any) -> None:
    """Remembers that `value` is what `module.param(name, ...)` handed out."""
    value = _elements(value)
    if hasattr(value, "shape") and not provenance.is_known(value):
        depth = provenance.book().depth  # type: ignore[union-attr]
        provenance.track(value, provenance.ParamRef(module, (*module.path, name), value, depth=depth))


def find_param(x: Any, ptq_array_type: type | None = None) -> str | None:
    """Returns the name of the parameter of the current module that `x` is, or None.

    `x` may be the parameter, or a cast, reshape, transpose, slice or sharding constraint of it. Inside of a quantized
    model this is decided by identity. Where nothing is intercepted, and so nothing was followed, a cast or reshaped
    parameter is recognised by its shape if only one fits.

    Args:
      x: array, tracer, or array structure such as `WithAux`.
      ptq_array_type: also look at parameters of this type.

    Raises:
      ValueError: if several parameters fit.
    """
    ref = find_ref(x)
    if isinstance(ref, provenance.ParamRef):
        return ref.name
    if isinstance(ref, provenance.ConcatRef) or not hasattr(x, "shape"):
        return None
    candidates = []
    for name, value in _params_of(get_current_module()):
        if value is x or unbox(value) is x:
            return name
        value = unbox(value)
        if not isinstance(value, (jax.Array, ptq_array_type or jax.Array)):
            continue
        if getattr(value, "shape", None) == x.shape:
            candidates.append(name)
        if ptq_array_type is not None and isinstance(x, ptq_array_type):
            if getattr(value, "array", value) is getattr(x, "array", x):
                return name
    if provenance.book() is not None:
        return None
    if len(candidates) > 1:
        raise ValueError(
            f"an array of shape {tuple(x.shape)} may be any of the parameters {candidates} of "
            f"{type(get_current_module()).__name__}: their shapes are equal and it is none of them itself"
        )
    return candidates[0] if candidates else None


def _params_of(module: nn.Module | nnx.Module):
    if isinstance(module, nn.Module):
        for name, value in module.scope._collection("params").items():  # type: ignore[union-attr]
            if not isinstance(value, (dict, flax.core.FrozenDict)):
                yield name, value
        return
    for name, value in vars(module).items():
        if isinstance(value, nnx.Param) or pytree.is_array_structure(value):
            yield name, value


# --- creating parameters and variables ------------------------------------------------------------


def get_or_create_param(
    name: str,
    init_fn: Callable[..., Any],
    *,
    nnx_param_type: type[nnx.Param] = nnx.Param,
    need_rng: bool = False,
) -> Any:
    """Returns the current module's parameter `name`, unboxed, creating it with `init_fn` if it is not there.

    Args:
      name: its name in the module.
      init_fn: () -> value, or (key) -> value with `need_rng`; the value may be boxed or an array structure.
      nnx_param_type: which `nnx.Param` an NNX module gets.
      need_rng: give `init_fn` a key of the stream 'params'.

    Raises:
      ValueError: if the parameter is there with another shape, or cannot be created here.
    """
    module = get_current_module()
    if isinstance(module, nn.Module):
        if module.has_variable("params", name) and module._name_taken(name, collection="params"):
            return unbox(module.get_variable("params", name))  # this call was here before
        if not need_rng:
            return unbox(module.param(name, lambda _: init_fn()))
        return unbox(module.param(name, init_fn))
    if not hasattr(module, name):
        value = init_fn(make_rng("params")) if need_rng else init_fn()
        wrap = lambda leaf: leaf if isinstance(leaf, nnx.Variable) else nnx_param_type(leaf)  # noqa: E731
        is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        try:
            setattr(module, name, jax.tree.map(wrap, value, is_leaf=is_leaf))
        except flax.errors.TraceContextError as e:
            where = "/".join(map(str, (*module_path(module), name)))
            raise ValueError(
                f"{where} cannot be created inside of a jitted function (or another transform of JAX) that the model "
                "calls, because nothing may leave it: use dynamic ranges (act_static_scale=False) there, call the "
                "function without jit, or use NNX's transforms"
            ) from e
    elif not need_rng:
        _check_shape(getattr(module, name), init_fn, name)
    return unbox(getattr(module, name))


def linen_param(module: nn.Module, name: str, init_fn: Callable[[jax.Array], Any]) -> Any:
    """The parameter `name` of a Linen module, unboxed, created from a key if it is not there.

    Unlike `get_or_create_param`, it may be called while another module runs, such as the owner's parent.
    """
    if module.has_variable("params", name):
        return unbox(module.get_variable("params", name))
    return unbox(module.scope.param(name, init_fn))  # type: ignore[union-attr]


def get_or_create_variable(
    collection: str, name: str, init_fn: Callable[[], Any]
) -> flax.core.scope.Variable | nnx.Variable:
    """Returns the current module's variable of a collection, creating it with `init_fn` if it is not there.

    In NNX the collection 'quant_stats' is the type `QuantStat`; others are looked up among NNX's variable types.
    """
    module = get_current_module()
    if isinstance(module, nn.Module):
        if module._name_taken(name, collection=collection):  # this call was here before
            variable: Any = flax.core.scope.Variable(module.scope, collection, name, unbox=True)  # type: ignore[arg-type]
        else:
            variable = module.variable(collection, name, init_fn)
        _check_shape(variable.value, init_fn, name)
        return variable
    if not hasattr(module, name):
        setattr(module, name, _variable_type(collection)(init_fn()))
    variable = getattr(module, name)
    _check_shape(variable, init_fn, name)
    return variable


def _variable_type(collection: str) -> type[nnx.Variable]:
    if collection == "quant_stats":
        return QuantStat
    return nnx.variable_type_from_name(collection, allow_register=True)


def get_and_delete_variable(collection: str, name: str) -> Any | None:
    """Takes a variable out of the current module and returns its value, or None if there is none."""
    module = get_current_module()
    if isinstance(module, nn.Module):
        if not module.has_variable(collection, name):
            return None
        value: Any = module.get_variable(collection, name)
        if module.is_mutable_collection(collection):
            module.scope._mutable_collection(collection).pop(name)  # type: ignore[union-attr]
        return value
    if not hasattr(module, name):
        return None
    value = unbox(getattr(module, name))
    delattr(module, name)
    return value


def _check_shape(value: Any, init_fn: Callable[[], Any], name: str) -> None:
    expected = jax.eval_shape(lambda: unbox(init_fn()))
    shapes = lambda tree: [tuple(leaf.shape) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    got, want = shapes(unbox(value)), shapes(expected)
    if got != want:
        where = "/".join(map(str, (*getattr(get_current_module(), "qwix_path", ()), name)))
        raise ValueError(f"{where} has shape {_one(got)}, but {_one(want)} is needed here")


def _one(shapes: list[tuple[int, ...]]) -> Any:
    return shapes[0] if len(shapes) == 1 else shapes


def make_rng(rng_stream: str) -> jax.Array:
    """A fresh key of a stream: from the scope in Linen, from the `rngs=` given to `quantize_model` in NNX.

    Raises:
      ValueError: if an NNX model was quantized without `rngs=`.
    """
    module = get_current_module()
    if isinstance(module, nn.Module):
        return module.make_rng(rng_stream)
    rngs = getattr(module, "qwix_rngs", None)
    if rngs is None:
        raise ValueError(
            f"a random key of the stream {rng_stream!r} is needed in "
            f"{'/'.join(map(str, module_path(module))) or type(module).__name__}: pass rngs=nnx.Rngs(...)"
        )
    return rngs[rng_stream]() if rng_stream in rngs else rngs()


def should_update_quant_stats() -> bool:
    """Whether a call updates the statistics: the collection is mutable, and this is no initialization."""
    module = get_current_module()
    if isinstance(module, nn.Module):
        return module.is_mutable_collection("quant_stats") and not module.is_initializing()
    return not getattr(module, "disable_quant_stats_update", False)


# --- boxes ----------------------------------------------------------------------------------------


def unbox(maybe_boxed: Any) -> Any:
    """Takes values out of Linen's AxisMetadata and NNX's variables, to any depth, without hooks or constraints."""
    # The order is that of how often each comes: this runs several times for each op of a quantized model.
    if maybe_boxed is None or isinstance(maybe_boxed, jax.Array):
        return maybe_boxed
    if pytree.is_array_structure(maybe_boxed):
        return pytree.map_fields(unbox, maybe_boxed)
    if isinstance(maybe_boxed, nnx.Variable):
        return unbox(maybe_boxed.get_raw_value())
    if isinstance(maybe_boxed, nn.meta.AxisMetadata):
        # Not .unbox(): it applies a sharding constraint, which makes another array of it.
        value = getattr(maybe_boxed, "value", None)
        return unbox(maybe_boxed.unbox() if value is None else value)
    is_box = lambda x: isinstance(x, (nnx.Variable, nn.meta.AxisMetadata))  # noqa: E731
    return jax.tree.map(lambda x: unbox(x) if is_box(x) else x, maybe_boxed, is_leaf=is_box)


def update_sharding(
    spec: Sequence[Any] | jax.P,
    *,
    shape: Sequence[int] | None = None,
    split: Collection[int] | None = None,
    merge: Collection[int] | None = None,
    transpose: Sequence[int | None] | None = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> tuple[Any, ...] | jax.P:
    """Derives the partition spec of a changed array; at most one of split, merge and transpose.

    Args:
      spec: names an axis, as a tuple or a `jax.P`; the result is of the same type.
      shape: of the new array; an axis of size 1 loses its name, and so does one that cannot be cut
        into as many parts as `mesh` has devices along that name.
      split: axes that became (axis, new axis): the name stays with the first.
      merge: the inverse of split, with the same arguments.
      transpose: for each new axis the old one, or None for a new axis.
      mesh: on which the new array lies; names that it does not have are left alone.

    >>> update_sharding(('a', 'b'), transpose=(1, None, 0))
    ('b', None, 'a')
    >>> update_sharding(('a', 'b', 'c'), split=(1,))
    ('a', 'b', None, 'c')
    >>> update_sharding(('a', 'b'), shape=(1, 8))
    (None, 'b')
    """
    if sum(x is not None for x in (split, merge, transpose)) > 1:
        raise ValueError("give one of split, merge and transpose")
    new = list(spec)
    parts = dict(mesh.shape) if mesh is not None else {}
    if split is not None:
        new = [n for i, name in enumerate(new) for n in ((name, None) if i in split else (name,))]
    if merge is not None:
        for axis in sorted(merge):
            del new[axis + 1]
    if transpose is not None:
        new += [None] * (max((t for t in transpose if t is not None), default=-1) + 1 - len(new))
        new = [None if t is None else new[t] for t in transpose]
    if shape is not None:
        for axis, (names, size) in enumerate(zip(new, shape, strict=False)):
            all_names = names if isinstance(names, tuple) else (names,)
            if size == 1 or size % math.prod(parts.get(name, 1) for name in all_names):
                new[axis] = None
    return jax.P(*new) if isinstance(spec, jax.P) else tuple(new)


def update_boxed(
    boxed: Any,
    *,
    value: Any = None,
    split: Collection[int] | None = None,
    merge: Collection[int] | None = None,
    transpose: Sequence[int | None] | None = None,
) -> Any:
    """A box like `boxed` around another value, its axis names changed likewise; see `update_sharding`.

    Args:
      boxed: Linen AxisMetadata (`nn.Partitioned`, ...), an `nnx.Variable`, or a bare array.
      value: the new value; None keeps the old one.
      split, merge, transpose: what happened to the axes.
    """
    new_value = unbox(boxed) if value is None else value
    change: dict[str, Any] = {"shape": new_value.shape, "split": split, "merge": merge, "transpose": transpose}
    sharding: Any = getattr(new_value, "sharding", None)
    on_mesh = isinstance(sharding, jax.sharding.NamedSharding)
    change["mesh"] = sharding.mesh if on_mesh else jax.sharding.get_abstract_mesh()
    if isinstance(boxed, nnx.Variable):
        metadata = dict(boxed.get_metadata())
        for key in ("out_sharding", "sharding", "sharding_names"):
            if metadata.get(key) is not None:
                metadata[key] = update_sharding(metadata[key], **change)
        return type(boxed).from_metadata(new_value, metadata)
    if isinstance(boxed, nn.meta.AxisMetadata):
        names = getattr(boxed, "names", None)
        if names is None:
            return boxed.replace_boxed(new_value)
        return dataclasses.replace(  # type: ignore[type-var]
            boxed, value=new_value, names=update_sharding(names, **change)
        )
    return new_value


def get_value_from_path(obj: Any, path: Sequence[str | int]) -> Any:
    """Follows attributes, keys and indices; None where the path leads nowhere.

    >>> get_value_from_path({'layers': [{'w': 3}]}, ('layers', 0, 'w'))
    3
    """
    for key in path:
        if obj is None:
            return None
        if isinstance(key, str) and hasattr(obj, key) and not isinstance(obj, dict):
            obj = getattr(obj, key)
            continue
        try:
            obj = obj[key]
        except (KeyError, IndexError, TypeError):
            return None
    return obj
