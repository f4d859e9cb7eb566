"""One linear layer on a CPU: the native kernels, XLA, and (with --peers PYTHON) ONNX Runtime and PyTorch.

    python benchmarks/cpu_linear.py [--peers PYTHON] [--shapes 4096x4096 ...] [--rows 1 16 512] [--plot FILE]

PYTHON is an interpreter that has numpy, onnx, onnxruntime and torch; a process of it for each of the two lives as long
as this one, stopped but for its turns. All are measured in turns, a short time each, for some rounds, so that a noisy
moment of the machine hits all of them. A number is the median of all calls, in milliseconds. A call of ours is one
jitted call from Python, a peer's one call of a session or module, each with all the threads that it takes by default.

With few rows a layer is bound by memory. "again": one weight again and again, which stays in the last-level cache if it
fits; "in turn": weights in turn that are twice as large as that cache together. `machine_peak.cc` measures what the
machine can do, if there is a compiler.
"""

import abc
import argparse
import functools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
ROUNDS, BUDGET_S = 7, 0.05  # of each measurement
FEW_ROWS = 4  # up to which weights are also read in turn

# Our formats: (qtype, tile, int8 activations).
FORMATS: dict[str, tuple[str, int | None, bool]] = {
    "int8, int8 activations": ("int8", None, True),
    "int4 g32, int8 activations": ("int4", 32, True),
    "int4 g128, int8 activations": ("int4", 128, True),
    "mxfp4 g32, int8 activations": ("mxfp4", 32, True),
    "int8": ("int8", None, False),
    "int4 g32": ("int4", 32, False),
    "int4 g128": ("int4", 128, False),
    "nf4 g64": ("nf4", 64, False),
    "fp8": ("float8_e4m3fn", None, False),
    "mxfp4 g32": ("mxfp4", 32, False),
}
# Which of the peers' does the same as one of ours.
SAME = {
    "int8, int8 activations": ["onnxruntime int8 dynamic", "torch int8 dynamic"],
    "int4 g32, int8 activations": ["onnxruntime int4 g32, int8 compute"],
    "int4 g128, int8 activations": ["onnxruntime int4 g128, int8 compute"],
    "int4 g32": ["onnxruntime int4 g32, float compute"],
    "int4 g128": ["onnxruntime int4 g128, float compute"],
}
# Those whose weights are also read in turn.
IN_TURN = (
    "jax f32",
    "onnxruntime f32",
    *(f"qwix {name}" for name in SAME),
    *(p for same in SAME.values() for p in same),
)


def times_ms(call: Callable[[int], object]) -> list[float]:
    """Of calls with the numbers 0, 1, ..., for a short time, after two that do not count."""
    time.sleep(0.02)  # threads of another library stop spinning
    for i in range(2):
        call(i)
    times: list[float] = []
    end = time.perf_counter() + BUDGET_S
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        call(len(times))
        times.append(1e3 * (time.perf_counter() - start))
    return times


def cache_bytes() -> int:
    """Of the last level, as Linux tells; else 32 MiB."""
    sizes = sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    text = sizes[-1].read_text().strip() if sizes else "32M"
    return int(text[:-1]) * {"K": 1024, "M": 1024**2, "G": 1024**3}[text[-1]]


