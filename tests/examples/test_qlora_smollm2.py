"""The QLoRA example on a tiny random Llama: the loss falls, and the merged model keeps it."""

import importlib.util
import pathlib

import pytest

from tests.models import llama_files

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "qlora_smollm2.py"


@pytest.fixture
def tiny_llama(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra qwix[cli]")
    directory = llama_files.write_hugging_face(tmp_path / "llama", llama_files.tensors())
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[UNK]", *letters, *(f"##{c}" for c in letters)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_example(tiny_llama, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("qlora_smollm2", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = ["--steps", "12", "--batch", "4", "--length", "24", "--held-out", "4", "--learning-rate", "0.02"]
    results = example.main(["--model", str(tiny_llama), "--out", str(tmp_path / "out"), *sizes])
    assert results["trained"] < results["nf4"] - 0.3
    assert abs(results["merged"] - results["trained"]) < 1e-3
    assert abs(results["merged, in int8"] - results["trained"]) < 0.05
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert "held-out" in capsys.readouterr().out
