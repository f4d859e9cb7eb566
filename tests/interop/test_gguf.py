import json
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import pytest

import qwix
from qwix.interop import gguf
from qwix.interop.safetensors import CheckpointError
from tests.interop import gguf_writer

BLOCKS = json.loads((pathlib.Path(__file__).parent.parent / "data" / "gguf_blocks.json").read_text())


def recorded(name):
    """A tensor with the bytes that another library packed, and its values by that library."""
    shape = tuple(BLOCKS["shape"])
    raw = np.frombuffer(bytes.fromhex(BLOCKS[name]["bytes"]), np.uint8).reshape(shape[0], -1)
    values = np.array(BLOCKS[name]["values"], np.float32).reshape(shape)
    return gguf.Tensor("blk.0.attn_q.weight", shape, gguf.TensorType[name], raw), values


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_values_are_those_of_another_library(name):
    tensor, values = recorded(name)
    np.testing.assert_array_equal(gguf.to_float(tensor), values)


@pytest.mark.parametrize(("name", "dtype"), [("Q8_0", jnp.int8), ("Q4_0", jnp.int4)])
def test_codes_become_a_qarray_without_rounding(name, dtype):
    tensor, values = recorded(name)
    array = gguf.to_qarray(tensor)
    assert (array.qtype, array.scale.shape) == (dtype, (2, 2))
    np.testing.assert_array_equal(qwix.dequantize(array), values)
    np.testing.assert_array_equal(qwix.dequantize(array.T), values.T)


@pytest.mark.parametrize("name", ["Q4_1", "F16"])
def test_what_no_qarray_can_hold_is_an_error(name):
    tensor, _ = recorded(name)
    assert not gguf.fits_qarray(tensor)
    with pytest.raises(CheckpointError, match=rf"'blk.0.attn_q.weight' is {name}, .*read it as floats"):
        gguf.to_qarray(tensor)


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(3, 64))
    path = tmp_path / "model.gguf"
    metadata = {"general.architecture": "llama", "a.count": 7, "a.rate": 0.5, "a.flag": True}
    metadata |= {"a.tokens": ["x", "", "Ġü"], "a.kinds": [1, -2, 3]}
    tensors = {"floats": (matrix, gguf_writer.FLOAT32), "codes": (matrix, gguf_writer.Q4_1)}
    tensors["vector"] = (matrix[0, :5], gguf_writer.FLOAT32)
    gguf_writer.write(path, metadata, tensors)
    return path


def test_metadata_and_tensors_of_a_file(path):
    file = gguf.read(path)
    kinds = file.metadata["a.kinds"]
    assert {k: v for k, v in file.metadata.items() if k != "a.kinds"} == {
        "general.architecture": "llama",
        "a.count": 7,
        "a.rate": 0.5,
        "a.flag": True,
        "a.tokens": ["x", "", "Ġü"],
    }
    np.testing.assert_array_equal(kinds, [1, -2, 3])
    assert {name: t.shape for name, t in file.tensors.items()} == {"floats": (3, 64), "codes": (3, 64), "vector": (5,)}
    assert file.tensors["codes"].nbytes == 3 * 2 * 20
    floats = gguf.to_float(file.tensors["floats"])
    np.testing.assert_array_equal(gguf.to_float(file.tensors["vector"]), floats[0, :5])
    np.testing.assert_allclose(gguf.to_float(file.tensors["codes"]), floats, atol=0.2)


def test_every_truncation_is_one_error(path):
    raw = path.read_bytes()
    for size in [*range(0, len(raw) - 32, 13), len(raw) - 32]:
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"model\.gguf: truncated, or not a GGUF file"):
            gguf.read(path)


def _patched(old, new):
    def change(raw):
        assert raw.count(old) == 1
        return raw.replace(old, new)

    return change


def _vector(size, kind, rank=1):
    """How the table of the file describes its tensor of five numbers."""
    return b"vector" + struct.pack("<IQI", rank, size, kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"PK" + raw[2:], "does not start with GGUF"),
        (lambda raw: raw[:4] + struct.pack("<I", 9) + raw[8:], "version 9"),
        (_patched(b"a.flag" + struct.pack("<I", 7), b"a.flag" + struct.pack("<I", 99)), "type 99"),
        (_patched(b"a.rate", b"\xff\xff\xff\xff\xff\xff"), "utf-8"),
        (_patched(_vector(5, 0), _vector(5, 77)), "'vector' has the unknown type 77"),
        (_patched(_vector(5, 0), _vector(5, 8)), "rows of 5, no multiple of 32"),
        (_patched(_vector(5, 0), _vector(2**60, 0)), "ends within tensor 'vector'"),
        (_patched(_vector(5, 0), _vector(5, 0, rank=2**31)), "ends within vector"),
    ],
)
def test_corrupt_files_are_one_error(path, change, message):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        gguf.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf: cannot be read \(No such file"):
        gguf.read(tmp_path / "nowhere.gguf")
