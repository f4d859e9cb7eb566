"""What quantization cost: of a sentence encoder embeddings, retrieval, layers, time; of a language model perplexity.

Every measure is taken of the float model on the same texts as well.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix.models.text import TokenBatch, embed

# Takes steps and what they are, and yields them one by one while it shows how far they got.
Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measures of one model.

    Attributes:
      cosine_mean: mean over all texts of the cosine between its embedding and the float model's.
      cosine_worst: the smallest of them.
      recall_at_1: share of queries whose own document is the nearest of all documents.
      recall_at_10: share of queries whose own document is among the nearest ten.
      ms_per_text: wall time of embedding all texts over their number; compiled beforehand, and the
        quickest batch of a shape for all of it.
      layer_errors: for each encoder layer ||y - y_float|| / ||y_float|| over the tokens of one
        batch.
    """

    cosine_mean: float
    cosine_worst: float
    recall_at_1: float
    recall_at_10: float
    ms_per_text: float
    layer_errors: tuple[float, ...]


def compiled(model: nnx.Module) -> Callable[[Any, Any], Any]:
    """The model as a function that is compiled once a shape, with its arrays as arguments."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state: Any, input_ids: Any, attention_mask: Any) -> Any:
        return nnx.merge(graphdef, state)(input_ids, attention_mask)

    return lambda input_ids, attention_mask: call(state, input_ids, attention_mask)


def no_progress(steps: Sequence[Any], description: str) -> Iterable[Any]:
    """The steps themselves; what shows progress has this signature."""
    del description
    return steps


def timed_embeddings(
    model: nnx.Module, batches: Sequence[TokenBatch], track: Track = no_progress
) -> tuple[np.ndarray, float]:
    """The embeddings of all texts and the seconds that they take, compilation not counted."""
    call = compiled(model)
    shapes = {batch.input_ids.shape: batch for batch in batches}
    for batch in track(list(shapes.values()), "compile"):
        jax.block_until_ready(call(batch.input_ids, batch.attention_mask))
    times: dict[tuple[int, ...], list[float]] = {shape: [] for shape in shapes}

    def timed(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        result = np.asarray(call(input_ids, attention_mask))
        times[input_ids.shape].append(time.perf_counter() - start)
        return result

    embeddings = embed(timed, track(batches, "embed"))
    # As `timeit` does: the quickest batch of a shape is the one that other programs held up least.
    return embeddings, sum(min(t) * len(t) for t in times.values())


def layer_outputs(model: nnx.Module, batch: TokenBatch) -> list[np.ndarray]:
    """The output of each encoder layer at the tokens of a batch, each (tokens, width)."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state: Any) -> Any:
        encoder = nnx.merge(graphdef, state)
        return encoder(batch.input_ids, batch.attention_mask, return_layers=True)[1]

    return [np.asarray(y)[batch.attention_mask] for y in call(state)]


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """||value - reference|| / ||reference||, the Frobenius norm.

    >>> relative_error(np.array([3.0, 4.0]), np.array([3.0, 5.0])).__round__(4)
    0.1715
    """
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def recall(queries: np.ndarray, documents: np.ndarray, k: int) -> float:
    """Share of queries i whose document i is among the k with the greatest dot product.

    A tie counts against the query.

    >>> recall(np.eye(2), np.array([[1.0, 0.0], [2.0, 1.0]]), k=1)
    0.5
    """
    scores = queries @ documents.T
    own = np.diag(scores)[:, None]
    return float(((scores >= own).sum(axis=1) <= k).mean())


def measure(
    embeddings: np.ndarray,
    reference: np.ndarray,
    *,
    seconds: float,
    layers: Sequence[np.ndarray],
    reference_layers: Sequence[np.ndarray],
) -> Measures:
    """Compares a model with the float model.

    Args:
      embeddings: (2 n, width) unit vectors, n queries and then the document of each.
      reference: the same of the float model.
      seconds: what embedding them took.
      layers: of `layer_outputs`.
      reference_layers: the same of the float model.
    """
    cosine = (embeddings * reference).sum(axis=1)
    queries, documents = np.split(embeddings, 2)
    return Measures(
        cosine_mean=float(cosine.mean()),
        cosine_worst=float(cosine.min()),
        recall_at_1=recall(queries, documents, 1),
        recall_at_10=recall(queries, documents, 10),
        ms_per_text=seconds / len(embeddings) * 1000,
        layer_errors=tuple(map(relative_error, layers, reference_layers)),
    )


def token_windows(ids: Sequence[int], bos: int, *, length: int = 512) -> np.ndarray:
    """Consecutive windows of `length` tokens, each after the token `bos`; what is left at the end is dropped.

    Returns:
      (windows, length + 1) int32.

    >>> token_windows([5, 6, 7, 8, 9], bos=1, length=2)
    array([[1, 5, 6],
           [1, 7, 8]], dtype=int32)
    """
    count = len(ids) // length
    windows = np.asarray(ids[: count * length], np.int32).reshape(count, length)
    return np.pad(windows, ((0, 0), (1, 0)), constant_values=bos)


def perplexity(model: Any, windows: np.ndarray, *, batch: int = 1, track: Track = no_progress) -> float:
    """exp of the mean of -log p(token | tokens before it in its window), over all tokens but the first of each window.

    The model is compiled once, for `batch` windows at a time, so memory is that of one batch's logits.

    Args:
      model: an NNX model from (batch, tokens) ids to (batch, tokens, vocabulary) logits.
      windows: (windows, tokens) ids.
      batch: windows a call; the last call is filled up with windows that do not count.
      track: shows progress.

    Raises:
      ValueError: there is no token to predict.
    """
    count, length = windows.shape
    if not count or length < 2:
        raise ValueError(f"windows of shape {windows.shape} hold no token to predict")
    graphdef, state = nnx.split(model)

    @jax.jit
    def losses(state: Any, ids: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, state)(ids[:, :-1])
        own = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        # Not log_softmax, which would make a second array of the size of the logits.
        return (jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) - own).sum(axis=1)

    padded = np.pad(windows, ((0, -count % batch), (0, 0)), mode="edge").reshape(-1, batch, length)
    sums = [np.asarray(losses(state, ids), np.float64) for ids in track(list(padded), "perplexity")]
    return math.exp(np.concatenate(sums)[:count].sum() / (count * (length - 1)))
