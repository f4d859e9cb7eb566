"""Llama weights from where they come: a GGUF file, or a Hugging Face directory.

Both say the same in other words. Tensors have other names, a linear layer is (out, in) and not (in, out), and
llama.cpp's RoPE turns the pairs (x_{2 i}, x_{2 i + 1}) where Hugging Face's turns (x_i, x_{i + d/2}), so a GGUF file
has the rows of a head of `q_proj` and `k_proj` in another order.

>>> gguf_name(("layers", 3, "attn", "q_proj", "kernel"))
'blk.3.attn_q.weight'
>>> hugging_face_name(("layers", 3, "attn", "q_proj", "kernel"))
'model.layers.3.self_attn.q_proj.weight'
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix import applying
from qwix._src.providers.quantized_param import Replacement
from qwix._src.providers.with_aux import WithAux
from qwix._src.utils import flax_util
from qwix.interop import gguf
from qwix.interop.safetensors import CheckpointError, read_tensors
from qwix.models.llama import Llama, LlamaConfig
from qwix.recipes import Recipe

# module path in a layer -> (name in a GGUF file, in a Hugging Face checkpoint).
_IN_LAYER = {
    ("attn_norm",): ("attn_norm", "input_layernorm"),
    ("attn", "q_proj"): ("attn_q", "self_attn.q_proj"),
    ("attn", "k_proj"): ("attn_k", "self_attn.k_proj"),
    ("attn", "v_proj"): ("attn_v", "self_attn.v_proj"),
    ("attn", "o_proj"): ("attn_output", "self_attn.o_proj"),
    ("mlp_norm",): ("ffn_norm", "post_attention_layernorm"),
    ("mlp", "gate_proj"): ("ffn_gate", "mlp.gate_proj"),
    ("mlp", "up_proj"): ("ffn_up", "mlp.up_proj"),
    ("mlp", "down_proj"): ("ffn_down", "mlp.down_proj"),
}
_OUTSIDE = {
    "embed_tokens": ("token_embd", "model.embed_tokens"),
    "norm": ("output_norm", "model.norm"),
    "lm_head": ("output", "lm_head"),
}

# GGUF tensors that hold no weight: the factors of RoPE's frequencies are part of the configuration.
_ROPE_FACTORS = "rope_freqs.weight"

Path = Sequence[Any]


def gguf_name(path: Path) -> str:
    """The name in a GGUF file of the parameter at `path` of a `Llama`."""
    if path[0] != "layers":
        return f"{_OUTSIDE[path[0]][0]}.weight"
    return f"blk.{path[1]}.{_IN_LAYER[tuple(path[2:-1])][0]}.weight"


def hugging_face_name(path: Path) -> str:
    """The name in a Hugging Face checkpoint of the parameter at `path` of a `Llama`."""
    if path[0] != "layers":
        return f"{_OUTSIDE[path[0]][1]}.weight"
    return f"model.layers.{path[1]}.{_IN_LAYER[tuple(path[2:-1])][1]}.weight"


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """The GGUF file that `path` is or, as a directory, holds; else the Hugging Face directory that it is.

    Raises:
      CheckpointError: it is none of them.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_file() or (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(
            f"{path}: holds no config.json and {len(files)} GGUF files: name the file or the directory"
        )
    return files[0]


def load(path: str | os.PathLike[str], recipe: Recipe | None = None) -> Llama:
    """Loads a Llama from a GGUF file or a Hugging Face directory; see `find`.

    Args:
      path: the file or directory.
      recipe: one that `goes_by_tensor`: the model is what `qwix.apply_recipe` makes of the float one, and each weight
        is quantized as soon as it is read, so that the model is never there in float. None: float32.

    Raises:
      CheckpointError: a file is missing, truncated or of another architecture; a tensor is missing, has another shape,
        is no float, holds NaN or infinity, or has no place in the model.
      RecipeError: the recipe does not fit the model.
      ValueError: the recipe needs the whole model.
    """
    path = find(path)
    return load_gguf(gguf.read(path), recipe) if path.is_file() else _load_hugging_face(path, recipe)


def goes_by_tensor(recipe: Recipe) -> bool:
    """Whether a recipe quantizes each weight by itself: round-to-nearest, and nothing before it.

    >>> from qwix.recipes import get_recipe
    >>> [goes_by_tensor(get_recipe(name)) for name in ("int4-g32", "gptq-int4-g128", "rotate-int8")]
    [True, False, False]
    """
    return [stage["method"] for stage in recipe.stages] == ["round-to-nearest"]


def load_gguf(file: gguf.File, recipe: Recipe | None = None) -> Llama:
    """`load` for a GGUF file that is open already."""
    config = config_from_gguf(file)
    names = set(file.tensors) - {_ROPE_FACTORS}

    def take(path: Path) -> np.ndarray:
        name = gguf_name(path)
        if name not in names:
            raise CheckpointError(f"{file.path}: tensor {name!r} is missing")
        names.remove(name)
        value = gguf.to_float(file.tensors[name])
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path[-2])
        return value if heads is None else _unpermute(value, heads)

    return _fill(config, take, names, file.path, recipe)


