"""Read the index of a shard set: tensors whose blocks lie in several parts."""

from __future__ import annotations

import os
from pathlib import Path

from shardprep_runtime.errors import ManifestError, quote
from shardprep_runtime.format import cut
from shardprep_runtime.format.manifest import Manifest
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.shard.parts import OpenPart, PieceSpan, open_part

from ..files import LocalFolder
from ..index import Extent, Index, SourceFile, Tensor


def open_parts(folder: Path, manifest: Manifest) -> list[OpenPart]:
    """Open every part and check its header. The caller closes the parts.

    Args:
        folder: Where the parts lie.

    Raises:
        IntegrityError: Where a header does not have the digest that the manifest names.
        FormatError, ManifestError: Where a header is damaged, or contradicts the manifest.
    """
    parts: list[OpenPart] = []
    try:
        for part in manifest.parts:
            parts.append(open_part(folder, part, manifest))  # noqa: PERF401 - what is open is closed if the next fails
    except BaseException:
        for opened in parts:
            opened.close()
        raise
    return parts


def locate_pieces(manifest: Manifest, parts: list[OpenPart]) -> dict[str, list[tuple[OpenPart, PieceSpan]]]:
    """Find every piece of every tensor.

    Args:
        parts: All parts of the set, open.

    Returns:
        Tensor name -> its pieces, in order along the dim that they are cut along; together they are the whole tensor.

    Raises:
        ManifestError: Where a piece is missing, or is stored twice.
    """
    found: dict[tuple[str, int], tuple[OpenPart, PieceSpan]] = {}
    for part in parts:
        for key, piece in part.pieces.items():
            if key in found:
                raise ManifestError(
                    f"{part.where}: {quote(key[0])}: the same piece is in {found[key][0].where} too"
                )
            found[key] = part, piece
    located = {}
    starts: dict[int, list[int]] = {}  # by a form's identity: tensors that are alike share one form, cut once
    for name, entry in manifest.tensors.items():
        form = entry.form
        if id(form) not in starts:
            starts[id(form)] = [piece.start for piece in cut.pieces(form.layout, form.shape, manifest.grain)]
        try:
            located[name] = [found[name, start] for start in starts[id(form)]]
        except KeyError:
            raise ManifestError(
                f"{quote(name)}: a piece of it is in none of the parts; the shard set is broken"
            ) from None
    return located


def read_shard_set(folder: Path) -> tuple[Index, Manifest]:
    """Read a shard set as if it were a checkpoint: the index of its tensors, put together from pieces, and its manifest.

    Raises:
        ManifestError, FormatError, IntegrityError: What `open_parts` and `locate_pieces` raise.
    """
    manifest = read_manifest(folder)
    parts = open_parts(folder, manifest)
    try:
        tensors = {}
        for name, pieces in sorted(locate_pieces(manifest, parts).items()):
            form = manifest.tensors[name].form
            extents = tuple(
                Extent(part.part.path, piece.span.start, piece.piece.start, piece.piece.stop or None)
                for part, piece in pieces
            )
            tensors[name] = Tensor(name, form.dtype, form.shape, extents, form.layout.dim or 0)
        files = tuple(
            SourceFile(part.part.path, found.st_size, str(found.st_mtime_ns), part.part.digest)
            for part in parts
            for found in [os.fstat(part.fd)]
        )
    finally:
        for part in parts:
            part.close()
    side_files = tuple(side.path for side in manifest.side_files)
    index = Index(LocalFolder(folder), "shard set", tensors, manifest.aliases, files, side_files=side_files)
    return index, manifest
