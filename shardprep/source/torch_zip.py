"""Decide where the members of a torch zip lie, refusing any zip that two readers could read differently.

The format is PKWARE's APPNOTE (sections 4.3 and 4.5); of it we accept what torch writes: members stored as they are,
one after the other from byte 0 to the central directory, the end record last. Nothing can be hidden, listed twice
or overlap in such a file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shardprep_runtime.errors import FormatError, UnsupportedError, quote

from ..files import File, read_at

MAX_DIRECTORY_BYTES: Final = 64 * 2**20
MAX_MEMBERS: Final = 400_000
"""Members that a zip may have. Each storage is one member, and costs about a kilobyte of memory here."""

_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64: Final = struct.Struct("<4sLQL")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_MAX32: Final = 2**32 - 1
_MAX16: Final = 2**16 - 1
_ZIP64: Final = 0x0001
_PADDING: Final = 0x4246  # "FB": torch's filler, so that storages are aligned
_HAS_DESCRIPTOR: Final = 0x8
_UTF8: Final = 0x800
_LONGEST_DESCRIPTOR: Final = 24
SMALL: Final = 64
"""A member of at most so many bytes is fetched together with its header: `version` and `byteorder` are so small."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the zip."""

    name: str
    """The name without the zip's top folder."""
    start: int
    """First byte of its data, counted from the start of the zip."""
    stop: int
    """One past the last byte."""
    crc32: int


@dataclass(frozen=True, slots=True)
class Zip:
    """What a zip holds."""

    members: Mapping[str, Member]
    """Name -> member, in the order in which they lie in the file."""
    directory: bytes
    """The central directory, as it lies in the file."""
    has_crc: bool
    """False where the writer was told to leave checksums out (`torch.serialization.set_crc32_options(False)`)."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the central directory."""

    raw_name: bytes
    name: str
    common: tuple[int, ...]
    """Version needed, flags, method, time and date: the fields that the local header repeats."""
    crc32: int
    size: int
    offset: int


def read_zip(file: File, *, where: str) -> Zip:
    """Find the members of the zip.

    Args:
        where: The file as error messages name it.

    Raises:
        FormatError: On any breach of the format, and for a zip that two readers could read differently.
    """
    start, stop, count = _find_directory(file, where=where)
    directory = read_at(file, stop - start, start)
    entries = sorted(_entries(directory, count, where=where), key=lambda entry: entry.offset)
    tops = {entry.name.partition("/")[0] for entry in entries}
    if len(tops) != 1 or not all("/" in entry.name for entry in entries):
        raise FormatError(f"{where}: a torch zip has all its members in one folder, this one has {len(tops)}")
    if len({entry.name.casefold() for entry in entries}) != len(entries):
        raise FormatError(f"{where}: two members of the zip have the same name")
    has_crc = any(entry.crc32 for entry in entries if entry.size)
    if entries[0].offset:
        raise FormatError(
            f"{where}: {entries[0].offset} bytes before the first member of the zip; made to be read in two ways?"
        )
    # each member must fill the place up to the next, the last one up to the directory: no hole, no overlap
    followed_by = [*(entry.offset for entry in entries[1:]), start]
    file.hint([bounds for pair in zip(entries, followed_by, strict=True) for bounds in _around(*pair)])
    found = [_member(file, entry, end, where=where) for entry, end in zip(entries, followed_by, strict=True)]
    members = {member.name: member for member in found}
    return Zip(members, directory, has_crc)


def read_member(file: File, archive: Zip, name: str, *, most: int, where: str) -> bytes:
    """Read the member `name` whole.

    Args:
        most: Bytes that it may have at most.
        where: The file as error messages name it.

    Raises:
        FormatError: Where it is larger, or does not match its CRC-32.
    """
    member = archive.members[name]
    count = member.stop - member.start
    if count > most:
        raise FormatError(f"{where}: {quote(name)} has {count} bytes, expected at most {most}")
    found = read_at(file, count, member.start)
    if archive.has_crc and zlib.crc32(found) != member.crc32:
        raise FormatError(
            f"{where}: {quote(name)} does not match its CRC-32: the file is damaged; fetch it again"
        )
    return found


