"""Merging, exchanging and mixing adapters: outputs before and after, and weights written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.providers.with_aux import WithAux

NORMAL = nnx.initializers.normal(0.3)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(a, b, rtol=1e-4, atol=1e-4):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


def lora(model, x, seed=1, **rule):
    rule = {"rank": 3, "alpha": 3.0, "lora_b_initializer": NORMAL} | rule
    return qwix.apply_lora_to_model(model, qwix.LoraProvider(**rule), x, rngs=nnx.Rngs(seed))


class Model(nnx.Module):
    """A projection to heads and back, einsum kernels in a list, a transposed table and a convolution."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.head = nnx.Embed(20, 16, rngs=rngs)
        self.split = nnx.LinearGeneral((16,), (4, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((4, 4), (16,), axis=(-2, -1), rngs=rngs)
        self.kernels = nnx.List([nnx.Param(normal(16, 2, 8)), nnx.Param(normal(2, 8, 16))])
        self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.join(self.split(x))
        hidden = jnp.einsum("btd,dnh->btnh", x, self.kernels[0][...])
        x = x + jnp.einsum("btnh,nhd->btd", hidden, self.kernels[1][...])
        return self.head.attend(self.conv(x))


IDS = jnp.array([[1, 5, 9, 3], [0, 2, 2, 19]])


@pytest.mark.parametrize(("weight_qtype", "use_dora"), [(None, False), ("nf4", True)])
def test_merged_model_computes_the_same(weight_qtype, use_dora):
    model = lora(Model(nnx.Rngs(0)), IDS, weight_qtype=weight_qtype, use_dora=use_dora)
    merged = qwix.merge_lora(model)
    close(merged(IDS), model(IDS), atol=2e-3)
    assert type(merged) is Model
    original = nnx.state(Model(nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(merged))) == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(original)
    )
    assert hasattr(model.split, "kernel_lora_a")  # the given model is left alone
    assert set(vars(merged.split)) == set(vars(Model(nnx.Rngs(0)).split))


def test_requantized_model_is_within_the_error_of_the_format():
    model = lora(Model(nnx.Rngs(0)), IDS, weight_qtype="int8")
    merged = qwix.merge_lora(model, requantize=True)
    assert isinstance(merged.split.kernel, WithAux) and not hasattr(merged.split, "kernel_lora_a")
    assert merged.split.kernel.array.qvalue.dtype == jnp.int8
    expected = np.asarray(model(IDS))
    assert np.linalg.norm(merged(IDS) - expected) < 0.02 * np.linalg.norm(expected)
    close(nnx.jit(lambda m, x: m(x))(merged, IDS), merged(IDS))
    float_base = lora(Model(nnx.Rngs(0)), IDS)
    close(qwix.merge_lora(float_base, requantize=True)(IDS), float_base(IDS), atol=2e-3)


def test_merged_stack():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda r: nnx.Linear(8, 8, rngs=r), in_axes=0, out_axes=0)
            self.layers = make(rngs.split(3))

        def __call__(self, x):
            return nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    x = normal(2, 8)
    for weight_qtype, use_dora in ((None, True), ("int8", False)):
        model = lora(Stack(nnx.Rngs(0)), x, weight_qtype=weight_qtype, use_dora=use_dora)
        close(qwix.merge_lora(model)(x), model(x))


def test_a_table_with_an_adapter_for_its_logits_only_is_not_merged():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(20, 16, rngs=nnx.Rngs(0))

        def __call__(self, ids):
            return self.embed.attend(self.embed(ids))

    with pytest.raises(ValueError, match=r"embed/embedding.*table"):
        qwix.merge_lora(lora(Tied(), IDS))


def test_grouped_convolution_is_not_merged():
    x = normal(1, 8, 6)
    model = lora(nnx.Conv(6, 6, (3,), feature_group_count=3, rngs=nnx.Rngs(0)), x)
    with pytest.raises(ValueError, match="several feature groups"):
        qwix.merge_lora(model)
    with pytest.raises(ValueError, match="several feature groups"):
        lora(nnx.Conv(6, 6, (3,), feature_group_count=3, rngs=nnx.Rngs(0)), x, use_dora=True)


