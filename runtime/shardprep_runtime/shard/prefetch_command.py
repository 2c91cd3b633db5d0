"""The command shardprep-prefetch: fetch the shards of a host's workers into its cache, before their command or alone.

    shardprep-prefetch s3://bucket/prefix -tp 4 -- python worker.py ...

starts the fetch in a process of its own, and becomes the worker's command at once. `shardprep_runtime.load` in the
worker finds in the cache what has come, and waits for the rest. Without a command it fetches and ends: the job of an
init container. With `--stay` it does not end: the job of a sidecar. One process fetches for one worker (`--rank`), or
for all workers of its host (`--ranks`, or `--nnodes` and `--node-rank`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final, NoReturn

from .. import environment
from ..errors import InputError, ProblemError, ShardprepError, quote
from ..format.grid import Grid, parse_stages
from ..format.manifest import ENGINES, TORCH
from ..format.view import Place
from .options import read_set
from .revisions import DEFAULT_REVISION
from .shard_set import ShardSet

ENDED: Final = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM ended, as a shell tells it."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A rank whose shard is in the cache."""

    rank: int
    nbytes: int
    """Bytes of the shard."""
    bytes_fetched: int
    """Bytes of it that this process had to fetch."""


def fetch(shard_set: ShardSet, places: Sequence[Place]) -> list[Fetched]:
    """Fetch and verify the shards of all places at once; returns when every block of them is in the cache.

    Bytes that several places need are fetched once. All read the same manifest, also where a push moves the revision
    meanwhile.

    Args:
        shard_set: Where the set is, and the cache.
        places: The shards to fetch.

    Raises:
        ShardprepError: What `ShardSet.load` raises.
        WriteError: Where the shards do not fit into the cache together.
    """
    if len(places) > 1 and shard_set.is_remote:
        shard_set, _ = shard_set.pinned()
    with ExitStack() as stack:
        # all are open before the first is whole: none is evicted for the next
        shards = [stack.enter_context(shard_set.load(place)) for place in places]
        for shard in shards:
            shard.wait()
        return [Fetched(shard.view.rank, shard.nbytes, shard.bytes_fetched) for shard in shards]


def fetch_beside(shard_set: ShardSet, places: Sequence[Place]) -> None:
    """Fetch in a process of its own, which is not a child of this one and outlives it; returns at once.

    It is for a caller that becomes another program. What goes wrong is said on stderr, and left to whoever loads. Call
    it while this process has only one thread, since it forks.

    Args:
        shard_set: Where the set is, and the cache.
        places: The shards to fetch.
    """
    fetcher = os.fork()
    if fetcher == 0:
        # a grandchild: the worker must not have a child that it does not know of
        if os.fork() == 0:
            _fetch_and_exit(shard_set, places)
        os._exit(0)
    os.waitpid(fetcher, 0)