def _find_directory(file: File, *, where: str) -> tuple[int, int, int]:
    """First byte of the central directory, one past its last, and how many members it lists."""
    size = file.size
    tail_size = min(size, _END.size + _LOCATOR64.size + _END64.size)
    tail = read_at(file, tail_size, size - tail_size)
    if tail_size < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise FormatError(
            f"{where}: no end record in the last {_END.size} bytes of the zip: truncated, or bytes were appended; fetch it again"
        )
    _, disk, first_disk, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    stop = size - _END.size
    if disk or first_disk or here != count or comment:
        raise FormatError(f"{where}: a zip of several disks or with a comment is not a torch file")
    if tail[:4] == b"PK\x06\x06" and tail[_END64.size :][:4] == b"PK\x06\x07":
        stop -= _LOCATOR64.size + _END64.size
        _, disk, offset, disks = _LOCATOR64.unpack_from(tail, _END64.size)
        _, rest, _, _, disk2, disk3, here64, count64, length64, start64 = _END64.unpack_from(tail)
        short = (min(count64, _MAX16), min(length64, _MAX32), min(start64, _MAX32))
        long = (count, length, start)
        if (disk, offset, disks, rest, disk2, disk3, here64) != (
            0,
            stop,
            1,
            _END64.size - 12,
            0,
            0,
            count64,
        ) or any(a not in (b, top) for a, b, top in zip(long, short, (_MAX16, _MAX32, _MAX32), strict=True)):
            raise FormatError(f"{where}: the two end records of the zip contradict each other")
        count, length, start = count64, length64, start64
    elif (
        tail[-_END.size - _LOCATOR64.size :][:4] == b"PK\x06\x07"
        or _MAX32 in (length, start)
        or count == _MAX16
    ):
        raise FormatError(f"{where}: the zip64 end record is missing or not in its place")
    if start + length != stop:
        raise FormatError(f"{where}: the directory of the zip ends at byte {start + length}, expected {stop}")
    if length > MAX_DIRECTORY_BYTES or not 0 < count <= MAX_MEMBERS:
        raise FormatError(
            f"{where}: a zip directory of {count} members in {length} bytes is not a torch file's"
        )
    return start, stop, count


def _entries(directory: bytes, count: int, *, where: str) -> list[_Entry]:
    found: list[_Entry] = []
    pos = 0
    while pos < len(directory):
        if len(directory) - pos < _CENTRAL.size or directory[pos : pos + 4] != b"PK\x01\x02":
            raise FormatError(f"{where}: the directory of the zip is damaged at its byte {pos}")
        _, _, *common, crc32, packed, size, name_length, extra_length, comment, disk, _, _, offset = (
            _CENTRAL.unpack_from(directory, pos)
        )
        names = pos + _CENTRAL.size
        pos = names + name_length + extra_length
        if pos > len(directory):
            raise FormatError(f"{where}: the directory of the zip is truncated")
        raw_name = directory[names : names + name_length]
        name = _name(raw_name, utf8=bool(common[1] & _UTF8), where=where)
        wide = _extra(directory[names + name_length : pos], f"{where}: {quote(name)}")
        values = [size, packed, offset]
        needed = [index for index, value in enumerate(values) if value == _MAX32]
        if len(wide) != len(needed):
            raise FormatError(f"{where}: {quote(name)}: the zip64 sizes do not fit the entry")
        for index, value in zip(needed, wide, strict=True):
            values[index] = value
        _, flags, method, _, _ = common
        inner = name.partition("/")[2]
        if inner == "constants.pkl" or inner.startswith("code/"):
            raise UnsupportedError(
                f"{where}: a TorchScript program (torch.jit.save), not a checkpoint\n"
                "load it by torch.jit.load and torch.save(module.state_dict(), ...)"
            )
        if method or values[0] != values[1]:
            raise FormatError(
                f"{where}: {quote(name)} is compressed; torch stores as it is\nunpack it and save it again by torch.save"
            )
        if flags & ~(_HAS_DESCRIPTOR | _UTF8) or comment or disk:
            raise FormatError(
                f"{where}: {quote(name)} is encrypted or otherwise special; torch writes no such member"
            )
        found.append(_Entry(raw_name, name, tuple(common), crc32, values[0], values[2]))
        if len(found) > count:
            break
    if len(found) != count:
        raise FormatError(
            f"{where}: the zip declares {count} members, its directory lists {len(found)} or more"
        )
    return found


def _name(raw: bytes, *, utf8: bool, where: str) -> str:
    try:
        name = raw.decode("utf-8" if utf8 else "ascii")
    except UnicodeDecodeError:
        raise FormatError(
            f"{where}: a member of the zip whose name {quote(raw.decode('latin-1'))} cannot be decoded"
        ) from None
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise FormatError(f"{where}: a member of the zip with the unsafe name {quote(name)}")
    return name


