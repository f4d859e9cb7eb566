"""Adapters in the layout of Hugging Face's `peft`: `adapter_model.safetensors` beside `adapter_config.json`.

A LoRA of a linear layer `model.layers.0.self_attn.q_proj` is two tensors there, transposed to what JAX has::

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      (rank, in features)     = Aᵀ
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight      (out features, rank)    = Bᵀ

with DoRA a third, `...lora_magnitude_vector` (out features,), and of an embedding `lora_embedding_A` (rank, entries)
and `lora_embedding_B` (width, rank). Kernels with several axes, such as (width, heads, head width), are matrices with
these flattened. What the module is called there is said by a function, `rename`, from the path of ours.

>>> import jax.numpy as jnp, pathlib, qwix, tempfile
>>> from flax import nnx
>>> x, rngs = jnp.ones((1, 8)), nnx.Rngs(0)
>>> provider = qwix.LoraProvider(rank=2, alpha=4.0)
>>> model = qwix.apply_lora_to_model(nnx.Sequential(nnx.Linear(8, 4, rngs=rngs)), provider, x, rngs=rngs)
>>> directory = pathlib.Path(tempfile.mkdtemp())
>>> save(model, directory)
>>> sorted(safetensors.read_tensors(directory / 'adapter_model.safetensors'))[0]
'base_model.model.layers.0.lora_A.weight'
>>> load(model, directory, 'saved')
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix._src import adapted_model
from qwix._src.providers import adapters
from qwix._src.providers.adapters import AdaptedWeight
from qwix._src.utils import flax_util
from qwix.interop import safetensors
from qwix.interop.safetensors import CheckpointError

Path = tuple[str | int, ...]

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def dotted(path: Path) -> str:
    """A module's path with dots, which is its name where both models have the same structure.

    >>> dotted(('layers', 0, 'q_proj'))
    'layers.0.q_proj'
    """
    return ".".join(map(str, path))


def hugging_face_llama(path: Path) -> str:
    """The name that a module of `qwix.models.llama.Llama` has in Hugging Face's `LlamaForCausalLM`.

    >>> hugging_face_llama(('layers', 0, 'attn', 'q_proj')), hugging_face_llama(('lm_head',))
    ('model.layers.0.self_attn.q_proj', 'lm_head')
    """
    name = dotted(path).replace(".attn.", ".self_attn.")
    return name if name == "lm_head" else f"model.{name}"


def save(
    model: nnx.Module,
    directory: str | os.PathLike[str],
    adapter: str = adapters.DEFAULT,
    *,
    rename: Callable[[Path], str] = dotted,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes an adapter of an NNX model as a directory that `peft.PeftModel.from_pretrained` reads.

    Args:
      model: the model.
      directory: is created if it is not there.
      adapter: name of the adapter.
      rename: path of one of our modules -> its name in the other model.
      base_model: name or path of the other model, for `adapter_config.json`.
      task_type: likewise, such as 'CAUSAL_LM'.

    Raises:
      ValueError: there is no such adapter, or `peft` has no form for one of its weights: a stack of layers, a
        convolution, a batched kernel.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    use_dora: set[bool] = set()
    dropouts: set[float] = set()
    for path, owner, name, weight in _weights(model, adapter):
        this = weight.adapter(adapter)
        assert this is not None
        module = rename(path)
        values = {part: flax_util.unbox(getattr(owner, this.attribute(name, part))) for part in this.parts}
        form = _Form.of(weight, values["a"].ndim, "/".join(map(str, (*path, name))))
        for part, value in values.items():
            key = _PREFIX + module + form.suffix(part)
            if key in tensors:
                raise ValueError(f"two weights would be saved as {key}: make `rename` tell them apart")
            tensors[key] = form.to_peft(part, np.asarray(value))
        ranks[module], alphas[module] = this.rank, this.scaling * this.rank
        use_dora.add(this.use_dora)
        dropouts.add(this.dropout)
    if not ranks:
        raise ValueError(
            f"{type(model).__name__} has no adapter {adapter!r}; it has {adapted_model.adapter_names(model)}"
        )
    if len(use_dora) > 1:
        raise ValueError("a directory of peft holds an adapter with DoRA or one without, not both")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {_anchored(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_anchored(m): a for m, a in alphas.items() if a != alpha},
        "lora_dropout": max(dropouts),
        "use_dora": use_dora.pop(),
        "use_rslora": False,  # the alphas are what LoRA divides by the rank
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write_tensors(directory / _WEIGHTS, tensors, {"format": "pt"})
    (directory / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _anchored(module: str) -> str:
    """A key of `rank_pattern`: a regular expression that matches the end of a module's name."""
    return "^" + re.escape(module)


