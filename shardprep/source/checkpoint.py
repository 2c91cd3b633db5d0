"""Find the weight files of a checkpoint folder and put their indexes together into one, refusing what does not agree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shardprep_runtime.errors import FormatError, quote
from shardprep_runtime.header import loads_strict
from shardprep_runtime.manifest import FILE_NAME

from ..index import Index, LeftOut, SourceFile, Tensor
from ..read import open_regular
from ..staging import FOLDER, JOURNAL
from .safetensors_files import read_safetensors_file
from .shard_set import read_shard_set
from .torch_files import is_torch_file, read_torch_file

MAX_JSON_BYTES: Final = 64 * 2**20
"""config.json and index.json are refused before they are read when they are larger."""

SAFETENSORS: Final = (".safetensors",)
TORCH: Final = (".bin", ".pt", ".pth", ".ckpt")
SIDE_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm", ".bpe")
SIDE_NAMES: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
CODE_SUFFIXES: Final = (".py",)
NOT_WEIGHTS: Final = (
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
    "scaler.pt",
)
"""What trainers leave beside the weights under weights' suffixes (also rng_state*.pth)."""


ONE_OF_SEVERAL: Final = re.compile(r"-of-(?!0*1\.)\d+\.")
"""In the name of a shard: that there are others."""


def read_checkpoint(path: Path, *, include_code: bool = False) -> Index:
    """The index of a checkpoint: a folder in the Hugging Face layout, or one weight file.

    `include_code` lets *.py files travel with the weights. Reads no tensor data.
    Raises FormatError or UnsupportedError for anything that is not whole, consistent and safe to read.
    """
    if path.is_file():
        return _one_file(path)
    if not path.is_dir():
        raise FormatError(f"{quote(path)}: no such file or folder")
    if (path / FILE_NAME).is_file():
        index, _ = read_shard_set(path)
        return dataclasses.replace(index, config=read_config(path))
    if (path / FOLDER / JOURNAL).exists():
        raise FormatError(
            f"{quote(path)}: an unfinished run of shardprep is in here; run the same command again"
        )
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    weights = [name for name in names if not name.startswith("rng_state") and name not in NOT_WEIGHTS]
    kind, files = "safetensors", [name for name in weights if name.endswith(SAFETENSORS)]
    others = [name for name in weights if name.endswith(TORCH)]
    left_out = []
    if not files:
        kind, files = "torch", others
    else:
        left_out = [LeftOut(name, "a second copy beside the safetensors files") for name in others]
    if not files:
        raise FormatError(f"{quote(path)}: no weight files here (*.safetensors, *.bin, *.pt)")
    files = _by_index(path, names, files)
    index = read_weights(path, kind, files)
    return dataclasses.replace(
        index,
        left_out=(*index.left_out, *left_out),
        config=read_config(path),
        side_files=tuple(name for name in names if _travels(path / name, include_code=include_code)),
    )


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json, or an empty mapping where there is none."""
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    if not isinstance(config.get("model_type", ""), str | None):
        raise FormatError(f"{quote(path)}: model_type must be a string, found {quote(config['model_type'])}")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a bounded size. Raises FormatError for anything else."""
    with open(open_regular(path), "rb") as stream:
        raw = stream.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise FormatError(f"{quote(path)}: more than {MAX_JSON_BYTES} bytes")
    try:
        found = loads_strict(raw.decode("utf-8"), where=quote(path))
    except UnicodeDecodeError as error:
        raise FormatError(f"{quote(path)}: not UTF-8 at byte {error.start}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{quote(path)}: expected an object")
    return found


def _one_file(path: Path) -> Index:
    kind = "torch" if is_torch_file(path) and not path.name.endswith(SAFETENSORS) else "safetensors"
    return dataclasses.replace(read_weights(path.parent, kind, [path.name]), config=read_config(path.parent))