def _unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows (2 i, 2 i + 1) of each head to (i, i + d / 2)."""
    rows, columns = value.shape
    if rows % (2 * heads):
        return value  # The wrong shape, which is told to the user a few lines on.
    return value.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(value.shape)


def config_from_gguf(file: gguf.File) -> LlamaConfig:
    """The sizes in the metadata of a GGUF file.

    Raises:
      CheckpointError: it is another architecture, or a size is missing or wrong.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: general.architecture is {architecture!r}, and only 'llama' is known")
    keys = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    values: dict[str, Any] = {name: metadata.get(f"llama.{key}") for name, key in keys.items()}
    missing = [f"llama.{keys[name]}" for name, value in values.items() if value is None]
    embedding = file.tensors.get("token_embd.weight")
    if missing or embedding is None:
        raise CheckpointError(f"{file.path}: {', '.join(missing) or 'token_embd.weight'} missing")
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise CheckpointError(f"{file.path}: llama.rope.scaling.type {scaling!r} is not supported, only 'none'")
    if metadata.get("llama.expert_count", 0):
        raise CheckpointError(f"{file.path}: a mixture of experts is not supported")
    factors = file.tensors.get(_ROPE_FACTORS)
    try:
        config = LlamaConfig(
            **values,
            vocab_size=embedding.shape[0],
            num_key_value_heads=metadata.get("llama.attention.head_count_kv", values["num_attention_heads"]),
            head_dim=metadata.get("llama.attention.key_length"),
            rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
            rope_factors=() if factors is None else tuple(gguf.to_float(factors).tolist()),
            tie_word_embeddings="output.weight" not in file.tensors,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if (turned := metadata.get("llama.rope.dimension_count", config.head_dim)) != config.head_dim:
        raise CheckpointError(f"{file.path}: RoPE turns {turned} of {config.head_dim} elements, which is not supported")
    return config


def config_from_dict(settings: Mapping[str, Any]) -> LlamaConfig:
    """The configuration in a parsed `config.json`; settings that do not matter here are left.

    Raises:
      ValueError: it describes another architecture, or a size is missing or wrong.
    """
    if settings.get("model_type", "llama") != "llama":
        raise ValueError(f"model_type is {settings['model_type']!r}, and only 'llama' is known")
    for name, known in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if settings.get(name, known) != known:
            raise ValueError(f"{name} {settings[name]!r} is not supported, only {known!r}")
    # The version 5 of transformers writes rope_parameters, earlier ones rope_theta and rope_scaling.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} is not supported, only 'default'")
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if missing := [name for name in names if name not in settings]:
        raise ValueError(f"{', '.join(missing)} missing")
    names += ["head_dim", "max_position_embeddings", "rms_norm_eps"]
    return LlamaConfig(
        **{name: settings[name] for name in names if name in settings},
        num_key_value_heads=settings.get("num_key_value_heads", settings["num_attention_heads"]),
        rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
    )


def _load_hugging_face(directory: pathlib.Path, recipe: Recipe | None) -> Llama:
    path = directory / "config.json"
    try:
        config = config_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    path = directory / "model.safetensors"
    tensors = _read_shards(directory) if not path.exists() else read_tensors(path)
    names = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        names.discard("lm_head.weight")  # Some writers store the table twice.

    def take(parameter: Path) -> np.ndarray:
        name = hugging_face_name(parameter)
        if name not in names:
            raise CheckpointError(f"{path}: tensor {name!r} is missing")
        names.remove(name)
        value = tensors.pop(name)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise CheckpointError(f"{path}: tensor {name!r} is {value.dtype}, not a float array")
        return value.astype(np.float32)

    return _fill(config, take, names, path, recipe)


def _read_shards(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of the files that `model.safetensors.index.json` lists."""
    path = directory / "model.safetensors.index.json"
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except OSError as error:
        raise CheckpointError(f"{directory / 'model.safetensors'}: no such file, and no index of shards") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error})") from error
    return {name: tensor for file in files for name, tensor in read_tensors(directory / file).items()}


def _fill(
    config: LlamaConfig,
    take: Callable[[Path], np.ndarray],
    names: set[str],
    path: pathlib.Path,
    recipe: Recipe | None,
) -> Llama:
    """A model whose parameters `take` gives by their path, as float32 and (out, in); it empties `names`."""
    if recipe is not None and not goes_by_tensor(recipe):
        raise ValueError(f"recipe {recipe.name!r} needs the whole model: load it in float and use qwix.apply_recipe")
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    parameters = nnx.to_flat_state(nnx.state(model))
    if recipe is not None:
        model = applying.template(model, recipe, jnp.ones((1, 8), jnp.int32))
    for parameter, variable in parameters:
        value = take(parameter)
        turned = parameter[-1] == "kernel"
        shape = variable.shape[::-1] if turned else variable.shape
        where = "/".join(map(str, parameter))
        if value.shape != shape:
            raise CheckpointError(f"{path}: {where} has shape {value.shape}, and the configuration asks for {shape}")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{path}: {where} holds NaN or infinity")
        filled: Any = variable.replace(jnp.asarray(value.T if turned else value))
        keys: Any = parameter[:-1]
        owner: Any = flax_util.get_value_from_path(model, keys)
        wanted = getattr(owner, str(parameter[-1]))
        if isinstance(wanted, WithAux):
            filled = Replacement(wanted.how, tuple(wanted.shape), tuple(variable.shape))(filled)
        setattr(owner, str(parameter[-1]), filled)
    if unknown := sorted(names):
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors have no place in this model, {unknown[0]!r} first: "
            "the configuration describes fewer layers, or this is not a plain Llama"
        )
    return model
