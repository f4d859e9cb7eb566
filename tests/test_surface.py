"""Every module, name, parameter, default and field of the interface facts exists.

`data/SURFACE.md` holds the facts and `data/not_yet.txt` the names that later work builds. A name
that is missing without being listed fails, and so does a listed name that exists: the list only
shrinks.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

DATA = Path(__file__).parent / "data"

# Older import paths that programs still use, and the modules they stand for.
ALIASES = {
    "qwix._src.flax_util": "qwix._src.utils.flax_util",
    "qwix.lora": "qwix._src.providers.lora",
}

# Public names of `qwix` beyond the interface facts.
ADDED = {
    "QuantizationWarning",
    "add_adapter",
    "apply_recipe",
    "init_lora_params",
    "lora_params",
    "merge_lora",
    "optimize_for_inference",
    "set_adapter",
    "summarize",
}

EMPTY = inspect.Parameter.empty
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = inspect.Parameter.KEYWORD_ONLY
VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


class Param(NamedTuple):
    """One parameter of a listed signature; `default` is the listed text or None."""

    name: str
    kind: Any
    default: str | None


@dataclasses.dataclass
class Fact:
    """One listed name: a constant, a function, a class with its members, or a bare name."""

    module: str
    name: str
    signature: list[Param] | None = None
    value: str | None = None
    bases: list[str] | None = None  # None: not a class
    fields: list[tuple[str, str | None, bool]] = dataclasses.field(default_factory=list)
    properties: list[str] = dataclasses.field(default_factory=list)
    methods: dict[str, list[Param]] = dataclasses.field(default_factory=dict)
    members: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


def split_top_level(text: str) -> list[str]:
    """Splits at the commas that stand in no bracket and in no string.

    >>> split_top_level("a=(1, 2), b='x,y', *, c=<object object>")
    ['a=(1, 2)', "b='x,y'", '*', 'c=<object object>']
    """
    parts, depth, quoted, start = [], 0, False, 0
    for i, char in enumerate(text):
        quoted ^= char == "'"
        if quoted:
            continue
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def parse_signature(text: str) -> list[Param]:
    """The parameters of `a, b=1, *args, c=2, **kwargs`, without `self` and without a `/`."""
    params: list[Param] = []
    kind: Any = POSITIONAL
    for part in split_top_level(text):
        if part.startswith("**"):
            params.append(Param(part[2:], VAR_KEYWORD, None))
        elif part.startswith("*"):
            kind = KEYWORD
            if part != "*":
                params.append(Param(part[1:], VAR_POSITIONAL, None))
        elif part not in ("self", "/"):
            name, _, default = part.partition("=")
            params.append(Param(name, kind, default or None))
    return params


def parse_member(fact: Fact, line: str) -> None:
    """Adds one line below a class to its fact."""
    if match := re.fullmatch(r"field `(\w+)(?: = (.*))?`( \(static\))?", line):
        fact.fields.append((match[1], match[2], bool(match[3])))
    elif match := re.fullmatch(r"property `(\w+)`", line):
        fact.properties.append(match[1])
    elif match := re.fullmatch(r"`(\w+)\((.*)\)`", line):
        fact.methods[match[1]] = parse_signature(match[2])
    elif line.startswith("members "):
        fact.members = dict(re.findall(r"`(\w+)='([^']*)'`", line))
    else:
        raise ValueError(f"SURFACE.md: this line below class {fact.path} is not understood: {line}")


def parse_name(module: str, line: str) -> Fact:
    """The fact of one line below a module's heading."""
    if match := re.fullmatch(r"class `(\w+)(?:\((.*)\))?`", line):
        return Fact(module, match[1], bases=split_top_level(match[2] or ""))
    if match := re.fullmatch(r"`(\w+)\((.*)\)`", line):
        return Fact(module, match[1], signature=parse_signature(match[2]))
    if match := re.fullmatch(r"`(\w+)`(?: = (.*))?", line):
        return Fact(module, match[1], value=match[2])
    raise ValueError(f"SURFACE.md: this line below module {module} is not understood: {line}")


def parse_surface(text: str) -> tuple[list[str], list[Fact]]:
    """All modules and all facts, in the order of the file."""
    modules: list[str] = []
    facts: list[Fact] = []
    for line in text.splitlines():
        if line.startswith("## "):
            modules.append(line[3:])
        elif line.startswith("  - "):
            parse_member(facts[-1], line[4:])
        elif line.startswith("- ") and line != "- (no public names of its own)":
            facts.append(parse_name(modules[-1], line[2:]))
    return modules, facts


MODULES, FACTS = parse_surface((DATA / "SURFACE.md").read_text())
NOT_YET = (DATA / "not_yet.txt").read_text().split()
# A module is due once one of its names is; a module without names of its own always is.
DUE_MODULES = [
    module
    for module in MODULES
    if not (names := [fact.path for fact in FACTS if fact.module == module]) or not set(names) <= set(NOT_YET)
]


