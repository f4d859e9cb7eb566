"""Every array structure, with plain arrays and with variables in it, through all of NNX."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from qwix._src import nnx_nodes
from qwix._src.core import pytree, qarray
from qwix._src.providers import boxed_param
from qwix.contrib import awq, padded_ptq
from qwix.cpu import packed

DIM = 4

# --- The structures. A new one is one line here: its name and how to make one from a random key.


def quantized(key: jax.Array, **how: Any) -> qarray.QArray:
    return qarray.quantize(jax.random.normal(key, (DIM, DIM)), qarray.HowToQuantize(**how))


def with_aux(key: jax.Array, **how: Any) -> boxed_param.WithAux:
    return boxed_param.WithAux(quantized(key, **how), qarray.HowToQuantize(**how))


SYMMETRIC = {"qtype": jnp.int8, "channelwise_axes": (1,)}
ASYMMETRIC = {"qtype": jnp.int8, "channelwise_axes": (1,), "calibration_method": "minmax"}
TILED = {"qtype": jnp.int4, "channelwise_axes": (1,), "tiled_axes": {0: 2}}
PADDED = TILED | {"tiled_axes": {0: 3}}


def padded(key: jax.Array, **how: Any) -> padded_ptq.PaddedQArray:
    return padded_ptq.quantize(jax.random.normal(key, (DIM, DIM)), qarray.HowToQuantize(**how))


def with_awq_scale(key: jax.Array, **how: Any) -> awq.WithAwqScale:
    scale = 1 + jax.random.uniform(key, (DIM,))
    aux = with_aux(key, **how)
    return awq.WithAwqScale(aux.array, aux.how, awq_scale=scale, contracting_axis=0)


def packed_array(key: jax.Array, **how: Any) -> packed.PackedQArray:
    return packed.pack(quantized(key, **how))


STRUCTURES: dict[str, Callable[[jax.Array], Any]] = {
    "QArray-symmetric": lambda key: quantized(key, **SYMMETRIC),
    "QArray-asymmetric": lambda key: quantized(key, **ASYMMETRIC),
    "QArray-tiled": lambda key: quantized(key, **TILED),
    "WithAux-symmetric": lambda key: with_aux(key, **SYMMETRIC),
    "WithAux-asymmetric": lambda key: with_aux(key, **ASYMMETRIC),
    "WithAux-tiled": lambda key: with_aux(key, **TILED),
    "PaddedQArray": lambda key: padded(key, **PADDED),
    "WithAux-padded": lambda key: boxed_param.WithAux(padded(key, **PADDED), qarray.HowToQuantize(**PADDED)),
    "PackedQArray": lambda key: packed_array(key, **SYMMETRIC),
    "WithAux-packed": lambda key: boxed_param.WithAux(
        packed_array(key, **ASYMMETRIC), qarray.HowToQuantize(**ASYMMETRIC)
    ),
    "WithAwqScale": lambda key: with_awq_scale(key, **SYMMETRIC),
    "WithAwqScale-tiled": lambda key: with_awq_scale(key, **TILED),
}

# --- What may stand in the fields of a structure: arrays, or variables with their metadata.


def annotated_param(array: jax.Array) -> nnx.Param:
    """A parameter with a partition spec, which no operation may lose."""
    spec = ("rows", "columns")[: array.ndim]
    return nnx.Param(array, out_sharding=spec, eager_sharding=False, note="mine")


LEAVES: dict[str, Callable[[jax.Array], Any]] = {
    "raw": lambda array: array,
    "Param": annotated_param,
}


class Model(nnx.Module):
    """A module with a structure and something to train."""

    def __init__(self, weight: Any):
        self.weight = weight
        self.linear = nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x) * number(self.weight)


def number(structure: Any) -> jax.Array:
    """A number that every array in the structure changes."""
    arrays = jax.tree.leaves(structure)
    return sum(jnp.cos(jnp.arange(a.size) * a.astype(jnp.float32).ravel()).sum() for a in arrays)


@dataclasses.dataclass(frozen=True)
class Case:
    """Makes structures of one kind, and models that hold one."""

    make: Callable[[jax.Array], Any]
    wrap: Callable[[jax.Array], Any]

    def weight(self, seed: Any = 0) -> Any:
        key = jax.random.key(seed) if isinstance(seed, int) else seed
        return jax.tree.map(self.wrap, self.make(key))

    def raw(self, seed: int = 0) -> Any:
        return self.make(jax.random.key(seed))

    def model(self, seed: Any = 0) -> Model:
        return Model(self.weight(seed))

    @property
    def is_raw(self) -> bool:
        return isinstance(jax.tree.leaves(self.weight(), is_leaf=is_variable)[0], jax.Array)


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in type, static fields, leaves and the metadata of variables."""
    assert type(actual) is type(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual_leaves = jax.tree.leaves(actual, is_leaf=is_variable)
    expected_leaves = jax.tree.leaves(expected, is_leaf=is_variable)
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        assert isinstance(a, nnx.Variable) == isinstance(e, nnx.Variable)
        if isinstance(e, nnx.Variable):
            assert type(a) is type(e)
            assert a.get_metadata() == e.get_metadata()
        value, expected_value = jnp.asarray(a), jnp.asarray(e)
        assert value.dtype == expected_value.dtype
        np.testing.assert_array_equal(value, expected_value)


def assert_abstract(structure: Any, expected: Any) -> None:
    assert type(structure) is type(expected)
    assert jax.tree.structure(structure) == jax.tree.structure(expected)
    for abstract, array in zip(jax.tree.leaves(structure), jax.tree.leaves(expected), strict=True):
        assert isinstance(abstract, jax.ShapeDtypeStruct)
        assert (abstract.shape, abstract.dtype) == (array.shape, array.dtype)


def paths(structure: Any) -> set[tuple[str, ...]]:
    """Paths of the arrays in a structure, from its fields."""
    if not pytree.is_array_structure(structure):
        return {()}
    fields = {n: getattr(structure, n) for n in pytree.field_names(structure, is_static=False)}
    return {(n, *p) for n, value in fields.items() if value is not None for p in paths(value)}


def pure_dict(structure: Any) -> Any:
    """Nested dict of the arrays in a structure."""
    if not pytree.is_array_structure(structure):
        return structure
    fields = {n: getattr(structure, n) for n in pytree.field_names(structure, is_static=False)}
    return {n: pure_dict(value) for n, value in fields.items() if value is not None}


# --- The operations. Each takes a case and asserts that structures come through.

OPERATIONS: dict[str, Callable[[Case], None]] = {}


def operation(fn: Callable) -> Callable:
    OPERATIONS[fn.__name__] = fn
    return fn


@operation
def split_merge(case: Case) -> None:
    model = case.model()
    merged = nnx.merge(*nnx.split(model))
    assert merged.weight is not model.weight
    assert_same(merged.weight, case.weight())


@operation
def split_merge_by_filter(case: Case) -> None:
    model = case.model()
    graphdef, weight, rest = nnx.split(model, nnx.PathContains("weight"), ...)
    assert set(weight) == {"weight"}
    assert_same(nnx.merge(graphdef, rest, weight).weight, case.weight())


@operation
def split_merge_as_a_tree(case: Case) -> None:
    graphdef, state = nnx.split(case.model(), graph=False)
    assert_same(nnx.merge(graphdef, state).weight, case.weight())


@operation
def state(case: Case) -> None:
    flat = nnx.to_flat_state(nnx.state(case.model()))
    found = {path[1:] for path, _ in flat if path[0] == "weight"}
    assert found == paths(case.raw())
    params = nnx.to_flat_state(nnx.state(case.model(), nnx.Param))
    assert {path[1:] for path, _ in params if path[0] == "weight"} == (set() if case.is_raw else paths(case.raw()))


@operation
def update_with_the_same(case: Case) -> None:
    model = case.model()
    nnx.update(model, nnx.state(model))
    assert_same(model.weight, case.weight())


@operation
def update_with_new_values(case: Case) -> None:
    model = case.model(0)
    nnx.update(model, nnx.state(case.model(1)))
    assert_same(model.weight, case.weight(1))


@operation
def update_with_a_dict_of_arrays(case: Case) -> None:
    model = case.model(0)
    nnx.update(model, {"weight": pure_dict(case.raw(1))})
    assert_same(model.weight, case.weight(1))


@operation
def update_with_a_structure(case: Case) -> None:
    for new in (case.raw(1), case.weight(1)):
        model = case.model(0)
        nnx.update(model, {"weight": new})
        assert_same(model.weight, case.weight(1))
        model = case.model(0)
        nnx.update(model, nnx.State({"weight": new}), {"linear": {"bias": jnp.ones(DIM)}})
        assert_same(model.weight, case.weight(1))


@operation
def update_with_a_partial_state(case: Case) -> None:
    path = sorted(paths(case.raw()))[-1]
    new = functools.reduce(getattr, path, case.raw(1))
    state = functools.reduce(lambda value, name: {name: value}, reversed(path), new)
    model = case.model(0)
    nnx.update(model, {"weight": state})
    changed = functools.reduce(getattr, path, model.weight)
    np.testing.assert_array_equal(changed[...], new)
    old_leaves, new_leaves = jax.tree.leaves(case.raw(0)), jax.tree.leaves(model.weight)
    equal = [bool(jnp.array_equal(o, n)) for o, n in zip(old_leaves, new_leaves, strict=True)]
    assert equal.count(False) == 1


@operation
def update_inside_jit(case: Case) -> None:
    @nnx.jit
    def update(model: Model, state: Any) -> None:
        nnx.update(model, state)

    model = case.model(0)
    update(model, nnx.state(case.model(1)))
    assert_same(model.weight, case.weight(1))


@operation
def reassign(case: Case) -> None:
    model = case.model(0)
    model.weight = case.weight(1)
    assert_same(model.weight, case.weight(1))
    model(jnp.ones(DIM))

    @nnx.jit
    def assign(model: Model, weight: Any) -> None:
        model.weight = weight

    model = case.model(0)
    assign(model, case.weight(2))
    assert_same(model.weight, case.weight(2))


@operation
def clone(case: Case) -> None:
    model = case.model(0)
    cloned = nnx.clone(model)
    assert_same(cloned.weight, case.weight(0))
    nnx.update(cloned, nnx.state(case.model(1)))
    assert_same(model.weight, case.weight(0))
    assert_same(cloned.weight, case.weight(1))


@operation
def pop(case: Case) -> None:
    model = case.model()
    popped = nnx.pop(model, nnx.Param)
    nnx.update(model, popped)
    assert_same(model.weight, case.weight())


@operation
def jax_jit_over_split_state(case: Case) -> None:
    model = case.model()
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model)

    x = jnp.ones(DIM)
    y, new_state = forward(state, x)
    np.testing.assert_allclose(y, model(x), rtol=1e-5)
    assert_same(nnx.merge(graphdef, new_state).weight, case.weight())


