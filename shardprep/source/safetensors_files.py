"""Read the index of safetensors files, strictly by the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardprep_runtime.format.header import header_length, parse_header
from shardprep_runtime.format.manifest import digest_of

from ..files import Folder, read_at
from ..index import Extent, SourceFile, Tensor


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The tensors of one safetensors file."""

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    """Names that `__metadata__` maps to a tensor of the file: how converters record tied tensors they dropped."""
    source: SourceFile


def read_safetensors_file(folder: Folder, path: str) -> SafetensorsFile:
    """Index one safetensors file.

    Args:
        path: Its name in the folder.

    Raises:
        FormatError: On any breach of the format.
    """
    with folder.open(path) as file:
        first = read_at(file, min(8, file.size), 0)
        raw = first + read_at(file, header_length(first, file.size, where=file.where), len(first))
        header = parse_header(raw, file.size, where=file.where)
    tensors = {
        name: Tensor(name, span.dtype, span.shape, (Extent(path, span.start),))
        for name, span in header.tensors.items()
    }
    aliases = {
        alias: name
        for alias, name in header.metadata.items()
        if name in tensors and alias not in tensors and alias != "format"
    }
    return SafetensorsFile(tensors, aliases, SourceFile(path, file.size, file.version, digest_of(raw)))
