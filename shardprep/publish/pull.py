"""Bring a shard set, or one rank's ranges of it, from a store into a folder.

While bytes arrive, each part has its name with `.sparse`, and a map of the bytes that are there beside it (`.landed`).
So a pull that was killed can go on, and several ranks of a host can pull into one folder at once. Then the parts that
are whole get their names, the side files come, and the manifest last.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardprep_runtime import environment
from shardprep_runtime.errors import InputError, IntegrityError, WriteError, quote
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Manifest, Part
from shardprep_runtime.format.view import Place, View, plan_view
from shardprep_runtime.shard.fetch import WORKERS, Arrival, Fetch, open_arrivals, plan_runs
from shardprep_runtime.shard.filesystem import file_system
from shardprep_runtime.shard.landing import ABSENT, DOUBTED, HEADER, LANDED, VERIFIED, Landing, land_in_file
from shardprep_runtime.shard.loading import SPARSE
from shardprep_runtime.shard.parts import OpenPart, open_part
from shardprep_runtime.shard.revisions import blob_key, read_revision
from shardprep_runtime.shard.shard import Shard
from shardprep_runtime.shard.shard_set import ShardSet, open_set
from shardprep_runtime.shard.side_files import (
    MAP,
    SIDE_BY_SIDE,
    alone,
    fetch_side_file,
    finish,
    is_here,
    make_folder,
    prepare,
    write_small,
)
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Store

from ..write.conduct import Conduct

SMALL: Final = 32 * 2**20
"""Bytes of a side file up to which it is held in memory until the parts are there: no file gets its name before."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """What pull brought."""

    source: str
    revision: str
    manifest_digest: str
    destination: Path
    rank: int | None
    """The rank whose ranges were pulled; None: the whole shard set."""
    nbytes: int
    """Bytes of tensors that are wanted in the folder."""
    bytes_fetched: int
    """The bytes of these that this run fetched; the others were there already, or another process fetched them."""
    parts: tuple[tuple[str, bool], ...]
    """(path, whether all of it is here) for each part with wanted bytes."""
    seconds: float


def pull(
    source: str | Path | ShardSet,
    destination: Path,
    *,
    place: Place | None = None,
    weights: bool = True,
    conduct: Conduct | None = None,
) -> PullReport:
    """Pull a revision of a shard set into a folder. Every block is checked against its digest as it lands.

    Bytes that an earlier run, or one for another rank, has brought are checked and kept.

        report = pull("s3://models/llama-70b", Path("here"), place=Place(rank=3, tensor_parallel_size=8))
        print(report.bytes_fetched, "of", report.nbytes)

    Args:
        source: A URI, a store's folder, or what `open_set` gives.
        destination: The folder: a new one, or one into which the same revision was pulled before.
        place: Pull the ranges of this worker alone; None: everything.
        weights: False: only the side files and the manifest, which suffice to start an engine.
        conduct: Threads, and who is told of the progress.

    Raises:
        InputError: Before anything is written.
        StoreError, IntegrityError, WriteError: Later; the same call then resumes.
    """
    began = time.monotonic()
    conduct = conduct or Conduct()
    shard_set = open_set(source)
    with open_store(shard_set.source, shard_set.access) as store:
        raw, manifest = read_revision(store, shard_set.revision, shard_set.digest)
        digest = manifests.digest_of(raw)
        view = None if place is None else plan_view(manifest, place)
        make_folder(destination)
        with alone(destination):
            prepare(destination, digest, manifest)
        parts = () if not weights else manifest.parts if view is None else view.parts
        sides = [side for side in manifest.side_files if not is_here(destination, side)]
        small = [side for side in sides if side.size <= SMALL]
        with ThreadPoolExecutor(SIDE_BY_SIDE, thread_name_prefix="shardprep-side") as pool:
            early = {side: pool.submit(fetch_side_file, store, side) for side in small}
            try:
                wanted, fetched, whole = _bring(store, destination, manifest, parts, view, conduct)
                for side in sides:
                    data = early[side].result() if side in early else fetch_side_file(store, side)
                    with alone(destination):
                        write_small(destination / side.path, data)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        finish(destination, raw)
    return PullReport(
        source=store.uri,
        revision=shard_set.revision,
        manifest_digest=digest,
        destination=destination,
        rank=None if place is None else place.rank,
        nbytes=wanted,
        bytes_fetched=fetched,
        parts=tuple((part.path, part.path in whole) for part in parts),
        seconds=time.monotonic() - began,
    )


def _bring(
    store: Store,
    folder: Path,
    manifest: Manifest,
    parts: Sequence[Part],
    view: View | None,
    conduct: Conduct,
) -> tuple[int, int, set[str]]:
    """Fetch the wanted bytes of `parts`.

    Returns:
        Bytes of tensors that are wanted, bytes fetched, and the paths of the parts that are whole now.
    """
    landings: list[tuple[Part, str, Landing]] = []
    there: list[Part] = []
    try:
        with alone(folder):
            for part in parts:
                path = folder / (part.path + SPARSE)
                if (folder / part.path).exists():
                    there.append(part)
                    for name in (SPARSE, MAP):  # left by a run that was killed while it renamed the part
                        (folder / (part.path + name)).unlink(missing_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                landings.append((part, blob_key(part.digest), land_in_file(part, path, trust=False)))
    except OSError as error:
        for _, _, landing in landings:
            landing.abandon()
        raise WriteError(f"{quote(folder)}: cannot be written: {error.strerror}") from None
    workers = conduct.workers or WORKERS
    arrivals = open_arrivals(store, landings, manifest, check_digest=True, workers=workers)
    fetch = None
    try:
        ranges = list(_ranges(folder, manifest, arrivals, there, view))
        runs = plan_runs(
            (arrival, start, stop) for arrival, start, stop in ranges if isinstance(arrival, Arrival)
        )
        missing = [(run.arrival, *span) for run in runs for span in run.arrival.missing(run)]
        needed = dict.fromkeys(arrivals, 0)
        for arrival, start, stop in missing:
            needed[arrival] += stop - start
        # an earlier run, or one at the same time, may have reserved the same bytes on disk
        more = sum(max(0, size - each.landing.set_aside(each.bytes_there())) for each, size in needed.items())
        free = shutil.disk_usage(folder).free
        if more > free:
            raise WriteError(
                f"{quote(folder)}: {more:,} bytes are needed, {free:,} are free; make room or pull elsewhere"
            )
        if file_system(folder) != "tmpfs":  # tmpfs would zero pages that are about to be written
            for arrival, start, stop in missing:
                arrival.landing.reserve(start, stop)
        conduct.begin(sum(run.nbytes for run in runs))
        fetch = Fetch(store, arrivals, runs, verify=True, workers=workers, progress=conduct.progress)
        fetch.start()
        fetch.wait_all()
        whole = {part.path for part in there} | {
            arrival.part.part.path for arrival in arrivals if _publish(folder, arrival)
        }
        return sum(stop - start for _, start, stop in ranges), fetch.bytes_fetched, whole
    finally:
        if fetch is not None:
            fetch.join()
        for arrival in arrivals:
            arrival.part.close()
            arrival.landing.close()


def _ranges(
    folder: Path, manifest: Manifest, arrivals: Sequence[Arrival], there: Sequence[Part], view: View | None
) -> Iterator[tuple[Arrival | Part, int, int]]:
    """Yield the wanted bytes [start, stop) of each part, in the order in which they should come.

    The header of each part that is `there` already is checked. Raises FormatError, IntegrityError or ManifestError.
    """
    of_part = {arrival.part.part.path: arrival for arrival in arrivals}
    opened: list[OpenPart] = []
    try:
        opened.extend(open_part(folder, part, manifest) for part in there)
        if view is None:
            for arrival in arrivals:
                yield arrival, arrival.part.part.header_size, arrival.part.part.size
            for part in there:
                yield part, part.header_size, part.size
            return
        shard = Shard(view, [*(arrival.part for arrival in arrivals), *opened], manifest)
        for each, piece, start, stop in shard.ranges():
            whose = of_part.get(each.part.path, each.part)
            yield whose, piece.span.start + start, piece.span.start + stop
    finally:
        for each in opened:
            each.close()


def _publish(folder: Path, arrival: Arrival) -> bool:
    """Bring a part to disk, and rename it if all of it is there; say whether it is."""
    for number, value in enumerate(arrival.landing.state(len(arrival.blocks))):
        # pages that another rank wrote before a crash of the machine may not have reached the disk
        if value in (LANDED, DOUBTED) and number != HEADER:
            try:
                arrival.block(number).check()
            except IntegrityError:
                arrival.landing.mark(number, ABSENT)
            else:
                arrival.landing.mark(number, VERIFIED)
    arrival.landing.sync()
    path = folder / arrival.part.part.path
    if not all(arrival.landing.state(len(arrival.blocks))):
        return False
    with alone(folder):
        # a process that pulls another rank into this folder may have renamed it first
        with suppress(FileNotFoundError):
            path.with_name(path.name + SPARSE).rename(path)
        path.with_name(path.name + MAP).unlink(missing_ok=True)
    return True


def choose_rank(
    rank: int | None,
    *,
    everything: bool,
    tensor_parallel_size: int | None,
    pipeline_parallel_size: int | None,
    expert_parallel_size: int | None = None,
    engine: str | None = None,
) -> int | None:
    """Choose the rank to pull for: the one that is given, else that of a worker's environment (torchrun's RANK).

    Args:
        rank: What the user gave.
        everything: The user asks for the whole shard set.
        tensor_parallel_size: What the user gave; so are the following.

    Returns:
        The rank; None: everything.

    Raises:
        InputError: Where neither gives a rank, and where the environment has more or fewer workers than the grid.
    """
    grid = tensor_parallel_size, pipeline_parallel_size
    if everything:
        if rank is not None or grid != (None, None) or expert_parallel_size is not None or engine is not None:
            raise InputError(
                "--all pulls for every grid and engine; leave --rank, -tp, -pp, -ep, --stages and --engine out"
            )
        return None
    if rank is None:
        if grid == (None, None):
            raise InputError("which share? say -tp, -pp and --rank of a worker, or --all for everything")
        rank = environment.rank()
        if rank is None:
            raise InputError(
                "which rank? say --rank, or run it where RANK is set (torchrun), or --all for everything"
            )
        size, given = (grid[0] or 1) * (grid[1] or 1), environment.world_size()
        if given not in (None, size):
            raise InputError(
                f"the environment has WORLD_SIZE {given}, the grid {size} workers; give -tp and -pp that fit, or --rank"
            )
    return rank
