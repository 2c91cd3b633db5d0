"""docs/architecture.md lists the rooms that are there, and each package says in its docstring what stands in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"shardprep": ROOT / "shardprep", "shardprep_runtime": ROOT / "runtime" / "shardprep_runtime"}
ROOM = re.compile(r"^\| `([a-z/]+)/` \|", re.MULTILINE)


def listed(package: str) -> set[str]:
    """The rooms that the page lists under the heading of a package."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    _, _, after = page.partition(f"### `{package}`")
    assert after, f"no heading of {package}"
    return set(ROOM.findall(re.split(r"^#+ ", after, maxsplit=1, flags=re.MULTILINE)[0]))


def there(folder: Path) -> set[str]:
    """The folders of a package that hold files of it."""
    held = {path.parent for path in folder.rglob("*") if path.is_file() and path.suffix in (".py", ".jsonl")}
    return {str(path.relative_to(folder)) for path in held - {folder}}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_lists_the_rooms_that_are_there(package: str) -> None:
    assert listed(package) == there(PACKAGES[package])


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_says_what_it_is(package: str) -> None:
    for folder in there(PACKAGES[package]):
        init = PACKAGES[package] / folder / "__init__.py"
        if init.exists():
            assert ast.get_docstring(ast.parse(init.read_text("utf-8"))), folder


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_room_says_of_its_modules_is_there(package: str) -> None:
    """A line `name  what it is` of a room's docstring names a module or folder of that room."""
    for folder in there(PACKAGES[package]):
        room = PACKAGES[package] / folder
        if not (room / "__init__.py").exists():
            continue
        says = ast.get_docstring(ast.parse((room / "__init__.py").read_text("utf-8"))) or ""
        for names in re.findall(r"^ {4}([a-z_0-9]+(?:, [a-z_0-9]+)*)  +\S", says, re.MULTILINE):
            for name in names.split(", "):
                assert (room / f"{name}.py").exists() or (room / name).is_dir(), (folder, name)
