"""Data attached to arrays by identity."""

import gc

import jax
import jax.numpy as jnp
import pytest

from qwix._src import aux_data


def test_data_belongs_to_the_object():
    x = jnp.ones(2)
    aux_data.set(x, "name", "kernel")
    aux_data.set(x, "axis", 1)
    assert (aux_data.get(x, "name"), aux_data.get(x, "axis")) == ("kernel", 1)
    aux_data.set(x, "name", "bias")
    assert aux_data.get(x, "name") == "bias"
    for other in (jnp.ones(2), x + 0, x.astype(jnp.float16), jax.tree.map(lambda a: a * 1, x)):
        assert aux_data.get(other, "name", None) is None


def test_missing_data():
    x = jnp.ones(2)
    assert aux_data.get(x, "name", 5) == 5 and aux_data.get(x, "name", None) is None
    with pytest.raises(KeyError, match="'name' attached to this ArrayImpl"):
        aux_data.get(x, "name")
    aux_data.set(x, "other", 1)
    with pytest.raises(KeyError):
        aux_data.get(x, "name")


def test_clear():
    x = jnp.ones(2)
    aux_data.clear(x)
    aux_data.set(x, "name", 1)
    aux_data.clear(x)
    assert aux_data.get(x, "name", None) is None


def test_tracers_and_objects_without_weak_references():
    def f(x):
        aux_data.set(x, "name", "traced")
        return jnp.full((), aux_data.get(x, "name") == "traced")

    assert jax.jit(f)(1.0)
    key = (1, 2)
    aux_data.set(key, "name", 3)
    assert aux_data.get(key, "name") == 3
    aux_data.clear(key)
    assert aux_data.get(key, "name", None) is None


def test_nothing_is_left_of_a_collected_object():
    class Thing:
        pass

    before = len(aux_data._data)
    for _ in range(10):
        thing = Thing()
        assert aux_data.get(thing, "n", None) is None  # ids are used again
        aux_data.set(thing, "n", 1)
        del thing
    gc.collect()
    assert len(aux_data._data) == before
