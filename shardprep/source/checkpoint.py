"""Find the weight files of a checkpoint folder and put their indexes together into one, refusing what does not agree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from shardprep_runtime.errors import FormatError, UnsupportedError, quote
from shardprep_runtime.format.header import loads_strict
from shardprep_runtime.format.manifest import FILE_NAME

from ..files import JOURNAL, PARTIAL, Folder, read_at
from ..index import Index, LeftOut, SourceFile, Tensor
from .names import SAFETENSORS, choose_weights, is_side_file
from .safetensors_files import SafetensorsFile, read_safetensors_file
from .shard_set import read_shard_set
from .source import Source
from .torch_files import TorchFile, is_torch_file, read_torch_file

MAX_JSON_BYTES: Final = 64 * 2**20
"""config.json and index.json are refused before they are read when they are larger."""

ONE_OF_SEVERAL: Final = re.compile(r"-of-(?!0*1\.)\d+\.")
"""Matches the name of a shard that has others beside it: `-00001-of-00003.`, but not `-of-00001.`"""


def read_checkpoint(source: Source, *, include_code: bool = False) -> Index:
    """Read the index of a checkpoint: a folder in the Hugging Face layout, or one weight file. Reads no tensor data.

        with open_source("llama-70b") as source:
            index = read_checkpoint(source)

    Args:
        include_code: Let *.py files travel with the weights.

    Raises:
        FormatError: For a checkpoint that is not whole, or contradicts itself.
        UnsupportedError: For one that cannot be carried over, or is not safe to read.
    """
    folder = source.folder
    if source.file is not None:
        return _one_file(folder, source.file)
    if folder.is_file(FILE_NAME):
        if folder.path is None:
            raise UnsupportedError(f"{folder.where()}: a shard set; fetch it first (`shardprep pull`)")
        index, _ = read_shard_set(folder.path)
        return dataclasses.replace(index, config=read_config(folder))
    if folder.path is not None and (folder.path / PARTIAL / JOURNAL).exists():
        raise FormatError(
            f"{folder.where()}: an unfinished run of shardprep is in here; run the same command again"
        )
    names = folder.names()
    kind, files, others = choose_weights(names)
    left_out = [LeftOut(name, "a second copy beside the safetensors files") for name in others]
    if not files:
        raise FormatError(f"{folder.where()}: no weight files here (*.safetensors, *.bin, *.pt)")
    files, listed = _by_index(folder, names, files)
    index = read_weights(folder, kind, files, listed=listed)
    return dataclasses.replace(
        index,
        left_out=(*index.left_out, *left_out),
        config=read_config(folder),
        side_files=tuple(
            name for name in names if is_side_file(name, include_code=include_code) and folder.is_file(name)
        ),
    )


def read_config(folder: Folder) -> Mapping[str, Any]:
    """Read config.json; an empty mapping where there is none.

    Raises:
        FormatError: Where it is not a JSON object, or its model_type is not a string.
    """
    name = "config.json"
    config = read_json(folder, name) if folder.has(name) else {}
    if not isinstance(config.get("model_type", ""), str | None):
        raise FormatError(
            f"{folder.where(name)}: model_type must be a string, found {quote(config['model_type'])}"
        )
    return config


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        name: A file of the folder.

    Raises:
        FormatError: For more than MAX_JSON_BYTES, or for anything but an object in UTF-8.
    """
    with folder.open(name) as file:
        if file.size > MAX_JSON_BYTES:
            raise FormatError(f"{file.where}: more than {MAX_JSON_BYTES} bytes")
        raw = read_at(file, file.size, 0)
    try:
        # configs of state space models hold Infinity, as Python writes it
        found = loads_strict(raw.decode("utf-8"), where=file.where, infinity=True)
    except UnicodeDecodeError as error:
        raise FormatError(f"{file.where}: not UTF-8 at byte {error.start}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{file.where}: expected an object")
    return found


def _one_file(folder: Folder, name: str) -> Index:
    kind = "torch" if not name.endswith(SAFETENSORS) and is_torch_file(folder, name) else "safetensors"
    return dataclasses.replace(read_weights(folder, kind, [name]), config=read_config(folder))


