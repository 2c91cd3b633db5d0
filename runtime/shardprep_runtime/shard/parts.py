"""Open parts, and prove headers by the manifest, pieces by the layout, and blocks by their digests."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Final

from ..errors import FormatError, IntegrityError, ManifestError, quote
from ..format import cut
from ..format.header import Header, Span, list_text, loads_strict, parse_header
from ..format.manifest import Form, Manifest, Part, digest_of

METADATA_KEY: Final = "shardprep"
"""Our own key in a part's `__metadata__`. torch's are format, DCP_VERSION and DCP_SHARDING_INFO."""

SCRATCH: Final = 2**20
"""Bytes that are read at a time to digest a block that is not in memory."""


def default_workers() -> int:
    """Threads that move or digest bytes: the cores of this process, at most 8, since a disk gains nothing from more."""
    return min(8, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class PieceSpan:
    """Where a piece lies in its part."""

    name: str
    piece: cut.Piece
    span: Span
    digests: tuple[str, ...]
    """blake3 of each block of the piece, in 64 hex digits."""


def part_metadata(
    pieces: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], Iterable[str]]], block_bytes: int
) -> dict[str, str]:
    """Write the `__metadata__` of a part.

    The first three keys are torch.distributed.checkpoint's dialect of safetensors (torch 2.13,
    torch/distributed/checkpoint/_hf_utils.py), so that DCP and transformers read the folder as it is.

    Args:
        pieces: Name of the tensor -> its full shape, the offset of the piece in it, and the digests of the piece's
            blocks.
        block_bytes: Bytes of each block but the last.
    """
    texts = [piece_texts(encode_basestring_ascii(name), *piece) for name, piece in pieces.items()]
    sharding, own = (",".join(text[i] for text in texts) for i in (0, 1))
    return {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": f"{{{sharding}}}",
        METADATA_KEY: f'{{"block_bytes":{block_bytes},"pieces":{{{own}}}}}',
    }


def piece_texts(
    key: str, shape: tuple[int, ...], offset: tuple[int, ...], digests: Iterable[str]
) -> tuple[str, str]:
    """Write what DCP's list and ours say of one piece, as members of JSON objects.

    Args:
        key: The tensor's name, as JSON text with its quotes.
        shape: Full shape of the tensor.
        offset: Where the piece begins in it, an index for each dim.
        digests: blake3 of each block of the piece, in hex.

    Returns:
        The member of DCP_SHARDING_INFO, and that of our `pieces`.
    """
    at = list_text(offset)
    blocks = ",".join(f'"{digest}"' for digest in digests)
    return (
        f'{key}:{{"saved_offsets":{at}}}',
        f'{key}:{{"shape":{list_text(shape)},"offset":{at},"blocks":[{blocks}]}}',
    )


def piece_block(form: Form, piece: cut.Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a piece lies in its full tensor.

    Args:
        form: Form of the tensor.
        piece: One of the pieces that its layout makes.

    Returns:
        The offset, an index for each dim, and the shape of the piece.
    """
    dim = form.layout.dim
    if dim is None:
        return (0,) * len(form.shape), form.shape
    offset = tuple(piece.start if i == dim else 0 for i in range(len(form.shape)))
    shape = (*form.shape[:dim], piece.stop - piece.start, *form.shape[dim + 1 :])
    return offset, shape


def check_pieces(
    header: Header, manifest: Manifest, part: Part, *, where: str
) -> dict[tuple[str, int], PieceSpan]:
    """Prove that each piece of a part is one that the layout makes.

    Args:
        header: The part's header.
        manifest: The set's manifest.
        part: What the manifest says of the part.
        where: Name of the file, for messages.

    Returns:
        The pieces by name and start along the cut dim (0 where the tensor is whole).

    Raises:
        ManifestError: Where header and manifest contradict each other.
    """
    try:
        own = loads_strict(header.metadata[METADATA_KEY], where=where)
        block_bytes, pieces = own["block_bytes"], own["pieces"]
        if block_bytes != manifest.block_bytes or pieces.keys() != header.tensors.keys():
            raise ManifestError(
                f"{where}: its list of pieces does not match its tensors or the manifest's block size"
            )
        found = {}
        cuts: dict[int, _Cuts] = {}
        for name, span in header.tensors.items():
            piece = _match(manifest, part, name, span, pieces[name], cuts, where=where)
            found[name, piece.piece.start] = piece
    except (KeyError, TypeError, AttributeError):
        raise ManifestError(
            f"{where}: its own metadata is missing or malformed; not a part of a shard set"
        ) from None
    return found


_Cuts = dict[int, tuple[cut.Piece, tuple[tuple[int, ...], tuple[int, ...]]]]
"""Start along the cut dim -> the piece and its `piece_block`: the pieces of one form that the ranks of a part own."""


