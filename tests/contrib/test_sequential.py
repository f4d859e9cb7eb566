"""Stage by stage against the same done by hand: one weight after the other, in a model that is run anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.core import qarray
from qwix.contrib import gptq, gptq_core, segments, sequential

RULES = [gptq.GptqRule(weight_qtype=jnp.int4, tile_size=4)]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.c = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.c(jax.nn.silu(self.a(x)) * self.b(x))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def run(model, batches, **kwargs):
    return sequential.quantize(
        model,
        batches,
        gptq.GptqCalibrationProvider(RULES),
        gptq.quantize_with_context,
        qwix.PtqProvider(RULES),
        **kwargs,
    )


def check(result, model, batches):
    """Each weight is GPTQ's of its statistic, and that is of the inputs that the quantized earlier weights give it.

    One after the other from what the run found: from float64 inputs alone, a code that is nearly a tie may be another,
    and all later weights with it.
    """
    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: 4})
    states = [np.asarray(x, np.float64) for x in batches]
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    for i, block in enumerate(result.model.blocks):
        found = {name: np.asarray(getattr(block, name).kernel, np.float64) for name in "abc"}
        inner = [silu(x @ found["a"]) * (x @ found["b"]) for x in states]
        for name, inputs in {"a": states, "b": states, "c": inner}.items():
            stats = result.quant_stats["blocks"][i][name]["kernel_gptq"]
            hessian = np.asarray(stats["sum_of_hessian"]) / int(stats["count"])
            want = sum(x.T @ x for x in inputs) / len(inputs)
            np.testing.assert_allclose(hessian, want, atol=1e-5 * np.abs(want).max())
            q, _ = gptq_core.quantize_weight(getattr(model.blocks[i], name).kernel[...].T, jnp.asarray(hessian), how)
            np.testing.assert_allclose(found[name].T, qarray.dequantize(q), atol=1e-5)
        states = [x + y @ found["c"] for x, y in zip(states, inner, strict=True)]


def test_equals_running_the_model_anew_for_each_stage():
    model, batches = Net(), [normal(16, 8), normal(16, 8, seed=1)]
    done = []
    result = run(model, iter(batches), progress=lambda *x: done.append(x), keep_stats=True)
    assert [len(stage) for stage in result.stages] == [2, 1] * 3
    assert done[-1] == (6, 6) and result.stages[0] == (("blocks", "0", "a", "kernel"), ("blocks", "0", "b", "kernel"))
    check(result, model, batches)
    # A copy was quantized, and it runs.
    assert model.blocks[0].a.kernel.dtype == jnp.float32
    assert result.model(batches[0]).shape == (16, 8)


def test_statistics_of_the_float_model_are_those_of_the_provider():
    model, batches = Net(), [(normal(16, 8),), {"x": normal(16, 8, seed=1)}]
    result = run(model, batches, sequential=False, keep_stats=True)
    observed = qwix.quantize_model(model, gptq.GptqCalibrationProvider(RULES), batches[0][0])
    observed(batches[0][0])
    observed(batches[1]["x"])
    want = nnx.to_pure_dict(nnx.state(observed, qwix.QuantStat))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-4), result.quant_stats, want)


def test_equal_layers_share_their_programs():
    plan = plan_of(Net(), normal(16, 8))
    keys = [segment.key for segment in plan.segments]
    assert keys[2] == keys[4] and keys[1] == keys[3]


def plan_of(model, x):
    source = sequential._Source(model, None, gptq.GptqCalibrationProvider(RULES), "__call__")
    return segments.trace(lambda p, a: source.call(p, a, {}), source.params, [x])


def test_what_is_wide_runs_again_and_nothing_else():
    """The inputs of `c` come beside those of the block, so that `a` and `b` run again when `c` is known."""
    plan = plan_of(Net(), normal(16, 8))
    products = [[e.primitive.name for e in s.equations].count("dot_general") for s in plan.segments]
    assert products == [0, 2, 3, 2, 3, 2]  # no stage waits for the last c
    assert [len(segment.outputs) for segment in plan.segments] == [0, 0, 1, 0, 1, 0]


class Turned(Net):
    def __call__(self, x):
        for block in self.blocks:
            x = block(x * jnp.cos(jnp.arange(8.0)))
        return x


def test_what_no_input_changes_is_not_carried():
    plan = plan_of(Turned(), normal(16, 8))
    assert {v.aval.shape for segment in plan.segments for v in segment.outputs} == {(16, 8)}


def test_statistics_are_sharded_like_their_weight():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    model = Net()
    kernel = model.blocks[1].c.kernel
    kernel.set_value(jax.device_put(kernel[...], jax.sharding.NamedSharding(mesh, jax.P("model", None))))
    result = run(model, [normal(16, 8)], keep_stats=True)
    stat = result.quant_stats["blocks"][1]["c"]["kernel_gptq"]["sum_of_hessian"]
    assert stat.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, jax.P("model", None)), 2)
    check(result, Net(), [normal(16, 8)])
    observed = qwix.quantize_model(model, gptq.GptqCalibrationProvider(RULES), normal(16, 8))
    observed(normal(16, 8))
    eager = observed.blocks[1].c.kernel_gptq.get_value()["sum_of_hessian"]
    assert eager.sharding.is_equivalent_to(stat.sharding, 2)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(8, name=f"b{i}")(nn.relu(nn.Dense(8, name=f"a{i}")(x)))
        return x


def test_linen():
    model, x = LinenNet(), normal(64, 8)
    variables = model.init(jax.random.key(0), x)
    result = run(model, [x], variables=variables)
    assert [stage[0][0] for stage in result.stages] == ["a0", "b0", "a1", "b1"]
    found = result.model.apply({"params": result.params}, x)
    nearest = qwix.quantize_params(
        variables["params"], jax.eval_shape(result.model.init, jax.random.key(0), x)["params"]
    )
    want = model.apply(variables, x)
    errors = [np.linalg.norm(y - want) for y in (found, result.model.apply({"params": nearest}, x))]
    assert errors[0] < 0.9 * errors[1]


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
        self.block = Block(nnx.Rngs(1))

    def __call__(self, tokens):
        return self.embed.attend(self.block(self.embed(tokens)))


def test_a_tied_embedding_comes_last():
    result = run(Tied(), [jnp.arange(16)[None]])
    assert [stage[0][-2] for stage in result.stages] == ["a", "c", "embed"]


def test_what_cannot_be_done_is_an_error():
    with pytest.raises(ValueError, match="nothing to calibrate with"):
        run(Net(), [])
    with pytest.raises(ValueError, match="a/kernel, dot_general0: the activations hold NaN"):
        run(Net(), [jnp.full((2, 8), jnp.nan)])
    with pytest.raises(ValueError, match="no op of the model is calibrated"):
        sequential.quantize(
            Net(),
            [normal(2, 8)],
            gptq.GptqCalibrationProvider([qwix.QuantizationRule(weight_qtype="int4")]),
            gptq.quantize_with_context,
            qwix.PtqProvider(RULES),
        )


class Stacked(nnx.Module):
    """The blocks of a `Net` under a scan, and then as many side by side under a vmap."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: Block(rngs))
        self.blocks, self.heads = make(nnx.Rngs(0).split(3)), make(nnx.Rngs(1).split(2))

    def __call__(self, x):
        step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = step(x, self.blocks)
        return nnx.vmap(lambda head, x: head(x), in_axes=(0, 0))(self.heads, jnp.stack([x, -x])).sum(0)