@operation
def jax_jit_of_the_model(case: Case) -> None:
    model, x = case.model(), jnp.ones(DIM)
    y, same = jax.jit(lambda model, x: (model(x), model))(model, x)
    np.testing.assert_allclose(y, model(x), rtol=1e-5)
    assert_same(same.weight, case.weight())


@operation
def jit_with_donation(case: Case) -> None:
    graphdef, state = nnx.split(case.model())
    state = jax.tree.map(jnp.copy, state)
    state = jax.jit(lambda state: state, donate_argnums=0)(state)
    assert_same(nnx.merge(graphdef, state).weight, case.weight())


@operation
def grad_of_other_parameters(case: Case) -> None:
    model = case.model()
    graphdef, params, rest = nnx.split(model, nnx.PathContains("linear"), ...)

    def loss(params: Any) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(jnp.ones(DIM)).sum()

    grads = jax.grad(loss)(params)
    factor = number(case.weight())
    np.testing.assert_allclose(grads["linear"]["bias"][...], np.full(DIM, factor), rtol=1e-5)


@operation
def grad_by_filter(case: Case) -> None:
    model = case.model()
    others = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("weight")))
    grads = nnx.grad(lambda m: m(jnp.ones(DIM)).sum(), argnums=nnx.DiffState(0, others))(model)
    assert set(grads) == {"linear"}
    factor = number(case.weight())
    np.testing.assert_allclose(grads["linear"]["bias"][...], np.full(DIM, factor), rtol=1e-5)
    assert_same(model.weight, case.weight())


