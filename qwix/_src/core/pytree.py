"""Array structures: frozen dataclasses of arrays that are JAX pytrees.

>>> @array_structure
... class Scaled:
...     values: jax.Array
...     scale: jax.Array
...     unit: str = static(default='m')
>>> doubled = jax.tree.map(lambda leaf: 2 * leaf, Scaled(3.0, 4.0))
>>> doubled.values, doubled.unit
(6.0, 'm')

A structure cannot be assigned to, its children are the array fields (keys are the field names) and
its aux data the static ones, and it has `replace(**updates)`. A subclass decorated likewise adds
its own fields.

Unflattening runs no `__init__` and looks at no leaf, because tree transformations put anything in
there: tracers, `ShapeDtypeStruct`, `nnx.Param`, None, `object()`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

_T = TypeVar("_T")

_structures: set[type] = set()


def static(**kwargs: Any) -> Any:
    """A dataclass field that is aux data of the pytree: hashable and compared by value."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def field_names(obj: Any, *, is_static: bool) -> tuple[str, ...]:
    """Names of the static fields, or of the array fields, of an array structure or its class, in order."""
    return _field_names(obj if isinstance(obj, type) else type(obj), is_static)


@functools.cache
def _field_names(cls: Any, is_static: bool) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls) if bool(f.metadata.get("static")) == is_static)


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple]:
    """Gets a tuple of attributes; each call of a jitted function does so for each array structure."""
    if len(names) > 1:
        return operator.attrgetter(*names)  # of one name it would be no tuple
    return lambda obj: tuple(getattr(obj, name) for name in names)


def _replace(self: Any, **updates: Any) -> Any:
    """Returns a copy with the given fields changed."""
    return dataclasses.replace(self, **updates)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def array_structure(cls: type[_T]) -> type[_T]:
    """Makes `cls` a frozen dataclass that is a pytree; see the module's docstring.

    Equality is identity, since arrays do not compare to one bool.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    if not hasattr(cls, "replace"):
        cls.replace = _replace  # type: ignore[attr-defined]
    children = field_names(cls, is_static=False)
    aux = field_names(cls, is_static=True)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in children)

    def flatten_with_keys(obj: Any) -> tuple[tuple, tuple]:
        leaves, aux_values = flatten(obj)
        return tuple(zip(keys, leaves, strict=True)), aux_values

    children_of, aux_of = _getter(children), _getter(aux)

    def flatten(obj: Any) -> tuple[tuple, tuple]:
        return children_of(obj), aux_of(obj)

    def unflatten(aux_values: tuple, leaves: Any) -> Any:
        obj = object.__new__(cls)
        for name, value in zip(children + aux, (*leaves, *aux_values), strict=True):
            object.__setattr__(obj, name, value)
        return obj

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    _structures.add(cls)
    return cls


def is_array_structure(obj: Any) -> bool:
    """Whether `obj` is an instance of a class made with `array_structure`."""
    return type(obj) in _structures


def map_fields(fn: Callable[[Any], Any], obj: Any) -> Any:
    """An array structure with `fn` applied to each array field; `obj` itself where that changes none."""
    old = {name: getattr(obj, name) for name in field_names(obj, is_static=False)}
    new = {name: fn(leaf) for name, leaf in old.items()}
    if all(new[name] is old[name] for name in old):
        return obj
    # Not `replace`: a subclass may check its fields there, and the other fields stay what they are.
    copy = object.__new__(type(obj))
    copy.__dict__.update(obj.__dict__, **new)
    return copy


def unwrap(obj: Any) -> Any:
    """Takes arrays out of the boxes that modules keep them in (`nnx.Param`, `nn.Partitioned`).

    `obj` is an array, a box of one, or an array structure whose fields are such, to any depth. A
    box is what is not an array and has `get_value()` or `value`. Returns `obj` itself when there
    is nothing to take out.
    """
    if obj is None or isinstance(obj, (jax.Array, np.ndarray)):
        return obj
    if is_array_structure(obj):
        return map_fields(unwrap, obj)
    if callable(getattr(obj, "get_value", None)):
        return unwrap(obj.get_value())
    if hasattr(obj, "value"):
        return unwrap(obj.value)
    return obj
