"""Quantized training on 8 devices: data, tensor and fully sharded data parallel."""

import functools
import re

import jax
import jax.numpy as jnp
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
    "fsdp and tensor": ((2, 4), P("data", "model"), P("model", "data"), P("data")),
}


class Mlp(nnx.Module):
    def __init__(self, rngs):
        # No negative numbers anywhere, of which the largest in a channel, -127.5 steps, would lie on a tie, so that the
        # last bit of a division says whether it becomes -127 or -128. Without ties a mesh changes nothing.
        positive = lambda *args: jnp.abs(nnx.initializers.lecun_normal()(*args))  # noqa: E731
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, kernel_init=positive, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, kernel_init=positive, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@functools.cache
def gradient_of(bwd_qtype):
    """(gradient of a loss, parameters, input, the gradient on one device)."""
    x = jnp.abs(jax.random.normal(jax.random.key(0), (ROWS, WIDTH)))
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype=bwd_qtype)
    model = qwix.quantize_model(Mlp(nnx.Rngs(0)), qwix.QtProvider([rule]), x)
    graphdef, state = nnx.split(model, nnx.Param)

    def gradient(state, x):
        return nnx.grad(lambda model: (model(x) ** 2).sum())(nnx.merge(graphdef, state))

    return gradient, state, x, nnx.to_pure_dict(jax.jit(gradient)(state, x))


# With float gradients, only where there is something to gather.
@pytest.mark.parametrize(
    ("name", "bwd_qtype"), [*((name, "int8") for name in LAYOUTS), ("fsdp", None), ("fsdp and tensor", None)]
)
def test_gradients_and_what_is_gathered(name, bwd_qtype):
    """The numbers of one device; forward and backward, whole weights are gathered in int8 or not at all."""
    shape, up, down, batch = LAYOUTS[name]
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))
    gradient, state, x, truth = gradient_of(bwd_qtype)
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
        # In int8 all sums are of integers, and exact; float ones come in another order.
        tolerance = 0 if bwd_qtype else 1e-6
        assert np.linalg.norm(np.asarray(gradients) - expected) <= tolerance * np.linalg.norm(expected)
    # What a device has of a kernel once it is gathered over the batch's axis.
    tensor = shape[1]
    whole = {f"{WIDTH},{HIDDEN // tensor}", f"{HIDDEN // tensor},{WIDTH}"}
    gathered = re.findall(r"(\w+)\[([\d,]*)\][^=\n]* all-gather", compiled.as_text())
    assert {kind for kind, size in gathered if size in whole} == ({"s8"} if "fsdp" in name else set()), gathered
