"""Safetensors files as dictionaries of NumPy arrays, bfloat16 and the float8 formats included.

The format is https://huggingface.co/docs/safetensors: a JSON header, then the raw arrays. What is
added to the `safetensors` package here: the 8-bit float types that its NumPy reader has no
dtype for, and one error type for whatever is wrong with a file.

>>> import numpy as np, pathlib, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.safetensors"
>>> write_tensors(path, {"kernel": np.eye(2, dtype=np.float16)})
>>> read_tensors(path)["kernel"].dtype
dtype('float16')
"""

import os
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from qwix._src.utils.extras import import_extra

# The type names of the safetensors header.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class CheckpointError(ValueError):
    """A model directory or a checkpoint that cannot be used; the message names the file and why."""


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file, by name.

    Raises:
      CheckpointError: the file is missing, truncated, not a safetensors file, or holds a type
        that NumPy and ml_dtypes have no dtype for.
    """
    safetensors = import_extra("safetensors")
    path = pathlib.Path(path)
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing: ")
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file ({reason}); fetch or write it again"
        ) from error
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {entry['dtype']}")
        flat = np.frombuffer(entry["data"], dtype=DTYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


def write_tensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `arrays` as a safetensors file, with `metadata` in its header.

    Raises:
      TypeError: an array has a dtype that the format has no name for, such as int4.
    """
    numpy_writer = import_extra("safetensors.numpy")
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise TypeError(f"{name!r} is {array.dtype}, which safetensors cannot hold: pack it")
    contiguous = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    numpy_writer.save_file(contiguous, str(path), metadata=dict(metadata or {}))
