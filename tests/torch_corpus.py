"""Make torch files and hand-assembled pickles and zips for tests, and read tensors back by numpy alone."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardprep.index import Tensor
from shardprep_runtime.format.dtypes import BITS


def tensor_bytes(tensor: Tensor, root: Path) -> bytes:
    """The packed little-endian bytes of `tensor`, gathered from its file by nothing but its extent."""
    (extent,) = tensor.extents
    raw = np.fromfile(root / extent.file, dtype=np.uint8)
    if tensor.nbytes == 0:
        return b""
    if extent.record:
        record = extent.record
        assert zlib.crc32(raw[record.start : record.stop].tobytes()) == record.crc32
        assert record.start <= extent.offset < record.stop
    if extent.strides is None:
        packed = raw[extent.offset : extent.offset + tensor.nbytes]
    else:
        itemsize = BITS[tensor.dtype] // 8
        elements = np.lib.stride_tricks.as_strided(
            raw[extent.offset :],
            shape=(*tensor.shape, itemsize),
            strides=(*(stride * itemsize for stride in extent.strides), 1),
        )
        packed = np.ascontiguousarray(elements).reshape(-1)
    if extent.big_endian:
        part = 4 if tensor.dtype == "C64" else BITS[tensor.dtype] // 8
        packed = packed.reshape(-1, part)[:, ::-1].reshape(-1)
    return packed.tobytes()


# pickles, opcode by opcode


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def reduce(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + tup(*args) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage", location: str = "cpu") -> bytes:
    parts = tup(text("storage"), named("torch", kind), text(key), text(location), integer(numel))
    return parts + b"Q"


def ints(values: tuple[int, ...]) -> bytes:
    return tup(*(integer(value) for value in values))


def view(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    source: bytes | None = None,
    metadata: bytes = b"",
) -> bytes:
    source = storage() if source is None else source
    hooks = named("collections", "OrderedDict") + b")R"
    return reduce(
        "torch._utils",
        "_rebuild_tensor_v2",
        source,
        integer(offset),
        ints(shape),
        ints(strides),
        b"\x89",
        hooks,
        *([metadata] if metadata else []),
    )


def pickled(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


# zips, field by field


@dataclass
class Entry:
    """One member of a zip, each field of which can be made to lie."""

    name: str
    data: bytes = b""
    flags: int = 0x800
    method: int = 0
    crc32: int | None = None
    size: int | None = None
    packed: int | None = None
    local_size: int | None = None
    local_crc32: int | None = None
    local_name: str | None = None
    local_method: int | None = None
    extra: bytes = b""
    local_extra: bytes = b""
    descriptor: bytes = b""
    offset: int | None = None
    comment: bytes = b""
    listed: bool = True
    before: bytes = b""


def members(data: bytes, storages: dict[str, bytes] | None = None, top: str = "archive") -> list[Entry]:
    storages = {"0": bytes(range(16))} if storages is None else storages
    return [
        Entry(f"{top}/data.pkl", data),
        Entry(f"{top}/byteorder", b"little"),
        *(Entry(f"{top}/data/{key}", raw) for key, raw in storages.items()),
        Entry(f"{top}/version", b"3\n"),
    ]


def end_record(count: int, length: int, start: int, comment: bytes = b"") -> bytes:
    return struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, length, start, len(comment)) + comment


def end64(count: int, length: int, start: int, *, offset: int | None = None) -> bytes:
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start)
    return record + struct.pack("<4sLQL", b"PK\x06\x07", 0, start + length if offset is None else offset, 1)


def zipped(
    entries: list[Entry], *, prefix: bytes = b"", zip64: bool = False, tail: bytes | None = None
) -> bytes:
    body, directory = bytearray(prefix), b""
    count = 0
    for entry in entries:
        body += entry.before
        raw_name = entry.name.encode()
        local_name = raw_name if entry.local_name is None else entry.local_name.encode()
        crc32 = zlib.crc32(entry.data) if entry.crc32 is None else entry.crc32
        size = len(entry.data) if entry.size is None else entry.size
        packed = size if entry.packed is None else entry.packed
        local_size = size if entry.local_size is None else entry.local_size
        local_crc32 = crc32 if entry.local_crc32 is None else entry.local_crc32
        method = entry.method if entry.local_method is None else entry.local_method
        offset = len(body) if entry.offset is None else entry.offset
        body += struct.pack(
            "<4s5H3L2H",
            b"PK\x03\x04",
            0,
            entry.flags,
            method,
            0,
            0,
            local_crc32,
            local_size,
            local_size,
            len(local_name),
            len(entry.local_extra),
        )
        body += local_name + entry.local_extra + entry.data + entry.descriptor
        if entry.listed:
            count += 1
            directory += struct.pack(
                "<4s6H3L5H2L",
                b"PK\x01\x02",
                0,
                0,
                entry.flags,
                entry.method,
                0,
                0,
                crc32,
                packed,
                size,
                len(raw_name),
                len(entry.extra),
                len(entry.comment),
                0,
                0,
                0,
                offset,
            )
            directory += raw_name + entry.extra + entry.comment
    if tail is None:
        tail = end64(count, len(directory), len(body)) if zip64 else b""
        tail += end_record(count, len(directory), len(body))
    return bytes(body) + directory + tail


def write_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None) -> Path:
    path.write_bytes(zipped(members(data, storages)))
    return path