@pytest.mark.parametrize("weight_qtype", [None, "int8"])
def test_linen(weight_qtype):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral(12, axis=(-2, -1), name="join")(nn.DenseGeneral((4, 5), name="split")(x))
            init = nn.with_partitioning(nn.initializers.normal(), ("a", "b"))
            return nn.Dense(3, name="dense", kernel_init=init)(x)

    x = normal(2, 12)
    provider = qwix.LoraProvider(rank=2, alpha=6.0, lora_b_initializer=NORMAL, weight_qtype=weight_qtype)
    model = qwix.apply_lora_to_model(Block(), provider)
    variables = model.init(jax.random.key(0), x)
    merged = qwix.merge_lora(model, variables["params"])
    assert merged["dense"]["kernel"].names == ("a", "b")
    assert merged["split"]["kernel"].shape == (12, 4, 5)
    close(Block().apply({"params": merged}, x), model.apply(variables, x))
    if weight_qtype is not None:
        quantized = qwix.merge_lora(model, variables["params"], requantize=True)
        assert quantized["dense"]["kernel"].array.qvalue.names == ("a", "b")
        ptq = qwix.quantize_model(Block(), qwix.PtqProvider([qwix.QuantizationRule(weight_qtype=weight_qtype)]))
        expected = np.asarray(model.apply(variables, x))
        error = np.linalg.norm(ptq.apply({"params": quantized}, x) - expected)
        assert 0 < error < 0.02 * np.linalg.norm(expected)
    alone = qwix.lora_params(variables["params"])
    assert set(alone) == {"join", "split", "dense"} and set(alone["join"]) == {"kernel_lora_a", "kernel_lora_b"}
    with pytest.raises(ValueError, match="needs params"):
        qwix.merge_lora(model)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}, {"use_dora": True}])
def test_linen_adapters_from_weights(fields):
    """They are those of the NNX model with the same weights, for PiSSA and LoftQ up to the last bits of the SVD."""
    x, kernel = normal(4, 32), normal(32, 24, seed=3)
    rule = {"rank": 4, "alpha": 8.0, "weight_qtype": "nf4", "tile_size": 16} | fields
    twin = nnx.Linear(32, 24, use_bias=False, rngs=nnx.Rngs(0))
    twin.kernel[...] = kernel
    twin = qwix.apply_lora_to_model(twin, qwix.LoraProvider(**rule), x, rngs=nnx.Rngs(0))
    model = qwix.apply_lora_to_model(nn.Dense(24, use_bias=False), qwix.LoraProvider(**rule))
    with pytest.raises(ValueError, match="init_lora_params"):
        model.init(jax.random.key(0), x)
    params = qwix.init_lora_params(model, {"kernel": kernel}, jax.random.key(0), x)
    close(model.apply({"params": params}, x), twin(x), atol=1e-3)
    close(nn.Dense(24, use_bias=False).apply({"params": qwix.merge_lora(model, params)}, x), twin(x), atol=1e-3)
    if "use_dora" in fields:
        close(params["kernel_lora_m"], np.linalg.norm(np.asarray(jnp.asarray(twin.kernel)), axis=0))
        params["kernel_lora_m"] = 2 * params["kernel_lora_m"]
        close(model.apply({"params": params}, x), 2 * twin(x), atol=1e-3)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return x + nn.tanh(nn.Dense(16, use_bias=False, kernel_init=init, name="dense")(x)), None


