"""A model's computation cut where weights are calibrated, so that each weight may change what the later ones see.

    plan = trace(call, params, inputs)        # one trace of the model: its jaxpr, with each calibrated op marked
    plan.stages                               # weights by stage: what a weight's inputs depend on comes earlier
    plan.segments[k]                          # what has to be computed for the inputs of stage k, after stage k - 1

The calibration provider does not collect here but marks: `marking(provider)` binds `marker_p` to the features of each
use of a weight, and the marks say which values of the jaxpr the statistics are of. Every equation belongs to the
segment of the first stage that needs it. Running the segments one after the other, with the values between them
carried along, is one pass of the model however many stages there are. Equal segments, those of equal layers, have
equal keys (`Segment.key`), so that they share one compiled program.

A weight waits for those whose first use is earlier in the program. Where a later one goes in as well (a tied embedding,
a layer that is called twice) its float value is what is seen.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import numpy as np
from jax.interpreters import mlir

from qwix.contrib import calibration, input_features

Path = tuple[str, ...]
_core = jax.extend.core

# Features of a weight's use, passed on as they are; parameters: path, op_id, groups. A second operand is the group of
# each sample.
marker_p = _core.Primitive("qwix_features")
marker_p.def_impl(lambda x, *_, **__: x)
marker_p.def_abstract_eval(lambda x, *_, **__: x)
mlir.register_lowering(marker_p, lambda ctx, x, *_, **__: [x])

# Calls that are nothing but their body, and the parameter that holds it (jax 0.9 and 0.10).
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


class CannotCut(ValueError):
    """A calibrated op is where the model cannot be cut into stages; the message says where."""


def marking(provider: calibration.CalibrationProvider) -> calibration.CalibrationProvider:
    """A provider that marks the features which the given one would collect."""

    def mark(features: input_features.Features, op_id: str) -> None:
        operands = [features.x] if features.group_of_sample is None else [features.x, features.group_of_sample]
        path = tuple(map(str, features.ref.keys))
        marker_p.bind(*operands, path=path, op_id=op_id, groups=features.groups)

    marker = copy.copy(provider)
    marker._collect = mark  # type: ignore[method-assign]
    return marker


@dataclasses.dataclass(frozen=True)
class Mark:
    """A use of a weight: which values of the jaxpr are its features (and the groups of its samples)."""

    path: Path
    op_id: str
    groups: tuple[int, ...]
    variables: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
    """The equations that a stage waits for, and no stage before it did.

    Attributes:
      inputs: variables that come from parameters, inputs of the model and earlier segments.
      outputs: variables that later segments read.
      marks: of this stage. Those of equal `variables` have equal statistics.
      key: equal for segments that compute the same; for the jit cache.
    """

    equations: tuple[Any, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    marks: tuple[Mark, ...]
    key: Hashable = dataclasses.field(repr=False)

    def features(self) -> list[tuple[Any, ...]]:
        """Variables of the features, each once."""
        return list(dict.fromkeys((mark.variables, mark.groups) for mark in self.marks))

    def run(self, inputs: Sequence[Any]) -> tuple[list[Any], list[input_features.Features]]:
        """(values of `outputs`, features by `features()`)."""
        environment = dict(zip(self.inputs, inputs, strict=True))
        _evaluate(self.equations, environment)
        found = []
        for variables, groups in self.features():
            x, *group = (_read(environment, v) for v in variables)
            found.append(input_features.Features(None, x, groups, group[0] if group else None))  # type: ignore[arg-type]
        return [environment[v] for v in self.outputs], found


@dataclasses.dataclass(frozen=True)
class Plan:
    """A traced model; see the module's docstring.

    Attributes:
      params: the variable of each parameter, by path.
      inputs: the variables of the model's other inputs, in order.
      constants: values of other variables.
      stages: paths of the weights of each stage.
      segments: one for each stage.
      last_use: variable -> the last segment that reads it.
    """

    params: Mapping[Path, Any]
    inputs: tuple[Any, ...]
    constants: Mapping[Any, Any]
    stages: tuple[tuple[Path, ...], ...]
    segments: tuple[Segment, ...]
    last_use: Mapping[Any, int]


def leaves(params: Any) -> list[tuple[Path, Any]]:
    """(path, array) of each array of a nested dict, those inside of array structures too.

    >>> leaves({"a": {"b": 1}})
    [(('a', 'b'), 1)]
    """
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in found]


def array_path(weight: Path, known: Container[Path]) -> Path:
    """Where the array of a weight is among known paths: at the weight's own, or inside of a `WithInputTransform` there.

    >>> array_path(("up", "kernel"), {("up", "kernel", "array")})
    ('up', 'kernel', 'array')
    """
    path = weight
    while path not in known:
        if len(path) > len(weight) + 2:
            raise ValueError(f"{'/'.join(weight)} is no parameter of the model")
        path = (*path, "array")
    return path


def trace(call: Callable[..., Any], params: Mapping[Any, Any], inputs: Any) -> Plan:
    """Traces call(params, inputs), a model under `marking(provider)`.

    Args:
      call: pure function.
      params: nested dict of arrays.
      inputs: any pytree of arrays.

    Raises:
      ValueError: no op is calibrated.
      CannotCut: one is inside of a loop.
    """
    closed = jax.make_jaxpr(call)(params, inputs)
    flat = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args))(*closed.in_avals)
    jaxpr = flat.jaxpr
    paths = [path for path, _ in leaves(params)]
    equations, marks = _without_duplicates(jaxpr.eqns)
    if not marks:
        raise ValueError("no op of the model is calibrated: look at the rules' type, module_path and op_names")
    variables = dict(zip(paths, jaxpr.invars, strict=False))
    stage_of = _stages(equations, marks, variables)
    segment_of = _segments(equations, marks, stage_of)
    count = max(stage_of.values()) + 1
    last_use: dict[Any, int] = {}
    for equation, k in zip(equations, segment_of, strict=True):
        if k is not None:
            last_use.update((v, max(last_use.get(v, 0), k)) for v in equation.invars if isinstance(v, _core.Var))
    segments = []
    for k in range(count):
        mine = tuple(e for e, s in zip(equations, segment_of, strict=True) if s == k)
        segments.append(_segment(mine, tuple(m for m in marks if stage_of[m.path] == k), last_use, k))
    for k, segment in enumerate(segments):
        for v in segment.inputs:
            last_use[v] = max(last_use.get(v, 0), k)
    stages = tuple(tuple(p for p, s in stage_of.items() if s == k) for k in range(count))
    constants = dict(zip(jaxpr.constvars, flat.consts, strict=True))
    return Plan(variables, tuple(jaxpr.invars[len(paths) :]), constants, stages, tuple(segments), last_use)


def _read(environment: Mapping[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, _core.Literal) else environment[v]


def _evaluate(equations: Sequence[Any], environment: dict[Any, Any]) -> None:
    for equation in equations:
        values = [_read(environment, v) for v in equation.invars]
        params = equation.primitive.get_bind_params(equation.params)
        functions, params = params if isinstance(params, tuple) else ((), params)  # a tuple before jax 0.10
        out = equation.primitive.bind(*functions, *values, **params)
        results = out if equation.primitive.multiple_results else [out]
        environment.update(zip(equation.outvars, results, strict=True))


def _inline(jaxpr: Any, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The value of a jaxpr, with calls replaced by their bodies."""
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *args), strict=True))
    for equation in jaxpr.eqns:
        body = equation.params.get(_INLINED.get(equation.primitive.name, ""))
        if body is None:
            if _holds_marks(equation):
                raise CannotCut(
                    f"a calibrated op is inside of a {equation.primitive.name}, which cannot be cut into stages: take "
                    "statistics of the float model instead (gptq.quantize_params), or write the layers one by one"
                )
            _evaluate([equation], environment)
            continue
        values = [_read(environment, v) for v in equation.invars]
        inner, consts = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
        environment.update(zip(equation.outvars, _inline(inner, consts, values), strict=True))
    return [_read(environment, v) for v in jaxpr.outvars]


