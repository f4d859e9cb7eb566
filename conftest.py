"""What holds for every test, doctest and documented example.

It stands beside `qwix/`, `tests/`, `docs/` and the README because all four are collected: eight CPU
devices, a compilation cache, Hypothesis settings, and the fenced examples of the Markdown pages.
"""

import gc
import os
from pathlib import Path

# JAX reads the flag once, when its backend starts, so it stands before any import of jax.
# Most of the tests' time is compiling programs that run once, so the compiler is told not to try hard:
# without the emitters of fusions, and in one piece, a small program takes half the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
).strip()

import hypothesis
import jax
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

CACHE_DIR = Path(__file__).parent / ".pytest_cache" / "jax"

# Tests compile many small programs, most of them the same as in the run before.
jax.config.update("jax_compilation_cache_dir", str(CACHE_DIR))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# A run keeps millions of objects (traced and compiled programs), which Python would search for garbage again and again.
gc.set_threshold(100_000, 50, 50)

# Every new shape compiles, so a deadline would only measure JAX, and a few examples go far.
hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("local"), derandomize=True, max_examples=12
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# The ```python blocks of one page share their names and run from top to bottom.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"]
).pytest()
