"""conv_general_dilated on QArrays against a NumPy float64 convolution written out as loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from qwix._src.core import qarray
from qwix._src.core.conv_general import conv_general_dilated, get_how_to_quantize, get_transpose
from qwix._src.core.qarray import HowToQuantize, QArray
from tests.core import oracle

NHWC = ("NHWC", "HWIO", "NHWC")


def dilate(x, factors, axes):
    """Puts factor - 1 zeros between neighbours."""
    for factor, axis in zip(factors, axes, strict=True):
        size = x.shape[axis]
        shape = list(x.shape)
        shape[axis] = max((size - 1) * factor + 1, 0)
        index = [slice(None)] * x.ndim
        index[axis] = slice(None, None, factor)
        out = np.zeros(shape)
        out[tuple(index)] = x
        x = out
    return x


def conv(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, dims, features=1, batches=1):
    """The definition: for each output element the sum over its window, in float64."""
    spatial = len(strides)
    lhs = np.transpose(oracle.dequantize(lhs), dims.lhs_spec)
    rhs = np.transpose(oracle.dequantize(rhs), dims.rhs_spec)
    axes = range(2, 2 + spatial)
    lhs = np.pad(dilate(lhs, lhs_dilation, axes), [(0, 0), (0, 0), *padding])
    rhs = dilate(rhs, rhs_dilation, axes)
    groups = features * batches
    lhs_groups = np.split(lhs, features, axis=1) if features > 1 else np.split(lhs, batches, axis=0)
    outs = []
    for part, kernel in zip(lhs_groups, np.split(rhs, groups, axis=0), strict=True):
        window = rhs.shape[2:]
        sizes = [(part.shape[2 + i] - window[i]) // strides[i] + 1 for i in range(spatial)]
        out = np.zeros((part.shape[0], kernel.shape[0], *sizes))
        for position in itertools.product(*map(range, sizes)):
            index = tuple(slice(p * s, p * s + w) for p, s, w in zip(position, strides, window, strict=True))
            patch = part[(slice(None), slice(None), *index)]
            out[(slice(None), slice(None), *position)] = np.tensordot(
                patch, kernel, (range(1, 2 + spatial), range(1, 2 + spatial))
            )
        outs.append(out)
    return np.transpose(np.concatenate(outs, axis=1), np.argsort(dims.out_spec))


@st.composite
def convs(draw):
    """Arguments of a convolution, small but of every kind."""
    spatial = draw(st.integers(1, 3))
    features, batches = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
    lhs_spec = tuple(draw(st.permutations(range(spatial + 2))))
    rhs_spec = tuple(draw(st.permutations(range(spatial + 2))))
    out_spec = tuple(draw(st.permutations(range(spatial + 2))))

    def one_each(values):
        return tuple(draw(st.sampled_from(values)) for _ in range(spatial))

    lhs_logical = (2 * batches, features * draw(st.integers(1, 2)), *one_each([3, 4]))
    rhs_logical = (
        features * batches * draw(st.integers(1, 2)),
        lhs_logical[1] // features,
        *one_each([1, 2]),
    )
    lhs_shape = tuple(np.array(lhs_logical)[np.argsort(lhs_spec)].tolist())
    rhs_shape = tuple(np.array(rhs_logical)[np.argsort(rhs_spec)].tolist())
    arguments = {
        "window_strides": one_each([1, 2]),
        "padding": tuple(zip(one_each([0, 1]), one_each([0, 2]), strict=True)),
        "lhs_dilation": one_each([1, 2]),
        "rhs_dilation": one_each([1, 2]),
        "dimension_numbers": lax.ConvDimensionNumbers(lhs_spec, rhs_spec, out_spec),
        "feature_group_count": features,
        "batch_group_count": batches,
    }
    return lhs_shape, rhs_shape, arguments


def check(lhs, rhs, arguments):
    out = jax.jit(lambda lhs, rhs: conv_general_dilated(lhs, rhs, **arguments))(lhs, rhs)
    truth = conv(lhs, rhs, *arguments.values())
    largest = conv(*(np.abs(oracle.dequantize(x)) for x in (lhs, rhs)), *arguments.values())
    # In formats that are multiplied as stored, nothing is rounded before the sum.
    rounded = any(not isinstance(x, QArray) or x.qtype == "nf4" for x in (lhs, rhs))
    oracle.assert_close(out, truth, largest, rounded_inputs=rounded)
    return out


@settings(deadline=None, max_examples=15)
@given(
    case=convs(),
    qtypes=st.sampled_from(
        [
            ("int8", "int8"),
            ("int8", "int4"),
            ("float8_e4m3fn", "int8"),
            ("float8_e4m3fn", "float8_e5m2"),
            ("int4", "int4"),
            (None, "int8"),
            ("int8", "nf4"),
        ]
    ),
    dtypes=st.tuples(*[st.sampled_from(["float16", "bfloat16", "float32"])] * 2),
    asymmetric=st.sampled_from(["", "lhs", "rhs"]),
    channelwise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_convolution(case, qtypes, dtypes, asymmetric, channelwise, seed):
    lhs_shape, rhs_shape, arguments = case
    rng = np.random.default_rng(seed)
    pair = []
    for name, shape, qtype, dtype in zip(("lhs", "rhs"), (lhs_shape, rhs_shape), qtypes, dtypes, strict=True):
        if qtype is None:
            pair.append(jnp.asarray(rng.normal(size=shape), dtype))
            continue
        method = "minmax" if name == asymmetric and qtype.startswith("int") else "absmax"
        dims = arguments["dimension_numbers"]
        how = get_how_to_quantize(dimension_numbers=dims, for_lhs=name == "lhs", qtype=qtype, calibration_method=method)
        how = how if channelwise else HowToQuantize(qtype=qtype, calibration_method=method)
        x = rng.normal(size=shape) + 0.5
        pair.append(qarray.quantize(jnp.asarray(x, dtype), how))
    assert check(*pair, arguments).dtype == jnp.promote_types(*dtypes)


def arguments_2d(lhs, rhs, padding=((1, 1), (0, 2)), **kwargs):
    return {
        "window_strides": (1, 1),
        "padding": padding,
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC),
        "feature_group_count": 1,
        "batch_group_count": 1,
        **kwargs,
    }


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize(("features", "batches"), [(1, 1), (2, 1), (1, 2)])
def test_asymmetric_is_exact_where_padded(rng, side, features, batches):
    """With scales of 1 all outputs are integers: padding adds real zeros, not codes."""
    lhs = QArray(jnp.asarray(rng.integers(-128, 128, (4, 4, 5, 4)), jnp.int8), jnp.ones((4, 1, 1, 1)))
    rhs = QArray(
        jnp.asarray(rng.integers(-128, 128, (3, 2, 4 // features, 6)), jnp.int8),
        jnp.ones((1, 1, 1, 6)),
    )
    if side == "lhs":
        zero_point = jnp.asarray(rng.integers(-128, 128, (4, 1, 1, 1)), jnp.int8)
        lhs = lhs.replace(zero_point=zero_point)
    else:
        zero_point = jnp.asarray(rng.integers(-128, 128, (1, 1, 1, 6)), jnp.int8)
        rhs = rhs.replace(zero_point=zero_point)
    arguments = arguments_2d(lhs, rhs, feature_group_count=features, batch_group_count=batches)
    out = conv_general_dilated(lhs, rhs, **arguments)
    np.testing.assert_array_equal(out, conv(lhs, rhs, *arguments.values()))


@pytest.mark.parametrize("batches", [1, 2])
def test_tiles_on_batch_and_features(rng, batches):
    lhs = oracle.quantized(rng, (8, 3, 3, 2), "int8", tiled_axes={0: 2})
    rhs = oracle.quantized(rng, (2, 2, 2, 8), "int8", tiled_axes={3: 4})
    check(lhs, rhs, arguments_2d(lhs, rhs, batch_group_count=batches))
    assert input_dtype(lhs, rhs) == jnp.int8


@pytest.mark.parametrize("axis", [1, 3])
def test_tiles_on_summed_axes_are_dequantized_first(rng, axis):
    lhs = oracle.quantized(rng, (2, 4, 4, 2), "int8", tiled_axes={axis: 2 if axis == 1 else 1})
    rhs = oracle.quantized(rng, (2, 2, 2, 8), "int8", tiled_axes={axis: 1})
    check(lhs, rhs, arguments_2d(lhs, rhs))
    if axis == 1:
        assert input_dtype(lhs, rhs) == jnp.float32


def input_dtype(lhs, rhs):
    jaxpr = jax.make_jaxpr(lambda lhs, rhs: conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC))(
        lhs, rhs
    )
    (eqn,) = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    return eqn.invars[0].aval.dtype


@pytest.mark.parametrize("padding", ["SAME", "VALID", "SAME_LOWER"])
@pytest.mark.parametrize("dimension_numbers", [None, NHWC])
def test_padding_by_name(rng, padding, dimension_numbers):
    shapes = ((1, 4, 4, 3), (2, 3, 3, 4)) if dimension_numbers else ((1, 3, 4, 4), (4, 3, 2, 3))
    how = {"calibration_method": "minmax"}
    lhs = oracle.quantized(rng, shapes[0], "int8", zero_mean=False, **how)
    rhs = oracle.quantized(rng, shapes[1], "int8")
    out = conv_general_dilated(lhs, rhs, (2, 1), padding, dimension_numbers=dimension_numbers)
    expected = lax.conv_general_dilated(
        *(qarray.dequantize(x) for x in (lhs, rhs)),
        (2, 1),
        padding,
        dimension_numbers=dimension_numbers,
        precision="highest",
    )
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_depthwise(rng):
    lhs = oracle.quantized(rng, (2, 4, 4, 6), "int8", channelwise_axes=(0,))
    rhs = oracle.quantized(rng, (3, 3, 1, 6), "int4", channelwise_axes=(3,))
    check(lhs, rhs, arguments_2d(lhs, rhs, feature_group_count=6))


def test_both_asymmetric_is_an_error(rng):
    lhs, rhs = (
        oracle.quantized(rng, shape, "int8", calibration_method="minmax") for shape in ((1, 3, 3, 2), (1, 1, 2, 2))
    )
    with pytest.raises(ValueError, match="Both operands are asymmetric"):
        conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


def test_no_integer_overflow():
    lhs = QArray(jnp.full((1, 1, 4, 1), -(2**15), jnp.int16), jnp.ones((1, 1, 1, 1)))
    rhs = QArray(jnp.full((1, 4, 1, 1), -(2**15), jnp.int16), jnp.ones((1, 1, 1, 1)))
    out = conv_general_dilated(lhs, rhs, (1, 1), "VALID", dimension_numbers=NHWC)
    np.testing.assert_array_equal(out, [[[[2.0**32]]]])


@pytest.mark.parametrize("quantize_lhs", [True, False])
def test_arguments_are_kept(rng, quantize_lhs):
    lhs = jnp.asarray(rng.normal(size=(1, 3, 3, 2)), jnp.bfloat16)
    if quantize_lhs:
        lhs = qarray.quantize(lhs, HowToQuantize(qtype="float8_e4m3fn"))
    rhs = oracle.quantized(rng, (1, 1, 2, 2), "float8_e4m3fn", dtype="bfloat16")
    jaxpr = jax.make_jaxpr(
        lambda lhs, rhs: conv_general_dilated(
            lhs,
            rhs,
            (1, 1),
            "SAME",
            dimension_numbers=NHWC,
            precision="highest",
            preferred_element_type=jnp.float32,
        )
    )(lhs, rhs)
    (eqn,) = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2
    assert jaxpr.out_avals[0].dtype == jnp.float32


def test_out_sharding(rng):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    lhs = oracle.quantized(rng, (2, 3, 3, 2), "int8", channelwise_axes=(0,))
    rhs = oracle.quantized(rng, (1, 1, 2, 2), "int8", channelwise_axes=(3,))
    with jax.set_mesh(mesh):
        spec = jax.P("x", None, None, None)
        lhs = jax.device_put(lhs, jax.NamedSharding(mesh, spec))
        out = conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC, out_sharding=spec)
        assert jax.typeof(out).sharding.spec == spec


def test_gradient_of_the_float_operand(rng):
    rhs = oracle.quantized(rng, (2, 2, 2, 3), "int8", channelwise_axes=(3,))
    lhs = jnp.asarray(rng.normal(size=(1, 3, 3, 2)), jnp.float32)

    def loss(lhs, rhs):
        return conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC).sum()

    found, expected = (jax.grad(loss)(lhs, x) for x in (rhs, qarray.dequantize(rhs)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # d sum / d lhs sums the kernel over features and over the windows that hold an element.
    assert found.shape == lhs.shape
    np.testing.assert_allclose(found[0, 1, 1], oracle.dequantize(rhs).sum((0, 1, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("dims", "lhs_axes", "rhs_axes", "lhs_transpose", "rhs_transpose"),
    [
        (NHWC, (0,), (3,), [0, None, None, None], [None, None, None, 3]),
        (("NCW", "OIW", "NWC"), (0,), (0,), [0, None, None], [None, None, 0]),
        (("CNW", "IOW", "WNC"), (1,), (1,), [None, 1, None], [None, None, 1]),
        (lax.conv_dimension_numbers((1, 1, 1), (1, 1, 1), None), (0,), (0,), [0, None, None], None),
    ],
)
def test_how_and_transpose(dims, lhs_axes, rhs_axes, lhs_transpose, rhs_transpose):
    for for_lhs, axes in ((True, lhs_axes), (False, rhs_axes)):
        how = get_how_to_quantize(dimension_numbers=dims, for_lhs=for_lhs, qtype="int8")
        assert how == HowToQuantize(qtype="int8", channelwise_axes=axes)
    assert get_transpose(dims, for_lhs=True) == lhs_transpose
    assert get_transpose(dims, for_lhs=False) == (rhs_transpose or [None, 0, None])


def test_how_without_dimension_numbers_is_an_error():
    with pytest.raises(ValueError, match="dimension_numbers=None"):
        get_how_to_quantize(dimension_numbers=None, for_lhs=True, qtype="int8")
