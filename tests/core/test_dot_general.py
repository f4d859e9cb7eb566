"""dot_general on QArrays against NumPy float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwix._src.core import dot_general as module
from qwix._src.core import qarray
from qwix._src.core.dot_general import dot_general, get_how_to_quantize, loop_dot_general
from qwix._src.core.qarray import HowToQuantize, QArray
from tests.core import oracle

MATMUL = (((1,), (0,)), ((), ()))
QTYPES = ["int8", "int4", "int2", "int3", "int16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
SYMMETRIC, ASYMMETRIC = "absmax", "minmax"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def matmul_how(for_lhs, qtype, tile_size=None, **kwargs):
    return get_how_to_quantize(
        dimension_numbers=MATMUL,
        ndims=(2, 2),
        for_lhs=for_lhs,
        tile_size=tile_size,
        qtype=qtype,
        **kwargs,
    )


def random_pair(rng, k, lhs_how, rhs_how, m=3, n=5, dtype=jnp.float32):
    x, w = rng.normal(size=(m, k)) + 0.3, rng.normal(size=(k, n))
    return tuple(
        jnp.asarray(a, dtype) if how is None else qarray.quantize(jnp.asarray(a, dtype), how)
        for a, how in ((x, lhs_how), (w, rhs_how))
    )


def check(lhs, rhs, dims=MATMUL, fn=dot_general, **kwargs):
    out = jax.jit(functools.partial(fn, dimension_numbers=dims, **kwargs))(lhs, rhs)
    truth = oracle.dot_general(lhs, rhs, dims)
    oracle.assert_close(out, truth, oracle.dot_general(lhs, rhs, dims, magnitude=True))
    return out


# ------------------------------------------------------------------ formats


@pytest.mark.parametrize("lhs_qtype", QTYPES)
@pytest.mark.parametrize("rhs_qtype", [*QTYPES, "nf4"])
def test_every_pair_of_formats(rng, lhs_qtype, rhs_qtype):
    lhs, rhs = random_pair(rng, 16, matmul_how(True, lhs_qtype), matmul_how(False, rhs_qtype))
    assert check(lhs, rhs).dtype == jnp.float32


@pytest.mark.parametrize("qtype", ["mxfp8", "mxfp8_16", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("both", [True, False])
def test_block_formats_are_emulated_exactly(rng, qtype, both):
    tile = 16 if qtype in ("nvfp4", "mxfp8_16") else 32
    how = functools.partial(matmul_how, qtype=qtype, tile_size=tile)
    lhs, rhs = random_pair(rng, 64, how(True) if both else None, how(False))
    check(lhs, rhs)


def test_integers_stay_integers(rng):
    lhs, rhs = random_pair(rng, 16, matmul_how(True, "int8"), matmul_how(False, "int8"))
    (dot,) = dots_of(dot_general, lhs, rhs, MATMUL)
    assert [v.aval.dtype for v in (*dot.invars, *dot.outvars)] == [jnp.int8, jnp.int8, jnp.int32]


def test_mixed_integers_stay_8_bit(rng):
    lhs, rhs = random_pair(rng, 16, matmul_how(True, "int8"), matmul_how(False, "int4"))
    (dot,) = dots_of(dot_general, lhs, rhs, MATMUL)
    assert [v.aval.dtype for v in dot.invars] == [jnp.int8, jnp.int8]


def test_mixed_float8_stay_8_bit(rng):
    how = matmul_how(True, "float8_e5m2"), matmul_how(False, "float8_e4m3fn")
    (dot,) = dots_of(dot_general, *random_pair(rng, 16, *how), MATMUL)
    assert [v.aval.dtype for v in dot.invars] == [jnp.float8_e5m2, jnp.float8_e4m3fn]


def dots_of(fn, lhs, rhs, dims, **kwargs):
    jaxpr = jax.make_jaxpr(lambda lhs, rhs: fn(lhs, rhs, dims, **kwargs))(lhs, rhs)
    return [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]


# ------------------------------------------------------------------ granularity


@st.composite
def dot_generals(draw):
    """Dimension numbers in any order, shapes, and a tiling of each operand."""
    kinds = {"b": draw(st.integers(0, 2)), "c": draw(st.integers(0, 2))}
    kinds |= {"m": draw(st.integers(0, 2)), "n": draw(st.integers(0, 2))}
    sizes = {f"{kind}{i}": draw(st.sampled_from([1, 2, 4, 6])) for kind, count in kinds.items() for i in range(count)}
    lhs = draw(st.permutations([name for name in sizes if name[0] in "bcm"]))
    rhs = draw(st.permutations([name for name in sizes if name[0] in "bcn"]))
    contract = draw(st.permutations([name for name in sizes if name[0] == "c"]))
    batch = draw(st.permutations([name for name in sizes if name[0] == "b"]))
    dims = (
        (tuple(map(lhs.index, contract)), tuple(map(rhs.index, contract))),
        (tuple(map(lhs.index, batch)), tuple(map(rhs.index, batch))),
    )
    shapes, tilings = [], []
    for labels in (lhs, rhs):
        shape = tuple(sizes[name] for name in labels)
        shapes.append(shape)
        tilings.append(tuple(draw(st.sampled_from([d for d in (1, 2, 3, 6, 4) if n % d == 0])) for n in shape))
    return dims, shapes, tilings


@pytest.mark.parametrize("devices", [1, 2])
@settings(deadline=None, max_examples=15)
@given(
    case=dot_generals(),
    qtypes=st.tuples(st.sampled_from(["int8", "int4", "float8_e4m3fn"]), st.just("int8")),
    dtypes=st.tuples(*[st.sampled_from(["float16", "bfloat16", "float32"])] * 2),
    asymmetric=st.sampled_from(["", "lhs", "rhs"]),
    seed=st.integers(0, 99),
    fn=st.sampled_from([dot_general, loop_dot_general]),
)
def test_any_axes_and_tiles(devices, case, qtypes, dtypes, asymmetric, seed, fn):
    dims, shapes, tilings = case
    rng = np.random.default_rng(seed)
    pair = []
    for name, shape, counts, qtype, dtype in zip(("lhs", "rhs"), shapes, tilings, qtypes, dtypes, strict=True):
        integer = qtype.startswith("int")
        method = ASYMMETRIC if name == asymmetric and integer else SYMMETRIC
        tiles = {axis: n // c for axis, (n, c) in enumerate(zip(shape, counts, strict=True))}
        pair.append(oracle.quantized(rng, shape, qtype, dtype=dtype, tiled_axes=tiles, calibration_method=method))
    with pytest.MonkeyPatch.context() as patch:
        # Tiles of any size, so that small shapes reach the tiled path.
        patch.setattr(module, "MIN_TILE_SIZE_TO_DEQUANT_ON_OUTPUT", 1)
        # One device adds up tiles in a loop, several take them as a batch.
        patch.setattr(jax, "device_count", lambda: devices)
        out = check(*pair, dims, fn)
    assert out.dtype == jnp.promote_types(*dtypes)


@pytest.mark.parametrize("fn", [dot_general, loop_dot_general])
@pytest.mark.parametrize(
    ("lhs_tile", "rhs_tile"), [(128, 128), (256, 128), (None, 256), (384, 256), (32, 32), (64, 128)]
)
@pytest.mark.parametrize("devices", [1, 2])
def test_contracting_tiles(rng, monkeypatch, fn, lhs_tile, rhs_tile, devices):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    how = matmul_how(True, "int8", lhs_tile), matmul_how(False, "int4", rhs_tile)
    check(*random_pair(rng, 768, *how), fn=fn)


@pytest.mark.parametrize(("tile", "dtype"), [(64, jnp.float32), (128, jnp.int8), (256, jnp.int8), (None, jnp.int8)])
def test_fine_tiles_are_dequantized_first(rng, monkeypatch, tile, dtype):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    how = matmul_how(True, "int8", tile), matmul_how(False, "int8", tile)
    (dot,) = dots_of(dot_general, *random_pair(rng, 512, *how), MATMUL)
    assert dot.invars[0].aval.dtype == dtype


@pytest.mark.parametrize(
    ("backend", "rows", "looped"),
    [("cpu", 1, True), ("gpu", 2, False), ("tpu", 128, False), ("gpu", 2048, True)],
)
def test_tiles_one_by_one_or_as_a_batch(monkeypatch, backend, rows, looped):
    """One device adds up tiles in a loop if that is faster, several never."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    lhs = QArray(jnp.ones((rows, 1024), jnp.int8), jnp.ones((rows, 8)))
    rhs = QArray(jnp.ones((1024, 256), jnp.int8), jnp.ones((8, 256)))
    for devices in (1, 2):
        monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
        # Before a loop, a dot of the first tile.
        (dot,) = dots_of(dot_general, lhs, rhs, MATMUL)
        is_batch = dot.outvars[0].aval.shape == (8, rows, 256)
        assert is_batch == (devices == 2 or not looped)