@operation
def eval_shape_then_update(case: Case) -> None:
    model = nnx.eval_shape(case.model)
    assert_abstract(model.weight, case.weight())
    nnx.update(model, nnx.state(case.model(1)))
    assert_same(model.weight, case.weight(1))

    model = nnx.eval_shape(case.model)
    nnx.update(model, {"weight": case.raw(1)})
    assert_same(model.weight, case.weight(1))


def stacked(case: Case) -> tuple[Any, Any]:
    graphdef, states = zip(*[nnx.split(case.model(seed)) for seed in range(3)], strict=True)
    assert len(set(graphdef)) == 1
    return graphdef[0], jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)


@operation
def vmap_over_stacked_states(case: Case) -> None:
    graphdef, states = stacked(case)
    x = jnp.ones(DIM)
    expected = jnp.stack([case.model(seed)(x) for seed in range(3)])
    y = jax.vmap(lambda state: nnx.merge(graphdef, state)(x))(states)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    model = nnx.merge(graphdef, states)
    y = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(model, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    third = nnx.merge(graphdef, jax.tree.map(lambda array: array[2], nnx.state(model)))
    assert_same(third.weight, case.weight(2))


@operation
def scan_over_stacked_states(case: Case) -> None:
    graphdef, states = stacked(case)
    x = jnp.ones(DIM)
    expected = x
    for seed in range(3):
        expected = case.model(seed)(expected)
    y, _ = jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, states)
    np.testing.assert_allclose(y, expected, rtol=1e-4)

    @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x: jax.Array, model: Model) -> jax.Array:
        return model(x)

    np.testing.assert_allclose(forward(x, nnx.merge(graphdef, states)), expected, rtol=1e-4)


