import json

import numpy as np
import pytest

from qwix.interop import gguf_tokenizer
from qwix.interop.gguf import read
from qwix.interop.safetensors import CheckpointError
from qwix.models import language_model
from tests.models import llama_files


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "m.gguf"
    return llama_files.write_gguf(path, llama_files.tensors(), **llama_files.tokenizer_metadata())


@pytest.fixture
def directory(file, tmp_path):
    """The same as a Hugging Face directory."""
    directory = llama_files.write_hugging_face(tmp_path / "hf", llama_files.tensors(), bos_token_id=0, eos_token_id=[1])
    gguf_tokenizer.load_tokenizer(read(file)).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": llama_files.TEMPLATE}))
    return directory


def test_both_formats_give_the_same(file, directory):
    one, other = language_model.load(file), language_model.load(directory)
    assert (
        (one.bos, one.stop, one.chat_template)
        == (other.bos, other.stop, other.chat_template)
        == (0, (1,), llama_files.TEMPLATE)
    )
    assert one.text_prompt("in this") == other.text_prompt("in this")
    ids = np.array([one.text_prompt("th")])
    np.testing.assert_array_equal(one.model(ids), other.model(ids))


def test_prompts(file):
    words = language_model.load(file)
    tokens = [llama_files.TOKENS[i] for i in words.chat_prompt("in")]
    assert tokens == ["<|begin|>", "in", "<|end|>"]
    words.bos = None
    assert words.text_prompt("") == []
    words.chat_template = "{{ messages.x.y }}"
    with pytest.raises(CheckpointError, match="chat template cannot be rendered"):
        words.chat_prompt("in")
    words.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        words.chat_prompt("in")


def test_a_template_of_its_own_file(directory):
    (directory / "chat_template.jinja").write_text("{{ bos_token }}")
    assert language_model.load(directory).chat_prompt("in") == [0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("generation_config.json", "[1]", "cannot be read"),
        ("tokenizer_config.json", "{", "cannot be read"),
    ],
)
def test_damaged_files_are_named(directory, name, content, message):
    path = directory / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        language_model.load(directory)
