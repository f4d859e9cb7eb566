"""What `summarize` says of ops and parameters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import qwix


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 64, rngs=rngs)
        self.up = nnx.Linear(64, 32, rngs=rngs)
        self.down = nnx.Linear(32, 8, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.up(self.embed(tokens))
        scores = jnp.einsum("bi,bj->ij", x, x)
        return self.down(x), scores


RULES = [
    qwix.QuantizationRule(module_path="down"),
    qwix.QuantizationRule(module_path="nowhere", weight_qtype="int8"),
    qwix.QuantizationRule(module_path="up", weight_qtype="int4", act_qtype="int8", tile_size=32),
    qwix.QuantizationRule(op_names=("einsum",), weight_qtype="int8"),
]


@pytest.fixture(scope="module")
def summary():
    return qwix.summarize(qwix.quantize_model(Model(nnx.Rngs(0)), qwix.PtqProvider(RULES), jnp.arange(3)))


def test_ops(summary):
    ops = {op.path: op for op in summary.ops}
    assert list(ops) == ["up/dot_general0", "einsum0", "down/dot_general0"]
    up = ops["up/dot_general0"]
    assert up.formats == ("int8", "int4") and up.shapes == ((3, 64), (64, 32))
    assert up.params == ("", "up/kernel") and up.note == "" and up.rule.module_path == "up"
    assert "no operand is a parameter" in ops["einsum0"].note
    assert "the rule has no qtype" in ops["down/dot_general0"].note


def test_parameters(summary):
    params = {p.path: p for p in summary.params}
    kernel = params["up/kernel"]
    assert kernel.format == "int4 [32, 1]" and kernel.note == ""
    assert kernel.float_bytes == 64 * 32 * 4
    assert kernel.bytes == 64 * 32 // 2 + 2 * 32 * 4  # codes packed, and their scales
    assert params["down/kernel"].format == "float32" and "no weight_qtype" in params["down/kernel"].note
    assert "no operand" in params["embed/embedding"].note
    assert summary.float_bytes == sum(p.float_bytes for p in summary.params)
    assert summary.bytes == summary.float_bytes - kernel.float_bytes + kernel.bytes


def test_unused_rules_and_text(summary):
    assert [rule.module_path for rule in summary.unused_rules] == ["nowhere"]
    text = str(summary)
    for part in ("up/dot_general0", "int4 [32, 1]", "matched nothing", "nowhere", "no operand is a parameter"):
        assert part in " ".join(text.split())


def test_linen():
    model = qwix.quantize_model(nn.Dense(4), qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="int8")]))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 8)))
    summary = qwix.summarize(model, variables)
    assert summary.ops[0].formats == ("float32", "int8")
    assert {p.path: p.bytes for p in summary.params} == {"kernel": 8 * 4 + 4 * 4, "bias": 16}


def test_one_provider_for_two_models():
    provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="int8")])
    first, second = (
        qwix.quantize_model(nnx.Linear(width, 4, rngs=nnx.Rngs(0)), provider, jnp.ones((1, width))) for width in (8, 16)
    )
    assert qwix.summarize(first).ops[0].shapes[1] == (8, 4)
    assert qwix.summarize(second).ops[0].shapes[1] == (16, 4)


def test_a_float_model_is_an_error():
    with pytest.raises(ValueError, match="not quantized"):
        qwix.summarize(Model(nnx.Rngs(0)))