def _holds_marks(equation: Any) -> bool:
    return any(
        inner.primitive is marker_p or _holds_marks(inner)
        for jaxpr in _jaxprs_in(equation.params)
        for inner in jaxpr.eqns
    )


def _jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _without_duplicates(equations: Sequence[Any]) -> tuple[list[Any], list[Mark]]:
    """The equations without those that compute again what an earlier one did, and the marks in program order."""
    same: dict[Any, Any] = {}
    seen: dict[Hashable, Sequence[Any]] = {}
    kept, marks = [], []
    for equation in equations:
        invars = [same.get(v, v) if isinstance(v, _core.Var) else v for v in equation.invars]
        if equation.primitive is marker_p:
            params = equation.params
            marks.append(Mark(params["path"], params["op_id"], params["groups"], tuple(invars)))
            continue
        key = (equation.primitive, _canonical(equation.params), tuple(map(_operand_key, invars)))
        if equation.effects or key not in seen:
            seen[key] = equation.outvars
            kept.append(equation.replace(invars=invars))
        else:
            same.update(zip(equation.outvars, seen[key], strict=True))
    return kept, marks


def _operand_key(v: Any, names: Mapping[Any, Any] | None = None) -> Hashable:
    if isinstance(v, _core.Literal):
        value = np.asarray(v.val)
        return (str(v.aval), value.tobytes())
    return id(v) if names is None else names[v]