def spellings(value: object) -> Iterator[str]:
    """The ways in which the interface facts may write a default."""
    yield repr(value)
    if isinstance(value, ModuleType):
        yield value.__name__
    name = getattr(value, "__name__", None)
    if isinstance(name, str):
        yield name
        yield f"{getattr(value, '__module__', '')}.{name}"
    if "object at 0x" in repr(value):
        yield type(value).__name__


def is_default(value: object, listed: str) -> bool:
    """Whether a default is the listed one."""
    if listed == "<object object>":
        # A sentinel: something that no caller passes by accident.
        return not isinstance(value, (type(None), bool, int, float, str, tuple, list, dict))
    return listed in spellings(value)


def signature_errors(function: Any, listed: list[Param]) -> list[str]:
    """What keeps a call written for the listed signature from working, one line each."""
    actual = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    errors = []
    positional = [p.name for p in actual if p.kind in (POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)]
    wanted = [p.name for p in listed if p.kind is POSITIONAL]
    if positional[: len(wanted)] != wanted:
        errors.append(f"positional parameters are {positional}, listed are {wanted}")
    by_name = {p.name: p for p in actual}
    kinds = {p.kind for p in actual}
    for param in listed:
        if param.kind in (VAR_POSITIONAL, VAR_KEYWORD):
            if param.kind not in kinds:
                errors.append(f"takes no {param.kind.description} parameter, listed is {param.name}")
            continue
        found = by_name.get(param.name)
        if found is None:
            errors.append(f"parameter {param.name} is missing")
        elif found.kind is not param.kind:
            errors.append(f"{param.name} is {found.kind.description}, not {param.kind.description}")
        elif param.default is None:
            if found.default is not EMPTY:
                errors.append(f"{param.name} has a default, {found.default!r}, listed is none")
        elif found.default is EMPTY or not is_default(found.default, param.default):
            errors.append(f"{param.name} defaults to {found.default!r}, listed is {param.default}")
    for extra in by_name.keys() - {p.name for p in listed}:
        if by_name[extra].default is EMPTY and by_name[extra].kind not in (
            VAR_POSITIONAL,
            VAR_KEYWORD,
        ):
            errors.append(f"parameter {extra} is not listed and has no default")
    return errors


def field_errors(cls: type, listed: list[tuple[str, str | None, bool]]) -> list[str]:
    """What keeps a construction written for the listed fields from working, one line each."""
    if not dataclasses.is_dataclass(cls):
        return ["is not a dataclass"]
    errors = []
    actual = {field.name: field for field in dataclasses.fields(cls)}
    names = [name for name, _, _ in listed]
    if [name for name in actual if name in names] != names:
        errors.append(f"fields are {list(actual)}, listed are {names}")
    for name, default, static in listed:
        field = actual.get(name)
        if field is None:
            continue
        if field.default_factory is not dataclasses.MISSING:
            matches = default == f"{getattr(field.default_factory, '__name__', '')}()"
            matches = matches or (default is not None and is_default(field.default_factory(), default))
        elif field.default is dataclasses.MISSING:
            matches = default is None
        else:
            matches = default is not None and is_default(field.default, default)
        if not matches:
            errors.append(f"field {name} has not the listed default {default}: {field}")
        is_static = field.metadata.get("pytree_node") is False or field.metadata.get("static", False)
        if static and not is_static:
            errors.append(f"field {name} is a pytree child, listed is static")
    for name, field in actual.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if name not in names and required and field.init:
            errors.append(f"field {name} is not listed and has no default")
    return errors


def class_errors(cls: type, fact: Fact) -> list[str]:
    """Where a class differs from its fact, one line each."""
    if not isinstance(cls, type):
        return [f"is {cls!r}, listed is a class"]
    ancestors = {ancestor.__name__ for ancestor in cls.__mro__}
    errors = [f"does not derive from {base}" for base in fact.bases or () if base not in ancestors]
    if fact.fields:
        errors += field_errors(cls, fact.fields)
    for name in fact.properties:
        attribute = inspect.getattr_static(cls, name, None)
        if not isinstance(attribute, (property, functools.cached_property)):
            errors.append(f"property {name} is missing")
    for name, signature in fact.methods.items():
        method = getattr(cls, name, None)
        if not callable(method):
            errors.append(f"method {name} is missing")
        else:
            errors += [f"{name}: {error}" for error in signature_errors(method, signature)]
    for name, value in fact.members.items():
        if getattr(cls, name, None) != value:
            errors.append(f"member {name} is not {value!r}")
    return errors


