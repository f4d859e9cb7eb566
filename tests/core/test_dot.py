"""dot on QArrays against np.dot in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import dot_general
from qwix._src.core.dot import dot
from qwix._src.core.qarray import QArray
from tests.core import oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((4,), (4,)),
        ((3, 4), (4,)),
        ((4,), (4, 5)),
        ((3, 4), (4, 5)),
        ((2, 3, 4), (5, 4, 6)),
        ((4,), (2, 4, 3)),
        ((), (4, 5)),
        ((3, 4), ()),
        ((), ()),
    ],
)
@pytest.mark.parametrize("kinds", ["qq", "fq", "qf", "ff"])
def test_any_rank(rng, a_shape, b_shape, kinds):
    a, b = (
        oracle.quantized(rng, shape, "int8") if kind == "q" else jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape, kind in zip((a_shape, b_shape), kinds, strict=True)
    )
    x, y = oracle.dequantize(a), oracle.dequantize(b)
    out = dot(a, b)
    assert out.dtype == jnp.float32
    oracle.assert_close(out, np.asarray(np.dot(x, y)), np.dot(np.abs(x), np.abs(y)))


def test_arguments_reach_the_hook(rng):
    calls = []

    def hook(*args, **kwargs):
        calls.append(kwargs)
        return dot_general.dot_general(*args, **kwargs)

    a, b = (oracle.quantized(rng, shape, "int8", dtype="bfloat16") for shape in ((2, 3), (3, 2)))
    out = dot(a, b, "highest", jnp.float32, _qwix_dot_general=hook)
    assert out.dtype == jnp.float32
    assert calls == [{"precision": "highest", "preferred_element_type": jnp.float32}]


def test_preferred_element_type_of_scalars(rng):
    a = oracle.quantized(rng, (3,), "int8", dtype="bfloat16")
    assert dot(2.0, a).dtype == jnp.bfloat16
    assert dot(a, 2.0, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_out_sharding(rng):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    a, b = (oracle.quantized(rng, shape, "int8") for shape in ((2, 3), (3, 2)))
    with jax.set_mesh(mesh):
        out = dot(a, b, out_sharding=jax.P("x", None))
        assert jax.typeof(out).sharding.spec == jax.P("x", None)


def test_integer_sums(rng):
    a = QArray(jnp.asarray(rng.integers(-128, 128, 100), jnp.int8), jnp.ones((1,)))
    q = np.asarray(a.qvalue, int)
    assert dot(a, a) == q @ q
