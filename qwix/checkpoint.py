"""Quantized models on disk, portable and checked.

A checkpoint is a directory of two files:

- `model.safetensors`: every array of the model under its '/'-joined path in the NNX graph, such as
  `layers/0/up/kernel/array/qvalue`. Types narrower than a byte are packed, lowest bits first, into
  a one-dimensional uint8 array; a scale whose values all fit a narrower float type is held in that
  type.
- `qwix.json`: the format's version, the model's description (`metadata`), the dtype and shape of
  every array as the model has it, and the size and SHA-256 of the other file.

>>> import pathlib, tempfile
>>> from flax import nnx
>>> directory = pathlib.Path(tempfile.mkdtemp()) / "linear"
>>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
>>> manifest = save(directory, model, metadata={"architecture": "linear"})
>>> restored = load(directory, nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(1))))
>>> bool((restored.kernel == model.kernel).all())
True
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from qwix.interop.safetensors import CheckpointError, read_tensors, write_tensors
from qwix.version import __version__

FORMAT_VERSION = 1
MANIFEST = "qwix.json"
TENSORS = "model.safetensors"

# What a scale is tried as, narrowest first: MX scales are powers of two and NVFP4's are e4m3.
_SCALE_DTYPES = (ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float16)


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """One array of a checkpoint, as the model has it and as the file holds it.

    Attributes:
      dtype: the array's dtype in the model.
      shape: its shape in the model.
      stored: the dtype in the file; differs for packed arrays and narrowed scales.
      bytes: size in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    stored: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `qwix.json`."""

    metadata: dict[str, Any]
    arrays: dict[str, ArrayInfo]
    bytes: int
    sha256: str
    qwix_version: str = __version__
    version: int = FORMAT_VERSION


def bits_of(dtype: Any) -> int:
    """Bits that one element of `dtype` carries: 4 for int4, though NumPy gives it a byte.

    >>> bits_of(jnp.int4), bits_of(jnp.float8_e4m3fn)
    (4, 8)
    """
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return dtype.itemsize * 8


def pack(array: np.ndarray) -> np.ndarray:
    """The codes of a 1-, 2- or 4-bit array in one uint8 vector, the first code in the lowest bits.

    >>> pack(np.array([1, -2, 3], dtype=ml_dtypes.int4))
    array([225,   3], dtype=uint8)
    """
    bits = bits_of(array.dtype)
    per_byte = 8 // bits
    codes = np.ascontiguousarray(array).reshape(-1).view(np.uint8) & (2**bits - 1)
    codes = np.pad(codes, (0, -codes.size % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(codes), np.uint8)
    for i in range(per_byte):
        packed |= codes[:, i] << np.uint8(i * bits)
    return packed


def unpack(packed: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`.

    >>> unpack(np.array([225, 3], dtype=np.uint8), jnp.int4, (3,)).astype(int)
    array([ 1, -2,  3])
    """
    dtype = np.dtype(dtype)
    bits = bits_of(dtype)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[: int(np.prod(shape))]
    if jnp.issubdtype(dtype, jnp.signedinteger):
        sign = 1 << (bits - 1)
        return ((codes.astype(np.int8) ^ sign) - sign).astype(dtype).reshape(shape)
    return codes.view(dtype).reshape(shape)


def _to_file(name: str, array: np.ndarray) -> np.ndarray:
    """What the file holds for an array of the model."""
    if bits_of(array.dtype) < 8:
        return pack(array)
    if name.endswith("scale") and jnp.issubdtype(array.dtype, jnp.floating):
        for dtype in _SCALE_DTYPES:
            if np.dtype(dtype).itemsize >= array.dtype.itemsize:
                break
            with np.errstate(over="ignore", invalid="ignore"):
                narrow = array.astype(dtype)
                same = np.array_equal(_raw(narrow.astype(array.dtype)), _raw(array))
            if same:
                return narrow
    return array


