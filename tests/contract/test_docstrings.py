"""Docstrings are in Google's style: the reference is generated from them, and an editor shows parameters by name."""

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
