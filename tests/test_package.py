"""What the package promises as a whole: version, types and a lean import."""

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import qwix

# What the extras install and the library itself has to do without.
EXTRAS_ONLY = ("jinja2", "matplotlib", "safetensors", "tokenizers", "typer")

ROOT = Path(__file__).parent.parent


def test_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", qwix.__version__)
    assert importlib.metadata.version("qwix") == qwix.__version__


def test_changelog_has_the_version_or_unreleased_changes() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == qwix.__version__


def test_types_are_marked() -> None:
    assert importlib.resources.files("qwix").joinpath("py.typed").is_file()


def test_import_needs_no_extra() -> None:
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in EXTRAS_ONLY)
    subprocess.run([sys.executable, "-c", f"import sys; {block}; import qwix"], check=True)


def test_what_the_import_does_without_is_what_the_cli_extra_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {re.split(r"[<>=\[]", dep)[0] for dep in project["optional-dependencies"]["cli"]}
    assert installed == set(EXTRAS_ONLY)
