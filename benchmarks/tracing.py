"""How long does it take to quantize a model, and to trace it afterwards?

A 12-layer transformer (d 128) in NNX: `quantize_model`, and tracing of the quantized model as a multiple of tracing the
float one, in one process, for a package that is called `qwix`. `--original PYTHON` runs the same script with another
interpreter, in whose environment another implementation is installed.

    python benchmarks/tracing.py [--original PYTHON] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

import qwix

WIDTH, HEADS, LAYERS, VOCABULARY = 128, 4, 12, 512
ROUNDS = 31
TRAINED = ("float", "int8 QAT", "int8 training")


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


def trace_seconds(model: nnx.Module, tokens: jax.Array, gradient: bool = False) -> float:
    """Seconds of one trace of the model, or of its gradient, by a function that jit has not seen."""
    graphdef, state = nnx.split(model)
    start = time.perf_counter()
    if gradient:
        loss = lambda state, x: nnx.merge(graphdef, state)(x).sum()  # noqa: E731
        jax.jit(jax.grad(loss)).trace(state, tokens)
    else:
        jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(state, tokens)
    return time.perf_counter() - start


def measure() -> dict[str, float]:
    tokens = jnp.ones((2, 16), jnp.int32)
    model = Transformer(nnx.Rngs(0))
    w8, w8a8 = {"weight_qtype": jnp.int8}, {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}
    rules = {
        "int8 weight-only": qwix.PtqProvider([qwix.QuantizationRule(**w8)]),
        "int8 dynamic": qwix.PtqProvider([qwix.QuantizationRule(**w8a8)]),
        "int8 QAT": qwix.QtProvider([qwix.QtRule(**w8a8)]),
        "int8 training": qwix.QtProvider([qwix.QtRule(**w8a8, bwd_qtype=jnp.int8)]),
    }
    result: dict[str, float] = {}
    quantized = {}
    for name, provider in rules.items():
        start = time.perf_counter()
        quantized[name] = qwix.quantize_model(model, provider, tokens)
        jax.block_until_ready(nnx.state(quantized[name]))
        result[f"{name}: quantize_model, s"] = time.perf_counter() - start
    # The models take turns and are compared within a round, so that a noisy moment of the machine hits all alike. The
    # first round warms caches up.
    rounds = []
    for _ in range(ROUNDS + 1):
        times = {"float": trace_seconds(model, tokens)}
        times |= {name: trace_seconds(q, tokens) for name, q in quantized.items()}
        # Of a PTQ model no gradient is taken: its weights are integers.
        trained = {name: q for name, q in {"float": model, **quantized}.items() if name in TRAINED}
        times |= {f"{name} gradient": trace_seconds(q, tokens, gradient=True) for name, q in trained.items()}
        rounds.append(times)
    result["float: trace, s"] = statistics.median(times["float"] for times in rounds[1:])
    for name in TRAINED[1:]:
        ratios = [times[f"{name} gradient"] / times["float gradient"] for times in rounds]
        result[f"{name}: trace of the gradient, multiple of float"] = statistics.median(ratios[1:])
    for name in rules:
        ratios = [times[name] / times["float"] for times in rounds]
        result[f"{name}: trace, multiple of float"] = statistics.median(ratios[1:])
        result[f"{name}: first trace, multiple of first float"] = ratios[0]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", help="interpreter with another implementation to compare with")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--raw", action="store_true", help="print the figures as JSON only")
    args = parser.parse_args()
    columns = {"this": measure()}
    if args.raw:
        print(json.dumps(columns["this"]))
        return
    if args.original:
        # -E: no PYTHONPATH, which would give it this qwix.
        command = [args.original, "-E", __file__, "--raw"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        columns["original"] = json.loads(out.splitlines()[-1])
    width = max(map(len, columns["this"]))
    print(" " * width, *(f"{name:>10}" for name in columns))
    for row in columns["this"]:
        print(f"{row:<{width}}", *(f"{column[row]:10.2f}" for column in columns.values()))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(columns, f, indent=1)


if __name__ == "__main__":
    sys.exit(main())
