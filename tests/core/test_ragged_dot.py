"""ragged_dot and ragged_dot_general on QArrays against NumPy float64, group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from qwix._src.core import qarray
from qwix._src.core.qarray import HowToQuantize, QArray
from qwix._src.core.ragged_dot import ragged_dot, ragged_dot_general
from tests.core import oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def ragged_oracle(lhs, rhs, group_sizes, offset=0, magnitude=False):
    lhs, rhs = oracle.dequantize(lhs), oracle.dequantize(rhs)
    if magnitude:
        lhs, rhs = np.abs(lhs), np.abs(rhs)
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    start = 0
    for group, size in enumerate(group_sizes):
        if offset <= group < offset + rhs.shape[0]:
            out[start : start + size] = lhs[start : start + size] @ rhs[group - offset]
        start += size
    return out


def check(lhs, rhs, group_sizes, offset=None, **kwargs):
    group_offset = None if offset is None else jnp.array([offset])
    out = jax.jit(lambda lhs, rhs, sizes, offset: ragged_dot(lhs, rhs, sizes, group_offset=offset, **kwargs))(
        lhs, rhs, jnp.array(group_sizes), group_offset
    )
    truth = ragged_oracle(lhs, rhs, group_sizes, offset or 0)
    largest = ragged_oracle(lhs, rhs, group_sizes, offset or 0, magnitude=True)
    oracle.assert_close(out, truth, largest)
    return out


def make(rng, shape, qtype, axes, method="absmax", tiled_axes=None):
    x = jnp.asarray(rng.normal(size=shape) + 0.5, jnp.float32)
    if qtype is None:
        return x
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=axes,
        tiled_axes=tiled_axes or {},
        calibration_method=method,
    )
    return qarray.quantize(x, how)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    beyond=st.integers(0, 3),
    lhs=st.sampled_from([("int8", ()), ("int8", (0,)), ("float8_e4m3fn", (0,)), (None, ())]),
    rhs=st.sampled_from([("int8", ()), ("int8", (0, 2)), ("int4", (2,)), ("int8", (0,)), ("float8_e5m2", (0, 2))]),
    asymmetric=st.sampled_from(["", "lhs", "rhs"]),
    seed=st.integers(0, 99),
)
def test_any_granularity(sizes, beyond, lhs, rhs, asymmetric, seed):
    rng = np.random.default_rng(seed)
    method = {
        name: "minmax" if name == asymmetric and str(how[0]).startswith("int") else "absmax"
        for name, how in (("lhs", lhs), ("rhs", rhs))
    }
    m = sum(sizes) + beyond
    check(
        make(rng, (m, 4), *lhs, method["lhs"]),
        make(rng, (len(sizes), 4, 3), *rhs, method["rhs"]),
        sizes,
    )


def test_integers_stay_integers(rng):
    lhs, rhs = make(rng, (5, 4), "int8", (0,)), make(rng, (2, 4, 3), "int4", (0, 2))
    jaxpr = jax.make_jaxpr(ragged_dot)(lhs, rhs, jnp.array([2, 3]))
    (eqn,) = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "ragged_dot_general"]
    assert [v.aval.dtype for v in (*eqn.invars[:2], *eqn.outvars)] == [jnp.int8, jnp.int8, jnp.int32]


@pytest.mark.parametrize("side", ["lhs", "rhs"])
def test_asymmetric_is_exact(rng, side):
    lhs = QArray(jnp.asarray(rng.integers(-128, 128, (6, 50)), jnp.int8), jnp.ones((6, 1)))
    rhs = QArray(jnp.asarray(rng.integers(-128, 128, (2, 50, 3)), jnp.int8), jnp.ones((2, 1, 3)))
    if side == "lhs":
        lhs = lhs.replace(zero_point=jnp.asarray(rng.integers(-128, 128, (6, 1)), jnp.int8))
    else:
        rhs = rhs.replace(zero_point=jnp.asarray(rng.integers(-128, 128, (2, 1, 3)), jnp.int8))
    out = ragged_dot(lhs, rhs, jnp.array([2, 3]))
    np.testing.assert_array_equal(out, ragged_oracle(lhs, rhs, [2, 3]))


def test_zero_point_of_all_groups_leaves_nothing_beyond_them(rng):
    check(make(rng, (5, 4), "int8", (0,)), make(rng, (2, 4, 3), "int8", (), "minmax"), [1, 2])


def test_tiles(rng):
    lhs = make(rng, (6, 4), "int8", (), tiled_axes={0: 2})
    rhs = make(rng, (4, 4, 6), "int8", (), tiled_axes={0: 2, 2: 3})
    check(lhs, rhs, [1, 2, 0, 2])
    # Along k: dequantized first.
    check(make(rng, (5, 4), "int8", (0,), tiled_axes={1: 2}), rhs, [1, 2, 0, 2])


def test_nan_scale_beyond_the_groups(rng):
    lhs, rhs = make(rng, (4, 4), "int8", (0,)), make(rng, (2, 4, 3), "int8", (0, 2))
    lhs = lhs.replace(scale=lhs.scale.at[jnp.array([1, 3])].set(jnp.nan))
    out = ragged_dot(lhs, rhs, jnp.array([1, 2]))
    np.testing.assert_array_equal(np.isnan(out).all(1), [False, True, False, False])
    np.testing.assert_array_equal(out[3], 0)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("kinds", [("int8", "int8"), (None, "int8"), (None, None)])
def test_group_offset(rng, offset, kinds):
    lhs = make(rng, (8, 4), kinds[0], (0,))
    check(lhs, make(rng, (2, 4, 3), kinds[1], (0, 2)), [2, 1, 3, 1], offset)


def test_group_offset_of_tiled_rows(rng):
    lhs = make(rng, (8, 4), "int8", (), tiled_axes={0: 2})
    check(lhs, make(rng, (2, 4, 3), "int8", (0, 2)), [1, 2, 3, 1], 1)


def test_group_offset_of_another_mode_is_an_error(rng):
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    with pytest.raises(NotImplementedError, match="group_offset"):
        ragged_dot_general(jnp.ones((4, 2)), jnp.ones((4, 3)), jnp.array([4]), dims, group_offset=jnp.array([0]))


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("preferred", [None, "float32"])
def test_result_dtype(rng, dtypes, preferred):
    lhs = oracle.quantized(rng, (3, 4), "int8", dtype=dtypes[0])
    rhs = oracle.quantized(rng, (1, 4, 2), "int8", dtype=dtypes[1])
    for x in (lhs, qarray.dequantize(lhs)):
        out = ragged_dot(x, rhs, jnp.array([3]), preferred_element_type=preferred)
        assert out.dtype == (preferred or jnp.promote_types(*dtypes))


def test_both_asymmetric_is_an_error(rng):
    lhs, rhs = make(rng, (2, 4), "int8", (), "minmax"), make(rng, (1, 4, 3), "int8", (), "minmax")
    with pytest.raises(ValueError, match="Both operands are asymmetric"):
        ragged_dot(lhs, rhs, jnp.array([2]))


def test_arguments_are_kept(rng):
    lhs = make(rng, (3, 4), "float8_e4m3fn", (0,))
    for x in (lhs, qarray.dequantize(lhs)):
        rhs = make(rng, (1, 4, 2), "float8_e4m3fn", ())
        jaxpr = jax.make_jaxpr(lambda *args: ragged_dot(*args, precision="highest"))(x, rhs, jnp.array([3]))
        (eqn,) = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "ragged_dot_general"]
        assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2


# Axes in every mode: (dot dimension numbers, ragged, group axes, lhs, rhs shapes, group sizes).
MODES = {
    "rows with batches": (
        (((3,), (2,)), ((0,), (1,))),
        [2],
        [0],
        ((2, 3, 5, 4), (2, 2, 4, 6)),
        [[[2, 3], [5, 0], [1, 2]], [[4, 1], [0, 0], [3, 2]]],
    ),
    "rows, one list of sizes": (
        (((0,), (3,)), ((2,), (0,))),
        [1],
        [2],
        ((4, 5, 2, 3), (2, 6, 2, 4)),
        [2, 1],
    ),
    "contracting": ((((1,), (0,)), ((), ())), [1], [], ((3, 6), (6, 2)), [2, 1, 3]),
    "contracting with batches": (
        (((2, 1), (0, 1)), ((0,), (2,))),
        [1],
        [],
        ((2, 6, 3), (3, 6, 2, 4)),
        [[[2, 1, 3]] * 3, [[0, 4, 1]] * 3],
    ),
    "batch": ((((2,), (1,)), ((0,), (0,))), [0], [], ((5, 3, 4), (5, 4, 2)), [2, 1]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asymmetric", ["", "lhs", "rhs"])
@pytest.mark.parametrize("quantize_lhs", [True, False])
def test_modes(rng, mode, asymmetric, quantize_lhs):
    dot_dims, ragged, groups, shapes, sizes = MODES[mode]
    dims = lax.RaggedDotDimensionNumbers(dot_dims, ragged, groups)
    pair = []
    for i, shape in enumerate(shapes):
        axes = [axis for axis in range(len(shape)) if axis not in dot_dims[0][i]]
        method = "minmax" if asymmetric == ("lhs", "rhs")[i] else "absmax"
        pair.append(make(rng, shape, "int8", axes, method))
    if not quantize_lhs:
        pair[0] = qarray.dequantize(pair[0])
    sizes = jnp.array(sizes)
    out = ragged_dot_general(*pair, sizes, dims)
    # Integers small enough for float32 to be exact: jax.lax is the definition.
    lhs, rhs = (jnp.asarray(oracle.dequantize(x), jnp.float32) for x in pair)
    expected = lax.ragged_dot_general(lhs, rhs, sizes, dims, precision="highest")
    largest = lax.ragged_dot_general(jnp.abs(lhs), jnp.abs(rhs), sizes, dims, precision="highest")
    oracle.assert_close(out, np.asarray(expected, np.float64), np.asarray(largest, np.float64))


@pytest.mark.parametrize("which", ["float", "int8"])
def test_contracting_groups_against_numpy(rng, which):
    lhs, rhs = make(rng, (3, 6), "int8", (0,)), make(rng, (6, 2), "int8", (1,), "minmax")
    if which == "float":
        lhs = qarray.dequantize(lhs)
    dims = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [1], [])
    out = ragged_dot_general(lhs, rhs, jnp.array([2, 0, 3]), dims)
    x, y = oracle.dequantize(lhs), oracle.dequantize(rhs)
    truth = np.stack([x[:, a:b] @ y[a:b] for a, b in ((0, 2), (2, 2), (2, 5))])
    oracle.assert_close(out, truth, np.abs(x).max() * np.abs(y).max() * 6)


def test_gradient_of_the_float_operand(rng):
    x, w = make(rng, (4, 3), None, ()), make(rng, (2, 3, 2), "int8", (0, 2))
    gradient = jax.grad(lambda x: ragged_dot(x, w, jnp.array([1, 2])).sum())(x)
    rows = oracle.dequantize(w).sum(2)[[0, 1, 1]]
    np.testing.assert_allclose(gradient, [*rows, np.zeros(3)], rtol=1e-5)
