"""The keys and values that a decoder keeps of earlier tokens, in float or in int8.

A cache has a fixed size, so that every decoding step is the same compiled program, and counts how much of it is in
use. Sequence and head are one axis: with an axis of length 1 before the heads, XLA's CPU backend (jaxlib 0.10) copies
the whole cache four times to write a token, and without it writes into the donated cache itself. In int8 each token's
key and value of a head has a scale of its own (absmax), which stays out of the matmuls: q . (s k) = s (q . k), and
sum_t p_t (s_t v_t) = sum_t (p_t s_t) v_t.

>>> import jax.numpy as jnp
>>> cache = KVCache.empty(layers=1, batch=1, size=16, heads=2, head_dim=4, dtype="int8")
>>> layer = cache.layers[0].write(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), cache.length)
>>> layer.keys.qvalue.dtype, layer.keys.scale.shape
(dtype('int8'), (2, 16, 1))
"""

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src.core import qarray
from qwix._src.core.pytree import array_structure
from qwix.cpu import native

# One scale for each token of a head: axes of (batch * heads, size, head_dim).
_HOW = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0, 1))

Cached = jax.Array | qarray.QArray


@array_structure
class LayerCache:
    """Keys and values of one layer, (batch * heads, size, head_dim): float arrays or int8 QArrays."""

    keys: Cached
    values: Cached

    def write(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> "LayerCache":
        """A cache with those of new tokens, (batch * heads, tokens, head_dim), at `start` and after it."""
        return LayerCache(_write(self.keys, keys, start), _write(self.values, values, start))

    def read(self, size: int) -> "LayerCache":
        """The first `size` tokens."""
        return self if size == self.keys.shape[1] else jax.tree.map(lambda array: array[:, :size], self)


@array_structure
class KVCache:
    """The caches of all layers.

    Attributes:
      layers: a `LayerCache` each.
      length: () int32, how many tokens are in use.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array

    @classmethod
    def empty(
        cls, *, layers: int, batch: int, size: int, heads: int, head_dim: int, dtype: str | np.dtype = "float32"
    ) -> "KVCache":
        """A cache for `size` tokens; `dtype` is a float type or int8."""
        dtype = np.dtype(dtype)
        shape = (batch * heads, size, head_dim)

        def part() -> Cached:
            if dtype == np.int8:
                return qarray.QArray(jnp.zeros(shape, jnp.int8), jnp.ones((*shape[:-1], 1), jnp.float32))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"a cache of {dtype} is not supported: use a float type or int8")
            return jnp.zeros(shape, dtype)

        return cls(tuple(LayerCache(part(), part()) for _ in range(layers)), jnp.zeros((), jnp.int32))

    @property
    def size(self) -> int:
        """The number of tokens that it can hold."""
        return self.layers[0].keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self))


def scores(query: jax.Array, keys: Cached) -> jax.Array:
    """Products of queries (batch * heads, queries, head_dim) with keys: (batch * heads, queries, keys)."""
    if not isinstance(keys, qarray.QArray):
        return jnp.einsum("hqd,hkd->hqk", query, keys.astype(query.dtype))
    products = jnp.einsum("hqd,hkd->hqk", query, keys.qvalue.astype(query.dtype))
    return products * keys.scale.astype(query.dtype).swapaxes(1, 2)


def mix(weights: jax.Array, values: Cached) -> jax.Array:
    """Sums of values weighted by (batch * heads, queries, keys): (batch * heads, queries, head_dim)."""
    if not isinstance(values, qarray.QArray):
        return jnp.einsum("hqk,hkd->hqd", weights, values.astype(weights.dtype))
    weights = weights * values.scale.astype(weights.dtype).swapaxes(1, 2)
    return jnp.einsum("hqk,hkd->hqd", weights, values.qvalue.astype(weights.dtype))


def attend(query: jax.Array, cache: LayerCache, used: jax.Array) -> jax.Array:
    """softmax(query . keys / sqrt(head_dim)) values, of one new token and the first `used` of a cache.

    By a native kernel where there is one (`qwix.cpu`): XLA's CPU backend goes over the whole cache, in several passes.

    Args:
      query: (batch * heads, queries, head_dim), the queries that share a head of keys.
      cache: with the new token.
      used: () int32, at least 1.

    Returns:
      (batch * heads, queries, head_dim).
    """
    if not native.is_available() or query.dtype == jnp.float64:
        return _attend(query, cache, used)
    return jax.lax.platform_dependent(query, cache, used, cpu=_attend_natively, default=_attend)


def _attend(query: jax.Array, cache: LayerCache, used: jax.Array) -> jax.Array:
    products = scores(query, cache.keys) / np.sqrt(query.shape[-1])
    products = jnp.where(jnp.arange(cache.keys.shape[1]) < used, products, jnp.finfo(products.dtype).min)
    return mix(jax.nn.softmax(products), cache.values).astype(query.dtype)


def _attend_natively(query: jax.Array, cache: LayerCache, used: jax.Array) -> jax.Array:
    def parts(cached: Cached) -> tuple[jax.Array, jax.Array | None]:
        return (
            (cached.qvalue, cached.scale.astype(jnp.float32)) if isinstance(cached, qarray.QArray) else (cached, None)
        )

    (keys, key_scale), (values, value_scale) = parts(cache.keys), parts(cache.values)
    scale = query.shape[-1] ** -0.5
    out = native.attend(query.astype(jnp.float32), keys, key_scale, values, value_scale, used, scale=scale)
    return out.astype(query.dtype)


def _write(cached: Cached, new: jax.Array, start: jax.Array) -> Cached:
    if isinstance(cached, qarray.QArray):
        quantized = qarray.quantize(new.astype(cached.dtype), _HOW)
        return cached.replace(
            qvalue=jax.lax.dynamic_update_slice_in_dim(cached.qvalue, quantized.qvalue, start, axis=1),
            scale=jax.lax.dynamic_update_slice_in_dim(cached.scale, quantized.scale, start, axis=1),
        )
    return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), start, axis=1)
