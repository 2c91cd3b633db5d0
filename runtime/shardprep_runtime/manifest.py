"""Read and write the manifest: what a shard set holds, who owns which part, and the digests that everything hangs on.

docs/manifest-format.md is the format's document; the reader owns the format, so both directions live here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from . import cut, dtypes
from .errors import ManifestError, ShardprepError, quote
from .grid import Stages, check_stages
from .header import MAX_DIMS, MAX_HEADER_BYTES, is_size, loads_strict

FILE_NAME: Final = "shardprep.json"
FORMAT: Final = "shardprep"
VERSION: Final = 1
"""The newest manifest version that this runtime reads. It rises when an old reader would misread a new file."""

MAX_BYTES: Final = 256 * 2**20
"""A larger manifest is refused before it is read."""

MAX_GRAIN: Final = 4096
MAX_BLOCK_BYTES: Final = 16 * 2**20

Layer = int | str
"""The number of a layer, or a placement."""

PLACEMENTS: Final = ("first", "last", "ends", "every")
"""Stages that need a tensor outside the layers: the first (embedding), the last (head), both (a tied embedding), all."""


@dataclass(frozen=True, slots=True)
class Form:
    """Dtype, full shape and layout, shared by all tensors that are alike."""

    dtype: str
    shape: tuple[int, ...]
    layout: cut.Layout


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the shard set."""

    form: Form
    layer: Layer


@dataclass(frozen=True, slots=True)
class Part:
    """One safetensors file of pieces."""

    path: str
    size: int
    header_size: int
    digest: str
    """`sha256:...` of the header, which holds a digest of every block: it stands for every byte of the part."""
    ranks: tuple[int, int]
    """The ranks [start, stop) of the grain that own its pieces."""
    layers: tuple[int, int]
    """Layers [start, stop) of which it holds pieces; start == stop: none."""
    placements: tuple[str, ...]
    """Placements of which it holds pieces."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that travels with the weights, byte for byte."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a shard set holds."""

    model: Mapping[str, Any]
    """architecture, model_type, layers, source (uri, revision, files and their digests), tool: provenance."""
    layers: int
    grain: int
    """The tensor parallel size at which the tensors are cut."""
    stages: Stages | None
    """The pipeline stages that the set was split for; other sizes and stages can be asked for."""
    block_bytes: int
    """Bytes of a piece that share one digest; the last block of a piece may be shorter."""
    tensors: Mapping[str, Entry]
    aliases: Mapping[str, str]
    """Names in the checkpoint that are tied to a stored tensor -> that tensor."""
    tied: Mapping[str, str]
    """Names that are not in the checkpoint, but that its config ties to a stored tensor -> that tensor."""
    parts: tuple[Part, ...]
    side_files: tuple[SideFile, ...]
    quantization: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each once."""
        return sum(dtypes.nbytes(entry.form.dtype, entry.form.shape) for entry in self.tensors.values())


# ---------------------------------------------------------------------------------------------------------- writing


def dump(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file: one tensor and one part a line, so that it reads and diffs well."""
    forms = list(dict.fromkeys(entry.form for entry in manifest.tensors.values()))
    number = {form: i for i, form in enumerate(forms)}
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(manifest.model),
        "quantization": manifest.quantization,
        "layers": manifest.layers,
        "grain": manifest.grain,
        "stages": manifest.stages,
        "digests": {
            "headers": "sha256",
            "side_files": "sha256",
            "blocks": "blake3",
            "block_bytes": manifest.block_bytes,
        },
        "forms": [{"dtype": f.dtype, "shape": f.shape, "layout": _dump_layout(f.layout)} for f in forms],
        "tensors": {name: [number[e.form], e.layer] for name, e in manifest.tensors.items()},
        "aliases": dict(manifest.aliases),
        "tied": dict(manifest.tied),
        "parts": [_fields(part) for part in manifest.parts],
        "side_files": [_fields(side) for side in manifest.side_files],
    }
    lines = []
    for key, value in fields.items():
        if isinstance(value, dict) and value and key in ("tensors", "aliases", "tied"):
            inner = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}")
        elif isinstance(value, list) and value and key in ("forms", "parts", "side_files"):
            inner = ",\n".join(f"    {json.dumps(v)}" for v in value)
            lines.append(f"  {json.dumps(key)}: [\n{inner}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _fields(value: Part | SideFile) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def _dump_layout(layout: cut.Layout) -> dict[str, Any]:
    if layout.dim is None:
        return {"cut": "whole"}
    if layout.uneven:
        return {"cut": "chunks", "dim": layout.dim}
    return {
        "cut": "units",
        "dim": layout.dim,
        "segments": [[s.size, s.units, s.shared] for s in layout.segments],
    }


def digest_of(raw: bytes) -> str:
    """`sha256:...` of `raw`: how manifests, headers and side files are named."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


# ---------------------------------------------------------------------------------------------------------- reading


def find(path: str | os.PathLike[str]) -> Path:
    """The manifest's file, whether `path` is that file or its folder. Raises ManifestError where there is none."""
    given = Path(path)
    file = given / FILE_NAME if given.is_dir() else given
    if not file.is_file():
        raise ManifestError(
            f"{quote(file)}: no manifest here; a complete shard set has one (`shardprep split` writes it last)"
        )
    return file


def read(path: str | os.PathLike[str], *, digest: str | None = None) -> Manifest:
    """The manifest at `path` (its file or folder), which must have `digest` (`sha256:...`) where one is given."""
    file = find(path)
    where = quote(file)
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_BYTES:
            raise ManifestError(
                f"{where}: {size} bytes is more than the {MAX_BYTES} that a manifest may have"
            )
        raw = stream.read(MAX_BYTES + 1)
    if digest is not None and digest != digest_of(raw):
        raise ManifestError(
            f"{where}: its digest is {digest_of(raw)}, expected {quote(digest)}; do not load it"
        )
    return parse(raw, where=where)


def parse(raw: bytes, *, where: str = FILE_NAME) -> Manifest:
    """Parse and check a manifest. Unknown keys are ignored, an unknown version is refused; raises ManifestError."""
    try:
        fields = loads_strict(raw.decode("utf-8"), where=where)
        return _parse(fields)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where}: not UTF-8 at byte {error.start}") from None
    except ManifestError as error:
        raise ManifestError(f"{where}: {error}") from None
    except ShardprepError as error:
        raise ManifestError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


