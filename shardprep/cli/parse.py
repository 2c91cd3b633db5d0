"""Define click types and options that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shardprep_runtime import environment
from shardprep_runtime.errors import quote
from shardprep_runtime.format.grid import parse_stages
from shardprep_runtime.format.manifest import ENGINES
from shardprep_runtime.shard.options import WORDS, read_set
from shardprep_runtime.shard.revisions import DEFAULT_REVISION
from shardprep_runtime.stores.open import SCHEMES, is_uri
from shardprep_runtime.stores.store import Access

if TYPE_CHECKING:
    _SizeType = click.ParamType[int]
    _StagesType = click.ParamType[list[tuple[int, int]]]
    _PlaceType = click.ParamType[Path | str]
    _DurationType = click.ParamType[float]
else:  # only the newest clicks let the class be subscripted when it runs
    _SizeType = _StagesType = _PlaceType = _DurationType = click.ParamType

SUFFIXES: Final = {"B": 1, **environment.SUFFIXES}


class Size(_SizeType):
    """A number of bytes: 5GB, 512MiB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", value.strip())
        if not found or found[2].upper() not in SUFFIXES:
            self.fail(f"{value!r} is not a size; write 5GB, 512MiB or a number of bytes", param, ctx)
        size = int(float(found[1]) * SUFFIXES[found[2].upper()])
        if size < 1:
            self.fail("must be at least 1 byte", param, ctx)
        return size


class Duration(_DurationType):
    """A time, given in seconds: 7d, 12h, 30m, 90s."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhd])", value.strip())
        if not found:
            self.fail(f"{value!r} is not a time; write 7d, 12h, 30m or 90s", param, ctx)
        return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


class StageList(_StagesType):
    """Pipeline stages by their first and last layer: 0-15,16-31."""

    name = "stages"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[tuple[int, int]]:
        if isinstance(value, list):
            return value
        found = parse_stages(value)
        if found is None:
            self.fail(f"{value!r} is not a list of stages; write the layers of each: 0-15,16-31", param, ctx)
        return found


DTYPES: Final = {
    "keep": None,
    "bf16": "BF16", "bfloat16": "BF16",
    "f16": "F16", "fp16": "F16", "float16": "F16",
    "f32": "F32", "fp32": "F32", "float32": "F32",
    "f64": "F64", "float64": "F64",
}  # fmt: skip


class Place(_PlaceType):
    """A path, which a command gets as a Path, or a URI of one of `schemes`, which it gets as a str."""

    name = "place"

    def __init__(self, *schemes: str) -> None:
        self.schemes = schemes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        if isinstance(value, Path):
            return value
        if is_uri(value):
            scheme = value.partition("://")[0]
            if scheme not in self.schemes:
                known = ", ".join(f"{each}://" for each in self.schemes)
                other = f"a URI of {known} or a path" if known else "a path"
                self.fail(f"{quote(value)} is reached by {scheme}://; expected {other}", param, ctx)
            return str(value)
        return Path(click.Path(path_type=Path).convert(value, param, ctx))


SOURCE: Final = Place(*SCHEMES, "hf")
"""The source of a checkpoint: a path, a URI of a store, or hf://org/name."""

STORE: Final = Place(*SCHEMES)
"""A path or the URI of a store."""

PATH: Final = Place()
"""A path on this machine."""


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options by which a store is reached to a command, which gets them as one `access: Access`."""

    @functools.wraps(command)  # keeps the options that are declared below this decorator
    def with_access(
        *arguments: Any,
        endpoint_url: str | None,
        profile: str | None,
        region: str | None,
        no_sign_request: bool,
        **options: Any,
    ) -> Any:
        access = Access(endpoint_url, profile, region, anonymous=no_sign_request)
        return command(*arguments, access=access, **options)

    return _access_words(with_access)


def set_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options by which a store is reached to a command that takes a shard set; it gets all as one `shard_set`."""

    @functools.wraps(command)
    def with_set(*arguments: Any, **options: Any) -> Any:
        words = {name: options.pop(name) for name in WORDS if name in options}
        words["source"] = str(words["source"])
        no_cache = options.pop("no_cache", False)
        if no_cache and words["cache"] is not None:
            raise click.UsageError("--cache and --no-cache exclude each other")
        if not no_cache and words.get("cache") is None:
            words["cache"] = "host"
        return command(*arguments, shard_set=read_set(words), **options)

    return _access_words(with_set)


def _access_words(command: Callable[..., Any]) -> Callable[..., Any]:
    found = command
    for option in (
        click.option("--no-sign-request", is_flag=True, help="Send no credentials: for public buckets."),
        click.option("--region", help="Region of an s3:// store.  [default: as configured for aws]"),
        click.option("--profile", help="Profile of the aws configuration, for s3://."),
        click.option(
            "--endpoint-url", metavar="URL", help="Endpoint of an s3:// store that is not Amazon's."
        ),
    ):
        found = option(found)
    return found


def workers_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --max-workers to a command that moves bytes."""
    option = click.option(
        "--max-workers",
        type=click.IntRange(1, 256),
        help="Threads that move bytes.  [default: the cores of this process, at most 8]",
    )
    return option(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json to a command that prints a report."""
    return click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")(command)


def connections_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --max-workers to a command whose workers are connections to a store."""
    option = click.option(
        "--max-workers", type=click.IntRange(1, 256), help="Connections to the store.  [default: 16]"
    )
    return option(command)


def engine_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --engine to a command that takes one worker's share, which gets None where it was not given."""
    option = click.option(
        "--engine",
        type=click.Choice(ENGINES),
        help="Engine whose cuts are followed where engines differ (padded vocabularies).  [default: torch]",
    )
    return option(command)


def revision_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --revision to a command that names one."""
    option = click.option(
        "--revision",
        metavar="NAME",
        default=DEFAULT_REVISION,
        show_default=True,
        help="Revision of the shard set.",
    )
    return option(command)
