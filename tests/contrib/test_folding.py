"""Folding scales: what can be folded is found, and the folded model has the same outputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from qwix.contrib import folding, scale_graph, scale_rules
from qwix.models import bert, llama


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def joined(paths: Any) -> list[str]:
    return sorted("/".join(map(str, path)) for path in paths)


def sites_of(model: Any, *inputs: Any, **kwargs: Any) -> dict[str, str | list[str]]:
    """'weights that share an input' -> the parameters that take its scale, or why none can."""
    result: dict[str, Any] = {}
    for site in folding.find_sites(model, *inputs, **kwargs):
        others = joined(site.changed.keys() - site.weights.keys())
        result[" ".join(joined(site.weights))] = site.reason or others
    return result


def randomized(model: nnx.Module) -> nnx.Module:
    """The model with no parameter at 0 or 1, and norms that do something."""
    for i, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        noise = random(*variable.shape, seed=i)
        value = 1 + 0.3 * noise if path[-1] == "scale" else variable.get_value() + 0.05 * noise
        nnx.update(model, nnx.from_flat_state([(path, variable.replace(value))]))
    return model


def assert_same_outputs(model: nnx.Module, *inputs: Any) -> None:
    """With a random scale at every site that can be folded, the model is another one with the same outputs."""
    scales = []
    for i, site in enumerate(s for s in folding.find_sites(model, *inputs) if s.reason is None):
        scales.append((site, jnp.exp(random(*[3] * site.stacked, site.size, seed=i))[..., site.classes]))
    folded = folding.apply_scales(model, scales)
    run = nnx.jit(lambda m, *args: m(*args))
    expected = run(model, *inputs)
    np.testing.assert_allclose(run(folded, *inputs), expected, rtol=2e-4, atol=2e-5 * float(jnp.abs(expected).max()))
    for site, _ in scales:
        for path in site.changed:
            before, after = (dict(nnx.to_flat_state(nnx.state(m)))[path].get_raw_value() for m in (model, folded))
            assert not np.allclose(before, after), path


class Mlp(nnx.Module):
    def __init__(self, activation, *, norm=None, gated=False, bias=True, rngs):
        self.norm = norm(8, rngs=rngs) if norm else None
        self.up, self.down = nnx.Linear(8, 12, use_bias=bias, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)
        self.gate = nnx.Linear(8, 12, rngs=rngs) if gated else None
        self.activation = activation

    def __call__(self, x):
        y = x if self.norm is None else self.norm(x)
        hidden = self.activation(self.up(y) if self.gate is None else self.gate(y))
        return x + self.down(hidden if self.gate is None else hidden * self.up(y))


UP = ["up/bias", "up/kernel"]
MLPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu": ({"activation": nnx.relu}, {"down/kernel": UP, "up/kernel": "input of the model"}),
    "no bias": ({"activation": nnx.relu, "bias": False}, {"down/kernel": ["up/kernel"], "up/kernel": "input"}),
    "leaky relu": ({"activation": nnx.leaky_relu}, {"down/kernel": UP, "up/kernel": "input"}),
    "squared relu": (
        {"activation": lambda x: jnp.square(nnx.relu(x))},
        {"down/kernel": UP, "up/kernel": "input"},
    ),
    "where": ({"activation": lambda x: jnp.where(x > 0, x, 0)}, {"down/kernel": UP, "up/kernel": "input"}),
    "in slices": (
        {"activation": lambda x: jnp.concatenate([-x[..., 6:], nnx.relu(x[..., :6])], -1)},
        {"down/kernel": UP, "up/kernel": "input"},
    ),
    "gelu": ({"activation": nnx.gelu}, {"down/kernel": "", "up/kernel": "input"}),
    "layer norm": (
        {"activation": nnx.gelu, "norm": nnx.LayerNorm},
        {"down/kernel": "", "up/kernel": ["norm/bias", "norm/scale"]},
    ),
    "gated, rms norm": (
        {"activation": nnx.silu, "norm": nnx.RMSNorm, "gated": True},
        {"down/kernel": UP, "gate/kernel up/kernel": ["norm/scale"]},
    ),
    "softmax": ({"activation": nnx.softmax}, {"down/kernel": "", "up/kernel": "input"}),
}


@pytest.mark.parametrize("case", MLPS.values(), ids=MLPS)
def test_perceptrons(case):
    kwargs, expected = case
    model, x = randomized(Mlp(**kwargs, rngs=nnx.Rngs(0))), random(3, 8)
    found = sites_of(model, x)
    assert found.keys() == expected.keys()
    for weights, wanted in expected.items():
        assert found[weights] == wanted if isinstance(wanted, list) else wanted in found[weights]
    assert_same_outputs(model, x)


def test_llama():
    """Norms, grouped attention with rotary embeddings, gated perceptrons, and an output tied to the embedding."""
    config = llama.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, ids = randomized(llama.Llama(config, rngs=nnx.Rngs(0))), jnp.array([[2, 7, 9]])
    found = sites_of(model, ids)
    folded = {weights.split("/")[-2] for weights, others in found.items() if isinstance(others, list)}
    assert folded == {"v_proj", "o_proj", "up_proj", "down_proj"}
    sites = {joined(site.weights)[-1]: site for site in folding.find_sites(model, ids)}
    # Two heads of queries share a head of values.
    name = next(name for name in sites if "o_proj" in name and "layers/1" in name)
    assert np.array_equal(np.unique(sites[name].classes).shape, (8,))
    assert [s.reason is None for n, s in sites.items() if "embed" in n or "head" in n] == [False]
    assert_same_outputs(model, ids)


def test_bert_has_its_norms_after_the_residual():
    """What a norm gives goes into the next sum as well, so only values and their projection can be folded."""
    config = bert.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    model, ids = randomized(bert.Bert(config, rngs=nnx.Rngs(0))), jnp.array([[2, 7, 9]])
    found = sites_of(model, ids, jnp.ones_like(ids))
    layer = "layers/0/attention"
    shared = f"{layer}/key/kernel {layer}/query/kernel {layer}/value/kernel"
    assert found[f"{layer}/output/kernel"] == [f"{layer}/value/bias", f"{layer}/value/kernel"]
    assert not isinstance(found[shared], list)
    assert not isinstance(found["layers/0/down/kernel"], list)
    assert_same_outputs(model, ids, jnp.ones_like(ids))


class Attention(nnx.Module):
    """Pre-norm attention by NNX's own module, with parameters of three axes."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(self.norm(x))


