import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qwix import checkpoint
from qwix.checkpoint import CheckpointError
from qwix.interop.safetensors import read_tensors

NARROW = [jnp.int2, jnp.uint2, jnp.int4, jnp.uint4, jnp.float4_e2m1fn]

WIDE = [jnp.bool_, jnp.int8, jnp.uint8, jnp.int32, jnp.float16, jnp.bfloat16, jnp.float32]
WIDE += [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e8m0fnu]


class Arrays(nnx.Module):
    """Holds any arrays, as parameters."""

    def __init__(self, **arrays):
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))


def round_trip(directory, model, abstract=True):
    checkpoint.save(directory, model, metadata={})
    template = nnx.eval_shape(lambda: model) if abstract else model
    return checkpoint.load(directory, template)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(NARROW), st.lists(st.integers(0, 5), min_size=0, max_size=3), st.data())
def test_packing_is_lossless_and_dense(dtype, shape, data):
    bits = checkpoint.bits_of(dtype)
    size = int(np.prod(shape))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size))
    every = all_codes(dtype)
    array = np.array([every[c] for c in codes], dtype=dtype).reshape(shape)
    packed = checkpoint.pack(array)
    assert packed.dtype == np.uint8
    assert packed.size == -(-size * bits // 8)
    restored = checkpoint.unpack(packed, dtype, tuple(shape))
    assert restored.dtype == array.dtype
    np.testing.assert_array_equal(restored.astype(float), array.astype(float))
    # The layout: element i is bits i*b..i*b+b-1 of the file, the lowest bit first.
    stream = sum(int(byte) << (8 * i) for i, byte in enumerate(packed))
    assert stream == sum(code << (bits * i) for i, code in enumerate(codes))


def all_codes(dtype):
    """The value of each code, written down without the code under test."""
    bits = checkpoint.bits_of(dtype)
    if dtype == jnp.float4_e2m1fn:
        values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        return values + [-v for v in values]
    codes = np.arange(2**bits)
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if "u" not in str(jnp.dtype(dtype)) else codes


@pytest.mark.parametrize(
    "dtype",
    [*NARROW, *WIDE],
)
def test_every_dtype_comes_back_equal(dtype, tmp_path):
    array = jnp.asarray(np.array([[0, 1, 1], [1, 0, 1]]), dtype)
    if dtype == jnp.float8_e8m0fnu:
        array = jnp.asarray(np.array([[0.5, 1, 2], [4, 8, 16]], np.float32)).astype(dtype)
    restored = round_trip(tmp_path / "c", Arrays(x=array, scalar=array[0, 0]))
    assert restored.x.dtype == array.dtype
    assert restored.x.shape == (2, 3)
    np.testing.assert_array_equal(np.asarray(restored.x[...]), np.asarray(array))
    assert restored.scalar.shape == ()


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([0.25, 2.0, 2.0**-100], "float8_e8m0fnu"),
        ([0.0, 1.5, 448.0], "float8_e4m3fn"),
        ([-0.0, 1.0, 2.0], "float8_e4m3fn"),
        ([1.0, 1.0 + 2**-7], "bfloat16"),
        ([1.0, 1.0 + 2**-10], "float16"),
        ([1.0, 1.1], "float32"),
        ([np.nan, 1.1], "float32"),
    ],
)
def test_a_scale_is_stored_in_the_narrowest_type_that_holds_it(values, stored, tmp_path):
    model = Arrays(scale=jnp.array(values, jnp.float32), bias=jnp.array(values, jnp.float32))
    restored = round_trip(tmp_path / "c", model)
    raw = read_tensors(tmp_path / "c" / checkpoint.TENSORS)
    assert str(raw["scale"].dtype) == stored
    assert str(raw["bias"].dtype) == "float32"
    bits = np.array(values, np.float32).view(np.uint32)
    np.testing.assert_array_equal(np.asarray(restored.scale[...]).view(np.uint32), bits)


def test_stored_bytes_are_those_of_the_file(tmp_path):
    model = Arrays(a=jnp.ones((3, 5), jnp.int4), b=jnp.ones((7,), jnp.float32))
    assert checkpoint.stored_bytes(model) == {"a": 8, "b": 28}
    manifest = checkpoint.save(tmp_path / "c", model, metadata={"note": ["x", 1]})
    assert {name: info.bytes for name, info in manifest.arrays.items()} == {"a": 8, "b": 28}
    assert manifest.bytes == (tmp_path / "c" / checkpoint.TENSORS).stat().st_size
    assert checkpoint.read_manifest(tmp_path / "c") == manifest


