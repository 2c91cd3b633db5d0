"""Print reports: for people on a terminal, and from the same dataclass as JSON. Progress goes to stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardprep.write.conduct import Conduct
from shardprep_runtime.errors import quote

if TYPE_CHECKING:
    from tqdm import tqdm

    from shardprep.index import LeftOut


def plain(value: Any) -> Any:
    """Turn a report into the values that JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def print_json(report: Any) -> None:
    """Print a report as one JSON object on stdout."""
    click.echo(json.dumps(plain(report), indent=2))


def size(nbytes: int) -> str:
    """Write a number of bytes for people: 1.50 GiB."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table whose columns are as wide as they need to be.

    Args:
        rows: Cells of each row; the first row is the head.
        right: Numbers of the columns that are aligned to the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def notes(aliases: Mapping[str, str], left_out: Sequence[LeftOut]) -> None:
    """Print which tensors were tied, and what was not carried over.

    Args:
        aliases: Other names of tied tensors -> the name that is stored.
        left_out: Contents that are not weights.
    """
    for alias, name in aliases.items():
        click.echo(f"tied: {quote(alias)} is {quote(name)}, stored once")
    for each in left_out[:20]:
        click.echo(f"left out: {quote(each.name)}: {quote(each.reason)}")
    if len(left_out) > 20:
        click.echo(f"left out: {len(left_out) - 20} more")


def warn(message: str) -> None:
    """Print a line on stderr."""
    click.echo(f"Note: {message}", err=True)


class Bar:
    """A progress bar on stderr; nothing is shown where stderr is not a terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm[Any] | None = None
        self.lock = threading.Lock()

    def begin(self, total: int) -> None:
        """Show the bar for `total` bytes."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, desc=self.label, unit="B", unit_scale=True, unit_divisor=1024, leave=False
            )

    def step(self, nbytes: int) -> None:
        """Count bytes as done. Any thread may call this."""
        if self.bar is not None:
            with self.lock:
                self.bar.update(nbytes)


@contextmanager
def conduct(label: str, workers: int | None) -> Iterator[Conduct]:
    """Run a job with a progress bar, which is cleared at the end, and with warnings on stderr.

    Args:
        label: What the bar shows before the numbers.
        workers: Threads of the job; None: its default.
    """
    bar = Bar(label)
    try:
        yield Conduct(workers, bar.begin, bar.step, warn)
    finally:
        if bar.bar is not None:
            bar.bar.close()
