"""GGUF files, the format of llama.cpp: metadata and tensors, as float arrays or as QArrays.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian): a header,
key-value metadata, a table of tensors, and their data, which is mapped into memory and read where it is used. A
quantized tensor is a row-major matrix whose rows are cut into blocks of 32 elements (of 256 for the "K" types):

| type | block | value of an element | as a QArray |
|---|---|---|---|
| `F32`, `F16`, `BF16` | | itself | no |
| `Q8_0` | scale f16; 32 int8 | scale q | int8, groups of 32, bit for bit |
| `Q4_0` | scale f16; 32 codes of 4 bits | scale (q - 8) | int4, groups of 32, bit for bit |
| `Q4_1` | scale f16, minimum f16; 32 codes of 4 bits | scale q + minimum | no: a QArray's zero point is an integer |
| others | | by the package `gguf` | no |

Why not the package's reader as well: it makes several NumPy arrays of every string, so that a vocabulary of 49152
tokens takes seconds; this one takes a tenth of one, and says in one line what is wrong with a file.

>>> import pathlib, struct, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "empty.gguf"
>>> _ = path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
>>> read(path).tensors
{}
"""

import dataclasses
import enum
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qwix._src.core import qarray
from qwix._src.utils.extras import import_extra
from qwix.interop.safetensors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Elements a block of the types that are read here.
GROUP = 32

# The format's metadata types 0 to 7 and 10 to 12; 8 is a string and 9 an array.
_SCALARS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9


class TensorType(enum.IntEnum):
    """Tensor types by their number in the file: those that are read here, and the names of common others."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30


# (elements, bytes) of a block.
_BLOCKS = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.BF16: (1, 2),
    TensorType.Q4_0: (GROUP, 18),
    TensorType.Q4_1: (GROUP, 20),
    TensorType.Q5_0: (GROUP, 22),
    TensorType.Q5_1: (GROUP, 24),
    TensorType.Q8_0: (GROUP, 34),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.IQ4_NL: (GROUP, 18),
    TensorType.IQ4_XS: (256, 136),
}
_FLOATS = {
    TensorType.F32: np.dtype("<f4"),
    TensorType.F16: np.dtype("<f2"),
    TensorType.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
      name: its name.
      shape: row-major, as in NumPy: (out, in) for the weight of a linear layer. (The file has it the other way round.)
      type: how its elements are stored.
      data: its bytes, (rows, bytes a row), a view into the file.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes


@dataclasses.dataclass(frozen=True)
class File:
    """What is in a GGUF file.

    Attributes:
      path: the file.
      metadata: key -> bool, int, float, str, NumPy array of numbers or list of strings.
      tensors: name -> tensor.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read(path: str | os.PathLike[str]) -> File:
    """Reads the header, the metadata and the table of tensors; the tensors' data stays in the file.

    Raises:
      CheckpointError: the file is missing, truncated, of another format or version, or holds a tensor of an unknown
        type.
    """
    path = pathlib.Path(path)
    try:
        raw = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # NumPy cannot map a file without content.
        raise CheckpointError(f"{path}: truncated, or not a GGUF file (it is empty)") from error
    cursor = _Cursor(raw)
    try:
        metadata, tensors = _parse(cursor)
    except (_FormatError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: truncated, or not a GGUF file ({error}, at byte {cursor.at} of {raw.size}); fetch it again"
        ) from error
    return File(path, metadata, tensors)


def to_float(tensor: Tensor) -> np.ndarray:
    """The tensor's values as float32, in its shape.

    Raises:
      MissingExtraError: its type is read by the package `gguf`, which is not installed.
    """
    if tensor.type in _FLOATS:
        return tensor.data.view(_FLOATS[tensor.type]).reshape(tensor.shape).astype(np.float32)
    if tensor.type not in _UNPACK:
        quants = import_extra("gguf.quants", "gguf")
        return quants.dequantize(tensor.data, tensor.type).reshape(tensor.shape)
    codes, scale, minimum = _UNPACK[tensor.type](tensor.data)
    values = codes.astype(np.float32) * scale
    if minimum is not None:
        values += minimum
    return values.reshape(tensor.shape)


def fits_qarray(tensor: Tensor) -> bool:
    """Whether `to_qarray` can hold the tensor: `Q8_0` and `Q4_0`."""
    return tensor.type in (TensorType.Q8_0, TensorType.Q4_0)


