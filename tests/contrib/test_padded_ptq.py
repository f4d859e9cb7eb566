"""Arrays whose tiles do not divide their axes, against float64 arithmetic on the padded array."""

import dataclasses
import functools
import itertools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st

import qwix
from qwix._src.core import qarray
from qwix._src.providers import boxed_param, ptq
from qwix.contrib import padded_ptq
from qwix.contrib.padded_ptq import PaddedQArray

MATMUL = (((1,), (0,)), ((), ()))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + 0.2, jnp.float32)


def how(tiled_axes: dict[int, int | float], channelwise_axes: Any = (), **kwargs: Any) -> qarray.HowToQuantize:
    return qarray.HowToQuantize(
        **{"qtype": jnp.int8, "tiled_axes": tiled_axes, "channelwise_axes": channelwise_axes} | kwargs
    )


ROWS = how({0: 4}, (1,))


@pytest.fixture(params=[False, True], ids=["cut", "kept"])
def keep_padded(request, monkeypatch):
    """Both ways of storing the qvalue."""
    monkeypatch.setattr(padded_ptq, "QARRAY_KEEP_PADDED_SHAPE", request.param)
    return request.param


def padded_reference(x: Any, padded: tuple[int, ...], how: qarray.HowToQuantize) -> np.ndarray:
    """x in float64, quantized to int8 and back with the zeros that pad it."""
    x = np.asarray(x, np.float64)
    full = np.zeros(padded)
    full[tuple(map(slice, x.shape))] = x
    split, reduced = [], []
    for axis, size in enumerate(padded):
        if axis in how.channelwise_axes:
            tile = 1
        else:
            tile = how.tiled_axes.get(axis, size)
            reduced.append(2 * axis + 1)
        split += [size // tile, tile]
    tiles = full.reshape(split)
    low, high = (f(tiles, axis=tuple(reduced), keepdims=True) for f in (np.min, np.max))
    if how.calibration_method == "minmax":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / 255
        zero = np.clip(np.round(-128 - low / scale), -128, 127)
    else:
        scale, zero = np.maximum(-low, high) * 1.2 / 127.5, 0
    scale = np.where(scale == 0, 1, scale)
    codes = np.clip(np.round(tiles / scale + zero), -128, 127)
    return ((codes - zero) * scale).reshape(padded)[tuple(map(slice, x.shape))]


# --- the array


@pytest.mark.parametrize(
    ("shape", "tiles", "padded"),
    [
        ((10, 6), {0: 4}, (12, 6)),
        ((10, 6), {-1: 4, 0: 5}, (10, 8)),
        ((10,), {0: 0.3}, (12,)),  # round(10 * 0.3) = 3 elements
        ((10,), {0: 16}, (16,)),
        ((), {}, ()),
    ],
)
def test_padded_shape(shape, tiles, padded):
    assert padded_ptq.get_padded_shape(shape, tiles) == padded


@pytest.mark.parametrize("tiles", [{0: 0}, {0: -2}, {2: 4}, {0: 0.01}])
def test_padded_shape_of_no_tile(tiles):
    with pytest.raises(ValueError, match=r"cannot be tiled|no axis 2"):
        padded_ptq.get_padded_shape((10, 6), tiles)


def test_pad_to_shape():
    assert padded_ptq.pad_to_shape(jnp.ones(2), (4,)).tolist() == [1, 1, 0, 0]
    for target in ((1,), (2, 2)):
        with pytest.raises(ValueError, match=r"Cannot pad an array of shape \(2,\)"):
            padded_ptq.pad_to_shape(jnp.ones(2), target)


@hypothesis.given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    tiles=st.lists(st.sampled_from([None, 1, 2, 3, 4, 9]), min_size=3, max_size=3),
    # With a range of 1 the largest element would be a tie, which float32 may round to either side.
    method=st.sampled_from(["absmax,1.2", "minmax"]),
    keep=st.booleans(),
    seed=st.integers(0, 9),
)
def test_quantizes_as_if_padded(shape, tiles, method, keep, seed):
    x = normal(*shape, seed=seed)
    tiled = {axis: tile for axis, tile in zip(range(x.ndim), tiles, strict=False) if tile is not None}
    h = how(tiled, calibration_method=method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padded_ptq, "QARRAY_KEEP_PADDED_SHAPE", keep)
        q = padded_ptq.quantize(x, h)
    padded = padded_ptq.get_padded_shape(x.shape, tiled)
    assert (q.shape, q.original_shape, q.padded_shape, q.size) == (x.shape, x.shape, padded, x.size)
    assert q.qvalue.shape == (padded if keep else x.shape)
    assert q.scale.shape == qarray.get_scale_shape(padded, h)
    truth = padded_reference(x, padded, h)
    for found in (padded_ptq.dequantize(q), qarray.dequantize(q)):
        assert found.shape == x.shape
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qtype", ["int4", "int3", "nf4", "float8_e4m3fn", "mxfp4", "nvfp4"])
def test_formats(qtype, keep_padded):
    h = how({0: 4}, (1,), qtype=qtype)
    x = normal(10, 3)
    q = padded_ptq.quantize(x, h)
    expected = qarray.dequantize(qarray.quantize(jnp.pad(x, ((0, 2), (0, 0))), h))
    assert np.array_equal(padded_ptq.dequantize(q), expected[:10])
    y = padded_ptq.quantize(normal(2, 10), how({1: 4}, (0,)))
    found = padded_ptq.dot_general(y, q, MATMUL)
    np.testing.assert_allclose(found, padded_ptq.dequantize(y) @ expected[:10], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["absmax", "minmax"])
