"""How long does it take to quantize a weight, and to dequantize it?

A float32 matrix in each format, with the granularity that is usual for it: the first call, which compiles, and later
ones (median, milliseconds). `--original PYTHON` measures the same with another interpreter, in whose environment
another implementation is installed as `qwix`, and gives the ratios. Each round is a new process for each of the two in
turn, so that a noisy moment of the machine hits both. The row "copy" is the time to read and write the matrix once.

    python benchmarks/quantize.py [--original PYTHON] [--size N] [--rounds N] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CASES = {
    "int8": {"qtype": "int8"},
    "int4 g128": {"qtype": "int4", "tile": 128},
    "fp8 e4m3": {"qtype": "float8_e4m3fn"},
    "fp8 e5m2": {"qtype": "float8_e5m2"},
    "nf4 g64": {"qtype": "nf4", "tile": 64},
    "mxfp8": {"qtype": "mxfp8", "tile": 32},
    "mxfp4": {"qtype": "mxfp4", "tile": 32},
    "nvfp4": {"qtype": "nvfp4", "tile": 16},
    "int8 minmax": {"qtype": "int8", "calibration_method": "minmax"},
}
STEPS = ("quantize first", "quantize", "dequantize first", "dequantize")


def milliseconds(fn: Callable, calls: int) -> tuple[float, float]:
    """(first call, median of some later ones)."""
    import jax

    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(1e3 * (time.perf_counter() - start))
    return times[0], statistics.median(times[1:])


def measure(size: int, calls: int) -> dict[str, dict[str, float]]:
    """{case: {step: milliseconds}} for the package that is installed as `qwix`."""
    import jax
    import jax.numpy as jnp

    import qwix

    x = jax.block_until_ready(jax.random.normal(jax.random.key(0), (size, size)))
    copy = jax.jit(lambda x: x + 1)
    results = {"copy": {"quantize": milliseconds(lambda: copy(x), calls)[1]}}
    for name, case in CASES.items():
        arguments = dict(case)
        qtype, tile = arguments.pop("qtype"), arguments.pop("tile", None)
        if "float8" in qtype:
            qtype = getattr(jnp, qtype)
        # Per output channel, with tiles along the inputs: (inputs, outputs).
        arguments |= {"channelwise_axes": (1,), "tiled_axes": {0: tile} if tile else {}}
        times = milliseconds(lambda q=qtype, a=arguments: qwix.quantize(x, q, **a), calls)
        array = qwix.quantize(x, qtype, **arguments)
        times += milliseconds(lambda array=array: qwix.dequantize(array), calls)
        results[name] = dict(zip(STEPS, times, strict=True))
    return results


def measure_in_process(python: str, size: int, calls: int) -> dict[str, dict[str, float]]:
    # A cache of compilations would make the first call of a second round a later one.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("PYTHONPATH", None)
    command = [python, __file__, "--measure", "--size", str(size), "--calls", str(calls)]
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        case: {step: statistics.median(r[case][step] for r in rounds) for step in steps}
        for case, steps in rounds[0].items()
    }


def show(ours: dict[str, dict[str, float]], original: dict[str, dict[str, float]] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("format", *(f"{step}, ms" for step in STEPS), title="median time, (original / ours)")
    for case, steps in ours.items():
        cells = []
        for step in STEPS:
            cell = f"{steps[step]:.1f}" if step in steps else ""
            if cell and original is not None:
                cell += f" ({original[case][step] / steps[step]:.1f}x)"
            cells.append(cell)
        table.add_row(case, *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", metavar="PYTHON", help="an interpreter with the original")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns (4096)")
    parser.add_argument("--calls", type=int, default=7, help="later calls in each process (7)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each package (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times to a file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.size, options.calls)))
        return

    pythons = {"ours": sys.executable}
    if options.original:
        pythons["original"] = options.original
    rounds: dict[str, list] = {name: [] for name in pythons}
    for _ in range(options.rounds):
        for name, python in pythons.items():
            rounds[name].append(measure_in_process(python, options.size, options.calls))
    result = {name: medians(measured) for name, measured in rounds.items()}
    show(result["ours"], result.get("original"))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
