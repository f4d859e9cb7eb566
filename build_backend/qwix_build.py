"""The build backend: setuptools, and jaxlib beside it where a wheel is built and there is a compiler for its kernels.

jaxlib has the headers that the kernels are compiled with. It is large, so nothing else asks for it: an editable
installation compiles at the first use, and a wheel without kernels does so too, or runs on XLA.
"""

import os
import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What has to be installed before `build_wheel`; see PEP 517."""
    required = build_meta.get_requires_for_build_wheel(config_settings)
    compilers = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    has_compiler = any(name and shutil.which(name) for name in compilers)
    return [*required, "jaxlib>=0.9.2"] if has_compiler and os.name == "posix" else required