def _raw(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, so that a comparison tells -0.0 from 0.0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _from_file(stored: np.ndarray, info: ArrayInfo) -> np.ndarray:
    dtype = jnp.dtype(info.dtype)
    if bits_of(dtype) < 8:
        return unpack(stored, dtype, info.shape)
    return stored.astype(dtype)


def _flatten(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """Yields (path, name, leaf) for each array of a model, an nnx.Variable or a plain array."""
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        yield path, "/".join(map(str, path)), leaf


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def stored_bytes(model: nnx.Module | Mapping[str, Any]) -> dict[str, int]:
    """Bytes that `save` writes for each array of `model`, by name; also of a Linen model's parameters."""
    if isinstance(model, nnx.Module):
        leaves = [(name, _value(leaf)) for _, name, leaf in _flatten(model)]
    else:
        leaves = [
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
        ]
    return {name: _to_file(name, np.asarray(leaf)).nbytes for name, leaf in leaves}


def save(
    directory: str | os.PathLike[str],
    model: nnx.Module,
    *,
    metadata: Mapping[str, Any],
    overwrite: bool = False,
) -> Manifest:
    """Writes a model's arrays, and `metadata`, as a new checkpoint directory.

    Args:
      directory: where; it appears only when everything is written.
      model: an NNX model, quantized or not.
      metadata: what it takes to build the model again; anything that JSON holds.
      overwrite: replace an existing checkpoint.

    Raises:
      CheckpointError: the directory exists and is not empty (with `overwrite`: is no checkpoint).
      TypeError: an array is not plain numbers: a random key, for one.
    """
    with new_directory(directory, marker=MANIFEST, overwrite=overwrite) as scratch:
        return write(scratch, model, metadata=metadata)


def write(directory: pathlib.Path, model: nnx.Module, *, metadata: Mapping[str, Any]) -> Manifest:
    """Writes the two files of a checkpoint into a directory that exists; see `save`."""
    arrays, infos = {}, {}
    for _, name, leaf in _flatten(model):
        value = _value(leaf)
        if not isinstance(value, jax.Array | np.ndarray) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is {type(value).__name__}: only arrays of numbers are saved")
        array = np.asarray(value)
        stored = arrays[name] = _to_file(name, array)
        infos[name] = ArrayInfo(str(array.dtype), array.shape, str(stored.dtype), stored.nbytes)
    write_tensors(directory / TENSORS, arrays, {"format": "qwix"})
    data = (directory / TENSORS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    manifest = Manifest(metadata=dict(metadata), arrays=infos, bytes=len(data), sha256=digest)
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The description of a checkpoint, without its arrays.

    Raises:
      CheckpointError: there is no checkpoint, or one of a newer format, or the file is damaged.
    """
    directory = pathlib.Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not path.is_file():
        raise CheckpointError(f"{directory}: not a quantized checkpoint, there is no {MANIFEST}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {fields['version']}, and this qwix reads up to {FORMAT_VERSION}: upgrade qwix"
            )
        fields["arrays"] = {
            name: ArrayInfo(**{**info, "shape": tuple(info["shape"])}) for name, info in fields["arrays"].items()
        }
        return Manifest(**fields)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def read_arrays(directory: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name, with the dtypes and shapes of the model.

    Raises:
      CheckpointError: a file is missing, truncated or changed since it was written.
    """
    manifest = read_manifest(directory)
    path = pathlib.Path(directory) / TENSORS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) != manifest.bytes:
        raise CheckpointError(f"{path}: {len(data)} bytes, and {manifest.bytes} were written")
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise CheckpointError(f"{path}: its SHA-256 is not the one in {MANIFEST}: it is damaged")
    stored = read_tensors(path)
    if missing := manifest.arrays.keys() ^ stored.keys():
        raise CheckpointError(f"{path}: {sorted(missing)[0]!r} is not in both files")
    return {name: _from_file(stored[name], info) for name, info in manifest.arrays.items()}


def load(directory: str | os.PathLike[str], template: nnx.Module) -> Any:
    """Reads a checkpoint into the structure of `template`.

    Args:
      directory: what `save` wrote.
      template: a model of the same structure; its arrays may be abstract (`nnx.eval_shape`).

    Returns:
      A new model with the arrays of the checkpoint. The template is not changed.

    Raises:
      CheckpointError: a file is missing or damaged, or the arrays are not those of the template.
    """
    arrays = read_arrays(directory)
    graphdef, _ = nnx.split(template)
    leaves = []
    for path, name, leaf in _flatten(template):
        if name not in arrays:
            raise CheckpointError(f"{directory}: the model has {name!r}, and the checkpoint not")
        wanted, found = _value(leaf), arrays.pop(name)
        if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            raise CheckpointError(
                f"{directory}: {name!r} is {found.dtype}{list(found.shape)}, "
                f"and the model wants {wanted.dtype}{list(wanted.shape)}"
            )
        value = jnp.asarray(found)
        leaves.append((path, leaf.replace(value) if isinstance(leaf, nnx.Variable) else value))
    if arrays:
        raise CheckpointError(f"{directory}: the model has no place for {sorted(arrays)[0]!r}")
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str], *, marker: str, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields a scratch directory that takes the place of `directory` when the block ends well.

    Args:
      directory: the result; it may exist if it is empty.
      marker: a file that says that an existing directory is one of ours.
      overwrite: replace an existing directory that holds `marker`.

    Raises:
      CheckpointError: `directory` is there already, or its parent cannot be written.
    """
    target = pathlib.Path(directory)
    check_target(target, marker=marker, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        scratch.chmod(0o755)  # mkdtemp makes it private, the result is like any other directory.
        yield scratch
        if target.exists():
            check_target(target, marker=marker, overwrite=overwrite)
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_target(target: pathlib.Path, *, marker: str, overwrite: bool) -> None:
    """Raises CheckpointError if `new_directory` may not put its result at `target`."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file, and a directory has to go there")
    if any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{target}: exists and is not empty (--overwrite replaces it)")
        if not (target / marker).is_file():
            raise CheckpointError(f"{target}: not replaced, it was not written by qwix: no {marker}")
