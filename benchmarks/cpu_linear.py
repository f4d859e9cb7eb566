"""One linear layer on a CPU: the native kernels, XLA, and (with --peers PYTHON) ONNX Runtime and PyTorch.

    python benchmarks/cpu_linear.py [--peers PYTHON] [--sizes 2048 4096] [--rows 1 16 512]

PYTHON is an interpreter that has numpy, onnx, onnxruntime and torch. Each time is the median of repeated calls,
after warm-up and in turns (ours, then the peers'); the table has milliseconds. A call of ours is one jitted
call from Python, a peer's one call of a session or module, all with every thread that they take by default.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
BUDGET_S = 0.4  # of repeated calls


def median_ms(call: Callable[[], object]) -> float:
    """The median of up to 200 calls."""
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + BUDGET_S
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def ours(rows: int, size: int) -> dict[str, float]:
    """Milliseconds of JAX's float32 and of each packed format."""
    import jax
    import jax.numpy as jnp

    from qwix._src.core import dot_general, qarray
    from qwix._src.core.qarray import HowToQuantize
    from qwix.cpu import packed

    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((size, size)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((rows, size)), jnp.float32)
    dims = (((1,), (0,)), ((), ()))
    plain = jax.jit(lambda x, w: x @ w)
    result = {"jax f32": median_ms(lambda: plain(x, w).block_until_ready())}
    cases = [
        ("int8, int8 activations", "int8", None, True),
        ("int4 g32, int8 activations", "int4", 32, True),
        ("int4 g128, int8 activations", "int4", 128, True),
        ("mxfp4 g32, int8 activations", "mxfp4", 32, True),
        ("int8", "int8", None, False),
        ("int4 g32", "int4", 32, False),
        ("int4 g128", "int4", 128, False),
        ("nf4 g64", "nf4", 64, False),
        ("fp8", "float8_e4m3fn", None, False),
        ("mxfp4 g32", "mxfp4", 32, False),
    ]
    for name, qtype, tile, dynamic in cases:
        how = HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: tile} if tile else {})
        weight = packed.pack(qarray.quantize(w, how))
        how_x = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes={1: tile} if tile else {})

        def product(x, weight, how_x=how_x, dynamic=dynamic):
            lhs = qarray.UnquantizedQArray(x, how_x) if dynamic else x
            return dot_general.dot_general(lhs, weight, dims)

        product = jax.jit(product)
        result[f"qwix {name}"] = median_ms(lambda p=product, w=weight: p(x, w).block_until_ready())
    return result


def peers(rows: int, size: int) -> dict[str, float]:
    """Milliseconds of ONNX Runtime and PyTorch; runs in their interpreter."""
    import onnx
    import onnxruntime
    import torch
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    w = rng.standard_normal((size, size)).astype(np.float32)
    x = rng.standard_normal((rows, size)).astype(np.float32)

    def session(nodes, constants):
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, size])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    q = np.clip(np.round(w / (np.abs(w).max(0) / 127)), -127, 127).astype(np.int8)
    scale = (np.abs(w).max(0) / 127).astype(np.float32)
    sessions = {
        "onnxruntime f32": session([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}),
        "onnxruntime int8 dynamic": session(
            [
                helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
                helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["sums"]),
                helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["xs", "ws"], ["scale"]),
                helper.make_node("Mul", ["floats", "scale"], ["y"]),
            ],
            {"w": q, "ws": scale},
        ),
    }
    for tile in (32, 128):
        for name, level in (("int8 compute", 4), ("float compute", 1)):
            codes = rng.integers(0, 256, (size, size // tile, tile // 2), dtype=np.uint8)
            node = helper.make_node(
                "MatMulNBits",
                ["x", "w", "s"],
                ["y"],
                domain="com.microsoft",
                K=size,
                N=size,
                bits=4,
                block_size=tile,
                accuracy_level=level,
            )
            scales = rng.random(size * size // tile).astype(np.float32)
            sessions[f"onnxruntime int4 g{tile}, {name}"] = session([node], {"w": codes, "s": scales})
    result = {name: median_ms(lambda s=s: s.run(None, {"x": x})) for name, s in sessions.items()}
    linear = torch.nn.Linear(size, size, bias=False)
    dynamic = torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        given = torch.from_numpy(x)
        result["torch f32"] = median_ms(lambda: linear(given))
        result["torch int8 dynamic"] = median_ms(lambda: dynamic(given))
    return result


def main() -> None:
    """Prints the table and writes results/cpu_linear.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the Python interpreter of the peers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096], help="K = N")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 512], help="M")
    parser.add_argument("--as-peer", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        print(json.dumps(peers(*args.as_peer)))
        return
    table: dict[str, dict[str, float]] = {}
    for size in args.sizes:
        for rows in args.rows:
            column = f"M={rows} K=N={size}"
            found = ours(rows, size)
            if args.peers:
                command = [args.peers, __file__, "--as-peer", str(rows), str(size)]
                found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for name, value in found.items():
                table.setdefault(name, {})[column] = value
            print(f"{column} done", file=sys.stderr)
    columns = list(next(iter(table.values())))
    print("| ms | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu_linear.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
