"""The native kernels as JAX functions: finds the library, or compiles it, and calls it through `jax.ffi`."""

import ctypes
import functools
import hashlib
import math
import os
import pathlib
import warnings
from typing import Any, NoReturn

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np

MATMUL, SECOND_MOMENTS = "qwix_cpu_matmul", "qwix_cpu_second_moments"
ATTENTION, DENSE_ATTENTION = "qwix_cpu_attention", "qwix_cpu_dense_attention"

# Of `matmul`; the numbers are those of `Mode` in csrc/job.h.
FLOAT, DYNAMIC, QUANTIZED = range(3)

# What `matmul` may apply to its results; the numbers are those of `Activation` in csrc/job.h.
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


def activate(x: jax.Array, activation: str | None) -> jax.Array:
    """An activation function on XLA: one of `ACTIVATIONS`."""
    functions: dict[str | None, Any] = {
        None: lambda x: x,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    }
    return functions[activation](x)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library with its kernels registered, or why there is none."""
    from qwix.cpu import build  # here, as it is a program too, which Python wants to run before anything imports it

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
        f"qwix.cpu has no native kernels, so that XLA does their work, which is slow on a CPU: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
    return problem


def _register(path: pathlib.Path) -> tuple[str, ctypes.CDLL | None]:
    """(problem, library): one of the two."""
    try:
        library = ctypes.CDLL(os.fspath(path))
        library.qwix_cpu_kernels.restype = ctypes.c_char_p
        for target in (MATMUL, SECOND_MOMENTS, ATTENTION, DENSE_ATTENTION):
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
    activation: str | None = None,
    dtype: np.dtype,
    kernel: int = 0,
) -> jax.Array:
    """y[m, l n] = f(sum_k x[m, k] w[l, k, n] + bias), of a packed w. `packed.py` says what the arrays hold.

    All arrays may have the same number of axes before those named here, a batch of products; where one has size 1
    there, it is the same in all of them.

    Args:
      x: (M, K) float32 or bfloat16; int8 in mode QUANTIZED. The last tile may have more than what is left of K for it:
        that is multiplied with nothing.
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
      activation: f, of `ACTIVATIONS`.
      dtype: of y, float32 or bfloat16.
      kernel: an index into `kernels()`, for tests.

    Returns:
      (M, leads * columns).

    Raises:
      ValueError: a shape or a dtype is none of these.
    """
    operands = {"x": x, "x_scale": x_scale, "codes": codes, "scale": scale, "zeros": zeros, "bias": bias}
    batch = _check_product(operands, mode=mode, columns=columns, tile=tile, dtype=dtype)
    leads = codes.shape[-3] // max(-(-columns // 16), 1)
    none = functools.partial(jnp.zeros, (0,))  # no constant, which would be a parameter of a partitioned call
    rows = x.shape[-2]
    padded = -(-tile // 8) * 8
    # The rows of x as the kernels want them: floats, or three bfloat16 each, in chunks of 32 k; or codes with a header.
    # And two numbers for each tile.
    in_chunks = padded if padded <= 32 else -(-padded // 32) * 32
    tile_bytes = max(4 * padded, 6 * in_chunks) if mode == FLOAT else 3 * padded
    row_bytes = scale.shape[-2] * (tile_bytes + 8) + 128
    call = jax.ffi.ffi_call(
        MATMUL,
        [
            jax.ShapeDtypeStruct((*batch, rows, leads * columns), dtype),
            jax.ShapeDtypeStruct((math.prod(batch) * rows * row_bytes,), np.uint8),
        ],
        vmap_method="expand_dims",
    )
    out, _ = call(
        x,
        none(np.float32) if x_scale is None else x_scale,
        codes,
        scale,
        none(np.uint8) if zeros is None else zeros,
        none(np.float32) if bias is None else bias,
        format=np.int64(format_number),
        mode=np.int64(mode),
        n=np.int64(columns),
        tile=np.int64(tile),
        factor=np.float32(factor),
        activation=np.int64(ACTIVATIONS[activation]),
        kernels=np.int64(kernel),
    )
    return out


_FLOATS = {np.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)}
_RANKS = {"x": 2, "x_scale": 2, "codes": 3, "scale": 3, "zeros": 3, "bias": 1}


def _check_product(operands: dict[str, Any], *, mode: int, columns: int, tile: int, dtype: Any) -> tuple[int, ...]:
    """The sizes of the batch axes of `matmul`'s operands; a ValueError if they are none of a product."""
    given = {name: x for name, x in operands.items() if x is not None}
    shapes = {name: tuple(x.shape) for name, x in given.items()}

    def refuse(why: str) -> NoReturn:
        described = ", ".join(f"{name} {x.dtype}{list(shapes[name])}" for name, x in given.items())
        raise ValueError(f"the native matmul has no use for {described} in mode {mode}, N = {columns}: {why}")

    if any(len(shape) < _RANKS[name] for name, shape in shapes.items()):
        refuse("an array has too few axes")
    batches = [shape[: len(shape) - _RANKS[name]] for name, shape in shapes.items()]
    if len({*map(len, batches)}) > 1 or any(len({*sizes} - {1}) > 1 for sizes in zip(*batches, strict=True)):
        refuse("the axes before those of one product are no common batch")
    batch = tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*batches, strict=True))
    core = {name: shape[len(batch) :] for name, shape in shapes.items()}
    rows, k = core["x"]
    blocks, tiles, per_lead = core["codes"][0], core["scale"][1], -(-columns // 16)
    if (
        tile < 1
        or not (tiles - 1) * tile < k <= tiles * tile
        or columns < 1
        or blocks % per_lead
        or core["codes"][2] != 64
    ):
        refuse(f"K = {k} is not {tiles} tiles of {tile}, or the codes are not whole blocks of 16 columns")
    steps = tiles * -(-tile // 8)  # of 8 k in 64 bytes; of 8 bits, twice as many
    if core["codes"][1] not in (steps, 2 * steps) or core["scale"] != (blocks, tiles, 16):
        refuse(f"K = {k} in tiles of {tile} has {steps} or {2 * steps} steps, and scales {[blocks, tiles, 16]}")
    fits: dict[str, list[tuple[int, ...]]] = {
        "zeros": [core["scale"]],
        "bias": [(blocks // per_lead * columns,)],
        "x_scale": [(rows, 1), (rows, tiles)],
    }
    for name, allowed in fits.items():
        if name in core and core[name] not in allowed:
            refuse(f"{name} has to be of shape {' or '.join(str(list(shape)) for shape in allowed)}")
    if (x_scale := mode == QUANTIZED) != ("x_scale" in given):
        refuse("int8 activations have scales" if x_scale else "float activations have no scales")
    dtypes = {
        "x": {np.dtype(np.int8)} if mode == QUANTIZED else _FLOATS - {np.dtype(np.float16)},
        "scale": _FLOATS,
        "codes": {np.dtype(np.uint8)},
        "zeros": {np.dtype(np.uint8)},
    }
    for name, x in given.items():
        if x.dtype not in dtypes.get(name, {np.dtype(np.float32)}):
            refuse(f"{name} is in a dtype that it has no code for")
    if np.dtype(dtype) not in _FLOATS - {np.dtype(np.float16)}:
        refuse(f"there are no results in {np.dtype(dtype)}")
    return batch


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

    Raises:
      ValueError: a shape or a dtype is none of these.
    """
    _check_attention(query, keys, key_scale, values, value_scale, used)
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


def _check_attention(query: Any, keys: Any, key_scale: Any, values: Any, value_scale: Any, used: Any) -> None:
    given = {"query": query, "keys": keys, "values": values, "used": used}
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    given |= {name: x for name, x in scales.items() if x is not None}
    fits = (
        query.ndim == keys.ndim == 3
        and keys.shape == values.shape
        and (query.shape[0], query.shape[2]) == (keys.shape[0], keys.shape[2])
        and keys.shape[1] > 0
        and used.shape == ()
    )
    is_int8 = keys.dtype == np.int8
    for scale in scales.values():
        fits = fits and (is_int8 == (scale is not None)) and (scale is None or scale.shape == (*keys.shape[:2], 1))
    dtypes = query.dtype == np.float32 and used.dtype == np.int32 and keys.dtype == values.dtype
    dtypes = dtypes and (is_int8 or keys.dtype in _FLOATS)
    if not fits or not dtypes or any(x.dtype != np.float32 for x in scales.values() if x is not None):
        described = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in given.items())
        raise ValueError(f"the native attention has no use for {described}: see `attend` for what it takes")


# `kMostDenseWidth` of csrc/job.h.
MOST_DENSE_WIDTH = 256


def attend_densely(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    *,
    scale: float,
    kernel: int = 0,
) -> jax.Array:
    """softmax(scale query . key + bias) value, each head by itself, of all queries to all keys.

    Args:
      query: (..., T, N, H) float32, H at most `MOST_DENSE_WIDTH`.
      key: (..., S, K, H) float32, where K divides N and S > 0; N / K heads of the queries share one.
      value: as the keys.
      bias: (..., N or 1, T or 1, S) float32, or None. An axis before these three has size 1 or that of the query.
      scale: of the products.
      kernel: an index into `kernels()`, for tests.

    Returns:
      (..., T, N, H) float32.

    Raises:
      ValueError: a shape or a dtype is none of these.
    """
    given = {"query": query, "key": key, "value": value} | ({} if bias is None else {"bias": bias})
    if not _fit_densely(query, key, value, bias) or any(x.dtype != np.float32 for x in given.values()):
        described = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in given.items())
        raise ValueError(f"the native attention has no use for {described}: see `attend_densely` for what it takes")
    call = jax.ffi.ffi_call(DENSE_ATTENTION, jax.ShapeDtypeStruct(query.shape, np.float32), vmap_method="broadcast_all")
    if bias is None:
        bias = jnp.zeros((*query.shape[:-3], 0, 0, 0), np.float32)
    return call(query, key, value, bias, scale=np.float32(scale), kernels=np.int64(kernel))


def _fit_densely(query: Any, key: Any, value: Any, bias: Any) -> bool:
    rank = query.ndim
    if rank < 3 or key.ndim != rank or key.shape != value.shape or query.shape[:-3] != key.shape[:-3]:
        return False
    (queries, heads, width), (keys, key_heads, key_width) = query.shape[-3:], key.shape[-3:]
    if width != key_width or width > MOST_DENSE_WIDTH or 0 in (keys, key_heads) or heads % key_heads:
        return False
    if bias is None:
        return True
    sizes = (*query.shape[:-3], heads, queries)
    return (
        bias.ndim == rank
        and bias.shape[-1] == keys
        and all(n in (1, size) for n, size in zip(bias.shape[:-1], sizes, strict=True))
    )


def second_moments(x: jax.Array, *, kernel: int = 0) -> jax.Array:
    """X^T X: half of a product's multiplications, as it is symmetric.

    Args:
      x: (..., samples, features) float32.
      kernel: an index into `kernels()`, for tests.

    Returns:
      (..., features, features) float32.

    Raises:
      ValueError: x has another dtype, or too few axes.
    """
    if x.ndim < 2 or x.dtype != np.float32:
        raise ValueError(f"second moments are of float32[..., samples, features], not of {x.dtype}{list(x.shape)}")
    *batch, samples, features = x.shape
    call = jax.ffi.ffi_call(
        SECOND_MOMENTS,
        [
            jax.ShapeDtypeStruct((*batch, features, features), np.float32),
            jax.ShapeDtypeStruct((*batch, samples * (-(-features // 16) * 16)), np.float32),
        ],
        vmap_method="broadcast_all",
    )
    moments, _ = call(x, kernels=np.int64(kernel))
    return moments
