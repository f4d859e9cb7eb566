"""How each primitive of a jaxpr passes scales on; see `scale_graph` and `folding`.

`push(graph, eqn, operands, ties)` gives the placements of the results, or a `Demand` on an operand; `pull(graph, eqn,
output, placement, ties)` yields alternatives, each a list of (operand, placement) that together give the result its
placement, and the features that have to be equal for it. Both raise `Blocked` for what passes no scale. `_RULES` has
a pair of them for each primitive.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from qwix.contrib.scale_graph import Blocked, Demand, Eqn, Graph, Placement, Ties, compact

Operands = Sequence[Placement | None]
Pushed = list[Placement | None] | Demand
Alternatives = Iterator[tuple[list[tuple[Any, Placement]], Ties]]


def push(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    """The placements of an operation's results, given those of its operands (None: carries no scale)."""
    rule = _RULES.get(eqn.name)
    if rule is None:
        raise Blocked(f"it goes through {eqn.name}, which is no linear function of it")
    return rule[0](graph, eqn, operands, ties)


def pull(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
    """What its operands may carry so that result `output` of an operation carries a scale."""
    rule = _RULES.get(eqn.name)
    if rule is None or rule[1] is None:
        raise Blocked(f"it is computed by {eqn.name}, which passes no scale on")
    return rule[1](graph, eqn, output, placement, ties)


# --- elementwise


def _push_power(exponent: Callable[[Eqn], Fraction]) -> Callable[..., Pushed]:
    def rule(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
        return [None if x is None else x.power(exponent(eqn)) for x in operands]

    return rule


def _pull_power(exponent: Callable[[Eqn], Fraction]) -> Callable[..., Alternatives]:
    def rule(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
        yield [(eqn.inputs[output], placement.power(1 / exponent(eqn)))], ties

    return rule


def _power(exponent: Callable[[Eqn], Fraction]) -> tuple[Any, Any]:
    return _push_power(exponent), _pull_power(exponent)


def _push_same(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    """All operands carry the same scale: sums, maxima, a choice between them."""
    scaled = next(x for x in operands if x is not None)
    for i, (var, found) in enumerate(zip(eqn.inputs, operands, strict=True)):
        if graph.is_unchanged_by_scales(var):
            continue
        if found is None:
            if not _varies_like(graph, var, scaled):
                raise Blocked(f"it goes into {eqn.name} together with what is the same for all features")
            return Demand(i, scaled)
        if not ties.equal(found, scaled):
            raise Blocked(f"it goes into {eqn.name} together with what is scaled in another way")
    return [scaled]


def _pull_same(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
    if not all(_varies_like(graph, v, placement) or graph.is_unchanged_by_scales(v) for v in eqn.inputs):
        raise Blocked(f"it is computed by {eqn.name} from what is the same for all features")
    yield [(var, placement) for var in eqn.inputs], ties


def _varies_like(graph: Graph, var: Any, placement: Placement) -> bool:
    """Whether an operand has the axes of a result that a scale varies along; others may have size 1."""
    shape = graph.shape(var)
    return len(shape) == placement.ids.ndim and all(shape[axis] > 1 for axis in placement.axes())


def _push_select(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    if operands[0] is not None:
        raise Blocked("it chooses between other values")
    found = _push_same(graph, Eqn(eqn.name, eqn.params, eqn.inputs[1:], eqn.outputs), operands[1:], ties)
    return Demand(found.index + 1, found.placement) if isinstance(found, Demand) else found


def _pull_select(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
    yield [(var, placement) for var in eqn.inputs[1:]], ties


def _push_compare(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    """Positive scales change no sign, so comparisons with 0 stay as they are."""
    a, b = operands
    same = a is not None and b is not None and ties.equal(a, b)
    if same or any(graph.is_unchanged_by_scales(var) for var in eqn.inputs):
        return [None]
    raise Blocked(f"it is compared ({eqn.name}) with what is scaled in another way")


def _push_product(sign: int) -> Callable[..., Pushed]:
    def rule(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
        a, b = operands
        if b is not None:
            b = b.power(sign)
        return [_product(a, b, ties)]

    return rule


def _product(a: Placement | None, b: Placement | None, ties: Ties) -> Placement | None:
    """The scale of a * b."""
    if a is None or b is None:
        return a if b is None else b
    if not np.array_equal(ties.canonical(a).ids, ties.canonical(b).ids):
        raise Blocked("it is multiplied with what is scaled along another axis")
    exponent = a.exponent + b.exponent
    return Placement(a.ids, exponent) if exponent else None


def _pull_product(sign: int) -> Callable[..., Alternatives]:
    def rule(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
        a, b = eqn.inputs
        if a == b and isinstance(a, int) and sign > 0:
            yield [(a, placement.power(Fraction(1, 2)))], ties
            return
        choices = [(a, placement), (b, placement.power(sign))]
        # What is computed from parameters alone ends the search here.
        choices.sort(key=lambda choice: not graph.is_from_parameters(choice[0]))
        for var, wanted in choices:
            if _varies_like(graph, var, placement):
                yield [(var, wanted)], ties

    return rule


def _push_none(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    return [None for _ in eqn.outputs]


def _shape_of(graph: Graph, eqn: Eqn) -> tuple[int, ...]:
    return graph.shape(eqn.outputs[0])


# --- layout


def _push_layout(forward: Callable[[Eqn, tuple[int, ...], tuple[int, ...], np.ndarray], np.ndarray]) -> Any:
    """A layout change of one array; `forward` takes the shapes of operand and result, and ids."""

    def rule(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
        x = operands[0]
        if x is None or any(other is not None for other in operands[1:]):
            raise Blocked(f"it decides where {eqn.name} moves things")
        shapes = graph.shape(eqn.inputs[0]), _shape_of(graph, eqn)
        return [_or_none(x.moved(forward(eqn, *shapes, x.ids)))]

    return rule


def _layout(
    forward: Callable[[Eqn, tuple[int, ...], tuple[int, ...], np.ndarray], np.ndarray],
    backward: Callable[[Eqn, tuple[int, ...], tuple[int, ...], np.ndarray, Ties], np.ndarray],
) -> tuple[Any, Any]:
    """Both rules of a layout change of one array."""

    def pull_rule(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
        shapes = graph.shape(eqn.inputs[0]), _shape_of(graph, eqn)
        yield [(eqn.inputs[0], placement.moved(backward(eqn, *shapes, placement.ids, ties)))], ties

    return _push_layout(forward), pull_rule


def reshaped(ids: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Ids of a reshaped array: only the axes that a scale varies along, and those merged with them, are spelled out.

    >>> reshaped(np.arange(6)[None], (5, 6), (5, 2, 3)).tolist()
    [[[0, 1, 2], [3, 4, 5]]]
    """
    full: list[int] = []  # what ids are expanded to
    target: list[int] = []
    for old_axes, new_axes in _groups(old, new):
        if all(ids.shape[axis] == 1 for axis in old_axes):
            full += [1] * len(old_axes)
            target += [1] * len(new_axes)
        else:
            full += [old[axis] for axis in old_axes]
            target += [new[axis] for axis in new_axes]
    return np.broadcast_to(ids, full).reshape(target)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of axes, the shortest there are, that a reshape turns into each other."""
    i = j = 0
    while i < len(old) or j < len(new):
        start, other_start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while math.prod(old[start:i]) != math.prod(new[other_start:j]):
            if math.prod(old[start:i]) < math.prod(new[other_start:j]):
                i += 1
            else:
                j += 1
            if i > len(old) or j > len(new):  # only axes of size 0 do this
                raise Blocked("it is reshaped to an empty array")
        yield list(range(start, i)), list(range(other_start, j))


def _broadcast(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray) -> np.ndarray:
    shape = [1] * len(new)
    for axis, target in enumerate(eqn.params["broadcast_dimensions"]):
        shape[target] = ids.shape[axis]
    return ids.reshape(shape)


def _unbroadcast(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray, ties: Ties) -> np.ndarray:
    kept = dict(zip(eqn.params["broadcast_dimensions"], old, strict=True))
    for axis, size in enumerate(new):
        if kept.get(axis, 1) != size:
            ids = ties.reduce(ids, axis)
    return ids.reshape([ids.shape[axis] for axis in eqn.params["broadcast_dimensions"]])


def _taken(ids: np.ndarray, axis: int, size: int, index: slice) -> np.ndarray:
    """Ids of a slice along an axis of the given size."""
    if ids.shape[axis] == 1:
        return ids
    return ids[(slice(None),) * axis + (index,)]


def _put(ids: np.ndarray, axis: int, size: int, index: slice) -> np.ndarray:
    """Ids of an array of which only a slice carries a scale."""
    shape = (*ids.shape[:axis], size, *ids.shape[axis + 1 :])
    full = np.full(shape, -1, ids.dtype)
    full[(slice(None),) * axis + (index,)] = ids
    return full


def _slices(eqn: Eqn, rank: int) -> list[slice]:
    strides = eqn.params["strides"] or (1,) * rank
    starts_limits = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)
    return [slice(*bounds) for bounds in starts_limits]


def _slice(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray) -> np.ndarray:
    for axis, index in enumerate(_slices(eqn, len(old))):
        ids = _taken(ids, axis, old[axis], index)
    return ids


def _pull_slice(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
    """The rest of the array may carry the scale as well, where it does not vary along what is cut, or not."""
    old, new = graph.shape(eqn.inputs[0]), graph.shape(eqn.outputs[output])
    if eqn.name == "slice":
        bounds = _slices(eqn, len(old))
    else:
        bounds = [_split_bounds(eqn, output) if axis == eqn.params["axis"] else slice(None) for axis in range(len(old))]
    cut = [axis for axis in range(len(old)) if old[axis] != new[axis]]
    constant = [axis for axis in cut if placement.ids.shape[axis] == 1]
    for whole in (constant, []) if constant else ([],):
        ids = placement.ids
        for axis in cut:
            ids = ids if axis in whole else _put(ids, axis, old[axis], bounds[axis])
        yield [(eqn.inputs[0], placement.moved(ids))], ties


def _dynamic_slice(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray, *_: Any) -> np.ndarray:
    if any(ids.shape[axis] > 1 and old[axis] != new[axis] for axis in range(len(old))):
        raise Blocked("a part of it is taken at a place that is not known beforehand")
    return ids


def _split_bounds(eqn: Eqn, output: int) -> slice:
    start = sum(eqn.params["sizes"][:output])
    return slice(start, start + eqn.params["sizes"][output])


def _push_split(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    x, axis = operands[0], eqn.params["axis"]
    assert x is not None
    size = graph.shape(eqn.inputs[0])[axis]
    return [_or_none(x.moved(_taken(x.ids, axis, size, _split_bounds(eqn, i)))) for i in range(len(eqn.outputs))]


def _or_none(placement: Placement) -> Placement | None:
    """None for a part that carries no scale."""
    return None if placement.ids.max() < 0 else placement


def _push_concatenate(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    axis = eqn.params["dimension"]
    scaled = [x for x in operands if x is not None]
    if len({x.exponent for x in scaled}) > 1:
        raise Blocked("it is joined with what is scaled in another way")
    varying = {a for x in scaled for a in x.axes()} | {axis}
    parts = []
    for var, x in zip(eqn.inputs, operands, strict=True):
        part = [n if a in varying else 1 for a, n in enumerate(graph.shape(var))]
        parts.append(np.full(part, -1) if x is None else np.broadcast_to(x.ids, part))
    return [Placement(compact(np.concatenate(parts, axis)), scaled[0].exponent)]


def _pull_concatenate(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
    axis, start, wanted = eqn.params["dimension"], 0, []
    for var in eqn.inputs:
        size = graph.shape(var)[axis]
        part = placement.moved(_taken(placement.ids, axis, size, slice(start, start + size)))
        start += size
        if _or_none(part) is not None:
            wanted.append((var, part))
    yield wanted, ties


def _gathered_axes(eqn: Eqn, old: Sequence[int]) -> dict[int, int]:
    """Axes of which a gather takes the whole, as in a lookup of rows: axis of the operand -> of the result."""
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [axis for axis in range(len(old)) if axis not in gone]
    whole = eqn.params["slice_sizes"]
    return {a: out for a, out in zip(kept, numbers.offset_dims, strict=True) if whole[a] == old[a]}


def _gather(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray) -> np.ndarray:
    axes, shape = _gathered_axes(eqn, old), [1] * len(new)
    for axis, size in enumerate(ids.shape):
        if size > 1 and axis not in axes:
            raise Blocked("single elements of it are looked up")
        if axis in axes:
            shape[axes[axis]] = size
    return ids.reshape(shape)


def _ungather(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray, ties: Ties) -> np.ndarray:
    axes, shape = _gathered_axes(eqn, old), [1] * len(old)
    for axis, target in axes.items():
        shape[axis] = ids.shape[target]
    if math.prod(shape) != ids.size:
        raise Blocked("it is a lookup with a scale for each row")
    return ids.reshape(shape)


# --- reductions


def _reduce(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray) -> np.ndarray:
    axes = eqn.params["axes"]
    if any(ids.shape[axis] > 1 for axis in axes):
        raise Blocked(f"{eqn.name} runs over its features, as a norm does")
    return ids.reshape([size for axis, size in enumerate(ids.shape) if axis not in axes])


def _unreduce(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray, ties: Ties) -> np.ndarray:
    sizes = iter(ids.shape)
    return ids.reshape([1 if axis in eqn.params["axes"] else next(sizes) for axis in range(len(old))])


def _cumulative(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray, *_: Any) -> np.ndarray:
    if ids.shape[eqn.params["axis"]] > 1:
        raise Blocked(f"{eqn.name} runs over its features")
    return ids


def _window(eqn: Eqn, old: Sequence[int], new: Sequence[int], ids: np.ndarray, *_: Any) -> np.ndarray:
    for axis, window in enumerate(eqn.params["window_dimensions"]):
        if ids.shape[axis] > 1 and (window != 1 or old[axis] != new[axis]):
            raise Blocked(f"{eqn.name} runs over its features")
    return ids


# --- contractions


def spread(ids: np.ndarray, axes: Sequence[int], targets: Sequence[int], rank: int) -> np.ndarray:
    """Ids with `axes` at the places `targets` of an array of the given rank; the other axes have size 1."""
    shape = [1] * rank
    for axis, target in zip(axes, targets, strict=True):
        shape[target] = ids.shape[axis]
    order = sorted(range(len(axes)), key=lambda i: targets[i])
    rest = [axis for axis in range(ids.ndim) if axis not in axes]
    return ids.transpose([*rest, *(axes[i] for i in order)]).reshape(shape)


def _dot_axes(graph: Graph, eqn: Eqn) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[list[int]]]:
    """Contracted, batch and free axes, each for lhs and rhs."""
    (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = eqn.params["dimension_numbers"]
    contracted, batch = [tuple(lhs_ca), tuple(rhs_ca)], [tuple(lhs_ba), tuple(rhs_ba)]
    ranks = [len(graph.shape(var)) for var in eqn.inputs]
    free = [[a for a in range(n) if a not in contracted[i] and a not in batch[i]] for i, n in enumerate(ranks)]
    return contracted, batch, free


def _push_dot(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    contracted, batch, free = _dot_axes(graph, eqn)
    rank = len(_shape_of(graph, eqn))
    cancelling: list[Placement | None] = [None, None]
    result: Placement | None = None
    for i, x in enumerate(operands):
        if x is None:
            continue
        axes = set(x.axes())
        if axes & set(contracted[i]):
            if axes & set(free[i]):
                raise Blocked("a matmul sums over a part of its features and keeps the others")
            cancelling[i] = x
            continue
        first = len(batch[0]) + (len(free[0]) if i else 0)
        kept = [*batch[i], *free[i]]
        targets = [*range(len(batch[i])), *range(first, first + len(free[i]))]
        result = _product(result, x.moved(spread(x.ids, kept, targets, rank)), ties)
    if cancelling == [None, None]:
        return [result]
    i = 0 if cancelling[0] is not None else 1
    x = cancelling[i]
    assert x is not None
    other_axes = [*contracted[1 - i], *batch[1 - i]]
    ids = spread(x.ids, [*contracted[i], *batch[i]], other_axes, len(graph.shape(eqn.inputs[1 - i])))
    wanted = Placement(ids, -x.exponent)
    found = cancelling[1 - i]
    if found is None and operands[1 - i] is None:
        return Demand(1 - i, wanted)
    if found is None or not ties.equal(found, wanted):
        raise Blocked("a matmul sums over features that are scaled in different ways")
    return [result]


def _pull_dot(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
    _, batch, free = _dot_axes(graph, eqn)
    choices = []
    for i in (0, 1):
        first = len(batch[0]) + (len(free[0]) if i else 0)
        sources = [*range(len(batch[i])), *range(first, first + len(free[i]))]
        # A result that varies along an axis of the other operand repeats this one along it.
        repeated = set(placement.axes()) - set(sources)
        if repeated != set(placement.axes()):
            choices.append((len(repeated), not graph.is_from_parameters(eqn.inputs[i]), i, sources, repeated))
    for *_, i, sources, repeated in sorted(choices, key=lambda choice: choice[:3]):
        ids, ties_of_it = placement.ids, ties.copy()
        for axis in repeated:
            ids = ties_of_it.reduce(ids, axis)
        ids = spread(ids, sources, [*batch[i], *free[i]], len(graph.shape(eqn.inputs[i])))
        yield [(eqn.inputs[i], placement.moved(ids))], ties_of_it


def _is_depthwise(graph: Graph, eqn: Eqn) -> bool:
    groups, numbers = eqn.params["feature_group_count"], eqn.params["dimension_numbers"]
    channels = graph.shape(eqn.inputs[0])[numbers.lhs_spec[1]]
    return groups == channels == graph.shape(eqn.inputs[1])[numbers.rhs_spec[0]]


def _push_conv(graph: Graph, eqn: Eqn, operands: Operands, ties: Ties) -> Pushed:
    numbers, (x, w) = eqn.params["dimension_numbers"], operands
    out_axis, rank = numbers.out_spec[1], len(_shape_of(graph, eqn))
    if eqn.params["batch_group_count"] != 1:
        raise Blocked("it goes through a convolution with groups of examples")
    if x is not None and set(x.axes()) - {numbers.lhs_spec[1]}:
        raise Blocked("a convolution runs over its features")
    result, demanded = None, None
    if w is not None and w.axes() == [numbers.rhs_spec[0]]:
        result = w.moved(spread(w.ids, [numbers.rhs_spec[0]], [out_axis], rank))
        w = None
    if x is not None and _is_depthwise(graph, eqn):
        result = _product(result, x.moved(spread(x.ids, [numbers.lhs_spec[1]], [out_axis], rank)), ties)
        x = None
    if x is not None or w is not None:
        if eqn.params["feature_group_count"] != 1:
            raise Blocked("it goes through a convolution with groups of features")
        axes = [numbers.lhs_spec[1], numbers.rhs_spec[1]]
        i = 0 if x is not None else 1
        known = x if x is not None else w
        assert known is not None
        if set(known.axes()) - {axes[i]}:
            raise Blocked("a convolution runs over its features")
        ids = spread(known.ids, [axes[i]], [axes[1 - i]], len(graph.shape(eqn.inputs[1 - i])))
        demanded = Placement(ids, -known.exponent)
        found = (x, w)[1 - i]
        if found is None and operands[1 - i] is None:
            return Demand(1 - i, demanded)
        if found is None or not ties.equal(found, demanded):
            raise Blocked("a convolution sums over features that are scaled in different ways")
    return [result]


def _pull_conv(graph: Graph, eqn: Eqn, output: int, placement: Placement, ties: Ties) -> Alternatives:
    numbers = eqn.params["dimension_numbers"]
    if placement.axes() not in ([], [numbers.out_spec[1]]) or eqn.params["batch_group_count"] != 1:
        raise Blocked("it is computed by a convolution, over places")
    choices = [(1, numbers.rhs_spec[0])] + ([(0, numbers.lhs_spec[1])] if _is_depthwise(graph, eqn) else [])
    for i, axis in choices:
        rank = len(graph.shape(eqn.inputs[i]))
        ids = spread(placement.ids, [numbers.out_spec[1]], [axis], rank)
        yield [(eqn.inputs[i], placement.moved(ids))], ties


# --- all of them

_SAME = _power(lambda eqn: Fraction(1))
_COMPARISON = _push_compare, None
_UNCHANGED = _push_none, None

_RULES: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(
        (
            "abs",
            "convert_element_type",
            "copy",
            "copy_p",
            "name",
            "neg",
            "optimization_barrier",
            "reduce_precision",
            "reshard",
            "sharding_constraint",
            "stop_gradient",
        ),
        _SAME,
    ),
    "integer_pow": _power(lambda eqn: Fraction(eqn.params["y"])),
    "square": _power(lambda eqn: Fraction(2)),
    "sqrt": _power(lambda eqn: Fraction(1, 2)),
    "rsqrt": _power(lambda eqn: Fraction(-1, 2)),
    **dict.fromkeys(("add", "add_any", "max", "min", "sub"), (_push_same, _pull_same)),
    "select_n": (_push_select, _pull_select),
    **dict.fromkeys(("eq", "ge", "gt", "le", "lt", "ne"), _COMPARISON),
    **dict.fromkeys(("is_finite", "sign"), _UNCHANGED),
    "mul": (_push_product(1), _pull_product(1)),
    "div": (_push_product(-1), _pull_product(-1)),
    "transpose": _layout(
        lambda eqn, old, new, ids: ids.transpose(eqn.params["permutation"]),
        lambda eqn, old, new, ids, ties: ids.transpose(np.argsort(eqn.params["permutation"])),
    ),
    **dict.fromkeys(
        ("expand_dims", "reshape", "squeeze"),
        _layout(
            lambda eqn, old, new, ids: reshaped(ids, old, new),
            lambda eqn, old, new, ids, ties: reshaped(ids, new, old),
        ),
    ),
    "broadcast_in_dim": _layout(_broadcast, _unbroadcast),
    "slice": (_push_layout(_slice), _pull_slice),
    "dynamic_slice": _layout(_dynamic_slice, _dynamic_slice),
    "split": (_push_split, _pull_slice),
    "concatenate": (_push_concatenate, _pull_concatenate),
    "gather": _layout(_gather, _ungather),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _layout(_reduce, _unreduce)),
    **dict.fromkeys(("cumsum", "cummax"), _layout(_cumulative, _cumulative)),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum", "reduce_window_min"), _layout(_window, _window)),
    "dot_general": (_push_dot, _pull_dot),
    "conv_general_dilated": (_push_conv, _pull_conv),
}
