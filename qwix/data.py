"""Real text that every machine has: the docstrings of the Python standard library.

The sources are parsed and never imported, so nothing runs and the result depends only on the files
of this Python version. Modules are split in two by a hash of their name: texts to calibrate with
and texts to measure with never come from the same module.
"""

import ast
import dataclasses
import hashlib
import inspect
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from typing import Literal

# Standard library packages that are no documentation of anything, or differ between systems.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Queries and the one document that answers each.

    Attributes:
      queries: first sentences of docstrings.
      documents: what follows each of them; documents[i] belongs to queries[i].
    """

    queries: list[str]
    documents: list[str]


def stdlib_docstrings(part: Literal["calibration", "evaluation"]) -> Iterator[tuple[str, str]]:
    """Yields (module file, cleaned docstring) for one half of the standard library's modules.

    A module is for evaluation if the SHA-256 of its path below the library is odd, else for
    calibration.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0].removesuffix(".py") not in sys.stdlib_module_names:
            continue
        if _SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        odd = hashlib.sha256(name.as_posix().encode()).digest()[-1] % 2
        if odd != (part == "evaluation"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # Some distributions ship templates as .py files.
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text:
                    yield name.as_posix(), inspect.cleandoc(text)


def split_first_sentence(text: str) -> tuple[str, str]:
    """The first sentence of a docstring and the rest, both with runs of white space made one space.

    >>> split_first_sentence("Return the sum.\\n\\nIt is taken from left\\n  to right.")
    ('Return the sum.', 'It is taken from left to right.')
    """
    paragraph, _, rest = text.partition("\n\n")
    paragraph = " ".join(paragraph.split())
    end = re.search(r"(?<![eE]\.g)(?<!i\.e)[.!?] (?=[A-Z])", paragraph)
    if end:
        paragraph, rest = paragraph[: end.start() + 1], f"{paragraph[end.end() :]} {rest}"
    return paragraph, " ".join(rest.split())


def retrieval_set(limit: int = 500) -> RetrievalSet:
    """At most `limit` pairs of a docstring's first sentence and its rest, none of them twice.

    A pair has 4 to 40 words before and at least 15 after. Which ones are taken, when there are
    more than `limit`, depends on a hash of the text, so that one changed docstring changes one
    pair.
    """
    pairs: dict[str, str] = {}
    documents = set()
    for _, text in stdlib_docstrings("evaluation"):
        query, document = split_first_sentence(text)
        if not 4 <= len(query.split()) <= 40 or len(document.split()) < 15:
            continue
        if query in pairs or document in documents:
            continue
        pairs[query] = document
        documents.add(document)
    chosen = sorted(pairs, key=lambda query: hashlib.sha256(query.encode()).digest())[:limit]
    return RetrievalSet(chosen, [pairs[query] for query in chosen])


def calibration_texts(limit: int = 128) -> list[str]:
    """At most `limit` docstrings from modules that `retrieval_set` does not use."""
    texts = {text for _, text in stdlib_docstrings("calibration") if len(text.split()) >= 20}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:limit]
