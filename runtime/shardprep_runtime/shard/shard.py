"""Hand out one worker's shard: its tensors by name, mapped or joined, as their bytes arrive."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from ..errors import LayoutError, ManifestError, SourceError, quote
from ..format.manifest import Manifest
from ..format.view import TensorView, View
from ..stores.store import Store
from .cache import Cache
from .fetch import Arrival, Crew, Fetch, plan_runs
from .parts import OpenPart, PieceSpan, blocks_of, check_blocks
from .tensors import is_mapped, memory_of, tensor_of

if TYPE_CHECKING:
    import torch

Verify = Literal["blocks", "headers", "off"]
"""How much of a shard is checked, as `shard_set.ShardSet.verify` has it."""

VERIFY: Final = get_args(Verify)
"""All values of Verify; the first is the default."""


def check_verify(verify: str) -> Verify:
    """Give `verify` back if it is a Verify. Raises LayoutError otherwise."""
    if verify not in VERIFY:
        raise LayoutError(f"verify must be blocks, headers or off, not {verify!r}")
    return cast(Verify, verify)


class Shard(Mapping[str, "torch.Tensor"]):
    """What one worker loads: its tensors by name, memory-mapped where a tensor is one piece.

    A tensor that is joined from several pieces is copied when it is first asked for, and kept. Tied names are here too,
    and give the same tensor. Tensors stay valid after `close`. A mapping, with the descriptor that Python keeps of it,
    goes when its last tensor does.

    While the shard is being fetched, whoever asks for a tensor waits until its own bytes have arrived. With
    `verify="blocks"` they match their digests then.

    A joined tensor of a shard that is fetched into memory is the only copy of its bytes: the pieces' memory is given
    back. A process that was forked before cannot see the joined tensor, and is refused it (fetch.py).
    """

    def __init__(self, view: View, parts: Sequence[OpenPart], manifest: Manifest) -> None:
        """Find the pieces of each tensor in the parts.

        Args:
            view: What the worker loads.
            parts: The view's parts, open. `close` closes them; if this fails, the caller does.
            manifest: The set's manifest.

        Raises:
            ManifestError: Where a piece is in none of the parts.
        """
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

    def read_exactly(self) -> None:
        """Have reads of the parts' files bring in this view's bytes and not others'."""
        kept: Counter[str] = Counter()
        for part, _, start, stop in self.ranges():
            kept[part.part.path] += stop - start
        for part in self._parts:
            part.read_exactly(kept[part.part.path] < part.part.size - part.part.header_size)

    def arrive(
        self,
        store: Store,
        arrivals: Sequence[Arrival],
        cache: Cache | None,
        *,
        verify: bool,
        workers: int,
        crew: Crew | None,
    ) -> None:
        """Begin to fetch what the view needs, in the order in which a forward pass meets it.

        Args:
            store: Has the parts. `close` closes it; if this fails, the caller does.
            arrivals: The shard's parts, with their landings, which `close` closes.
            cache: Where they land, which has to make room; None: in memory.
            verify: Compare every block with its digest.
            workers: Threads that fetch.
            crew: Processes that help, if any.

        Raises:
            WriteError: Where the cache does not have room.
        """
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
        """A tensor that the shard does not keep: a joined one is joined anew each time, unless `[name]` has kept it.

        Of a shard that is fetched into memory a joined tensor is always kept.
        """
        stored = self._stored(name)
        tensor = self._tensors.get(stored)
        if tensor is None:
            found = self._memory.get(stored)
            tensor = tensor_of(self.view.tensors[stored], found if found is not None else self._make(stored))
        return tensor

    # ------------------------------------------------------------------------------------------- bytes and tensors
    def memory(self, name: str) -> memoryview:
        """The packed bytes of a tensor, without torch: those of the mapping, unless the tensor has to be joined."""
        stored = self._stored(name)
        if stored not in self._memory:
            self._memory[stored] = self._make(stored)
        return self._memory[stored]

    def _make(self, stored: str) -> memoryview:
        """A tensor's bytes, mapped or joined, once they have arrived."""
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
        # joined from memory, whose pieces are then given back: this is the only copy, whichever thread asks
        with self._joining:
            if stored not in self._memory:
                joined = memory_of(view, located)
                assert self._fetch is not None
                for part, piece in located:
                    arrival = self._arrivals[part]
                    if not self._fetch.elsewhere:
                        arrival.give_back(piece)
                    elif arrival.is_given(piece):  # asked after the copy: the parent marks before it frees
                        raise SourceError(
                            f"{quote(stored)}: the process that this one was forked from has joined it and given its "
                            "pieces back; ask for it before forking, or load in the new process"
                        )
                self._memory[stored] = joined
        return self._memory[stored]

    def wait(self) -> None:
        """Return once all of the shard has arrived. Raises the ShardprepError that ended the fetch, if one did."""
        if self._fetch is not None:
            self._fetch.wait_all()

    @property
    def bytes_fetched(self) -> int:
        """Bytes of tensors that this process has brought from the store so far; others come from the cache."""
        return self._fetch.bytes_fetched if self._fetch is not None else 0

    def describe(self, name: str) -> TensorView:
        """Dtype, shape and pieces of a tensor; reads nothing."""
        return self.view.tensors[self._stored(name)]

    def iter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order in which a forward pass meets them, tied names beside each other.

        A joined tensor lives only as long as its receiver holds it. So copying to a device needs only one copy of the
        shard in memory. (Of a shard that is fetched into memory, it replaces the pieces that it was joined from.)
        """
        aliases: dict[str, list[str]] = {}
        for alias, name in self.view.names.items():
            aliases.setdefault(name, []).append(alias)
        for name in self.view.tensors:
            tensor = self.read(name)
            for each in (name, *aliases.get(name, ())):
                yield each, tensor

    def load_into(self, module: torch.nn.Module, *, strict: bool = True) -> None:
        """Assign the tensors to the parameters and buffers of a module.

        Args:
            module: Has this shard's local shapes; may be on torch's meta device.
            strict: Refuse where one has names that the other lacks.

        Raises:
            LayoutError: Before anything is assigned, where names or shapes differ.
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
        """Bytes that the worker keeps; tied tensors count once."""
        return self.view.nbytes

    @property
    def bytes_read(self) -> int:
        """Bytes of the parts that this view needs: their headers and the ranges of its pieces."""
        headers = sum(part.header_size for part in self.view.parts)
        return headers + sum(stop - start for _, _, start, stop in self.ranges())

    def ranges(self) -> Iterator[tuple[OpenPart, PieceSpan, int, int]]:
        """(part, piece, start, stop): the bytes that this view reads, counted within the piece, in its tensors' order.

        `stop` is one past the last byte. Where only parts of rows are wanted, what lies between them counts too.
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
        """Compare every block that this view needs with its digest.

        Args:
            block_bytes: Bytes of each block but a piece's last: the manifest's.
            workers: Threads.

        Raises:
            IntegrityError: Names the first bad block.
        """
        blocks = (
            block
            for part, piece, start, stop in self.ranges()
            for block in blocks_of(part, piece, block_bytes, start=start, stop=stop)
        )
        check_blocks(blocks, workers=workers)

    def close(self) -> None:
        """Stop fetching, without waiting, and close the parts.

        A tensor that was not asked for can no longer be had, if it must be joined or has not arrived.
        """
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


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