def test_loop_keeps_memory_to_a_tile(rng):
    how = matmul_how(True, "int8", 32), matmul_how(False, "int8", 32)
    pair = random_pair(rng, 96, *how)
    dots = dots_of(loop_dot_general, *pair, MATMUL)
    assert [dot.invars[1].aval.shape for dot in dots] == [(32, 5)] * 3
    # A weight that has to be dequantized is so tile by tile.
    dots = dots_of(loop_dot_general, jnp.ones((3, 96)), pair[1], MATMUL)
    assert [dot.invars[1].aval.shape for dot in dots] == [(32, 5)] * 3
    check(jnp.asarray(rng.normal(size=(3, 96)), jnp.float32), pair[1], fn=loop_dot_general)


def test_loop_of_floats(rng):
    check(*random_pair(rng, 8, None, None), fn=loop_dot_general)


@pytest.mark.parametrize("fn", [dot_general, loop_dot_general])
@pytest.mark.parametrize("zero_point_tiles", [1, 2, 4])
def test_zero_points_with_their_own_tiles(rng, fn, zero_point_tiles):
    x = QArray(
        jnp.asarray(rng.integers(-128, 128, (3, 512)), jnp.int8),
        jnp.asarray(rng.uniform(0.5, 2, (3, 2)), jnp.float32),
        jnp.asarray(rng.integers(-128, 128, (1, zero_point_tiles)), jnp.int8),
    )
    w = oracle.quantized(rng, (512, 4), "int8", channelwise_axes=(1,))
    check(x, w, fn=fn)
    check(w.T, x.T, fn=fn)


