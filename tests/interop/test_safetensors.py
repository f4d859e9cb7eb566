import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qwix.interop.safetensors import DTYPES, CheckpointError, read_tensors, write_tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_round_trip(dtype, shape, tmp_path):
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape).astype(dtype)
    write_tensors(tmp_path / "a.safetensors", {"x": array})
    restored = read_tensors(tmp_path / "a.safetensors")["x"]
    assert restored.dtype == dtype
    assert restored.shape == shape
    assert restored.tobytes() == array.tobytes()


def test_the_package_reads_what_is_written_and_the_other_way_round(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    write_tensors(tmp_path / "ours", {"x": array.T}, metadata={"note": "x"})
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "ours")["x"], array.T)
    with safetensors.safe_open(tmp_path / "ours", "np") as file:
        assert file.metadata() == {"note": "x"}
    safetensors.numpy.save_file({"x": array}, tmp_path / "theirs")
    np.testing.assert_array_equal(read_tensors(tmp_path / "theirs")["x"], array)


def test_types_without_a_name_are_refused(tmp_path):
    with pytest.raises(TypeError, match="'x' is int4"):
        write_tensors(tmp_path / "a", {"x": np.ones(2, ml_dtypes.int4)})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}xx"])
def test_other_files_are_an_error_that_names_them(content, tmp_path):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(CheckpointError, match="broken: truncated, or not a safetensors file"):
        read_tensors(tmp_path / "broken")


def test_unknown_types_and_missing_files_are_named(tmp_path):
    header = b'{"x":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}'
    (tmp_path / "c64").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="'x' has the unknown type C64"):
        read_tensors(tmp_path / "c64")
    with pytest.raises(CheckpointError, match="nowhere: cannot be read"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path)