def load(
    model: nnx.Module,
    directory: str | os.PathLike[str],
    adapter: str,
    *,
    rename: Callable[[Path], str] = dotted,
) -> None:
    """Puts an adapter that `save` or `peft` wrote into an NNX model, in place; `qwix.set_adapter` makes it act.

    Args:
      model: a model with adapters, which says where they can be: apply LoRA with rules that match the weights first.
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      adapter: the name that it gets.
      rename: as in `save`.

    Raises:
      CheckpointError: a file is missing or is no adapter of `peft`, or has a tensor that the model has no place for.
      ValueError: a tensor does not fit.
    """
    directory = pathlib.Path(directory)
    config = _read_config(directory / _CONFIG)
    tensors = safetensors.read_tensors(directory / _WEIGHTS)
    params: dict[Path, Any] = {}
    scalings: dict[tuple[Path, str], float] = {}
    for path, owner, name, weight in _weights(model, None):
        like = weight.adapters[0]
        ndim = flax_util.unbox(getattr(owner, like.attribute(name, "a"))).ndim
        module = rename(path)
        form = _Form.of(weight, ndim, "/".join(map(str, (*path, name))))
        for part in "abm":
            tensor = tensors.pop(_PREFIX + module + form.suffix(part), None)
            if tensor is not None:
                params[(*path, f"{name}_lora_{part}")] = jnp.asarray(form.from_peft(part, tensor))
                if part == "a":
                    rank = tensor.shape[0]
                    alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
                    scalings[path, name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if tensors:
        raise CheckpointError(
            f"{directory / _WEIGHTS}: the model has no adapter where {min(tensors)} belongs ({len(tensors)} such "
            "tensors): apply LoRA with rules that match these weights, or pass another `rename`"
        )
    adapted_model.add_adapter(model, adapter, _nested(params), scalings=scalings)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise CheckpointError(f"{path}: not the configuration of a LoRA adapter")
    return config


def _pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """What `peft` reads off `alpha_pattern`: the value of the first key that matches the end of the module's name."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _nested(flat: dict[Path, Any]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for path, value in flat.items():
        node = result
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return result


def _weights(model: nnx.Module, adapter: str | None) -> Iterator[tuple[Path, Any, str, AdaptedWeight]]:
    for path, owner, name, weight in adapters.adapted_weights(model):
        if adapter is None or weight.adapter(adapter) is not None:
            yield path, owner, name, weight


class _Form:
    """How the A, B and magnitude of one weight stand in a file: transposed matrices."""

    def __init__(self, weight: AdaptedWeight):
        self._is_embedding = weight.op == "take"
        self._factors = weight.factors

    @classmethod
    def of(cls, weight: AdaptedWeight, a_ndim: int, where: str) -> _Form:
        """Raises ValueError where `peft` has no form for it."""
        if a_ndim != len(weight.factors.a):
            raise ValueError(f"{where} is a stack of layers, and peft has one module a layer")
        if weight.op == "conv_general_dilated":
            raise ValueError(f"{where} is the kernel of a convolution, whose adapters are not written yet")
        if weight.factors.shared:
            raise ValueError(f"{where} has batch axes, and peft's adapters are matrices")
        return cls(weight)

    def suffix(self, part: str) -> str:
        """What follows the module's name."""
        if part == "m":
            return ".lora_magnitude_vector"
        return f".lora_embedding_{part.upper()}" if self._is_embedding else f".lora_{part.upper()}.weight"

    def to_peft(self, part: str, array: np.ndarray) -> np.ndarray:
        if part == "m":
            return array.reshape(-1)
        return (array.reshape(-1, array.shape[-1]) if part == "a" else array.reshape(array.shape[0], -1)).T

    def from_peft(self, part: str, array: np.ndarray) -> np.ndarray:
        if part == "m":
            return array.reshape(adapters.magnitude_shape(self._factors))
        rank = array.shape[0 if part == "a" else 1]
        a_shape, b_shape = self._factors.shapes(rank)
        shape = a_shape if part == "a" else b_shape
        if array.size != math.prod(shape):
            raise ValueError(f"a tensor of shape {array.shape} does not fit: {shape[::-1]} is needed")
        return array.T.reshape(shape)