class _Fields:
    """A JSON object whose values are asked for by key and type."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where} must be an object")
        self.value: dict[str, Any] = value
        self.where = where

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.value:
            raise ManifestError(f"{self.where} lacks {key!r}")
        found = self.value[key]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ManifestError(f"{self.where}: {key!r} has the wrong type ({type(found).__name__})")
        return found

    def size(self, key: str, *, low: int = 0, high: int = dtypes.MAX_ELEMENTS) -> int:
        found: int = self.get(key, int)
        if not low <= found <= high:
            raise ManifestError(f"{self.where}: {key!r} must be from {low} to {high}, found {found}")
        return found

    def path(self, key: str) -> str:
        return check_path(self.get(key, str))

    def digest(self, key: str) -> str:
        found: str = self.get(key, str)
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
            raise ManifestError(
                f"{self.where}: {key!r} must be sha256: and 64 hex digits, found {quote(found)}"
            )
        return found

    def bounds(self, key: str, high: int) -> tuple[int, int]:
        found = self.get(key, list)
        if len(found) != 2 or not all(map(is_size, found)) or not found[0] <= found[1] <= high:
            raise ManifestError(
                f"{self.where}: {key!r} must be [start, stop] within {high}, found {quote(found)}"
            )
        return found[0], found[1]


def check_path(path: str) -> str:
    """`path` if it is a plain relative path that stays in its folder. Raises ManifestError otherwise."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ManifestError(f"the path {quote(path)} leaves the folder or is not plain; refused")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ManifestError(f"the path {quote(path)} is no name that a file can have; refused") from None
    return path


def _parse(raw: Any) -> Manifest:
    top = _Fields(raw, "the manifest")
    if raw.get("format") != FORMAT:
        raise ManifestError(
            f"'format' is {quote(raw.get('format'))}, expected {FORMAT!r}: not a shardprep manifest"
        )
    version = top.get("version", int)
    if version > VERSION:
        raise ManifestError(
            f"manifest version {version} is newer than {VERSION}, the newest this shardprep_runtime reads; "
            "upgrade it on the worker"
        )
    if version < 1:
        raise ManifestError(f"manifest version {version} does not exist")
    digests = _Fields(top.get("digests", dict), "'digests'")
    for what, algorithm in (("headers", "sha256"), ("side_files", "sha256"), ("blocks", "blake3")):
        if digests.get(what, str) != algorithm:
            raise ManifestError(
                f"digests of {what} by {quote(digests.get(what, str))}: this reader knows {algorithm}"
            )
    layers = top.size("layers")
    grain = top.size("grain", low=1, high=MAX_GRAIN)
    forms = [_parse_form(_Fields(form, f"form {i}"), grain) for i, form in enumerate(top.get("forms", list))]
    tensors = _parse_tensors(top.get("tensors", dict), forms, layers)
    names = set(tensors)
    stages = None
    if top.value.get("stages") is not None:
        given = top.get("stages", list)
        if not all(isinstance(stage, list) and all(map(is_size, stage)) for stage in given):
            raise ManifestError(f"'stages' must be a list of [start, stop], found {quote(given)}")
        stages = check_stages(given, layers)
    others = []
    for key in ("aliases", "tied"):
        mapping = top.get(key, dict)
        for name, target in mapping.items():
            if not isinstance(target, str) or target not in names or name in names:
                raise ManifestError(f"{key!r}: {quote(name)} must name a stored tensor and not be one")
        others.append(mapping)
    both = others[0].keys() & others[1].keys()
    if both:
        raise ManifestError(f"{quote(min(both))} is in 'aliases' and in 'tied'")
    parts = tuple(
        _parse_part(_Fields(part, f"part {i}"), grain, layers)
        for i, part in enumerate(top.get("parts", list))
    )
    sides = tuple(
        SideFile(f.path("path"), f.size("size"), f.digest("digest"))
        for f in (_Fields(side, f"side file {i}") for i, side in enumerate(top.get("side_files", list)))
    )
    paths = [path.casefold() for path in (*(part.path for part in parts), *(side.path for side in sides))]
    if len(set(paths)) != len(paths) or FILE_NAME in paths:
        raise ManifestError("two files have the same path")
    quantization = top.value.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        raise ManifestError("'quantization' must be an object or null")
    return Manifest(
        model=top.get("model", dict),
        layers=layers,
        grain=grain,
        stages=stages,
        block_bytes=digests.size("block_bytes", low=1, high=MAX_BLOCK_BYTES),
        tensors=tensors,
        aliases=others[0],
        tied=others[1],
        parts=parts,
        side_files=sides,
        quantization=quantization,
    )


