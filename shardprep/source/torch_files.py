"""Decide which tensors a torch file holds and where their bytes lie, for both of torch's formats.

The weights are the file's own mapping, unless one of its keys is a wrapper of training scripts (WRAPPERS) that holds a
mapping. Then that mapping is the weights, at most two wrappers deep. Whatever stands beside a wrapper (optimizer,
epoch, random state, an `ema` copy) is left out. So is, among the weights themselves, whatever holds no tensor, and the
state of an optimizer (BESIDE). Any other group of tensors is refused by name: to drop it in silence would lose weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Final

from shardprep_runtime.errors import FormatError, UnsupportedError, quote
from shardprep_runtime.format import dtypes
from shardprep_runtime.format.header import MAX_DIMS, is_size

from ..files import File, Folder, read_at
from ..index import Extent, LeftOut, Record, SourceFile, Tensor
from .torch_pickle import (
    MAX_PICKLE_BYTES,
    BadTensor,
    Items,
    Opaque,
    Storage,
    TruncatedPickleError,
    View,
    describe,
    read_pickle,
)
from .torch_zip import Zip, read_member, read_zip

WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module")
MAX_EXPANSION: Final = 4
"""Packed tensors may take this many times the bytes of their storages, and EXPANSION_SLACK more."""
EXPANSION_SLACK: Final = 64 * 2**20
"""Bytes; so that small files may expand their tensors freely."""

BESIDE: Final = frozenset(
    f"{what}{ending}"
    for what in ("optimizer", "optim", "opt", "scheduler", "lr_scheduler", "scaler")
    for ending in ("", "s", "_state", "_states", "_state_dict")
)
"""Keys that training scripts store among the weights of a flat dict: they hold tensors, but not the model's."""

_ZIP_MAGIC: Final = b"PK\x03\x04"
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
_LEGACY_PROTOCOL: Final = 1001
_LEGACY_WINDOWS: Final = (2**20, 2**24, MAX_PICKLE_BYTES)
_TAR_MEMBERS: Final = (b"storages\0", b"tensors\0", b"pickle\0", b"sys_info\0")
_ZIP_SIDE_MEMBERS: Final = frozenset(
    {"data.pkl", "byteorder", "version", ".data/version", ".data/serialization_id"}
    | {".format_version", ".storage_alignment"}
)


@dataclass(frozen=True, slots=True)
class TorchFile:
    """One .bin, .pt or .pth file."""

    tensors: Mapping[str, Tensor]
    """Tensors in the file's own order; a tied tensor stands here once, under the first of its names."""
    aliases: Mapping[str, str]
    """Other names of tied tensors -> the name in `tensors`."""
    left_out: tuple[LeftOut, ...]
    source: SourceFile


@dataclass(frozen=True, slots=True)
class _Run:
    """The raw bytes of one storage."""

    start: int
    nbytes: int
    record: Record | None


@dataclass(frozen=True, slots=True)
class _Contents:
    """The contents of a file, in the same form for both formats."""

    value: object
    runs: Mapping[str, _Run]
    big_endian: bool
    digest: str
    left_out: tuple[LeftOut, ...] = ()


def is_torch_file(folder: Folder, name: str) -> bool:
    """Whether the file begins as torch's zips, legacy files or old tars do.

    Args:
        name: A name in the folder; False where it is not a regular file.
    """
    try:
        with folder.open(name) as file:
            head = _head(file)
    except FormatError:
        return False
    return head.startswith((_ZIP_MAGIC, *(bytes([0x80, protocol]) for protocol in range(2, 6)))) or _is_tar(
        head
    )


def _head(file: File) -> bytes:
    return read_at(file, min(512, file.size), 0)


def read_torch_file(folder: Folder, name: str) -> TorchFile:
    """Index the torch file `name`. Nothing in it is executed.

    Args:
        name: The file's name in the folder.

    Raises:
        FormatError: Where it is damaged or hostile.
        UnsupportedError: Where it cannot be carried over.
    """
    where = quote(name.rpartition("/")[2])
    with folder.open(name) as file:
        head = _head(file)
        if head.startswith(_ZIP_MAGIC):
            contents = _read_zip(file, where=where)
        elif head.startswith(b"\x80"):
            contents = _read_legacy(file, where=where)
        else:
            raise _not_torch(head, where=where)
    weights, beside = _find_weights(contents.value, where=where)
    tensors, aliases, rest = _place(weights, contents, file=name, where=where)
    source = SourceFile(name, file.size, file.version, contents.digest)
    return TorchFile(tensors, aliases, (*beside, *rest, *contents.left_out), source)


def _is_tar(head: bytes) -> bool:
    return head.startswith(_TAR_MEMBERS) or (head[257:262] == b"ustar" and head.startswith(b"./"))