def to_qarray(tensor: Tensor) -> qarray.QArray:
    """The tensor as it is stored: the codes of its blocks and their scales, without rounding.

    Returns:
      A QArray of the tensor's shape, int8 for `Q8_0` and int4 for `Q4_0`, with a float32 scale for every 32 elements of
      the last axis; its dequantized value is that of `to_float`, bit for bit.

    Raises:
      CheckpointError: the type has no such form; `to_float` reads it.
    """
    if not fits_qarray(tensor):
        raise CheckpointError(
            f"tensor {tensor.name!r} is {tensor.type.name}, which has no lossless QArray (Q8_0 and Q4_0 have): "
            "read it as floats and quantize those"
        )
    codes, scale, _ = _UNPACK[tensor.type](tensor.data)
    dtype = jnp.int8 if tensor.type == TensorType.Q8_0 else jnp.int4
    scale_shape = (*tensor.shape[:-1], tensor.shape[-1] // GROUP)
    # A byte holds each of them already, and NumPy's conversion to int4 goes one element at a time.
    qvalue = codes.view(dtype).reshape(tensor.shape)
    return qarray.QArray(jnp.asarray(qvalue), jnp.asarray(scale.reshape(scale_shape)))


# A block's parts: codes (blocks, 32) int8, scale (blocks, 1) float32, minimum likewise or None.
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _unpack_q8_0(data: np.ndarray) -> _Parts:
    blocks = data.reshape(-1, _BLOCKS[TensorType.Q8_0][1])
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _unpack_q4_0(data: np.ndarray) -> _Parts:
    blocks = data.reshape(-1, _BLOCKS[TensorType.Q4_0][1])
    return _nibbles(blocks[:, 2:]) - np.int8(8), _half(blocks, 0), None


def _unpack_q4_1(data: np.ndarray) -> _Parts:
    blocks = data.reshape(-1, _BLOCKS[TensorType.Q4_1][1])
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


_UNPACK = {TensorType.Q8_0: _unpack_q8_0, TensorType.Q4_0: _unpack_q4_0, TensorType.Q4_1: _unpack_q4_1}


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 number that starts at byte `at` of each block, (blocks, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, (blocks, 32): the low halves of a block's 16 bytes come first, then the high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).view(np.int8)


class _FormatError(Exception):
    """What is wrong with the bytes; `read` adds where."""


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, raw: np.ndarray):
        self.raw = raw.data
        self.at = 0

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.raw) - self.at:
            raise _FormatError(f"the file ends within {what}")
        self.at += size
        return self.raw[self.at - size : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        return str(self.take(self.number("Q", what), what), "utf-8")

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            kind, count = self.number("I", what), self.number("Q", what)
            if kind == _STRING:
                return [self.string(what) for _ in range(count)]
            if kind in _SCALARS:
                return np.frombuffer(self.take(count * _SCALARS[kind].itemsize, what), _SCALARS[kind])
        elif kind in _SCALARS:
            return np.frombuffer(self.take(_SCALARS[kind].itemsize, what), _SCALARS[kind])[0].item()
        raise _FormatError(f"{what} has the unknown type {kind}")


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if bytes(cursor.take(4, "the header")) != MAGIC:
        raise _FormatError("it does not start with GGUF")
    version = cursor.number("I", "the header")
    if version not in VERSIONS:
        raise _FormatError(f"version {version} is none of {VERSIONS}")
    tensor_count, pair_count = cursor.number("Q", "the header"), cursor.number("Q", "the header")
    metadata = {}
    for _ in range(pair_count):
        key = cursor.string("a metadata key")
        metadata[key] = cursor.value(cursor.number("I", key), key)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _FormatError(f"general.alignment is {alignment!r}")
    table = []
    for _ in range(tensor_count):
        name = cursor.string("a tensor's name")
        rank = cursor.number("I", name)
        shape = tuple(cursor.number("Q", name) for _ in range(rank))[::-1]
        table.append((name, shape, cursor.number("I", name), cursor.number("Q", name)))
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        try:
            tensor_type = TensorType(kind)
        except ValueError as error:
            raise _FormatError(f"tensor {name!r} has the unknown type {kind}") from error
        elements, size = _BLOCKS[tensor_type]
        row = shape[-1] if shape else 1
        if row % elements:
            raise _FormatError(f"tensor {name!r} of {tensor_type.name} has rows of {row}, no multiple of {elements}")
        rows = math.prod(shape[:-1])
        cursor.at = start + offset
        data = cursor.take(rows * (row // elements * size), f"tensor {name!r}")
        tensors[name] = Tensor(name, shape, tensor_type, np.frombuffer(data, np.uint8).reshape(rows, -1))
    return metadata, tensors