def copies_of(nbytes: int) -> int:
    """How many weights of that size do not fit the last-level cache together (or have 256 MiB, where it is huge)."""
    return max(2, -(-min(2 * cache_bytes(), 256 * 1024**2) // nbytes))


class Ours:
    """The layers of this library and of JAX."""

    def prepare(self, k: int, n: int) -> list[str]:
        """Makes the weights of a shape; the names of the layers."""
        import jax
        import jax.numpy as jnp

        from qwix._src.core import qarray
        from qwix.contrib import padded_ptq
        from qwix.cpu import packed

        rng = np.random.default_rng(0)
        w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
        self.inputs = {m: jnp.asarray(rng.standard_normal((m, k)), jnp.float32) for m in ROWS}
        self.products: dict[str, Any] = {"jax f32": jax.jit(lambda x, w: x @ w)}
        # What makes one more weight.
        self.makers: dict[str, Callable[[], Any]] = {"jax f32": lambda: w.copy()}
        dims = (((1,), (0,)), ((), ()))
        for name, (qtype, tile, dynamic) in FORMATS.items():
            how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: tile} if tile else {})
            quantized = padded_ptq.quantize(w, how)
            self.makers[f"qwix {name}"] = functools.partial(packed.pack, quantized)
            how_x = qarray.HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: tile} if tile else {})

            def product(x, weight, how_x=how_x, dynamic=dynamic):
                x = qarray.UnquantizedQArray(x, how_x, padded_ptq) if dynamic else x
                return padded_ptq.dot_general(x, weight, dims)

            self.products[f"qwix {name}"] = jax.jit(product)
        self.weights = {name: [make()] for name, make in self.makers.items()}
        return list(self.products)

    def measure(self, name: str, rows: int, in_turn: bool) -> list[float]:
        import jax

        weights, product, x = self.weights[name], self.products[name], self.inputs[rows]
        if in_turn and len(weights) == 1:
            nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[0]))
            weights += [self.makers[name]() for _ in range(copies_of(nbytes) - 1)]
        some = weights if in_turn else weights[:1]
        return times_ms(lambda i: product(x, some[i % len(some)]).block_until_ready())


# name -> (what makes one more layer, bytes of its weight)
Makers = dict[str, tuple[Callable[[], Callable[[int], object]], int]]


class Peer(abc.ABC):
    """The layers of another library; lives in its interpreter."""

    @abc.abstractmethod
    def layers_of(self, k: int, n: int) -> Makers:
        """Those of a shape, by name."""

    def prepare(self, k: int, n: int) -> list[str]:
        rng = np.random.default_rng(0)
        self.inputs = {m: rng.standard_normal((m, k)).astype(np.float32) for m in ROWS}
        self.makers = self.layers_of(k, n)
        self.layers = {name: [make()] for name, (make, _) in self.makers.items()}
        return list(self.layers)

    def measure(self, name: str, rows: int, in_turn: bool) -> list[float]:
        layers, (make, nbytes) = self.layers[name], self.makers[name]
        while in_turn and len(layers) < copies_of(nbytes):
            layers.append(make())
        some = layers if in_turn else layers[:1]
        return times_ms(lambda i: some[i % len(some)](rows))

    def serve(self) -> None:
        """Does what a line of standard input says, one after the other."""
        for line in sys.stdin:
            name, *args = json.loads(line)
            print(json.dumps(getattr(self, name)(*args)), flush=True)