def _canonical(value: Any) -> Hashable:
    """A key for the parameters of an equation; equal only if they mean the same."""
    if isinstance(value, Mapping):
        return tuple((k, _canonical(v)) for k, v in sorted(value.items(), key=lambda item: str(item[0])))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_canonical, value))
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        return (_canonical(value.jaxpr), *map(id, value.consts))
    if hasattr(value, "eqns"):
        names: dict[Any, int] = {}
        for v in (*value.constvars, *value.invars):
            names[v] = len(names)
        return (_equations_key(value.eqns, names), tuple(_operand_key(v, names) for v in value.outvars))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)


def _equations_key(equations: Sequence[Any], names: dict[Any, int]) -> Hashable:
    """A key for equations in which variables are numbered; `names` is continued."""
    avals = tuple(str(v.aval) for v in names)
    keys = []
    for equation in equations:
        operands = tuple(_operand_key(v, names) for v in equation.invars)
        keys.append((equation.primitive, _canonical(equation.params), operands))
        for v in equation.outvars:
            names[v] = len(names)
    return (avals, tuple(keys))


def _stages(equations: Sequence[Any], marks: Sequence[Mark], params: Mapping[Path, Any]) -> dict[Path, int]:
    """The stage of each marked weight: one more than those that its features depend on."""
    order = {path: i for i, path in enumerate(dict.fromkeys(mark.path for mark in marks))}
    # Sets of weights as bits of an integer.
    weights_of = {params[array_path(path, params)]: 1 << i for path, i in order.items()}
    for equation in equations:
        found = 0
        for v in equation.invars:
            found |= weights_of.get(v, 0) if isinstance(v, _core.Var) else 0
        weights_of.update(dict.fromkeys(equation.outvars, found))
    needed = dict.fromkeys(order, 0)
    for mark in marks:
        for v in mark.variables:
            needed[mark.path] |= weights_of.get(v, 0) if isinstance(v, _core.Var) else 0
    stages: dict[Path, int] = {}
    for path, i in order.items():
        stages[path] = max((stages[p] + 1 for p, j in order.items() if j < i and needed[path] >> j & 1), default=0)
    return stages


def _segments(equations: Sequence[Any], marks: Sequence[Mark], stage_of: Mapping[Path, int]) -> list[int | None]:
    """For each equation the first stage that needs it; None if no stage does."""
    needed: dict[Any, int] = {}
    for mark in marks:
        for v in mark.variables:
            needed[v] = min(needed.get(v, stage_of[mark.path]), stage_of[mark.path])
    result: list[int | None] = []
    for equation in reversed(equations):
        first = min((needed[v] for v in equation.outvars if v in needed), default=None)
        result.append(first)
        if first is not None:
            for v in equation.invars:
                if isinstance(v, _core.Var):
                    needed[v] = min(needed.get(v, first), first)
    return result[::-1]


def _segment(equations: tuple[Any, ...], marks: tuple[Mark, ...], last_use: Mapping[Any, int], k: int) -> Segment:
    made = {v for equation in equations for v in equation.outvars}
    read = [v for equation in equations for v in equation.invars] + [v for m in marks for v in m.variables]
    inputs = tuple(v for v in dict.fromkeys(v for v in read if isinstance(v, _core.Var)) if v not in made)
    outputs = tuple(v for equation in equations for v in equation.outvars if last_use.get(v, 0) > k)
    names = {v: i for i, v in enumerate(inputs)}
    key = _equations_key(equations, names)
    features = tuple((tuple(_operand_key(v, names) for v in m.variables), m.groups) for m in marks)
    return Segment(equations, inputs, outputs, marks, (key, features, tuple(names[v] for v in outputs)))


def check_finite(stats: Mapping[str, jax.Array], mark: Mark) -> None:
    """Raises ValueError if a statistic holds NaN or inf."""
    for name, value in stats.items():
        if not bool(jax.numpy.isfinite(value).all()):
            raise ValueError(
                f"{'/'.join(mark.path)}, {mark.op_id}: the activations hold NaN or inf, or overflow their {name}: "
                "calibrate with other inputs, or find the layer that makes them"
            )