# ------------------------------------------------------------------ exactness and range


@pytest.mark.parametrize("side", ["lhs", "rhs"])
def test_asymmetric_is_exact(rng, side):
    """With scales of 1 the output is an integer, equal to the last unit."""
    values = jnp.asarray(rng.integers(-128, 128, (4, 300)), jnp.int8)
    other = jnp.asarray(rng.integers(-128, 128, (300, 5)), jnp.int8)
    zero_point = jnp.asarray(rng.integers(-128, 128, (4, 1)), jnp.int8)
    lhs = QArray(values, jnp.ones((4, 1)), zero_point)
    rhs = QArray(other, jnp.ones((1, 5)))
    truth = (np.asarray(values, int) - np.asarray(zero_point, int)) @ np.asarray(other, int)
    if side == "rhs":
        lhs, rhs, truth = rhs.T, lhs.T, truth.T
    np.testing.assert_array_equal(dot_general(lhs, rhs, MATMUL), truth)


def test_wrapping_int32_terms_are_exact():
    """sum(ql qr) and zl sum(qr) leave int32's range, where their difference is in it."""
    k = 65_000
    lhs = QArray(jnp.full((1, k), 127, jnp.int8), jnp.ones((1, 1)), jnp.full((1, 1), -128, jnp.int8))
    rhs = QArray(jnp.full((k, 1), -128, jnp.int8), jnp.ones((1, 1)))
    np.testing.assert_array_equal(dot_general(lhs, rhs, MATMUL), [[np.float32(255 * -128 * k)]])


@pytest.mark.parametrize(("dtype", "k"), [(jnp.int16, 16), (jnp.int8, 140_000)])
def test_no_integer_overflow(dtype, k):
    largest = jnp.iinfo(dtype).min
    lhs = QArray(jnp.full((1, k), largest, dtype), jnp.ones((1, 1)))
    out = dot_general(lhs, lhs.T, MATMUL)
    np.testing.assert_allclose(out, [[float(largest) ** 2 * k]], rtol=1e-6)


def test_asymmetric_int16(rng):
    how = matmul_how(True, "int16", calibration_method="minmax"), matmul_how(False, "int16")
    check(*random_pair(rng, 64, *how))


def test_asymmetric_times_float8(rng):
    how = matmul_how(True, "int8", calibration_method="minmax"), matmul_how(False, "float8_e4m3fn")
    check(*random_pair(rng, 64, *how))