class OnnxRuntime(Peer):
    """The layers of ONNX Runtime."""

    def layers_of(self, k: int, n: int) -> Makers:
        from onnx import helper

        rng = np.random.default_rng(0)
        w = rng.standard_normal((k, n)).astype(np.float32)
        q = np.clip(np.round(w / (np.abs(w).max(0) / 127)), -127, 127).astype(np.int8)
        scale = (np.abs(w).max(0) / 127).astype(np.float32)
        dynamic = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["sums"]),
            helper.make_node("Cast", ["sums"], ["floats"], to=1),
            helper.make_node("Mul", ["xs", "ws"], ["scale"]),
            helper.make_node("Mul", ["floats", "scale"], ["y"]),
        ]
        makers: Makers = {
            "onnxruntime f32": (
                lambda: self._session(k, n, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}),
                w.nbytes,
            ),
            "onnxruntime int8 dynamic": (lambda: self._session(k, n, dynamic, {"w": q, "ws": scale}), q.nbytes),
        }
        for tile in (32, 128):
            for kind, level in (("int8 compute", 4), ("float compute", 1)):
                node = helper.make_node(
                    "MatMulNBits",
                    ["x", "w", "s"],
                    ["y"],
                    domain="com.microsoft",
                    K=k,
                    N=n,
                    bits=4,
                    block_size=tile,
                    accuracy_level=level,
                )
                codes = rng.integers(0, 256, (n, -(-k // tile), tile // 2), dtype=np.uint8)
                scales = rng.random(n * -(-k // tile)).astype(np.float32)
                makers[f"onnxruntime int4 g{tile}, {kind}"] = (
                    lambda node=node, codes=codes, scales=scales: self._session(
                        k, n, [node], {"w": codes, "s": scales}
                    ),
                    codes.nbytes + scales.nbytes,
                )

        return makers

    def _session(self, k: int, n: int, nodes: list[Any], constants: dict[str, np.ndarray]) -> Callable[[int], object]:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return lambda rows: session.run(None, {"x": self.inputs[rows]})


class Torch(Peer):
    """The layers of PyTorch."""

    def layers_of(self, k: int, n: int) -> Makers:
        import torch

        def linear(quantized: bool) -> Callable[[int], object]:
            module: Any = torch.nn.Linear(k, n, bias=False)
            if quantized:
                module = torch.ao.quantization.quantize_dynamic(
                    torch.nn.Sequential(module), {torch.nn.Linear}, dtype=torch.qint8
                )
            given = {m: torch.from_numpy(x) for m, x in self.inputs.items()}

            def call(rows: int) -> object:
                with torch.no_grad():
                    return module(given[rows])

            return call

        return {"torch f32": (lambda: linear(False), 4 * k * n), "torch int8 dynamic": (lambda: linear(True), k * n)}


PEERS: dict[str, type[Peer]] = {"onnxruntime": OnnxRuntime, "torch": Torch}


class Remote:
    """A peer in another interpreter, stopped but for its turns: threads of it that spin would take a core."""

    def __init__(self, python: str, peer: str, rows: list[int]):
        command = [python, "-W", "ignore", __file__, "--serve", peer, "--rows", *map(str, rows)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.send_signal(signal.SIGCONT)
            print(json.dumps([name, *args]), file=self.process.stdin, flush=True)
            if not (answer := self.process.stdout.readline()):
                raise RuntimeError("the process of a peer has ended: its errors are above")
            self.process.send_signal(signal.SIGSTOP)
            return json.loads(answer)

        return call


def measure(shapes: list[tuple[int, int]], rows: list[int], peers: list[Remote]) -> Iterator[dict[str, Any]]:
    """One record for each layer, number of rows, and way of reading weights."""
    mine = Ours()
    for k, n in shapes:
        makers: dict[str, Any] = dict.fromkeys(mine.prepare(k, n), mine)
        for peer in peers:
            makers |= dict.fromkeys(peer.prepare(k, n), peer)
        for m in rows:
            for in_turn in (False, True) if m <= FEW_ROWS else (False,):
                names = [name for name in makers if not in_turn or name in IN_TURN]
                times: dict[str, list[float]] = {name: [] for name in names}
                for _ in range(ROUNDS):
                    for name in names:
                        times[name] += makers[name].measure(name, m, in_turn)
                for name, found in times.items():
                    yield {"name": name, "m": m, "k": k, "n": n, "in_turn": in_turn, "ms": statistics.median(found)}
        print(f"K={k} N={n} done", file=sys.stderr)


def machine_peak() -> dict[str, Any] | None:
    """What `machine_peak.cc` prints; None without a compiler."""
    from qwix.cpu import build

    compiler = build.find_compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        program = os.path.join(scratch, "machine_peak")
        flags = ["-O3", "-std=c++17", "-march=native", "-pthread"]
        subprocess.run([*compiler, *flags, str(HERE / "machine_peak.cc"), "-o", program], check=True)
        threads = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        return json.loads(subprocess.run([program, threads], check=True, capture_output=True, text=True).stdout)


def weight_bytes(name: str, k: int, n: int) -> int:
    """Of one of our packed weights, with its scales."""
    qtype, tile, _ = FORMATS[name.removeprefix("qwix ")]
    bits = 4 if qtype in ("int4", "nf4", "mxfp4") else 8
    padded = -(-k // (tile or 8)) * (tile or 8)
    return -(-n // 16) * 16 * (padded * bits // 8 + 4 * (-(-k // tile) if tile else 1))


def report(records: list[dict[str, Any]], peak: dict[str, Any] | None) -> None:
    """Tables: times, the ratio to the better of the peers, and the share of what the machine can do."""
    at = {(r["name"], r["m"], r["k"], r["n"], r["in_turn"]): r["ms"] for r in records}
    for k, n, in_turn in dict.fromkeys((r["k"], r["n"], r["in_turn"]) for r in records):
        chosen = [r for r in records if (r["k"], r["n"], r["in_turn"]) == (k, n, in_turn)]
        columns, names = (list(dict.fromkeys(r[key] for r in chosen)) for key in ("m", "name"))
        how = "weights in turn, from memory" if in_turn else "one weight again and again"
        print(f"\nK = {k}, N = {n}, {how}: milliseconds\n")
        print("| M | " + " | ".join(map(str, columns)) + " |\n" + "|---" * (len(columns) + 1) + "|")
        for name in names:
            cells = [at[name, m, k, n, in_turn] for m in columns]
            print(f"| {name} | " + " | ".join(f"{ms:.3f}" for ms in cells) + " |")
        for name, same in SAME.items():
            peers = [p for p in same if p in names]
            if peers:
                best = [min(at[p, m, k, n, in_turn] for p in peers) for m in columns]
                ratios = [b / at[f"qwix {name}", m, k, n, in_turn] for m, b in zip(columns, best, strict=True)]
                print(f"| {name}: times as fast as the better peer | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    if peak is None:
        return
    print(f"\nThe machine: {peak['read_gb_s']} GB/s, {peak['int8_gmac_s']} G products/s ({peak['instruction']})\n")
    for name in FORMATS:
        for r in (r for r in records if r["name"] == f"qwix {name}"):
            if r["m"] == 1 and r["in_turn"]:
                rate = weight_bytes(name, r["k"], r["n"]) / r["ms"] / 1e6
                print(
                    f"{name}, {r['k']} x {r['n']}, M = 1: {rate:.1f} GB/s, {rate / peak['read_gb_s']:.0%} of memory's"
                )
            if r["m"] == 512 and "int8 activations" in name and peak["int8_gmac_s"]:
                rate = r["m"] * r["k"] * r["n"] / r["ms"] / 1e6
                share = rate / peak["int8_gmac_s"]
                print(f"{name}, {r['k']} x {r['n']}, M = 512: {rate:.0f} G products/s, {share:.0%} of the peak")


def plot(records: list[dict[str, Any]], path: str) -> None:
    """Times over rows, ours beside those of the peers, for the largest shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    k, n = max(((r["k"], r["n"]) for r in records), key=lambda shape: shape[0] * shape[1])
    panels = {
        "int8 weights and activations": ["int8, int8 activations", *SAME["int8, int8 activations"]],
        "int4 weights (g32), int8 activations": ["int4 g32, int8 activations", *SAME["int4 g32, int8 activations"]],
        "int4 weights (g32), float activations": ["int4 g32", *SAME["int4 g32"]],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 4), sharey=True, layout="constrained")
    styles = {
        "qwix": ("tab:blue", "o-"),
        "jax": ("tab:gray", "s--"),
        "onnxruntime": ("tab:orange", "^-"),
        "torch": ("tab:red", "v-"),
    }
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for name in ("jax f32", *(x if x.startswith(tuple(PEERS)) else f"qwix {x}" for x in names)):
            points = [
                (r["m"], r["ms"]) for r in records if (r["name"], r["k"], r["n"], r["in_turn"]) == (name, k, n, False)
            ]
            if points:
                color, style = styles[name.split(" ")[0]]
                ax.loglog(*zip(*sorted(points), strict=True), style, color=color, label=name, markersize=5)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("rows (M)")
        ax.set_xticks(ticks := sorted({r["m"] for r in records}), list(map(str, ticks)))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel(f"milliseconds, K = {k}, N = {n}")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


ROWS = [1, 2, 3, 4, 8, 16, 64, 512]


def main() -> None:
    """Prints the tables and writes results/cpu_linear.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the Python interpreter of the peers")
    shapes = ["4096x4096", "2048x2048", "1111x3001"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="KxN", help=f"default: {' '.join(shapes)}")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M")
    parser.add_argument("--plot", metavar="FILE", help="also a picture of the largest shape")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    ROWS[:] = args.rows
    if args.serve:
        PEERS[args.serve]().serve()
        return
    peak = machine_peak()
    peers = [Remote(args.peers, peer, args.rows) for peer in PEERS] if args.peers else []
    sizes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in args.shapes)]
    try:
        records = list(measure(sizes, args.rows, peers))
    finally:
        for peer in peers:
            peer.process.kill()
    report(records, peak)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu_linear.json").write_text(json.dumps({"machine": peak, "records": records}, indent=1))
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()
