"""Array structures: trees whatever their leaves are, subclasses, boxes."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import pytest

from qwix._src.core import pytree
from qwix._src.core.pytree import array_structure, static


@array_structure
class Scaled:
    values: jax.Array
    scale: jax.Array | None = None
    unit: str = static(default="m")


@array_structure
class Named(Scaled):
    name: str = static(default="")
    offset: jax.Array | None = None

    def __post_init__(self):
        if self.name == "forbidden":
            raise ValueError(self.name)


class Box:
    def __init__(self, value):
        self.value = value


def test_fields_of_a_subclass_are_added():
    assert pytree.field_names(Named, is_static=False) == ("values", "scale", "offset")
    assert pytree.field_names(Named, is_static=True) == ("unit", "name")
    named = Named(1, 2, unit="s", name="x", offset=3)
    mapped = jax.tree.map(lambda leaf: 10 * leaf, named)
    assert type(mapped) is Named
    assert dataclasses.asdict(mapped) == dict(values=10, scale=20, unit="s", name="x", offset=30)
    paths = jax.tree_util.tree_flatten_with_path(named)[0]
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".values", ".scale", ".offset"]


def test_static_fields_are_part_of_the_structure():
    assert jax.tree.structure(Scaled(1, 2)) == jax.tree.structure(Scaled(3, 4))
    assert jax.tree.structure(Scaled(1, 2)) != jax.tree.structure(Scaled(1, 2, "s"))
    assert jax.tree.structure(Scaled(1, 2)) != jax.tree.structure(Named(1, 2))
    traced = []
    fn = jax.jit(lambda s: traced.append(s.unit))
    for s in (Scaled(1.0, 2.0), Scaled(3.0, 4.0), Scaled(3.0, 4.0, "s")):
        fn(s)
    assert traced == ["m", "s"]


def test_unflattening_runs_no_init():
    leaves, treedef = jax.tree.flatten(Named(1, 2, offset=3))
    leaf = object()
    assert jax.tree.unflatten(treedef, [leaf] * len(leaves)).offset is leaf
    forbidden = object.__new__(Named)
    forbidden.__dict__.update(values=1, scale=None, unit="m", name="forbidden", offset=None)
    assert jax.tree.map(lambda x: x, forbidden).name == "forbidden"
    with pytest.raises(ValueError, match="forbidden"):
        Named(1).replace(name="forbidden")


def test_frozen_and_compared_by_identity():
    scaled = Scaled(jnp.ones(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scaled.values = 1
    assert scaled != Scaled(scaled.values)
    assert len({scaled, scaled}) == 1
    assert scaled.replace(unit="s").values is scaled.values


def test_a_replace_of_its_own_is_kept():
    @array_structure
    class Own:
        values: int

        def replace(self, **updates):
            return "own"

    assert Own(1).replace() == "own"


def test_pickle():
    named = pickle.loads(pickle.dumps(Named(1, 2, unit="s", name="x")))
    assert dataclasses.asdict(named) == dataclasses.asdict(Named(1, 2, unit="s", name="x"))


def test_what_is_an_array_structure():
    assert pytree.is_array_structure(Named(1))
    for other in (Named, 1, None, dataclasses.make_dataclass("D", [])()):
        assert not pytree.is_array_structure(other)


def test_unwrap_takes_arrays_out_of_boxes_to_any_depth():
    x = jnp.ones(2)
    assert pytree.unwrap(x) is x
    assert pytree.unwrap(None) is None
    assert pytree.unwrap(Box(Box(x))) is x
    inner = Scaled(Box(x), None, unit="s")
    outer = pytree.unwrap(Named(inner, Box(x), name="n"))
    assert type(outer) is Named and outer.name == "n"
    assert outer.values.values is x and outer.values.unit == "s" and outer.scale is x
    assert inner.values is not x
    plain = Scaled(x)
    assert pytree.unwrap(plain) is plain
    abstract = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert pytree.unwrap(abstract) is abstract