def _parse_form(fields: _Fields, grain: int) -> Form:
    dtype = dtypes.check_dtype(fields.get("dtype", str), where=fields.where)
    shape = fields.get("shape", list)
    if len(shape) > MAX_DIMS or not all(map(is_size, shape)):
        raise ManifestError(f"{fields.where}: 'shape' must be a list of at most {MAX_DIMS} sizes")
    shape = tuple(shape)
    if dtypes.nbytes(dtype, shape) > dtypes.MAX_ELEMENTS:
        raise ManifestError(f"{fields.where}: {shape} is larger than any file")
    layout = _parse_layout(_Fields(fields.get("layout", dict), f"{fields.where}: 'layout'"), shape)
    if not cut.allows(layout, grain):
        raise ManifestError(f"{fields.where}: its layout does not allow the grain {grain}")
    return Form(dtype, shape, layout)


def _parse_layout(fields: _Fields, shape: tuple[int, ...]) -> cut.Layout:
    kind = fields.get("cut", str)
    if kind == "whole":
        return cut.WHOLE
    if kind not in ("chunks", "units"):
        raise ManifestError(f"{fields.where}: 'cut' is {quote(kind)}; this reader knows whole, chunks, units")
    dim = fields.size("dim", high=max(len(shape) - 1, 0))
    if not shape:
        raise ManifestError(f"{fields.where}: a tensor without dims cannot be cut")
    if kind == "chunks":
        if dim:
            raise ManifestError(
                f"{fields.where}: chunks are rows, along dim 0, not {dim}: a view may take part of a piece"
            )
        return cut.Layout(dim, uneven=True)
    segments = fields.get("segments", list)
    for segment in segments:
        if not isinstance(segment, list) or len(segment) != 3 or not all(map(is_size, segment[:2])):
            raise ManifestError(f"{fields.where}: each segment must be [size, units, shared]")
        if not isinstance(segment[2], bool):
            raise ManifestError(f"{fields.where}: a segment's 'shared' must be true or false")
        if segment[1] < 1 or segment[0] % segment[1]:
            raise ManifestError(f"{fields.where}: {segment[0]} is no multiple of {segment[1]} units")
    if not segments or sum(segment[0] for segment in segments) != shape[dim]:
        raise ManifestError(
            f"{fields.where}: the segments must add up to {shape[dim]}, dim {dim} of the shape"
        )
    return cut.Layout(dim, tuple(cut.Segment(*segment) for segment in segments))


def _parse_tensors(raw: dict[str, Any], forms: list[Form], layers: int) -> dict[str, Entry]:
    tensors = {}
    shared: dict[tuple[int, Layer], Entry] = {}
    for name, value in raw.items():
        if not isinstance(value, list) or len(value) != 2 or not is_size(value[0]) or value[0] >= len(forms):
            raise ManifestError(f"tensor {quote(name)} must be [form, layer] with a form that exists")
        layer = value[1]
        if not (is_size(layer) and layer < layers) and layer not in PLACEMENTS:
            raise ManifestError(
                f"tensor {quote(name)}: layer {quote(layer)} is none of the {layers} layers nor a placement"
            )
        key = (value[0], layer)
        if key not in shared:
            shared[key] = Entry(forms[value[0]], layer)
        tensors[name] = shared[key]
    return tensors


def _parse_part(fields: _Fields, grain: int, layers: int) -> Part:
    size = fields.size("size")
    placements = fields.get("placements", list)
    if not all(placement in PLACEMENTS for placement in placements):
        raise ManifestError(f"{fields.where}: unknown placement among {quote(placements)}")
    return Part(
        path=fields.path("path"),
        size=size,
        header_size=fields.size("header_size", low=8, high=min(size, 8 + MAX_HEADER_BYTES)),
        digest=fields.digest("digest"),
        ranks=fields.bounds("ranks", grain),
        layers=fields.bounds("layers", layers),
        placements=tuple(placements),
    )
