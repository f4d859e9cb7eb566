"""Text to token batches of few shapes, and batches back to one embedding a text.

XLA compiles a program for every input shape. Texts are therefore grouped by length into a few
buckets; each bucket has one batch shape of about the same number of tokens.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qwix._src.utils.extras import import_extra
from qwix.interop.safetensors import CheckpointError


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Some of the texts as one padded batch.

    Attributes:
      index: (n,) which texts the first n rows are; rows after them are padding.
      input_ids: (batch, length) int32.
      attention_mask: (batch, length) bool, true where there is a token.
    """

    index: np.ndarray
    input_ids: np.ndarray
    attention_mask: np.ndarray


def load_tokenizer(directory: str | os.PathLike[str], max_length: int | None = None) -> Any:
    """The `tokenizer.json` of a model directory, which truncates and does not pad.

    Args:
      directory: a Hugging Face model directory.
      max_length: truncate to this many tokens; by default what `sentence_bert_config.json` says,
        else
        512.

    Raises:
      CheckpointError: the file is missing or is no tokenizer.
    """
    tokenizers = import_extra("tokenizers")
    directory = pathlib.Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The package raises a bare Exception for a file it cannot parse.
        raise CheckpointError(f"{path}: not a tokenizer ({error})") from error
    if max_length is None:
        settings = directory / "sentence_bert_config.json"
        try:
            max_length = int(json.loads(settings.read_text())["max_seq_length"])
        except FileNotFoundError:
            max_length = 512
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{settings}: no max_seq_length ({error!r})") from error
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer


def make_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    buckets: Sequence[int] = (32, 128),
    tokens_per_batch: int = 2048,
) -> list[TokenBatch]:
    """Groups `texts` by length into padded batches, one shape a bucket.

    Args:
      tokenizer: of `load_tokenizer`.
      texts: what to embed.
      buckets: lengths in tokens; a text goes to the shortest one that holds it and is cut to the
        longest.
      tokens_per_batch: a bucket of length n has max(1, tokens_per_batch // n) rows a batch.
    """
    buckets = sorted(buckets)
    rows: dict[int, list[tuple[int, list[int]]]] = {bucket: [] for bucket in buckets}
    end = _end_token(tokenizer)
    for i, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids = encoding.ids
        if len(ids) > buckets[-1]:
            ids = ids[: buckets[-1] - len(end)] + end
        rows[next(bucket for bucket in buckets if len(ids) <= bucket)].append((i, ids))
    batches = []
    for bucket, members in rows.items():
        size = max(1, tokens_per_batch // bucket)
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            input_ids = np.zeros((size, bucket), np.int32)
            mask = np.zeros((size, bucket), bool)
            for row, (_, ids) in enumerate(chunk):
                input_ids[row, : len(ids)] = ids
                mask[row, : len(ids)] = True
            batches.append(TokenBatch(np.array([i for i, _ in chunk]), input_ids, mask))
    return batches


def _end_token(tokenizer: Any) -> list[int]:
    """The token that ends each sequence ([SEP]), which a text cut short keeps."""
    ids = tokenizer.encode("").ids
    return ids[-1:]


def embed(call: Callable[[np.ndarray, np.ndarray], Any], batches: Iterable[TokenBatch]) -> np.ndarray:
    """The embeddings of all texts in `batches`, in their order, as (texts, width) float32.

    `call` takes input ids and an attention mask and returns an embedding a row.
    """
    pieces = [(b.index, np.asarray(call(b.input_ids, b.attention_mask))) for b in batches]
    index = np.concatenate([i for i, _ in pieces])
    values = np.concatenate([v[: len(i)] for i, v in pieces])
    return values[np.argsort(index)]
