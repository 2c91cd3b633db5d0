"""What users see and what frozen sets hold does not change unnoticed: help, public signatures, digests of tensors.

`python tests/contract/test_frozen.py` writes the files anew; a change of theirs is then seen in review.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"
FROZEN = DATA / "frozen"
DOORS = {
    "shardprep.convert": ["convert"],
    "shardprep.export": ["export"],
    "shardprep.fit.report": ["plan_fit"],
    "shardprep.publish.prune": ["prune"],
    "shardprep.publish.pull": ["pull"],
    "shardprep.publish.push": ["push"],
    "shardprep.split": ["split"],
    "shardprep.verify": ["verify"],
}
"""Module -> what of it docs call, beside what shardprep_runtime exports."""


def helps() -> Iterator[str]:
    """The help of every command, at a width of 100."""
    import click
    from click.testing import CliRunner

    from shardprep.cli import main

    def of(words: list[str]) -> Iterator[str]:
        shown = CliRunner().invoke(main, [*words, "--help"], terminal_width=100, prog_name="shardprep")
        assert shown.exit_code == 0, shown.output
        yield f"$ shardprep {' '.join([*words, '--help'])}\n{shown.output}"

    yield from of([])
    for name in main.list_commands(click.Context(main)):
        yield from of([name])


def shown(value: object) -> str:
    """A default value, without an address or a path of this machine."""
    plain = value is None or isinstance(value, str | int | float | tuple)
    return repr(value) if plain else type(value).__name__


def signature(name: str, thing: Callable[..., object]) -> str:
    """The name, then a line for each parameter: its kind, and its default."""
    lines = [name]
    for each in inspect.signature(thing).parameters.values():
        default = "" if each.default is each.empty else f"={shown(each.default)}"
        lines.append(f"    {each.kind.name.lower():21} {each.name}{default}")
    return "\n".join(lines)


def signatures() -> Iterator[str]:
    """Parameters of public functions, and of public methods of public classes, with kinds and defaults."""
    import shardprep_runtime

    doors = {"shardprep_runtime": sorted(set(shardprep_runtime.__all__) - {"__version__"}), **DOORS}
    for module, names in doors.items():
        for name in names:
            thing = getattr(importlib.import_module(module), name)
            if not inspect.isclass(thing):
                yield signature(name, thing)
                continue
            yield f"class {name}"
            for method, function in sorted(vars(thing).items()):
                if inspect.isfunction(function) and (not method.startswith("_") or method == "__init__"):
                    yield signature(f"{name}.{method}", function)


def tensors() -> dict[str, dict[str, str]]:
    """Frozen set -> rank of each grid that its grain allows -> digest of names, dtypes, shapes and bytes."""
    import shardprep_runtime

    found: dict[str, dict[str, str]] = {}
    for path in sorted(DATA.glob("v*/*/shardprep.json")):
        folder = path.parent
        grain = shardprep_runtime.read_manifest(folder).grain
        of = found.setdefault(str(folder.relative_to(DATA)), {})
        for size in (each for each in range(1, grain + 1) if grain % each == 0):
            for rank in range(size):
                digest = hashlib.sha256()
                with shardprep_runtime.load(folder, tensor_parallel_size=size, rank=rank) as shard:
                    for name in sorted(shard):
                        view = shard.view.tensors.get(name)
                        digest.update(repr((name, view and (view.form.dtype, view.shape))).encode())
                        if view is not None:
                            digest.update(shard.memory(name))
                of[f"tp{size} rank {rank}"] = digest.hexdigest()
    return found


def fresh_helps() -> str:
    """Of a process of its own: click keeps a command's help option as the first to ask for it saw it."""
    words = [sys.executable, __file__, "help"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


FILES: dict[str, Callable[[], str]] = {
    "help.txt": fresh_helps,
    "signatures.txt": lambda: "\n".join(signatures()) + "\n",
    "tensors.json": lambda: json.dumps(tensors(), indent=1) + "\n",
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_frozen_is_as_it_was(name: str) -> None:
    """Meant to change? `python tests/contract/test_frozen.py` writes it anew."""
    assert FILES[name]() == (FROZEN / name).read_text("utf-8")


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    if sys.argv[1:] == ["help"]:
        print("\n".join(helps()), end="")
        sys.exit()
    FROZEN.mkdir(exist_ok=True)
    for file, make in FILES.items():
        (FROZEN / file).write_text(make(), "utf-8")
