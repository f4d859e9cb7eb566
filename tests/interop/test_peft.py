"""Adapters in peft's layout, against logits that peft computed (`data/make_peft_reference.py`)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix.interop import peft
from qwix.interop.safetensors import CheckpointError, read_tensors, write_tensors
from qwix.models import llama_weights

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "peft_reference.json").read_text())
IDS = jnp.array([REFERENCE["ids"]])
RULES = {"module_path": r"layers/\d+/(attn/[qv]_proj|mlp/down_proj)", "rank": 1, "alpha": 1.0}


def draw(shapes, rename=lambda name: name):
    """The tensors of `make_peft_reference.draw`."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name in sorted(shapes, key=rename):
        values = rng.normal(0, 0.2, tuple(shapes[name])).astype(np.float32)
        tensors[name] = 1 + np.abs(values) if "norm" in name or "magnitude" in name else values
    return tensors


def name_of_parameter(name):
    """The name that a saved tensor has in a `PeftModel`, where each adapter has a name."""
    return name.replace(".weight", ".default.weight") if "lora_A" in name or "lora_B" in name else name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(REFERENCE["config"]))
    write_tensors(directory / "model.safetensors", draw(REFERENCE["shapes"]))
    return llama_weights.load(directory)


@pytest.mark.parametrize("case", ["plain", "dora", "rslora"])
def test_adapter_of_peft(base, case, tmp_path):
    recorded = REFERENCE["cases"][case]
    tensors = draw(recorded["shapes"], name_of_parameter)
    (tmp_path / "adapter_config.json").write_text(json.dumps(recorded["config"]))
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    model = qwix.apply_lora_to_model(base, qwix.LoraProvider(**RULES), IDS, rngs=nnx.Rngs(0))
    peft.load(model, tmp_path, "loaded", rename=peft.hugging_face_llama)
    qwix.set_adapter(model, "loaded")
    np.testing.assert_allclose(model(IDS)[0, -1], recorded["logits"], atol=2e-5)
    np.testing.assert_allclose(qwix.merge_lora(model)(IDS)[0, -1], recorded["logits"], atol=2e-5)
    # What is saved is what peft saved, but for how it writes the scaling.
    peft.save(model, tmp_path / "again", "loaded", rename=peft.hugging_face_llama, task_type="CAUSAL_LM")
    saved = read_tensors(tmp_path / "again" / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor)
    peft.load(model, tmp_path / "again", "again", rename=peft.hugging_face_llama)
    qwix.set_adapter(model, "again")
    np.testing.assert_allclose(model(IDS)[0, -1], recorded["logits"], atol=2e-5)


def test_kernels_of_several_axes_and_embeddings(tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(10, 8, rngs=nnx.Rngs(0))
            self.split = nnx.LinearGeneral((8,), (2, 4), rngs=nnx.Rngs(1))

        def __call__(self, ids):
            return self.split(self.embed(ids))

    rules = {"rank": 2, "alpha": 2.0, "lora_b_initializer": nnx.initializers.normal(1.0)}
    provider = qwix.LoraProvider([qwix.LoraRule(op_names=("take", "dot_general"), **rules)])
    ids = jnp.array([1, 7])
    model = qwix.apply_lora_to_model(Model(), provider, ids, rngs=nnx.Rngs(2))
    peft.save(model, tmp_path)
    shapes = {k.removeprefix("base_model.model."): v.shape for k, v in read_tensors(tmp_path / peft._WEIGHTS).items()}
    assert shapes == {
        "embed.lora_embedding_A": (2, 10),
        "embed.lora_embedding_B": (8, 2),
        "split.lora_A.weight": (2, 8),
        "split.lora_B.weight": (8, 2),
    }
    expected = model(ids)
    other = qwix.apply_lora_to_model(Model(), provider, ids, rngs=nnx.Rngs(3))
    peft.load(other, tmp_path, "loaded")
    qwix.set_adapter(other, "loaded")
    np.testing.assert_allclose(other(ids), expected, atol=1e-5)


def test_what_cannot_be_saved_or_loaded(tmp_path):
    def lora(model, x):
        return qwix.apply_lora_to_model(model, qwix.LoraProvider(rank=2, alpha=2.0), x, rngs=nnx.Rngs(0))

    linear = lora(nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="no adapter 'other'"):
        peft.save(linear, tmp_path, "other")
    conv = lora(nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)), jnp.ones((1, 8, 4)))
    with pytest.raises(ValueError, match="convolution"):
        peft.save(conv, tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        peft.load(linear, tmp_path, "x")
    peft.save(linear, tmp_path)
    with pytest.raises(CheckpointError, match="no adapter where"):
        peft.load(linear, tmp_path, "x", rename=lambda path: "elsewhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not the configuration"):
        peft.load(linear, tmp_path, "x")