@operation
def vmap_creation(case: Case) -> None:
    keys = jnp.stack([jax.random.key(seed) for seed in range(3)])
    model = nnx.vmap(case.model)(keys)
    last = jax.tree.map(lambda array: array[2], model)
    assert type(last.weight) is type(case.weight())
    for actual, expected in zip(jax.tree.leaves(last.weight), jax.tree.leaves(case.weight(2)), strict=True):
        # A reduction under vmap may round differently by one step.
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (actual, expected)), 1e-6)


@operation
def remat(case: Case) -> None:
    model, x = case.model(), jnp.ones(DIM)
    np.testing.assert_allclose(nnx.remat(lambda m, x: m(x))(model, x), model(x), rtol=1e-5)
    others = nnx.DiffState(0, nnx.PathContains("linear"))
    loss = nnx.remat(lambda m: m(x).sum())
    grads = nnx.grad(loss, argnums=others)(model)
    factor = number(case.weight())
    np.testing.assert_allclose(grads["linear"]["bias"][...], np.full(DIM, factor), rtol=1e-5)
    assert_same(model.weight, case.weight())


@operation
def cond(case: Case) -> None:
    def update(model: Model) -> None:
        nnx.update(model, nnx.state(case.model(1)))

    for taken in (False, True):
        model = case.model(0)
        nnx.cond(jnp.array(taken), update, lambda model: None, model)
        assert_same(model.weight, case.weight(int(taken)))
    weight = nnx.cond(True, lambda w: w, lambda w: w, case.raw())
    assert_same(weight, case.raw())


@operation
def carried_through_loops(case: Case) -> None:
    def step(_: Any, weight: Any) -> Any:
        return jax.tree.map(lambda array: array + jnp.ones_like(array), weight)

    expected = step(0, step(0, case.raw()))
    assert_same(nnx.fori_loop(0, 2, step, case.raw()), expected)
    looped = nnx.while_loop(
        lambda carry: carry[0] < 2,
        lambda carry: (carry[0] + 1, step(0, carry[1])),
        (0, case.raw()),
    )
    assert_same(looped[1], expected)
    scanned = nnx.scan(lambda w, _: (step(0, w), None), length=2)(case.raw(), None)
    assert_same(scanned[0], expected)


@operation
def an_argument_and_a_result_of_transforms(case: Case) -> None:
    assert_same(nnx.jit(lambda weight: weight)(case.weight()), case.weight())
    assert_same(nnx.jit(case.make)(jax.random.key(0)), jax.jit(case.make)(jax.random.key(0)))
    assert_same(jax.jit(lambda weight: weight)(case.weight()), case.weight())
    copies = jax.tree.map(lambda array: jnp.stack([array, array]), case.raw())
    np.testing.assert_allclose(nnx.vmap(number)(copies), jnp.full(2, number(case.raw())), rtol=1e-5)
    axes = jax.tree.map(lambda _: 0, copies)
    np.testing.assert_allclose(nnx.vmap(number, in_axes=(axes,))(copies), jnp.full(2, number(case.raw())), rtol=1e-5)


