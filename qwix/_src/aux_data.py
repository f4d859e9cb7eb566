"""Data attached to an object by identity, for objects that take no attributes (arrays, tracers).

The data belongs to that very object: a copy, a cast or a `jax.tree.map` of it has none.

>>> import jax.numpy as jnp
>>> x = jnp.ones(2)
>>> set(x, 'name', 'kernel')
>>> get(x, 'name'), get(x + 1, 'name', None)
('kernel', None)
"""

from __future__ import annotations

import weakref
from typing import Any

_MISSING: Any = object()
# id -> (the object or a weak reference to it, its data). The reference tells a live entry from a recycled id.
_data: dict[int, tuple[Any, dict[Any, Any]]] = {}


def _entry(obj: Any) -> dict[Any, Any] | None:
    found = _data.get(id(obj))
    if found is None:
        return None
    reference, data = found
    return data if reference() is obj else None


def set(obj: Any, key: Any, value: Any) -> None:
    """Attaches `value` to `obj` under `key`, until `obj` is collected or `clear`ed."""
    data = _entry(obj)
    if data is None:
        data = {}
        ident = id(obj)
        try:
            reference: Any = weakref.ref(obj, lambda _: _data.pop(ident, None))
        except TypeError:  # no weak references to it: kept alive until `clear`

            def reference(obj=obj):
                return obj

        _data[ident] = (reference, data)
    data[key] = value


def get(obj: Any, key: Any, default: Any = _MISSING) -> Any:
    """What was attached to `obj` under `key`; `default`, or KeyError without one, if nothing was."""
    data = _entry(obj)
    if data is not None and key in data:
        return data[key]
    if default is _MISSING:
        raise KeyError(f"no {key!r} attached to this {type(obj).__name__}")
    return default


def clear(obj: Any) -> None:
    """Forgets all that was attached to `obj`."""
    if _entry(obj) is not None:
        del _data[id(obj)]
