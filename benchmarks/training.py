"""How long does a training step take, in float, with QAT, and with gradients in int8?

A transformer of 4 layers (d 256, 8 x 128 tokens) in NNX, Adam, the step jitted with `nnx.jit`; the steps take
turns, and are compared within a round. `--original PYTHON` runs the same script with another interpreter, in
whose environment another implementation is installed.

    python benchmarks/training.py [--rounds N] [--original PYTHON] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import qwix

WIDTH, HEADS, LAYERS, VOCABULARY, BATCH, LENGTH = 256, 4, 4, 512, 8, 128


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.out = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Trainer:
    def __init__(self, model: nnx.Module):
        self.model = model
        self.optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, tokens):
            def loss(model):
                logits = model(tokens[:, :-1])
                return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        self.jitted = step

    def step(self, tokens: jax.Array) -> float:
        """Seconds that one step takes."""
        start = time.perf_counter()
        jax.block_until_ready(self.jitted(self.model, self.optimizer, tokens))
        return time.perf_counter() - start


def measure(rounds: int) -> dict[str, float]:
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, VOCABULARY)
    w8a8 = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}
    trainers = {"float": Trainer(Transformer(nnx.Rngs(0)))}
    for name, rule in {"QAT": w8a8, "int8 backward": w8a8 | {"bwd_qtype": jnp.int8}}.items():
        model = qwix.quantize_model(Transformer(nnx.Rngs(0)), qwix.QtProvider([qwix.QtRule(**rule)]), tokens[:, :-1])
        trainers[name] = Trainer(model)
    result: dict[str, float] = {}
    for name, trainer in trainers.items():
        result[f"{name}: first step, s"] = trainer.step(tokens)
    times = [{name: trainer.step(tokens) for name, trainer in trainers.items()} for _ in range(rounds)]
    for name in trainers:
        result[f"{name}: step, s"] = statistics.median(t[name] for t in times)
    for name in trainers:
        result[f"{name}: step, multiple of float"] = statistics.median(t[name] / t["float"] for t in times)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--original", help="interpreter with another implementation to compare with")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--raw", action="store_true", help="print the figures as JSON only")
    args = parser.parse_args()
    columns = {"this": measure(args.rounds)}
    if args.raw:
        print(json.dumps(columns["this"]))
        return
    if args.original:
        # -E: no PYTHONPATH, which would give it this qwix.
        command = [args.original, "-E", __file__, "--raw", "--rounds", str(args.rounds)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        columns["original"] = json.loads(out.splitlines()[-1])
    width = max(map(len, columns["this"]))
    print(" " * width, *(f"{name:>10}" for name in columns))
    for row in columns["this"]:
        print(f"{row:<{width}}", *(f"{column[row]:10.3f}" for column in columns.values()))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(columns, f, indent=1)


if __name__ == "__main__":
    sys.exit(main())
