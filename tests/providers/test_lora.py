"""Adapters on whole layers and models, against the formulas written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src.core import qarray
from qwix._src.providers.with_aux import WithAux

NORMAL = nnx.initializers.normal(1.0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def f64(x):
    return np.asarray(x, np.float64)


def close(a, b, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(f64(a), f64(b), rtol=rtol, atol=atol)


def lora(model, x, seed=1, rules=None, **rule):
    """A model with adapters that change its output."""
    if rules is None:
        rules = [qwix.LoraRule(**({"rank": 3, "alpha": 6.0, "lora_b_initializer": NORMAL} | rule))]
    return qwix.apply_lora_to_model(model, qwix.LoraProvider(rules), x, rngs=nnx.Rngs(seed))


class Op(nnx.Module):
    """One op with one weight."""

    def __init__(self, function, *shape):
        self.function = function
        self.w = nnx.Param(normal(*shape, seed=7))

    def __call__(self, x):
        return self.function(x, self.w[...])


def dot_general(contracting, batch=((), ()), weight=1):
    numbers = (contracting, batch)
    if weight == 1:
        return lambda x, w: jax.lax.dot_general(x, w, numbers)
    return lambda x, w: jax.lax.dot_general(w, x, numbers)


# The shapes are those that checkpoints of the original have.
DOT_GENERALS = {
    "dense": (((2,), (0,)), ((), ()), (2, 6, 12), (12, 5), (12, 3), (3, 5), "btd,dr,rf->btf"),
    "transposed": (((1,), (1,)), ((), ()), (2, 12), (5, 12), (12, 3), (3, 5), "bd,dr,rf->bf"),
    "batched": (((2,), (1,)), ((0,), (0,)), (3, 6, 12), (3, 12, 5), (3, 12, 3), (3, 3, 5), "ebd,edr,erf->ebf"),
    "flat in": (((1, 2), (0, 1)), ((), ()), (2, 4, 5), (4, 5, 12), (20, 3), (3, 12), "bnh,nhr,rf->bf"),
    "flat out": (((1,), (0,)), ((), ()), (2, 12), (12, 4, 5), (12, 3), (3, 20), "bd,dr,rnh->bnh"),
}


@pytest.mark.parametrize("case", DOT_GENERALS)
@pytest.mark.parametrize("weight_qtype", [None, jnp.int8])
def test_dot_general(case, weight_qtype):
    contracting, batch, x_shape, w_shape, a_shape, b_shape, formula = DOT_GENERALS[case]
    x, op = normal(*x_shape), dot_general(contracting, batch)
    model = lora(Op(op, *w_shape), x, weight_qtype=weight_qtype)
    a, b = model.w_lora_a, model.w_lora_b
    assert type(a) is type(b) is nnx.LoRAParam
    assert (a.shape, b.shape, a.dtype, b.dtype) == (a_shape, b_shape, jnp.float32, jnp.float32)
    assert isinstance(model.w, WithAux) == (weight_qtype is not None)
    w = jnp.asarray(model.w) if weight_qtype is not None else model.w[...]
    labels = formula.partition("->")[0].split(",")
    sizes = dict(zip(labels[0], x_shape, strict=True))
    sizes |= {"r": 3} | dict(
        zip(labels[2][::-1], (w_shape[0],) if case == "transposed" else w_shape[::-1], strict=False)
    )
    sizes["r"] = 3
    a, b = (f64(v[...]).reshape([sizes[c] for c in s]) for v, s in ((a, labels[1]), (b, labels[2])))
    expected = f64(op(x, w)) + 2.0 * np.einsum(formula, f64(x), a, b)
    close(model(x), expected, atol=1e-4)
    if case == "dense":
        close(nnx.jit(lambda m, x: m(x))(model, x), expected, atol=1e-4)


EINSUMS = {
    "BTD,DNH->BTNH": ((2, 6, 12), (12, 4, 5), (12, 3), (3, 4, 5)),
    "BTNH,NHD->BTD": ((2, 6, 4, 5), (4, 5, 12), (4, 5, 3), (3, 12)),
    "BSD,CKDH->CBSKH": ((2, 6, 12), (2, 4, 12, 5), (12, 3), (3, 2, 4, 5)),
    "ebd,edf->ebf": ((3, 6, 12), (3, 12, 8), (3, 12, 3), (3, 8)),
    "btd,edf->btef": ((2, 6, 12), (3, 12, 8), (12, 3), (3, 3, 8)),
    "bte,ve->btv": ((2, 6, 12), (20, 12), (12, 3), (3, 20)),
    "BTD,D->BT": ((2, 6, 12), (12,), (12, 3), (3,)),
    "...D,DF->...F": ((2, 6, 12), (12, 8), (12, 3), (3, 8)),
}


@pytest.mark.parametrize("einsum", EINSUMS)
def test_einsum(einsum):
    x_shape, w_shape, a_shape, b_shape = EINSUMS[einsum]
    x = normal(*x_shape)
    model = lora(Op(lambda x, w: jnp.einsum(einsum, x, w), *w_shape), x)
    a, b = model.w_lora_a[...], model.w_lora_b[...]
    assert (a.shape, b.shape) == (a_shape, b_shape)
    inputs, _, out = einsum.partition("->")
    x_labels, w_labels = inputs.split(",")
    shared = "".join(c for c in w_labels if c in x_labels)
    rest = "".join(c for c in w_labels if c not in x_labels)
    update = np.einsum(f"{x_labels},{shared}z,z{rest}->{out}", f64(x), f64(a), f64(b))
    close(model(x), np.einsum(einsum, f64(x), f64(model.w[...])) + 2.0 * update, atol=1e-4)
    assert jax.tree.all(jax.tree.map(lambda y: y.shape == model(x).shape, model(x)))


def test_einsum_of_three_and_a_weight_at_the_left():
    x, y = normal(2, 6, 12), normal(2, 6)
    model = lora(Op(lambda x, w: jnp.einsum("btd,df,bt->btf", x, w, y), 12, 8), x)
    w = f64(model.w[...]) + 2.0 * f64(model.w_lora_a[...]) @ f64(model.w_lora_b[...])
    close(model(x), np.einsum("btd,df,bt->btf", f64(x), w, f64(y)), atol=1e-4)
    x = normal(12, 7)
    model = lora(Op(dot_general(((1,), (0,)), weight=0), 5, 12), x)
    w = f64(model.w[...]) + 2.0 * (f64(model.w_lora_a[...]) @ f64(model.w_lora_b[...])).T
    close(model(x), w @ f64(x), atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_conv(groups):
    x = normal(2, 8, 8, 6)
    conv = nnx.Conv(6, 9, (3, 3), strides=2, feature_group_count=groups, rngs=nnx.Rngs(0))
    model = lora(conv, x)
    a, b = model.kernel_lora_a[...], model.kernel_lora_b[...]
    assert (a.shape, b.shape) == ((3, 3, 6 // groups, 3), (3, 9))
    hidden = jax.lax.conv_general_dilated(
        x, a, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    close(model(x), f64(conv(x)) + 2.0 * f64(hidden) @ f64(b), atol=1e-4)


def test_embeddings_are_adapted_where_a_rule_names_take():
    ids = jnp.array([[1, 3], [0, 1]])
    embed = nnx.Embed(10, 8, rngs=nnx.Rngs(0))
    plain = lora(embed, ids)
    assert not hasattr(plain, "embedding_lora_a")
    model = lora(embed, ids, op_names=("take",))
    table = f64(embed.embedding[...]) + 2.0 * f64(model.embedding_lora_a[...]) @ f64(model.embedding_lora_b[...])
    assert model.embedding_lora_a.shape == (10, 3)
    close(model(ids), table[np.asarray(ids)])


class Block(nn.Module):
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 5), name="split")(x)
        x = nn.DenseGeneral(12, axis=(-2, -1), name="join")(x)
        x = nn.Einsum((12, 7), "bd,de->be", name="einsum")(x)
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(3, name="dense", kernel_init=kernel_init)(x)


@pytest.mark.parametrize("weight_qtype", [None, "nf4"])
def test_linen(weight_qtype):
    x = normal(2, 12)
    provider = qwix.LoraProvider(rank=2, alpha=6.0, weight_qtype=weight_qtype, lora_b_initializer=NORMAL)
    model = qwix.apply_lora_to_model(Block(), provider)
    variables = model.init(jax.random.key(0), x)
    assert set(variables) == {"params"}
    p = variables["params"]
    assert p["dense"]["kernel_lora_a"].names == ("in", None)
    assert p["dense"]["kernel_lora_b"].names == (None, "out")
    p = nn.unbox(p)
    shapes = {name: (p[name]["kernel_lora_a"].shape, p[name]["kernel_lora_b"].shape) for name in p}
    assert shapes == {
        "split": ((12, 2), (2, 20)),
        "join": ((20, 2), (2, 12)),
        "einsum": ((12, 2), (2, 7)),
        "dense": ((7, 2), (2, 3)),
    }
    y = f64(x)
    for name in ("split", "join", "einsum", "dense"):
        kernel = p[name]["kernel"]
        kernel = qarray.dequantize(kernel.array) if weight_qtype else kernel
        delta = 3.0 * f64(p[name]["kernel_lora_a"]) @ f64(p[name]["kernel_lora_b"])
        y = y @ (f64(kernel).reshape(delta.shape) + delta) + f64(p[name].get("bias", np.zeros(1))).reshape(-1)
    close(model.apply(variables, x), y, rtol=1e-4, atol=1e-4)


def test_linen_convolutions_and_embeddings():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Conv(4, (3,), name="conv")(nn.Embed(10, 8, name="embed")(ids))

    ids = jnp.array([[1, 3, 7, 1]])
    rule = qwix.LoraRule(
        rank=2, alpha=4.0, op_names=("take", "conv_general_dilated"), lora_b_initializer=NORMAL, weight_qtype="int8"
    )
    model = qwix.apply_lora_to_model(Model(), qwix.LoraProvider([rule]))
    params = model.init(jax.random.key(0), ids)["params"]
    assert params["embed"]["embedding_lora_a"].shape == (10, 2)
    assert params["conv"]["kernel_lora_a"].shape == (3, 8, 2)
    merged = qwix.merge_lora(model, params)
    close(model.apply({"params": params}, ids), Model().apply({"params": merged}, ids), atol=1e-4)


def test_adapters_of_a_model_that_is_quantized_already():
    """QLoRA from a quantized checkpoint: the stored elements stay, and only adapters are trained."""
    x = normal(2, 16)
    rule = qwix.QuantizationRule(weight_qtype="nf4", tile_size=8)
    base = qwix.quantize_model(MLP(nnx.Rngs(0)), qwix.PtqProvider([rule]), x)
    model = lora(base, x)
    np.testing.assert_array_equal(model.up.kernel.array.qvalue[...], base.up.kernel.array.qvalue[...])
    w = {name: f64(jnp.asarray(getattr(model, name).kernel)) for name in ("up", "down")}
    for name, dequantized in w.items():
        layer = getattr(model, name)
        w[name] = dequantized + 2.0 * f64(layer.kernel_lora_a[...]) @ f64(layer.kernel_lora_b[...])
    expected = f64(x) + np.maximum(f64(x) @ w["up"], 0) @ w["down"]
    close(model(x), expected, atol=1e-3)
    close(qwix.merge_lora(model)(x), expected, atol=1e-3)
    grads = nnx.grad(lambda m, x: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
    assert len(jax.tree.leaves(grads)) == 4 and all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="no float weight to start from"):
        lora(base, x, init_lora_weights="pissa")
    # Activations stay quantized by the rules that they were quantized by, wherever there are adapters.
    static = qwix.QuantizationRule(module_path="up", weight_qtype="int8", act_qtype="int8", act_static_scale=True)
    base = qwix.quantize_model(MLP(nnx.Rngs(0)), qwix.PtqProvider([static]), x)
    same = lora(base, x, lora_b_initializer=nnx.initializers.zeros, module_path="up|down")
    assert hasattr(same.up, "dot_general0_lhs_scale") and not isinstance(same.down.kernel, WithAux)
    close(same(3 * x), base(3 * x))

    dense = nn.Dense(4, use_bias=False)
    quantized = qwix.quantize_model(dense, qwix.PtqProvider([rule]))
    float_params = dense.init(jax.random.key(0), x)["params"]
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    checkpoint = qwix.quantize_params(float_params, abstract)
    adapted = qwix.apply_lora_to_model(quantized, qwix.LoraProvider(rank=3, alpha=6.0, lora_b_initializer=NORMAL))
    params = adapted.init(jax.random.key(1), x)["params"] | checkpoint
    w = f64(qarray.dequantize(checkpoint["kernel"].array))
    w = w + 2.0 * f64(params["kernel_lora_a"]) @ f64(params["kernel_lora_b"])
    close(adapted.apply({"params": params}, x), f64(x) @ w, atol=1e-3)
    close(dense.apply({"params": qwix.merge_lora(adapted, params)}, x), f64(x) @ w, atol=1e-3)


def test_dropout_of_linen_draws_from_its_own_stream():
    x = jnp.ones((2, 12))
    model = qwix.apply_lora_to_model(nn.Dense(3), qwix.LoraProvider(rank=2, alpha=2.0, dropout=0.5))
    variables = model.init(jax.random.key(0), x)
    model.apply(variables, x, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(Exception, match="dropout"):
        model.apply(variables, x)


def test_dropout_of_nnx():
    x = jnp.ones((2, 12))
    linear = nnx.Linear(12, 4, rngs=nnx.Rngs(0))
    model = lora(linear, x, dropout=0.5)
    assert not np.array_equal(model(x), model(x))  # another key each time
    model.set_attributes(qwix_rngs=nnx.Rngs(dropout=3))
    mask = jax.random.bernoulli(nnx.Rngs(dropout=3).dropout(), 0.5, x.shape)
    ab = f64(model.kernel_lora_a[...]) @ f64(model.kernel_lora_b[...])
    close(model(x), f64(linear(x)) + 2.0 * (f64(x) * np.asarray(mask) / 0.5) @ ab, atol=1e-4)
    model.eval()
    close(model(x), f64(linear(x)) + 2.0 * f64(x) @ ab, atol=1e-4)


# --- variants -------------------------------------------------------------------------------------


def test_rank_stabilized():
    x, linear = normal(2, 12), nnx.Linear(12, 4, rngs=nnx.Rngs(0))
    model = lora(linear, x, rank=4, use_rslora=True)
    ab = f64(model.kernel_lora_a[...]) @ f64(model.kernel_lora_b[...])
    close(model(x), f64(linear(x)) + 6.0 / 2.0 * f64(x) @ ab, atol=1e-4)


@pytest.mark.parametrize("weight_qtype", [None, "nf4"])
def test_dora(weight_qtype):
    x, linear = normal(2, 12), nnx.Linear(12, 4, rngs=nnx.Rngs(0))
    start = lora(linear, x, use_dora=True, weight_qtype=weight_qtype, lora_b_initializer=nnx.initializers.zeros)
    base = jnp.asarray(start.kernel) if weight_qtype else start.kernel[...]
    close(start(x), f64(x) @ f64(base), atol=1e-4)  # equation 5 starts at the base
    model = lora(linear, x, use_dora=True, weight_qtype=weight_qtype)
    model.kernel_lora_m[...] *= jnp.array([1.0, 2.0, 3.0, 4.0])
    moved = f64(base) + 2.0 * f64(model.kernel_lora_a[...]) @ f64(model.kernel_lora_b[...])
    expected = f64(x) @ (f64(model.kernel_lora_m[...]) * moved / np.linalg.norm(moved, axis=0))
    close(model(x), expected, atol=1e-3)
    assert model.kernel_lora_m.shape == (4,)


def test_pissa_keeps_the_model_and_puts_the_principal_part_into_the_adapter():
    x, linear = normal(2, 12), nnx.Linear(12, 8, rngs=nnx.Rngs(0))
    model = lora(linear, x, init_lora_weights="pissa")
    close(model(x), linear(x), atol=1e-4)
    u, s, v = np.linalg.svd(f64(linear.kernel[...]))
    close(2.0 * f64(model.kernel_lora_a[...]) @ f64(model.kernel_lora_b[...]), (u[:, :3] * s[:3]) @ v[:3], atol=1e-4)
    close(np.linalg.svd(f64(model.kernel[...]))[1][:5], s[3:], atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "loftq", "loftq,1"])
def test_initialization_from_the_residue_is_nearer_than_the_quantized_model(method):
    x, linear = normal(16, 64), nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    model = lora(linear, x, rank=8, weight_qtype="nf4", init_lora_weights=method)
    plain = qwix.quantize_model(linear, qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="nf4")]), x)
    error = lambda m: np.linalg.norm(f64(m(x)) - f64(linear(x)))  # noqa: E731
    assert error(model) < 0.9 * error(plain)


def test_initialization_from_a_gemma_projection():
    x = normal(2, 6, 12)
    op = Op(lambda x, w: jnp.einsum("BSD,CKDH->CBSKH", x, w), 2, 4, 12, 5)
    model = lora(op, x, rank=12, init_lora_weights="pissa")
    close(model(x), op(x), atol=1e-4)
    close(model.w[...], np.zeros((2, 4, 12, 5)), atol=1e-5)  # the rank is full


def test_rules_that_contradict_themselves():
    for match, rule in {
        "positive integer": {"rank": 0},
        "dropout": {"dropout": 1.0},
        "weight_qtype": {"init_lora_weights": "loftq"},
        "none of": {"init_lora_weights": "olora"},
    }.items():
        with pytest.raises(ValueError, match=match):
            qwix.LoraProvider(**({"rank": 2, "alpha": 1.0} | rule))
    with pytest.raises(ValueError, match="not both"):
        qwix.LoraProvider([], rank=2)


# --- models ---------------------------------------------------------------------------------------


class MLP(nnx.Module):
    def __init__(self, rngs, width=16):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Stack(nnx.Module):
    """Layers stacked along a leading axis."""

    def __init__(self, rngs, wrap=lambda f: f):
        self.wrap = wrap
        self.layers = nnx.vmap(lambda rngs: MLP(rngs), in_axes=0, out_axes=0)(rngs.split(3))

    def __call__(self, x):
        step = self.wrap(lambda x, layer: layer(x))
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@pytest.mark.parametrize(
    ("weight_qtype", "wrap"), [(None, lambda f: f), ("int4", nnx.remat)], ids=["scan", "quantized, scan of remat"]
)
def test_stacked_layers(weight_qtype, wrap):
    x, stack = normal(4, 16), Stack(nnx.Rngs(0), wrap)
    model = lora(stack, x, weight_qtype=weight_qtype, dropout=0.25)
    a, b = model.layers.up.kernel_lora_a[...], model.layers.up.kernel_lora_b[...]
    assert (a.shape, b.shape) == ((3, 16, 3), (3, 3, 32))
    assert not np.array_equal(a[0], a[1])
    model.eval()
    y = f64(x)
    weights = {}
    for name in ("up", "down"):
        layer = getattr(model.layers, name)
        w = jnp.asarray(layer.kernel) if weight_qtype else layer.kernel[...]
        weights[name] = f64(w) + 2.0 * f64(layer.kernel_lora_a[...]) @ f64(layer.kernel_lora_b[...])
    for i in range(3):
        y = y + np.maximum(y @ weights["up"][i], 0) @ weights["down"][i]
    close(model(x), y, rtol=1e-3, atol=1e-3)
    model.train()
    grads = nnx.grad(lambda m, x: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_nnx_vmap_over_members():
    @nnx.vmap(in_axes=(0, None), out_axes=0)
    def members(layer, x):
        return layer(x)

    class Ensemble(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(16, 4, rngs=rngs), in_axes=0, out_axes=0)(rngs.split(3))

        def __call__(self, x):
            return members(self.layers, x)

    x, model = normal(2, 16), Ensemble(nnx.Rngs(0))
    adapted = lora(model, x)
    ab = f64(adapted.layers.kernel_lora_a[...]) @ f64(adapted.layers.kernel_lora_b[...])
    close(adapted(x), f64(x) @ (f64(model.layers.kernel[...]) + 2.0 * ab), atol=1e-4)


def test_qlora_trains_adapters_only():
    x, y = normal(32, 16), normal(32, 16, seed=1)
    model = lora(MLP(nnx.Rngs(0)), x, weight_qtype="nf4", tile_size=8, lora_b_initializer=nnx.initializers.zeros)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    shapes = {leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState))}
    assert shapes <= {(), (16, 3), (3, 32), (32, 3), (3, 16)}

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))(
            model
        )
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, x, y)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for name in ("up", "down"):
        jax.tree.map(np.testing.assert_array_equal, before[name]["kernel"], after[name]["kernel"])
        assert np.abs(after[name]["kernel_lora_b"]).max() > 0


def test_gradients_are_those_of_the_float_formula():
    x = normal(5, 16)
    model = lora(nnx.Linear(16, 4, use_bias=False, rngs=nnx.Rngs(0)), x, weight_qtype="nf4")
    grads = nnx.grad(lambda m, x: (m(x) ** 2).sum() / 2, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
    a, b, w = f64(model.kernel_lora_a[...]), f64(model.kernel_lora_b[...]), f64(jnp.asarray(model.kernel))
    y = f64(x) @ (w + 2.0 * a @ b)
    close(grads["kernel_lora_a"][...], 2.0 * f64(x).T @ y @ b.T, rtol=1e-3, atol=1e-3)
    close(grads["kernel_lora_b"][...], 2.0 * (f64(x) @ a).T @ y, rtol=1e-3, atol=1e-3)
    dx = jax.grad(lambda x: (model(x) ** 2).sum() / 2)(x)
    close(dx, y @ (w + 2.0 * a @ b).T, rtol=1e-3, atol=1e-3)


def test_no_float_copy_of_a_weight_waits_for_the_backward_pass():
    x = normal(2, 32)
    model = lora(MLP(nnx.Rngs(0), width=32), x, weight_qtype="nf4", tile_size=16)
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapters, x):
        return (nnx.merge(graphdef, adapters, rest)(x) ** 2).mean()

    _, pullback = jax.vjp(loss, adapters, x)
    residuals = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")]
    weights = {(32, 64), (64, 32), (2, 16, 64), (4, 16, 32)}
    found = {leaf.dtype for leaf in residuals if leaf.shape in weights}
    assert found == {jnp.dtype("uint4")}


def test_shardings_follow_the_weight():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tp"))
    with jax.set_mesh(mesh):
        linear = nnx.Linear(16, 32, kernel_init=init, rngs=nnx.Rngs(0))
        model = lora(linear, jnp.ones((2, 16)), weight_qtype="int8")
        assert model.kernel_lora_a.out_sharding == ("fsdp", None)
        assert model.kernel_lora_b.out_sharding == (None, "tp")
        assert model.kernel_lora_a[...].sharding.spec == jax.P("fsdp", None)
        assert model.kernel_lora_b[...].sharding.spec == jax.P(None, "tp")
        close(nnx.jit(lambda m, x: m(x))(model, jnp.ones((2, 16))), model(jnp.ones((2, 16))))


def test_explicit_mesh_hands_the_sharding_to_initializers():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    seen = []

    def spy(key, shape, dtype=None, out_sharding=None):
        seen.append(out_sharding.spec)
        return jax.random.normal(key, shape, dtype, out_sharding=out_sharding)

    with jax.set_mesh(mesh):
        op = Op(lambda x, w: jnp.einsum("bd,df->bf", x, w, out_sharding=jax.P(None, "tp")), 16, 32)
        op.w = nnx.Param(jax.device_put(op.w[...], jax.NamedSharding(mesh, jax.P("fsdp", "tp"))))
        x = jax.device_put(normal(2, 16), jax.NamedSharding(mesh, jax.P()))
        model = lora(op, x, lora_a_initializer=spy, lora_b_initializer=spy)
        assert seen == [jax.P("fsdp", None), jax.P(None, "tp")]
        ab = f64(model.w_lora_a[...]) @ f64(model.w_lora_b[...])
        close(model(x), f64(x) @ (f64(model.w[...]) + 2.0 * ab), atol=1e-4)


def test_a_weight_used_twice_has_one_adapter_and_one_in_another_way_a_warning():
    x = normal(2, 12)
    model = lora(Op(lambda x, w: (x @ w) @ w, 12, 12), x)
    w = f64(model.w[...]) + 2.0 * f64(model.w_lora_a[...]) @ f64(model.w_lora_b[...])
    close(model(x), f64(x) @ w @ w, atol=1e-3)
    with pytest.warns(qwix.QuantizationWarning, match="w gets no adapter"):
        model = lora(Op(lambda x, w: (x @ w) @ w.T, 12, 14), x)
    assert model(x).shape == (2, 12)
    with pytest.warns(qwix.QuantizationWarning, match="part of the parameter"):
        lora(Op(lambda x, w: x @ w[0], 2, 12, 12), x)


@pytest.mark.parametrize("weight_qtype", [None, "int8"])
def test_a_weight_in_another_layout(weight_qtype):
    x = normal(2, 12)
    model = lora(Op(lambda x, w: x @ w.reshape(12, 20).astype(jnp.float32), 12, 4, 5), x, weight_qtype=weight_qtype)
    w = jnp.asarray(model.w).reshape(12, 20) if weight_qtype else model.w[...].reshape(12, 20)
    close(model(x), f64(x) @ (f64(w) + 2.0 * f64(model.w_lora_a[...]) @ f64(model.w_lora_b[...])), atol=1e-4)
    model = lora(Op(lambda x, w: x @ w.T, 20, 12), x, weight_qtype=weight_qtype)
    w = jnp.asarray(model.w).T if weight_qtype else model.w[...].T
    close(model(x), f64(x) @ (f64(w) + 2.0 * f64(model.w_lora_a[...]) @ f64(model.w_lora_b[...])), atol=1e-4)


def test_a_second_adapter_of_one_weight_is_an_error():
    x = normal(2, 16)
    model = lora(MLP(nnx.Rngs(0)), x, module_path="up")
    with pytest.raises(ValueError, match="has adapters already"):
        lora(model, x)
    assert hasattr(lora(model, x, module_path="down").down, "kernel_lora_a")


def test_a_plain_rule_only_quantizes():
    x = normal(2, 16)
    rules = [
        qwix.LoraRule(module_path="up", rank=2, alpha=1.0),
        qwix.QuantizationRule(weight_qtype="int8"),
    ]
    model = lora(MLP(nnx.Rngs(0)), x, rules=rules)
    assert isinstance(model.up.kernel, nnx.Param) and model.up.kernel_lora_a.shape == (16, 2)
    assert isinstance(model.down.kernel, WithAux) and not hasattr(model.down, "kernel_lora_a")


def test_state_survives():
    x = normal(2, 16)
    model = lora(MLP(nnx.Rngs(0)), x, weight_qtype="nf4", dropout=0.5)
    model.eval()
    expected = model(x)
    for other in (nnx.clone(model), nnx.merge(*nnx.split(model))):
        close(other(x), expected)
    assert {p[-1] for p, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))} == {"kernel_lora_a", "kernel_lora_b"}
    abstract = nnx.eval_shape(lambda: lora(MLP(nnx.Rngs(0)), x, weight_qtype="nf4"))
    assert abstract.up.kernel_lora_a.shape == (16, 3)


def test_rngs_are_wanted():
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="rngs"):
        model = qwix.apply_lora_to_model(linear, qwix.LoraProvider(rank=2, alpha=1.0), jnp.ones((1, 4)))
    close(model(jnp.ones((1, 4))), linear(jnp.ones((1, 4))))
