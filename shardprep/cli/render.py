"""Print reports: for people on a terminal and, from the same dataclass, as JSON; progress goes to stderr."""

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
    """A report as JSON knows it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def print_json(report: Any) -> None:
    """The report as one JSON object on stdout."""
    click.echo(json.dumps(plain(report), indent=2))


def size(nbytes: int) -> str:
    """Bytes as people read them: 1.50 GiB."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Columns as wide as they need to be; those in `right` are aligned to the right. The first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def notes(aliases: Mapping[str, str], left_out: Sequence[LeftOut]) -> None:
    """What was tied and what was not carried over."""
    for alias, name in aliases.items():
        click.echo(f"tied: {quote(alias)} is {quote(name)}, stored once")
    for each in left_out[:20]:
        click.echo(f"left out: {quote(each.name)}: {quote(each.reason)}")
    if len(left_out) > 20:
        click.echo(f"left out: {len(left_out) - 20} more")


def warn(message: str) -> None:
    """A line on stderr."""
    click.echo(f"Note: {message}", err=True)


class Bar:
    """A progress bar on stderr; nothing where that is no terminal."""

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
        """Count bytes as done; from any thread."""
        if self.bar is not None:
            with self.lock:
                self.bar.update(nbytes)


@contextmanager
def conduct(label: str, workers: int | None) -> Iterator[Conduct]:
    """A job with a bar, which is cleared at the end, and notes on stderr."""
    bar = Bar(label)
    try:
        yield Conduct(workers, bar.begin, bar.step, warn)
    finally:
        if bar.bar is not None:
            bar.bar.close()
