"""The one place where array structures become data of Flax NNX modules.

An *array structure* (`core/pytree.py`) is a frozen dataclass that is a JAX pytree: some fields
hold arrays or other array structures, the static ones hold metadata. ``QArray`` is one, and so is
``WithAux(array=QArray(...), how=HowToQuantize(...))``. NNX refuses an attribute that holds one, or,
where the type is only known as data, reads but cannot update it. After

    @nnx_nodes.register
    @pytree.array_structure
    class WithAux: ...

an attribute may hold one, with plain arrays in its fields or with variables such as `nnx.Param`:

* Field names continue the path of the attribute (``kernel/array/qvalue``). A field that is None has
  no path. Static fields are part of the `nnx.GraphDef`, so they have to be hashable.
* What NNX rebuilds (`nnx.merge`, `nnx.clone`, what a transform returns) is a new object of the same
  type. It is a pytree node and no graph node: it may be an argument, a result or a loop carry of
  every NNX transform, and may be differentiated and mapped over, as any other pytree of arrays.
* `nnx.update` and `nnx.pop` change it in place, as they do with a list or a variable; to everyone
  else it is frozen. So where one object with plain arrays is assigned to two modules, `nnx.update`
  of either changes both: give each its own (``w.replace()``), or put `nnx.Param` into the fields,
  which NNX tracks as it tracks all shared variables.
* A state may hold a whole structure for one in the module: ``nnx.update(model, {"kernel": q})``.
  Only arrays can be updated: where type, static or absent fields differ, it is a ValueError.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from flax import nnx
from flax.nnx import graph

from qwix._src.core import pytree, qarray

_T = TypeVar("_T")

# The key under which a structure shows itself to `nnx.update` before its fields; no field's name.
_WHOLE = "<whole>"

_registered: set[type] = set()


def register(cls: type[_T]) -> type[_T]:
    """Makes the array structure `cls` data and a node of NNX; see the module's docstring.

    A class decorator that returns `cls` with a method `items`. Registering twice changes nothing. A
    subclass is another type and needs a registration of its own.

    Raises:
      TypeError: `cls` is not a class made with `array_structure`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from qwix._src import nnx_nodes
      >>> from qwix._src.core.pytree import array_structure, static
      >>> @nnx_nodes.register
      ... @array_structure
      ... class Scaled:
      ...     value: jnp.ndarray
      ...     unit: str = static(default="m")
      >>> class Model(nnx.Module):
      ...     def __init__(self):
      ...         self.length = Scaled(jnp.zeros(2))
      >>> model = Model()
      >>> nnx.update(model, {"length": {"value": jnp.ones(2)}})
      >>> model.length
      Scaled(value=Array([1., 1.], dtype=float32), unit='m')
    """
    if cls in _registered:
        return cls
    if not pytree.is_array_structure(object.__new__(cls)):
        raise TypeError(f"{cls!r} is no array structure: decorate it with `array_structure` first.")
    fields = pytree.field_names(cls, is_static=False)
    static_fields = pytree.field_names(cls, is_static=True)

    def flatten(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        present = [(name, getattr(node, name)) for name in sorted(fields)]
        children = [(name, value) for name, value in present if value is not None]
        return children, tuple(getattr(node, name) for name in static_fields)

    def unflatten(children: Sequence[tuple[Any, Any]], static_values: tuple[Any, ...]) -> Any:
        # Runs no __init__ for the reason that `array_structure` runs none: NNX puts anything in.
        node: Any = object.__new__(cls)
        values = dict.fromkeys(fields) | dict(zip(static_fields, static_values, strict=True))
        for name, value in (values | dict(children)).items():
            object.__setattr__(node, name, value)
        return node

    def set_key(node: Any, key: Any, value: Any) -> None:
        if key == _WHOLE:
            _check_replaceable(node, value)
        elif key not in fields:
            raise ValueError(f"A state has {key!r} for a {cls.__name__}, whose arrays are {', '.join(fields)}.")
        else:
            object.__setattr__(node, key, value)

    def pop_key(node: Any, key: Any) -> Any:
        value = getattr(node, key)
        object.__setattr__(node, key, None)
        return value

    cls.items = _items  # type: ignore[attr-defined]
    nnx.register_data_type(cls)
    graph.register_pytree_node_type(cls, flatten, unflatten, set_key=set_key, pop_key=pop_key)
    _registered.add(cls)
    return cls


def _items(self: Any) -> Iterator[tuple[str, Any]]:
    """What `nnx.update` reads, from a mapping or from this: the fields that are present.

    Before them stands the structure itself, for `set_key` to compare what is not an array.
    """
    yield _WHOLE, self
    for name in pytree.field_names(self, is_static=False):
        value = getattr(self, name)
        if value is not None:
            yield name, value


def _check_replaceable(old: Any, new: Any) -> None:
    """Raises a ValueError if writing the arrays of `new` into `old` would not make it equal."""

    def describe(node: Any) -> dict[str, Any]:
        absent = [n for n in pytree.field_names(node, is_static=False) if getattr(node, n) is None]
        statics = {n: getattr(node, n) for n in pytree.field_names(node, is_static=True)}
        return {"type": type(node).__name__} | dict.fromkeys(absent) | statics

    is_, should_be = describe(old), describe(new)
    for name in is_ | should_be:
        if name not in is_ or name not in should_be or is_[name] != should_be[name]:
            raise ValueError(
                f"nnx.update changes arrays only, not what {name!r} is: the module holds {is_}, the"
                f" state {should_be}. Assign the attribute instead, as in `model.kernel = kernel`."
            )


register(qarray.QArray)
