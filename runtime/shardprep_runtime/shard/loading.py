"""Load one worker's shard: plan its view, open its parts, verify, hand out tensors."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from .. import environment
from ..errors import FormatError, LayoutError, ManifestError, SourceError, WriteError, quote
from ..format import manifest as manifests
from ..format.manifest import TORCH, Manifest, Part
from ..format.view import TensorView, View, plan_view
from ..stores.folder import FolderStore
from ..stores.open import is_uri, open_store
from ..stores.store import Access, Store
from .cache import Cache
from .fetch import WORKERS, Arrival, Crew, Fetch, open_arrivals, plan_runs
from .filesystem import Io, check_io, choose_io
from .landing import Landing, land_in_memory, read_map
from .parts import (
    Numbered,
    OpenPart,
    PieceSpan,
    blocks_of,
    check_blocks,
    default_workers,
    open_part,
)
from .revisions import DEFAULT_REVISION, blob_key, read_manifest
from .tensors import is_mapped, memory_of, tensor_of

if TYPE_CHECKING:
    import torch

Verify = Literal["blocks", "headers", "off"]

SPARSE: Final = ".sparse"
"""What the name of a part ends in of which only some ranges are there: no reader can take it for whole."""


class Shard(Mapping[str, "torch.Tensor"]):
    """What one worker loads: its tensors by name, memory-mapped where a tensor is one piece.

    A tensor that is joined from several pieces is copied when it is first asked for, and kept. Tied names are
    here too and give the same tensor. Tensors stay valid after `close`; the mappings under them, and the descriptor
    that Python keeps of each, go when the last of them does.

    Of a shard that is being fetched a tensor is handed out once its own bytes have arrived (and, with
    `verify="blocks"`, match their digests); whoever asks earlier waits.
    """

    def __init__(self, view: View, parts: Sequence[OpenPart], manifest: Manifest) -> None:
        self.view = view
        self.manifest = manifest
        self._parts = tuple(parts)
        self._closed = False
        self._fetch: Fetch | None = None
        self._arrivals: dict[OpenPart, Arrival] = {}
        self._store: Store | None = None
        self._joining = threading.Lock()
        self._tensors: dict[str, torch.Tensor] = {}
        self._memory: dict[str, memoryview] = {}
        spans = {(part.part.ranks, *key): (part, span) for part in parts for key, span in part.pieces.items()}
        self._located: dict[str, list[tuple[OpenPart, PieceSpan]]] = {}
        for name, tensor in view.tensors.items():
            try:
                self._located[name] = [
                    spans[(take.piece.first_rank, take.piece.last_rank), name, take.piece.start]
                    for take in tensor.takes
                ]
            except KeyError:
                raise ManifestError(
                    f"{quote(name)}: a piece of it is in none of the parts; the shard set is broken"
                ) from None

    def _read_exactly(self) -> None:
        """Have reads of the parts' files bring in this view's bytes and no others."""
        kept: Counter[str] = Counter()
        for part, _, start, stop in self.ranges():
            kept[part.part.path] += stop - start
        for part in self._parts:
            part.read_exactly(kept[part.part.path] < part.part.size - part.part.header_size)

    def _arrive(
        self,
        store: Store,
        arrivals: Sequence[Arrival],
        cache: Cache | None,
        *,
        verify: bool,
        workers: int,
        crew: Crew | None,
    ) -> None:
        """Begin to fetch what the view needs, in the order in which a forward pass meets it."""
        self._store = store
        self._arrivals = {arrival.part: arrival for arrival in arrivals}
        runs = plan_runs(
            (self._arrivals[part], piece.span.start + start, piece.span.start + stop)
            for part, piece, start, stop in self.ranges()
        )
        if cache is not None:
            missing: dict[Arrival, list[tuple[int, int]]] = {}
            for run in runs:
                missing.setdefault(run.arrival, []).extend(run.arrival.missing(run))
            cache.make_room(
                [(arrival.landing, ranges, arrival.bytes_there()) for arrival, ranges in missing.items()]
            )
        self._fetch = Fetch(store, arrivals, runs, verify=verify, workers=workers, crew=crew)
        self._fetch.start()

    # ------------------------------------------------------------------------------------------------- the mapping
    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored(name)
        if stored not in self._tensors:
            self._tensors[stored] = tensor_of(self.view.tensors[stored], self.memory(stored))
        return self._tensors[stored]

    def __iter__(self) -> Iterator[str]:
        yield from self.view.tensors
        yield from self.view.names

    def __len__(self) -> int:
        return len(self.view.tensors) + len(self.view.names)

    def __contains__(self, name: object) -> bool:
        return name in self.view.tensors or name in self.view.names

    def _stored(self, name: str) -> str:
        stored = self.view.names.get(name, name)
        if stored not in self.view.tensors:
            raise KeyError(name)
        return stored

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is not kept: one that is joined is joined anew each time, unless `[name]` was asked for."""
        stored = self._stored(name)
        tensor = self._tensors.get(stored)
        if tensor is None:
            found = self._memory.get(stored)
            tensor = tensor_of(self.view.tensors[stored], found if found is not None else self._make(stored))
        return tensor

    # ------------------------------------------------------------------------------------------- bytes and tensors
    def memory(self, name: str) -> memoryview:
        """The packed bytes of a tensor, without torch. Of the mapping itself unless the tensor had to be joined."""
        stored = self._stored(name)
        if stored not in self._memory:
            self._memory[stored] = self._make(stored)
        return self._memory[stored]

    def _make(self, stored: str) -> memoryview:
        """A tensor's bytes, once they have arrived."""
        view, located = self.view.tensors[stored], self._located[stored]
        if self._fetch is not None:
            for (part, piece), own in zip(located, view.stripes, strict=True):
                start = piece.span.start
                self._fetch.wait(self._arrivals[part], start + own.start, start + own.stop)
        if self._closed and not is_mapped(view, located):
            raise SourceError(f"{quote(stored)}: the shard was closed before it was asked for")
        if is_mapped(view, located) or not any(
            part in self._arrivals and self._arrivals[part].landing.in_memory for part, _ in located
        ):
            return memory_of(view, located)
        with self._joining:  # joined from memory: from now on this is the only copy, whoever else asks
            if stored not in self._memory:
                joined = memory_of(view, located)
                assert self._fetch is not None
                for part, piece in located:
                    arrival = self._arrivals[part]
                    if not self._fetch.elsewhere:
                        arrival.give_back(piece)
                    elif arrival.is_given(piece):
                        raise SourceError(
                            f"{quote(stored)}: the process that this one was forked from has joined it and given its "
                            "pieces back; ask for it before forking, or load in the new process"
                        )
                self._memory[stored] = joined
        return self._memory[stored]

    def wait(self) -> None:
        """Return once all of the shard has arrived. Raises what went wrong on the way."""
        if self._fetch is not None:
            self._fetch.wait_all()

    @property
    def bytes_fetched(self) -> int:
        """Bytes of tensors that this process has brought from the store so far; others came from the host's cache."""
        return self._fetch.bytes_fetched if self._fetch is not None else 0

    def describe(self, name: str) -> TensorView:
        """Dtype, shape and place of a tensor; reads nothing."""
        return self.view.tensors[self._stored(name)]

    def iter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order in which a forward pass meets them, tied names beside each other.

        A joined tensor lives only as long as its receiver holds it: copying to a device needs no second copy of
        the shard in memory. (Of a shard that is fetched into memory, it replaces the pieces that it was joined from.)
        """
        aliases: dict[str, list[str]] = {}
        for alias, name in self.view.names.items():
            aliases.setdefault(name, []).append(alias)
        for name in self.view.tensors:
            tensor = self.read(name)
            for each in (name, *aliases.get(name, ())):
                yield each, tensor

    def load_into(self, module: torch.nn.Module, *, strict: bool = True) -> None:
        """Assign the tensors to the parameters and buffers of `module`, which may be on torch's meta device.

        The module must have this shard's local shapes. With `strict`, raises LayoutError, before anything is
        assigned, where names or shapes differ.
        """
        own = module.state_dict(keep_vars=True)
        wanted = [name for name in own if name in self]
        if strict:
            stored = {self._stored(name) for name in wanted}
            missing = [name for name in own if name not in self]
            unused = [name for name in self.view.tensors if name not in stored]
            if missing or unused:
                raise LayoutError(
                    f"the module and the shard differ: the shard lacks {_some(missing)}; the module lacks {_some(unused)}"
                )
        for name in wanted:
            shape, found = tuple(own[name].shape), tuple(self[name].shape)
            if shape != found:
                raise LayoutError(
                    f"{quote(name)}: the module has shape {list(shape)}, the shard {list(found)}"
                )
        module.load_state_dict({name: self[name] for name in wanted}, strict=False, assign=True)

    # ------------------------------------------------------------------------------------------------- bookkeeping
    @property
    def nbytes(self) -> int:
        """Bytes that the worker keeps, tied tensors once."""
        return self.view.nbytes

    @property
    def bytes_read(self) -> int:
        """Bytes of the parts that this view needs: their headers and the ranges of its pieces."""
        headers = sum(part.header_size for part in self.view.parts)
        return headers + sum(stop - start for _, _, start, stop in self.ranges())

    def ranges(self) -> Iterator[tuple[OpenPart, PieceSpan, int, int]]:
        """The bytes [start, stop) of each piece, counted within it, that this view reads, in its tensors' order.

        Of a piece of which parts of rows are wanted, what lies between them is read too.
        """
        for name, tensor in self.view.tensors.items():
            last: tuple[OpenPart, PieceSpan, int, int] | None = None
            for (part, piece), own in zip(self._located[name], tensor.stripes, strict=True):
                if last is not None and last[1] is piece and own.start < last[3]:
                    last = part, piece, last[2], max(last[3], own.stop)  # both lie in the same rows
                    continue
                if last is not None:
                    yield last
                last = part, piece, own.start, own.stop
            if last is not None:
                yield last

    @property
    def bytes_mapped(self) -> int:
        """Bytes that are handed out as they lie in the parts, without a copy."""
        return sum(t.nbytes for name, t in self.view.tensors.items() if is_mapped(t, self._located[name]))

    def check(self, block_bytes: int, *, workers: int) -> None:
        """Check every block that this view needs against its digest. Raises IntegrityError naming the first bad one."""
        blocks = (
            block
            for part, piece, start, stop in self.ranges()
            for block in blocks_of(part, piece, block_bytes, start=start, stop=stop)
        )
        check_blocks(blocks, workers=workers)

    def close(self) -> None:
        """Close the parts, and stop fetching. What was not asked for yet can no longer be had."""
        if self._closed:
            return
        self._closed = True
        parts, self._parts = self._parts, ()
        arrivals, store, self._store = tuple(self._arrivals.values()), self._store, None

        def close() -> None:
            for part in parts:
                part.close()
            for arrival in arrivals:
                arrival.landing.close()
            if store is not None:
                store.close()

        if self._fetch is None or store is None:
            close()
        else:
            self._fetch.close(close)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def load(
    source: str | os.PathLike[str],
    *,
    rank: int = 0,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int | None = None,
    expert_parallel_size: int = 1,
    stages: Sequence[Sequence[int]] | None = None,
    engine: str = TORCH,
    tensors: Collection[str] | None = None,
    verify: Verify = "blocks",
    manifest_digest: str | None = None,
    workers: int | None = None,
    processes: int = 1,
    revision: str = DEFAULT_REVISION,
    cache: Cache | str | os.PathLike[str] | None = "host",
    access: Access | None = None,
    io: Io = "auto",
) -> Shard:
    """Load the shard of `rank` from a shard set's folder or manifest, or from a store (`s3://bucket/prefix`).

    manifest_digest `sha256:...` that the manifest must have: the root of the chain of trust

    Of a store:

    From a store this returns once the parts' headers are checked, and the bytes arrive in threads meanwhile. Raises
    ManifestError, LayoutError, FormatError or IntegrityError before any tensor exists, StoreError where the store
    cannot be reached; what goes wrong later is raised by whoever asks for a tensor.

    Args:
        rank: pp_rank * tensor_parallel_size + tp_rank.
        expert_parallel_size: Groups of a stage's tensor ranks that share its experts; divides tensor_parallel_size.
        stages: Layers [start, stop) of each pipeline stage; default: those of the split, else even ones.
        engine: Whose way of cutting to follow where engines differ: torch, transformers or vllm.
        tensors: These alone, whatever their stage; default: all that belong to the rank.
        verify: "blocks": every block of the view is checked before this returns (from a store: before a tensor is
            handed out); "headers": the headers, and with them sizes, shapes and places, are; "off": sizes and places
            only, no digest.
        workers: Threads that verify (default: the cores of this process, at most 8) or fetch (default: 16).
        processes: That fetch, with as many threads each: more than one where TLS keeps a core of this one busy.
        io: Of a folder: "mmap", "read" (into memory, in parallel), or "auto": read on network file systems.
        revision: Which manifest.
        cache: Where what is fetched is kept for all workers of this host: a folder, "host" (SHARDPREP_CACHE_DIR, else
            ~/.cache/shardprep), or None: nowhere, straight into this process's memory.
        access: Endpoint, profile and the like; default: the user's environment and files.
    """
    if verify not in ("blocks", "headers", "off"):
        raise LayoutError(f"verify must be blocks, headers or off, not {verify!r}")
    check_io(io)
    if is_uri(source):
        store = open_store(str(source), access)
        try:
            kept = open_cache(cache)
            manifest = _manifest(store, revision, manifest_digest, kept)
        except BaseException:
            store.close()
            raise
    else:
        file = manifests.find(source)
        manifest = manifests.read(file, digest=manifest_digest)
    try:
        view = plan_view(
            manifest,
            rank=rank,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            expert_parallel_size=expert_parallel_size,
            stages=stages,
            engine=engine,
            tensors=tensors,
        )
        if is_uri(source):
            keys = [blob_key(part.digest) for part in view.parts]
            return _fetched(
                store, keys, view, manifest, kept, verify=verify, workers=workers, processes=processes
            )
    except BaseException:
        if is_uri(source):
            store.close()
        raise
    whole = all((file.parent / part.path).exists() for part in view.parts)
    if whole and choose_io(file.parent, io) == "read":
        keys = [part.path for part in view.parts]
        folder = FolderStore(file.parent)
        return _fetched(folder, keys, view, manifest, None, verify=verify, workers=workers, processes=1)
    return _mapped(file.parent, view, manifest, verify=verify, workers=workers)


def load_parts(
    store: Store,
    key: Callable[[Part], str],
    manifest: Manifest,
    *,
    rank: int,
    stages: Sequence[Sequence[int]],
    workers: int | None = None,
) -> Shard:
    """The shard of `rank`, of whole tensors, of a set whose manifest has no file yet; its bytes are read into memory.

    `store` has its parts under `key`; the shard closes it, or, if this fails, the caller.
    """
    view = plan_view(manifest, rank=rank, stages=stages)
    keys = [key(part) for part in view.parts]
    return _fetched(store, keys, view, manifest, None, verify="blocks", workers=workers, processes=1)


def open_cache(cache: Cache | str | os.PathLike[str] | None) -> Cache | None:
    """The cache that `load` and `prefetch` mean by their argument of this name."""
    if cache is None or isinstance(cache, Cache):
        return cache
    folder = environment.cache_folder() if cache == "host" else Path(cache)
    return Cache(folder, max_bytes=environment.cache_bytes())


def _manifest(store: Store, revision: str, digest: str | None, cache: Cache | None) -> Manifest:
    """The manifest of a revision; one that is pinned by its digest needs no store where the cache has it."""
    if cache is not None and digest is not None:
        raw = cache.manifest(digest)
        if raw is not None and manifests.digest_of(raw) == digest:
            return manifests.parse(raw)
    raw, manifest = read_manifest(store, revision, digest)
    if cache is not None:
        cache.keep_manifest(manifests.digest_of(raw), raw)
    return manifest


def _fetched(
    store: Store,
    keys: Sequence[str],
    view: View,
    manifest: Manifest,
    cache: Cache | None,
    *,
    verify: Verify,
    workers: int | None,
    processes: int,
) -> Shard:
    """A shard whose parts arrive from a store, which the caller closes if this fails."""
    workers = workers or WORKERS
    landings: list[tuple[Part, str, Landing]] = []
    try:
        for part, key in zip(view.parts, keys, strict=True):
            landings.append((part, key, cache.open(part) if cache is not None else land_in_memory(part)))
    except BaseException as error:
        for _, _, landing in landings:
            landing.abandon()
        if isinstance(error, OSError):
            raise WriteError(
                f"{quote(part.path)}: {part.size:,} bytes: no memory: {error.strerror}"
            ) from None
        raise
    arrivals = open_arrivals(store, landings, manifest, check_digest=verify != "off", workers=workers)
    shard = None
    try:
        shard = Shard(view, [arrival.part for arrival in arrivals], manifest)
        crew: Crew | None = None
        if processes > 1:
            from .fetch_processes import (
                HelperProcesses,  # imports what speaks S3, which most loads do not need
            )

            crew = HelperProcesses(processes - 1, manifest)
        shard._arrive(store, arrivals, cache, verify=verify == "blocks", workers=workers, crew=crew)
    except BaseException:
        for arrival in arrivals:
            arrival.part.close()
            arrival.landing.close()
        raise
    return shard


def _mapped(folder: Path, view: View, manifest: Manifest, *, verify: Verify, workers: int | None) -> Shard:
    """A shard whose parts lie in a folder and are mapped."""
    parts: list[OpenPart] = []
    maps: dict[OpenPart, bytearray] = {}
    try:
        for part in view.parts:
            found, landed = _open(folder, part, manifest, check_digest=verify != "off")
            parts.append(found)
            if landed is not None:
                maps[found] = landed
        shard = Shard(view, parts, manifest)
        for part_, numbered in [(part, Numbered(part)) for part in maps]:
            _check_there(shard, part_, numbered, maps[part_])
        shard._read_exactly()
        if verify == "blocks":
            shard.check(manifest.block_bytes, workers=workers or default_workers())
    except BaseException:
        for opened in parts:
            opened.close()
        raise
    return shard


def _open(
    folder: Path, part: Part, manifest: Manifest, *, check_digest: bool
) -> tuple[OpenPart, bytearray | None]:
    """A part, and the map of what is there where only some of its ranges were pulled."""
    whole, sparse = folder / part.path, folder / (part.path + SPARSE)
    if not whole.exists() and sparse.exists():
        try:
            found = open_part(folder, part, manifest, check_digest=check_digest, name=part.path + SPARSE)
        except FormatError:
            if not whole.exists():
                raise
        else:
            landed = read_map(sparse, part, len(Numbered(found).blocks))
            if landed is not None:
                return found, landed
            found.close()
            if not whole.exists():
                raise FormatError(f"{found.where}: nothing says which of its bytes are there; pull it again")
        # a pull for another rank has just made it whole
    return open_part(folder, part, manifest, check_digest=check_digest), None


def _check_there(shard: Shard, part: OpenPart, numbered: Numbered, landed: bytearray) -> None:
    """Raises FormatError where the view needs bytes of a part that were not pulled."""
    for each, piece, start, stop in shard.ranges():
        if each is part and not all(
            landed[number] for number in numbered.numbers(piece.span.start + start, piece.span.start + stop)
        ):
            raise FormatError(
                f"{part.where}: only some of its ranges were pulled into this folder, and not those of "
                f"{quote(piece.name)} that rank {shard.view.rank} needs; pull for this rank too, or --all"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
