"""One HTML file about a quantization run, with its plots inside: nothing else to fetch or keep."""

import dataclasses
import datetime
import html
import io
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwix._src.utils.extras import import_extra
from qwix.evaluation import Measures
from qwix.version import __version__


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a run.

    Attributes:
      name: of the recipe, or 'float32'.
      description: what it does, in a line.
      disk_bytes: size of its checkpoint's arrays.
      bits_per_weight: of the linear layers in the checkpoint, scales included.
      weight_errors: relative error of each quantized weight, by path; empty for the float model.
      measures: against the float model.
    """

    name: str
    description: str
    disk_bytes: int
    bits_per_weight: float
    weight_errors: dict[str, float]
    measures: Measures


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = f"qwix {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    return {
        "Device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "Processor": f"{cpu}, {os.cpu_count()} cores",
        "System": f"{platform.system()} {platform.machine()}",
        "Versions": versions,
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_report(path: pathlib.Path, rows: Sequence[Row], *, title: str, summary: str, facts: dict[str, str]) -> None:
    """Writes the report on `rows`, the float model first.

    Args:
      path: the HTML file.
      rows: of which the first is the float model.
      title: the heading.
      summary: a sentence or two below it.
      facts: what was measured and how, as pairs of a term and its text.
    """
    jinja2 = import_extra("jinja2")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mb"] = lambda n: f"{n / 1e6:.1f}"
    template = environment.from_string(_TEMPLATE)
    quantized = rows[1:]
    page = template.render(
        title=title,
        summary=summary,
        rows=rows,
        best_cosine=max(row.measures.cosine_mean for row in quantized),
        facts={**facts, **machine()},
        size_plot=_svg(size_plot(rows), "Size against accuracy, one point a recipe"),
        layer_plot=_svg(layer_plot(quantized), "Error of each layer's output for each recipe"),
        weight_plot=_svg(weight_plot(quantized), "Error of each weight for each recipe"),
        weights=_worst_weights(quantized),
    )
    path.write_text(page, encoding="utf-8")


def _worst_weights(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """For each recipe the weight that lost most: (recipe, path, relative error)."""
    worst = []
    for row in rows:
        path = max(row.weight_errors, key=row.weight_errors.__getitem__)
        worst.append((row.name, path, row.weight_errors[path]))
    return worst


# Blue for 8 bits, orange for fewer: the one distinction that the eye has to make in every plot.
_EIGHT, _FEWER, _INK, _GRID = "#2b6cb0", "#d9702b", "#2d3748", "#e2e8f0"


def _color(row: Row) -> str:
    return _FEWER if row.bits_per_weight < 7 else _EIGHT


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that no global state of matplotlib knows, so that nothing has to be closed."""
    figure_module = import_extra("matplotlib.figure")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#a0aec0")
    axes.tick_params(colors=_INK, labelsize=9)
    return figure, axes


def size_plot(rows: Sequence[Row]) -> Any:
    """Bits of a quantized weight against distance from the float embeddings."""
    figure, axes = _figure(7.6, 4.6)
    points = []
    for row in rows[1:]:
        x = row.bits_per_weight
        y = max(1 - row.measures.cosine_mean, 1e-7)
        axes.scatter(x, y, s=46, color=_color(row), zorder=3)
        points.append((x, y, row.name))
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight of the linear layers, scales included", color=_INK)
    axes.set_ylabel("1 - mean cosine to the float embeddings", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8, zorder=0)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    axes.set_xlim(min(xs) - 0.4, max(xs) + 1.6)
    axes.set_ylim(min(ys) / 1.8, max(ys) * 1.8)
    for x, y, text_x, text_y, name in place_labels(points):
        line = {"arrowstyle": "-", "color": "#a0aec0", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3}
        axes.annotate(name, (x, y), (text_x, text_y), ha="left", va="center", size=8.5, color=_INK, arrowprops=line)
    return figure


def place_labels(
    points: Sequence[tuple[float, float, str]],
) -> list[tuple[float, float, float, float, str]]:
    """Places names to the right of their points, one below the other where points are close.

    Args:
      points: (x, y, name); y is drawn on a logarithmic axis.

    Returns:
      (x, y, x of the text, y of the text, name) of each.
    """
    clusters: list[list[tuple[float, float, str]]] = []
    for point in sorted(points):
        if clusters and point[0] - clusters[-1][-1][0] < 1.5:
            clusters[-1].append(point)
        else:
            clusters.append([point])
    heights = np.log([y for _, y, _ in points])
    gap = max((heights.max() - heights.min()) / 18, 0.05)
    placed = []
    for cluster in clusters:
        ordered = sorted(cluster, key=lambda point: (point[1], point[0]))
        at = np.log([y for _, y, _ in ordered])
        text = at.copy()
        for i in range(1, len(text)):
            text[i] = max(text[i], text[i - 1] + gap)
        text -= (text - at).mean()  # Spread both ways, not only upwards.
        right = max(x for x, _, _ in cluster) + 0.25
        placed += [(x, y, right, float(np.exp(t)), n) for (x, y, n), t in zip(ordered, text, strict=True)]
    return placed


def layer_plot(rows: Sequence[Row]) -> Any:
    """A table of recipe and layer, colored by the error of the layer's output."""
    errors = np.array([row.measures.layer_errors for row in rows])
    layers = [str(i) for i in range(errors.shape[1])]
    return _heatmap(errors, [row.name for row in rows], layers, "encoder layer")


