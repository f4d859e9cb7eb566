import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwix.models import generation, llama_weights
from tests.models import llama_files

PROMPT = [3, 41, 7, 90, 12]
choose = jax.jit(generation.choose)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_weights.load(llama_files.write_gguf(tmp_path_factory.mktemp("g") / "m.gguf", llama_files.tensors()))


@pytest.fixture(scope="module")
def decoder(model):
    return generation.Decoder(model, size=48)


@pytest.fixture(scope="module")
def greedy():
    """The next ten tokens by the float64 formulas."""
    weights, ids = llama_files.tensors(), list(PROMPT)
    for _ in range(10):
        ids.append(int(llama_files.forward(weights, np.array(ids))[-1].argmax()))
    return ids[len(PROMPT) :]


def test_greedy_tokens_are_those_of_the_whole_forward_pass(decoder, greedy):
    assert list(decoder.generate(PROMPT, limit=10)) == greedy
    timing = decoder.timing
    assert (timing.prompt_tokens, timing.new_tokens) == (5, 9)
    assert timing.prompt_seconds > 0 and timing.new_seconds > 0 and timing.compile_seconds > 0


def test_a_second_text_starts_anew_and_compiles_nothing(decoder, greedy):
    longer = [*PROMPT, *greedy[:4]]
    assert list(decoder.generate(longer, limit=6)) == greedy[4:]
    assert decoder.timing.compile_seconds == 0


def test_a_stop_token_ends_the_text(decoder, greedy):
    cut = next(i for i in range(1, 10) if greedy[i] not in greedy[:i])
    assert list(decoder.generate(PROMPT, limit=10, stop=(greedy[cut],))) == greedy[:cut]


def test_an_int8_cache_follows_the_same_path(model, greedy):
    tokens = list(generation.Decoder(model, size=48, cache_dtype="int8").generate(PROMPT, limit=3))
    assert tokens[0] == greedy[0]
    assert len(tokens) == 3


def test_a_prompt_may_fill_the_cache(decoder):
    assert len(list(decoder.generate([1] * 46, limit=2))) == 2


def test_what_does_not_fit_is_an_error(decoder):
    with pytest.raises(ValueError, match="no token to start from"):
        next(decoder.generate([], limit=1))
    with pytest.raises(ValueError, match="5 tokens of prompt and 44 new ones do not fit into a cache for 48"):
        next(decoder.generate(PROMPT, limit=44))
    with pytest.raises(ValueError, match="temperature -1"):
        next(decoder.generate(PROMPT, limit=1, temperature=-1))
    with pytest.raises(ValueError, match=r"top_p 0.0"):
        next(decoder.generate(PROMPT, limit=1, top_p=0.0))


def test_a_seed_makes_a_text(decoder):
    first, second, third = (list(decoder.generate(PROMPT, limit=8, temperature=2.0, seed=s)) for s in (1, 1, 2))
    assert first == second != third


def test_tokens_are_drawn_by_their_probability():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.tile(jnp.asarray(probabilities, jnp.float32), (4000, 1)))

    def shares(temperature, top_p):
        drawn = choose(logits, jax.random.key(0), jnp.float32(temperature), jnp.float32(top_p))
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0, 1.0), probabilities, atol=0.03)
    np.testing.assert_allclose(shares(0.5, 1.0), probabilities**2 / (probabilities**2).sum(), atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.75), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_array_equal(shares(1.0, 0.4), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(0.0, 1.0), [1, 0, 0, 0])


def test_the_cache_is_donated(decoder):
    """A step may not copy the keys and values of all earlier tokens."""
    list(decoder.generate(PROMPT, limit=2))
    step = decoder._programs[1]
    held = jax.tree.leaves(nnx.state(decoder.model))
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.model.empty_cache(1, 48)))
    memory = step.memory_analysis()
    assert " copy(f32[2,48,16]" not in step.as_text()  # nor may XLA, to read what it has just written
    assert memory.temp_size_in_bytes < cache
    assert memory.alias_size_in_bytes >= cache - 4
    assert memory.argument_size_in_bytes < sum(leaf.nbytes for leaf in held) + cache + 1024
