"""What pages and the packages' own docstrings import is public: `__all__` has the name, and it is there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardprep
import shardprep_runtime

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*/**/README.md"))]
PACKAGES = {"shardprep": shardprep, "shardprep_runtime": shardprep_runtime}
IMPORT = re.compile(r"^ *from (shardprep(?:_runtime)?)((?:\.\w+)*) import ([^#\n]+)", re.MULTILINE)
ATTRIBUTE = re.compile(r"\b(shardprep_runtime)\.(?!json)(\w+)\(")


def code_of(path: Path) -> str:
    """The Python blocks of a page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL))


def imported(code: str) -> Iterator[tuple[str, str, str]]:
    """Package, module within it, and name, of all that code imports from the packages or asks them for."""
    for package, module, names in IMPORT.findall(code):
        for name in names.strip("()").split(","):
            yield package, module, name.split(" as ")[0].strip()
    for package, name in ATTRIBUTE.findall(code):
        yield package, "", name


TEXTS = {str(page.relative_to(ROOT)): code_of(page) for page in PAGES} | {
    f"the docstring of {name}": package.__doc__ or "" for name, package in PACKAGES.items()
}


@pytest.mark.parametrize("where", [where for where, text in TEXTS.items() if list(imported(text))])
def test_what_is_imported_is_public_and_there(where: str) -> None:
    for package, module, name in imported(TEXTS[where]):
        public = PACKAGES[package].__all__
        if not module or package == "shardprep":
            assert (module.split(".")[1] if module else name) in public, (package, module, name)
        assert hasattr(importlib.import_module(package + module), name), (package, module, name)


def test_pages_are_read() -> None:
    found = {each for text in TEXTS.values() for each in imported(text)}
    assert {
        ("shardprep", ".split", "split"),
        ("shardprep_runtime", "", "load"),
        ("shardprep_runtime", "", "transformers_state"),
    } <= found


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_is_there(package: str) -> None:
    for name in PACKAGES[package].__all__:
        is_module = package == "shardprep" and not name.startswith("_")
        assert importlib.import_module(f"{package}.{name}") if is_module else getattr(PACKAGES[package], name)


def test_a_name_that_is_not_public_is_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'shardprep_runtime' has no attribute 'loads'"):
        _ = shardprep_runtime.loads  # type: ignore[attr-defined]
    assert "launch" in dir(shardprep_runtime)
