"""Whole models: packed, run, restored; on devices of a mesh; without a compiler."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix import cpu
from qwix._src.core import dot_general, qarray
from qwix._src.providers.input_transform import WithInputTransform
from qwix.contrib import awq, hadamard, padded_ptq, smooth_quant
from qwix.cpu import native, packed
from qwix.models import bert

WIDTH = 48


class Mlp(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(WIDTH, 64, rngs=rngs), nnx.Linear(64, 24, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def batch(rows: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, WIDTH)), jnp.float32)


def ptq(provider: Any = qwix.PtqProvider, **rule: Any) -> nnx.Module:
    return qwix.quantize_model(Mlp(), provider([qwix.QuantizationRule(weight_qtype="int4", **rule)]), batch())


def by_awq() -> nnx.Module:
    rules = [awq.AwqRule(weight_qtype="int8", act_qtype="int8", n_grid=2)]
    return awq.quantize(Mlp(), [batch(8)], rules, n_clip=0)


def by_smooth_quant() -> nnx.Module:
    rules = [smooth_quant.SqRule(weight_qtype="int8", act_qtype="int8")]
    return smooth_quant.quantize(Mlp(), [batch(8)], rules)


def rotated() -> nnx.Module:
    """A quantized weight within a transform, as `contrib.rotation` leaves it."""
    model = ptq()
    how = model.up.kernel.how
    inner = qarray.quantize(hadamard.HadamardTransform(WIDTH, None)(Mlp().up.kernel.get_value(), 0), how)
    transforms = ((-2, hadamard.HadamardTransform(WIDTH, None)),)
    model.up.kernel = WithInputTransform(inner, how, transforms=transforms)
    return model


MODELS = {
    "weight-only": lambda: ptq(tile_size=16),
    "dynamic": lambda: ptq(act_qtype="int8"),
    "static": lambda: ptq(act_qtype="int8", act_static_scale=True),
    "static-asymmetric": lambda: ptq(act_qtype="int8", act_static_scale=True, act_calibration_method="minmax"),
    "awq": by_awq,
    "smooth-quant": by_smooth_quant,
    "padded": lambda: ptq(padded_ptq.PaddedPtqProvider, act_qtype="int8", tile_size=40),
}


def arrays(model: nnx.Module) -> list[Any]:
    return [model.up.kernel.array, model.down.kernel.array]


@pytest.mark.parametrize("name", MODELS)
def test_models_give_what_they_gave_and_come_back(name: str) -> None:
    model = MODELS[name]()
    expected, before = model(batch()), nnx.state(model)
    fast = cpu.optimize_for_inference(model)
    assert all(isinstance(array, packed.PackedQArray) for array in arrays(fast))
    assert [type(k) for k in (fast.up.kernel, fast.down.kernel)] == [
        type(k) for k in (model.up.kernel, model.down.kernel)
    ]
    np.testing.assert_allclose(fast(batch()), expected, rtol=1e-4, atol=2e-5 * float(jnp.abs(expected).max()))
    back = cpu.restore(fast)
    assert [type(array) for array in arrays(back)] == [type(array) for array in arrays(model)]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), before)


def test_a_transformed_weight() -> None:
    model = rotated()
    fast = cpu.optimize_for_inference(model)
    assert isinstance(fast.up.kernel, WithInputTransform)
    assert isinstance(fast.up.kernel.inner().array, packed.PackedQArray)
    np.testing.assert_allclose(jnp.asarray(fast.up.kernel), jnp.asarray(model.up.kernel), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(cpu.restore(fast)), nnx.state(model))


def test_a_layout_change_of_a_scaled_weight() -> None:
    model = MODELS["awq"]()
    kernel, fast = model.up.kernel, cpu.optimize_for_inference(model).up.kernel
    np.testing.assert_allclose(jnp.asarray(fast.T), jnp.asarray(kernel.T), atol=1e-6)
    assert isinstance(fast.reshape(fast.shape).array, packed.PackedQArray)


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        image = nn.Conv(8, (3, 3))(x.reshape(-1, 4, 4, 3))
        return nn.Dense(20)(nn.relu(image.reshape(len(x), -1)))


def test_a_linen_model_with_a_convolution() -> None:
    rules = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    model = qwix.quantize_model(LinenMlp(), qwix.PtqProvider(rules))
    variables = model.init(jax.random.key(0), batch())
    fast = cpu.optimize_for_inference(variables)
    kinds = [type(fast["params"][name]["kernel"].array) for name in ("Conv_0", "Dense_0")]
    assert kinds == [packed.PackedQArray] * 2
    np.testing.assert_allclose(model.apply(fast, batch()), model.apply(variables, batch()), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, cpu.restore(fast), variables)


def test_what_no_kernel_reads_is_named() -> None:
    rules = [
        qwix.QuantizationRule(module_path="up", weight_qtype="int16"),
        qwix.QuantizationRule(weight_qtype="int8"),
    ]
    model = qwix.quantize_model(Mlp(), qwix.PtqProvider(rules), batch())
    with pytest.warns(qwix.QuantizationWarning, match=r"up/kernel: int16 has no kernel"):
        fast = cpu.optimize_for_inference(model)
    assert type(fast.up.kernel.array) is qarray.QArray
    with pytest.raises(cpu.NothingToPackError, match="quantize the model"):
        cpu.optimize_for_inference(Mlp())


def flags_of_memory(address: int) -> list[str]:
    """Of the mapping that holds an address, as Linux lists them; none where there are no pages of 2 MiB."""
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        return []
    mappings = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.M | re.S
    )
    return next(flags.split() for low, high, flags in mappings if int(low, 16) <= address < int(high, 16))


def test_a_large_weight_lies_in_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    w = qarray.quantize_api(jnp.ones((2048, 2112), jnp.float32), jnp.int8, channelwise_axes=(1,))
    w = w.replace(qvalue=jnp.arange(2048 * 2112, dtype=jnp.int32).reshape(2048, 2112).astype(jnp.int8))
    p = packed.pack(w)
    if flags := flags_of_memory(p.qvalue.unsafe_buffer_pointer()):
        assert "hg" in flags  # that was asked for, whether there were such pages or not
        assert p.qvalue.unsafe_buffer_pointer() % 2**21 == 0
    np.testing.assert_array_equal(packed.unpack(p).qvalue, w.qvalue)
    # An array like any other: of the device that it was on, and safe to donate.
    assert not p.qvalue.committed
    on_second = packed.pack(jax.device_put(w, jax.devices()[1]))
    assert on_second.qvalue.devices() == {jax.devices()[1]} and on_second.qvalue.committed
    total = int(p.qvalue.sum())
    jax.jit(lambda codes: codes + 1, donate_argnums=0)(on_second.qvalue)
    assert int(p.qvalue.sum()) == total
    if flags:  # a kernel that was built without such pages refuses the advice
        monkeypatch.setattr(packed.mmap, "MADV_HUGEPAGE", 9999)
        plain = packed.pack(w)
        assert "hg" not in flags_of_memory(plain.qvalue.unsafe_buffer_pointer())
        np.testing.assert_array_equal(plain.qvalue, p.qvalue)


# How the weight and the activations lie, and the largest array that devices may exchange: activations, sums, scales.
SHARDED = {
    "columns": ((None, "d"), (None, None), 0),
    "rows": (("d", None), (None, "d"), 16 * 256),
    "data": ((None, None), ("d", None), 0),
    "columns-of-sharded-rows": ((None, "d"), ("d", None), 16 * 512),
}


@pytest.mark.parametrize("act", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tile", [32, None], ids=["tiled", "channel"])
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_stay_where_they_are(name: str, tile: int | None, act: bool) -> None:
    spec, x_spec, most = SHARDED[name]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(1,), tiled_axes={0: tile} if tile else {})
    w = qarray.quantize(jnp.asarray(rng.standard_normal((512, 256)), jnp.float32), how)
    x = jnp.asarray(rng.standard_normal((16, 512)), jnp.float32)
    how_x = qarray.HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: tile} if tile else {})
    dims = (((1,), (0,)), ((), ()))

    def put(array: jax.Array, spec: tuple[Any, ...]) -> jax.Array:
        fitting = [name if size % 8 == 0 else None for name, size in zip(spec, array.shape, strict=True)]
        return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*fitting)))

    p = packed.pack(jax.tree.map(lambda leaf: put(leaf, spec), w))
    assert p.qvalue.sharding.shard_shape(p.qvalue.shape) == tuple(
        n // (8 if name else 1) for n, name in zip(p.qvalue.shape, (spec[1], spec[0], None), strict=True)
    )
    product = jax.jit(lambda x, p: dot_general.dot_general(qarray.UnquantizedQArray(x, how_x) if act else x, p, dims))
    given = put(x, x_spec)
    compiled = product.lower(given, p).compile()
    found = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text()
    )
    assert max((int(np.prod([int(n) for n in dims.split(",")])) for dims in found), default=0) <= most
    expected = dot_general.dot_general(qarray.quantize(x, how_x) if act else x, w, dims)
    np.testing.assert_allclose(product(given, p), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tile", [32, 96])
def test_a_sharded_product_whose_last_tile_is_cut_short(tile: int, act: bool) -> None:
    """Columns stay where they are; K, which has no whole tiles, is gathered in the activations."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda leaf, *spec: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    rng = np.random.default_rng(0)
    how = qarray.HowToQuantize(qtype="int4", channelwise_axes=(1,), tiled_axes={0: tile})
    w = padded_ptq.quantize(jnp.asarray(rng.standard_normal((72, 256)), jnp.float32), how)
    x = jnp.asarray(rng.standard_normal((16, 72)), jnp.float32)
    how_x = qarray.HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: tile})
    dims = (((1,), (0,)), ((), ()))
    p = packed.pack(w)
    sharded = jax.tree.map(lambda leaf: put(leaf, "d"), p)
    product = jax.jit(
        lambda x, p: padded_ptq.dot_general(qarray.UnquantizedQArray(x, how_x, padded_ptq) if act else x, p, dims)
    )
    expected = padded_ptq.dot_general(padded_ptq.quantize(x, how_x) if act else x, w, dims)
    for spec in ((None, None), ("d", None), (None, "d")):
        found = product(put(x, *spec), sharded)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        assert spec[0] or found.sharding.spec == jax.P(None, "d")