class LinenNet(nn.Module):
    """Layers under nn.scan with partitioned kernels, a convolution, and a projection to heads."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            LinenLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(name="layers")(x, None)
        return nn.DenseGeneral((2, 4), name="split")(nn.Conv(16, (3,), name="conv")(x))


# Sums of A and B in each weight of `LinenNet`, in NumPy.
PRODUCTS = {
    ("layers", "dense", "kernel"): "lir,lro->lio",
    ("conv", "kernel"): "wir,ro->wio",
    ("split", "kernel"): "ir,ro->io",
}


def linen_net(rule):
    """A model with adapters that has run, its float twin's parameters, and an input."""
    x = normal(2, 6, 16)
    params = LinenNet().init(jax.random.key(0), x)["params"]
    model = qwix.apply_lora_to_model(LinenNet(), qwix.LoraProvider(**rule))
    return model, params, x


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq", "weight_qtype": "nf4"},
        {"use_dora": True, "weight_qtype": "nf4"},
    ],
    ids=["pissa", "loftq", "dora"],
)
def test_linen_adapters_from_the_weights_of_stacks_and_convolutions(fields):
    """PiSSA and DoRA leave the model as it was, LoftQ brings the quantized one nearer to it; boxes keep their names."""
    model, params, x = linen_net({"rank": 4, "alpha": 8.0} | fields)
    expected = LinenNet().apply({"params": params}, x)
    adapted = qwix.init_lora_params(model, params, jax.random.key(1), x)
    dense = adapted["layers"]["dense"]
    assert dense["kernel_lora_a"].names == ("layers", "in", None) and dense["kernel_lora_a"].value.shape == (3, 16, 4)
    assert dense["kernel_lora_b"].names == ("layers", None, "out")
    out = model.apply({"params": adapted}, x)
    merged = qwix.merge_lora(model, adapted)
    assert merged["layers"]["dense"]["kernel"].names == ("layers", "in", "out")
    close(LinenNet().apply({"params": merged}, x), out, atol=1e-3)
    if "weight_qtype" in fields:
        ptq = qwix.quantize_model(LinenNet(), qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="nf4")]))
        abstract = jax.eval_shape(ptq.init, jax.random.key(0), x)["params"]
        base = ptq.apply({"params": qwix.quantize_params(nn.unbox(params), abstract)}, x)
    if "use_dora" in fields:
        assert dense["kernel_lora_m"].names == ("layers", "out")
        close(out, base, atol=1e-3)
    elif "weight_qtype" in fields:
        assert np.linalg.norm(out - expected) < 0.9 * np.linalg.norm(base - expected)
    else:
        close(out, expected, atol=1e-3)


def test_linen_adapters_by_name():
    model, _, x = linen_net({"rank": 3, "alpha": 6.0, "lora_b_initializer": NORMAL})
    params, french = (model.init(jax.random.key(seed), x)["params"] for seed in (1, 2))
    wide = qwix.apply_lora_to_model(LinenNet(), qwix.LoraProvider(rank=2, alpha=4.0, lora_b_initializer=NORMAL))
    code = {"conv": qwix.lora_params(wide.init(jax.random.key(3), x)["params"])["conv"]}  # of one layer only
    adapters = {"french": qwix.lora_params(french), "code": code}
    trees = {"": nn.unbox(params)} | nn.unbox(adapters)

    def expected(shares):
        weights = nn.unbox(params)
        for path, product in PRODUCTS.items():
            *keys, name = path
            holder = weights
            for key in keys:
                holder = holder[key]
            for adapter, share in shares.items():
                tree = trees[adapter]
                for key in keys:
                    tree = tree.get(key, {})
                if tree:
                    change = np.einsum(product, tree[f"{name}_lora_a"], tree[f"{name}_lora_b"])
                    holder[name] = holder[name] + 2.0 * share * change.reshape(holder[name].shape)
        return LinenNet().apply({"params": weights}, x)

    traces = []

    @jax.jit
    def run(params):
        traces.append(params)
        return model.apply({"params": params}, x)

    for active, shares in (
        ("french", {"french": 1.0}),
        (None, {}),
        ("", {"": 1.0}),
        ({"": 0.25, "french": 0.5, "code": -1.0}, {"": 0.25, "french": 0.5, "code": -1.0}),
    ):
        chosen = qwix.set_adapter(model, active, params, adapters)
        close(run(chosen), expected(shares))
    close(LinenNet().apply({"params": qwix.merge_lora(model, chosen)}, x), expected(shares))
    assert chosen["layers"]["dense"]["kernel_lora_a"].names == ("layers", "in", None)
    assert len(traces) == 2  # one choice of one adapter is as any other


