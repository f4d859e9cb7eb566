"""What holds for every test: eight CPU devices, a compilation cache and Hypothesis settings."""

import os
from pathlib import Path

# JAX reads the flag once, when its backend starts, so it stands before any import of jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import hypothesis
import jax

CACHE_DIR = Path(__file__).parent.parent / ".pytest_cache" / "jax"

jax.config.update("jax_compilation_cache_dir", str(CACHE_DIR))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Every new shape compiles, so a deadline would only measure JAX, and a few examples go far.
hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("local"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
