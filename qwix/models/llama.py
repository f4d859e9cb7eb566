"""Llama-family language models in Flax NNX (SmolLM2, TinyLlama, Llama 2 and their kin).

Touvron et al., arXiv 2302.13971, section 2.2, with grouped-query attention (Ainslie et al., arXiv 2305.13245):

    x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))      n = attn_norm(x)
    x = x + down_proj(silu(gate_proj(m)) * up_proj(m))                          m = mlp_norm(x)

with RMSNorm and without biases; the logits are those of `lm_head`, or of the embedding table where both are tied.
RoPE (Su et al., arXiv 2104.09864) turns the pair (x_i, x_{i + d/2}) of a head of width d by position times
theta^(-2 i / d).

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> config = LlamaConfig(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
...                      num_attention_heads=4, num_key_value_heads=2)
>>> model = Llama(config, rngs=nnx.Rngs(0))
>>> model(jnp.array([[2, 7, 9]])).shape
(1, 3, 30)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix.models import kv_cache
from qwix.models.kv_cache import KVCache, LayerCache


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama model, named as in a Hugging Face `config.json`.

    Attributes:
      head_dim: width of a head; None means hidden_size / num_attention_heads.
      rope_factors: what each of the head_dim / 2 frequencies of RoPE is divided by; empty for none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] = ()
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.head_dim is None and type(self.hidden_size) is type(self.num_attention_heads) is int:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("rope_factors", "tie_word_embeddings"):
                continue
            kinds = (int, float) if field.type is float else (int,)
            if type(value) not in kinds or value <= 0:
                raise ValueError(f"{field.name} cannot be {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.width_of_head % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and RoPE turns pairs")
        if self.rope_factors and len(self.rope_factors) != self.width_of_head // 2:
            raise ValueError(
                f"there are {len(self.rope_factors)} rope_factors for {self.width_of_head // 2} frequencies"
            )

    @property
    def width_of_head(self) -> int:
        """`head_dim`, which is never None once a configuration is made."""
        assert self.head_dim is not None
        return self.head_dim


class Attention(nnx.Module):
    """Causal self-attention, with fewer heads for keys and values than for queries."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.width_of_head
        width, inner, kv_inner = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.k_proj = nnx.Linear(width, kv_inner, use_bias=False, rngs=rngs)
        self.v_proj = nnx.Linear(width, kv_inner, use_bias=False, rngs=rngs)
        self.o_proj = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], mask: jax.Array, cache: LayerCache | None, start: Any
    ) -> tuple[jax.Array, LayerCache | None]:
        """The output, and the cache with this call's keys and values.

        Args:
          x: (batch, tokens, width).
          rotation: cosines and sines of `rope_rotation` for these tokens.
          mask: (tokens, keys), true where a token may look at a key.
          cache: earlier keys and values; None to look at this call's alone.
          start: where in the cache this call's tokens go.
        """
        batch, length, _ = x.shape

        def heads(y: jax.Array, count: int) -> jax.Array:
            return y.reshape(batch, length, count, self.head_dim).swapaxes(1, 2).reshape(-1, length, self.head_dim)

        query = rotate(heads(self.q_proj(x), self.heads), rotation)
        keys = rotate(heads(self.k_proj(x), self.kv_heads), rotation)
        values = heads(self.v_proj(x), self.kv_heads)
        cache = cache and cache.write(keys, values, start)
        # Query heads that share a key head are further queries of it: (batch * kv_heads, group * tokens, head_dim).
        group = self.heads // self.kv_heads
        query = query.reshape(batch * self.kv_heads, group * length, self.head_dim)
        if cache and length == 1:
            mixed = kv_cache.attend(query, cache, start + 1)
        else:
            seen = cache.read(mask.shape[1]) if cache else LayerCache(keys, values)
            scores = kv_cache.scores(query, seen.keys) / np.sqrt(self.head_dim)
            scores = scores.reshape(batch * self.kv_heads, group, length, -1)
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
            weights = jax.nn.softmax(scores).reshape(batch * self.kv_heads, group * length, -1)
            mixed = kv_cache.mix(weights, seen.values)
        mixed = mixed.reshape(batch, self.heads, length, self.head_dim).swapaxes(1, 2)
        return self.o_proj(mixed.reshape(batch, length, -1)), cache


class Mlp(nnx.Module):
    """The gated perceptron, SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nnx.Module):
    """Attention and a gated perceptron, each with a norm before it and a residual around both."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.attn_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x: jax.Array, *args: Any) -> tuple[jax.Array, LayerCache | None]:
        mixed, cache = self.attn(self.attn_norm(x), *args)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """A Llama language model: token ids to the logits of the next token."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([LlamaLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        cache: KVCache | None = None,
        *,
        read: int | None = None,
        position: jax.Array | None = None,
    ) -> Any:
        """The logits of what follows each token.

        Args:
          input_ids: (batch, tokens) token ids.
          cache: what earlier calls left; the tokens come after those in it. None starts anew.
          read: with a cache, look only at its first `read` tokens, of which there may not be more in use after this
            call; None for all. (A prompt is far shorter than a cache.)
          position: () the one token whose logits are wanted; None for all.

        Returns:
          (batch, tokens, vocab_size) logits, or (batch, 1, vocab_size) with `position`; given a cache, a pair of them
          and the cache that has these tokens as well.
        """
        length = input_ids.shape[1]
        start: Any = 0 if cache is None else cache.length
        positions = start + jnp.arange(length)
        keys = length if cache is None else read or cache.size
        mask = positions[:, None] >= jnp.arange(keys)
        rotation = rope_rotation(self.config, positions)
        x = self.embed_tokens(input_ids)
        layers: list[Any] = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, rotation, mask, cache and cache.layers[i], start)
            layers.append(layer_cache)
        if position is not None:
            x = jax.lax.dynamic_slice_in_dim(x, position, 1, axis=1)
        x = self.norm(x)
        logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits if cache is None else (logits, KVCache(tuple(layers), start + length))

    def empty_cache(self, batch: int, size: int, dtype: str | np.dtype = "float32") -> KVCache:
        """A cache for this model; see `KVCache.empty`."""
        config = self.config
        return KVCache.empty(
            layers=config.num_hidden_layers,
            batch=batch,
            size=size,
            heads=config.num_key_value_heads,
            head_dim=config.width_of_head,
            dtype=dtype,
        )


def rope_rotation(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (tokens, head_dim / 2) each, of the angles that RoPE turns tokens at `positions` by."""
    half = config.width_of_head // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_factors:
        frequencies = frequencies / np.asarray(config.rope_factors)
    angles = positions[:, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x_i, x_{i + d/2}) of the last axis of (..., tokens, d)."""
    cos, sin = (part.astype(x.dtype) for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
