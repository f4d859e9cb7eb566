"""Quantized training on 8 devices: data, tensor and fully sharded data parallel."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qwix

WIDTH, HIDDEN, ROWS = 64, 128, 32
# Name -> (axes of the mesh, sharding of the up kernel, of the down kernel, of the batch)
LAYOUTS = {
    "data": ((8, 1), P(), P(), P("data")),
    "tensor": ((1, 8), P(None, "model"), P("model", None), P()),
    "fsdp": ((8, 1), P("data", None), P("data", None), P("data")),
    "data and tensor": ((2, 4), P(None, "model"), P("model", None), P("data")),
}


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_and_what_is_gathered(name):
    shape, up, down, batch = LAYOUTS[name]
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))
    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")
    model = qwix.quantize_model(Mlp(nnx.Rngs(0)), qwix.QtProvider([rule]), x)
    graphdef, state = nnx.split(model, nnx.Param)

    @jax.jit
    def gradient(state, x):
        return nnx.grad(lambda model: (model(x) ** 2).sum())(nnx.merge(graphdef, state))

    truth = nnx.to_pure_dict(gradient(state, x))
    specs = {"up": up, "down": down}
    flat = nnx.to_flat_state(state)
    shardings = nnx.from_flat_state((path, v.replace(NamedSharding(mesh, specs[path[0]]))) for path, v in flat)
    sharded = jax.device_put(state, shardings)
    rows = jax.device_put(x, NamedSharding(mesh, batch))
    compiled = jax.jit(gradient, out_shardings=shardings).lower(sharded, rows).compile()
    found = nnx.to_pure_dict(compiled(sharded, rows))
    for layer, spec in specs.items():
        gradients, expected = found[layer]["kernel"], truth[layer]["kernel"]
        assert gradients.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        # Not to the last bit: an element may fall on the other side of a tie.
        assert np.linalg.norm(np.asarray(gradients) - expected) < 1e-2 * np.linalg.norm(expected)
    gathered = re.findall(r"(\w+)\[([\d,]*)\][^=\n]* all-gather", compiled.as_text())
    weights = {f"{WIDTH},{HIDDEN}", f"{HIDDEN},{WIDTH}"}
    assert {kind for kind, size in gathered if size in weights} == ({"s8"} if name == "fsdp" else set()), gathered
