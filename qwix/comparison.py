"""Quantized sentence encoders beside the float one: what the command line measures."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwix import applying, checkpoint, data, evaluation, report
from qwix.evaluation import Track, no_progress
from qwix.models import bert, quantized, text

# Lengths that texts are padded to, in tokens. Few and short ones: each is compiled for each recipe.
BUCKETS = (32, 64)


@dataclasses.dataclass
class Workload:
    """A float model, and the texts that quantized ones are compared on.

    Attributes:
      directory: where the model came from.
      model: in float32.
      batches: queries and then their documents, as tokens.
      reference: their embeddings by the float model, (texts, width).
      reference_layers: the float model's layer outputs on the first batch.
      seconds: what embedding the texts took in float.
      pairs: how many queries there are.
    """

    directory: pathlib.Path
    model: bert.Bert
    batches: list[text.TokenBatch]
    reference: np.ndarray
    reference_layers: list[np.ndarray]
    seconds: float
    pairs: int


def prepare(directory: pathlib.Path, pairs: int, track: Track = no_progress) -> Workload:
    """Loads a model directory and embeds `pairs` queries and documents in float.

    Raises:
      CheckpointError: the model directory cannot be used.
    """
    model = bert.load(directory)
    tokenizer = text.load_tokenizer(directory)
    retrieval = data.retrieval_set(pairs)
    texts = retrieval.queries + retrieval.documents
    batches = text.make_batches(tokenizer, texts, buckets=_buckets(model.config))
    reference, seconds = evaluation.timed_embeddings(model, batches, track)
    return Workload(
        directory=directory,
        model=model,
        batches=batches,
        reference=reference,
        reference_layers=evaluation.layer_outputs(model, batches[0]),
        seconds=seconds,
        pairs=len(retrieval.queries),
    )


def _buckets(config: bert.BertConfig) -> tuple[int, ...]:
    longest = config.max_position_embeddings
    return tuple(sorted({min(bucket, longest) for bucket in BUCKETS}))


def calibration_batches(
    directory: pathlib.Path, config: bert.BertConfig, texts: Sequence[str]
) -> list[tuple[jnp.ndarray, jnp.ndarray]]:
    """Texts as arguments of the model's call, for recipes that need data."""
    tokenizer = text.load_tokenizer(directory)
    batches = text.make_batches(tokenizer, texts, buckets=_buckets(config)[-1:])
    return [(jnp.asarray(b.input_ids), jnp.asarray(b.attention_mask)) for b in batches]


def float_row(work: Workload) -> report.Row:
    """The float model's line of the table."""
    return report.Row(
        name="float32",
        description="the model as it came",
        disk_bytes=sum(checkpoint.stored_bytes(work.model).values()),
        bits_per_weight=32.0,
        weight_errors={},
        measures=evaluation.measure(
            work.reference,
            work.reference,
            seconds=work.seconds,
            layers=work.reference_layers,
            reference_layers=work.reference_layers,
        ),
    )


def quantized_row(work: Workload, model: bert.Bert, done: applying.Report, track: Track = no_progress) -> report.Row:
    """Measures a quantized model."""
    embeddings, seconds = evaluation.timed_embeddings(model, work.batches, track)
    tables = {
        f"{'/'.join(map(str, path))}/embedding"
        for path, module in nnx.iter_graph(work.model)
        if isinstance(module, nnx.Embed)
    }
    weights = [weight for weight in done.weights if weight.path not in tables]
    count = sum(int(np.prod(weight.shape)) for weight in weights)
    return report.Row(
        name=done.recipe.name,
        description=done.recipe.description,
        disk_bytes=sum(checkpoint.stored_bytes(model).values()),
        bits_per_weight=8 * sum(weight.bytes_after for weight in weights) / count,
        weight_errors={weight.path: weight.relative_error for weight in weights},
        measures=evaluation.measure(
            embeddings,
            work.reference,
            seconds=seconds,
            layers=evaluation.layer_outputs(model, work.batches[0]),
            reference_layers=work.reference_layers,
        ),
    )


def reload_is_equal(directory: pathlib.Path, model: bert.Bert, work: Workload) -> bool:
    """Whether the checkpoint in `directory` gives the same embeddings as `model`, bit for bit."""
    batch = work.batches[0]

    def outputs(encoder: bert.Bert) -> np.ndarray:
        return np.asarray(evaluation.compiled(encoder)(batch.input_ids, batch.attention_mask))

    return bool(np.array_equal(outputs(model), outputs(quantized.load(directory))))


def facts(work: Workload) -> dict[str, str]:
    """How the numbers came about, for the report."""
    longest = max(batch.input_ids.shape[1] for batch in work.batches)
    queries, documents = np.split(work.reference, 2)
    share = evaluation.recall(queries, documents, 1)
    error = (share * (1 - share) / work.pairs) ** 0.5
    return {
        "Texts": f"{work.pairs} docstrings of the Python standard library: the first sentence is "
        f"the query, the rest the document that it has to find among all {work.pairs}; "
        f"texts are cut to {longest} tokens",
        "Recall": f"with {work.pairs} queries its standard error is {error:.3f}: smaller differences say "
        "little, and the cosine to the float embeddings says more",
        "Size": "arrays of the checkpoint on disk; codes of less than a byte are packed",
        "Time": "wall time of embedding all texts over their number, after compilation, in batches of "
        f"{work.batches[0].input_ids.size} tokens; the quickest batch of a shape stands for all of it",
    }


def write_results(path: pathlib.Path, rows: Sequence[report.Row], work: Workload) -> None:
    """The table as JSON."""
    results = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "facts": {**facts(work), **report.machine()},
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