def resolve(path: str) -> Any:
    """The object at a dotted path; ImportError or AttributeError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(path)


@pytest.mark.parametrize("module", DUE_MODULES)
def test_module_imports(module: str) -> None:
    importlib.import_module(module)


@pytest.mark.parametrize("fact", [f for f in FACTS if f.path not in NOT_YET], ids=lambda f: f.path)
def test_name_is_as_listed(fact: Fact) -> None:
    value = resolve(fact.path)
    errors = []
    if fact.bases is not None:
        errors = class_errors(value, fact)
    elif fact.signature is not None:
        errors = signature_errors(value, fact.signature)
    elif fact.value is not None and repr(value) != fact.value:
        errors = [f"is {value!r}, listed is {fact.value}"]
    assert not errors, f"{fact.path}: " + "; ".join(errors)


@pytest.mark.parametrize("path", NOT_YET)
def test_what_is_listed_as_not_yet_there_is_not_there(path: str) -> None:
    with pytest.raises((ImportError, AttributeError)):
        resolve(path)
        pytest.fail(f"{path} exists: remove it from tests/data/not_yet.txt")


def test_the_list_names_only_facts_and_is_sorted() -> None:
    assert sorted(set(NOT_YET)) == NOT_YET
    assert set(NOT_YET) <= {fact.path for fact in FACTS} | set(ALIASES)


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if alias not in NOT_YET])
def test_older_path_gives_the_same_objects(alias: str) -> None:
    names = [fact.name for fact in FACTS if fact.module == ALIASES[alias]]
    assert names
    for name in names:
        assert resolve(f"{alias}.{name}") is resolve(f"{ALIASES[alias]}.{name}")


def test_package_exports_the_listed_names_and_nothing_else() -> None:
    qwix = importlib.import_module("qwix")
    listed = {f.name for f in FACTS if f.module == "qwix" and f.path not in NOT_YET} | ADDED
    assert set(qwix.__all__) == listed
    public = {
        name for name, value in vars(qwix).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == listed


# The checks themselves: each kind of difference is found.


@pytest.mark.parametrize(
    ("listed", "written", "error"),
    [
        ("a, b=1", "a, b=1", None),
        ("a, b=1", "a, b=1, c=2", None),
        ("a, b=1", "a, b=1, *, c=2", None),
        ("a, b=1", "b, a=1", "positional parameters are"),
        ("a, b=1", "a, b=2", "b defaults to 2"),
        ("a, b=1", "a, b", "b defaults to"),
        ("a, b=1", "a, *, b=1", "b is keyword-only"),
        ("a, *, b=1", "a, b=1", "b is positional or keyword"),
        ("a", "a=1", "a has a default"),
        ("a", "a, c", "c is not listed and has no default"),
        ("a, **kwargs", "a", "takes no variadic keyword"),
        ("*args", "a=1", "takes no variadic positional"),
        ("a=<lambda>", "a=lambda x: x", None),
        ("a=<object object>", "a=object()", None),
        ("a=<object object>", "a=None", "a defaults to None"),
        ("a=('__call__',)", "a=('__call__',)", None),
        ("a=re", "a=re", None),
        ("a=OrderedDict", "a=__import__('collections').OrderedDict", None),
        ("a=collections.OrderedDict", "a=__import__('collections').OrderedDict", None),
    ],
)
def test_signature_differences_are_found(listed: str, written: str, error: str | None) -> None:
    function = eval(f"lambda {written}: None", {"re": re})
    errors = signature_errors(function, parse_signature(listed))
    assert not errors if error is None else any(error in line for line in errors), errors


def test_class_differences_are_found() -> None:
    @dataclasses.dataclass
    class Example:
        a: int = 1
        b: dict = dataclasses.field(default_factory=dict, metadata={"static": True})

        @property
        def p(self) -> int:
            return self.a

        def m(self, x: int = 2) -> int:
            return x

    def errors(lines: str) -> list[str]:
        fact = parse_name("module", "class `Example(object)`")
        for line in lines.split("\n"):
            parse_member(fact, line)
        return class_errors(Example, fact)

    assert errors("field `a = 1`\nfield `b = dict()` (static)\nproperty `p`\n`m(self, x=2)`") == []
    assert "default 2" in errors("field `a = 2`\nfield `b = dict()`")[0]
    assert "default None" in errors("field `a`\nfield `b = dict()`")[0]
    assert "fields are" in errors("field `b = dict()`\nfield `a = 1`")[0]
    assert "listed is static" in errors("field `a = 1` (static)")[0]
    assert errors("property `q`") == ["property q is missing"]
    assert errors("`n(self)`") == ["method n is missing"]
    assert errors("`m(self, x=3)`") == ["m: x defaults to 2, listed is 3"]
    assert errors("members `a='x'`") == ["member a is not 'x'"]
    fact = parse_name("module", "class `Example(Base)`")
    assert class_errors(Example, fact) == ["does not derive from Base"]
