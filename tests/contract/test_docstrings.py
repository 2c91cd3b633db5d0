"""Docstrings are in Google's style, and say what a stranger needs: the reference is generated from them, and an editor
shows parameters by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "shardprep", ROOT / "runtime" / "shardprep_runtime")
Function = ast.FunctionDef | ast.AsyncFunctionDef

PLAIN = {
    *("name", "path", "folder", "file", "uri", "key", "fd", "source", "destination"),
    *("config", "model", "checkpoint", "index", "tensor", "part", "shape", "dtype", "nbytes", "pipeline"),
    *("store", "conduct", "engine", "generator", "sources", "staging", "archive", "data", "raw"),
    *("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size"),
}
"""Names of parameters that say it all."""


def parameters(function: Function) -> set[str]:
    given = function.args
    star = [each for each in (given.vararg, given.kwarg) if each is not None]
    return {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *star)} - {
        "self",
        "cls",
    }


@cache
def documented() -> tuple[tuple[str, set[str], str], ...]:
    """What `_documented` finds; both packages are parsed once."""
    return tuple(_documented())


def _documented() -> Iterator[tuple[str, set[str], str]]:
    """Where it stands, the parameters and the docstring of every function; a class's docstring is its `__init__`'s too."""
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, Function):
                    said, of = ast.get_docstring(node), node
                elif isinstance(node, ast.ClassDef):
                    said = ast.get_docstring(node)
                    found = [
                        each for each in node.body if isinstance(each, Function) and each.name == "__init__"
                    ]
                    if not found:
                        continue
                    of = found[0]
                else:
                    continue
                if said:
                    yield where, parameters(of), said


def section(said: str, title: str) -> dict[str, str]:
    """The entries of one section: name -> what is said of it."""
    found = re.search(rf"^{title}:\n((?: {{4}}.*\n?|\n)+)", said, re.MULTILINE)
    if not found:
        return {}
    return dict(re.findall(r"^ {4}(\*{0,2}\w+): (\S.*)$", found[1], re.MULTILINE))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Do it.\n\nArgs:\n    a: One.\n        More.\n    b: Two.\n\nRaises:\n    E: Never.\n",
            {"a": "One.", "b": "Two."},
        ),
        ("Do it.\n\na  one\n", {}),
    ],
)
def test_a_section_is_read_as_its_tools_read_it(said: str, expected: dict[str, str]) -> None:
    assert section(said, "Args") == expected


def test_what_args_documents_is_a_parameter() -> None:
    wrong = [
        (where, sorted(unknown))
        for where, names, said in documented()
        if (unknown := {name.strip("*") for name in section(said, "Args")} - names)
    ]
    assert not wrong


def test_no_parameter_is_documented_in_a_form_that_tools_do_not_read() -> None:
    wrong = [
        (where, line)
        for where, names, said in documented()
        for line in said.split("\n")
        if (found := re.match(r"(\w+(?:, \w+)*) {2,}\S", line)) and set(found[1].split(", ")) <= names
    ]
    assert not wrong


def held() -> Iterator[tuple[Path, ast.Module]]:
    """The modules whose prose is held to the rules, parsed."""
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            yield path, ast.parse(path.read_text("utf-8"))


def said_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of fields and constants too."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(said))):
                yield node.lineno, said


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods with a docstring that others call, but for click's commands, whose docstring is their help."""
    for above in ast.walk(tree):
        if not isinstance(above, ast.Module | ast.ClassDef) or getattr(above, "name", "").startswith("_"):
            continue
        for node in above.body:
            if (
                isinstance(node, Function)
                and not node.name.startswith("_")
                and ast.get_docstring(node)
                and not any("click" in ast.unparse(each) for each in node.decorator_list)
            ):
                yield node


def says_all(parameter: ast.arg) -> bool:
    """Whether a parameter's name says what it is: it is one of `PLAIN`, or that of its type."""
    kind = re.sub(r"^(\w+\.)*|\W.*$", "", ast.unparse(parameter.annotation)) if parameter.annotation else ""
    return parameter.arg in PLAIN or parameter.arg == re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()


def test_no_docstring_begins_with_of() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in held()
        for line, said in said_in(tree)
        if said.startswith("Of ")
    ]
    assert not wrong


def test_every_parameter_of_several_is_documented_where_its_name_does_not_say_all() -> None:
    wrong = []
    for path, tree in held():
        for function in public_functions(tree):
            said, given = ast.get_docstring(function) or "", function.args
            known = {
                each
                for names in re.findall(r"^ {4}([*\w]+(?:, [*\w]+)*): \S", said, re.MULTILINE)
                for each in names.replace("*", "").split(", ")
            } | set(re.findall(r"`(\w+)`", said))
            several = [
                each
                for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)
                if each.arg not in ("self", "cls") and each.arg.strip("_")
            ]
            lacking = [each.arg for each in several if each.arg not in known and not says_all(each)]
            if len(several) > 1 and lacking:
                wrong.append(
                    f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {', '.join(lacking)}"
                )
    assert not wrong


IS_NO = re.compile(r"\b(?:is|are) no (?!longer|more\b|further\b|such\b)|\b(?:is|are) none of\b")


def test_what_is_not_something_is_not_said_to_be_no_such_thing() -> None:
    """`is not a size`, never `is no size`: in code, messages and comments, and in pages."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("changelog.d/*.md")]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*(path for path, _ in held()), *pages]
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1)
        if IS_NO.search(line.replace("there is no ", "").replace("There is no ", ""))
    ]
    assert not wrong


LONGEST = 30
"""Words of a sentence: 25 is the rule, and some need a few more."""


def sentences(said: str) -> Iterator[str]:
    """The sentences of a docstring, or what a colon or semicolon parts; tables and examples are not prose."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=\s+[\w*, ]+: )", said):
        if paragraph.startswith("        ") or re.search(r"\S {2,}\S|[├└]", paragraph):
            continue
        yield from re.split(r"(?<=[.!?:;])\)?\s+", " ".join(paragraph.split()))


def test_sentences_of_docstrings_are_short() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {sentence}"
        for path, tree in held()
        for line, said in said_in(tree)
        for sentence in sentences(said)
        if len(sentence.split()) > LONGEST
    ]
    assert not wrong
