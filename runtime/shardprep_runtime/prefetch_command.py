"""The command shardprep-prefetch: fetch a worker's shard into the host's cache, before its command or alone.

    shardprep-prefetch s3://bucket/prefix -tp 4 -- python worker.py ...

starts the fetch in a process of its own and becomes the worker's command at once; `shardprep_runtime.load` in the
worker finds in the cache what has come and waits for the rest. Without a command it fetches and ends: the job of an
init container.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from . import environment
from .errors import InputError, ProblemError, ShardprepError, quote
from .grid import parse_stages
from .load import load
from .manifest import ENGINES, TORCH
from .remote import DEFAULT_REVISION
from .store import Access


def main(argv: Sequence[str] | None = None) -> int:
    """The command `shardprep-prefetch`; its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if "--" in given:
        cut = given.index("--")
        given, command = given[:cut], given[cut + 1 :]
    options = _parser().parse_args(given)
    try:
        arguments = _arguments(options)
        if command:
            return _become(command, options.source, arguments)
        return _fetch(options.source, arguments, as_json=options.json)
    except ProblemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except ShardprepError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardprep-prefetch",
        description="Fetch a worker's shard into the host's cache: before its command, or alone.",
        epilog="What follows -- is run at once, while the fetch goes on.",
    )
    parser.add_argument("source", help="s3://bucket/prefix of a shard set")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, metavar="N")
    parser.add_argument("-ep", "--expert-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--stages", metavar="0-15,16-31", help="by first and last layer")
    parser.add_argument(
        "--engine", choices=ENGINES, default=TORCH, help="whose way of cutting; default: torch"
    )
    parser.add_argument("--rank", type=int, help="default: RANK, as torchrun sets it, else 0")
    parser.add_argument("--revision", default=DEFAULT_REVISION)
    parser.add_argument("--manifest-digest", metavar="sha256:...")
    parser.add_argument("--cache", metavar="DIR", default="host", help="default: SHARDPREP_CACHE_DIR")
    parser.add_argument("--max-workers", type=int, metavar="N", help="connections; default: 16")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that fetch; default: 1")
    parser.add_argument("--endpoint-url", metavar="URL")
    parser.add_argument("--profile")
    parser.add_argument("--region")
    parser.add_argument("--no-sign-request", action="store_true")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    return parser


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    rank = options.rank if options.rank is not None else environment.rank() or 0
    return {
        "rank": rank,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "expert_parallel_size": options.expert_parallel_size,
        "stages": _stages(options.stages),
        "engine": options.engine,
        "revision": options.revision,
        "manifest_digest": options.manifest_digest,
        "cache": options.cache,
        "workers": options.max_workers,
        "processes": options.processes,
        "access": Access(
            options.endpoint_url, options.profile, options.region, anonymous=options.no_sign_request
        ),
    }


def _stages(given: str | None) -> list[tuple[int, int]] | None:
    if given is None:
        return None
    found = parse_stages(given)
    if found is None:
        raise InputError(f"{quote(given)} is no list of stages; write the layers of each: 0-15,16-31")
    return found


def _become(command: Sequence[str], source: str, arguments: dict[str, Any]) -> int:
    """Leave the fetch to a process of its own, and become `command`, with its signals, status and process id."""
    fetcher = os.fork()
    if fetcher == 0:
        # a grandchild: the worker is to have no child that it does not know of
        if os.fork() == 0:
            status = 1
            try:
                os.setsid()
                # who reads what the command prints is to see it end with the command
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, 0)
                os.dup2(nothing, 1)
                status = _fetch(source, arguments, as_json=False, quiet=True)
            except ShardprepError as error:
                print(f"shardprep-prefetch: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        os._exit(0)
    os.waitpid(fetcher, 0)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(
            number, signal.SIG_DFL
        )  # Python ignores them, and what is ignored stays so for the command
    try:
        os.execvp(command[0], list(command))  # noqa: S606 - what the user asked to run
    except OSError as error:
        raise InputError(f"{quote(command[0])}: cannot be run: {error.strerror}") from None


def _fetch(source: str, arguments: dict[str, Any], *, as_json: bool, quiet: bool = False) -> int:
    with load(source, **arguments) as shard:
        shard.wait()
        report = {"rank": shard.view.rank, "nbytes": shard.nbytes, "bytes_fetched": shard.bytes_fetched}
    if as_json:
        print(json.dumps(report))
    elif not quiet:
        print(
            f"rank {report['rank']}: {report['nbytes']:,} bytes, {report['bytes_fetched']:,} of them fetched"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