def _fetch_and_exit(shard_set: ShardSet, places: Sequence[Place]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        # whoever reads the command's output must see its end when the command ends
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        fetch(shard_set, places)
        status = 0
    except ShardprepError as error:
        print(f"shardprep-prefetch: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


# ------------------------------------------------------------------------------------------------------- the command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `shardprep-prefetch`, and give its exit status; with a command to become, does not return."""
    given = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if "--" in given:
        cut = given.index("--")
        given, command = given[:cut], given[cut + 1 :]
    options = parser().parse_args(given)
    try:
        shard_set, places = read_set(vars(options)), _places(options)
        if command and options.stay:
            raise InputError("--stay is for a fetch without a command; a command stays as long as it likes")
        if command:
            fetch_beside(shard_set, places)
            _become(command)
        # the first process of a container ignores SIGTERM unless it says otherwise
        signal.signal(signal.SIGTERM, _end)
        _report(fetch(shard_set, places), options)
        if options.stay:
            _stay()
        return 0
    except ProblemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except ShardprepError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The options of `shardprep-prefetch`."""
    parser = argparse.ArgumentParser(
        prog="shardprep-prefetch",
        description="Fetch the shards of a host's workers into its cache: before their command, or alone.",
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
    parser.add_argument("--ranks", metavar="0-3", help="of all workers of this host: 0-3, or 0,2,4-7")
    parser.add_argument(
        "--nnodes", type=int, metavar="N", help="hosts that share the ranks evenly, as in vLLM and torchrun"
    )
    parser.add_argument(
        "--node-rank", type=int, metavar="N", help="which of them this is; fetches for all its ranks"
    )
    parser.add_argument("--revision", default=DEFAULT_REVISION)
    parser.add_argument("--manifest-digest", metavar="sha256:...")
    parser.add_argument("--cache", metavar="DIR", default="host", help="default: SHARDPREP_CACHE_DIR")
    parser.add_argument("--max-workers", type=int, metavar="N", help="connections for each rank; default: 16")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="that fetch for each rank; default: 1"
    )
    parser.add_argument("--endpoint-url", metavar="URL")
    parser.add_argument("--profile")
    parser.add_argument("--region")
    parser.add_argument("--no-sign-request", action="store_true")
    parser.add_argument(
        "--stay", action="store_true", help="once all is here, wait to be asked to end: for a sidecar"
    )
    parser.add_argument("--json", action="store_true", help="report as JSON: a list where there are --ranks")
    return parser


def _places(options: argparse.Namespace) -> list[Place]:
    """The places of all workers to fetch for."""
    return [
        Place(
            rank,
            options.tensor_parallel_size,
            options.pipeline_parallel_size,
            options.expert_parallel_size,
            _stages(options.stages),
            options.engine,
        )
        for rank in _ranks(options)
    ]


def _is_of_a_host(options: argparse.Namespace) -> bool:
    return options.ranks is not None or options.nnodes is not None


def _ranks(options: argparse.Namespace) -> tuple[int, ...]:
    given = sum(each is not None for each in (options.rank, options.ranks, options.nnodes))
    if given > 1:
        raise InputError("--rank, --ranks and --nnodes say the same thing; give one of them")
    if (options.nnodes is None) != (options.node_rank is None):
        raise InputError("--nnodes and --node-rank go together: how many hosts there are, and which this is")
    if options.ranks is not None:
        return parse_ranks(options.ranks)
    if options.nnodes is not None:
        stages = _stages(options.stages)
        stage_count = options.pipeline_parallel_size or (len(stages) if stages else 1)
        return ranks_of_node(
            Grid(options.tensor_parallel_size, stage_count), options.nnodes, options.node_rank
        )
    return (options.rank if options.rank is not None else environment.rank() or 0,)


def parse_ranks(text: str) -> tuple[int, ...]:
    """Read ranks as people write them, 0-3 or 0,2,4-7, each once; sorted. Raises InputError for other text."""
    found = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip()) for word in text.split(",")]
    runs = [range(int(each[1]), int(each[2] or each[1]) + 1) for each in found if each]
    ranks = [rank for run in runs for rank in run]
    if not all(found) or not all(runs) or len(ranks) > len(set(ranks)):
        raise InputError(f"{quote(text)} is not a list of ranks; write each once: 0-3, or 0,2,4-7")
    return tuple(sorted(ranks))


def ranks_of_node(grid: Grid, nnodes: int, node_rank: int) -> tuple[int, ...]:
    """The ranks of one host: hosts have runs of equal length, as vLLM and torchrun deal them out.

    Args:
        grid: All ranks.
        nnodes: How many hosts there are.
        node_rank: Which of them, from 0.

    Raises:
        InputError: Where the hosts cannot share the ranks evenly, or this one is not among them.
    """
    if nnodes < 1 or grid.world_size % nnodes:
        raise InputError(
            f"{nnodes} nodes cannot share {grid.world_size} ranks evenly ({grid.pipeline_parallel_size} x "
            f"{grid.tensor_parallel_size}, pipeline x tensor parallel); use a number that divides {grid.world_size}"
        )
    if not 0 <= node_rank < nnodes:
        raise InputError(f"node rank {node_rank}: expected 0 to {nnodes - 1}, for {nnodes} nodes")
    size = grid.world_size // nnodes
    return tuple(range(node_rank * size, (node_rank + 1) * size))


def _stages(given: str | None) -> list[tuple[int, int]] | None:
    if given is None:
        return None
    found = parse_stages(given)
    if found is None:
        raise InputError(f"{quote(given)} is not a list of stages; write the layers of each: 0-15,16-31")
    return found


def _become(command: Sequence[str]) -> NoReturn:
    """Become `command`, which keeps this process's id, and whose exit status is this one's."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        # Python ignores them, and the command would inherit that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], list(command))  # noqa: S606 - what the user asked to run
    except OSError as error:
        raise InputError(f"{quote(command[0])}: cannot be run: {error.strerror}") from None


def _end(*_: Any) -> NoReturn:
    os._exit(ENDED)  # at once, whatever is on its way: blocks that are in the cache stay good


def _stay() -> NoReturn:
    """Wait to be asked to end, which is a success now."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    while True:
        signal.pause()


def _report(found: Sequence[Fetched], options: argparse.Namespace) -> None:
    if options.json:
        reports = [asdict(each) for each in found]
        print(json.dumps(reports if _is_of_a_host(options) else reports[0]), flush=True)
        return
    for each in found:
        print(f"rank {each.rank}: {each.nbytes:,} bytes, {each.bytes_fetched:,} of them fetched", flush=True)


if __name__ == "__main__":
    sys.exit(main())