@operation
def to_and_replace_by_pure_dict(case: Case) -> None:
    pure = nnx.to_pure_dict(nnx.state(case.model(1)))
    expected = pure_dict(case.raw(1))
    assert jax.tree.structure(pure["weight"]) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, pure["weight"], expected)
    graphdef, state = nnx.split(case.model(0))
    nnx.replace_by_pure_dict(state, pure)
    assert_same(nnx.merge(graphdef, state).weight, case.weight(1))


@operation
def iter_graph(case: Case) -> None:
    model = case.model()
    found = {path[1:]: value for path, value in nnx.iter_graph(model) if path[:1] == ("weight",)}
    assert found[()] is model.weight
    assert set(found) >= paths(case.raw())
    for path in paths(case.raw()):
        assert found[path] is functools.reduce(getattr, path, model.weight)


@operation
def deepcopy(case: Case) -> None:
    model = case.model(0)
    copied = copy.deepcopy(model)
    assert_same(copied.weight, case.weight(0))
    nnx.update(copied, nnx.state(case.model(1)))
    assert_same(model.weight, case.weight(0))


@operation
def pickled(case: Case) -> None:
    assert_same(pickle.loads(pickle.dumps(case.weight())), case.weight())
    assert_same(pickle.loads(pickle.dumps(case.model())).weight, case.weight())


@operation
def tree_map(case: Case) -> None:
    assert_same(jax.tree.map(lambda x: x, case.model()).weight, case.weight())
    shapes = jax.tree.map(jnp.shape, case.raw())
    assert type(shapes) is type(case.raw())
    leaves, treedef = jax.tree.flatten(case.weight())
    assert_same(jax.tree.unflatten(treedef, leaves), case.weight())


@operation
def representation(case: Case) -> None:
    text = repr(case.model())
    assert "weight=" + type(case.weight()).__name__ + "(" in text
    for path in paths(case.raw()):
        assert path[-1] + "=" in text
    assert ("Param(" in text.split("linear=")[0].split("weight=")[1]) != case.is_raw
    # As short as NNX itself prints a module: shapes of the arrays, not their values.
    assert "..." not in text
    assert str(case.model()) == text
    assert "weight" in repr(nnx.state(case.model()))
    assert "weight" in repr(nnx.graphdef(case.model()))


@operation
def in_containers(case: Case) -> None:
    class Holder(nnx.Module):
        def __init__(self, seeds: tuple[int, ...]):
            weights = [case.weight(seed) for seed in seeds]
            self.listed = nnx.List(weights)
            self.plain = nnx.data(list(weights))
            self.named = nnx.Dict({"first": weights[0]})

    def check(holder: Holder, first: int, second: int) -> None:
        assert_same(holder.listed[0], case.weight(first))
        assert_same(holder.listed[1], case.weight(second))
        assert_same(holder.plain[1], case.weight(second))
        assert_same(holder.named["first"], case.weight(first))

    holder = Holder((0, 1))
    check(nnx.merge(*nnx.split(holder)), 0, 1)
    check(nnx.clone(holder), 0, 1)
    nnx.update(holder, nnx.state(Holder((2, 3))))
    check(holder, 2, 3)


@operation
def as_the_value_of_a_variable(case: Case) -> None:
    def model(seed: int) -> Model:
        return Model(nnx.Param(case.raw(seed)))

    first = model(0)
    assert_same(nnx.merge(*nnx.split(first)).weight.get_value(), case.raw(0))
    nnx.jit(nnx.update)(first, nnx.state(model(1)))
    assert_same(first.weight.get_value(), case.raw(1))
    assert_same(nnx.clone(first).weight.get_value(), case.raw(1))
    abstract = nnx.eval_shape(lambda: model(0))
    assert_abstract(abstract.weight.get_value(), case.raw(0))
    nnx.update(abstract, nnx.state(first))
    assert_same(abstract.weight.get_value(), case.raw(1))


