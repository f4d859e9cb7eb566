"""How a call inside a model reaches a provider: functions are intercepted by name.

A provider hands out an `Interceptor`, a mapping from dotted names to replacements::

    Interceptor({'jax.lax.dot_general': my_dot_general}, id=1)

and `wrap_func_intercepted(fn, get_interceptor)` returns `fn` with that mapping in force while it runs. The contract:

- **By any reference.** A plain Python function is redirected by exchanging its `__code__`, so a caller that did
  `from jax.lax import dot_general` long before is redirected as well. What has no exchangeable code (a `jax.jit`-ed
  function, a class attribute) is replaced where it stands and in every module that holds the same object.
- **Per thread.** The exchange is process-wide, the decision is not: another thread gets the original.
- **Nestable, never recursive.** Interceptors form a stack. The innermost one that knows the name handles the call;
  while it does, it and everything inside of it is off, so what it passes on reaches the outer ones or the original.
- **Exception-safe and free when idle.** The last wrapped call to leave puts everything back; nothing stays patched.
- **Safe with jit's caches.** The ids of the active interceptors are part of the key of every `jax.jit` cache (a JAX user
  context), so a function traced without interception is not reused under it, nor the other way round.

`docs/design.md` says what else was tried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

PRIMITIVE_BIND_KEY = "jax._src.core.Primitive.bind"


@dataclasses.dataclass(frozen=True, eq=False)
class Interceptor(Mapping):
    """Replacements by dotted name, with a stable identity.

    Attributes:
      mapping: dotted name of a function or attribute -> what is called in its place.
      id: hashable; part of jit's cache keys while active, so equal ids must mean equal behaviour.

    >>> Interceptor({'jax.numpy.sin': lambda x: x}, id=0)['jax.numpy.sin'](2)
    2
    """

    mapping: Mapping[str, Callable[..., Any]]
    id: Any

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.mapping[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.mapping)

    def __len__(self) -> int:
        return len(self.mapping)

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Interceptor) and self.id == other.id


def _resolve_owner(name: str) -> tuple[Any, str]:
    """('jax.lax.dot_general') -> (module jax.lax, 'dot_general'), importing what has to be imported."""
    *owner, attr = name.split(".")
    if not owner:
        raise AttributeError(f"{name!r} is not a dotted name")
    for i in range(len(owner), 0, -1):
        try:
            obj = importlib.import_module(".".join(owner[:i]))
        except ModuleNotFoundError:
            continue
        for part in owner[i:]:
            obj = getattr(obj, part)
        return obj, attr
    raise AttributeError(f"no module for {name!r}")


def get_attribute(name: str) -> Any:
    """Returns what a dotted name stands for; raises AttributeError if there is none.

    >>> import math
    >>> get_attribute('math.sin') is math.sin
    True
    """
    owner, attr = _resolve_owner(name)
    return getattr(owner, attr)


def has_attribute(name: str) -> bool:
    """Whether a dotted name stands for something.

    >>> has_attribute('jax.lax.dot_general'), has_attribute('jax.lax.no_such_op')
    (True, False)
    """
    try:
        get_attribute(name)
    except (AttributeError, ImportError):
        return False
    return True


def _code_calling(fn: Callable[..., Any], name: str) -> types.CodeType:
    """A code object without free variables that passes all of its arguments to `fn`.

    The code runs with the globals of the function that it is planted into, so `fn` cannot be a global of it, and a
    closure would need cells: it travels as a constant, in the place of a number that is compiled in for it.
    """
    namespace: dict[str, Any] = {}
    source = "def trampoline(*args, **kwargs): return (0.5)(*args, **kwargs)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        exec(compile(source, f"<qwix interception of {name}>", "exec"), namespace)
    code = namespace["trampoline"].__code__
    return code.replace(
        co_consts=tuple(fn if const == 0.5 else const for const in code.co_consts), co_name=name
    )


def passive(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a handler that only watches: it is called as `handler(original, *args, **kwargs)`.

    It must not run contractions: for speed, jit's cache key is left as it is while it runs.
    """
    handler.passive = True  # type: ignore[attr-defined]
    return handler


