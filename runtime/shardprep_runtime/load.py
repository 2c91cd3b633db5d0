"""Load one worker's shard: plan its view, open its parts, verify, hand out tensors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from . import manifest as manifests
from .errors import LayoutError, ManifestError, quote
from .parts import OpenPart, PieceSpan, blocks_of, byte_range, check_blocks, default_workers
from .tensors import is_mapped, memory_of, tensor_of
from .view import TensorView, View, plan_view

if TYPE_CHECKING:
    import torch

Verify = Literal["blocks", "headers", "off"]


class Shard(Mapping[str, "torch.Tensor"]):
    """What one worker loads: its tensors by name, memory-mapped where a tensor is one piece.

    A tensor that is joined from several pieces is copied when it is first asked for, and kept. Tied names are
    here too and give the same tensor. Tensors stay valid after `close`; the mappings under them, and the descriptor
    that Python keeps of each, go when the last of them does.
    """

    def __init__(self, view: View, parts: Sequence[OpenPart]) -> None:
        self.view = view
        self._parts = tuple(parts)
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
        kept: Counter[str] = Counter()
        for part, _, start, stop in self._ranges():
            kept[part.part.path] += stop - start
        for part in self._parts:
            part.read_exactly(kept[part.part.path] < part.part.size - part.part.header_size)

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

    # ------------------------------------------------------------------------------------------- bytes and tensors
    def memory(self, name: str) -> memoryview:
        """The packed bytes of a tensor, without torch. Of the mapping itself unless the tensor had to be joined."""
        stored = self._stored(name)
        if stored not in self._memory:
            self._memory[stored] = memory_of(self.view.tensors[stored], self._located[stored])
        return self._memory[stored]

    def describe(self, name: str) -> TensorView:
        """Dtype, shape and place of a tensor; reads nothing."""
        return self.view.tensors[self._stored(name)]

    def iter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order in which a forward pass meets them, tied names beside each other.

        A joined tensor lives only as long as its receiver holds it: copying to a device needs no second copy of
        the shard in memory.
        """
        aliases: dict[str, list[str]] = {}
        for alias, name in self.view.names.items():
            aliases.setdefault(name, []).append(alias)
        for name, view in self.view.tensors.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                tensor = tensor_of(view, memory_of(view, self._located[name]))
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
        return headers + sum(stop - start for _, _, start, stop in self._ranges())

    def _ranges(self) -> Iterator[tuple[OpenPart, PieceSpan, int, int]]:
        """The bytes [start, stop) of each piece, counted within it, that this view needs."""
        for name, tensor in self.view.tensors.items():
            for (part, piece), take in zip(self._located[name], tensor.takes, strict=True):
                yield part, piece, *byte_range(tensor.form, piece, take)

    @property
    def bytes_mapped(self) -> int:
        """Bytes that are handed out as they lie in the parts, without a copy."""
        return sum(t.nbytes for name, t in self.view.tensors.items() if is_mapped(t, self._located[name]))

    def check(self, block_bytes: int, *, workers: int) -> None:
        """Check every block that this view needs against its digest. Raises IntegrityError naming the first bad one."""
        blocks = (
            block
            for part, piece, start, stop in self._ranges()
            for block in blocks_of(part, piece, block_bytes, start=start, stop=stop)
        )
        check_blocks(blocks, workers=workers)

    def close(self) -> None:
        """Close the parts. What was not asked for yet can no longer be joined."""
        for part in self._parts:
            part.close()
        self._parts = ()

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
    stages: Sequence[Sequence[int]] | None = None,
    verify: Verify = "blocks",
    manifest_digest: str | None = None,
    vocab_multiple: int = 1,
    workers: int | None = None,
) -> Shard:
    """Load the shard of `rank` from a shard set's folder or manifest.

    rank            pp_rank * tensor_parallel_size + tp_rank
    stages          layers [start, stop) of each pipeline stage; default: those of the split, else even ones
    verify          "blocks": every block of the view is checked before this returns; "headers": the headers, and
                    with them sizes, shapes and places, are; "off": sizes and places only, no digest
    manifest_digest `sha256:...` that the manifest must have: the root of the chain of trust
    vocab_multiple  pads the rows of a vocabulary before they are shared: 1 as torch does, 64 as vLLM does
    workers         threads that verify; default: the cores of this process, at most 8

    Raises ManifestError, LayoutError, FormatError or IntegrityError before any tensor exists.
    """
    if verify not in ("blocks", "headers", "off"):
        raise LayoutError(f"verify must be blocks, headers or off, not {verify!r}")
    file = manifests.find(source)
    manifest = manifests.read(file, digest=manifest_digest)
    view = plan_view(
        manifest,
        rank=rank,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        stages=stages,
        vocab_multiple=vocab_multiple,
    )
    parts: list[OpenPart] = []
    try:
        for part in view.parts:
            parts.append(OpenPart(file.parent, part, manifest, check_digest=verify != "off"))  # noqa: PERF401 - what is open must be closed if the next fails
        shard = Shard(view, parts)
        if verify == "blocks":
            shard.check(manifest.block_bytes, workers=workers or default_workers())
    except BaseException:
        for opened in parts:
            opened.close()
        raise
    return shard


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(quote(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