@operation
def under_two_names(case: Case) -> None:
    def shared(seed: int) -> Model:
        model = case.model(seed)
        model.again = model.weight
        return model

    def variables(weight: Any) -> list[Any]:
        return jax.tree.leaves(weight, is_leaf=is_variable)

    model = shared(0)
    merged = nnx.merge(*nnx.split(model))
    assert_same(merged.weight, case.weight())
    assert_same(merged.again, case.weight())
    nnx.update(model, nnx.state(shared(1)))
    assert_same(model.weight, case.weight(1))
    assert_same(model.again, case.weight(1))
    nnx.jit(lambda model: nnx.update(model, nnx.state(shared(2))))(model)
    assert_same(model.weight, case.weight(2))
    assert_same(model.again, case.weight(2))
    # Variables are shared by reference, arrays are values: the same as in every NNX module.
    for each in (merged, model, nnx.clone(model)):
        shares = [a is b for a, b in zip(variables(each.weight), variables(each.again), strict=True)]
        assert all(shares) or case.is_raw
    assert ("weight" in nnx.state(model)) == case.is_raw
    assert "again" in nnx.state(model)


@operation
def graphdefs(case: Case) -> None:
    first, second = nnx.graphdef(case.model(0)), nnx.graphdef(case.model(1))
    assert first == second
    assert hash(first) == hash(second)
    assert first == nnx.graphdef(pickle.loads(pickle.dumps(case.model())))


@operation
def optimizer_over_the_rest(case: Case) -> None:
    model = case.model()
    others = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("weight")))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=others)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: Model) -> jax.Array:
            return jnp.sum(model(jnp.ones(DIM)) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, others))(model)
        optimizer.update(model, grads)
        return value

    first = step(model, optimizer)
    assert step(model, optimizer) < first
    assert_same(model.weight, case.weight())


# --- The matrix.

cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(make, wrap), id=f"{structure}-{leaf}")
        for structure, make in STRUCTURES.items()
        for leaf, wrap in LEAVES.items()
    ],
)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@cases
def test_operation(case: Case, operation: Callable[[Case], None]):
    operation(case)


