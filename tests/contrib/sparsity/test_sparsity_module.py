"""The schedule of masks, and pruning with and without quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.core import sparsity
from qwix._src.core.sparsity import SparsityRule
from qwix.contrib.sparsity.sparsity_module import LinenSparsityModule, SparsityModule

W = jnp.asarray(np.random.default_rng(0).permutation(32).reshape(4, 8) - 10.5, jnp.float32)
X = jnp.asarray(np.random.default_rng(1).permutation(8).reshape(2, 4) + 1.0, jnp.float32)


def rule(**kwargs) -> SparsityRule:
    return SparsityRule(**{"weight_sparsity_n": 2, "weight_sparsity_m": 4} | kwargs)


def test_schedule():
    module = SparsityModule((4, 8), (None, None), rule(weight_sparsity_start_step=2, weight_sparsity_update_step=3))
    call = nnx.jit(lambda module, x, w: module(x, w))
    seen = []
    for step in range(7):
        w = W if step < 4 else W[::-1]
        _, pruned = call(module, X, w)
        kept = np.asarray(pruned) != 0
        new = np.asarray(sparsity.get_sparsity_mask(w, 2, 4))
        seen.append("all" if kept.all() else "new" if (kept == new).all() else "old")
    # What Qwix 0.1.8 does: from step 2 on, and anew at 5, though the weight changes at 4.
    assert seen == ["all", "all", "new", "new", "old", "new", "new"]
    assert module.step.get_value() == 7
    assert isinstance(module.mask, nnx.BatchStat)
    assert set(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))) == {"mask", "step"}


def test_eval_mode_keeps_the_mask():
    module = SparsityModule((4, 8), (None, None), rule())
    module(X, W)
    trained = module.mask.get_value()
    module.sparsity_rule = rule(eval_mode=True)
    _, pruned = module(X, W[::-1])
    np.testing.assert_array_equal(np.asarray(pruned) != 0, trained)
    assert module.step.get_value() == 1


def test_activations():
    module = SparsityModule((4, 8), (None, None), SparsityRule(activation_sparsity_n=1, activation_sparsity_m=4))
    x, w = module(X, W)
    np.testing.assert_array_equal(x, sparsity.prune_inputs_n_m(X, n=1, m=4))
    assert w is W
    assert module.step.get_value() == 0


def test_no_rule():
    x, w = SparsityModule((4, 8), (None, None))(X, W)
    assert x is X
    assert w is W


def test_quantized_weight():
    q = qwix.quantize(W, jnp.int8, channelwise_axes=(1,))
    _, pruned = SparsityModule((4, 8), (None, None), rule())(X, q)
    expected = sparsity.prune_inputs_n_m(qwix.dequantize(q), n=2, m=4)
    np.testing.assert_allclose(qwix.dequantize(pruned), expected)


def test_training_with_gradients():
    class Layer(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(W)
            self.sparsity = SparsityModule((4, 8), (None, None), rule())

        def __call__(self, x):
            x, kernel = self.sparsity(x, self.kernel[...])
            return x @ kernel

    layer = Layer()
    gradient = nnx.grad(lambda layer: layer(X).sum())(layer)["kernel"].get_value()
    np.testing.assert_array_equal(np.asarray(gradient) != 0, layer.sparsity.mask.get_value())


def test_linen_keeps_the_schedule_in_batch_stats():
    """The masks of `SparsityModule`, step by step, and none of `init` or where the collection is not mutable."""
    schedule = rule(weight_sparsity_start_step=1, weight_sparsity_update_step=2)

    class Layer(nn.Module):
        rule: SparsityRule

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", lambda key: W)
            x, kernel = LinenSparsityModule(self.rule, ("x", None), name="sparsity")(x, kernel)
            return x @ kernel

    layer, twin = Layer(schedule), SparsityModule((4, 8), ("x", None), schedule)
    variables = layer.init(jax.random.key(0), X)
    assert variables["batch_stats"]["sparsity"]["mask"].names == ("x", None)
    assert nn.unbox(variables)["batch_stats"]["sparsity"]["mask"].all()
    stats = variables["batch_stats"]
    step = jax.jit(
        lambda params, stats: layer.apply({"params": params, "batch_stats": stats}, X, mutable="batch_stats")
    )
    for i in range(4):
        kernel = W if i < 2 else W[::-1]
        out, updated = step({"kernel": kernel}, stats)
        stats = updated["batch_stats"]
        np.testing.assert_allclose(out, X @ twin(X, kernel)[1])
    assert nn.unbox(stats)["sparsity"]["step"] == 4
    mask = nn.unbox(stats)["sparsity"]["mask"]
    for frozen in (layer, Layer(rule(eval_mode=True))):
        variables = {"params": {"kernel": -W}, "batch_stats": stats}
        np.testing.assert_allclose(frozen.apply(variables, X), X @ (-W * mask))
    gradient = jax.grad(lambda p: layer.apply({"params": p, "batch_stats": stats}, X).sum())({"kernel": W})
    np.testing.assert_array_equal(np.asarray(gradient["kernel"]) != 0, mask)


def test_the_share_of_single_elements_grows():
    """Zhu and Gupta's cubic schedule, of a float and of a quantized weight; activations at once."""
    growing = SparsityRule(
        weight_prune_rate=50, weight_sparsity_start_step=1, weight_prune_end_step=5, activation_prune_rate=25
    )
    module, linen = SparsityModule((4, 8), (None, None), growing), LinenSparsityModule(growing)
    q = qwix.quantize(W, jnp.int8)
    x, _ = module(X, q)
    np.testing.assert_array_equal(x, np.where(np.asarray(X) > np.percentile(X, 25), X, 0))
    variables = linen.init({}, X, W)
    (_, _), variables = linen.apply(variables, X, W, mutable="batch_stats")
    assert module.mask.get_value().all()
    for step in range(1, 7):
        rate = 50 * (1 - (1 - min((step - 1) / 4, 1)) ** 3)
        kept = np.abs(W) > np.percentile(np.abs(W), rate)
        _, pruned = module(X, q)
        np.testing.assert_array_equal(qwix.dequantize(pruned), np.where(kept, qwix.dequantize(q), 0))
        (_, pruned), variables = linen.apply(variables, X, W, mutable="batch_stats")
        np.testing.assert_array_equal(pruned, np.where(kept, W, 0))
    assert kept.sum() == 16


def test_sharded_mask():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        module = SparsityModule((4, 8), ("x", None), rule())
        assert module.mask.get_value().sharding.spec == jax.P("x", None)


def test_errors():
    with pytest.raises(ValueError, match="update_step=0"):
        SparsityModule((4, 8), (None, None), rule(weight_sparsity_update_step=0))
    with pytest.raises(ValueError, match=r"\(3, 8\) in a SparsityModule of shape \(4, 8\)"):
        SparsityModule((4, 8), (None, None), rule())(X, W[:3])
    linen = LinenSparsityModule(rule())
    with pytest.raises(ValueError, match=r"\(3, 8\) where the mask has shape \(4, 8\)"):
        linen.apply(linen.init({}, X, W), X, W[:3])
    with pytest.raises(ValueError, match="update_step=0"):
        LinenSparsityModule(rule(weight_sparsity_update_step=0)).init({}, X, W)
    with pytest.raises(ValueError, match="weight_prune_rate=101"):
        SparsityRule(weight_prune_rate=101)
    with pytest.raises(ValueError, match="not both"):
        rule(weight_prune_rate=50)
