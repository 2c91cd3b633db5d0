"""Restore the checkpoint from a shard set, and prove by digest that every bit is what was split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from shardprep_runtime.errors import IntegrityError, quote
from shardprep_runtime.format import cut
from shardprep_runtime.format.manifest import Manifest

from .convert import DEFAULT_PART_BYTES, ConvertReport, report, write_checkpoint
from .files import LocalFolder
from .source import locate_pieces, open_parts, read_shard_set
from .source.checkpoint import read_weights
from .write.conduct import Conduct
from .write.mover import digest_pieces
from .write.plan import Move, Plan, PlannedPart, PlannedPiece, plan_convert
from .write.side_files import check_side_file


@dataclasses.dataclass(frozen=True, slots=True)
class ExportReport(ConvertReport):
    """What export wrote and proved."""

    blocks: int
    """Number of blocks whose digests are equal in the exported files and in the parts: all of them."""


def export(
    source: Path,
    destination: Path,
    *,
    max_part_bytes: int = DEFAULT_PART_BYTES,
    conduct: Conduct | None = None,
) -> ExportReport:
    """Write the checkpoint that a shard set was split from: the same files that `convert` writes.

    Before a file gets its final name, all are read again and cut as the shard set is. The digest of every block is
    compared with the one in the parts.

        report = export(Path("llama-70b-tp8"), Path("restored"))
        print(report.blocks, "blocks proved")

    Args:
        source: The folder of a shard set.
        destination: A new or empty folder.
        max_part_bytes: Bytes of tensor data in a file at most, unless one tensor is larger.
        conduct: Threads, and who is told of the progress.

    Raises:
        IntegrityError: For the first block that differs.
        InputError, WriteError: As `convert` raises them.
    """
    index, manifest = read_shard_set(source)
    for side in manifest.side_files:
        check_side_file(index.folder, side)
    plan = plan_convert(index, max_part_bytes=max_part_bytes, aliases=index.aliases)
    conduct = conduct or Conduct()
    blocks = 0

    def prove(folder: Path) -> None:
        nonlocal blocks
        blocks = _prove(source, manifest, folder, [part.path for part in plan.parts], workers=conduct.workers)

    write_checkpoint(plan, index, destination, conduct=conduct, prove=prove)
    done = report(plan, index, destination)
    return ExportReport(
        **{field.name: getattr(done, field.name) for field in dataclasses.fields(done)}, blocks=blocks
    )


def _prove(source: Path, manifest: Manifest, folder: Path, files: list[str], *, workers: int | None) -> int:
    """Compare the digests of the written files with those of the parts, and count the blocks compared."""
    written = read_weights(LocalFolder(folder), "safetensors", files)
    cuts: dict[int, tuple[cut.Piece, ...]] = {}  # by a form's identity: tensors that are alike are cut once
    moves = []
    for name, entry in manifest.tensors.items():
        form = entry.form
        if id(form) not in cuts:
            cuts[id(form)] = cut.pieces(form.layout, form.shape, manifest.grain)
        own = tuple(PlannedPiece(name, form, piece, 0, 0) for piece in cuts[id(form)])
        if own:  # an empty tensor has no pieces
            moves.append(Move(written.tensors[name], form.dtype, form.layout.dim or 0, own))
    pieces = tuple(piece for move in moves for piece in move.pieces)
    found = digest_pieces(
        Plan((PlannedPart("", pieces),), tuple(moves), manifest.block_bytes), written, workers=workers
    )
    blocks = 0
    parts = open_parts(source, manifest)
    try:
        for name, located in locate_pieces(manifest, parts).items():
            for part, stored in located:
                blocks += len(stored.digests)
                if tuple(found[name, stored.piece.start]) != stored.digests:
                    raise IntegrityError(
                        f"{part.where}: tensor {quote(name)}: its bytes do not match their digests; "
                        "nothing was exported; `shardprep verify` names the block"
                    )
    finally:
        for part in parts:
            part.close()
    return blocks