class Fused(nnx.Module):
    """Queries, keys and values out of one matrix; parameters used by einsum; a cast."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(8))
        self.qkv = nnx.Param(random(8, 3, 2, 4, seed=1) / 3)
        self.out = nnx.Param(random(2, 4, 8, seed=2) / 3)

    def __call__(self, x):
        y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * self.scale[...]
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dshe->btshe", y, self.qkv[...]), 2, 0)
        weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k))
        mixed = jnp.einsum("bhqk,bkhe->bqhe", weights, v.astype(jnp.float32))
        return x + jnp.einsum("bqhe,hed->bqd", mixed, self.out[...])


class Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Conv(8, 4, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.max_pool(nnx.relu(self.depthwise(x)), (2, 2), (2, 2))
        return self.head(nnx.relu(self.second(x)).mean((1, 2)))


class TwoUses(nnx.Module):
    """A weight that is used twice, of inputs from two producers."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
        self.shared = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        return self.shared(nnx.relu(self.a(x))) + self.shared(self.b(x))


class Jitted(nnx.Module):
    """Transforms on the way, and a dropout that does nothing."""

    def __init__(self, rngs):
        self.mlp = Mlp(nnx.relu, norm=nnx.LayerNorm, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.remat(lambda m, x: m(x))(self.mlp, jax.jit(lambda x: x * 2)(x)))


OTHERS = {
    "attention": (
        Attention,
        (2, 3, 8),
        {
            "attention/key/kernel attention/query/kernel attention/value/kernel": ["norm/bias", "norm/scale"],
            "attention/out/kernel": ["attention/value/bias", "attention/value/kernel"],
        },
    ),
    "fused": (Fused, (2, 3, 8), {"qkv": ["scale"], "out": ["qkv"]}),
    "convolutions": (
        Convolutions,
        (2, 6, 6, 3),
        {
            # The kernel of a depthwise convolution is the nearest that can take the scale.
            "second/kernel": ["depthwise/bias", "depthwise/kernel"],
            "head/kernel": ["second/bias", "second/kernel"],
        },
    ),
    "two uses": (TwoUses, (2, 8), {"shared/kernel": ["a/bias", "a/kernel", "b/bias", "b/kernel"]}),
    "jitted": (
        Jitted,
        (2, 8),
        {"mlp/up/kernel": ["mlp/norm/bias", "mlp/norm/scale"], "mlp/down/kernel": ["mlp/up/bias", "mlp/up/kernel"]},
    ),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_other_models(case):
    make, shape, expected = case
    model, x = randomized(make(nnx.Rngs(0))), random(*shape)
    found = {weights: others for weights, others in sites_of(model, x).items() if isinstance(others, list)}
    assert found == expected
    assert_same_outputs(model, x)


def test_stacked_layers():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = lambda rngs: Mlp(nnx.silu, norm=nnx.RMSNorm, gated=True, rngs=rngs)  # noqa: E731
            self.layers = nnx.vmap(make)(rngs.split(3))

        def __call__(self, x):
            step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, self.layers)

    model, x = randomized(Stack(nnx.Rngs(0))), random(2, 8)
    sites = folding.find_sites(model, x)
    assert [(site.reason, site.stacked, site.size) for site in sites] == [(None, 1, 8), (None, 1, 12)]
    assert_same_outputs(model, x)
    scale = jnp.exp(random(3, 12))
    folded = folding.fold(model, {"layers/down/kernel": scale}, x)
    ratio = folded.layers.down.kernel[...] / model.layers.down.kernel[...]
    np.testing.assert_allclose(ratio, jnp.broadcast_to(scale[..., None], ratio.shape), rtol=1e-5)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.BatchNorm(use_running_average=True)(x)
        y = nn.Dense(12, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))(y)
        return x + nn.Dense(8)(nn.relu(y))