def test_float16_result_does_not_overflow_in_between():
    """Sums of stored values exceed float16, the result does not."""
    lhs = QArray(jnp.full((1, 512), 127, jnp.int8), jnp.full((1, 1), 2**-8, jnp.float16))
    np.testing.assert_allclose(dot_general(lhs, lhs.T, MATMUL), [[512 * (127 / 256) ** 2]], 1e-3)


def test_both_asymmetric_is_an_error(rng):
    how = [matmul_how(for_lhs, "int8", calibration_method="minmax") for for_lhs in (True, False)]
    with pytest.raises(ValueError, match="Both operands are asymmetric"):
        dot_general(*random_pair(rng, 16, *how), MATMUL)


def test_integer_result_is_an_error(rng):
    pair = random_pair(rng, 16, None, matmul_how(False, "int8"))
    with pytest.raises(ValueError, match="preferred_element_type=int32"):
        dot_general(*pair, MATMUL, preferred_element_type=jnp.int32)


@pytest.mark.parametrize("both", [True, False])
def test_nan_scale_poisons_its_channel_only(rng, both):
    x, w = random_pair(rng, 16, matmul_how(True, "int8") if both else None, matmul_how(False, "int8"))
    w = w.replace(scale=w.scale.at[0, 1].set(jnp.nan))
    out = dot_general(x, w, MATMUL)
    np.testing.assert_array_equal(np.isnan(out), np.arange(5)[None] == np.full((3, 1), 1))


@pytest.mark.parametrize(("lhs", "rhs"), [((0, 4), (4, 3)), ((2, 0), (0, 3)), ((2, 4), (4, 0)), ((1, 1), (1, 1))])
def test_empty_and_single(rng, lhs, rhs):
    for lhs_quantized, rhs_quantized in itertools.product([True, False], repeat=2):
        pair = [
            oracle.quantized(rng, shape, "int8", channelwise_axes=(axis,)) if is_quantized else jnp.zeros(shape)
            for shape, axis, is_quantized in ((lhs, 0, lhs_quantized), (rhs, 1, rhs_quantized))
        ]
        check(*pair)


# ------------------------------------------------------------------ dtypes and arguments


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("w_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("quantize_x", [True, False])
@pytest.mark.parametrize("preferred", [None, "bfloat16", "float32"])
def test_result_dtype(rng, x_dtype, w_dtype, quantize_x, preferred):
    x = jnp.asarray(rng.normal(size=(2, 8)), x_dtype)
    if quantize_x:
        x = qarray.quantize(x, matmul_how(True, "int8"))
    w = oracle.quantized(rng, (8, 3), "int8", dtype=w_dtype, channelwise_axes=(1,))
    out = dot_general(x, w, MATMUL, preferred_element_type=preferred)
    assert out.dtype == (preferred or jnp.promote_types(x_dtype, w_dtype))


def test_integer_array_times_weight(rng):
    w = oracle.quantized(rng, (8, 3), "int8", dtype="bfloat16")
    out = dot_general(jnp.ones((2, 8), jnp.int32), w, MATMUL)
    assert out.dtype == jnp.bfloat16
    truth = np.ones((2, 8)) @ oracle.dequantize(w)
    oracle.assert_close(out, truth, np.abs(oracle.dequantize(w)).sum(0), rounded_inputs=True)


def test_arrays_pass_through(rng):
    x, w = random_pair(rng, 8, None, None)
    (dot,) = dots_of(dot_general, x, w, MATMUL, precision="highest")
    assert dot.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize("lhs_qtype", [None, "int8", "float8_e4m3fn"])
def test_precision_is_kept(rng, lhs_qtype):
    how = lhs_qtype and matmul_how(True, lhs_qtype)
    pair = random_pair(rng, 8, how, matmul_how(False, "float8_e4m3fn"))
    (dot,) = dots_of(dot_general, *pair, MATMUL, precision="highest")
    assert dot.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_negative_axes(rng):
    lhs, rhs = random_pair(rng, 8, matmul_how(True, "int8"), matmul_how(False, "int8"))
    out = dot_general(lhs, rhs, (((-1,), (-2,)), ((), ())))
    np.testing.assert_array_equal(out, dot_general(lhs, rhs, MATMUL))


@pytest.mark.parametrize("tile", [None, 128])
@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (None, None)])
def test_out_sharding(rng, tile, spec):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    lhs, rhs = random_pair(rng, 256, matmul_how(True, "int8", tile), matmul_how(False, "int8", tile))
    expected = dot_general(lhs, rhs, MATMUL)
    with jax.set_mesh(mesh):
        # Contracting axes are sharded, so that the output's sharding has to be given.
        lhs = jax.device_put(lhs, jax.NamedSharding(mesh, jax.P(None, None)))
        lhs = lhs.replace(qvalue=jax.device_put(lhs.qvalue, jax.NamedSharding(mesh, jax.P(None, "x"))))
        rhs = rhs.replace(qvalue=jax.device_put(rhs.qvalue, jax.NamedSharding(mesh, jax.P("x", None))))
        for sharding in (jax.P(*spec), jax.NamedSharding(mesh, jax.P(*spec))):
            out = dot_general(lhs, rhs, MATMUL, out_sharding=sharding)
            assert jax.typeof(out).sharding.spec == jax.P(*spec)
            np.testing.assert_array_equal(out, expected)