@cases
def test_orbax(case: Case, tmp_path):
    model = case.model(1)
    abstract = nnx.eval_shape(case.model)
    # In graph mode the state of an abstract model has variables only, as for all plain arrays.
    template = nnx.state(abstract, graph=False)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.save(tmp_path / "pure", nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state", template)
        pure = checkpointer.restore(tmp_path / "pure", nnx.to_pure_dict(template))
    assert_same(nnx.merge(nnx.graphdef(model), state).weight, case.weight(1))
    for restored in (state, pure):
        loaded = nnx.eval_shape(case.model)
        nnx.update(loaded, restored)
        assert_same(loaded.weight, case.weight(1))
        np.testing.assert_array_equal(loaded(jnp.ones(DIM)), model(jnp.ones(DIM)))


# --- What the matrix does not show: what registration is for, and what is refused.


def unregistered() -> type:
    @pytree.array_structure
    class Pair:
        first: Any
        second: Any = None
        unit: str = pytree.static(default="m")

    return Pair


class Holder(nnx.Module):
    def __init__(self, value: Any):
        self.value = value


def test_registration_makes_the_difference():
    cls = unregistered()
    with pytest.raises(ValueError, match="assigned to static attribute 'value'"):
        Holder(cls(jnp.zeros(2)))
    holder = Holder(nnx.data(cls(jnp.zeros(2))))
    with pytest.raises(ValueError, match="Cannot set key 'first' on immutable node"):
        nnx.update(holder, {"value": {"first": jnp.ones(2)}})

    assert nnx_nodes.register(cls) is cls
    holder = Holder(cls(jnp.zeros(2)))
    nnx.update(holder, {"value": {"first": jnp.ones(2)}})
    assert_same(holder.value, cls(jnp.ones(2)))


def test_a_plain_object_with_arrays_stays_refused():
    @dataclasses.dataclass
    class Plain:
        array: jax.Array

    with pytest.raises(ValueError, match="assigned to static attribute 'value'"):
        Holder([Plain(jnp.zeros(2)), jnp.zeros(2)])
    with pytest.raises(TypeError, match=r"Plain.*array_structure"):
        nnx_nodes.register(Plain)


def test_registering_again_changes_nothing():
    cls = nnx_nodes.register(unregistered())
    holder = Holder(cls(jnp.zeros(2)))
    graphdef = nnx.graphdef(holder)
    assert nnx_nodes.register(cls) is cls
    assert nnx.graphdef(holder) == graphdef
    assert nnx_nodes.register(qarray.QArray) is qarray.QArray


def test_a_subclass_is_registered_by_itself():
    @pytree.array_structure
    class Triple(nnx_nodes.register(unregistered())):
        third: Any = None

    with pytest.raises(ValueError, match="assigned to static attribute 'value'"):
        Holder(Triple(jnp.zeros(2), third=jnp.zeros(3)))
    nnx_nodes.register(Triple)
    holder = Holder(Triple(jnp.zeros(2), third=jnp.zeros(3)))
    nnx.update(holder, {"value": {"third": jnp.ones(3)}})
    assert_same(holder.value, Triple(jnp.zeros(2), third=jnp.ones(3)))


def test_only_nnx_changes_a_structure():
    array = quantized(jax.random.key(0), **SYMMETRIC)
    with pytest.raises(dataclasses.FrozenInstanceError):
        array.scale = array.scale * 2


def test_update_changes_the_object_that_two_modules_hold():
    array, other = (quantized(jax.random.key(seed), **SYMMETRIC) for seed in range(2))
    first, second, third = Holder(array), Holder(array), Holder(array.replace())
    nnx.update(first, {"value": other})
    assert second.value is first.value
    assert_same(second.value, other)
    assert_same(third.value, quantized(jax.random.key(0), **SYMMETRIC))


def test_update_refuses_what_is_no_array_of_the_structure():
    holder = Holder(quantized(jax.random.key(0), **SYMMETRIC))
    with pytest.raises(ValueError, match=r"'qvalues' for a QArray.*qvalue, scale, zero_point"):
        nnx.update(holder, {"value": {"qvalues": jnp.zeros((DIM, DIM), jnp.int8)}})
    with pytest.raises(ValueError, match="Expected a subgraph for 'value'"):
        nnx.update(holder, {"value": jnp.zeros((DIM, DIM))})
    assert_same(holder.value, quantized(jax.random.key(0), **SYMMETRIC))


@pytest.mark.parametrize(
    ("new", "name"),
    [
        (lambda q: q.replace(qtype="nf4"), "qtype"),
        (lambda q: q.replace(zero_point=jnp.zeros_like(q.scale, jnp.int8)), "zero_point"),
        (lambda q: nnx_nodes.register(unregistered())(q.qvalue, q.scale), "type"),
    ],
    ids=["static field", "absent field", "type"],
)
def test_update_refuses_a_structure_that_differs_in_more_than_arrays(new, name):
    array = quantized(jax.random.key(0), **SYMMETRIC)
    holder = Holder(array)
    with pytest.raises(ValueError, match=f"not what '{name}' is.*Assign the attribute"):
        nnx.update(holder, {"value": new(array)})


def test_graphdefs_tell_static_and_absent_fields_apart():
    array = quantized(jax.random.key(0), **SYMMETRIC)
    zero_point = jnp.zeros_like(array.scale, jnp.int8)
    variants = [array, array.replace(qtype="int7"), array.replace(zero_point=zero_point)]
    assert len({nnx.graphdef(Holder(variant)) for variant in variants}) == 3


def test_variables_keep_their_partition_specs():
    array = quantized(jax.random.key(0), **SYMMETRIC)
    specs = nnx.get_partition_spec(nnx.state(Holder(jax.tree.map(annotated_param, array))))
    assert specs["value"]["qvalue"].get_value() == jax.P("rows", "columns")
    assert specs["value"]["scale"].get_value() == jax.P("rows", "columns")


@pytest.mark.parametrize("qtype", ["int2", "int4", "int8", "float8_e4m3fn", "float8_e5m2", "nf4"])
def test_formats(qtype):
    def holder(seed: int) -> Holder:
        return Holder(quantized(jax.random.key(seed), qtype=qtype, tiled_axes={0: 2}))

    model = holder(0)
    nnx.jit(nnx.update)(model, nnx.state(holder(1)))
    assert_same(model.value, holder(1).value)
    assert_same(pickle.loads(pickle.dumps(model)).value, holder(1).value)