def reentrant(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a handler that runs with its interceptor still in force; it must not call what it stands for."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return handler(*args, **kwargs)

    run.reentrant = True  # type: ignore[attr-defined]
    return run


class _Target:
    """One interceptable name: how it is patched and what was there."""

    def __init__(self, name: str):
        self.name = name
        self.users = 0
        owner, attr = _resolve_owner(name)
        static = vars(owner).get(attr) if hasattr(owner, "__dict__") else None
        self.current = static if static is not None else getattr(owner, attr)
        self.owner, self.attr = owner, attr
        if isinstance(self.current, types.FunctionType) and not self.current.__code__.co_freevars:
            self.function: types.FunctionType | None = self.current
            self.saved_code = self.current.__code__
            original = types.FunctionType(
                self.saved_code, self.current.__globals__, self.current.__name__
            )
            original.__defaults__ = self.current.__defaults__
            original.__kwdefaults__ = self.current.__kwdefaults__
            self.original: Callable[..., Any] = original
            self.planted_code = _code_calling(self._dispatch, self.current.__name__)
        else:
            self.function = None
            self.original = self.current
            self.replacement = functools.update_wrapper(
                lambda *args, **kwargs: self._dispatch(*args, **kwargs), self.current, updated=()
            )
            self.holders: list[tuple[Any, str]] = []
            self.modules_seen = 0

    def _dispatch(self, *args, **kwargs):
        active = _state.active
        for i in range(len(active) - 1, -1, -1):
            handler = active[i].mapping.get(self.name)
            if handler is None:
                continue
            if hasattr(handler, "reentrant"):
                return handler(*args, **kwargs)
            if not hasattr(handler, "passive"):
                with _activate(active[:i]):
                    return handler(*args, **kwargs)
            _state.active = ()
            try:
                return handler(self.original, *args, **kwargs)
            finally:
                _state.active = active
        return self.original(*args, **kwargs)

    def patch(self) -> None:
        if self.function is not None:
            # Somebody else may have exchanged the code since; what stands there now is the original.
            self.function.__code__ = self.planted_code
            return
        if self.modules_seen != len(sys.modules) and not isinstance(self.owner, type):
            self.modules_seen = len(sys.modules)
            self.holders = [
                (module, attr)
                for module in list(sys.modules.values())
                if isinstance(module, types.ModuleType)
                for attr, value in list(vars(module).items())
                if value is self.current
            ]
        for holder, attr in [(self.owner, self.attr), *self.holders]:
            setattr(holder, attr, self.replacement)

    def unpatch(self) -> None:
        if self.function is not None:
            self.function.__code__ = self.saved_code
            return
        for holder, attr in [(self.owner, self.attr), *self.holders]:
            setattr(holder, attr, self.current)


class _State(threading.local):
    active: tuple[Interceptor, ...] = ()


_state = _State()
_jit_key = jax.make_user_context(default_value=())


@contextlib.contextmanager
def _activate(active: tuple[Interceptor, ...]):
    previous = _state.active
    _state.active = active
    try:
        with _jit_key(tuple(i.id for i in active)):
            yield
    finally:
        _state.active = previous


class _InterceptionManager:
    """The process-wide book of what is patched. Use `wrap_func_intercepted`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._targets: dict[str, _Target] = {}

    @property
    def active(self) -> tuple[Interceptor, ...]:
        """The interceptors in force in this thread, outermost first."""
        return _state.active

    def original(self, name: str) -> Callable[..., Any]:
        """What a dotted name stands for when nothing is intercepted."""
        target = self._targets.get(name)
        return target.original if target is not None else get_attribute(name)

    @contextlib.contextmanager
    def intercepting(self, interceptor: Interceptor):
        targets = self._acquire(interceptor)
        try:
            with _activate((*_state.active, interceptor)):
                yield
        finally:
            self._release(targets)

    def _acquire(self, interceptor: Interceptor) -> list[_Target]:
        with self._lock:
            targets = []
            for name in interceptor.mapping:
                if name not in self._targets:
                    self._targets[name] = _Target(name)
                targets.append(self._targets[name])
            for target in targets:
                target.users += 1
                if target.users == 1:
                    target.patch()
            return targets

    def _release(self, targets: list[_Target]) -> None:
        with self._lock:
            for target in targets:
                target.users -= 1
                if target.users == 0:
                    target.unpatch()


interception_manager = _InterceptionManager()


def wrap_func_intercepted(
    func: Callable[..., Any],
    get_interceptor: Callable[[], Interceptor],
    *,
    disable_jit: bool,
    input_transform: Callable[..., tuple[Any, Any]] = lambda *x: x,
    output_transform: Callable[[Any], Any] = lambda x: x,
    should_intercept: Callable[[], bool] = lambda: True,
) -> Callable[..., Any]:
    """Returns `func` with an interceptor in force while it runs, in the calling thread only.

    Args:
      func: the function to wrap.
      get_interceptor: called at each call; gives the `Interceptor` (or None for none).
      disable_jit: run `func` under `jax.disable_jit()`, so that nested jitted functions are seen op by op.
      input_transform: (args, kwargs) -> (args, kwargs), applied before the call, inside the interception.
      output_transform: applied to the result, inside the interception.
      should_intercept: where it returns False, `func` is called as it is.

    Raises:
      AttributeError: if the interceptor names something that does not exist.

    >>> import jax.numpy as jnp
    >>> shout = wrap_func_intercepted(
    ...     lambda x: jnp.einsum('i->', x),
    ...     lambda: Interceptor({'jax.numpy.einsum': lambda *args: 'intercepted'}, id='doc'),
    ...     disable_jit=False)
    >>> shout(jnp.ones(2))
    'intercepted'
    """

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if not should_intercept():
            return func(*args, **kwargs)
        interceptor = get_interceptor()
        if not isinstance(interceptor, Interceptor):
            interceptor = Interceptor(interceptor, id=id(interceptor))
        jit = jax.disable_jit() if disable_jit else contextlib.nullcontext()
        with interception_manager.intercepting(interceptor), jit:
            args, kwargs = input_transform(args, kwargs)
            return output_transform(func(*args, **kwargs))

    return wrapper


def disable_interceptions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` with no interceptor in force while it runs.

    >>> disable_interceptions(lambda: interception_manager.active)()
    ()
    """

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        if not _state.active:
            return fn(*args, **kwargs)
        with _activate(()):
            return fn(*args, **kwargs)

    return wrapper