def test_linen():
    model, x = LinenBlock(), random(3, 8)
    variables = model.init(jax.random.key(0), x)
    expected = model.apply(variables, x)
    found = sites_of(model, x, variables=variables)
    assert found == {
        "Dense_0/kernel": ["BatchNorm_0/bias", "BatchNorm_0/scale"],
        "Dense_1/kernel": ["Dense_0/bias", "Dense_0/kernel"],
    }
    scales = {"Dense_0/kernel": jnp.exp(random(8)), ("Dense_1", "kernel"): jnp.exp(random(12, seed=1))}
    folded = folding.fold(model, scales, x, variables=variables)
    np.testing.assert_allclose(model.apply(folded, x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(folded["params"]["Dense_0"]["kernel"], nn.Partitioned)
    assert folded["batch_stats"] is not None
    before, after = (v["params"]["Dense_1"]["kernel"] for v in (variables, folded))
    np.testing.assert_allclose(
        after / before, np.broadcast_to(scales["Dense_1", "kernel"][:, None], (12, 8)), rtol=1e-5
    )


def test_fold_gives_the_scale_to_all_with_the_same_input():
    model, x = randomized(Mlp(nnx.silu, norm=nnx.RMSNorm, gated=True, rngs=nnx.Rngs(0))), random(3, 8)
    scale = jnp.exp(random(8))
    folded = folding.fold(model, {"up/kernel": scale}, x)
    for name in ("up", "gate"):
        ratio = getattr(folded, name).kernel[...] / getattr(model, name).kernel[...]
        np.testing.assert_allclose(ratio, np.broadcast_to(scale[:, None], ratio.shape), rtol=1e-5)
    np.testing.assert_allclose(folded.norm.scale[...] * scale, model.norm.scale[...], rtol=1e-5)
    assert np.array_equal(folded.down.kernel[...], model.down.kernel[...])


def test_what_cannot_be_folded_says_so():
    model, x = Mlp(nnx.gelu, rngs=nnx.Rngs(0)), random(3, 8)
    ones = jnp.ones(8)
    with pytest.raises(ValueError, match="the scale of up/kernel cannot be folded: it comes from an input"):
        folding.fold(model, {"up/kernel": ones}, x)
    with pytest.raises(ValueError, match="other is no weight.*up/kernel"):
        folding.fold(model, {"other": ones}, x)
    gated = Mlp(nnx.silu, norm=nnx.RMSNorm, gated=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"shape \(7,\).*8 input features"):
        folding.fold(gated, {"up/kernel": jnp.ones(7)}, x)
    with pytest.raises(ValueError, match="positive"):
        folding.fold(gated, {"up/kernel": ones.at[0].set(0)}, x)
    with pytest.raises(ValueError, match="gate/kernel and up/kernel have the same input"):
        folding.fold(gated, {"gate/kernel": ones, "up/kernel": 2 * ones}, x)
    with pytest.raises(ValueError, match="needs variables"):
        folding.find_sites(LinenBlock(), x)


def test_heads_that_share_values_need_equal_scales():
    config = llama.LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, ids = llama.Llama(config, rngs=nnx.Rngs(0)), jnp.array([[1, 2]])
    (site,) = (s for s in folding.find_sites(model, ids) if "o_proj" in str(s.weights))
    (path,) = site.weights
    with pytest.raises(ValueError, match="differs between features that share a producer"):
        folding.fold(model, {path: jnp.arange(1.0, 9.0)}, ids)
    means = site.of_weight(path, site.from_weight(path, jnp.arange(1.0, 9.0)))
    # Heads 0 and 1 have features (1, 2) and (3, 4).
    np.testing.assert_allclose(means[:4], np.sqrt([3, 8, 3, 8]), rtol=1e-5)
    folding.fold(model, {path: means}, ids)


def test_reshapes_of_placements():
    ids = np.arange(12).reshape(1, 3, 4, 1)
    out = scale_rules.reshaped(ids, (5, 3, 4, 1), (1, 5, 12))
    assert out.shape == (1, 1, 12)
    assert np.array_equal(scale_rules.reshaped(out, (1, 5, 12), (5, 3, 4, 1)), ids)
    with pytest.raises(scale_graph.Blocked):
        scale_rules.reshaped(ids, (0, 3, 4, 1), (3, 0))