def _by_index(
    folder: Folder, names: Sequence[str], files: list[str]
) -> tuple[list[str], Mapping[str, str] | None]:
    """Find the weight files that belong together, and the weight_map of the index.json that lists them, if there is one.

    Raises:
        FormatError: Where shards are missing or too many.
    """
    suffix = Path(files[0]).suffix
    indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
    if len(indexes) > 1:
        raise FormatError(
            f"{folder.where()}: {len(indexes)} index files: {', '.join(map(quote, indexes))}; keep one"
        )
    if not indexes:
        shard = next((name for name in files if ONE_OF_SEVERAL.search(name)), None)
        if shard is not None:
            raise FormatError(
                f"{folder.where()}: {quote(shard)} is one of several shards, and no index.json says whether all are here"
            )
        if len(files) > 1:
            raise FormatError(
                f"{folder.where()}: {len(files)} weight files and no index.json that says which belong together: "
                f"{', '.join(map(quote, files[:4]))}; name one of them"
            )
        return files, None
    weight_map = _weight_map(folder, indexes[0])
    listed = set(weight_map.values())
    missing, extra = sorted(listed - set(files)), sorted(set(files) - listed)
    if missing:
        raise FormatError(
            f"{folder.where()}: {quote(indexes[0])} lists {quote(missing[0])}, which is not there"
        )
    if extra:
        raise FormatError(
            f"{folder.where()}: {quote(extra[0])} is not listed in {quote(indexes[0])}; remove one of them"
        )
    return sorted(listed), weight_map


def _weight_map(folder: Folder, index: str) -> dict[str, str]:
    where = folder.where(index)
    found = read_json(folder, index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{where}: weight_map must map tensor names to file names")
    for name in set(found.values()):
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise FormatError(f"{where}: the path {quote(name)} leaves the folder; refused")
    return found


def read_weights(
    folder: Folder, kind: str, files: Sequence[str], *, listed: Mapping[str, str] | None = None
) -> Index:
    """Put the indexes of several files together into one.

    Args:
        kind: "torch" or "safetensors".
        files: Names of weight files in the folder.
        listed: The weight_map of the index.json, if the caller has read it.

    Raises:
        FormatError: For a tensor that two files hold, or that lies elsewhere than index.json says.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    left_out: list[LeftOut] = []
    sources: list[SourceFile] = []
    home: dict[str, str] = {}
    for file, found in zip(files, _read_all(folder, kind, files), strict=True):
        if isinstance(found, TorchFile):
            left_out += [LeftOut(f"{file}: {each.name}", each.reason) for each in found.left_out]
        for name in (*found.tensors, *found.aliases):
            if name in home:
                raise FormatError(
                    f"{folder.where()}: tensor {quote(name)} is in {quote(home[name])} and in {quote(file)}"
                )
            home[name] = file
        tensors.update(found.tensors)
        aliases.update(found.aliases)
        sources.append(found.source)
    if len(files) > 1 or folder.has(f"{files[0]}.index.json"):
        _check_weight_map(folder, Path(files[0]).suffix, home, aliases, listed)
    if not tensors:
        raise FormatError(f"{folder.where()}: no tensors in {', '.join(map(quote, files))}")
    return Index(
        folder,
        kind,
        dict(sorted(tensors.items())),
        dict(sorted(aliases.items())),
        tuple(sources),
        tuple(left_out),
    )


def _read_all(folder: Folder, kind: str, files: Sequence[str]) -> Iterator[TorchFile | SafetensorsFile]:
    read = read_torch_file if kind == "torch" else read_safetensors_file
    if folder.workers is None or len(files) == 1:
        yield from (read(folder, file) for file in files)
        return
    with ThreadPoolExecutor(folder.workers, thread_name_prefix="shardprep-index") as pool:
        yield from pool.map(lambda file: read(folder, file), files)


def _check_weight_map(
    folder: Folder,
    suffix: str,
    home: Mapping[str, str],
    aliases: Iterable[str],
    listed: Mapping[str, str] | None,
) -> None:
    index = next(name for name in folder.names() if name.endswith(f"{suffix}.index.json"))
    where = folder.where(index)
    if listed is None:
        listed = _weight_map(folder, index)
    for name, file in listed.items():
        if home.get(name) != file:
            place = f"it is in {quote(home[name])}" if name in home else "it is in none of the files"
            raise FormatError(f"{where}: {quote(name)} should be in {quote(file)}, but {place}")
    unlisted = sorted(home.keys() - listed.keys() - set(aliases))
    if unlisted:
        raise FormatError(
            f"{where}: does not list {quote(unlisted[0])}, which is in {quote(home[unlisted[0]])}"
        )
