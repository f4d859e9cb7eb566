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

Of a Linen model the parameters are given too, and `load` returns the adapter, as `qwix.set_adapter` takes it.
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
from flax import linen as nn
from flax import nnx

from qwix._src import adapted_model
from qwix._src.providers import adapters
from qwix._src.providers.adapters import AdaptedWeight, Adapter
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
    model: nnx.Module | nn.Module,
    directory: str | os.PathLike[str],
    adapter: str = adapters.DEFAULT,
    *,
    params: Any | None = None,
    rename: Callable[[Path], str] = dotted,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes an adapter of a model as a directory that `peft.PeftModel.from_pretrained` reads.

    Args:
      model: the NNX model, or a Linen one that has run (maybe in `jax.eval_shape`).
      directory: is created if it is not there.
      adapter: name of the adapter; of a Linen model the one that is in `params`.
      params: Linen only: the parameters, with the adapter.
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
    for path, name, weight, this, values in _adapters(model, adapter, params):
        module = rename(path)
        form = _Form.of(weight, values["a"].ndim, "/".join(map(str, (*path, name))))
        for part, value in values.items():
            key = _PREFIX + module + form.suffix(part)
            if key in tensors:
                raise ValueError(f"two weights would be saved as {key}: make `rename` tell them apart")
            tensors[key] = form.to_peft(part, np.asarray(value))
        rank = values["a"].shape[-1]
        ranks[module], alphas[module] = rank, this.scaling * rank
        use_dora.add(this.use_dora)
        dropouts.add(this.dropout)
    if not ranks:
        there = adapted_model.adapter_names(model) if isinstance(model, nnx.Module) else "none in params"
        raise ValueError(f"{type(model).__name__} has no adapter {adapter!r}; it has {there}")
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
    model: nnx.Module | nn.Module,
    directory: str | os.PathLike[str],
    adapter: str = adapters.DEFAULT,
    *,
    params: Any | None = None,
    rename: Callable[[Path], str] = dotted,
) -> Any:
    """Reads an adapter that `save` or `peft` wrote; `qwix.set_adapter` makes it act.

    Args:
      model: a model with adapters, which says where they can be: apply LoRA with rules that match the weights first. A
        Linen model must have run (maybe in `jax.eval_shape`).
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      adapter: the name that it gets in an NNX model.
      params: Linen only: the parameters, which are not changed.
      rename: as in `save`.

    Returns:
      NNX: None, the model has the adapter. Linen: its parameters, as `qwix.lora_params` takes them out; B holds what
      alpha / rank of the file differs from that of the model.

    Raises:
      CheckpointError: a file is missing or is no adapter of `peft`, or has a tensor that the model has no place for.
      ValueError: a tensor does not fit.
    """
    directory = pathlib.Path(directory)
    config = _read_config(directory / _CONFIG)
    tensors = safetensors.read_tensors(directory / _WEIGHTS)
    found: dict[Path, Any] = {}
    scalings: dict[tuple[Path, str], float] = {}
    for path, name, weight, like, values in _adapters(model, None, params):
        module = rename(path)
        form = _Form.of(weight, values["a"].ndim, "/".join(map(str, (*path, name))))
        for part in "abm":
            tensor = tensors.pop(_PREFIX + module + form.suffix(part), None)
            if tensor is not None:
                found[(*path, f"{name}_lora_{part}")] = jnp.asarray(form.from_peft(part, tensor))
                if part == "a":
                    rank = tensor.shape[0]
                    alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
                    scalings[path, name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if isinstance(model, nn.Module) and (path, name) in scalings:
            found[(*path, f"{name}_lora_b")] *= scalings[path, name] / like.scaling
    if tensors:
        raise CheckpointError(
            f"{directory / _WEIGHTS}: the model has no adapter where {min(tensors)} belongs ({len(tensors)} such "
            "tensors): apply LoRA with rules that match these weights, or pass another `rename`"
        )
    if isinstance(model, nn.Module):
        return _nested(found)
    adapted_model.add_adapter(model, adapter, _nested(found), scalings=scalings)
    return None


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


def _adapters(
    model: nnx.Module | nn.Module, name: str | None, params: Any | None
) -> Iterator[tuple[Path, str, AdaptedWeight, Adapter, dict[str, Any]]]:
    """Module, attribute, and what is known of each weight with an adapter of that name (or any), and its arrays."""
    if isinstance(model, nn.Module):
        if params is None:
            raise ValueError("a Linen model does not hold its adapters: params is needed, the model's parameters")
        if name:
            raise ValueError(f"the adapter in the params of a Linen model has no name, not {name!r}")
        yield from adapted_model.linen_adapters(model, params)
        return
    if params is not None:
        raise ValueError("an NNX model holds its adapters itself: leave out params")
    for path, owner, attribute, weight in adapters.adapted_weights(model):
        this = weight.adapters[0] if name is None else weight.adapter(name)
        if this is not None:
            values = {part: flax_util.unbox(getattr(owner, this.attribute(attribute, part))) for part in this.parts}
            yield path, attribute, weight, this, values


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
