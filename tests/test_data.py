import hashlib

import pytest

from qwix import data


@pytest.mark.parametrize(
    ("docstring", "first", "rest"),
    [
        ("Return x.", "Return x.", ""),
        ("Return x. Or y.", "Return x.", "Or y."),
        ("Open a\nfile.\n\nThe mode\nis text.", "Open a file.", "The mode is text."),
        ("No stop here\n\nThe rest.", "No stop here", "The rest."),
        ("Use it, e.g. For loops. Then stop.", "Use it, e.g. For loops.", "Then stop."),
        ("See a.b.c for more. It is so.\n\nMore.", "See a.b.c for more.", "It is so. More."),
    ],
)
def test_the_first_sentence_ends_where_a_reader_would_say(docstring, first, rest):
    assert data.split_first_sentence(docstring) == (first, rest)


@pytest.fixture(scope="module")
def pairs():
    return data.retrieval_set()


def test_the_retrieval_set_is_large_and_distinct(pairs):
    assert len(pairs.queries) == len(pairs.documents) == 500
    assert len(set(pairs.queries)) == len(set(pairs.documents)) == 500
    assert all(4 <= len(q.split()) <= 40 for q in pairs.queries)
    assert all(len(d.split()) >= 15 for d in pairs.documents)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(pairs):
    few = data.retrieval_set(30)
    assert few.queries == pairs.queries[:30]
    assert few.documents == pairs.documents[:30]


def modules(part, count):
    """The files of the first `count` modules."""
    names = {}
    for name, _ in data.stdlib_docstrings(part):
        names[name] = None
        if len(names) == count:
            break
    return set(names)


def test_calibration_and_evaluation_never_share_a_module(pairs):
    halves = {part: modules(part, 30) for part in ("calibration", "evaluation")}
    for part, names in halves.items():
        assert len(names) == 30
        for name in names:
            odd = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2
            assert odd == (part == "evaluation")
    texts = data.calibration_texts(40)
    assert len(set(texts)) == 40
    assert not set(texts) & set(pairs.documents)


def test_the_text_of_one_half_is_long_docstrings_in_order(monkeypatch):
    found = [("b.py", "long enough"), ("a.py", "second longest"), ("a.py", "short"), ("a.py", "third longest")]
    monkeypatch.setattr(data, "stdlib_docstrings", {"evaluation": found}.get)
    text = data.docstring_text("evaluation", min_characters=5)
    assert text == "second longest\n\nthird longest\n\nlong enough"