def _by_index(folder: Path, names: Sequence[str], files: list[str]) -> list[str]:
    """The weight files that belong together: those of the index.json where there is one.

    Raises FormatError where shards are missing or too many.
    """
    suffix = Path(files[0]).suffix
    indexes = [name for name in names if name.endswith(f"{suffix}.index.json")]
    if len(indexes) > 1:
        raise FormatError(
            f"{quote(folder)}: {len(indexes)} index files: {', '.join(map(quote, indexes))}; keep one"
        )
    if not indexes:
        shard = next((name for name in files if ONE_OF_SEVERAL.search(name)), None)
        if shard is not None:
            raise FormatError(
                f"{quote(folder)}: {quote(shard)} is one of several shards, and no index.json says whether all are here"
            )
        if len(files) > 1:
            raise FormatError(
                f"{quote(folder)}: {len(files)} weight files and no index.json that says which belong together: "
                f"{', '.join(map(quote, files[:4]))}; name one of them"
            )
        return files
    listed = set(_weight_map(folder / indexes[0]).values())
    missing, extra = sorted(listed - set(files)), sorted(set(files) - listed)
    if missing:
        raise FormatError(
            f"{quote(folder)}: {quote(indexes[0])} lists {quote(missing[0])}, which is not there"
        )
    if extra:
        raise FormatError(
            f"{quote(folder)}: {quote(extra[0])} is not listed in {quote(indexes[0])}; remove one of them"
        )
    return sorted(listed)


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{quote(path)}: weight_map must map tensor names to file names")
    for name in set(found.values()):
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise FormatError(f"{quote(path)}: the path {quote(name)} leaves the folder; refused")
    return found


def read_weights(folder: Path, kind: str, files: Sequence[str]) -> Index:
    """One index of several files. Raises FormatError for a name in two of them, or at odds with index.json."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    left_out: list[LeftOut] = []
    sources: list[SourceFile] = []
    home: dict[str, str] = {}
    for file in files:
        if kind == "torch":
            torch_file = read_torch_file(folder / file, root=folder)
            left_out += [LeftOut(f"{file}: {each.name}", each.reason) for each in torch_file.left_out]
            found: Any = torch_file
        else:
            found = read_safetensors_file(folder / file, root=folder)
        for name in (*found.tensors, *found.aliases):
            if name in home:
                raise FormatError(
                    f"{quote(folder)}: tensor {quote(name)} is in {quote(home[name])} and in {quote(file)}"
                )
            home[name] = file
        tensors.update(found.tensors)
        aliases.update(found.aliases)
        sources.append(found.source)
    if len(files) > 1 or (folder / f"{files[0]}.index.json").exists():
        _check_weight_map(folder, Path(files[0]).suffix, home, aliases)
    if not tensors:
        raise FormatError(f"{quote(folder)}: no tensors in {', '.join(map(quote, files))}")
    return Index(
        folder,
        kind,
        dict(sorted(tensors.items())),
        dict(sorted(aliases.items())),
        tuple(sources),
        tuple(left_out),
    )


def _check_weight_map(folder: Path, suffix: str, home: Mapping[str, str], aliases: Iterable[str]) -> None:
    path = next(iter(sorted(folder.glob(f"*{suffix}.index.json"))))
    listed = _weight_map(path)
    for name, file in listed.items():
        if home.get(name) != file:
            where = f"it is in {quote(home[name])}" if name in home else "it is in none of the files"
            raise FormatError(f"{quote(path)}: {quote(name)} should be in {quote(file)}, but {where}")
    unlisted = sorted(home.keys() - listed.keys() - set(aliases))
    if unlisted:
        raise FormatError(
            f"{quote(path)}: does not list {quote(unlisted[0])}, which is in {quote(home[unlisted[0]])}"
        )


def _travels(path: Path, *, include_code: bool) -> bool:
    """Whether a file beside the weights is a side file."""
    suffixes = (*SIDE_SUFFIXES, *CODE_SUFFIXES) if include_code else SIDE_SUFFIXES
    wanted = path.name.endswith(suffixes) or path.name.split(".")[0].upper() in SIDE_NAMES
    return wanted and not path.name.endswith(".index.json") and path.name != FILE_NAME and path.is_file()
