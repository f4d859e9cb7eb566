import re
from html.parser import HTMLParser

import numpy as np
import pytest

from qwix import report
from qwix.evaluation import Measures


def row(name, bits, error, layers=3):
    return report.Row(
        name=name,
        description=f"{name} <b>weights</b>",
        disk_bytes=int(bits * 1e6),
        bits_per_weight=bits,
        weight_errors={f"layers/{i}/up/kernel": error * (1 + i) for i in range(4)},
        measures=Measures(
            cosine_mean=1 - error,
            cosine_worst=1 - 2 * error,
            recall_at_1=0.5 - error,
            recall_at_10=0.9 - error,
            ms_per_text=12.345,
            layer_errors=tuple(error * (1 + i) for i in range(layers)),
        ),
    )


ROWS = [row("float32", 32, 0.0), row("int8", 8.06, 0.001), row("int4-g32", 5, 0.04)]


class Checker(HTMLParser):
    """Collects what a page refers to, and whether its tags close in order."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "stop", "image", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.references, self.tags, self.cells = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td" and data.strip():
            self.cells.append(data.strip())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    facts = {"Texts": "a & b"}
    report.write_report(path, ROWS, title="A <model>", summary="All of it.", facts=facts)
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.tags.count("svg") == 3
    assert "script" not in checker.tags
    assert all(reference.startswith("#") for reference in checker.references)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_text_is_escaped(page):
    assert "<h1>A &lt;model&gt;</h1>" in page
    assert "int8 &lt;b&gt;weights&lt;/b&gt;" in page
    assert "a &amp; b" in page


def test_the_table_holds_the_numbers(page):
    checker = Checker()
    checker.feed(page)
    start = checker.cells.index("int4-g32")
    expected = ["int4-g32", "5.0", "6.40×", "5.00", "0.96000", "0.92000", "0.460", "0.860", "12.35"]
    assert checker.cells[start : start + 9] == expected


def test_the_best_of_the_quantized_is_marked(page):
    assert re.findall(r'class="best">\s*([\d.]+)<', page) == ["0.99900"]


def test_the_worst_weight_is_named(page):
    cells = Checker()
    cells.feed(page)
    at = len(cells.cells) - cells.cells[::-1].index("int4-g32") - 1
    assert cells.cells[at : at + 3] == ["int4-g32", "layers/3/up/kernel", "16.00 %"]


def test_the_same_numbers_give_the_same_plots():
    first, second = (report._svg(report.layer_plot(ROWS[1:]), "x") for _ in range(2))
    assert first == second
    assert 'role="img" aria-label="x"' in first


def test_plots_show_every_recipe_and_value():
    axes = report.size_plot(ROWS).axes[0]
    assert sorted(t.get_text() for t in axes.texts) == ["int4-g32", "int8"]
    points = sorted(tuple(c.get_offsets()[0]) for c in axes.collections)
    np.testing.assert_allclose(points, [(5, 0.04), (8.06, 0.001)])
    axes = report.layer_plot(ROWS[1:]).axes[0]
    assert [t.get_text() for t in axes.texts] == ["0.1 %", "0.2 %", "0.3 %", "4 %", "8 %", "12 %"]
    axes = report.weight_plot(ROWS[1:]).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["int8", "int4-g32"]
    assert [len(c.get_offsets()) for c in axes.collections] == [4, 4]


def test_names_of_close_points_do_not_cover_each_other():
    points = [(8.0, 1e-3, "a"), (8.1, 1e-3, "b"), (8.0, 1.05e-3, "c"), (4.5, 1e-3, "d"), (4.2, 1e-1, "e")]
    placed = {name: rest for *rest, name in report.place_labels(points)}
    for x, y, name in points:
        assert placed[name][:2] == [x, y]
        assert x < placed[name][2] < x + 1
    heights = sorted(np.log10(placed[name][3]) for name in "abc")
    assert np.diff(heights).min() > 0.1  # Of the two decades that the plot shows.
    assert placed["d"][3] == pytest.approx(1e-3)
    assert placed["e"][3] == pytest.approx(1e-1)


def test_equal_and_zero_errors_can_be_drawn(tmp_path):
    rows = [ROWS[0], row("same", 8, 0.0)]
    report.write_report(tmp_path / "r.html", rows, title="t", summary="", facts={})
    assert (tmp_path / "r.html").stat().st_size > 1000


def test_the_machine_is_described():
    facts = report.machine()
    assert set(facts) == {"Device", "Processor", "System", "Versions", "Date"}
    assert all(facts.values())