def test_linen_adapters_that_do_not_fit():
    model, params, x = linen_net({"rank": 3, "alpha": 6.0, "use_dora": True})
    params = qwix.init_lora_params(model, params, jax.random.key(1), x)
    other = qwix.lora_params(jax.tree.map(lambda leaf: 2 * leaf, params))
    chosen = qwix.set_adapter(model, "other", params, {"other": other})
    close(chosen["conv"]["kernel_lora_m"], other["conv"]["kernel_lora_m"])
    base = qwix.set_adapter(model, None, params | {"conv": params["conv"] | other["conv"]})
    close(model.apply({"params": base}, x), model.apply({"params": params}, x), atol=1e-3)
    with pytest.raises(ValueError, match="acts alone"):
        qwix.set_adapter(model, {"": 0.5, "other": 0.5}, params, {"other": other})
    with pytest.raises(ValueError, match="no adapter 'german'; there are"):
        qwix.set_adapter(model, "german", params)
    with pytest.raises(ValueError, match="has up/kernel_lora_a, and the model's params have not"):
        qwix.set_adapter(model, "x", params, {"x": {"up": {"kernel_lora_a": jnp.ones((1, 1))}}})
    with pytest.raises(ValueError, match="do not fit"):
        bad = {"conv": {"kernel_lora_a": jnp.ones((3, 16, 2)), "kernel_lora_b": jnp.ones((3, 16))}}
        qwix.set_adapter(model, "x", params, {"x": bad})
    with pytest.raises(ValueError, match="needs params"):
        qwix.set_adapter(model, None)
    with pytest.raises(ValueError, match="has not run yet"):
        qwix.set_adapter(qwix.apply_lora_to_model(LinenNet(), qwix.LoraProvider(rank=3, alpha=6.0)), None, params)
    with pytest.raises(ValueError, match="use add_adapter"):
        qwix.set_adapter(lora(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), normal(2, 8)), None, params)


def test_adapters_are_taken_out_and_put_in():
    x = normal(2, 8)
    linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    first, second = lora(linear, x, seed=1), lora(linear, x, seed=2)
    params = qwix.lora_params(first)
    assert {path for path, _ in nnx.to_flat_state(params)} == {("kernel_lora_a",), ("kernel_lora_b",)}
    nnx.update(second, params)
    close(second(x), first(x))


def test_adapters_through_orbax(tmp_path):
    """Saved alone, and restored into another model of the same base."""
    x = normal(2, 8)
    linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    first, second = (lora(linear, x, seed=seed, weight_qtype="nf4", use_dora=True) for seed in (1, 2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapter", qwix.lora_params(first))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "adapter", qwix.lora_params(second))
    assert len(nnx.to_flat_state(restored)) == 3
    nnx.update(second, restored)
    close(second(x), first(x))


def test_named_adapters_are_exchanged_and_mixed():
    x = normal(2, 8)
    linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    model, other = lora(linear, x, seed=1), lora(linear, x, seed=2, rank=2, alpha=4.0)
    base, default, named = (np.asarray(m(x)) for m in (linear, model, other))
    qwix.add_adapter(model, "other", qwix.lora_params(other), alpha=4.0)
    close(model(x), default)  # until it is chosen
    run = nnx.jit(lambda m, x: m(x))
    for active, expected in (
        ("other", named),
        (None, base),
        ({"": 0.25, "other": 0.5}, base + 0.25 * (default - base) + 0.5 * (named - base)),
        ("", default),
    ):
        qwix.set_adapter(model, active)
        close(run(model, x), expected)
        close(qwix.merge_lora(model)(x), expected)
    close(jax.tree.leaves(qwix.lora_params(model, "other"))[0], other.kernel_lora_a[...])
    grads = nnx.grad(lambda m: m(x).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert not np.any(grads["kernel_lora_b_other"][...])  # it does not act
    qwix.add_adapter(model, "fresh", rngs=nnx.Rngs(3))
    qwix.set_adapter(model, "fresh")
    close(model(x), base)


def test_adapters_that_do_not_fit():
    x = normal(2, 8)
    linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    model = lora(linear, x, use_dora=True)
    a, b = jnp.ones((8, 2)), jnp.ones((2, 4))
    for match, params in {
        "only": {"kernel_lora_a": a},
        "do not fit": {"kernel_lora_a": a, "kernel_lora_b": jnp.ones((2, 5))},
        "no adapter there": {"kernel_lora_a": a, "kernel_lora_b": b, "down": {"kernel_lora_a": a}},
    }.items():
        with pytest.raises(ValueError, match=match):
            qwix.add_adapter(model, "x", params)
    with pytest.raises(ValueError, match="letters"):
        qwix.add_adapter(model, "a/b", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="give the adapter's params"):
        qwix.add_adapter(model, "x")
    qwix.add_adapter(model, "x", {"kernel_lora_a": a, "kernel_lora_b": b})
    with pytest.raises(ValueError, match="acts alone"):
        qwix.set_adapter(model, {"": 0.5, "x": 0.5})
    with pytest.raises(ValueError, match="no adapter 'y'"):
        qwix.set_adapter(model, "y")
    with pytest.raises(ValueError, match="no adapter 'y'"):
        qwix.lora_params(model, "y")
