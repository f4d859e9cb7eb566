import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwix import evaluation
from qwix.models import bert, text


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_recall_is_the_share_of_ranks_below_k():
    rng = np.random.default_rng(0)
    queries, documents = unit(rng, 40, 8), unit(rng, 40, 8)
    scores = queries @ documents.T
    ranks = [sorted(scores[i], reverse=True).index(scores[i, i]) for i in range(40)]
    for k in (1, 10, 40):
        assert evaluation.recall(queries, documents, k) == np.mean([r < k for r in ranks])


def test_a_collapsed_encoder_recalls_nothing():
    same = np.ones((20, 4), np.float32)
    assert evaluation.recall(same, same, 1) == 0


def test_measures_of_known_vectors():
    reference = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    moved = np.array([[0.6, 0.8], [0, 1], [1, 0], [0, 1]], np.float32)
    measures = evaluation.measure(moved, reference, seconds=0.02, layers=[moved], reference_layers=[reference])
    assert measures.cosine_mean == pytest.approx(0.9)
    assert measures.cosine_worst == pytest.approx(0.6)
    assert measures.recall_at_1 == 0.5
    assert measures.recall_at_10 == 1
    assert measures.ms_per_text == pytest.approx(5)
    assert measures.layer_errors == pytest.approx([np.sqrt(0.16 + 0.64) / 2])


def test_embeddings_and_layers_are_those_of_the_model(tiny_bert):
    model, tokenizer = bert.load(tiny_bert), text.load_tokenizer(tiny_bert)
    texts = ["a b c", "hello", "the quick brown fox"]
    batches = text.make_batches(tokenizer, texts, buckets=(32,), tokens_per_batch=64)
    shown = []

    def track(steps, description):
        shown.append((description, len(steps)))
        return steps

    embeddings, seconds = evaluation.timed_embeddings(model, batches, track)
    assert shown == [("compile", 1), ("embed", 2)]
    assert seconds > 0
    call = nnx.jit(lambda m, i, k: m(i, k, return_layers=True))
    for row, (ids, mask) in enumerate((b.input_ids, b.attention_mask) for b in batches for _ in [0]):
        expected, layers = call(model, ids, mask)
        members = batches[row].index
        np.testing.assert_allclose(embeddings[members], expected[: len(members)], atol=1e-6)
        got = evaluation.layer_outputs(model, batches[row])
        for value, want in zip(got, layers, strict=True):
            np.testing.assert_allclose(value, np.asarray(want)[mask], atol=1e-5)


class Bigram(nnx.Module):
    """The next token by the last one alone."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def __call__(self, ids):
        return self.table[...][ids]


@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity_of_a_known_distribution(batch):
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(7, 7)), rng.integers(0, 7, 23)
    windows = evaluation.token_windows(ids, 0, length=5)
    assert windows.shape == (4, 6)
    assert (windows[:, 0] == 0).all()
    np.testing.assert_array_equal(windows[:, 1:].ravel(), ids[:20])
    log_probs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    want = np.exp(-np.mean([log_probs[a, b] for row in windows for a, b in itertools.pairwise(row)]))
    assert evaluation.perplexity(Bigram(table), windows, batch=batch) == pytest.approx(want, rel=1e-5)


def test_perplexity_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(0, 6\) hold no token"):
        evaluation.perplexity(Bigram(np.zeros((7, 7))), evaluation.token_windows([1, 2], 0, length=5))
