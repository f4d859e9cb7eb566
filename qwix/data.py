"""Real text that every machine has: the docstrings of the Python standard library.

The sources are parsed and never imported, so nothing runs and the result depends only on the files
of this Python version. Modules are split in two by a hash of their name: texts to calibrate with
and texts to measure with never come from the same module.
"""

import ast
import collections
import dataclasses
import hashlib
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
    calibration. Modules come in the order of this hash: the first of them are a sample of all.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if relative.parts[0].removesuffix(".py") not in sys.stdlib_module_names:
            continue
        if _SKIPPED.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        if digest[-1] % 2 == (part == "evaluation"):
            modules[digest] = (relative.as_posix(), path)
    for _, (name, path) in sorted(modules.items()):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # Some distributions ship templates as .py files.
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield name, text


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

    A pair has 4 to 40 words before and at least 15 after; a module gives at most 8 pairs.
    """
    pairs: dict[str, str] = {}
    documents: set[str] = set()
    per_module: collections.Counter[str] = collections.Counter()
    for module, text in stdlib_docstrings("evaluation"):
        if len(pairs) == limit:
            break
        query, document = split_first_sentence(text)
        if not 4 <= len(query.split()) <= 40 or len(document.split()) < 15:
            continue
        if query in pairs or document in documents or per_module[module] == 8:
            continue
        per_module[module] += 1
        pairs[query] = document
        documents.add(document)
    return RetrievalSet(list(pairs), list(pairs.values()))


def docstring_text(part: Literal["calibration", "evaluation"], *, min_characters: int = 200) -> str:
    """All docstrings of one half of the modules that are longer than `min_characters`, a blank line between two.

    Modules come in the order of their paths.
    """
    docstrings = sorted(stdlib_docstrings(part), key=lambda item: item[0])
    return "\n\n".join(text for _, text in docstrings if len(text) > min_characters)


def calibration_texts(limit: int = 128) -> list[str]:
    """At most `limit` docstrings from modules that `retrieval_set` does not use, 5 from each."""
    texts: dict[str, None] = {}
    per_module: collections.Counter[str] = collections.Counter()
    for module, text in stdlib_docstrings("calibration"):
        if len(texts) == limit:
            break
        if len(text.split()) >= 20 and per_module[module] < 5:
            per_module[module] += 1
            texts[" ".join(text.split())] = None
    return list(texts)
