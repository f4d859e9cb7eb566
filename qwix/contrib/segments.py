"""A model's computation cut where weights are calibrated, so that each weight may change what the later ones see.

    plan = trace(call, params, inputs)        # one trace of the model: its jaxpr, with each calibrated op marked
    plan.stages                               # weights by stage: what a weight's inputs depend on comes earlier
    plan.segments[k]                          # what has to be computed for the inputs of stage k, after stage k - 1

The calibration provider does not collect here but marks: `marking(provider)` binds `marker_p` to the features of each
use of a weight, and the marks say which values of the jaxpr the statistics are of. Every equation belongs to the
segment of the first stage that needs it. Running the segments one after the other, with the values between them
carried along, is one pass of the model however many stages there are. A segment that leaves much more than it takes
(the wide layer of an MLP) is run again by the next one instead, since what is carried is in memory for all batches.
Equal segments, those of equal layers, have equal keys (`Segment.key`), so that they share one compiled program.

A weight waits for those whose first use is earlier in the program. Where a later one goes in as well (a tied embedding,
a layer that is called twice) its float value is what is seen.

A scan is unrolled where calibrated ops are inside: the slices that it takes of a stacked parameter count as parameters,
whose path is that of the stacked one followed by an int, so that each layer has statistics of its own and waits for
those before it. A weight that a scan does not run over has one use for each iteration. Under vmap, a weight whose
layers are stacked has statistics with that axis in front, and they are all in one stage.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import numpy as np
from jax import lax
from jax.interpreters import batching, mlir

from qwix.contrib import calibration, input_features

Path = tuple[str | int, ...]  # ints, at the end, are layers of a stacked parameter
_core = jax.extend.core

# Features of a weight's use, passed on as they are; parameters: path, op_id, groups, shape and axes (see
# `input_features.Features`), layers (see `_Iteration`). A second operand is the group of each sample.
marker_p = _core.Primitive("qwix_features")
marker_p.def_impl(lambda x, *_, **__: x)
marker_p.def_abstract_eval(lambda x, *_, **__: x)
mlir.register_lowering(marker_p, lambda ctx, x, *_, **__: [x])

# What an iteration of an unrolled scan takes of an array, x[index]; `loop` is a number of the scan.
slice_p = _core.Primitive("qwix_slice")
slice_p.def_impl(lambda x, *, index, loop: x[index])
slice_p.def_abstract_eval(lambda x, *, index, loop: x.update(shape=x.shape[1:]))
mlir.register_lowering(
    slice_p,
    mlir.lower_fun(lambda x, *, index, loop: lax.index_in_dim(x, index, keepdims=False), multiple_results=False),
)

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
        marks = {"op_id": op_id, "groups": features.groups, "shape": features.shape, "axes": features.axes}
        marker_p.bind(*operands, path=path, layers=(), **marks)

    marker = copy.copy(provider)
    marker._collect = mark  # type: ignore[method-assign]
    return marker


def _batch_mark(args: Sequence[Any], dims: Sequence[Any], *, groups: tuple[int, ...], **params: Any) -> Any:
    """Under vmap: the features of all layers, and the layers as groups in front of the others."""
    if len(args) > 1:
        raise CannotCut(
            f"{'/'.join(params['path'])}, {params['op_id']}: experts under vmap cannot be cut into stages: take "
            "statistics of the float model instead (gptq.quantize_params)"
        )
    x = jax.numpy.moveaxis(args[0], dims[0], 0)
    marked = marker_p.bind(x.reshape(-1, *x.shape[-2:]) if groups else x, groups=(x.shape[0], *groups), **params)
    return marked.reshape(x.shape), 0


batching.primitive_batchers[marker_p] = _batch_mark


@dataclasses.dataclass(frozen=True)
class Mark:
    """A use of a weight: which values of the jaxpr are its features (and the groups of its samples).

    `axes` of the weight, counted from the last one, are those that the features run over.
    """

    path: Path
    op_id: str
    groups: tuple[int, ...]
    variables: tuple[Any, ...]
    axes: tuple[int, ...] = ()


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


def stem(path: Path) -> tuple[str, ...]:
    """The path of a parameter, without which of its layers is meant.

    >>> stem(("up", "kernel", 2))
    ('up', 'kernel')
    """
    return tuple(key for key in path if isinstance(key, str))


def array_path(weight: Path, known: Container[Path]) -> Path:
    """Where the array of a weight is among known paths: at the weight's own, or inside of a `WithInputTransform` there.

    >>> array_path(("up", "kernel", 2), {("up", "kernel", "array", 2)})
    ('up', 'kernel', 'array', 2)
    """
    name, layers = stem(weight), weight[len(stem(weight)) :]
    path = name
    while (*path, *layers) not in known:
        if len(path) > len(name) + 2:
            raise ValueError(f"{'/'.join(map(str, weight))} is no parameter of the model")
        path = (*path, "array")
    return (*path, *layers)


def trace(call: Callable[..., Any], params: Mapping[Any, Any], inputs: Any) -> Plan:
    """Traces call(params, inputs), a model under `marking(provider)`.

    Args:
      call: pure function.
      params: nested dict of arrays.
      inputs: any pytree of arrays.

    Raises:
      ValueError: no op is calibrated.
      CannotCut: one is inside of a loop that is no scan, or its weight is stacked along another axis than the first.
    """
    closed = jax.make_jaxpr(call)(params, inputs)
    flat = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args))(*closed.in_avals)
    jaxpr = flat.jaxpr
    paths = [path for path, _ in leaves(params)]
    variables = dict(zip(paths, jaxpr.invars, strict=False))
    equations, variables = _with_layers(jaxpr.eqns, variables)
    equations, marks = _without_duplicates(equations, variables)
    if not marks:
        raise ValueError("no op of the model is calibrated: look at the rules' type, module_path and op_names")
    variables = {path: v for path, v in variables.items() if not any(isinstance(key, _Iteration) for key in path)}
    stage_of = _stages(equations, marks, variables)
    segment_of = _segments(equations, marks, stage_of)
    cheap = _cheap(equations, {*jaxpr.invars, *variables.values()})
    count = max(stage_of.values()) + 1

    def cut(again: Container[int]) -> tuple[list[Any], dict[Any, int]]:
        parts = [_part(equations, segment_of, cheap, marks, stage_of, k, again) for k in range(count)]
        return parts, {v: k for k, part in enumerate(parts) for v in _reads(*part)}

    inputs = tuple(jaxpr.invars[len(paths) :])
    again = _wide(*cut(()), inputs)
    parts, last_use = cut(again)
    segments = []
    for k, part in enumerate(parts):
        anew = {v for e in parts[k + 1][0] for v in e.outvars} if k in again else set()
        segments.append(_segment(part[0], part[1], last_use, anew, k))
    stages = tuple(tuple(p for p, s in stage_of.items() if s == k) for k in range(count))
    constants = dict(zip(jaxpr.constvars, flat.consts, strict=True))
    return Plan(variables, inputs, constants, stages, tuple(segments), last_use)


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


class _Iteration(NamedTuple):
    """An iteration of the scan of number `loop`."""

    loop: int
    at: int


def _inline(
    jaxpr: Any,
    constants: Sequence[Any],
    args: Sequence[Any],
    layers: tuple[_Iteration, ...] = (),
    loops: Iterator[int] | None = None,
) -> list[Any]:
    """The value of a jaxpr, with calls replaced by their bodies.

    Args:
      jaxpr, constants, args: what is evaluated.
      layers: the iterations of unrolled scans that it is in.
      loops: numbers for such scans.
    """
    loops = itertools.count() if loops is None else loops
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *args), strict=True))
    for equation in jaxpr.eqns:
        body = equation.params.get(_INLINED.get(equation.primitive.name, ""))
        values = [_read(environment, v) for v in equation.invars]
        if body is not None:
            inner, consts = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
            results = _inline(inner, consts, values, layers, loops)
        elif equation.primitive is marker_p:
            results = [marker_p.bind(*values, **{**equation.params, "layers": (*layers, *equation.params["layers"])})]
        elif not _holds_marks(equation):
            _evaluate([equation], environment)
            continue
        elif equation.primitive.name == "scan":
            results = _unrolled(equation.params, values, layers, loops)
        else:
            raise CannotCut(
                f"a calibrated op is inside of a {equation.primitive.name}, which cannot be cut into stages: take "
                "statistics of the float model instead (gptq.quantize_params), or write the layers one by one"
            )
        environment.update(zip(equation.outvars, results, strict=True))
    return [_read(environment, v) for v in jaxpr.outvars]


def _unrolled(
    params: Mapping[str, Any], values: Sequence[Any], layers: tuple[_Iteration, ...], loops: Iterator[int]
) -> list[Any]:
    """The results of a scan, one iteration after the other."""
    fixed, carried, body, length = params["num_consts"], params["num_carry"], params["jaxpr"], params["length"]
    constants, carry, xs = values[:fixed], values[fixed : fixed + carried], values[fixed + carried :]
    loop = next(loops)
    ys: list[Sequence[Any]] = [()] * length
    for i in reversed(range(length)) if params["reverse"] else range(length):
        slices = [slice_p.bind(x, index=i, loop=loop) for x in xs]
        here = (*layers, _Iteration(loop, i))
        results = _inline(body.jaxpr, body.consts, [*constants, *carry, *slices], here, loops)
        carry, ys[i] = results[:carried], results[carried:]
    return [*carry, *map(jax.numpy.stack, zip(*ys, strict=True))]


def _with_layers(
    equations: Sequence[Any], params: Mapping[Path, Any]
) -> tuple[list[Any], dict[Path | tuple[Any, ...], Any]]:
    """The equations but for slices of stacked parameters, and the parameters with these.

    A slice is known by its path with an index at the end, and by that with an `_Iteration`.
    """
    variables: dict[Any, Any] = dict(params)
    path_of: dict[Any, list[Any]] = {v: [path] for path, v in params.items()}
    same: dict[Any, Any] = {}
    kept = []
    for equation in equations:
        invars = [same.get(v, v) if isinstance(v, _core.Var) else v for v in equation.invars]
        if equation.primitive is not slice_p or invars[0] not in path_of:
            kept.append(equation.replace(invars=invars))
            continue
        (out,), iteration = equation.outvars, _Iteration(equation.params["loop"], equation.params["index"])
        for path in path_of[invars[0]]:
            out = same[equation.outvars[0]] = variables.setdefault((*path, iteration.at), out)
            variables[(*path, iteration)] = out
        path_of[out] = [(*path, i) for path in path_of[invars[0]] for i in (iteration.at, iteration)]
    return kept, variables


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


def _without_duplicates(equations: Sequence[Any], variables: Mapping[Any, Any]) -> tuple[list[Any], list[Mark]]:
    """The equations without those that compute again what an earlier one did, and the marks in program order."""
    same: dict[Any, Any] = {}
    seen: dict[Hashable, Sequence[Any]] = {}
    kept, marks = [], []
    for equation in equations:
        invars = [same.get(v, v) if isinstance(v, _core.Var) else v for v in equation.invars]
        if equation.primitive is marker_p:
            marks.append(_mark(equation.params, invars, variables))
            continue
        key = (equation.primitive, _canonical(equation.params), tuple(map(_operand_key, invars)))
        if equation.effects or key not in seen:
            seen[key] = equation.outvars
            kept.append(equation.replace(invars=invars))
        else:
            same.update(zip(equation.outvars, seen[key], strict=True))
    return kept, marks


def _mark(params: Mapping[str, Any], features: Sequence[Any], variables: Mapping[Any, Any]) -> Mark:
    """A use of a weight, or of one of its layers where a scan runs over it."""
    path: tuple[Any, ...] = params["path"]
    looped: tuple[Any, ...] = array_path(path, variables)
    for iteration in params["layers"]:
        if (*looped, iteration) in variables:
            looped, path = (*looped, iteration), (*path, iteration.at)
    found, seen, groups = tuple(variables[looped].aval.shape), params["shape"], params["groups"]
    # Under vmap layers are groups in front of the weight's own, if it has any.
    stacked = found[: len(found) - len(seen)]
    if (*stacked, *seen) != found or groups[: len(stacked)] != stacked:
        raise CannotCut(
            f"{'/'.join(map(str, path))}, {params['op_id']}: its layers are stacked along another axis than the first, "
            "or all have the same input, so that it cannot be cut into stages: take statistics of the float model "
            "instead (gptq.quantize_params)"
        )
    axes = tuple(axis - len(seen) for axis in params["axes"])
    return Mark(path, params["op_id"], groups, tuple(features), axes)


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


# Primitives that make large values of little ones.
_EXPANDING = {"broadcast_in_dim", "iota"}


def _cheap(equations: Sequence[Any], given: Container[Any]) -> list[bool]:
    """Which equations each segment does anew: carried along, their values would be in memory once for each batch.

    They make large values of little ones, as the masks of attention that all layers share, or do not depend on what is
    `given` (inputs, parameters), as rotary embeddings.
    """
    depends: set[Any] = set()
    result = []
    for equation in equations:
        found = any(isinstance(v, _core.Var) and (v in depends or v in given) for v in equation.invars)
        depends.update(equation.outvars if found else ())
        result.append(not equation.effects and (not found or equation.primitive.name in _EXPANDING))
    return result


def _part(
    equations: Sequence[Any],
    segment_of: Sequence[int | None],
    cheap: Sequence[bool],
    marks: Sequence[Mark],
    stage_of: Mapping[Path, int],
    k: int,
    again: Container[int],
) -> tuple[tuple[Any, ...], tuple[Mark, ...]]:
    """The equations of a segment, with those of the one before it if that is run again, and its marks."""
    mine = tuple(mark for mark in marks if stage_of[mark.path] == k)
    wanted = {v for mark in mine for v in mark.variables}
    found = []
    for equation, segment, is_cheap in reversed(list(zip(equations, segment_of, cheap, strict=True))):
        anew = (is_cheap or (segment == k - 1 and k - 1 in again)) and not wanted.isdisjoint(equation.outvars)
        if anew or (segment == k and not is_cheap):
            found.append(equation)
            wanted.update(v for v in equation.invars if isinstance(v, _core.Var))
    return tuple(reversed(found)), mine


def _wide(parts: Sequence[Any], last_use: Mapping[Any, int], inputs: Sequence[Any]) -> set[int]:
    """The segments that are run again in the next one, never two in a row, so that no equation runs more than twice."""
    made = dict.fromkeys(inputs, -1)
    for k, (equations, _) in enumerate(parts):
        for v in (v for equation in equations for v in equation.outvars):
            made.setdefault(v, k)

    def carried(k: int) -> int:
        """Bytes of a batch between segment k and the next."""
        return sum(v.aval.size * v.aval.dtype.itemsize for v, i in made.items() if i <= k < last_use.get(v, -1))

    found: set[int] = set()
    for k in range(len(parts) - 1):
        if k - 1 not in found and carried(k) > _WIDE * carried(k - 1):
            found.add(k)
    return found


# How many times as much as it takes has a segment to leave, to be run again instead.
_WIDE = 1.5


def _reads(equations: Sequence[Any], marks: Sequence[Mark]) -> list[Any]:
    """The variables that a segment takes from elsewhere, each once."""
    made = {v for equation in equations for v in equation.outvars}
    read = [v for equation in equations for v in equation.invars] + [v for m in marks for v in m.variables]
    return [v for v in dict.fromkeys(v for v in read if isinstance(v, _core.Var)) if v not in made]


def _segment(
    equations: tuple[Any, ...],
    marks: tuple[Mark, ...],
    last_use: Mapping[Any, int],
    anew: Container[Any],
    k: int,
) -> Segment:
    """Segment k; what the next one makes `anew` is none of its outputs."""
    inputs = tuple(_reads(equations, marks))
    made = (v for equation in equations for v in equation.outvars)
    outputs = tuple(v for v in made if last_use.get(v, 0) > k and v not in anew)
    names = {v: i for i, v in enumerate(inputs)}
    key = _equations_key(equations, names)
    features = tuple((tuple(_operand_key(v, names) for v in m.variables), m.groups) for m in marks)
    return Segment(equations, inputs, outputs, marks, (key, features, tuple(names[v] for v in outputs)))


def check_finite(stats: Mapping[str, jax.Array], mark: Mark) -> None:
    """Raises ValueError if a statistic holds NaN or inf. Under `eval_shape` there are no values to look at."""
    for name, value in stats.items():
        if not isinstance(value, jax.core.Tracer) and not bool(jax.numpy.isfinite(value).all()):
            raise ValueError(
                f"{'/'.join(map(str, mark.path))}, {mark.op_id}: the activations hold NaN or inf, or overflow their "
                f"{name}: calibrate with other inputs, or find the layer that makes them"
            )