def _extra(raw: bytes, where: str) -> list[int]:
    """The 64-bit values of a header's extra fields; beside them only torch's padding is allowed."""
    values: list[int] | None = None
    pos = 0
    while pos < len(raw):
        kind, length = struct.unpack_from("<2H", raw, pos) if len(raw) - pos >= 4 else (None, 0)
        body = raw[pos + 4 : pos + 4 + length]
        pos += 4 + length
        if pos > len(raw) or kind not in (_ZIP64, _PADDING):
            raise FormatError(f"{where}: an extra field that torch does not write; was the zip repacked?")
        if kind == _ZIP64:
            if values is not None or length not in (8, 16, 24):
                raise FormatError(f"{where}: zip64 sizes stand twice or are cut short")
            values = list(struct.unpack(f"<{length // 8}Q", body))
    return values or []


def _around(entry: _Entry, following: int) -> list[tuple[int, int]]:
    """The byte ranges that are read of a member: its header, its descriptor if there is one, and not its data.

    A small member is read whole, because `version` and `byteorder` are such members and are needed first.
    """
    beside = following - entry.offset - entry.size
    longest = _LOCAL.size + len(entry.raw_name) + _MAX16
    if not 0 <= beside <= longest + _LONGEST_DESCRIPTOR:
        return []  # no member that we take; `_member` says why
    if entry.size <= SMALL or entry.name.endswith("/data.pkl"):
        return [(entry.offset, following)] if entry.size <= MAX_DIRECTORY_BYTES else []
    tail = _LONGEST_DESCRIPTOR if entry.common[1] & _HAS_DESCRIPTOR else 0
    return [(entry.offset, entry.offset + beside - min(tail, 16)), (following - tail, following)]


def _member(file: File, entry: _Entry, following: int, *, where: str) -> Member:
    """Check the local header of `entry`, and that its data and descriptor end exactly where `following` begins."""
    label = f"{where}: {quote(entry.name)}"
    room = following - entry.offset - _LOCAL.size - len(entry.raw_name)
    if room < entry.size:
        raise FormatError(
            f"{label}: overlaps what follows it: {entry.size} bytes in a place of {max(room, 0)}"
        )
    head = read_at(file, _LOCAL.size + len(entry.raw_name), entry.offset)
    signature, *common, crc32, packed, size, name_length, extra_length = _LOCAL.unpack_from(head)
    if (
        signature != b"PK\x03\x04"
        or tuple(common) != entry.common
        or name_length != len(entry.raw_name)
        or head[_LOCAL.size :] != entry.raw_name
    ):
        raise FormatError(f"{label}: its local header contradicts the directory of the zip")
    start = entry.offset + len(head) + extra_length
    stop = start + entry.size
    tail_size = following - stop
    has_descriptor = bool(entry.common[1] & _HAS_DESCRIPTOR)
    if tail_size not in ((16, 24) if has_descriptor else (0,)):
        raise FormatError(
            f"{label}: its data end at byte {stop}, which leaves {tail_size} bytes before what follows"
        )
    wide = _extra(read_at(file, extra_length, start - extra_length), label)
    sizes = [entry.size, entry.size]
    # miniz, which torch writes with, repeats the offset, leaves out what fits in 32 bits, and knows only one size yet
    started = [[entry.size, 0], [entry.size, 0, entry.offset]] if has_descriptor else []
    if wide not in ([], sizes, [*sizes, entry.offset], [entry.offset], *started):
        raise FormatError(f"{label}: the zip64 sizes of its local header contradict the directory of the zip")
    expected = [(crc32, entry.crc32), (packed, entry.size), (size, entry.size)]
    later = has_descriptor and (crc32, packed, size) == (0, 0, 0)
    if not later and any(
        a != b and not (a == _MAX32 and wide[:2] == sizes and n) for n, (a, b) in enumerate(expected)
    ):
        raise FormatError(
            f"{label}: the sizes or CRC-32 of its local header contradict the directory of the zip"
        )
    if has_descriptor:
        layout = "<4sLLL" if tail_size == 16 else "<4sLQQ"
        tail = struct.unpack(layout, read_at(file, tail_size, stop))
        if tail != (b"PK\x07\x08", entry.crc32, entry.size, entry.size):
            raise FormatError(f"{label}: the descriptor after its data contradicts the directory of the zip")
    return Member(entry.name.partition("/")[2], start, stop, entry.crc32)
