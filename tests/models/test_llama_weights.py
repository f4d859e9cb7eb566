import gc
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix.interop.safetensors import CheckpointError, write_tensors
from qwix.models import llama_weights
from qwix.recipes import get_recipe
from tests.interop import gguf_writer
from tests.models import llama_files


@pytest.fixture(scope="module")
def weights():
    return llama_files.tensors()


def state(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], **{"rtol": 0, **tolerance}, err_msg=str(path))


def test_both_formats_give_the_same_model(weights, tmp_path):
    from_directory = llama_weights.load(llama_files.write_hugging_face(tmp_path / "hf", weights))
    from_file = llama_weights.load(llama_files.write_gguf(tmp_path / "m.gguf", weights))
    assert from_file.config.rms_norm_eps == pytest.approx(from_directory.config.rms_norm_eps)
    assert_same(state(from_file), state(from_directory), atol=0)
    kernel = from_file.layers[1].attn.q_proj.kernel[...]
    np.testing.assert_array_equal(kernel, weights["model.layers.1.self_attn.q_proj.weight"].T)


def test_quantized_tensors_are_dequantized(weights, tmp_path):
    kinds = {"blk.0.attn_q.weight": gguf_writer.Q4_1, "blk.1.ffn_down.weight": gguf_writer.Q8_0}
    kinds["token_embd.weight"] = gguf_writer.Q4_0
    exact = llama_weights.load(llama_files.write_gguf(tmp_path / "exact.gguf", weights))
    rounded = llama_weights.load(llama_files.write_gguf(tmp_path / "rounded.gguf", weights, kinds))
    assert_same(state(rounded), state(exact), atol=0.13)
    changed = {path for path, value in state(rounded).items() if not np.array_equal(value, state(exact)[path])}
    assert {"/".join(map(str, path)) for path in changed} == {
        "layers/0/attn/q_proj/kernel",
        "layers/1/mlp/down_proj/kernel",
        "embed_tokens/embedding",
    }


def test_an_output_layer_of_its_own(tmp_path):
    weights = llama_files.tensors(tied=False)
    from_directory = llama_weights.load(
        llama_files.write_hugging_face(tmp_path / "hf", weights, tie_word_embeddings=False)
    )
    from_file = llama_weights.load(llama_files.write_gguf(tmp_path / "m.gguf", weights))
    assert not from_file.config.tie_word_embeddings
    assert_same(state(from_file), state(from_directory), atol=0)


def test_shards_and_half_precision(weights, tmp_path):
    directory = llama_files.write_hugging_face(tmp_path, weights)
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    half = {name: weights[name].astype(ml_dtypes.bfloat16) for name in names}
    write_tensors(directory / "a.safetensors", {name: half[name] for name in names[::2]})
    write_tensors(directory / "b.safetensors", {name: half[name] for name in names[1::2]})
    index = {name: ("a.safetensors", "b.safetensors")[i % 2] for i, name in enumerate(names)}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    model = llama_weights.load(directory)
    kernel = half["model.layers.0.mlp.up_proj.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(model.layers[0].mlp.up_proj.kernel[...], kernel)
    (directory / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be read"):
        llama_weights.load(directory)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        llama_weights.load(directory)


def test_a_file_is_found_in_its_directory(weights, tmp_path):
    path = llama_files.write_gguf(tmp_path / "m.gguf", weights)
    assert llama_weights.find(tmp_path) == llama_weights.find(path) == path
    path.rename(tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"holds no config\.json and 0 GGUF files"):
        llama_weights.load(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no such file or directory"):
        llama_weights.load(tmp_path / "nowhere")


def _missing(weights):
    return {name: value for name, value in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}


def _wrong_shape(weights):
    return weights | {"model.layers.0.mlp.up_proj.weight": np.zeros((30, 64), np.float32)}


def _nan(weights):
    return weights | {"model.norm.weight": np.full(64, np.nan, np.float32)}


def _too_many(weights):
    return weights | {"model.layers.2.input_layernorm.weight": np.zeros(64, np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing, r"(mlp\.up_proj|blk\.1\.ffn_up)\.weight' is missing"),
        (_wrong_shape, r"layers/0/mlp/up_proj/kernel has shape \(30, 64\).*\(96, 64\)"),
        (_nan, "norm/scale holds NaN"),
        (_too_many, "1 tensors have no place in this model"),
    ],
)
@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_wrong_tensors_are_named(weights, tmp_path, change, message, kind):
    write = llama_files.write_gguf if kind == "gguf" else llama_files.write_hugging_face
    path = write(tmp_path / kind, change(weights))
    with pytest.raises(CheckpointError, match=message):
        llama_weights.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"general.architecture": "gpt2"}, "general.architecture is 'gpt2'"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.rope.dimension_count": 8}, "RoPE turns 8 of 16"),
        ({"llama.block_count": 0}, "num_hidden_layers cannot be 0"),
        ({"llama.block_count": 3}, r"'blk\.2\.\w+\.weight' is missing"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.head_count": [4, 4]}, "num_attention_heads cannot be"),
    ],
)
def test_files_of_other_models_are_named(weights, tmp_path, settings, message):
    path = llama_files.write_gguf(tmp_path / "m.gguf", weights, **settings)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*{message}"):
        llama_weights.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"num_attention_heads": None}, "num_attention_heads cannot be None"),
        ({"intermediate_size": 95}, r"\(64, 96\), and the configuration asks for \(64, 95\)"),
    ],
)
def test_wrong_configurations_are_named(weights, tmp_path, settings, message):
    directory = llama_files.write_hugging_face(tmp_path, weights, **settings)
    with pytest.raises(CheckpointError, match=message):
        llama_weights.load(directory)


def test_both_ways_to_write_the_base_of_rope():
    new = llama_files.CONFIG | {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert llama_weights.config_from_dict(new).rope_theta == 7.0
    assert llama_weights.config_from_dict(llama_files.CONFIG).rope_theta == 500.0
    with pytest.raises(ValueError, match="vocab_size missing"):
        llama_weights.config_from_dict({k: v for k, v in new.items() if k != "vocab_size"})


def test_weights_are_quantized_one_by_one(weights, tmp_path):
    """The model is that of `apply_recipe`, and nothing of it is left in float but what it holds."""
    path = llama_files.write_gguf(tmp_path / "m.gguf", weights)
    before = jax.live_arrays()  # alive while this list is, so that no new array has the id of one of them
    model = llama_weights.load(path, get_recipe("int4-g32"))
    gc.collect()
    known = {id(array) for array in before}
    alive = [array for array in jax.live_arrays() if id(array) not in known]
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(array.nbytes for array in alive) == sum(leaf.nbytes for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves if leaf.dtype == jnp.int4) > 60_000
    whole, _ = qwix.apply_recipe(llama_weights.load(path), "int4-g32", jnp.ones((1, 8), jnp.int32))
    ids = jnp.array([[3, 41, 7]])
    np.testing.assert_array_equal(nnx.jit(lambda m: m(ids))(model), nnx.jit(lambda m: m(ids))(whole))
    for ours, theirs in zip(leaves, jax.tree.leaves(nnx.state(whole)), strict=True):
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))
    with pytest.raises(ValueError, match="'gptq-int4-g128' needs the whole model"):
        llama_weights.load(path, get_recipe("gptq-int4-g128"))
