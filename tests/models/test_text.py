import json
import shutil

import numpy as np
import pytest

from qwix.interop.safetensors import CheckpointError
from qwix.models import text

TEXTS = ["", "a b", "the cat sat", "x " * 500, "one two three four five six seven eight", "a b"]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return text.load_tokenizer(tiny_bert)


def test_batches_hold_every_text_once_and_whole(tokenizer):
    batches = text.make_batches(tokenizer, TEXTS, buckets=(64, 8), tokens_per_batch=24)
    assert {b.input_ids.shape for b in batches} <= {(3, 8), (1, 64)}
    seen = {}
    for batch in batches:
        rows = zip(batch.index, batch.input_ids, batch.attention_mask, strict=False)
        for index, ids, mask in rows:
            assert index not in seen
            seen[index] = ids[mask].tolist()
            assert not ids[~mask].any()
        assert not batch.attention_mask[len(batch.index) :].any()
    # The longest is cut to the longest bucket and keeps the token that ends a sequence.
    long = tokenizer.encode(TEXTS[3]).ids
    expected = {i: tokenizer.encode(t).ids for i, t in enumerate(TEXTS)}
    expected[3] = [*long[:63], 3]
    assert seen == expected


def test_embeddings_come_back_in_the_order_of_the_texts(tokenizer):
    batches = text.make_batches(tokenizer, TEXTS, buckets=(8, 64), tokens_per_batch=16)
    lengths = text.embed(lambda ids, mask: mask.sum(axis=1, keepdims=True), batches)
    np.testing.assert_array_equal(lengths[:, 0], [min(len(tokenizer.encode(t).ids), 64) for t in TEXTS])


def test_the_longest_text_is_as_the_model_directory_says(tiny_bert, tmp_path):
    directory = shutil.copytree(tiny_bert, tmp_path / "copy")
    settings = directory / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 10}))
    assert len(text.load_tokenizer(directory).encode("x" * 40).ids) == 10
    assert len(text.load_tokenizer(directory, max_length=7).encode("x" * 40).ids) == 7
    settings.write_text("{}")
    with pytest.raises(CheckpointError, match="no max_seq_length"):
        text.load_tokenizer(directory)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        text.load_tokenizer(tmp_path)
