"""Folding scales of activations into the parameters before them, so that inference costs nothing more.

AWQ and SmoothQuant multiply a weight by a scale for each input feature and divide its activations by it. Where the
activations come straight from a parameter that can be divided instead, the result is a plain float model with the same
outputs, whose weights quantize better:

    y = norm(x) * scale + bias,   z = y W       ->  scale / s, bias / s, diag(s) W      (a norm before linear layers)
    h = relu(x U + b),            z = h D       ->  U / s, b / s, diag(s) D             (a perceptron)
    h = silu(x G) * (x U),        z = h D       ->  U / s, diag(s) D                    (a gated perceptron)
    h = softmax(Q K^T) (x V),     z = h O       ->  V / s, diag(s) O                    (attention)

Which parameters these are is found in the data flow, not by names or classes: `find_sites` traces the model once and
follows a scale through its operations. It is *pulled* back from an activation to parameters, and what was found is
*pushed* through the whole model: where an operand has to carry a scale and does not yet, such as the weight of another
layer with the same input, that is pulled back to parameters in turn, until everything fits and no output carries a
scale. Push is what is relied on; pull is only a search for what to try. `scale_rules` has both for each operation.

    sites = find_sites(model, x)                                 # what can be folded, and what cannot and why
    same = fold(model, {"blocks/0/down/kernel": scale}, x)       # a model with the same outputs

In Linen, pass `variables` to either; `fold` returns them changed. Layers under a scan of JAX, NNX or Linen are followed
within one iteration; their scales have the stacked axes in front.
"""

import dataclasses
import heapq
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from qwix._src.utils import flax_util
from qwix.contrib import scale_rules
from qwix.contrib.scale_graph import Blocked, Constant, Demand, Graph, Parameter, Placement, Ties

# How far back a scale is pulled through operations that have no parameter of their own.
_MAX_DEPTH = 60

