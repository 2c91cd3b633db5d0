"""Carry the files that travel with the weights: byte for byte, but for a config that must name its dtype."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shardprep_runtime.dtypes import TORCH
from shardprep_runtime.errors import IntegrityError, quote
from shardprep_runtime.manifest import SideFile

from .index import Index
from .plan import CASTABLE, target_dtype
from .read import open_regular
from .staging import Staging
from .write import write_all

CONFIG = "config.json"


def copy_side_files(index: Index, staging: Staging, *, dtype: str | None, name_dtype: bool) -> list[SideFile]:
    """Copy them into `staging` and give their digests.

    config.json is rewritten only where it would be wrong: when tensors are cast to `dtype`, or when it names no
    dtype and `name_dtype` asks for one (engines then guess float32, or the dtype of the first tensor they meet).
    """
    found = []
    for name in index.side_files:
        if name == CONFIG and (dtype is not None or (name_dtype and not _named(index))):
            data = _config(index, dtype)
            staging.write(name, data)
            found.append(SideFile(name, len(data), f"sha256:{hashlib.sha256(data).hexdigest()}"))
        else:
            found.append(_copy(index, name, staging))
    return found


def _copy(index: Index, name: str, staging: Staging) -> SideFile:
    digest, size = hashlib.sha256(), 0
    fd = staging.create(name)
    try:
        for chunk in read_chunks(open_regular(index.root / name)):
            write_all(fd, chunk, size)
            digest.update(chunk)
            size += len(chunk)
    except BaseException:
        os.close(fd)
        raise
    staging.finish(name, fd)
    return SideFile(name, size, f"sha256:{digest.hexdigest()}")


def check_side_file(folder: Path, side: SideFile) -> None:
    """Raises IntegrityError where a shard set's side file is not the one that its manifest names."""
    digest = hashlib.sha256()
    for chunk in read_chunks(open_regular(folder / side.path)):
        digest.update(chunk)
    if f"sha256:{digest.hexdigest()}" != side.digest:
        raise IntegrityError(
            f"{quote(folder / side.path)}: does not match its digest in the manifest; it was changed"
        )


def read_chunks(fd: int) -> Iterator[bytes]:
    """The bytes of a file, a MiB at a time. Closes `fd`."""
    with open(fd, "rb") as stream:
        while chunk := stream.read(2**20):
            yield chunk


def _named(index: Index) -> bool:
    return bool(index.config.get("dtype") or index.config.get("torch_dtype"))


def _config(index: Index, dtype: str | None) -> bytes:
    """config.json with the dtype of most of the weights' bytes."""
    sizes: Counter[str] = Counter()
    for tensor in index.tensors.values():
        if tensor.dtype in CASTABLE:
            sizes[target_dtype(tensor, dtype)] += tensor.nbytes
    config = dict(index.config)
    if sizes:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = TORCH[sizes.most_common(1)[0][0]]
    return (json.dumps(config, indent=2) + "\n").encode()
