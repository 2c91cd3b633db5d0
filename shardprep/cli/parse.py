"""Click types and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    _SizeType = click.ParamType[int]
    _StagesType = click.ParamType[list[tuple[int, int]]]
else:  # only the newest clicks let the class be subscripted when it runs
    _SizeType = _StagesType = click.ParamType

SUFFIXES: Final = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
"""As Hugging Face reads them: GB is a power of ten, GiB of two."""


class Size(_SizeType):
    """A number of bytes: 5GB, 512MiB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", value.strip())
        if not found or found[2].upper() not in SUFFIXES:
            self.fail(f"{value!r} is no size; write 5GB, 512MiB or a number of bytes", param, ctx)
        size = int(float(found[1]) * SUFFIXES[found[2].upper()])
        if size < 1:
            self.fail("must be at least 1 byte", param, ctx)
        return size


class StageList(_StagesType):
    """Pipeline stages by their first and last layer: 0-15,16-31."""

    name = "stages"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[tuple[int, int]]:
        if isinstance(value, list):
            return value
        found = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip()) for word in value.split(",")]
        if not all(found):
            self.fail(f"{value!r} is no list of stages; write the layers of each: 0-15,16-31", param, ctx)
        return [(int(each[1]), int(each[2] or each[1]) + 1) for each in found if each]


DTYPES: Final = {
    "keep": None,
    "bf16": "BF16", "bfloat16": "BF16",
    "f16": "F16", "fp16": "F16", "float16": "F16",
    "f32": "F32", "fp32": "F32", "float32": "F32",
    "f64": "F64", "float64": "F64",
}  # fmt: skip

SOURCE = click.Path(path_type=Path)


def workers_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--max-workers, the same for every command that moves bytes."""
    option = click.option(
        "--max-workers",
        type=click.IntRange(1, 256),
        help="Threads that move bytes.  [default: the cores of this process, at most 8]",
    )
    return option(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json, the same for every command that reports."""
    return click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")(command)
