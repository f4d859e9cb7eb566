"""Quantized checkpoints into models, and the rules that fit them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix._src.utils import checkpoint_util

RULE = qwix.QuantizationRule(weight_qtype=jnp.int8, tile_size=8)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def quantized_model():
    return qwix.quantize_model(Model(nnx.Rngs(0)), qwix.PtqProvider([RULE]), jnp.ones((1, 16)))


def kernel(rows, columns, scale_shape, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "qvalue": jnp.asarray(rng.integers(-127, 128, (rows, columns)), jnp.int8),
        "scale": jnp.asarray(rng.uniform(0.01, 0.1, scale_shape), jnp.float32),
    }


@pytest.fixture
def checkpoint():
    def linear(columns, seed):
        return {"kernel": kernel(16, columns, (2, columns), seed), "bias": jnp.arange(columns, dtype=jnp.float32)}

    return {"layers": {"0": linear(16, 1), "1": linear(16, 2)}, "out": linear(4, 3)}


def dequantized(leaf):
    scale = np.asarray(leaf["scale"], np.float64)
    shape = leaf["qvalue"].shape
    for axis in (0, 1):
        scale = np.repeat(scale, shape[axis] // scale.shape[axis], axis)
    return np.asarray(leaf["qvalue"], np.float64) * scale


@pytest.mark.parametrize("abstract", [False, True])
def test_into_a_quantized_model(checkpoint, abstract):
    model = nnx.eval_shape(quantized_model) if abstract else quantized_model()
    nnx.update(model, checkpoint_util.process_prequantized_params(checkpoint, model))
    for i in (0, 1):
        array = model.layers[i].kernel.array
        assert isinstance(array, qwix.QArray)
        np.testing.assert_array_equal(array.qvalue[...], checkpoint["layers"][str(i)]["kernel"]["qvalue"])
        np.testing.assert_array_equal(array.scale[...], checkpoint["layers"][str(i)]["kernel"]["scale"])
    np.testing.assert_array_equal(model.out.bias[...], np.arange(4))
    assert model(jnp.ones((1, 16))).shape == (1, 4)


def test_into_a_float_model(checkpoint):
    model = Model(nnx.Rngs(0))
    nnx.update(model, checkpoint_util.process_prequantized_params(checkpoint, model))
    np.testing.assert_allclose(model.out.kernel[...], dequantized(checkpoint["out"]["kernel"]), rtol=1e-6)


def test_coarse_blocks_are_repeated(checkpoint):
    checkpoint["out"]["kernel"] = kernel(16, 4, (1, 2))
    model = quantized_model()
    nnx.update(model, checkpoint_util.process_prequantized_params(checkpoint, model))
    expected = np.repeat(np.repeat(checkpoint["out"]["kernel"]["scale"], 2, 0), 2, 1)
    np.testing.assert_array_equal(model.out.kernel.array.scale[...], expected)


def test_dtypes_are_the_models(checkpoint):
    checkpoint["out"]["kernel"]["scale"] = checkpoint["out"]["kernel"]["scale"].astype(jnp.bfloat16)
    checkpoint["out"]["bias"] = checkpoint["out"]["bias"].astype(jnp.bfloat16)
    result = checkpoint_util.process_prequantized_params(checkpoint, quantized_model())
    assert result["out"]["kernel"]["array"]["scale"].dtype == result["out"]["bias"].dtype == jnp.float32


@pytest.mark.parametrize("use_checkpoint_sharding", [False, True])
def test_sharding(checkpoint, use_checkpoint_sharding):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    theirs = jax.sharding.NamedSharding(mesh, jax.P("x"))
    checkpoint["out"]["kernel"]["qvalue"] = jax.device_put(checkpoint["out"]["kernel"]["qvalue"], theirs)
    result = checkpoint_util.process_prequantized_params(
        checkpoint, quantized_model(), use_checkpoint_sharding=use_checkpoint_sharding
    )
    assert (result["out"]["kernel"]["array"]["qvalue"].sharding == theirs) == use_checkpoint_sharding


def change(path, value):
    def apply(tree):
        for key in path[:-1]:
            tree = tree[key]
        if value is None:
            del tree[path[-1]]
        else:
            tree[path[-1]] = value

    return apply


KERNEL = ("out", "kernel")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(("out", "x"), jnp.ones(3)), "out/x"),
        (change((*KERNEL, "scale"), None), r"out/kernel lacks \['scale'\]"),
        (change((*KERNEL, "qvalue"), None), r"out/kernel lacks \['qvalue'\]"),
        (change((*KERNEL, "foo"), jnp.ones(1)), r"out/kernel has the unsupported leaves \['foo'\]"),
        (change((*KERNEL, "scale"), jnp.ones((4, 4))), r"out/kernel/scale has shape \(4, 4\).*\(2, 4\)"),
        (change((*KERNEL, "qvalue"), jnp.ones((8, 4), jnp.int8)), r"out/kernel/qvalue has shape \(8, 4\)"),
        (change((*KERNEL, "zero_point"), jnp.ones((2, 4), jnp.int8)), "out/kernel has an unexpected zero_point"),
        (change((*KERNEL, "qvalue"), jnp.full((16, 4), 1000, jnp.int16)), "int16 and does not fit"),
        (change(KERNEL, jnp.ones((16, 4))), "out/kernel is a float array in the checkpoint"),
        (change(("out", "bias"), jnp.ones(9)), r"out/bias has shape \(9,\)"),
    ],
)
def test_what_does_not_fit_is_an_error(checkpoint, edit, message):
    edit(checkpoint)
    with pytest.raises(ValueError, match=message):
        checkpoint_util.process_prequantized_params(checkpoint, quantized_model())


def test_extra_parameters_can_be_left_out(checkpoint):
    checkpoint["extra"] = {"kernel": kernel(4, 4, (1, 4))}
    result = checkpoint_util.process_prequantized_params(checkpoint, quantized_model(), allow_extra_params=True)
    assert set(result) == {"layers", "out"}


def test_rules_fit_the_checkpoint(checkpoint):
    rules = checkpoint_util.restore_quantization_rules(checkpoint, qwix.QuantizationRule, tile_size=8, act_qtype=None)
    assert [r.module_path for r in rules] == [r"layers/\d+", "out"]
    model = qwix.quantize_model(Model(nnx.Rngs(0)), qwix.PtqProvider(rules), jnp.ones((1, 16)))
    nnx.update(model, checkpoint_util.process_prequantized_params(checkpoint, model))
    assert model.layers[1].kernel.array.qvalue.dtype == jnp.int8


def test_rules_of_unlike_formats_name_each_path(checkpoint):
    checkpoint["layers"]["1"]["kernel"]["qvalue"] = jnp.ones((16, 16), jnp.int4)
    rules = checkpoint_util.restore_quantization_rules(checkpoint, qwix.QuantizationRule, tile_size=None)
    assert {r.module_path: (r.weight_qtype, r.act_qtype) for r in rules} == {
        "layers/0": (jnp.int8, jnp.int8),
        "layers/1": (jnp.int4, jnp.int4),
        "out": (jnp.int8, jnp.int8),
    }