def _match(
    manifest: Manifest,
    part: Part,
    name: str,
    span: Span,
    own: Any,
    cuts: dict[int, _Cuts],
    *,
    where: str,
) -> PieceSpan:
    """One proved piece of a part. `cuts` keeps what was worked out for each form, by `id(form)`."""
    entry = manifest.tensors.get(name)
    if entry is None:
        raise ManifestError(f"{where}: {quote(name)}: not a tensor of the manifest")
    form, dim = entry.form, entry.form.layout.dim
    offset, blocks = tuple(own["offset"]), own["blocks"]
    if tuple(own["shape"]) != form.shape or span.dtype != form.dtype or len(offset) != len(form.shape):
        raise ManifestError(
            f"{where}: {quote(name)}: {span.dtype} piece of {quote(own['shape'])}, expected {form.dtype} "
            f"{list(form.shape)}"
        )
    start = 0 if dim is None else offset[dim]
    known = cuts.get(id(form))
    if known is None:
        known = cuts[id(form)] = {
            piece.start: (piece, piece_block(form, piece))
            for piece in cut.pieces(form.layout, form.shape, manifest.grain)
            if (piece.first_rank, piece.last_rank) == part.ranks
        }
    if start not in known:
        raise ManifestError(
            f"{where}: {quote(name)}: no piece of ranks {list(part.ranks)} of grain {manifest.grain} begins at "
            f"offset {list(offset)}"
        )
    piece, block = known[start]
    if (offset, span.shape) != block:
        raise ManifestError(
            f"{where}: {quote(name)}: shape {list(span.shape)} at {list(offset)}, expected {block}"
        )
    count = -(-(span.stop - span.start) // manifest.block_bytes)
    if len(blocks) != count or not all(isinstance(digest, str) and len(digest) == 64 for digest in blocks):
        raise ManifestError(f"{where}: {quote(name)}: {len(blocks)} digests of blocks, expected {count}")
    return PieceSpan(name, piece, span, tuple(blocks))


class OpenPart:
    """A part that is open and mapped. Its header is proved when it is made.

    The mapping is private, so nobody can change the file through it. It is writable, since torch warns about read-only
    memory. Pages come in as they are touched.
    """

    def __init__(
        self, fd: int, raw: bytes, part: Part, manifest: Manifest, *, where: str, check_digest: bool = True
    ) -> None:
        """Map the part, and prove its header and pieces.

        Args:
            fd: Descriptor of a file that has the part's size. `close` closes it; if this fails, the caller does.
            raw: The header's bytes.
            part: What the manifest says of the part.
            manifest: The set's manifest.
            where: Name of the file, for messages.
            check_digest: Compare the header with its digest.

        Raises:
            IntegrityError: Where the header does not match its digest.
            FormatError, ManifestError: Where it is malformed, or contradicts the manifest.
        """
        self.fd, self.part, self.where, self.block_bytes = fd, part, where, manifest.block_bytes
        if check_digest:
            check_header(raw, part, where=where)
        self.pieces = check_pieces(parse_header(raw, part.size, where=where), manifest, part, where=where)
        self.map = mmap.mmap(fd, part.size, access=mmap.ACCESS_COPY)

    def read_exactly(self, exactly: bool) -> None:
        """Have reads of the file bring in only what they ask for, or let the kernel read ahead as usual.

        Reading ahead also gives large pages, which are cheaper to map: right for a part all of which is wanted.
        """
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM if exactly else os.POSIX_FADV_NORMAL)

    def in_memory(self, start: int, stop: int) -> bool:
        """Whether a range seems to be in the page cache: three of its bytes are asked for without waiting.

        Args:
            start: First byte of the part.
            stop: One past the last byte.
        """
        probe = bytearray(1)
        try:
            for at in (start, (start + stop) // 2, stop - 1):
                os.preadv(self.fd, [probe], at, os.RWF_NOWAIT)
        except OSError:  # it would wait; or the file system cannot tell
            return False
        return True

    def read_into(self, offset: int, into: memoryview) -> None:
        """Read bytes of the part.

        Args:
            offset: First byte of the part.
            into: Memory that they fill.

        Raises:
            FormatError: Where the file ends before.
        """
        done = 0
        while done < len(into):
            got = os.preadv(self.fd, [into[done:]], offset + done)
            if got == 0:
                raise FormatError(f"{self.where}: truncated while it was read, at byte {offset + done}")
            done += got

    def close(self) -> None:
        """Close the descriptor. The mapping lives as long as a tensor uses it. A second call does nothing."""
        fd, self.fd = self.fd, -1  # its number will soon be another file's
        if fd >= 0:
            os.close(fd)


def open_part(
    folder: Path, part: Part, manifest: Manifest, *, check_digest: bool = True, name: str | None = None
) -> OpenPart:
    """Open a part that lies in a folder. The caller closes it.

    Args:
        folder: The folder.
        part: What the manifest says of the part.
        manifest: The set's manifest.
        check_digest: Compare the header with its digest.
        name: Name of the file; default: the part's own.

    Raises:
        FormatError: Where the file is missing, has another size, or has a malformed header.
        IntegrityError: Where the header does not match its digest.
        ManifestError: Where the header contradicts the manifest.
    """
    path = folder / (name or part.path)
    where = quote(path)
    try:
        # O_NONBLOCK: a FIFO of this name must not hang us
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "; was the folder pulled for other ranks alone?" if error.errno == errno.ENOENT else ""
        raise FormatError(f"{where}: cannot open the part: {error.strerror}{hint}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{where}: not a regular file")
        if found.st_size != part.size:
            kind = "truncated" if found.st_size < part.size else "longer than it should be"
            raise FormatError(f"{where}: {kind}: {found.st_size} bytes, the manifest says {part.size}")
        # no read-ahead behind the header: what follows may be bytes of other ranks
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        raw = os.pread(fd, part.header_size, 0)
        return OpenPart(fd, raw, part, manifest, where=where, check_digest=check_digest)
    except BaseException:
        os.close(fd)
        raise


def check_header(raw: bytes, part: Part, *, where: str) -> None:
    """Compare a part's header with its digest.

    Args:
        raw: The header's bytes.
        part: What the manifest says of the part.
        where: Name of the file, for messages.

    Raises:
        IntegrityError: Where they differ.
    """
    if digest_of(raw) != part.digest:
        raise IntegrityError(
            f"{where}: the header's digest is {digest_of(raw)}, the manifest says {part.digest}; "
            "the part was changed or belongs to another shard set"
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes [start, stop) of a part: a block of one of its pieces, which has a digest of its own."""

    part: OpenPart
    piece: PieceSpan
    index: int
    """Which block of the piece it is, from 0."""
    start: int
    """First byte, counted within the part."""
    stop: int
    """One past the last byte."""

    def check(self) -> None:
        """Compare the bytes with their digest. Raises IntegrityError where they differ."""
        from blake3 import blake3

        digest = blake3()
        if self.part.in_memory(self.start, self.stop):
            with memoryview(self.part.map) as data, data[self.start : self.stop] as block:
                digest.update(block)
        else:  # reading is faster than faulting pages in, and brings them in all the same
            scratch = memoryview(bytearray(min(SCRATCH, self.stop - self.start)))
            for at in range(self.start, self.stop, SCRATCH):
                chunk = scratch[: min(SCRATCH, self.stop - at)]
                self.part.read_into(at, chunk)
                digest.update(chunk)
        if digest.hexdigest() != self.digest:
            raise self.damaged()

    @property
    def digest(self) -> str:
        """blake3 that the bytes must have, in hex."""
        return self.piece.digests[self.index]

    def damaged(self) -> IntegrityError:
        """The error that says that the bytes do not match their digest."""
        return IntegrityError(
            f"{self.part.where}: tensor {quote(self.piece.name)}: block {self.index} (bytes {self.start} to "
            f"{self.stop}) does not match its digest: the file is damaged; fetch or split it again"
        )


def blocks_of(
    part: OpenPart, piece: PieceSpan, block_bytes: int, *, start: int, stop: int
) -> Iterator[Block]:
    """The blocks that hold a range of a piece.

    Args:
        part: The open part.
        piece: One of its pieces.
        block_bytes: Bytes of each block but a piece's last.
        start: First byte, counted within the piece.
        stop: One past the last byte.
    """
    span = piece.span
    for index in range(start // block_bytes, -(-stop // block_bytes)):
        low = span.start + index * block_bytes
        yield Block(part, piece, index, low, min(low + block_bytes, span.stop))


class Numbered:
    """A part's blocks by number: 1 for the first, in the order of their bytes. They tile the part behind its header."""

    def __init__(self, part: OpenPart) -> None:
        self.part = part
        self.blocks: list[Block] = []
        for piece in sorted(part.pieces.values(), key=lambda piece: piece.span.start):
            size = piece.span.stop - piece.span.start
            self.blocks += blocks_of(part, piece, part.block_bytes, start=0, stop=size)
        self._starts = [block.start for block in self.blocks]

    def numbers(self, start: int, stop: int) -> range:
        """The numbers of the blocks that hold a range.

        Args:
            start: First byte of the part.
            stop: One past the last byte.
        """
        if start >= stop:
            return range(0)
        return range(bisect_right(self._starts, start), bisect_left(self._starts, stop) + 1)

    def block(self, number: int) -> Block:
        return self.blocks[number - 1]


def check_blocks(blocks: Iterable[Block], *, workers: int) -> None:
    """Compare blocks with their digests, and stop at a bad one.

    Args:
        blocks: The blocks.
        workers: Threads, each with a block at a time.

    Raises:
        IntegrityError: That of the bad block which comes first in `blocks` among those that were compared.
    """
    pending = iter(blocks)
    lock = threading.Lock()
    stop = threading.Event()
    bad: list[tuple[int, IntegrityError]] = []
    count = 0

    def work() -> None:
        nonlocal count
        while not stop.is_set():
            with lock:
                block = next(pending, None)
                number = count = count + 1
            if block is None:
                return
            try:
                block.check()
            except IntegrityError as error:
                bad.append((number, error))
                stop.set()

    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="shardprep-verify") as pool:
        done, _ = wait([pool.submit(work) for _ in range(workers)], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    if bad:
        raise min(bad, key=lambda item: item[0])[1]
