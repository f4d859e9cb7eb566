"""The tokenizer in a GGUF file's metadata, as one of the package `tokenizers`.

Byte-level BPE (`tokenizer.ggml.model` is `gpt2`) is built from `tokenizer.ggml.tokens` and `tokenizer.ggml.merges`;
what text is split into before that is not in the file but follows from the name `tokenizer.ggml.pre`. Tokens of type
control or user-defined (3 and 4) are matched as whole in a text, like `<|im_start|>`.
"""

from typing import Any

from qwix._src.utils.extras import import_extra
from qwix.interop import gguf
from qwix.interop.safetensors import CheckpointError

# `tokenizer.ggml.pre` -> whether digits are tokens of their own; both then split as GPT-2 does.
_SPLITS = {"gpt-2": False, "default": False, "smollm": True}
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(file: gguf.File) -> Any:
    """A `tokenizers.Tokenizer` that adds no token by itself, such as one for the beginning of a text.

    Raises:
      CheckpointError: the file has no tokenizer, or one of another kind.
      MissingExtraError: the package `tokenizers` is not installed.
    """
    tokenizers = import_extra("tokenizers")
    metadata = file.metadata
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in _SPLITS:
        raise CheckpointError(
            f"{file.path}: the tokenizer is {kind!r} with {split!r}, and only 'gpt2' with {', '.join(_SPLITS)} is known"
        )
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens or tokenizer.ggml.merges is missing")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A token of this alphabet never holds a space: it stands between the two.
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # The package raises a bare Exception for a merge without a token.
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges does not fit its tokens ({error})") from error
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, bytes_]) if _SPLITS[split] else bytes_
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for token, token_type in zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(token, normalized=False, special=token_type == _CONTROL)
            tokenizer.add_special_tokens([added]) if added.special else tokenizer.add_tokens([added])
    return tokenizer