# How many ways to provide a scale are tried.
_MAX_CHOICES = 8

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An activation, the weights that it is multiplied with, and the parameters that can take its scale.

    Attributes:
      weights: path -> how the weight is scaled. Its ids run over its input features, in row-major order of its
        contracted axes, and say which element of the site's scale each one has.
      changed: path -> how the parameter is scaled, of all that have to change together, `weights` among them. Empty if
        the scale cannot be folded.
      classes: int (n,): features with equal numbers need equal scales, as those that heads share in grouped attention.
      reason: why it cannot be folded; None if it can.
      stacked: how many leading axes the scale has, because layers are stacked.
    """

    weights: Mapping[Path, Placement]
    changed: Mapping[Path, Placement]
    classes: np.ndarray
    reason: str | None = None
    stacked: int = 0

    @property
    def size(self) -> int:
        """The number of features."""
        return len(self.classes)

    def of_weight(self, path: Path, scale: jax.Array) -> jax.Array:
        """The scale of each input feature of a weight, (*stacked, in), given that of the site, (*stacked, n)."""
        ids = self.weights[path].ids
        return _take(scale, ids).reshape(*scale.shape[:-1], ids.size)

    def from_weight(self, path: Path, values: jax.Array) -> jax.Array:
        """One number for each feature of the site, (*stacked, n), from those of a weight's input features.

        Features that need equal scales get the geometric mean of theirs. Inverse to `of_weight` up to that.
        """
        ids = self.weights[path].ids.ravel()
        classes = self.classes[ids]
        logs = jnp.log(values.astype(jnp.float32))
        total = jnp.zeros((*values.shape[:-1], self.size)).at[..., classes].add(logs)
        count = np.bincount(classes, minlength=self.size)
        return jnp.exp(total / np.maximum(count, 1))[..., self.classes]


def _take(scale: jax.Array, ids: np.ndarray) -> jax.Array:
    """scale[..., ids], and 1 where an id is -1."""
    extended = jnp.concatenate([scale, jnp.ones((*scale.shape[:-1], 1), scale.dtype)], -1)
    return extended[..., ids]


# --- solving


def solve(graph: Graph, var: int, placement: Placement, ties: Ties) -> tuple[dict[int, Placement], Ties]:
    """The parameters that have to change so that an activation carries a scale, and no output does.

    Args:
      graph: the model.
      var: the activation.
      placement: how it should carry the scale.
      ties: the features that are known to be equal.

    Returns:
      For each such parameter (by variable) how it is multiplied: the producers of the activation as well as those who
      undo the scale. And the features that have to be equal for that.

    Raises:
      Blocked: there is no such set of parameters, or none was found.
    """
    reason: Blocked | None = None
    for changed, ties_of_it in pull(graph, var, placement, ties):
        try:
            return _completed(graph, changed, ties_of_it)
        except Blocked as e:
            reason = reason or e
    assert reason is not None
    raise reason


def _completed(graph: Graph, changed: dict[int, Placement], ties: Ties) -> tuple[dict[int, Placement], Ties]:
    """`changed` with what is needed to undo it."""
    while (demand := _push_all(graph, changed, ties)) is not None:
        more, ties = pull(graph, *demand, ties)[0]
        before, changed = changed, _merged(changed, more, ties)
        if all(var in before and ties.equal(before[var], changed[var]) for var in more):
            raise Blocked("its scale comes back to where it started")
    return {v: ties.canonical(p) for v, p in changed.items()}, ties


def pull(
    graph: Graph, var: int | Constant, placement: Placement, ties: Ties, depth: int = 0
) -> list[tuple[dict[int, Placement], Ties]]:
    """Sets of parameters that make a variable carry a scale if everything else stays as it is, the smallest first.

    Returns:
      At least one and at most `_MAX_CHOICES` sets, each with the features that have to be equal for it.

    Raises:
      Blocked: there is none.
    """
    if placement.ids.max() < 0 or graph.is_unchanged_by_scales(var):
        return [({}, ties)]
    if isinstance(var, Constant):
        raise Blocked("it is computed from a constant")
    if var in graph.parameters:
        return [({var: placement}, ties)]
    if var not in graph.producer:
        raise Blocked("it comes from an input of the model, or from what is no float parameter")
    if depth > _MAX_DEPTH:
        raise Blocked("no parameter is near enough")
    eqn = graph.eqns[graph.producer[var]]
    reason: Blocked | None = None
    found: list[tuple[dict[int, Placement], Ties]] = []
    for wanted, ties_of_it in scale_rules.pull(graph, eqn, eqn.outputs.index(var), placement, ties.copy()):
        try:
            found += _pull_all(graph, wanted, ties_of_it, depth + 1)
        except Blocked as e:
            reason = reason or e
    if not found:
        raise reason or Blocked(f"it is computed by {eqn.name}, none of whose operands can take a scale alone")
    return sorted(found, key=lambda choice: len(choice[0]))[:_MAX_CHOICES]


def _pull_all(
    graph: Graph, wanted: Sequence[tuple[Any, Placement]], ties: Ties, depth: int
) -> list[tuple[dict[int, Placement], Ties]]:
    """`pull` of several variables together."""
    found: list[tuple[dict[int, Placement], Ties]] = [({}, ties)]
    for var, placement in wanted:
        combined, reason = [], None
        for changed, ties_so_far in found:
            for more, ties_of_it in pull(graph, var, placement, ties_so_far, depth):
                try:
                    combined.append((_merged(changed, more, ties_of_it), ties_of_it))
                except Blocked as e:
                    reason = reason or e
        if not combined and reason is not None:
            raise reason
        found = combined[:_MAX_CHOICES]
    return found


def _merged(found: Mapping[int, Placement], more: Mapping[int, Placement], ties: Ties) -> dict[int, Placement]:
    """Both; a parameter in both may be scaled in different parts, but not differently in one."""
    return {**found, **more, **{var: _union(found[var], more[var], ties) for var in found.keys() & more.keys()}}


def _union(a: Placement, b: Placement, ties: Ties) -> Placement:
    first, second = np.broadcast_arrays(ties.canonical(a).ids, ties.canonical(b).ids)
    if a.exponent != b.exponent or np.any((first != second) & (first >= 0) & (second >= 0)):
        raise Blocked("two of its uses want a parameter scaled in different ways")
    return a.moved(np.maximum(first, second))


def _push_all(graph: Graph, changed: Mapping[int, Placement], ties: Ties) -> tuple[int | Constant, Placement] | None:
    """Carries the scales of changed parameters through the model; the first demand that is not met, if any."""
    carried = {var: ties.canonical(placement) for var, placement in changed.items()}
    queue = sorted({i for var in carried for i in graph.consumers.get(var, ())})
    waiting = set(queue)
    while queue:
        index = heapq.heappop(queue)
        eqn = graph.eqns[index]
        operands = [carried.get(var) if isinstance(var, int) else None for var in eqn.inputs]
        results = scale_rules.push(graph, eqn, operands, ties)
        if isinstance(results, Demand):
            return eqn.inputs[results.index], results.placement
        for var, placement in zip(eqn.outputs, results, strict=True):
            if placement is None:
                continue
            carried[var] = placement
            for i in graph.consumers.get(var, ()):
                if i not in waiting:
                    waiting.add(i)
                    heapq.heappush(queue, i)
    if not graph.outputs.isdisjoint(carried):
        raise Blocked("it is a part of what the model returns")
    return None


# --- sites


@dataclasses.dataclass(frozen=True, eq=False)
class _Use:
    """A use of a weight in a contraction; `weight` and `activation` say where a scale of its features lies."""

    var: int
    weight: Placement
    activation_var: int
    activation: Placement


def _uses(graph: Graph) -> Iterator[_Use]:
    for eqn in graph.eqns:
        axes = _contracted(graph, eqn)
        if axes is None:
            continue
        i = [graph.is_from_parameters(var) for var in eqn.inputs].index(True)
        w, x = eqn.inputs[i], eqn.inputs[1 - i]
        shape = [size if axis in axes[i] else 1 for axis, size in enumerate(graph.shape(w))]
        ids = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        ties = Ties(ids.size)
        try:
            found, _ = pull(graph, w, Placement(ids), ties)[0]
        except Blocked:
            continue
        ((var, stored),) = found.items() if len(found) == 1 else ((-1, Placement(np.empty(0))),)
        # The scale's elements are numbered as they lie in the stored weight.
        order = stored.ids.ravel()
        if var < 0 or stored.exponent != 1 or not np.array_equal(np.sort(order), np.arange(ids.size)):
            continue
        on_activation = scale_rules.spread(ids, axes[i], axes[1 - i], len(graph.shape(x)))
        renumbered = np.argsort(order)
        assert isinstance(x, int)
        activation = Placement(renumbered[on_activation], Fraction(-1))
        yield _Use(var, Placement(renumbered[stored.ids]), x, activation)


def _contracted(graph: Graph, eqn: Any) -> tuple[Sequence[int], Sequence[int]] | None:
    """The axes of both operands that an operation of a weight and activations sums over; None for any other one."""
    if eqn.name not in ("dot_general", "conv_general_dilated"):
        return None
    if sum(graph.is_from_parameters(var) for var in eqn.inputs) != 1:
        return None
    if eqn.name == "dot_general":
        return eqn.params["dimension_numbers"][0]
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        return None
    return (numbers.lhs_spec[1],), (numbers.rhs_spec[1],)


def sites_of(graph: Graph) -> list[Site]:
    """The sites of a graph and of the bodies of its scans; each weight is in one."""
    return [site for part in graph.walk() for site in _sites_of_one(part)]


def _sites_of_one(graph: Graph) -> Iterator[Site]:
    uses = list(_uses(graph))
    done: set[int] = set()
    unfolded: dict[Any, tuple[_Use, str, list[_Use]]] = {}
    for use in uses:
        if use.var in done:
            continue
        ties = Ties(use.weight.ids.size)
        try:
            changed, ties = solve(graph, use.activation_var, use.activation, ties)
            if use.var not in changed:
                raise Blocked("its scale is undone before it gets here")
        except Blocked as e:
            key = (_origin(graph, use.activation_var), use.activation.ids.shape, use.activation.ids.tobytes())
            unfolded.setdefault(key, (use, str(e), []))[2].append(use)
            done.add(use.var)
            continue
        members = {u.var for u in uses if u.var in changed and _is_input_scale(u, changed[u.var])} - done
        done |= members
        yield _site(graph, members, changed, ties.classes())
    for use, reason, members_of_it in unfolded.values():
        placements = {u.var: u.weight for u in members_of_it}
        yield dataclasses.replace(
            _site(graph, placements, placements, np.arange(use.weight.ids.size)), changed={}, reason=reason
        )


def _is_input_scale(use: _Use, placement: Placement) -> bool:
    return placement.axes() == use.weight.axes() and placement.exponent == 1


def _site(graph: Graph, members: Any, changed: Mapping[int, Placement], classes: np.ndarray) -> Site:
    by_path = {graph.parameters[var].key: placement for var, placement in changed.items()}
    weights = {graph.parameters[var].key: changed[var] for var in sorted(members)}
    stacked = {graph.parameters[var].stacked for var in changed}
    return Site(weights, by_path, classes.copy(), stacked=stacked.pop())


def _origin(graph: Graph, var: int) -> int:
    """The array that an activation is, before casts."""
    while var in graph.producer:
        eqn = graph.eqns[graph.producer[var]]
        if eqn.name not in ("convert_element_type", "copy", "name", "optimization_barrier", "sharding_constraint"):
            break
        var = eqn.inputs[eqn.outputs.index(var)]  # type: ignore[assignment]
    return var


# --- models


def find_sites(
    model: nn.Module | nnx.Module, *inputs: Any, variables: Any = None, method: str = "__call__", **kwargs: Any
) -> list[Site]:
    """Which weights of a float model share an input, and which parameters can take a scale of it.

    Args:
      model: a Linen or NNX module.
      *inputs: of the model, which is traced, not run; they may be `jax.ShapeDtypeStruct`s.
      variables: Linen only: the variables, `{"params": ...}` and others.
      method: the one to trace.
      **kwargs: of the model.

    Returns:
      A site for each activation that is multiplied with weights, by dot_general (and what ends there) or a convolution.

    >>> class Mlp(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.down(nnx.relu(self.up(x)))
    >>> for site in find_sites(Mlp(nnx.Rngs(0)), jnp.ones((1, 4))):
    ...     print(list(site.weights), list(site.changed), site.reason)
    [('down', 'kernel')] [('up', 'kernel'), ('up', 'bias'), ('down', 'kernel')] None
    [('up', 'kernel')] [] it comes from an input of the model, or from what is no float parameter
    """
    is_leaf = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    leaves, treedef = jax.tree.flatten((inputs, kwargs), is_leaf=is_leaf)
    is_array = [isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for x in leaves]
    arrays = [_abstract(x) for x, a in zip(leaves, is_array, strict=True) if a]

    def arguments(traced: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(traced)
        return jax.tree.unflatten(treedef, [next(remaining) if a else x for a, x in zip(is_array, leaves, strict=True)])

    if isinstance(model, nn.Module):
        if variables is None:
            raise ValueError("a Linen model needs variables={'params': ...}")
        with_paths, structure = jax.tree.flatten_with_path(variables)

        def run(values: Sequence[Any], traced: Sequence[Any]) -> Any:
            args, kwargs = arguments(traced)
            tree = jax.tree.unflatten(structure, values)
            return jax.tree.leaves(model.apply(tree, *args, method=method, **kwargs))

        paths = [_dict_path(path) for path, _ in with_paths]
        values = [leaf for _, leaf in with_paths]
        parameters = [
            Parameter(path[1:]) if path[0] == "params" and _is_float(value) else None
            for path, value in zip(paths, values, strict=True)
        ]
    else:
        graphdef, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        values = [flax_util.unbox(variable) for variable in flat.values()]
        parameters = [
            Parameter(path) if isinstance(variable, nnx.Param) and _is_float(value) else None
            for (path, variable), value in zip(flat.items(), values, strict=True)
        ]

        def run(values: Sequence[Any], traced: Sequence[Any]) -> Any:
            args, kwargs = arguments(traced)
            variables = [v.replace(value) for v, value in zip(flat.values(), values, strict=True)]
            copy = nnx.merge(graphdef, nnx.from_flat_state(list(zip(flat, variables, strict=True))))
            out = getattr(copy, method)(*args, **kwargs)
            return jax.tree.leaves((out, nnx.state(copy, nnx.Not(nnx.Param))))

    structs = [_abstract(value) for value in values]
    jaxpr = jax.make_jaxpr(run)(structs, arrays)
    return sites_of(Graph(jaxpr, [*parameters, *[None] * len(arrays)]))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)


def _is_float(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def _dict_path(path: Sequence[Any]) -> tuple[Any, ...]:
    """The keys of a path, without the fields of boxes."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def apply_scales(
    model: nn.Module | nnx.Module, scales: Sequence[tuple[Site, jax.Array]], *, variables: Any = None
) -> Any:
    """The model (in Linen its variables) with scales folded in; the given one is left alone.

    Args:
      model: what `find_sites` saw.
      scales: sites that can be folded, and the scale of each, (*stacked, n).
      variables: Linen only.
    """
    factors: dict[Path, jax.Array] = {}
    for site, scale in scales:
        for path, placement in site.changed.items():
            factor = _take(scale.astype(jnp.float32), placement.ids) ** float(placement.exponent)
            factors[path] = factors[path] * factor if path in factors else factor

    def changed(path: Any, value: Any) -> Any:
        if path not in factors:
            return value
        return (value.astype(jnp.float32) * factors[path]).astype(value.dtype)

    if isinstance(model, nn.Module):

        def of_variables(keys: Any, value: Any) -> Any:
            collection, *path = _dict_path(keys)
            return changed(tuple(path), value) if collection == "params" else value

        return jax.tree.map_with_path(of_variables, variables)
    model = nnx.clone(model)
    graphdef, state = nnx.split(model)
    flat = [(path, v.replace(changed(path, v.get_raw_value()))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def fold(
    model: nn.Module | nnx.Module,
    scales: Mapping[str | Path, jax.typing.ArrayLike],
    *inputs: Any,
    variables: Any = None,
    method: str = "__call__",
    **kwargs: Any,
) -> Any:
    """Multiplies weights by a scale for each input feature, and other parameters so that the outputs stay the same.

    Args:
      model: a float Linen or NNX module; it is left alone.
      scales: path of a weight, as a tuple or joined by '/' -> positive (in,), in row-major order of its contracted
        axes; of stacked layers (layers, in). Weights with the same input have to have equal ones; those that are not
        given get the scale of those that are.
      *inputs, variables, method, **kwargs: as for `find_sites`.

    Returns:
      The model; in Linen its variables. The outputs are equal up to rounding.

    Raises:
      ValueError: a path is no weight, its scale cannot be folded, or does not fit.

    >>> class Mlp(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up, self.down = nnx.Linear(4, 2, rngs=rngs), nnx.Linear(2, 4, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.down(nnx.relu(self.up(x)))
    >>> model, x = Mlp(nnx.Rngs(0)), jnp.ones((1, 4))
    >>> folded = fold(model, {"down/kernel": jnp.array([2.0, 8.0])}, x)
    >>> (folded.down.kernel / model.down.kernel)[:, 0].tolist(), bool(jnp.allclose(folded(x), model(x)))
    ([2.0, 8.0], True)
    """
    sites = {
        "/".join(map(str, path)): (path, site)
        for site in find_sites(model, *inputs, variables=variables, method=method, **kwargs)
        for path in site.weights
    }
    found: dict[int, tuple[Site, jax.Array, str]] = {}
    for key, value in scales.items():
        name = key if isinstance(key, str) else "/".join(map(str, key))
        if name not in sites:
            raise ValueError(f"{name} is no weight that the model multiplies with: use one of {', '.join(sites)}")
        path, site = sites[name]
        if site.reason is not None:
            raise ValueError(f"the scale of {name} cannot be folded: {site.reason}")
        scale = jnp.asarray(value, jnp.float32)
        if scale.ndim != site.stacked + 1 or scale.shape[-1] != site.weights[path].ids.size:
            raise ValueError(
                f"the scale of {name} has shape {scale.shape}: a number is needed for each of its "
                f"{site.weights[path].ids.size} input features" + (", and each layer" if site.stacked else "")
            )
        if not bool((jnp.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"the scale of {name} has to be positive and finite")
        shared = site.from_weight(path, scale)
        if not bool(jnp.allclose(site.of_weight(path, shared), scale, rtol=1e-4)):
            raise ValueError(
                f"the scale of {name} differs between features that share a producer (as the heads of grouped "
                "attention do): make these equal, see Site.classes"
            )
        if id(site) in found and not bool(jnp.allclose(found[id(site)][1], shared, rtol=1e-4)):
            raise ValueError(f"{found[id(site)][2]} and {name} have the same input: give them the same scale")
        found[id(site)] = (site, shared, name)
    return apply_scales(model, [(site, scale) for site, scale, _ in found.values()], variables=variables)
