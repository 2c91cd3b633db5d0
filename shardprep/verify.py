"""Prove a shard set: that it is complete and consistent, and that every byte is the one that was split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.read_manifest import find_manifest, read_manifest
from shardprep_runtime.shard.parts import Block, blocks_of, check_blocks, default_workers

from .files import LocalFolder
from .source import locate_pieces, open_parts
from .write.side_files import check_side_file


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` has read and compared."""

    path: Path
    manifest_digest: str
    parts: int
    pieces: int
    blocks: int
    """Number of blocks whose digest was compared; 0 with `fast`."""
    nbytes: int
    """Bytes of tensor data that were digested."""
    side_files: int


def verify(
    path: Path, *, fast: bool = False, manifest_digest: str | None = None, workers: int | None = None
) -> VerifyReport:
    """Check a shard set: its structure, sizes, headers, side files, and every block of every piece.

        report = verify(Path("llama-70b-tp8"), manifest_digest="sha256:...")
        print(report.blocks, "blocks are whole")

    Args:
        path: The folder of the set, or its manifest.
        fast: Leave the blocks out, so that no tensor data are read.
        manifest_digest: `sha256:...` that the manifest must have.
        workers: Threads; default: the cores of this process, at most 8.

    Raises:
        ManifestError, FormatError, IntegrityError: Naming the first bad part, tensor and block.
    """
    file = find_manifest(path)
    raw_digest = manifests.digest_of(file.read_bytes()) if file.stat().st_size <= manifests.MAX_BYTES else ""
    manifest = read_manifest(file, digest=manifest_digest)
    parts = open_parts(file.parent, manifest)
    try:
        located = locate_pieces(manifest, parts)
        for side in manifest.side_files:
            check_side_file(LocalFolder(file.parent), side)
        blocks: list[Block] = []
        if not fast:
            for part in parts:
                part.read_exactly(False)
            ordered = (
                sorted(  # as they lie on disk, so that the first bad one is the first in the first bad part
                    ((part, piece) for pieces in located.values() for part, piece in pieces),
                    key=lambda item: (item[0].part.path, item[1].span.start),
                )
            )
            for part, piece in ordered:
                size = piece.span.stop - piece.span.start
                blocks += blocks_of(part, piece, manifest.block_bytes, start=0, stop=size)
            check_blocks(blocks, workers=workers or default_workers())
    finally:
        for part in parts:
            part.close()
    return VerifyReport(
        path=file.parent,
        manifest_digest=raw_digest,
        parts=len(parts),
        pieces=sum(map(len, located.values())),
        blocks=len(blocks),
        nbytes=sum(block.stop - block.start for block in blocks),
        side_files=len(manifest.side_files),
    )