# ------------------------------------------------------------------ transformations


def test_vmap(rng):
    how = HowToQuantize(qtype="int8", channelwise_axes=(0, 1), tiled_axes={2: 128})
    x = qarray.quantize(jnp.asarray(rng.normal(size=(2, 3, 256)), jnp.float32), how)
    w = oracle.quantized(rng, (256, 4), "int8", channelwise_axes=(1,), tiled_axes={0: 128})
    out = jax.vmap(lambda x: dot_general(x, w, MATMUL))(x)
    np.testing.assert_allclose(out, np.stack([dot_general(x[i], w, MATMUL) for i in range(2)]), rtol=1e-6)


@pytest.mark.parametrize("qtype", ["int8", "nf4", "float8_e4m3fn"])
def test_gradient_of_the_float_operand(rng, qtype):
    w = oracle.quantized(rng, (16, 3), qtype, channelwise_axes=(1,))
    x = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    cotangent = rng.normal(size=(2, 3))
    gradient = jax.grad(lambda x: (dot_general(x, w, MATMUL) * cotangent).sum())(x)
    np.testing.assert_allclose(gradient, cotangent @ oracle.dequantize(w).T, rtol=1e-5, atol=1e-5)


def test_tracing_adds_few_equations(rng):
    lhs, rhs = random_pair(rng, 16, matmul_how(True, "int8"), matmul_how(False, "int8"))
    jaxpr = jax.make_jaxpr(lambda lhs, rhs: dot_general(lhs, rhs, MATMUL))(lhs, rhs)
    names = [e.primitive.name for e in jaxpr.jaxpr.eqns]
    # The dot, its cast, and for each scale a broadcast and a product.
    assert len(names) == 6, names


# ------------------------------------------------------------------ get_how_to_quantize


@pytest.mark.parametrize(
    ("dims", "ndims", "tile", "lhs", "rhs"),
    [
        (MATMUL, (2, 2), None, ((0,), {}), ((1,), {})),
        (MATMUL, (2, 2), 128, ((0,), {1: 128}), ((1,), {0: 128})),
        ((((2, 1), (0, 1)), ((), ())), (3, 3), 16, ((0,), {1: 16}), ((2,), {1: 16})),
        ((((2,), (1,)), ((0,), (0,))), (3, 3), 0.25, ((0, 1), {2: 0.25}), ((0, 2), {1: 0.25})),
        (MATMUL, (2, 2), {0: 2}, ((), {0: 2}), ((1,), {0: 2})),
        ((((-1,), (-2,)), ((), ())), (2, 2), 4, ((0,), {1: 4}), ((1,), {0: 4})),
    ],
)
def test_get_how_to_quantize(dims, ndims, tile, lhs, rhs):
    for for_lhs, (channelwise, tiled) in ((True, lhs), (False, rhs)):
        how = get_how_to_quantize(dimension_numbers=dims, ndims=ndims, for_lhs=for_lhs, tile_size=tile, qtype="int8")
        assert how == HowToQuantize(qtype="int8", channelwise_axes=channelwise, tiled_axes=tiled)


def test_nothing_to_tile_is_an_error():
    with pytest.raises(ValueError, match="contracts no axis"):
        get_how_to_quantize(
            dimension_numbers=(((), ()), ((), ())),
            ndims=(1, 1),
            for_lhs=True,
            tile_size=4,
            qtype="int8",
        )
