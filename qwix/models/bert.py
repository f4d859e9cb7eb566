"""BERT sentence encoders in Flax NNX (all-MiniLM-L6-v2 and its kin).

The model is the encoder of BERT (Devlin et al., arXiv 1810.04805, section 3; post-norm) and the
head of Sentence-BERT (Reimers and Gurevych, arXiv 1908.10084, section 3), which is the mean of the
last layer over the tokens that are not padding, scaled to length one.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
...                     intermediate_size=16, max_position_embeddings=12)
>>> model = Bert(config, rngs=nnx.Rngs(0))
>>> ids = jnp.array([[2, 7, 9, 0]])
>>> model(ids, ids > 0).shape
(1, 8)
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix import cpu
from qwix._src import qconfig
from qwix.interop.safetensors import CheckpointError, read_tensors

# What `hidden_act` says, and its name in qwix.cpu.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}

# Tensors of a Hugging Face BERT checkpoint that a sentence encoder has no use for.
UNUSED_TENSORS = ("embeddings.position_ids", "pooler.", "cls.")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT encoder, named as in a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (field.type,)
            if type(value) not in kinds or (field.type is int and value <= 0):
                raise ValueError(f"{field.name} cannot be {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is none of {sorted(ACTIVATIONS)}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "BertConfig":
        """The configuration in a parsed `config.json`; settings that do not matter here are left.

        Raises:
          ValueError: it describes another architecture, or a size is missing or wrong.
        """
        if settings.get("model_type", "bert") != "bert":
            raise ValueError(f"model_type is {settings['model_type']!r}, and only 'bert' is known")
        position = settings.get("position_embedding_type", "absolute")
        if position != "absolute":
            raise ValueError(f"position_embedding_type {position!r} is not supported, only absolute")
        fields = dataclasses.fields(cls)
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in settings]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        return cls(**{f.name: settings[f.name] for f in fields if f.name in settings})


class BertEmbeddings(nnx.Module):
    """Sum of word, position and segment embeddings, normalized."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        positions = jnp.arange(input_ids.shape[1])[None]
        segments = jnp.zeros_like(input_ids)
        return self.norm(self.word(input_ids) + self.position(positions) + self.token_type(segments))


class Linear(nnx.Linear):
    """A linear layer; with bias and activation function in one kernel where its weight is packed for the CPU."""

    def __call__(self, x: jax.Array, activation: str | None = None) -> jax.Array:
        if cpu.is_packed(self.kernel):
            return cpu.linear(x, self.kernel, self.bias, activation=activation)
        return cpu.activate(super().__call__(x), activation)


class BertAttention(nnx.Module):
    """Multi-head self-attention over the tokens that `mask` marks."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(width, width, rngs=rngs)
        self.value = Linear(width, width, rngs=rngs)
        self.output = Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        shape = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (linear(x).reshape(shape) for linear in (self.query, self.key, self.value))
        rule = qconfig.get_current_rule("einsum")
        is_quantized = rule is not None and rule.act_qtype is not None
        if cpu.is_packed(self.query.kernel) and not is_quantized:
            mixed = cpu.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        else:
            mixed = self.mix(query, key, value, mask)
        return self.output(mixed.reshape(batch, length, width))

    def mix(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        """Softmax attention on XLA, of (batch, length, heads, size)."""
        # Heads before tokens, and the softmax's division after the sum of values, are quicker on a CPU.
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        scores = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
        # The lowest finite number and not -inf: a row that is all padding stays finite.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value) / weights.sum(axis=-1)[..., None]
        return mixed.swapaxes(1, 2)


class BertLayer(nnx.Module):
    """Attention and a two-layer perceptron, each with a residual and a norm after it."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.activation = config.hidden_act
        self.attention = BertAttention(config, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.up = Linear(width, config.intermediate_size, rngs=rngs)
        self.down = Linear(config.intermediate_size, width, rngs=rngs)
        self.output_norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, mask))
        hidden = self.up(x, ACTIVATIONS[self.activation])
        return self.output_norm(x + self.down(hidden))


