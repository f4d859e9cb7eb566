"""Checkpoints of quantized sentence encoders: complete directories, loaded by one call."""

import dataclasses
import os
import pathlib
import shutil

import jax.numpy as jnp
from flax import nnx

from qwix import applying, checkpoint, recipes
from qwix.models import bert

# With these beside the arrays a checkpoint can embed text.
TOKENIZER_FILES = ("tokenizer.json", "sentence_bert_config.json")


def write(
    directory: pathlib.Path, model: nnx.Module, recipe: recipes.Recipe, source: pathlib.Path
) -> checkpoint.Manifest:
    """Writes a quantized `Bert` and the tokenizer of the model directory `source`.

    Args:
      directory: exists and is empty; `checkpoint.new_directory` makes one.
      model: what `qwix.apply_recipe` made of a `Bert`.
      recipe: the recipe.
      source: the model directory that the float model was loaded from.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, directory / name)
    config = dataclasses.asdict(bert.read_config(source))
    metadata = {"architecture": "bert", "config": config, "recipe": recipe.to_dict()}
    return checkpoint.write(directory, model, metadata=metadata)


def load(directory: str | os.PathLike[str]) -> bert.Bert:
    """The quantized encoder in a checkpoint directory, with the same outputs as the one saved.

    Raises:
      CheckpointError: a file is missing or damaged, or it is of another architecture.
    """
    metadata = checkpoint.read_manifest(directory).metadata
    if metadata.get("architecture") != "bert":
        raise checkpoint.CheckpointError(
            f"{directory}: architecture {metadata.get('architecture')!r} is not known, only 'bert'"
        )
    try:
        config = bert.BertConfig.from_dict(metadata["config"])
        recipe = recipes.Recipe.from_dict(metadata["recipe"])
    except (KeyError, ValueError) as error:
        path = pathlib.Path(directory) / checkpoint.MANIFEST
        raise checkpoint.CheckpointError(f"{path}: damaged ({error})") from error
    model = nnx.eval_shape(lambda: bert.Bert(config, rngs=nnx.Rngs(0)))
    return checkpoint.load(directory, applying.template(model, recipe, *example_inputs()))


def example_inputs() -> tuple[jnp.ndarray, jnp.ndarray]:
    """Arguments of `Bert.__call__`, for calls whose values do not matter."""
    return jnp.ones((1, 8), jnp.int32), jnp.ones((1, 8), bool)