@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_padding_stands_for_zero(qtype, method, keep_padded):
    q = padded_ptq.quantize(normal(10, 3) + 3, how({0: 4}, (1,), qtype=qtype, calibration_method=method))
    extended = padded_ptq._extended(q, {0: 16})
    assert extended.shape == (16, 3)
    values = qarray.dequantize(extended)
    assert np.array_equal(values[:10], padded_ptq.dequantize(q))
    assert not np.any(values[10:])


def test_no_padding_is_a_plain_quantization():
    x = normal(8, 6)
    q, expected = padded_ptq.quantize(x, ROWS), qarray.quantize(x, ROWS)
    assert q.padded_axes() == ()
    for found, leaf in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(found, leaf)


def test_zeros_count_in_rms():
    x = jnp.ones((6,))
    q = padded_ptq.quantize(x, how({0: 4}, calibration_method="rms,1"))
    np.testing.assert_allclose(q.scale * 127.5, [1, np.sqrt(0.5)], rtol=1e-6)


def test_tile_shapes():
    q = padded_ptq.quantize(normal(10, 6), how({0: 4}, (1,), calibration_method="minmax"))
    assert q.scale_tile_shape == q.zero_point_tile_shape == (4, 1)
    assert padded_ptq.quantize(normal(10), how({0: 4})).zero_point_tile_shape is None


def test_dtype(keep_padded):
    q = padded_ptq.quantize(normal(10, 6).astype(jnp.bfloat16), ROWS)
    assert q.dtype == jnp.bfloat16
    cast = q.astype(jnp.float32)
    assert isinstance(cast, PaddedQArray)
    assert padded_ptq.dequantize(cast).dtype == jnp.float32


# --- layout


