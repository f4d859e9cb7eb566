"""einsum on QArrays against np.einsum in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwix._src.core import dot_general, qarray
from qwix._src.core.einsum import einsum, get_how_to_quantize
from qwix._src.core.qarray import HowToQuantize, QArray
from tests.core import oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def make(rng, shape, kind):
    if kind == "f":
        return jnp.asarray(rng.normal(size=shape), jnp.float32)
    method = "minmax" if kind == "a" else "absmax"
    axes = () if kind == "t" else range(0, len(shape), 2)
    return oracle.quantized(rng, shape, "int8", channelwise_axes=axes, calibration_method=method, zero_mean=kind != "a")


def check(subscripts, arrays, **kwargs):
    out = jax.jit(functools.partial(einsum, subscripts, **kwargs))(*arrays)
    floats = [oracle.dequantize(x) for x in arrays]
    oracle.assert_close(out, np.einsum(subscripts, *floats), np.einsum(subscripts, *map(np.abs, floats)))
    return out


CASES = [
    ("ab,bc->ac", [(3, 4), (4, 5)]),
    ("ab,bc->ca", [(3, 4), (4, 5)]),
    ("ab,bc", [(3, 4), (4, 5)]),
    ("ba,cb", [(3, 4), (5, 3)]),
    ("bqhd,bkhd->bhqk", [(2, 3, 2, 4), (2, 5, 2, 4)]),
    ("bhqk,bkhd->bqhd", [(2, 2, 3, 5), (2, 5, 2, 4)]),
    ("...a,ab->...b", [(2, 3, 4), (4, 5)]),
    ("...a,...a->...", [(2, 3, 4), (3, 4)]),
    ("a...,...a", [(3, 2), (2, 3)]),
    ("ab,ab->", [(3, 4), (3, 4)]),
    ("ab,ab->ab", [(3, 4), (3, 4)]),
    ("ab,cd->acbd", [(2, 3), (3, 2)]),
    # a size of 1 that is broadcast
    ("ab,bc->ac", [(3, 1), (4, 5)]),
    ("ab,ab->ba", [(3, 1), (1, 4)]),
    ("...ab,...bc->...ac", [(1, 3, 4), (2, 4, 5)]),
    # an axis of one operand that is summed alone, a diagonal
    ("abc,dce->ae", [(2, 3, 4), (2, 4, 3)]),
    ("ab,cb->c", [(2, 3), (4, 3)]),
    ("ii,ij->j", [(3, 3), (3, 2)]),
    ("ab,bcc->ac", [(2, 3), (3, 2, 2)]),
    ("ii,jj->", [(3, 3), (2, 2)]),
    # one operand
    ("ab->ba", [(2, 3)]),
    ("aba->b", [(2, 3, 2)]),
    ("ab->", [(2, 3)]),
    # more than two
    ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 2)]),
    ("ab,bc,cd->da", [(2, 3), (3, 4), (4, 2)]),
    ("a,b,c->cab", [(2,), (3,), (4,)]),
    ("ab,ab,ab->a", [(2, 3), (2, 3), (2, 3)]),
    ("bd,bd,ed,be->b", [(2, 3), (2, 3), (4, 3), (2, 4)]),
    ("...a,ab,bc->...c", [(2, 2, 3), (3, 4), (4, 2)]),
    # no axes
    (",ab->ab", [(), (2, 3)]),
]


@pytest.mark.parametrize(("subscripts", "shapes"), CASES)
@pytest.mark.parametrize("kinds", ["qqqq", "fqfq", "qfqf", "aqqq"])
def test_against_numpy(rng, subscripts, shapes, kinds):
    arrays = [make(rng, shape, kind) for shape, kind in zip(shapes, kinds, strict=False)]
    assert check(subscripts, arrays).dtype == jnp.float32


@st.composite
def einsums(draw):
    """Any operands and output, the sizes of a label 1 or what it has elsewhere."""
    sizes = {c: draw(st.sampled_from([2, 3])) for c in "abcde"}
    inputs, shapes = [], []
    for _ in range(draw(st.integers(1, 4))):
        labels = draw(st.lists(st.sampled_from("abcde"), max_size=3, unique=True))
        inputs.append("".join(labels))
        shapes.append(tuple(draw(st.sampled_from([sizes[c], sizes[c], 1])) for c in labels))
    seen = sorted(set("".join(inputs)))
    out = "".join(draw(st.permutations(seen))[: draw(st.integers(0, len(seen)))])
    kinds = draw(st.lists(st.sampled_from("fqqt"), min_size=len(inputs), max_size=len(inputs)))
    return ",".join(inputs) + "->" + out, shapes, kinds


@settings(deadline=None, max_examples=25)
@given(case=einsums(), seed=st.integers(0, 99))
def test_any_einsum(case, seed):
    subscripts, shapes, kinds = case
    rng = np.random.default_rng(seed)
    arrays = [make(rng, shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    sizes = {}
    for labels, shape in zip(subscripts.split("->")[0].split(","), shapes, strict=True):
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    floats = [oracle.dequantize(x) for x in arrays]
    for i, labels in enumerate(subscripts.split("->")[0].split(",")):
        floats[i] = np.broadcast_to(floats[i], [sizes[c] for c in labels])
    out = einsum(subscripts, *arrays)
    oracle.assert_close(out, np.einsum(subscripts, *floats), np.einsum(subscripts, *map(np.abs, floats)))


def dots_of(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args)
    return [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]


def test_neighbours_stay_integers(rng):
    arrays = [make(rng, shape, "q") for shape in ((2, 3), (3, 4), (4, 2))]
    arrays[1] = oracle.quantized(rng, (3, 4), "int8", channelwise_axes=(1,))
    first, second = dots_of(functools.partial(einsum, "ab,bc,cd->ad", optimize=False), *arrays)
    assert [v.aval.dtype for v in first.invars] == [jnp.int8, jnp.int8]
    assert [v.aval.dtype for v in second.invars] == [jnp.float32, jnp.float32]


@pytest.mark.parametrize("optimize", [True, False, "greedy", [(1, 2), (0, 1)], ["einsum_path", (0, 1), (0, 1)]])
def test_optimize(rng, optimize):
    arrays = [make(rng, shape, "q") for shape in ((2, 3), (3, 4), (4, 2))]
    check("ab,bc,cd->ad", arrays, optimize=optimize)


def test_interleaved_form(rng):
    x, y = make(rng, (2, 3), "q"), make(rng, (3, 4), "q")
    expected = einsum("ab,bc->ca", x, y)
    np.testing.assert_array_equal(einsum(x, [0, 1], y, [1, 2], [2, 0]), expected)
    np.testing.assert_array_equal(einsum(x, [0, 1], y, [1, 2]), expected.T)
    np.testing.assert_array_equal(einsum(x, [Ellipsis, 1], y, [1, 2], [Ellipsis, 2]), expected.T)


def test_arrays_pass_through(rng):
    x, y = make(rng, (2, 3), "f"), make(rng, (3, 4), "f")
    np.testing.assert_array_equal(einsum("ab,bc", x, y), jnp.einsum("ab,bc", x, y))


def test_qwix_dot_general(rng):
    """The hook gets every pair, with what was passed and nothing else."""
    calls = []

    def hook(lhs, rhs, dimension_numbers, **kwargs):
        calls.append((type(lhs), type(rhs), dimension_numbers, kwargs))
        return dot_general.dot_general(lhs, rhs, dimension_numbers, **kwargs)

    arrays = [make(rng, (2, 3), "f"), make(rng, (3, 4), "q"), make(rng, (4, 2), "f")]
    einsum("ab,bc->ac", arrays[0], arrays[0].T, _qwix_dot_general=hook)
    dims = (((1,), (0,)), ((), ()))
    array_type = type(arrays[0])
    assert calls == [(array_type, array_type, dims, {"preferred_element_type": jnp.float32})]
    calls.clear()
    einsum("ab,bc,cd->ad", *arrays, _qwix_dot_general=hook, precision="highest", optimize=False)
    assert [call[1] for call in calls] == [QArray, array_type]
    assert all(call[3]["precision"] == "highest" for call in calls)


def test_dot_general_of_floats(rng):
    """`_dot_general` contracts arrays, as in jax.numpy.einsum."""
    calls = []

    def count(*args, **kwargs):
        calls.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    arrays = [make(rng, (2, 3), "f"), make(rng, (3, 4), "q"), make(rng, (4, 2), "f")]
    einsum("ab,bc,cd->ad", *arrays, _dot_general=count, optimize=False)
    assert len(calls) == 1


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("preferred", [None, "float32"])
def test_result_dtype(rng, dtypes, preferred):
    arrays = [
        oracle.quantized(rng, shape, "int8", dtype=dtype) for shape, dtype in zip(((2, 3), (3, 4)), dtypes, strict=True)
    ]
    for subscripts, operands in (("ab,bc", arrays), ("ab->ba", arrays[:1])):
        out = einsum(subscripts, *operands, preferred_element_type=preferred)
        expected = preferred or functools.reduce(jnp.promote_types, dtypes[: len(operands)])
        assert out.dtype == expected


@pytest.mark.parametrize("subscripts", ["ab,bc->ac", "ab,bc->ca"])
@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_out_sharding(rng, subscripts, spec):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    lhs, rhs = make(rng, (2, 4), "q"), oracle.quantized(rng, (4, 6), "int8")
    expected = einsum(subscripts, lhs, rhs)
    with jax.set_mesh(mesh):
        for sharding in (jax.P(*spec), jax.NamedSharding(mesh, jax.P(*spec))):
            out = einsum(subscripts, lhs, rhs, out_sharding=sharding)
            assert jax.typeof(out).sharding.spec == jax.P(*spec)
            np.testing.assert_array_equal(out, expected)


def test_tiles(rng):
    how = functools.partial(get_how_to_quantize, einsum_str="bsd,dnh->bsnh", ndims=(3, 3), tile_size=128, qtype="int8")
    x = qarray.quantize(jnp.asarray(rng.normal(size=(1, 2, 256)), jnp.float32), how(for_lhs=True))
    w = qarray.quantize(jnp.asarray(rng.normal(size=(256, 2, 3)), jnp.float32), how(for_lhs=False))
    assert (x.scale.shape, w.scale.shape) == ((1, 2, 2), (2, 2, 3))
    check("bsd,dnh->bsnh", [x, w])


def test_gradient_of_the_float_operand(rng):
    x, w = make(rng, (2, 3), "f"), make(rng, (3, 4), "q")
    gradient = jax.grad(lambda x: einsum("ab,bc->ca", x, w).sum())(x)
    np.testing.assert_allclose(gradient, np.tile(oracle.dequantize(w).sum(1), (2, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("einsum_str", "ndims", "tile", "lhs", "rhs"),
    [
        ("abc,bcd->acd", (3, 3), 32, ((0, 2), {1: 32}), ((1, 2), {0: 32})),
        ("...ab,bc->...ac", (4, 2), 0.5, ((0, 1, 2), {3: 0.5}), ((1,), {0: 0.5})),
        ("ab,bc", (2, 2), None, ((0,), {}), ((1,), {})),
        ("abc,cbd->ad", (3, 3), 16, ((0,), {2: 16}), ((2,), {1: 16})),
        ("abc,bcd->d", (3, 3), 16, ((0,), {2: 16}), ((2,), {1: 16})),
        ("...a,...ab->...b", (2, 3), 8, ((0,), {1: 8}), ((0, 2), {1: 8})),
        ("ab,ab->ab", (2, 2), 8, ((0, 1), {}), ((0, 1), {})),
        ("ii,ij->j", (2, 2), None, ((), {}), ((1,), {})),
    ],
)
def test_get_how_to_quantize(einsum_str, ndims, tile, lhs, rhs):
    for for_lhs, (channelwise, tiled) in ((True, lhs), (False, rhs)):
        how = get_how_to_quantize(einsum_str=einsum_str, ndims=ndims, for_lhs=for_lhs, tile_size=tile, qtype="int8")
        assert how == HowToQuantize(qtype="int8", channelwise_axes=channelwise, tiled_axes=tiled)


def test_wrong_sizes_are_an_error(rng):
    with pytest.raises(ValueError, match='Label "b" has sizes 3 and 4'):
        einsum("ab,bc", make(rng, (2, 3), "q"), make(rng, (4, 5), "q"))