def test_within_shard_map() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    w = qarray.quantize(jnp.eye(32), qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,)))
    x, p = jnp.arange(16.0 * 32).reshape(16, 32), packed.pack(w)
    product = jax.shard_map(lambda x: cpu.matmul(x, p), mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
    for function in (product, jax.jit(product)):
        np.testing.assert_allclose(function(x), x @ qarray.dequantize(w), rtol=1e-5)


def test_axes_of_type_explicit() -> None:
    """As `jax.make_mesh` makes them: a sharding is part of an array's type there."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    w = qarray.quantize(jnp.eye(64), qarray.HowToQuantize(qtype="int8", channelwise_axes=(1,)))
    put = lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(None, "d")))  # noqa: E731
    p = packed.pack(jax.tree.map(put, w))
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(p), w)
    x = jax.device_put(jnp.arange(16.0 * 64).reshape(16, 64), jax.NamedSharding(mesh, jax.P("d", None)))
    np.testing.assert_allclose(jax.jit(cpu.matmul)(x, p), np.asarray(x) @ qarray.dequantize(w), rtol=1e-5)


class Fused(nnx.Module):
    """`Mlp` with the layers of `qwix.models.bert`, which call `cpu.linear` where their weight is packed."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up, self.down = bert.Linear(WIDTH, 64, rngs=rngs), bert.Linear(64, 24, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.up(x, "gelu"))


@pytest.mark.parametrize("rule", [{}, {"act_qtype": "int8"}, {"act_qtype": "int8", "act_static_scale": True}])
def test_a_fused_layer_is_one_op_under_its_rule(rule: dict[str, Any]) -> None:
    rules = [qwix.QuantizationRule(module_path="up", weight_qtype="int8", **rule)]
    model = qwix.quantize_model(Fused(), qwix.PtqProvider(rules), batch())
    fast = cpu.optimize_for_inference(model)
    np.testing.assert_allclose(nnx.jit(fast)(batch()), nnx.jit(model)(batch()), rtol=1e-5, atol=1e-5)
    traced = str(jax.make_jaxpr(fast)(batch()))
    assert traced.count(native.MATMUL) == 1
    assert f"('activation', np.int64({native.ACTIVATIONS['gelu']}))" in traced
    assert [op.path for op in qwix.summarize(fast).ops] == [op.path for op in qwix.summarize(model).ops]


@pytest.mark.parametrize("quantize", ["awq", "smooth_quant", "padded"])
def test_fused_layers_of_other_providers(quantize: str) -> None:
    """Input scales come off the activations first, and padded widths fit, whatever a layer calls."""
    if quantize == "awq":
        model = awq.quantize(Fused(), [batch(8)], [awq.AwqRule(weight_qtype="int8", n_grid=2)], n_clip=0)
    elif quantize == "smooth_quant":
        model = smooth_quant.quantize(Fused(), [batch(8)], [smooth_quant.SqRule(weight_qtype="int8", act_qtype="int8")])
    else:
        rules = [qwix.QuantizationRule(weight_qtype="int4", tile_size=20)]
        model = qwix.quantize_model(Fused(), padded_ptq.PaddedPtqProvider(rules), batch())
    fast = cpu.optimize_for_inference(model)
    np.testing.assert_allclose(nnx.jit(fast)(batch()), nnx.jit(model)(batch()), rtol=1e-5, atol=1e-5)


def test_a_sharded_product_with_bias_and_activation() -> None:
    """Over the contracted axis, both come after the sum of the devices' parts."""
    w = qarray.quantize_api(batch(WIDTH + 16)[:, :WIDTH], jnp.int8, channelwise_axes=(1,))
    p = packed.pack(w)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 64)), jnp.float32)
    expected = cpu.matmul(x, p, jnp.linspace(-1, 1, WIDTH), activation="gelu")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    on = lambda leaf, *spec: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    sharded = p.replace(qvalue=on(p.qvalue, None, "d"), scale=on(p.scale))
    actual = jax.jit(functools.partial(cpu.matmul, activation="gelu"))(
        on(x, None, "d"), sharded, on(jnp.linspace(-1, 1, WIDTH))
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_models_run_on_xla_and_say_so_once(tmp_path: Path) -> None:
    code = """
import os, warnings, jax.numpy as jnp, qwix
from flax import nnx
from qwix.cpu import native
native.__file__ = os.environ["PATH"] + "/native.py"  # where `python -m qwix.cpu.build` has put no library
warnings.simplefilter("always")
rules = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")]
model = qwix.quantize_model(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), qwix.PtqProvider(rules), jnp.ones((1, 16)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fast = qwix.optimize_for_inference(model)
    x = jnp.linspace(-1, 1, 32).reshape(2, 16)
    assert jnp.allclose(fast(x), model(x), atol=1e-5)
    assert not qwix.cpu.is_available() and qwix.cpu.kernels() == []
messages = [str(w.message) for w in caught if "no native kernels" in str(w.message)]
assert len(messages) == 1 and "no C++ compiler was found" in messages[0], messages
"""
    hidden = ("QWIX_CPU_LIBRARY", "CXX")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {
        "PATH": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
