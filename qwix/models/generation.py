"""Text from a language model: one compiled call for the prompt, then one a token.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> from qwix.models.llama import Llama, LlamaConfig
>>> config = LlamaConfig(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
...                      num_attention_heads=4, num_key_value_heads=2)
>>> decoder = Decoder(Llama(config, rngs=nnx.Rngs(0)), size=16)
>>> len(list(decoder.generate([2, 7, 9], limit=4)))
4
"""

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix.models.llama import Llama

# Prompts are filled up to a multiple of this, so that prompts of about the same length share a compiled program.
PROMPT_STEP = 32


@dataclasses.dataclass
class Timing:
    """What a generation took, compilation not counted.

    Attributes:
      prompt_tokens: how long the prompt was.
      prompt_seconds: until its first new token.
      new_tokens: how many tokens came after that one.
      new_seconds: what they took, with what the caller did between them.
      compile_seconds: of both programs; 0 where they were there already.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0
    compile_seconds: float = 0.0


def choose(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws tokens from softmax(logits / temperature), cut to the likeliest ones that together have `top_p`.

    Holtzman et al., arXiv 1904.09751, section 3.1: the smallest set of likeliest tokens whose probabilities sum up
    to at least `top_p`, renormalized. A temperature of 0 takes the likeliest.

    Args:
      logits: (batch, vocabulary).
      key: of `jax.random`.
      temperature: () not negative.
      top_p: () above 0; from 1 on nothing is cut.

    Returns:
      (batch,) int32.
    """

    def draw() -> jax.Array:
        scaled = logits.astype(jnp.float32) / temperature
        probabilities = jax.nn.softmax(scaled)
        ordered = jnp.sort(probabilities, axis=-1)[:, ::-1]
        # A token stays if those before it have less than top_p; the likeliest always does.
        kept = jnp.cumsum(ordered, axis=-1) - ordered < top_p
        least = jnp.min(jnp.where(kept, ordered, 2), axis=-1, keepdims=True)
        return jax.random.categorical(key, jnp.where(probabilities >= least, scaled, -jnp.inf)).astype(jnp.int32)

    # A branch and not a choice of two results: sorting a vocabulary takes milliseconds.
    return jax.lax.cond(temperature > 0, draw, lambda: logits.argmax(axis=-1).astype(jnp.int32))


class Decoder:
    """A model that generates, float or quantized, with a cache of fixed size.

    Args:
      model: a `Llama`, or what `qwix.apply_recipe` made of one.
      size: the most tokens of a prompt and what follows it.
      cache_dtype: of keys and values: a float type, or int8 with a scale for each token of a head.
    """

    def __init__(self, model: Llama, *, size: int, cache_dtype: str = "float32"):
        if size <= 0:
            raise ValueError(f"a cache for {size} tokens holds nothing")
        self.model, self.size, self.cache_dtype = model, size, cache_dtype
        self.timing = Timing()
        graphdef, state = nnx.split(model)
        # Flat lists of arrays, which a call need not take apart in Python for every token.
        self._state, tree = jax.tree.flatten(state)
        self._programs: dict[int, Any] = {}
        cache_tree = jax.tree.structure(model.empty_cache(1, 1, cache_dtype))

        def run(state: list[Any], cache: list[Any], ids: jax.Array, used: jax.Array, settings: Any) -> Any:
            """The next token, (1, 1), and the cache after the first `used` of the ids."""
            kept: Any = jax.tree.unflatten(cache_tree, cache)
            before, length = kept.length, ids.shape[1]
            # A prompt starts an empty cache and so looks at itself alone.
            read = length if length > 1 else None
            model = nnx.merge(graphdef, jax.tree.unflatten(tree, state))
            logits, kept = model(ids, kept, read=read, position=used - 1)
            key, temperature, top_p = settings
            key = jax.random.fold_in(jax.random.wrap_key_data(key), before + used)
            token = choose(logits[:, -1], key, temperature, top_p)
            return token[:, None], jax.tree.leaves(kept.replace(length=before + used))

        # Without the donation each step would copy the cache.
        self._run = jax.jit(run, donate_argnums=1)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        limit: int,
        stop: Collection[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yields new tokens, until one is in `stop` (which is not yielded), or `limit` is reached.

        `timing` says afterwards, and in between, how long it took.

        Raises:
          ValueError: the prompt is empty, does not fit into the cache with `limit` tokens after it, or a setting is out
            of range.
        """
        length = len(prompt)
        padded = min(-(-length // PROMPT_STEP) * PROMPT_STEP, self.size)
        if not length:
            raise ValueError("the prompt has no token to start from")
        if length + limit > self.size:
            raise ValueError(f"{length} tokens of prompt and {limit} new ones do not fit into a cache for {self.size}")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} has to be at least 0, and top_p {top_p} above 0 and at most 1")
        key = jax.random.key_data(jax.random.key(seed))
        settings = (key, jnp.float32(temperature), jnp.float32(top_p))
        cache = jax.tree.leaves(self.model.empty_cache(1, self.size, self.cache_dtype))
        one = jnp.int32(1)
        ids = np.zeros((1, padded), np.int32)
        ids[0, :length] = prompt
        first, step = (self._compiled(tokens, cache, settings) for tokens in (padded, 1))
        self.timing = Timing(prompt_tokens=length, compile_seconds=first[1] + step[1])
        start = time.perf_counter()
        token, cache = first[0](self._state, cache, ids, np.int32(length), settings)
        for count in range(limit):
            # The next step is on its way before this token is read: calling a program of hundreds of arrays takes
            # milliseconds, in which this one still runs. A stop token makes one step for nothing.
            following = None
            if count + 1 < limit:
                following, cache = step[0](self._state, cache, token, one, settings)
            last = token.item()
            seconds = time.perf_counter() - start
            if count:
                self.timing.new_tokens, self.timing.new_seconds = count, seconds - self.timing.prompt_seconds
            else:
                self.timing.prompt_seconds = seconds
            if last in stop:
                return
            yield last
            token = following

    def _compiled(self, tokens: int, cache: Any, settings: Any) -> tuple[Any, float]:
        """The program for so many tokens, and the seconds that compiling it took."""
        start = time.perf_counter()
        if tokens in self._programs:
            return self._programs[tokens], 0.0
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        used = jax.ShapeDtypeStruct((), jnp.int32)
        self._programs[tokens] = self._run.lower(self._state, cache, ids, used, settings).compile()
        return self._programs[tokens], time.perf_counter() - start