class Unstacked(nnx.Module):
    def __init__(self, stacked):
        def of(blocks, i):
            return nnx.merge(nnx.split(Block(nnx.Rngs(0)))[0], jax.tree.map(lambda x: x[i], nnx.state(blocks)))

        self.blocks = nnx.List([of(stacked.blocks, i) for i in range(3)])
        self.heads = nnx.List([of(stacked.heads, i) for i in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads[0](x) + self.heads[1](-x)


def test_layers_under_scan_and_vmap_are_quantized_like_layers_one_by_one():
    model, batches = Stacked(), [normal(16, 8), normal(16, 8, seed=1)]
    found, expected = run(model, batches), run(Unstacked(model), batches)
    assert found.stages[2] == (("blocks", "a", "kernel", 1), ("blocks", "b", "kernel", 1))
    assert found.stages[-1] == (("heads", "c", "kernel"),)
    for name in ("blocks", "heads"):
        for i, block in enumerate(getattr(expected.model, name)):
            for layer in "abc":
                weight = getattr(getattr(found.model, name), layer).kernel
                other = getattr(block, layer).kernel
                np.testing.assert_array_equal(weight.array.qvalue[i], other.array.qvalue[...], err_msg=f"{name} {i}")
    np.testing.assert_allclose(found.model(batches[0]), expected.model(batches[0]), rtol=1e-3, atol=1e-4)


class LastAxis(nnx.Module):
    def __init__(self):
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), out_axes=-1)(nnx.Rngs(0).split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, -1), out_axes=nnx.Carry)(x, self.layers)


def test_stacking_that_cannot_be_cut_is_an_error():
    with pytest.raises(segments.CannotCut, match="layers/kernel, dot_general0: its layers are stacked along another"):
        run(LastAxis(), [normal(2, 8)])
