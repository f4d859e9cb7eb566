"""How fast are `quantize` and `dequantize` of a 4096 x 4096 float32 array?

First call (with compilation) and the median of later ones, for each format. `--original PYTHON` runs the same with
another interpreter, in whose environment another implementation is installed, turn by turn, and prints the ratio.

    python benchmarks/quantize.py [--size N] [--original PYTHON] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

CASES = {
    "int8": {"qtype": "int8", "channelwise_axes": (1,)},
    "int4 g128": {"qtype": "int4", "channelwise_axes": (1,), "tiled_axes": {0: 128}},
    "fp8 e4m3": {"qtype": "float8_e4m3fn", "channelwise_axes": (1,)},
    "nf4 g64": {"qtype": "nf4", "channelwise_axes": (1,), "tiled_axes": {0: 64}},
    "mxfp4 g32": {"qtype": "mxfp4", "channelwise_axes": (1,), "tiled_axes": {0: 32}},
    "mxfp8 g32": {"qtype": "mxfp8", "channelwise_axes": (1,), "tiled_axes": {0: 32}},
    "nvfp4 g16": {"qtype": "nvfp4", "channelwise_axes": (1,), "tiled_axes": {0: 16}},
}


def measure(case: str, size: int, repeats: int = 7) -> dict[str, float]:
    """Milliseconds of the first and of later calls."""
    import jax
    import jax.numpy as jnp

    import qwix

    arguments = dict(CASES[case])
    if hasattr(jnp, arguments["qtype"]):
        arguments["qtype"] = getattr(jnp, arguments["qtype"])
    x = jax.block_until_ready(jax.random.normal(jax.random.key(0), (size, size)))

    def timed(fn, *args, **kwargs):
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            out = jax.block_until_ready(fn(*args, **kwargs))
            seconds.append(time.perf_counter() - start)
        return out, seconds[0] * 1e3, statistics.median(seconds[1:]) * 1e3

    q, first_quantize, quantize = timed(qwix.quantize, x, **arguments)
    _, first_dequantize, dequantize = timed(qwix.dequantize, q)
    return {
        "quantize, first": first_quantize,
        "quantize": quantize,
        "dequantize, first": first_dequantize,
        "dequantize": dequantize,
    }


def in_process(python: str, case: str, size: int) -> dict[str, float]:
    command = [python, __file__, "--case", case, "--size", str(size)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--original", help="interpreter with another implementation to compare with")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--case", choices=CASES, help="measure this one in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.size)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in CASES:
        results[case] = {"this": in_process(sys.executable, case, args.size)}
        if args.original:
            results[case]["original"] = in_process(args.original, case, args.size)
        for what, ms in results[case]["this"].items():
            line = f"{case:>10}  {what:<18} {ms:9.1f} ms"
            if args.original:
                other = results[case]["original"][what]
                line += f"   original {other:9.1f} ms   {other / ms:6.2f} times as fast"
            print(line, flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
