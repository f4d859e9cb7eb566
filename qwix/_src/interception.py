"""How a call inside a model reaches a provider: functions are intercepted by name.

A provider hands out an `Interceptor`, a mapping from dotted names to replacements::

    Interceptor({'jax.lax.dot_general': my_dot_general}, id=1)

and `wrap_func_intercepted(fn, get_interceptor)` returns `fn` with that mapping in force while it runs. The contract:

- **By any reference.** A Python function is redirected by exchanging its `__code__`, so a caller that did
  `from jax.lax import dot_general` long before is redirected as well. What has no exchangeable code (a `jax.jit`-ed
  function, an object with `__call__`) is replaced where it stands and in every module that holds the same object.
- **Per thread.** The exchange is process-wide, the decision is not: another thread gets the original.
- **Nestable, never recursive.** Interceptors form a stack. The innermost one that knows the name handles the call;
  while it does, it and everything inside of it is off, so what it passes on reaches the outer ones or the original.
- **Exception-safe and free when idle.** The last wrapped call to leave puts everything back; nothing stays patched.
- **Safe with jit's caches.** The ids of the active interceptors are part of the key of every `jax.jit` cache (a JAX
  user context), so a function traced without interception is not reused under it, nor the other way round.

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


def _code_calling(fn: Callable[..., Any], function: types.FunctionType) -> types.CodeType:
    """A code object for `function` that passes all of its arguments to `fn`.

    The code runs with the globals and the closure of the function that it is planted into, so `fn` can be neither: it
    travels as a constant, in the place of a number that is compiled in for it. Python wants the closure's size kept.
    """
    cells = [f"cell{i}" for i in range(len(function.__code__.co_freevars))]
    source = "\n".join(
        [
            "def plant():",
            *(f"  {cell} = None" for cell in cells),
            "  def trampoline(*args, **kwargs):",
            *(f"    {cell}" for cell in cells),
            "    return (0.5)(*args, **kwargs)",
            "  return trampoline",
        ]
    )
    namespace: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        exec(compile(source, f"<qwix interception of {function.__name__}>", "exec"), namespace)
    code = namespace["plant"]().__code__
    constants = tuple(fn if const == 0.5 else const for const in code.co_consts)
    return code.replace(co_consts=constants, co_name=function.__name__)


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
    """One interceptable function: its names, how it is patched, and what was there."""

    def __init__(self, owner: Any, attr: str, current: Any):
        self.names: list[str] = []
        self.users = 0
        self.owner, self.attr, self.current = owner, attr, current
        self.stored = vars(owner).get(attr)  # a change of it means that somebody has put another function there
        self.original: Callable[..., Any]
        self.function = current if isinstance(current, types.FunctionType) else None
        self.in_jax = self.function is not None and str(self.function.__module__).startswith("jax._src.lax.")
        if self.function is not None:
            self.saved_code: types.CodeType | None = None
            self.planted_code = _code_calling(self.dispatch, self.function)
            self._save_code()
        else:
            self.original = current
            self.replacement = functools.update_wrapper(functools.partial(self.dispatch), current, updated=())
            self.holders: list[tuple[Any, str]] = []
            self.modules_seen = 0

    def _save_code(self) -> None:
        """Takes what the function runs now for the original; somebody else may have exchanged it since."""
        function = self.function
        assert function is not None
        if function.__code__ is self.saved_code:
            return
        self.saved_code = function.__code__
        original = types.FunctionType(
            self.saved_code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        original.__kwdefaults__ = function.__kwdefaults__
        self.original = original

    def dispatch(self, *args, **kwargs):
        """What is called in the place of the function, by the interceptors of this thread."""
        active = _state.active
        if not active:
            return self.original(*args, **kwargs)
        if self.in_jax and _is_rule_of_jax(sys._getframe(2), self.function):
            return self.original(*args, **kwargs)
        for i in range(len(active) - 1, -1, -1):
            handler = self.handler(active[i].mapping)
            if handler is None:
                continue
            if hasattr(handler, "reentrant"):
                return handler(*args, **kwargs)
            if not hasattr(handler, "passive"):
                with _activate(active[:i]):
                    return handler(*args, **kwargs)
            if i and any(not hasattr(self.handler(a.mapping) or handler, "passive") for a in active[:i]):
                with _activate(active[:i]):
                    return handler(self.dispatch, *args, **kwargs)
            _state.active = ()
            try:
                return handler(self.original, *args, **kwargs)
            finally:
                _state.active = active
        return self.original(*args, **kwargs)

    def handler(self, mapping: Mapping[str, Callable[..., Any]]) -> Callable[..., Any] | None:
        """What a mapping has for it, under any of its names."""
        for name in self.names:
            if name in mapping:
                return mapping[name]
        return None

    def patch(self) -> None:
        if self.function is not None:
            self._save_code()
            self.function.__code__ = self.planted_code
            return
        if self.modules_seen != len(sys.modules) and not isinstance(self.owner, type):
            self.modules_seen = len(sys.modules)
            self.holders = _holders_of(self.current)
        for holder, attr in [(self.owner, self.attr), *self.holders]:
            setattr(holder, attr, self.replacement)

    def unpatch(self) -> None:
        if self.function is not None:
            assert self.saved_code is not None
            self.function.__code__ = self.saved_code
            return
        for holder, attr in [(self.owner, self.attr), *self.holders]:
            setattr(holder, attr, self.current)
        if self.modules_seen != len(sys.modules) and not isinstance(self.owner, type):
            # Modules that were imported meanwhile, by the model or by another thread, may have taken the replacement.
            for holder, attr in _holders_of(self.replacement):
                setattr(holder, attr, self.current)


def _is_rule_of_jax(caller: types.FrameType, function: Any) -> bool:
    """Whether it is one of JAX's own rules, such as that for the gradient of dot_general, that calls the function.

    Such a call is no op of a model. The rules of jax 0.9 and 0.10 are private functions beside the public one.
    """
    name = caller.f_code.co_name
    return caller.f_globals is function.__globals__ and (name.startswith("_") or name == "dot_general")  # calls dot


def _holders_of(value: Any) -> list[tuple[types.ModuleType, str]]:
    """The modules whose globals hold this very object, and under which name."""
    return [
        (module, attr)
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType)
        for attr, held in list(vars(module).items())
        if held is value
    ]


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
        self._by_name: dict[str, _Target] = {}
        # id of what stood under a name, or stands there while it is patched -> its target, which keeps it alive
        self._by_id: dict[int, _Target] = {}
        # id of the body of a jitted function -> its target
        self._by_body: dict[int, _Target] = {}

    @property
    def active(self) -> tuple[Interceptor, ...]:
        """The interceptors in force in this thread, outermost first."""
        return _state.active

    def original(self, name: str) -> Callable[..., Any]:
        """What a dotted name stands for when nothing is intercepted."""
        target = self._by_name.get(name)
        return target.original if target is not None else get_attribute(name)

    def stand_in(self, body: Callable[..., Any]) -> Callable[..., Any] | None:
        """What is to be called in the place of a jitted function's Python body, by the interceptors in force.

        For callers that hold a jitted function where it cannot be replaced, such as in a closure: jit calls its body.
        """
        target = self._by_body.get(id(body))
        if target is None or not any(target.handler(i.mapping) for i in _state.active):
            return None
        return functools.wraps(body)(functools.partial(target.dispatch))

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
            targets = [self._target(name) for name in interceptor.mapping]
            for target in targets:
                target.users += 1
                if target.users == 1:
                    target.patch()
            return targets

    def _target(self, name: str) -> _Target:
        target = self._by_name.get(name)
        if target is None or (target.users == 0 and vars(target.owner).get(target.attr) is not target.stored):
            return self._new_target(name)
        return target

    def _new_target(self, name: str) -> _Target:
        owner, attr = _resolve_owner(name)
        current = vars(owner).get(attr) if isinstance(owner, type) else None
        if isinstance(current, (staticmethod, classmethod)):
            current = current.__func__
        current = getattr(owner, attr) if current is None else current
        target = self._by_id.get(id(current))  # one function may go by several names
        if target is None:
            target = self._by_id[id(current)] = _Target(owner, attr, current)
            if target.function is None:
                self._by_id[id(target.replacement)] = target
                self._by_body[id(getattr(current, "__wrapped__", None))] = target
        target.names.append(name)
        self._by_name[name] = target
        return target

    def _release(self, targets: list[_Target]) -> None:
        with self._lock:
            for target in targets:
                target.users -= 1
                if target.users == 0:
                    target.unpatch()


@dataclasses.dataclass(frozen=True, eq=False)
class _Identity:
    """An object as a key, by what it is. The key keeps it alive, so that its id stays its own."""

    obj: Any

    def __hash__(self) -> int:
        return id(self.obj)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.obj is other.obj


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
      get_interceptor: called at each call; gives the `Interceptor`, or a bare mapping, which is its own identity.
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
            interceptor = Interceptor(interceptor, id=_Identity(interceptor))
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
