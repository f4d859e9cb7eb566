"""Compiles the native CPU kernels into a wheel, where a compiler and jaxlib's headers are at hand; see docs/cpu.md.

Everything else about the package is in pyproject.toml.
"""

import importlib.util
import pathlib
from types import ModuleType
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# Of the checkout, and not by its name: importing the package would import JAX.
BUILD = pathlib.Path(__file__).parent / "qwix" / "cpu" / "build.py"


def headers() -> pathlib.Path | None:
    """Where jaxlib has its headers; None without jaxlib."""
    found = importlib.util.find_spec("jaxlib")
    return pathlib.Path(found.origin).parent / "include" if found is not None and found.origin else None


def kernels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qwix_cpu_build", BUILD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Python files, and the kernels beside them; an editable installation compiles at the first use instead."""

    def run(self) -> None:
        super().run()
        include_dir, build = headers(), kernels()
        if self.editable_mode or include_dir is None:
            return
        output = pathlib.Path(self.build_lib) / "qwix" / "cpu" / build.library_name()
        try:
            build.compile_library(output, include_dir)
        except build.BuildError as error:
            self.announce(f"qwix is built without native CPU kernels: {error}", level=3)


class WithKernels(Distribution):
    def has_ext_modules(self) -> bool:
        return headers() is not None and kernels().find_compiler() is not None


class Wheel(bdist_wheel):
    """A wheel of one platform, for every Python: the kernels know JAX's C interface, and nothing of Python."""

    def get_tag(self) -> tuple[Any, Any, Any]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": Wheel}, distclass=WithKernels)
