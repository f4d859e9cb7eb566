"""How long do the calibrated methods take?

GPTQ and AWQ (int4, groups of 128) of a 512 x 512 and of a larger matrix, AWQ with mean magnitudes, and with second
moments and clipping: the first call, which compiles, and later ones (median). Then a model of four layers, d 512: one
batch through the float model, through it with GPTQ's calibration, and `gptq.quantize` and `qep.quantize` with four
batches. The row "its own FLOPs" is what GPTQ's matmuls and factorizations of the larger matrix (5/3 n^3) would take at
the measured rate of a float32 matmul.
`--original PYTHON` measures the rows that it can with another interpreter, in whose environment another implementation
is installed as `qwix`.

    python benchmarks/methods.py [--original PYTHON] [--size N] [--json FILE]
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def seconds(fn: Callable, calls: int) -> dict[str, float]:
    import jax

    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return {"first": times[0], "later": statistics.median(times[1:])}


def measure_core(size: int, calls: int) -> dict[str, dict[str, float]]:
    """Rows of single matrices, for the package that is installed as `qwix`; `size` 0 leaves the larger one out."""
    import jax
    import jax.numpy as jnp

    from qwix._src.core import qarray
    from qwix.contrib import awq_core, gptq_core

    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: 128})
    rows = {}
    for n in filter(None, (512, size)):
        w = jax.random.normal(jax.random.key(0), (n, n))
        x = jax.random.normal(jax.random.key(1), (n, 2 * n))
        h = jax.block_until_ready(x @ x.T)
        rows[f"GPTQ {n}"] = seconds(lambda w=w, h=h: jax.tree.leaves(gptq_core.quantize_weight(w, h, how)), calls)
        scale = jnp.abs(x).mean(axis=1)
        if n == 512:
            rows[f"AWQ {n}"] = seconds(lambda w=w, s=scale: jax.tree.leaves(awq_core.quantize_weight(w, s, how)), calls)
        if size:  # which the original is not asked for, and its AWQ has no second moments
            awq = functools.partial(awq_core.quantize_weight, w, scale, how, second_moments=h, n_clip=10)
            rows[f"AWQ with second moments {n}"] = seconds(lambda awq=awq: jax.tree.leaves(awq()), calls)
    if size:
        matmul = jax.jit(lambda a, b: a @ b)
        rate = 2 * size**3 / seconds(lambda: matmul(w, h), calls)["later"]
        rows[f"its own FLOPs {size}"] = {"later": 5 / 3 * size**3 / rate}
    return rows


def measure_model(calls: int) -> dict[str, dict[str, float]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import qwix
    from qwix.contrib import gptq, qep

    class Layer(nnx.Module):
        def __init__(self, d: int, rngs: nnx.Rngs):
            self.q, self.k, self.v, self.o = (nnx.Linear(d, d, rngs=rngs) for _ in range(4))
            self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.o(nnx.dot_product_attention(*(m(x)[:, :, None] for m in (self.q, self.k, self.v)))[:, :, 0])
            return x + self.down(nnx.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([Layer(512, rngs) for _ in range(4)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Model(), jax.random.normal(jax.random.key(0), (4, 256, 512))
    rule = {"weight_qtype": "int4", "tile_size": 128}
    call = nnx.jit(lambda m, x: m(x))
    observed = qwix.quantize_model(model, gptq.GptqCalibrationProvider([gptq.GptqRule(**rule)]), x)
    call(observed, x)  # makes the statistics
    rows = {"float forward": seconds(lambda: call(model, x), calls)}
    observe = nnx.jit(lambda m, x: m(x), donate_argnums=0)  # as the one-call functions do
    rows["with calibration"] = seconds(lambda: observe(observed, x), calls)
    batches = [x + i for i in jnp.arange(4) * 0.1]
    for name, quantize, rules in (
        ("gptq.quantize", gptq.quantize, [gptq.GptqRule(**rule)]),
        ("qep.quantize", qep.quantize, [qep.QepRule(**rule)]),
    ):
        rows[name] = seconds(lambda q=quantize, r=rules: jax.tree.leaves(q(model, batches, r).params), 1)
    return rows


def measure_in_process(python: str, size: int, calls: int, with_model: bool) -> dict[str, dict[str, float]]:
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if with_model is False:
        environment.pop("PYTHONPATH", None)
    command = [python, __file__, "--measure", "--size", str(size), "--calls", str(calls)]
    command += ["--with-model"] if with_model else []
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", metavar="PYTHON", help="an interpreter with the original")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the larger matrix (4096)")
    parser.add_argument("--calls", type=int, default=3, help="later calls (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times to a file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--with-model", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        rows = measure_core(options.size, options.calls)
        print(json.dumps(rows | (measure_model(options.calls) if options.with_model else {})))
        return

    from rich.console import Console
    from rich.table import Table

    result = {"ours": measure_in_process(sys.executable, options.size, options.calls, True)}
    if options.original:  # the larger matrix would take it hours
        result["original"] = measure_in_process(options.original, 0, options.calls, False)
    table = Table("", "first, s", "later, s", title="calibrated methods, (original / ours)")
    for name, row in result["ours"].items():
        cells = []
        for step in ("first", "later"):
            cell = f"{row[step]:.3f}" if step in row else ""
            other = result.get("original", {}).get(name, {}).get(step)
            cells.append(cell + (f" ({other / row[step]:.1f}x)" if other else ""))
        table.add_row(name, *cells)
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
