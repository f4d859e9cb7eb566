"""Adapters in peft's layout, against logits that peft computed (`data/make_peft_reference.py`)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
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


class Mixer(nn.Module):
    """An embedding and two layers, one of which has a kernel of three axes."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 6, name="embed")(ids)
        x = nn.DenseGeneral((2, 4), name="split")(x)
        return nn.Dense(3, name="out")(x.reshape(*x.shape[:-2], 8))


@pytest.mark.parametrize("use_dora", [False, True])
def test_linen(use_dora, tmp_path):
    ids = jnp.array([[1, 4, 2]])
    provider = qwix.LoraProvider(rank=2, alpha=3.0, use_dora=use_dora)
    if not use_dora:
        provider = qwix.LoraProvider([qwix.LoraRule(rank=2, alpha=3.0, op_names=("dot_general", "einsum", "take"))])
    model = qwix.apply_lora_to_model(Mixer(), provider)
    key = jax.random.key(0)
    params = qwix.init_lora_params(model, Mixer().init(key, ids)["params"], key, ids)
    adapter = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), qwix.lora_params(params))
    params = qwix.set_adapter(model, "cosine", params, {"cosine": adapter})
    peft.save(model, tmp_path, params=params)
    tensors = read_tensors(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors["base_model.model.out.lora_A.weight"], adapter["out"]["kernel_lora_a"].T)
    split = tensors["base_model.model.split.lora_B.weight"]
    np.testing.assert_array_equal(split, adapter["split"]["kernel_lora_b"].reshape(2, 8).T)
    assert ("base_model.model.embed.lora_embedding_A" in tensors) != use_dora
    loaded = peft.load(model, tmp_path, params=params)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    # Another scaling than that of the model is in B.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6.0}))
    twice = peft.load(model, tmp_path, params=params)
    np.testing.assert_allclose(twice["out"]["kernel_lora_b"], 2 * adapter["out"]["kernel_lora_b"])
    np.testing.assert_array_equal(twice["out"]["kernel_lora_a"], adapter["out"]["kernel_lora_a"])


def test_a_linen_model_needs_its_parameters(tmp_path):
    model = qwix.apply_lora_to_model(nn.Dense(3), qwix.LoraProvider(rank=1, alpha=1.0))
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    with pytest.raises(ValueError, match="params is needed"):
        peft.save(model, tmp_path)
    with pytest.raises(ValueError, match="has no name, not 'french'"):
        peft.save(model, tmp_path, "french", params=params)
    with pytest.raises(ValueError, match="has no adapter ''; it has none in params"):
        peft.save(model, tmp_path, params={"kernel": params["kernel"]})