def _not_torch(head: bytes, *, where: str) -> Exception:
    if head.startswith(b"version https://git-lfs"):
        return FormatError(f"{where}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if _is_tar(head):
        return UnsupportedError(
            f"{where}: the tar format of torch before 0.1.10; load it with the torch of its time and save it again"
        )
    return FormatError(
        f"{where}: not a torch file: it begins with {quote(head[:16].decode('latin-1'))}, neither a zip nor a pickle"
    )


# the two formats


def _read_zip(file: File, *, where: str) -> _Contents:
    archive = read_zip(file, where=where)
    if "data.pkl" not in archive.members:
        raise FormatError(f"{where}: a zip without data.pkl is not a torch checkpoint")
    _check_version(file, archive, where=where)
    order = b""
    if "byteorder" in archive.members:
        order = read_member(file, archive, "byteorder", most=16, where=where)
        if order not in (b"little", b"big"):
            raise FormatError(
                f"{where}: byteorder is {quote(order.decode('latin-1'))}, expected little or big"
            )
    raw = read_member(file, archive, "data.pkl", most=MAX_PICKLE_BYTES, where=where)
    pickle = read_pickle(raw, where=f"{where}: data.pkl")
    if pickle.stop != len(raw):
        raise FormatError(
            f"{where}: data.pkl goes on after its end, at byte {pickle.stop}; damaged, or made to harm"
        )
    runs: dict[str, _Run] = {}
    for key, storage in pickle.storages.items():
        member = archive.members.get(f"data/{key}")
        if member is None:
            raise FormatError(
                f"{where}: storage {quote(key)} is not in the zip; truncated, or saved only in part"
            )
        found = member.stop - member.start
        if found != storage.nbytes:
            raise FormatError(
                f"{where}: storage {quote(key)} is declared with {storage.nbytes} bytes, the zip has {found}"
            )
        # where torch was told to leave checksums out, there is no crc32 to compare
        record = Record(member.start, member.stop, member.crc32) if archive.has_crc else None
        runs[key] = _Run(member.start, found, record)
    digest = hashlib.sha256(raw + order + archive.directory).hexdigest()
    unused = tuple(
        LeftOut(name, "a member of the zip that no tensor refers to")
        for name in archive.members
        if name not in _ZIP_SIDE_MEMBERS and not (name.startswith("data/") and name[5:] in runs)
    )
    return _Contents(pickle.value, runs, order == b"big", f"sha256:{digest}", unused)


def _check_version(file: File, archive: Zip, *, where: str) -> None:
    name = "version" if "version" in archive.members else ".data/version"
    if name not in archive.members:
        raise FormatError(f"{where}: a zip without the member version is not a torch checkpoint")
    version = read_member(file, archive, name, most=16, where=where).decode("latin-1").strip()
    if not version.isdecimal() or not 1 <= int(version) <= 10:  # caffe2/serialize/versions.h
        raise UnsupportedError(
            f"{where}: torch format version {quote(version)}, expected 1 to 10; upgrade shardprep"
        )


def _read_legacy(file: File, *, where: str) -> _Contents:
    size = file.size
    # the length of the pickles is known only once they are read: try a small window before a large one
    for window in _LEGACY_WINDOWS:
        head = read_at(file, min(window, size), 0)
        try:
            return _parse_legacy(file, head, where=where)
        except TruncatedPickleError:
            if len(head) == size:
                raise
    raise FormatError(
        f"{where}: pickles of more than {MAX_PICKLE_BYTES} bytes, far beyond any list of tensors"
    )


def _parse_legacy(file: File, head: bytes, *, where: str) -> _Contents:
    size = file.size
    magic = read_pickle(head, where=where)
    if type(magic.value) is not int or magic.value != _LEGACY_MAGIC:
        raise FormatError(
            f"{where}: a pickle, but not one that torch.save wrote; save the state dict by torch.save"
        )
    protocol = read_pickle(head, magic.stop, where=where)
    if type(protocol.value) is not int or protocol.value != _LEGACY_PROTOCOL:
        raise FormatError(
            f"{where}: an unknown version of torch's legacy format, expected {_LEGACY_PROTOCOL}"
        )
    info = read_pickle(head, protocol.stop, where=where)
    little = (
        [value for key, value in info.value.pairs if key == "little_endian"]
        if isinstance(info.value, Items)
        else []
    )
    if len(little) != 1 or type(little[0]) is not bool:
        raise FormatError(f"{where}: the byte order is not stated; damaged")
    main = read_pickle(head, info.stop, where=where, legacy=True)
    listed = read_pickle(head, main.stop, where=where)
    keys = listed.value
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise FormatError(f"{where}: the list of storages is not a list of different names")
    if set(keys) != main.storages.keys():
        odd = quote(min(set(keys) ^ main.storages.keys()))
        raise FormatError(f"{where}: storage {odd} stands in only one of the pickle and the list of storages")
    runs: dict[str, _Run] = {}
    pos = listed.stop
    sizes = [8 + main.storages[key].nbytes for key in keys]
    starts = list(accumulate(sizes, initial=pos))
    if starts[-1] == size:  # a file of another size is refused below
        file.hint([(start, start + 8) for start in starts[:-1]])
    for key in keys:
        storage = main.storages[key]
        if size - pos < 8 + storage.nbytes:
            raise FormatError(f"{where}: truncated: storage {quote(key)} ends beyond the end of the file")
        count = read_at(file, 8, pos)
        # written little-endian everywhere; only the first torch on big-endian machines forgot to swap the count
        numels = {int.from_bytes(count, "little"), int.from_bytes(count, "little" if little[0] else "big")}
        if all(numel * storage.itemsize != storage.nbytes for numel in numels):
            raise FormatError(
                f"{where}: storage {quote(key)} is declared with {storage.nbytes // storage.itemsize} elements, "
                f"the count before its data says {int.from_bytes(count, 'little')}"
            )
        runs[key] = _Run(pos + 8, storage.nbytes, None)
        pos += 8 + storage.nbytes
    if pos != size:
        raise FormatError(f"{where}: {size - pos} bytes after the last storage; damaged, or made to harm")
    # torch swaps the data to little-endian when it saves this format (torch/csrc/serialization.cpp, writeFileRaw)
    digest = hashlib.sha256(head[: listed.stop]).hexdigest()
    return _Contents(main.value, runs, False, f"sha256:{digest}")


# which of it is the weights


def _find_weights(value: object, *, where: str) -> tuple[dict[str, object], list[LeftOut]]:
    """Find the mapping that is the weights, and list what stands beside it."""
    beside: list[LeftOut] = []
    path: list[str] = []
    while True:
        label = f"{where}: {quote('.'.join(path))}" if path else where
        entries = _entries(value, label)
        wrappers = [key for key in WRAPPERS if isinstance(entries.get(key), Items | Opaque)]
        if not wrappers:
            return entries, beside
        full = [key for key in wrappers if _holds_tensor(entries[key], set())]
        if len(full) > 1:
            raise UnsupportedError(
                f"{label}: both {full[0]} and {full[1]} hold tensors, and either may be the model; save one of them alone"
            )
        if not full:
            raise UnsupportedError(f"{label}: no tensors in {wrappers[0]}, where the weights should be")
        if len(path) == 2:
            raise UnsupportedError(f"{label}: weights more than two wrappers deep; save the state dict alone")
        for key, other in entries.items():
            if key != full[0]:
                beside.append(
                    LeftOut(".".join([*path, key]), f"{describe(other)} beside the weights in {full[0]}")
                )
        path.append(full[0])
        value = entries[full[0]]


def _entries(value: object, label: str) -> dict[str, object]:
    if isinstance(value, Opaque) and _is_module(value):
        raise UnsupportedError(
            f"{label}: a whole pickled module, {quote(value.what)}: its weights depend on code that is not in the file\n"
            "load it where that code is installed and torch.save(model.state_dict(), ...)"
        )
    if not isinstance(value, Items):
        raise UnsupportedError(
            f"{label}: {describe(value)}, expected a dict of names and tensors; torch.save(model.state_dict(), ...)"
        )
    found: dict[str, object] = {}
    for key, item in value.pairs:
        if type(key) is not str:
            raise UnsupportedError(f"{label}: a key that is {describe(key)}, expected names of tensors")
        if key in found:
            raise FormatError(f"{label}: {quote(key)} stands twice in one dict; damaged, or made to harm")
        found[key] = item
    return found


def _is_module(value: Opaque) -> bool:
    keys = {
        key for part in value.parts if isinstance(part, Items) for key, _ in part.pairs if type(key) is str
    }
    return {"_parameters", "_modules"} <= keys


def _parts(value: object) -> Iterator[object]:
    match value:
        case Items(pairs=pairs):
            for key, item in pairs:
                yield key
                yield item
        case Opaque(parts=parts):
            yield from parts
        case list() | tuple():
            yield from value


def _holds_tensor(value: object, barren: set[int]) -> bool:
    """Whether a tensor or storage lies anywhere in `value`, which may contain itself.

    `barren` collects the ids of values without one. No value is searched twice, however many calls meet it.
    """
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, View | BadTensor | Storage):
            return True
        if (
            isinstance(item, Items | Opaque | list | tuple)
            and id(item) not in seen
            and id(item) not in barren
        ):
            seen.add(id(item))
            todo.extend(_parts(item))
    barren |= seen
    return False


