"""How long does a training step take, in float, with QAT, and with gradients in int8?

A transformer of 4 layers (d 256, 8 x 128 tokens) in NNX, Adam, the step jitted with `nnx.jit`; the steps take
turns, and are compared within a round. `--original PYTHON` runs the same script with another interpreter as well, in
whose environment another implementation is installed; its steps take turns with these.

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


def trainers() -> dict[str, Trainer]:
    tokens = jnp.zeros((BATCH, LENGTH), int)
    w8a8 = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}
    result = {"float": Trainer(Transformer(nnx.Rngs(0)))}
    for name, rule in {"QAT": w8a8, "int8 backward": w8a8 | {"bwd_qtype": jnp.int8}}.items():
        model = qwix.quantize_model(Transformer(nnx.Rngs(0)), qwix.QtProvider([qwix.QtRule(**rule)]), tokens)
        result[name] = Trainer(model)
    return result


def work() -> None:
    """Runs a step of the model whose name comes in, and prints the seconds that it took, again and again."""
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, VOCABULARY)
    models = trainers()
    for line in sys.stdin:
        print(models[line.strip()].step(tokens), flush=True)


class Worker:
    """A process that runs this script's steps with some interpreter."""

    def __init__(self, python: str, *options: str):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, *options, __file__, "--work"], stdin=pipe, stdout=pipe, text=True)

    def step(self, name: str) -> float:
        assert self.process.stdin and self.process.stdout
        print(name, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def measure(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, float]]:
    """{worker: {row: figure}}; all steps of all workers take turns."""
    names = ("float", "QAT", "int8 backward")
    steps = [(worker, name) for name in names for worker in workers]
    first = {(worker, name): workers[worker].step(name) for worker, name in steps}
    times = [{(worker, name): workers[worker].step(name) for worker, name in steps} for _ in range(rounds)]

    def median(worker: str, name: str, relative: bool) -> float:
        return statistics.median(t[worker, name] / (t[worker, "float"] if relative else 1) for t in times)

    return {
        worker: {f"{name}: first step, s": first[worker, name] for name in names}
        | {f"{name}: step, s": median(worker, name, relative=False) for name in names}
        | {f"{name}: step, multiple of float": median(worker, name, relative=True) for name in names}
        for worker in workers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--original", help="interpreter with another implementation to compare with")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--work", action="store_true", help="be the process that runs steps")
    args = parser.parse_args()
    if args.work:
        work()
        return
    workers = {"this": Worker(sys.executable)}
    if args.original:
        # -E: no PYTHONPATH, which would give it this qwix.
        workers["original"] = Worker(args.original, "-E")
    columns = measure(workers, args.rounds)
    for worker in workers.values():
        worker.process.communicate()
    width = max(map(len, columns["this"]))
    print(" " * width, *(f"{name:>10}" for name in columns))
    for row in columns["this"]:
        print(f"{row:<{width}}", *(f"{column[row]:10.3f}" for column in columns.values()))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(columns, f, indent=1)


if __name__ == "__main__":
    sys.exit(main())
