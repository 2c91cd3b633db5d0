"""Carry the files that travel with the weights: byte for byte, but for a config that must name its dtype."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator

from shardprep_runtime.errors import IntegrityError
from shardprep_runtime.format.dtypes import TORCH
from shardprep_runtime.format.manifest import SideFile

from ..files import File, Folder
from ..index import CASTABLE, Index
from .mover import write_all
from .plan import target_dtype
from .staging import Destination, Written

CONFIG = "config.json"


def copy_side_files(
    index: Index, staging: Destination, *, dtype: str | None, name_dtype: bool
) -> list[SideFile]:
    """Copy the side files into `staging`, and give their digests.

    config.json is rewritten only where a copy would be wrong: where the index has edited it, where tensors are cast,
    or where `name_dtype` asks for a dtype that it does not name.

    Args:
        dtype: The dtype that tensors are cast to; None: they are kept.
        name_dtype: Add the dtype where config.json names none. Engines would guess float32, or the first tensor's.
    """
    found = []
    for name in index.side_files:
        misnamed = dtype is not None or (name_dtype and not _named(index))
        if name == CONFIG and (misnamed or index.edited):
            data = _config(index, dtype, misnamed)
            staging.write(name, data)
            found.append(SideFile(name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}"))
        else:
            found.append(_copy(index, name, staging))
    return found


def _copy(index: Index, name: str, staging: Destination) -> SideFile:
    digest, size = hashlib.sha256(), 0
    fd = staging.create(name)
    try:
        with index.folder.open(name) as file:
            for chunk in read_chunks(file):
                write_all(fd, chunk, size)
                digest.update(chunk)
                size += len(chunk)
    except BaseException:
        os.close(fd)
        raise
    written = Written(size, size, f"sha256:{digest.hexdigest()}")
    staging.finish(name, fd, written)
    return SideFile(name, size, written.digest)


def check_side_file(folder: Folder, side: SideFile) -> None:
    """Compare a side file of a shard set with its digest in the manifest.

    Args:
        folder: The shard set.
        side: The side file as the manifest names it.

    Raises:
        IntegrityError: Where it is not the file that the manifest names.
    """
    digest = hashlib.sha256()
    with folder.open(side.path) as file:
        for chunk in read_chunks(file):
            digest.update(chunk)
    if f"sha256:{digest.hexdigest()}" != side.digest:
        raise IntegrityError(
            f"{folder.where(side.path)}: does not match its digest in the manifest; it was changed"
        )


def read_chunks(file: File) -> Iterator[memoryview]:
    """Read a file front to back, a MiB at a time; each chunk is valid until the next is asked for."""
    ahead = file.stretch(0, file.size)
    buffer = memoryview(bytearray(min(2**20, file.size)))
    for at in range(0, file.size, 2**20):
        chunk = buffer[: file.size - at]
        ahead.read_into(chunk, at)
        yield chunk


def _named(index: Index) -> bool:
    return bool(index.config.get("dtype") or index.config.get("torch_dtype"))


def _config(index: Index, dtype: str | None, misnamed: bool) -> bytes:
    """Write the index's config.json; where `misnamed`, with the dtype that most of the weights' bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in index.tensors.values():
        if tensor.dtype in CASTABLE:
            sizes[target_dtype(tensor, dtype)] += tensor.nbytes
    config = dict(index.config)
    if sizes and misnamed:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = TORCH[sizes.most_common(1)[0][0]]
    return (json.dumps(config, indent=2) + "\n").encode()
