"""The native kernels as JAX functions: finds the library, or compiles it, and calls it through `jax.ffi`."""

import ctypes
import functools
import hashlib
import os
import pathlib
import warnings

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np

from qwix.cpu import build

MATMUL, ATTENTION = "qwix_cpu_matmul", "qwix_cpu_attention"

# Of `matmul`; the numbers are those of `Mode` in csrc/job.h.
FLOAT, DYNAMIC, QUANTIZED = range(3)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library with its kernels registered, or why there is none."""
    # A library built otherwise, as `make sanitize` does, stands before all.
    packaged = pathlib.Path(__file__).parent / build.library_name()
    if given := os.environ.get("QWIX_CPU_LIBRARY"):
        packaged = pathlib.Path(given).absolute()
        if not packaged.is_file():
            raise FileNotFoundError(f"QWIX_CPU_LIBRARY is {given!r}, and no such file is there: unset it, or build it")
    problem = ""
    if packaged.is_file():
        problem, library = _register(packaged)
        if library is not None:
            return library
    try:
        cached = _cache_dir() / build.library_name(f"-{_headers()}")
        if not cached.is_file():
            build.compile_library(cached, jax.ffi.include_dir())
        problem, library = _register(cached)
    except (OSError, build.BuildError) as error:
        problem, library = str(error), None
    if library is not None:
        return library
    warnings.warn(
        f"qwix.cpu has no native kernels, packed weights run on XLA, which is slow on a CPU: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
    return problem


def _register(path: pathlib.Path) -> tuple[str, ctypes.CDLL | None]:
    """(problem, library): one of the two."""
    try:
        library = ctypes.CDLL(os.fspath(path))
        library.qwix_cpu_kernels.restype = ctypes.c_char_p
        for target in (MATMUL, ATTENTION):
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except Exception as error:  # XLA refuses a library of another FFI version with an error of its own
        return f"{path}: {error}", None
    return "", library


def _cache_dir() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "qwix"


def _headers() -> str:
    """Names the FFI headers that a library is compiled with."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(jax.ffi.include_dir()).rglob("*.h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def is_available() -> bool:
    """Whether there are native kernels; the first call may compile them, and warns if that is impossible."""
    return not isinstance(_load(), str)


def kernels() -> list[str]:
    """The instruction sets that this CPU has kernels for, best first: that one is used.

    >>> kernels()[-1]
    'portable'
    """
    library = _load()
    if isinstance(library, str):
        return []
    names: list[str] = []
    while (name := library.qwix_cpu_kernels(len(names))) is not None:
        names.append(name.decode())
    return names


def matmul(
    x: jax.Array,
    x_scale: jax.Array | None,
    codes: jax.Array,
    scale: jax.Array,
    zeros: jax.Array | None,
    bias: jax.Array | None,
    *,
    format_number: int,
    mode: int,
    columns: int,
    tile: int,
    factor: float = 1.0,
    dtype: np.dtype,
    kernel: int = 0,
) -> jax.Array:
    """y[m, l n] = sum_k x[m, k] w[l, k, n] + bias, of a packed w. `packed.py` says what the arrays hold.

    Args:
      x: (M, K) float32 or bfloat16; int8 in mode QUANTIZED.
      x_scale: (M, 1) or (M, tiles) float32 in mode QUANTIZED, else None.
      codes: (blocks, steps, 64) uint8, the blocks of one lead after the other.
      scale: (blocks, tiles, 16), float32, bfloat16 or float16.
      zeros: the same in uint8, or None.
      bias: (leads * columns,) float32, or None.
      format_number: of `packed.FORMATS`.
      mode: FLOAT multiplies floats; DYNAMIC quantizes x to int8, a scale for each row and tile; QUANTIZED has x so.
      columns: N, of one lead.
      tile: how many k share a scale.
      factor: what DYNAMIC multiplies the largest magnitude of a tile with before it is mapped to 127.5.
      dtype: of y, float32 or bfloat16.
      kernel: an index into `kernels()`, for tests.

    Returns:
      (M, leads * columns).
    """
    blocks = -(-columns // 16)
    leads = codes.shape[-3] // max(blocks, 1)
    none = np.zeros((0,), np.float32)
    rows = x.shape[0]
    padded_k = x.shape[1] // tile * (-(-tile // 8) * 8)
    # The rows of x as the kernels want them: floats, or codes with a header; and two numbers for each tile.
    row_bytes = padded_k * (4 if mode == FLOAT else 3) + 128 + x.shape[1] // tile * 8
    call = jax.ffi.ffi_call(
        MATMUL,
        [
            jax.ShapeDtypeStruct((rows, leads * columns), dtype),
            jax.ShapeDtypeStruct((rows * row_bytes,), np.uint8),
        ],
        vmap_method="expand_dims",
    )
    out, _ = call(
        x,
        none if x_scale is None else x_scale,
        codes,
        scale,
        none.astype(np.uint8) if zeros is None else zeros,
        none if bias is None else jnp.asarray(bias, jnp.float32),
        format=np.int64(format_number),
        mode=np.int64(mode),
        n=np.int64(columns),
        tile=np.int64(tile),
        factor=np.float32(factor),
        kernels=np.int64(kernel),
    )
    return out


# `kKeysOfPart` of csrc/job.h.
_KEYS_OF_PART = 128


def attend(
    query: jax.Array,
    keys: jax.Array,
    key_scale: jax.Array | None,
    values: jax.Array,
    value_scale: jax.Array | None,
    used: jax.Array,
    *,
    scale: float,
    kernel: int = 0,
) -> jax.Array:
    """softmax(scale query . keys) values, over the first `used` keys, each head by itself.

    Args:
      query: (heads, queries, width) float32.
      keys: (heads, size, width) float32, bfloat16, float16, or int8.
      key_scale: (heads, size, 1) float32, what int8 keys are multiplied with; else None.
      values: as the keys.
      value_scale: as `key_scale`.
      used: () int32, at least 1.
      scale: of the products.
      kernel: an index into `kernels()`, for tests.

    Returns:
      (heads, queries, width) float32.
    """
    heads, queries, width = query.shape
    parts = -(-keys.shape[1] // _KEYS_OF_PART)
    none = np.zeros((0,), np.float32)
    call = jax.ffi.ffi_call(
        ATTENTION,
        [
            jax.ShapeDtypeStruct(query.shape, np.float32),
            jax.ShapeDtypeStruct((heads * parts * queries * (-(-width // 16) * 16 + 2),), np.float32),
        ],
        vmap_method="sequential",
    )
    out, _ = call(
        query,
        keys,
        none if key_scale is None else key_scale,
        values,
        none if value_scale is None else value_scale,
        used,
        scale=np.float32(scale),
        kernels=np.int64(kernel),
    )
    return out