def test_nested_modules_and_lists(tmp_path):
    def build(seed):
        rngs = nnx.Rngs(seed)
        layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])
        return nnx.Sequential(layers, nnx.BatchNorm(2, rngs=rngs))

    model = build(0)
    checkpoint.save(tmp_path / "c", model, metadata={})
    restored = checkpoint.load(tmp_path / "c", nnx.eval_shape(lambda: build(1)))
    want, got = nnx.state(model), nnx.state(restored)
    assert jax.tree.structure(want) == jax.tree.structure(got)
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_random_keys_are_refused(tmp_path):
    with pytest.raises(TypeError, match="default/key"):
        checkpoint.save(tmp_path / "c", nnx.Rngs(0), metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path):
    model = Arrays(x=jnp.arange(64, dtype=jnp.float32), y=jnp.ones(3, jnp.int4))
    checkpoint.save(tmp_path / "c", model, metadata={})
    return tmp_path / "c"


def test_a_template_of_another_model_is_an_error(saved):
    template = Arrays(x=jnp.zeros(64), y=jnp.ones(3, jnp.int4))
    checkpoint.load(saved, template)
    wrong = {
        r"'y' is int4\[3\].*wants int4\[4\]": Arrays(x=template.x[...], y=jnp.ones(4, jnp.int4)),
        r"'x' is float32\[64\].*bfloat16": Arrays(x=template.x[...].astype(jnp.bfloat16), y=template.y[...]),
        r"no place for 'y'": Arrays(x=template.x[...]),
        r"the model has 'z'": Arrays(x=template.x[...], y=template.y[...], z=jnp.ones(1)),
    }
    for message, model in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(saved, model)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_truncate, "bytes, and"), (_flip, "SHA-256"), (_remove, "cannot be read")],
)
def test_damaged_arrays_are_an_error(saved, damage, message):
    damage(saved / checkpoint.TENSORS)
    with pytest.raises(CheckpointError, match=rf"{checkpoint.TENSORS}: .*{message}"):
        checkpoint.read_arrays(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged.*version"),
        ('{"version": 1, "arrays": {"x": 3}}', "damaged"),
        ('{"version": 99}', "version 99.*upgrade"),
    ],
)
def test_a_damaged_manifest_is_an_error(saved, text, message):
    (saved / checkpoint.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{checkpoint.MANIFEST}: .*{message}"):
        checkpoint.read_manifest(saved)


def test_an_array_without_description_is_an_error(saved):
    path = saved / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["arrays"]["y"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="'y'"):
        checkpoint.read_arrays(saved)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.read_manifest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no qwix\.json"):
        checkpoint.read_manifest(tmp_path)


def test_a_directory_is_replaced_only_on_request_and_only_if_it_is_ours(saved, tmp_path):
    model = Arrays(x=jnp.ones(2))
    with pytest.raises(CheckpointError, match="not empty"):
        checkpoint.save(saved, model, metadata={})
    checkpoint.save(saved, model, metadata={"new": True}, overwrite=True)
    assert checkpoint.read_manifest(saved).metadata == {"new": True}
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="was not written by qwix"):
        checkpoint.save(tmp_path / "precious", model, metadata={}, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.save(tmp_path / "file", model, metadata={}, overwrite=True)
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", model, metadata={})


def test_nothing_is_left_when_writing_fails(saved, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    digest = checkpoint.read_manifest(saved).sha256
    with (
        pytest.raises(KeyboardInterrupt),
        checkpoint.new_directory(saved, marker=checkpoint.MANIFEST, overwrite=True) as scratch,
    ):
        (scratch / "half").write_text("x")
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert checkpoint.read_manifest(saved).sha256 == digest


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "c", Arrays(x=jnp.ones(1)), metadata={})


def test_bits_of():
    assert [checkpoint.bits_of(d) for d in (jnp.int2, jnp.uint4, ml_dtypes.float4_e2m1fn)] == [
        2,
        4,
        4,
    ]
    assert [checkpoint.bits_of(d) for d in (jnp.bfloat16, jnp.float32, jnp.bool_)] == [16, 32, 8]