LAYOUTS = {
    "transpose": lambda a: a.transpose(2, 0, 1),
    "T": lambda a: a.T,
    "mT": lambda a: a.mT,
    "swapaxes": lambda a: a.swapaxes(0, -2),
    "merge the others": lambda a: a.transpose(1, 0, 2).reshape(10, -1),
    "split another": lambda a: a.reshape(2, 10, 2, 3),
    "new axis": lambda a: a.reshape(1, 2, 10, 6),
    "int": lambda a: a[1],
    "slice": lambda a: a[..., 1:5:2],
    "int and slice": lambda a: a[1, :, -2:],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_layout_that_keeps_the_padding(layout, method, keep_padded):
    q = padded_ptq.quantize(normal(2, 10, 6), how({1: 4}, (0, 2), calibration_method=method))
    changed = layout(q)
    assert isinstance(changed, PaddedQArray)
    assert len(changed.padded_axes()) == 1
    expected = layout(padded_ptq.dequantize(q))
    assert changed.shape == expected.shape
    assert np.array_equal(padded_ptq.dequantize(changed), expected)


CUTS = {
    "slice": lambda a: a[:, 3:9],
    "int": lambda a: a[:, 9],
    "indices": lambda a: a[:, jnp.array([9, 0, 9])],
    "rows": lambda a: a[jnp.array([[1, 0], [0, 1]])],
    "new axis": lambda a: a[:, None],
    "iteration": lambda a: list(a)[1],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_indexing_that_cuts_the_padding(cut, keep_padded):
    q = padded_ptq.quantize(normal(2, 10, 6), how({1: 4}, (0, 2)))
    expected = cut(padded_ptq.dequantize(q))
    found = cut(q)
    assert found.shape == expected.shape
    assert np.array_equal(padded_ptq.dequantize(found), expected)


def test_core_functions_see_an_equal_array(keep_padded):
    q = padded_ptq.quantize(normal(10, 6), ROWS)
    x = padded_ptq.dequantize(q)
    assert type(q.plain()) is qarray.QArray
    assert np.array_equal(qarray.dequantize(q.plain()), x)
    assert np.array_equal(qarray.dequantize(qarray.rewriting_take(q, (slice(3, 7),))), x[3:7])
    np.testing.assert_allclose(qwix.dot_general(normal(2, 10), q, MATMUL), normal(2, 10) @ x, rtol=1e-5)


@pytest.mark.parametrize("shape", [(60,), (2, 5, 6), (20, 3), (7, 9)])
def test_reshape_that_scales_cannot_follow(shape):
    q = padded_ptq.quantize(normal(10, 6), ROWS)
    with pytest.raises(ValueError, match=r"Cannot reshape .* of shape \(10, 6\)"):
        q.reshape(shape)


def test_a_cut_behind_its_back_is_an_error():
    q = padded_ptq.quantize(normal(10, 6), ROWS)
    broken = q.replace(qvalue=q.qvalue[:7])
    with pytest.raises(ValueError, match=r"original_shape=\(10, 6\).*qvalue of shape \(7, 6\)"):
        padded_ptq.dequantize(broken)


# --- with axes less or more than at quantization


@pytest.mark.parametrize("shape", [(3, 10, 6), (10, 10, 10), (12, 10, 10)])
@pytest.mark.parametrize("axis", [0, 2])
def test_vmap_over_another_axis(shape, axis, keep_padded):
    q = padded_ptq.quantize(normal(*shape), how({1: 4}, (0, 2)))
    found = jax.vmap(padded_ptq.dequantize, in_axes=axis, out_axes=axis)(q)
    assert np.array_equal(found, padded_ptq.dequantize(q))


def test_vmap_over_an_axis_as_long_as_the_padded_one():
    # Of (9,) elements with 3 scales it could be thought that they are 3 tiles of 3.
    q = padded_ptq.quantize(normal(9, 9), ROWS)
    found = jax.vmap(padded_ptq.dequantize, in_axes=1, out_axes=1)(q)
    assert np.array_equal(found, padded_ptq.dequantize(q))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacked(axis, keep_padded):
    arrays = [padded_ptq.quantize(normal(10, 6, seed=seed), ROWS) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *arrays)
    expected = jnp.stack([padded_ptq.dequantize(a) for a in arrays], axis)
    assert stacked.shape == expected.shape
    assert np.array_equal(padded_ptq.dequantize(stacked), expected)


def test_scan_over_stacked_weights(keep_padded):
    arrays = [padded_ptq.quantize(normal(10, 10, seed=seed), ROWS) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    step = lambda x, w: (padded_ptq.dot_general(x, w, MATMUL), None)  # noqa: E731
    found, _ = jax.lax.scan(step, normal(2, 10), stacked)
    expected = normal(2, 10)
    for array in arrays:
        expected = expected @ padded_ptq.dequantize(array)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_jit_keeps_type_and_shapes(keep_padded):
    q = padded_ptq.quantize(normal(10, 6), ROWS)
    same = jax.jit(lambda a: a)(q)
    assert jax.tree.structure(same) == jax.tree.structure(q)
    assert np.array_equal(jax.jit(padded_ptq.dequantize)(q), padded_ptq.dequantize(q))
    abstract = jax.eval_shape(lambda x: padded_ptq.quantize(x, ROWS), normal(10, 6))
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    assert abstract.shape == (10, 6)


# --- ops

SIDES = {
    "float": lambda x, axes: x,
    "whole": lambda x, axes: padded_ptq.quantize(x, how({}, [a for a in range(x.ndim) if a not in axes])),
    "tile 4": lambda x, axes: padded_ptq.quantize(x, how({axes[-1]: 4}, [a for a in range(x.ndim) if a not in axes])),
    "tile 6": lambda x, axes: padded_ptq.quantize(x, how({axes[-1]: 6}, [a for a in range(x.ndim) if a not in axes])),
    "tile 16": lambda x, axes: padded_ptq.quantize(x, how({axes[-1]: 16}, [a for a in range(x.ndim) if a not in axes])),
    "plain": lambda x, axes: qarray.quantize(x, how({axes[-1]: 5}, [a for a in range(x.ndim) if a not in axes])),
}


def values(x: Any) -> np.ndarray:
    return np.asarray(padded_ptq.dequantize(x) if isinstance(x, qarray.QArray) else x, np.float64)


@pytest.mark.parametrize(("left", "right"), list(itertools.product(SIDES, SIDES)))
def test_dot_general(left, right, monkeypatch):
    monkeypatch.setattr(padded_ptq.core_dot_general, "MIN_TILE_SIZE_TO_DEQUANT_ON_OUTPUT", 1)
    lhs = SIDES[left](normal(2, 3, 10), (1, 2))
    rhs = SIDES[right](normal(10, 3, 4), (1, 0))
    found = padded_ptq.dot_general(lhs, rhs, (((2, 1), (0, 1)), ((), ())))
    np.testing.assert_allclose(found, np.einsum("bki,ikn->bn", values(lhs), values(rhs)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("asymmetric", ["lhs", "rhs"])
def test_dot_general_of_asymmetric_operands(asymmetric, keep_padded, monkeypatch):
    monkeypatch.setattr(padded_ptq.core_dot_general, "MIN_TILE_SIZE_TO_DEQUANT_ON_OUTPUT", 1)
    minmax = {"calibration_method": "minmax"}
    lhs = padded_ptq.quantize(normal(5, 10) + 2, how({1: 4}, (0,), **minmax if asymmetric == "lhs" else {}))
    rhs = padded_ptq.quantize(normal(10, 3) + 2, how({0: 4}, (1,), **minmax if asymmetric == "rhs" else {}))
    found = padded_ptq.dot_general(lhs, rhs, MATMUL)
    np.testing.assert_allclose(found, values(lhs) @ values(rhs), rtol=1e-5)


def test_two_quantized_operands_run_on_stored_elements(monkeypatch):
    monkeypatch.setattr(padded_ptq.core_dot_general, "MIN_TILE_SIZE_TO_DEQUANT_ON_OUTPUT", 1)
    lhs = padded_ptq.quantize(normal(5, 10), how({}, (0,)))
    rhs = padded_ptq.quantize(normal(10, 3), ROWS)
    jaxpr = jax.make_jaxpr(functools.partial(padded_ptq.dot_general, dimension_numbers=MATMUL))(lhs, rhs)
    assert ":i32[" in str(jaxpr)
    assert "preferred_element_type=int32" in str(jaxpr)


def test_padded_axes_that_are_not_contracted(keep_padded):
    lhs = padded_ptq.quantize(normal(5, 7, 10), how({0: 2, 1: 3, 2: 4}))
    rhs = padded_ptq.quantize(normal(5, 10, 3), how({0: 2, 1: 4, 2: 2}))
    found = padded_ptq.dot_general(lhs, rhs, (((2,), (1,)), ((0,), (0,))))
    np.testing.assert_allclose(found, values(lhs) @ values(rhs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [
        ("bd,dnh->bnh", [(2, 10), (10, 3, 4)]),
        ("dnh,...d->...nh", [(10, 3, 4), (2, 5, 10)]),
        ("bnd,bmd->bnm", [(2, 3, 10), (2, 5, 10)]),
        ("bd,de,ef->bf", [(2, 10), (10, 7), (7, 3)]),
        ("bd,de->b", [(2, 10), (10, 7)]),
        ("bd,de->be", [(2, 1), (10, 7)]),
        ("bd,dd->bd", [(2, 10), (10, 10)]),
    ],
)
@pytest.mark.parametrize("quantized", ["all", "last", "first"])
def test_einsum(subscripts, shapes, quantized, keep_padded):
    def operand(i: int) -> Any:
        x = normal(*shapes[i], seed=i)
        if (quantized == "last" and i + 1 < len(shapes)) or (quantized == "first" and i):
            return x
        inputs = subscripts.split("->")[0].split(",")
        axis = inputs[i].replace("...", "").find("d" if "d" in inputs[i] else "e") - len(inputs[i].replace("...", ""))
        return padded_ptq.quantize(x, how({axis: 4}, [a for a in range(x.ndim) if a - x.ndim != axis]))

    arrays = [operand(i) for i in range(len(shapes))]
    truth = np.einsum(subscripts, *map(values, arrays))
    found = padded_ptq.einsum(subscripts, *arrays)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_result_dtypes(dtype):
    x, w = normal(2, 10).astype(dtype), padded_ptq.quantize(normal(10, 3), ROWS)
    assert padded_ptq.dot_general(x, w, MATMUL).dtype == jnp.float32
    assert padded_ptq.dot_general(x, w.astype(dtype), MATMUL).dtype == dtype
    for op in (
        lambda **kw: padded_ptq.dot_general(x, w, MATMUL, **kw),
        lambda **kw: padded_ptq.einsum("bd,df->bf", x, w, **kw),
    ):
        assert op(preferred_element_type=dtype).dtype == dtype


# --- the provider


def rules(**kwargs: Any) -> list[qwix.QuantizationRule]:
    return [qwix.QuantizationRule(**{"weight_qtype": "int8", "tile_size": 4} | kwargs)]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 10, rngs=rngs)
        self.up = nnx.Linear(10, 6, rngs=rngs)
        self.heads = nnx.Einsum("bd,dnh->bnh", (6, 3, 2), (3, 2), rngs=rngs)
        self.conv = nnx.Conv(2, 5, kernel_size=(2,), rngs=rngs)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.embed(ids)
        return self.conv(self.heads(self.up(x))), self.embed.attend(x)


NET_RULES = [*rules(module_path="conv", tile_size=None), *rules()]
IDS = jnp.array([0, 6, 3])


@pytest.mark.parametrize("act_qtype", [None, "int8"])
def test_nnx_model(act_qtype):
    model = Net(nnx.Rngs(0))
    provider = padded_ptq.PaddedPtqProvider([dataclasses.replace(r, act_qtype=act_qtype) for r in NET_RULES])
    quantized = qwix.quantize_model(model, provider, IDS)
    for path in ("embed.embedding", "up.kernel", "heads.kernel"):
        array = functools.reduce(getattr, path.split("."), quantized).array
        assert isinstance(array, PaddedQArray)
        assert len(array.padded_axes()) == 1
    for found, expected in zip(quantized(IDS), model(IDS), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.1)
    for found, expected in zip(nnx.jit(quantized)(IDS), quantized(IDS), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_modules_of_the_provider_can_be_given_one_by_one():
    provider = qwix.PtqProvider(
        rules(act_qtype="int8"),
        _qarray_module=padded_ptq,
        _dot_general_fn=padded_ptq.dot_general,
        _einsum_fn=padded_ptq.einsum,
    )
    model = nnx.Linear(10, 6, rngs=nnx.Rngs(0))
    quantized = qwix.quantize_model(model, provider, normal(2, 10))
    own = qwix.quantize_model(model, padded_ptq.PaddedPtqProvider(rules(act_qtype="int8")), normal(2, 10))
    assert np.array_equal(quantized(normal(2, 10)), own(normal(2, 10)))


def test_nnx_quantize_params():
    model = Net(nnx.Rngs(0))
    build = lambda: qwix.quantize_model(model, padded_ptq.PaddedPtqProvider(NET_RULES), IDS)  # noqa: E731
    abstract, expected = nnx.eval_shape(build), build()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(abstract, padded_ptq.quantize_params(params, abstract))
    weights = lambda model: [model.embed.embedding, model.up.kernel, model.heads.kernel, model.conv.kernel]  # noqa: E731
    assert jax.tree.structure(weights(abstract)) == jax.tree.structure(weights(expected))
    for found, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(found, leaf)
    with pytest.raises(ValueError, match="more is not found"):
        padded_ptq.quantize_params(params | {"more": jnp.ones(2)}, abstract)
    kept = padded_ptq.quantize_params(params | {"more": jnp.ones(2)}, abstract, allow_extra_params=True)
    assert kept["more"].tolist() == [1, 1]


@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_static_ranges_of_tiled_activations(method):
    # Equal rows, since a static scale is a mean over the batch.
    model, x = nnx.Linear(10, 6, rngs=nnx.Rngs(0)), jnp.tile(normal(1, 10), (2, 1))
    provider = padded_ptq.PaddedPtqProvider(
        rules(act_qtype="int8", act_static_scale=True, act_calibration_method=method)
    )
    quantized = qwix.quantize_model(model, provider, x)
    assert quantized.dot_general0_lhs_scale.array.shape == (1, 3)
    np.testing.assert_allclose(quantized(x), model(x), atol=0.1)


def test_linen_model():
    model = nn.Sequential([nn.Dense(6), nn.DenseGeneral((3, 2))])
    x = normal(2, 10)
    params = model.init(jax.random.key(0), x)["params"]
    quantized = qwix.quantize_model(model, padded_ptq.PaddedPtqProvider(rules()))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    q = padded_ptq.quantize_params(params, abstract)
    assert jax.tree.structure(q) == jax.tree.structure(abstract)
    assert q["layers_0"]["kernel"].array.padded_shape == (12, 6)
    found = quantized.apply({"params": q}, x)
    np.testing.assert_allclose(found, model.apply({"params": params}, x), atol=0.05)


def test_create_quantized_param_in_the_running_module():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (10, 3))
            if not isinstance(w, boxed_param.WithAux):
                w = padded_ptq.create_quantized_param("w", w, ROWS)
            return padded_ptq.dot_general(x, w.array, MATMUL)

    quantized = qwix.quantize_model(Own(), padded_ptq.PaddedPtqProvider([]))
    variables = quantized.init(jax.random.key(0), normal(2, 10))
    assert isinstance(variables["params"]["w"].array, PaddedQArray)
    found = quantized.apply(variables, normal(2, 10))
    expected = normal(2, 10) @ padded_ptq.dequantize(variables["params"]["w"].array)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sharded(keep_padded):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda *names: jax.sharding.NamedSharding(mesh, jax.P(*names))  # noqa: E731
    w = normal(10, 8)
    q = padded_ptq.quantize(jax.device_put(w, spec(None, "x")), ROWS)
    x = padded_ptq.quantize(normal(4, 10), how({}, (0,)))
    expected = padded_ptq.dot_general(x, padded_ptq.quantize(w, ROWS), MATMUL)
    found = jax.jit(functools.partial(padded_ptq.dot_general, dimension_numbers=MATMUL))(x, q)
    assert found.sharding.is_equivalent_to(spec(None, "x"), 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_sharded_contracting_axis_stays_sharded_in_a_model():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    model = nnx.Linear(10, 6, rngs=nnx.Rngs(0))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("x", None))
    model.kernel.set_value(jax.device_put(model.kernel[...], sharding))
    quantized = qwix.quantize_model(model, padded_ptq.PaddedPtqProvider(rules()), normal(2, 10))
    array = ptq.WithAux.get_value(quantized.kernel).array
    assert array.qvalue.sharding.is_equivalent_to(sharding, 2)
    assert array.scale.sharding.is_fully_replicated  # 3 scales cannot be halved
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(quantized, normal(2, 10)), model(normal(2, 10)), atol=0.05)
