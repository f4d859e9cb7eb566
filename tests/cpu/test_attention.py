"""Attention of one token to a cache, each instruction set of this CPU, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix._src.core import qarray
from qwix.cpu import native
from qwix.models import kv_cache

HEADS, SIZE = 2, 300
KERNELS = range(len(native.kernels()))


def filled(width: int, dtype: str, scale: float = 1.0) -> kv_cache.LayerCache:
    rng = np.random.default_rng(width)
    empty = kv_cache.KVCache.empty(layers=1, batch=1, size=SIZE, heads=HEADS, head_dim=width, dtype=dtype).layers[0]
    new = (jnp.asarray(scale * rng.standard_normal((HEADS, SIZE, width)), jnp.float32) for _ in range(2))
    return empty.write(*new, jnp.int32(0))


def expected(query: jax.Array, cache: kv_cache.LayerCache, used: int) -> np.ndarray:
    def in_float64(array: kv_cache.Cached) -> np.ndarray:
        plain = qarray.dequantize(array) if isinstance(array, qarray.QArray) else array
        return np.asarray(plain.astype(jnp.float32), np.float64)

    q, k, v = map(in_float64, (query, cache.keys, cache.values))
    scores = np.einsum("hqd,hkd->hqk", q, k[:, :used]) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,hkd->hqd", weights / weights.sum(-1, keepdims=True), v[:, :used])


def natively(query: jax.Array, cache: kv_cache.LayerCache, used: int, kernel: int) -> np.ndarray:
    leaves = (jax.tree.leaves(part) for part in (cache.keys, cache.values))
    arrays = (array for part in leaves for array in (*part, None)[:2])
    return np.asarray(
        native.attend(query, *arrays, jnp.int32(used), scale=query.shape[-1] ** -0.5, kernel=kernel), np.float64
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_every_type_of_cache(kernel: int, dtype: str) -> None:
    for width, queries, used in ((64, 3, SIZE), (64, 1, 1), (20, 6, 129), (16, 2, 128), (8, 9, 250)):
        cache = filled(width, dtype)
        query = jnp.asarray(np.random.default_rng(queries).standard_normal((HEADS, queries, width)), jnp.float32)
        actual = natively(query, cache, used, kernel)
        np.testing.assert_allclose(actual, expected(query, cache, used), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_far_apart(kernel: int) -> None:
    """One key has all the weight, and those whose exponential is 0 have none."""
    cache, query = filled(32, "float32", scale=20.0), jnp.full((HEADS, 2, 32), 3.0)
    np.testing.assert_allclose(natively(query, cache, SIZE, kernel), expected(query, cache, SIZE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_in_use_does_not_count_and_nan_spreads(kernel: int) -> None:
    cache, query = filled(16, "float32"), jnp.ones((HEADS, 1, 16))
    beyond = jax.tree.map(lambda array: array.at[:, 40:].set(jnp.nan), cache)
    np.testing.assert_array_equal(natively(query, beyond, 40, kernel), natively(query, cache, 40, kernel))
    assert np.isnan(natively(query, beyond, 41, kernel)).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_op_of_the_library_on_both_ways(dtype: str) -> None:
    cache, query = (
        filled(16, dtype),
        jnp.asarray(np.random.default_rng(0).standard_normal((HEADS, 3, 16)), jnp.bfloat16),
    )
    for attend, tolerance in ((kv_cache.attend, 0.01), (kv_cache._attend, 0.02)):
        actual = jax.jit(attend)(query, cache, jnp.int32(77))
        assert actual.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected(query, cache, 77), atol=tolerance)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    cache = filled(16, "float32")
    with pytest.raises(ValueError, match=r"no use for query float32\[2, 1, 8\]"):
        native.attend(jnp.ones((HEADS, 1, 8)), cache.keys, None, cache.values, None, jnp.int32(1), scale=1.0)