def weight_plot(rows: Sequence[Row]) -> Any:
    """The relative errors of the quantized weights, a dot each and a bar at the median."""
    figure, axes = _figure(7.6, 0.36 * len(rows) + 0.8)
    for i, row in enumerate(rows):
        # A weight without error still has its dot on the logarithmic axis.
        values = [max(value, 1e-9) for value in row.weight_errors.values()]
        axes.scatter(values, [i] * len(values), s=16, alpha=0.45, color=_color(row), zorder=3)
        axes.plot([np.median(values)] * 2, [i - 0.3, i + 0.3], color=_INK, linewidth=1.6, zorder=4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative error of a weight", color=_INK)
    axes.grid(axis="x", color=_GRID, linewidth=0.8, zorder=0)
    return figure


def _heatmap(values: np.ndarray, names: list[str], columns: list[str], label: str) -> Any:
    figure, axes = _figure(7.6, 0.36 * len(names) + 0.8)
    colors = import_extra("matplotlib.colors")
    low, high = max(values.min(), 1e-9), max(values.max(), 1e-8)
    # Light to dark in one hue; the number in each cell says the rest.
    scale = colors.LinearSegmentedColormap.from_list("error", ["#f7fafc", "#90cdf4", "#2b6cb0"])
    norm = colors.LogNorm(low, high)
    axes.pcolormesh(values.clip(low), cmap=scale, norm=norm, edgecolors="white", linewidth=2)
    for (i, j), value in np.ndenumerate(values):
        ink = "white" if norm(max(value, low)) > 0.75 else _INK
        axes.text(j + 0.5, i + 0.5, _percent(value), ha="center", va="center", size=8.5, color=ink)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_xlabel(label, color=_INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    return figure


def _percent(value: float) -> str:
    return f"{value * 100:.2g} %"


def _svg(figure: Any, description: str) -> Any:
    """The figure as an inline SVG element that says to a screen reader what it shows."""
    markup = import_extra("markupsafe").Markup
    buffer = io.StringIO()
    # No date and fixed ids: the same numbers give the same file.
    with import_extra("matplotlib").rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    label = f'<svg role="img" aria-label="{html.escape(description, quote=True)}" '
    return markup(svg.replace("<svg ", label, 1))


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; color: #1a202c;
       background: #fff; max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .3rem; }
p { margin: .3rem 0 1rem; color: #4a5568; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric:
tabular-nums; } th, td { padding: .42rem .6rem; text-align: right; border-bottom: 1px solid
#e2e8f0; white-space: nowrap; } th { font-weight: 600; color: #4a5568; border-bottom: 2px solid
#cbd5e0; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; padding-left:
0; } td:first-child { font-weight: 600; }
.text { text-align: left; }
td small { display: block; font-weight: 400; color: #718096; white-space: normal; min-width: 13rem;
} tr.float td { background: #f7fafc; }
.best { color: #22704a; font-weight: 600; }
svg { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .9rem; }
dt { color: #718096; } dd { margin: 0; }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; border-radius: 50%;
               margin: 0 .35em 0 .1em; background: var(--c); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ summary }} All measures compare with the float model on the same texts; the nearest
to it is green.</p>
<div class="scroll"><table>
<thead><tr>
<th>Recipe</th><th>On disk<br>MB</th><th>Times<br>smaller</th><th>Bits a<br>weight</th>
<th>Cosine<br>mean</th><th>Cosine<br>worst</th><th>Recall<br>at 1</th><th>Recall<br>at 10</th>
<th>ms a<br>text</th>
</tr></thead>
<tbody>
{% for row in rows %}
{% set m = row.measures %}
<tr{% if loop.first %} class="float"{% endif %}>
<td>{{ row.name }}<small>{{ row.description }}</small></td>
<td>{{ row.disk_bytes|mb }}</td>
<td>{{ "%.2f"|format(rows[0].disk_bytes / row.disk_bytes) }}×</td>
<td>{{ "%.2f"|format(row.bits_per_weight) }}</td>
<td{% if not loop.first and m.cosine_mean == best_cosine %} class="best"{% endif %}>
{{- "%.5f"|format(m.cosine_mean) }}</td>
<td>{{ "%.5f"|format(m.cosine_worst) }}</td>
<td>{{ "%.3f"|format(m.recall_at_1) }}</td>
<td>{{ "%.3f"|format(m.recall_at_10) }}</td>
<td>{{ "%.2f"|format(m.ms_per_text) }}</td>
</tr>
{% endfor %}
</tbody></table></div>

<h2>Size against accuracy</h2>
<p>How far the embeddings move from the float model's, against the bits that a weight of the
linear layers takes, scales included. Down and left is better.
<span class="key" style="--c:#2b6cb0">8 bits</span> <span class="key"
style="--c:#d9702b">fewer</span></p> {{ size_plot }}

<h2>Error per layer</h2>
<p>Each encoder layer's output against the float model's, ‖y − y<sub>float</sub>‖ /
‖y<sub>float</sub>‖, over the tokens of one batch. Errors of earlier layers are part of later
ones.</p> {{ layer_plot }}

<h2>Error per weight</h2>
<p>Each quantized weight against its float value, ‖W − Q‖ / ‖W‖: a dot a weight, a bar at the
median. Methods that look at activations, such as AWQ, trade a larger error here for a smaller one
above.</p> {{ weight_plot }}
<div class="scroll"><table>
<thead><tr><th>Recipe</th><th class="text">Weight that lost most</th><th>Its error</th></tr></thead>
<tbody>
{% for name, path, error in weights %}
<tr><td>{{ name }}</td><td class="text">{{ path }}</td><td>{{ "%.2f"|format(error * 100) }} %</td></tr>
{% endfor %}
</tbody></table></div>

<h2>How this was measured</h2>
<dl>
{% for term, text in facts.items() %}
<dt>{{ term }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
</body>
</html>
"""
