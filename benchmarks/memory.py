"""How much memory does `quantize_params` need on an NNX model?

Peak resident memory while the parameters of a stack of linear layers are quantized, beyond the float model that is
there before, against the bound: the quantized model as JAX holds it, and twice the largest tensor. Each format runs in
a process of its own. (JAX holds formats under 8 bits one element a byte on the CPU.)

    python benchmarks/memory.py [--json FILE]
"""

import argparse
import json
import resource
import subprocess
import sys

FORMATS = {
    "int8": {"weight_qtype": "int8"},
    "int4 g128": {"weight_qtype": "int4", "tile_size": 128},
    "fp8": {"weight_qtype": "float8_e4m3fn"},
    "nf4 g64": {"weight_qtype": "nf4", "tile_size": 64},
}
WIDTH, LAYERS = 2048, 16
MIB = 2**20


def peak() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import qwix

    class Model(nnx.Module):
        def __init__(self, layers: int, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(layers)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    provider = qwix.PtqProvider([qwix.QuantizationRule(**FORMATS[name])])
    x = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)

    def quantize(params: dict, layers: int) -> nnx.Module:
        model = nnx.eval_shape(lambda: Model(layers, nnx.Rngs(0)))
        quantized = qwix.quantize_model(model, provider, x)
        nnx.update(quantized, qwix.quantize_params(params, quantized))
        return jax.block_until_ready(nnx.state(quantized))

    def params(layers: int) -> dict:
        kernels = {i: {"kernel": jnp.full((WIDTH, WIDTH), 0.1 * (i + 1))} for i in range(layers)}
        return jax.block_until_ready({"layers": kernels})

    quantize(params(1), 1)  # what compiling takes is no part of the question
    floats = params(LAYERS)
    before = peak()
    state = quantize(floats, LAYERS)
    after = peak()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / MIB
    largest = WIDTH * WIDTH * 4 / MIB
    return {
        "float model": LAYERS * largest,
        "quantized model": held,
        "largest tensor": largest,
        "peak beyond the float model": after - before,
        "share of the bound": (after - before) / (held + 2 * largest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--format", choices=FORMATS, help="measure this one in this process")
    args = parser.parse_args()
    if args.format:
        print(json.dumps(measure(args.format)))
        return
    rows = {}
    for name in FORMATS:
        out = subprocess.run([sys.executable, __file__, "--format", name], check=True, capture_output=True, text=True)
        rows[name] = json.loads(out.stdout.splitlines()[-1])
        print(name, *(f"{key} {value:.2f}" for key, value in rows[name].items()), sep="; ", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
