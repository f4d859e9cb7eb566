"""The data flow of a model, and what it means that an array in it carries a scale.

A *scale* is a vector g of positive numbers, one for each of n features. A `Placement` says how an array carries g:
element i of the array is multiplied by g[ids[i]]^exponent. A `Graph` is the jaxpr of a model, flat, and knows which of
its inputs are parameters. `scale_rules` says how each operation passes scales on, and `folding` puts it all to use.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np


class Blocked(Exception):
    """A scale cannot go this way; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """How an array carries a scale g.

    Attributes:
      ids: int array of the array's rank: which feature of g an element belongs to, -1 for none. An axis along which
        it is constant has size 1.
      exponent: of g.
    """

    ids: np.ndarray
    exponent: Fraction = Fraction(1)

    def axes(self) -> list[int]:
        """The axes along which the scale varies."""
        return [axis for axis, size in enumerate(self.ids.shape) if size > 1]

    def moved(self, ids: np.ndarray) -> "Placement":
        """The same scale on an array of another layout."""
        return Placement(compact(ids), self.exponent)

    def power(self, exponent: Fraction | int) -> "Placement":
        """The scale of x^exponent."""
        return Placement(self.ids, self.exponent * exponent)


def compact(ids: np.ndarray) -> np.ndarray:
    """Ids with size 1 along the axes on which they are constant.

    >>> compact(np.array([[0, 1], [0, 1]])).tolist()
    [[0, 1]]
    """
    for axis, size in enumerate(ids.shape):
        first = np.take(ids, [0], axis)
        if size > 1 and np.array_equal(np.broadcast_to(first, ids.shape), ids):
            ids = first
    return ids