# where its tensors lie


def _place(
    weights: Mapping[str, object], contents: _Contents, *, file: str, where: str
) -> tuple[dict[str, Tensor], dict[str, str], list[LeftOut]]:
    """Give the tensors, the other names of tied ones, and what among the weights is not a tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    left_out: list[LeftOut] = []
    first_at: dict[tuple[object, ...], str] = {}
    barren: set[int] = set()
    stored: dict[str, int] = {}
    packed = 0
    for name, value in weights.items():
        label = f"{where}: {quote(name)}"
        if isinstance(value, BadTensor):
            raise UnsupportedError(f"{label} cannot be carried over: {value.reason}")
        if not isinstance(value, View):
            if not name.endswith("_extra_state") and name not in BESIDE and _holds_tensor(value, barren):
                raise UnsupportedError(
                    f"{label}: {describe(value)} that holds tensors among the weights, expected names and tensors only\n"
                    f"save the weights alone, as one flat dict (a dict under {', '.join(WRAPPERS)} is found)"
                )
            left_out.append(LeftOut(name, f"{describe(value)}, not a tensor"))
            continue
        if name == "__metadata__":
            raise UnsupportedError(f"{label}: safetensors reserves this name; rename the tensor")
        tensor = _tensor(name, value, contents, file=file, label=label)
        key = value.storage.key
        extent = tensor.extents[0]
        place = (key, extent.offset, tensor.dtype, tensor.shape, extent.strides)
        if place in first_at:
            aliases[name] = first_at[place]
            continue
        first_at[place] = name
        tensors[name] = tensor
        # a few bytes on disk must not become gigabytes: neither by one tensor nor by many of one storage
        stored[key] = contents.runs[key].nbytes
        packed += tensor.nbytes
        limit = MAX_EXPANSION * stored[key] + EXPANSION_SLACK
        if tensor.nbytes > limit:
            raise UnsupportedError(
                f"{label}: expanded from a storage of {stored[key]} bytes it takes {tensor.nbytes}, more than {limit}"
            )
    limit = MAX_EXPANSION * sum(stored.values()) + EXPANSION_SLACK
    if packed > limit:
        raise UnsupportedError(
            f"{where}: tensors of {packed} bytes on storages of {sum(stored.values())}, more than {limit}; "
            "expanded tensors must be saved expanded once"
        )
    if not tensors:
        found = "; ".join(f"{quote(out.name)}: {out.reason}" for out in left_out[:3])
        raise UnsupportedError(f"{where}: no tensors found ({found or 'an empty dict'})")
    return tensors, aliases, left_out


def _tensor(name: str, view: View, contents: _Contents, *, file: str, label: str) -> Tensor:
    """Prove that `view` lies in its storage, and say where its bytes are."""
    storage, run = view.storage, contents.runs[view.storage.key]
    if storage.location.partition(":")[0] == "meta":
        raise UnsupportedError(f"{label} is on the meta device: the file holds no data for it")
    if view.dtype not in dtypes.BITS:
        raise UnsupportedError(
            f"{label}: safetensors has no dtype for torch.{quote(view.dtype)}; convert it before saving"
        )
    if max(len(view.shape), len(view.strides)) > MAX_DIMS:
        raise FormatError(
            f"{label}: {len(view.shape)} dims, torch allows {MAX_DIMS}; damaged, or made to harm"
        )
    shape = tuple(size for size in view.shape if type(size) is int and is_size(size))
    strides = tuple(stride for stride in view.strides if type(stride) is int and is_size(stride))
    offset = view.offset
    if type(offset) is not int or not is_size(offset) or (len(shape), len(strides)) != (len(view.shape),) * 2:
        raise FormatError(
            f"{label}: its offset, sizes and strides must be integers from 0, one stride to a size"
        )
    if prod(shape) > dtypes.MAX_ELEMENTS:
        raise FormatError(
            f"{label}: {list(shape[:8])} are more elements than a tensor can have; damaged, or made to harm"
        )
    itemsize = max(dtypes.BITS[view.dtype] // 8, 1)
    if 0 in shape:
        offset, packed = 0, True
    else:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if last >= storage.nbytes // itemsize:
            raise FormatError(
                f"{label}: reaches element {last} of a storage of {storage.nbytes // itemsize}; damaged, or made to harm"
            )
        packed = all(
            size == 1 or stride == prod(shape[dim + 1 :])
            for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))
        )
    if view.dtype == "F4":  # one element of torch's holds two of ours
        if not shape or not packed:
            raise UnsupportedError(
                f"{label}: a float4 tensor that is not packed; call .contiguous() before saving"
            )
        shape = (*shape[:-1], 2 * shape[-1])
    extent = Extent(
        file,
        run.start + storage.start + offset * itemsize,
        strides=None
        if packed
        else tuple(1 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)),
        big_endian=contents.big_endian and itemsize > 1,
        record=run.record,
    )
    return Tensor(name, view.dtype, shape, (extent,))
