"""A language model with all that belongs to it: tokenizer, special tokens, chat template."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from qwix._src.utils.extras import import_extra
from qwix.interop import gguf, gguf_tokenizer
from qwix.interop.safetensors import CheckpointError
from qwix.models import llama_weights
from qwix.models.llama import Llama
from qwix.recipes import Recipe


@dataclasses.dataclass
class LanguageModel:
    """A model and its words.

    Attributes:
      model: token ids to logits.
      tokenizer: a `tokenizers.Tokenizer`.
      bos: the token that a text starts with; None if it starts with none.
      stop: the tokens that end an answer.
      chat_template: a Jinja template from messages to a prompt; None for a model that is not for conversations.
    """

    model: Llama
    tokenizer: Any
    bos: int | None
    stop: tuple[int, ...]
    chat_template: str | None

    def take_model(self) -> Llama:
        """The model, which this holds no longer: it goes from memory as soon as the caller lets it go."""
        model = self.model
        del self.model
        return model

    def chat_prompt(self, text: str) -> list[int]:
        """The tokens of a conversation in which the user has said `text` and the model is next.

        Raises:
          CheckpointError: there is no chat template, or it is not one.
        """
        if self.chat_template is None:
            raise CheckpointError("the model has no chat template: let it continue the text as it is")
        jinja2 = import_extra("jinja2.sandbox")
        # The template comes with the weights, from whoever made them.
        environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        special = {"bos_token": self._text(self.bos), "eos_token": self._text(self.stop[0] if self.stop else None)}
        try:
            prompt = environment.from_string(self.chat_template).render(
                messages=[{"role": "user", "content": text}], add_generation_prompt=True, **special
            )
        except import_extra("jinja2").TemplateError as error:
            raise CheckpointError(f"the chat template cannot be rendered ({error})") from error
        return self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def text_prompt(self, text: str) -> list[int]:
        """The tokens of `text` to be continued."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.bos is None else [self.bos, *ids]

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.id_to_token(token)


def load(path: str | os.PathLike[str], recipe: Recipe | None = None) -> LanguageModel:
    """Loads a GGUF file or a Hugging Face directory; see `llama_weights.find`.

    Args:
      path: the file or directory.
      recipe: quantizes each weight as it is read; see `llama_weights.load`.

    Raises:
      CheckpointError: a file is missing, damaged or of another architecture.
      RecipeError: the recipe does not fit the model.
      MissingExtraError: the package `tokenizers` is not installed.
    """
    path = llama_weights.find(path)
    return _load_gguf(path, recipe) if path.is_file() else _load_hugging_face(path, recipe)


def _load_gguf(path: pathlib.Path, recipe: Recipe | None) -> LanguageModel:
    file = gguf.read(path)
    metadata = file.metadata
    tokenizer = gguf_tokenizer.load_tokenizer(file)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return LanguageModel(
        model=llama_weights.load_gguf(file, recipe),
        tokenizer=tokenizer,
        bos=metadata.get("tokenizer.ggml.bos_token_id"),
        stop=() if eos is None else (eos,),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _load_hugging_face(directory: pathlib.Path, recipe: Recipe | None) -> LanguageModel:
    tokenizers = import_extra("tokenizers")
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The package raises a bare Exception for a file it cannot parse.
        raise CheckpointError(f"{path}: not a tokenizer ({error})") from error
    config = _settings(directory / "config.json") | _settings(directory / "generation_config.json")
    eos = config.get("eos_token_id")
    template = directory / "chat_template.jinja"
    return LanguageModel(
        model=llama_weights.load(directory, recipe),
        tokenizer=tokenizer,
        bos=config.get("bos_token_id"),
        stop=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        chat_template=template.read_text(encoding="utf-8")
        if template.is_file()
        else _settings(directory / "tokenizer_config.json").get("chat_template"),
    )


def _settings(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file of settings; an empty one where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
