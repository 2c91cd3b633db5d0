"""Read the index of safetensors files, strictly by the format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardprep_runtime.errors import quote
from shardprep_runtime.header import read_header
from shardprep_runtime.manifest import digest_of

from ..index import Extent, SourceFile, Tensor
from ..read import open_regular


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What one file holds."""

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    """Names that `__metadata__` maps to a tensor of the file: how converters record tied tensors they dropped."""
    source: SourceFile


def read_safetensors_file(path: Path, *, root: Path) -> SafetensorsFile:
    """Index one safetensors file. Raises FormatError on any breach of the format."""
    fd = open_regular(path)
    try:
        raw, header = read_header(fd, where=quote(path))
        found = os.fstat(fd)
    finally:
        os.close(fd)
    relative = path.relative_to(root).as_posix()
    tensors = {
        name: Tensor(name, span.dtype, span.shape, (Extent(relative, span.start),))
        for name, span in header.tensors.items()
    }
    aliases = {
        alias: name
        for alias, name in header.metadata.items()
        if name in tensors and alias not in tensors and alias != "format"
    }
    return SafetensorsFile(
        tensors, aliases, SourceFile(relative, found.st_size, found.st_mtime_ns, digest_of(raw))
    )
