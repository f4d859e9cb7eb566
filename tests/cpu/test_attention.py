"""Attention to a cache, and of many queries: each instruction set of this CPU, against NumPy in float64."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix import cpu
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


# --- attention of many queries ------------------------------------------------------------------


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def densely_in_float64(query: Any, key: Any, value: Any, bias: Any, scale: float) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    k, v = (np.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
    scores = scale * np.einsum("...tnh,...snh->...nts", q, k)
    scores = scores if bias is None else scores + np.asarray(bias, np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("...nts,...snh->...tnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "width", "bias_shape"),
    [
        (33, 128, 2, 2, 32, None),
        (7, 300, 4, 2, 20, (1, 1, 300)),  # three parts of keys, and a width that is no multiple of 16
        (130, 129, 2, 1, 64, (2, 130, 129)),
        (3, 1, 1, 1, 256, (1, 3, 1)),
        (16, 17, 3, 3, 5, (3, 1, 17)),
    ],
)
def test_many_queries(
    kernel: int, queries: int, keys: int, heads: int, key_heads: int, width: int, bias_shape: Any
) -> None:
    query = normal(0, 2, queries, heads, width)
    key, value = normal(1, 2, keys, key_heads, width), normal(2, 2, keys, key_heads, width)
    bias = None if bias_shape is None else normal(3, 1, *bias_shape)
    actual = native.attend_densely(query, key, value, bias, scale=0.3, kernel=kernel)
    expected = densely_in_float64(query, key, value, bias, 0.3)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_of_any_size_keys_that_nobody_sees_and_nan(kernel: int) -> None:
    query, key, value = normal(0, 20, 2, 16), normal(1, 300, 2, 16), normal(2, 300, 2, 16)
    attend = functools.partial(native.attend_densely, kernel=kernel)
    far = attend(query, key, value, None, scale=300.0)
    np.testing.assert_allclose(far, densely_in_float64(query, key, value, None, 300.0), rtol=1e-3, atol=1e-3)

    # -inf hides keys: a whole part of them, the last ones, and all of them from one query.
    bias = np.zeros((1, 20, 300), np.float32)
    bias[:, :, :128] = bias[:, :, 290:] = -np.inf
    hidden = attend(query, key, value, jnp.asarray(bias), scale=1.0)
    expected = attend(query, key[128:290], value[128:290], None, scale=1.0)
    np.testing.assert_allclose(hidden, expected, rtol=2e-5, atol=2e-6)
    bias[:, 3] = -np.inf
    hidden = np.asarray(attend(query, key, value, jnp.asarray(bias), scale=1.0))
    assert np.isnan(hidden[3]).all() and np.isfinite(np.delete(hidden, 3, axis=0)).all()

    # NaN in a key reaches all queries of its head; in a query, its own result.
    with_nan = np.asarray(attend(query, key.at[200, 1, 5].set(np.nan), value, None, scale=1.0))
    assert np.isnan(with_nan[:, 1]).all() and np.isfinite(with_nan[:, 0]).all()
    with_nan = np.asarray(attend(query.at[7, 0, 3].set(np.nan), key, value, None, scale=1.0))
    assert np.isnan(with_nan[7, 0]).all() and np.isfinite(np.delete(with_nan, 7, axis=0)).all()


@hypothesis.given(
    batch=st.sampled_from([(), (2,), (2, 1, 3)]),
    queries=st.sampled_from([0, 1, 5]),
    heads=st.sampled_from([(2, 2), (4, 2)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    masked=st.booleans(),
    biased=st.booleans(),
)
@hypothesis.settings(max_examples=15)
def test_the_public_function_is_that_of_jax(
    batch: tuple[int, ...], queries: int, heads: tuple[int, int], dtype: Any, masked: bool, biased: bool
) -> None:
    query = normal(0, *batch, queries, heads[0], 8).astype(dtype)
    key, value = (normal(i, *batch, 9, heads[1], 8).astype(dtype) for i in (1, 2))
    ones = (1,) * len(batch)
    mask = jnp.arange(9)[None, None] < 6 if masked else None
    mask = None if mask is None else mask.reshape(*ones, 1, 1, 9)
    bias = normal(3, *ones, heads[0], queries, 9) if biased else None
    actual = jax.jit(cpu.dot_product_attention)(query, key, value, bias, mask)
    assert actual.shape == query.shape and actual.dtype == dtype
    hidden = np.zeros((*ones, 1, 1, 9))
    if masked:
        hidden[..., 6:] = -np.inf
    expected = densely_in_float64(query, key, value, hidden if bias is None else hidden + np.asarray(bias), 8**-0.5)
    tolerance = {jnp.float32: 1e-5, jnp.float16: 2e-3, jnp.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=tolerance)


def test_a_query_that_sees_nothing_gets_the_mean_as_from_jax() -> None:
    query, key, value = normal(0, 1, 2, 2, 8), normal(1, 1, 9, 2, 8), normal(2, 1, 9, 2, 8)
    nothing = jnp.zeros((1, 1, 1, 9), bool)
    actual = cpu.dot_product_attention(query, key, value, mask=nothing)
    np.testing.assert_allclose(actual, jnp.broadcast_to(value.mean(1, keepdims=True), actual.shape), atol=1e-6)
    np.testing.assert_allclose(actual, jax.nn.dot_product_attention(query, key, value, mask=nothing), atol=1e-6)


def test_vmap_and_scan() -> None:
    query, key, value = normal(0, 3, 2, 5, 2, 8), normal(1, 3, 2, 9, 2, 8), normal(2, 2, 9, 2, 8)
    bias = normal(3, 3, 1, 1, 1, 9)
    one = cpu.dot_product_attention
    expected = jnp.stack([one(query[i], key[i], value, bias[i]) for i in range(3)])
    mapped = jax.jit(jax.vmap(one, in_axes=(0, 0, None, 0)))(query, key, value, bias)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)
    _, scanned = jax.lax.scan(lambda _, x: (None, one(x[0], x[1], value, x[2])), None, (query, key, bias))
    np.testing.assert_allclose(scanned, expected, atol=1e-6)


def test_no_gradients_and_clear_errors() -> None:
    x = normal(0, 1, 3, 2, 8)
    with pytest.raises(NotImplementedError, match=r"jax\.nn\.dot_product_attention"):
        jax.grad(lambda x: cpu.dot_product_attention(x, x, x).sum())(x)
    with pytest.raises(ValueError, match=r"no use for query float32\[1, 3, 2, 8\], key float32\[1, 3, 2, 4\]"):
        cpu.dot_product_attention(x, x[..., :4], x[..., :4])
    with pytest.raises(ValueError, match=r"bias float32\[1, 3, 1, 3\]"):
        cpu.dot_product_attention(x, x, x, jnp.zeros((1, 3, 1, 3)))
    wide = normal(0, 1, 3, 2, 264)  # on XLA
    np.testing.assert_allclose(
        cpu.dot_product_attention(wide, wide, wide), jax.nn.dot_product_attention(wide, wide, wide), atol=1e-5
    )