class Bert(nnx.Module):
    """A BERT encoder with mean pooling: token ids to sentence embeddings of length one."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.layers = nnx.List([BertLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        *,
        return_layers: bool = False,
    ) -> Any:
        """Embeds a batch of padded token sequences.

        Args:
          input_ids: (batch, length) token ids.
          attention_mask: (batch, length), true or 1 where there is a token, false or 0 at padding.
          return_layers: also return each layer's output.

        Returns:
          (batch, hidden_size) embeddings of length one (zeros for a row that is all padding); with
          `return_layers` a pair of them and a list of (batch, length, hidden_size) arrays.
        """
        mask = attention_mask.astype(bool)
        x = self.embeddings(input_ids)
        outputs = []
        for layer in self.layers:
            x = layer(x, mask)
            outputs.append(x)
        weight = mask[:, :, None].astype(x.dtype)
        pooled = (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1e-9)
        # The square is bounded, not the norm, whose gradient at zero is NaN.
        square = jnp.sum(pooled * pooled, axis=-1, keepdims=True)
        embeddings = pooled * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return (embeddings, outputs) if return_layers else embeddings


def read_config(directory: str | os.PathLike[str]) -> BertConfig:
    """The `config.json` of a model directory.

    Raises:
      CheckpointError: the file is missing, is no JSON, or describes no BERT encoder.
    """
    path = pathlib.Path(directory) / "config.json"
    try:
        return BertConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def tensor_name(path: Sequence[Any]) -> str:
    """The name in a Hugging Face checkpoint of the parameter at `path` of a `Bert`.

    >>> tensor_name(("layers", 3, "attention", "query", "kernel"))
    'encoder.layer.3.attention.self.query.weight'
    """
    leaf = "bias" if path[-1] == "bias" else "weight"
    module = tuple(path[:-1])
    if module[0] == "embeddings":
        name = "LayerNorm" if module[1] == "norm" else f"{module[1]}_embeddings"
        return f"embeddings.{name}.{leaf}"
    names: dict[tuple[Any, ...], str] = {
        ("attention", "query"): "attention.self.query",
        ("attention", "key"): "attention.self.key",
        ("attention", "value"): "attention.self.value",
        ("attention", "output"): "attention.output.dense",
        ("attention_norm",): "attention.output.LayerNorm",
        ("up",): "intermediate.dense",
        ("down",): "output.dense",
        ("output_norm",): "output.LayerNorm",
    }
    return f"encoder.layer.{module[1]}.{names[module[2:]]}.{leaf}"


def load(directory: str | os.PathLike[str]) -> Bert:
    """Loads a Hugging Face directory: `config.json` and `model.safetensors`, in float32.

    Raises:
      CheckpointError: a file is missing, truncated or of another architecture; a tensor is missing,
        has another shape, is no float, holds NaN or infinity, or has no place in the model.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    config = read_config(directory)
    path = directory / "model.safetensors"
    tensors = {name.removeprefix("bert."): t for name, t in read_tensors(path).items()}
    abstract = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    leaves = []
    for param_path, variable in flat:
        name = tensor_name(param_path)
        value = _take(tensors, name, path)
        # torch stores a linear layer as (out, in), Flax as (in, out).
        value = value.T if param_path[-1] == "kernel" else value
        if value.shape != variable.shape:
            wanted = variable.shape[::-1] if param_path[-1] == "kernel" else variable.shape
            found = value.shape[::-1] if param_path[-1] == "kernel" else value.shape
            raise CheckpointError(f"{path}: tensor {name!r} has shape {found}, and config.json asks for {wanted}")
        leaves.append((param_path, variable.replace(jnp.asarray(value, jnp.float32))))
    unknown = sorted(name for name in tensors if not name.startswith(UNUSED_TENSORS))
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors have no place in this model, {unknown[0]!r} first: "
            "config.json describes fewer layers, or this is not a plain BERT encoder"
        )
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _take(tensors: dict[str, np.ndarray], name: str, path: pathlib.Path) -> np.ndarray:
    """Removes and returns a tensor, after a look at what a later layer could only choke on."""
    if name not in tensors:
        raise CheckpointError(f"{path}: tensor {name!r} is missing")
    value = tensors.pop(name)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise CheckpointError(f"{path}: tensor {name!r} is {value.dtype}, not a float array")
    if not np.isfinite(value.astype(np.float32)).all():
        raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity")
    return value