@dataclasses.dataclass(frozen=True)
class Constant:
    """A literal in a jaxpr."""

    value: Any
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Eqn:
    """One operation; variables are numbers of the graph's."""

    name: str
    params: Mapping[str, Any]
    inputs: tuple["int | Constant", ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter among the inputs of a graph.

    Attributes:
      key: whatever the caller knows it by.
      stacked: how many leading axes it has that the graph does not see, because it is the body of a scan.
    """

    key: Any
    stacked: int = 0


class Ties:
    """Features of a scale that have to be equal.

    >>> ties = Ties(3)
    >>> ties.tie(2, 0)
    >>> ties.classes().tolist()
    [0, 1, 0]
    """

    def __init__(self, size: int):
        self._parent = np.arange(size)

    def copy(self) -> "Ties":
        copy = Ties(0)
        copy._parent = self._parent.copy()
        return copy

    def classes(self) -> np.ndarray:
        """For each feature, the first one that it is tied to."""
        while not np.array_equal(above := self._parent[self._parent], self._parent):
            self._parent = above
        return self._parent

    def tie(self, a: int, b: int) -> None:
        classes = self.classes()
        low, high = sorted((classes[a], classes[b]))
        self._parent[classes == high] = low

    def reduce(self, ids: np.ndarray, axis: int) -> np.ndarray:
        """Ids of an array that is repeated along an axis: what varies there has to be equal."""
        if ids.shape[axis] == 1:
            return ids
        first = np.take(ids, [0], axis)
        differ = first != ids
        pairs = np.stack([np.broadcast_to(first, ids.shape)[differ], ids[differ]])
        for a, b in np.unique(pairs, axis=1).T.tolist():
            if min(a, b) < 0:
                raise Blocked("a part of it is repeated in what carries no scale")
            self.tie(a, b)
        return first

    def canonical(self, placement: Placement) -> Placement:
        """A placement with tied features under one number."""
        classes = np.append(self.classes(), -1)
        return placement.moved(classes[placement.ids])

    def equal(self, a: Placement, b: Placement) -> bool:
        """Whether two placements on arrays of one shape are the same."""
        if a.exponent != b.exponent:
            return False
        return np.array_equal(self.canonical(a).ids, self.canonical(b).ids)


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a push rule asks for: that operand `index` carries a scale."""

    index: int
    placement: Placement


class Graph:
    """A jaxpr, with what it calls put in its place, and which of its inputs are parameters.

    Args:
      jaxpr: of the model, closed.
      parameters: for each input of the jaxpr its `Parameter`, or None for one that cannot take a scale.

    Attributes:
      eqns: the operations in order.
      bodies: a graph for each scan: its carry cannot take a scale, the slices of stacked parameters can.
    """

    def __init__(self, jaxpr: Any, parameters: Sequence[Parameter | None]):
        self.eqns: list[Eqn] = []
        self.bodies: list[Graph] = []
        self.parameters: dict[int, Parameter] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.producer: dict[int, int] = {}
        self.consumers: dict[int, list[int]] = {}
        inputs = [self._new(v.aval.shape) for v in jaxpr.jaxpr.invars]
        self.parameters = {v: p for v, p in zip(inputs, parameters, strict=True) if p is not None}
        self.outputs = {v for v in self._inline(jaxpr.jaxpr, jaxpr.consts, inputs) if isinstance(v, int)}
        self._from_parameters = self._find_from_parameters()
        for i, eqn in enumerate(self.eqns):
            if eqn.name == "scan":
                self._enter_scan(i, eqn)

    # --- building

    def _new(self, shape: Sequence[int]) -> int:
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def _inline(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Appends the equations of a jaxpr; returns its outputs."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        env |= {var: self._constant(value) for var, value in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> Any:
            return Constant(atom.val, tuple(atom.aval.shape)) if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner = _called(eqn)
            if inner is not None:
                results = self._inline(inner[0], inner[1], operands)
            else:
                results = [self._new(var.aval.shape) for var in eqn.outvars]
                self._append(Eqn(eqn.primitive.name, eqn.params, tuple(operands), tuple(results)))
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, value: Any) -> Any:
        shape = tuple(np.shape(value))
        return Constant(value, shape) if not shape else self._new(shape)

    def _append(self, eqn: Eqn) -> None:
        for var in eqn.outputs:
            self.producer[var] = len(self.eqns)
        for operand in eqn.inputs:
            if isinstance(operand, int):
                self.consumers.setdefault(operand, []).append(len(self.eqns))
        self.eqns.append(eqn)

    def _enter_scan(self, index: int, eqn: Eqn) -> None:
        fixed = eqn.params["num_consts"] + eqn.params["num_carry"]
        parameters: list[Parameter | None] = []
        for position, var in enumerate(eqn.inputs):
            found = self.parameters.get(var) if isinstance(var, int) and position >= fixed else None
            used_once = found is not None and set(self.consumers[var]) == {index}  # type: ignore[index]
            unused = found is not None and var not in self.outputs and list(eqn.inputs).count(var) == 1
            parameters.append(Parameter(found.key, found.stacked + 1) if found and used_once and unused else None)
        if any(parameters):
            self.bodies.append(Graph(eqn.params["jaxpr"], parameters))

    def _find_from_parameters(self) -> set[int]:
        found = set(self.parameters)
        for eqn in self.eqns:
            if all(isinstance(var, Constant) or var in found for var in eqn.inputs) and eqn.inputs:
                found |= set(eqn.outputs)
        return found

    # --- asking

    def shape(self, var: "int | Constant") -> tuple[int, ...]:
        return var.shape if isinstance(var, Constant) else self.shapes[var]

    def is_from_parameters(self, var: "int | Constant") -> bool:
        """Whether a variable depends on parameters and constants alone."""
        return isinstance(var, Constant) or var in self._from_parameters

    def is_unchanged_by_scales(self, var: "int | Constant") -> bool:
        """Whether a variable is 0 or infinite everywhere, so that it carries any scale and none."""
        if isinstance(var, int):
            eqn = self.eqns[self.producer[var]] if var in self.producer else None
            if eqn is None or eqn.name not in ("broadcast_in_dim", "convert_element_type", "reshape"):
                return False
            return self.is_unchanged_by_scales(eqn.inputs[0])
        value = np.asarray(var.value, np.float64) if np.size(var.value) == 1 else np.ones(())
        return bool(value == 0 or np.isinf(value))

    def walk(self) -> Iterator["Graph"]:
        """The graph, and those of its scans, to any depth."""
        yield self
        for body in self.bodies:
            yield from body.walk()


# primitive -> the parameter that holds the jaxpr that it calls
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def _called(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """(jaxpr, constants) that an equation does nothing but call."""
    name = _CALLS.get(eqn.primitive.name)
    if name is None or name not in eqn.params:
        return None
    inner = eqn.params[name]
    if hasattr(inner, "jaxpr"):
        return inner.jaxpr, inner.consts
    return inner, ()
