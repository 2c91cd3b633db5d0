"""Read and write the manifest: what a shard set holds, who owns which part, and the digests that everything hangs on.

docs/manifest-format.md is the format's document; the reader owns the format, so both directions live here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..errors import FormatError, LayoutError, ManifestError, ShardprepError, quote
from . import cut, dtypes
from .grid import Stages, check_stages
from .header import MAX_DIMS, MAX_HEADER_BYTES, is_size, loads_strict

FILE_NAME: Final = "shardprep.json"
FORMAT: Final = "shardprep"
QUANTIZATION_REPORT: Final = "quantization_report.json"
"""The side file in which `shardprep quantize` says how good its result is."""

VERSION: Final = 1
"""The newest manifest version that this runtime reads. It rises when an old reader would misread a new file."""

MAX_BYTES: Final = 256 * 2**20
"""A larger manifest is refused before it is read."""

MAX_GRAIN: Final = 4096
MAX_BLOCK_BYTES: Final = 16 * 2**20

Layer = int | str
"""The number of a layer, or a placement."""

MAX_PIECES: Final = 2**16
"""Pieces of one tensor: its segments times the grain."""

MAX_EXPERTS: Final = 2**16
MAX_TENSORS: Final = 2**21

PROBE_METHOD: Final = "signs-1"
"""Names the inputs of a probe and what is recorded of the outputs (see `probe.py`); another choice gets another name."""

PROBE_POSITIONS: Final = 8
PROBE_PROJECTIONS: Final = 8

PROBE_LIMIT: Final = 1e30
"""No number of a probe is larger."""

EXPERT: Final = "{expert}"
"""Stands for the expert's number in the name of a line that lists a run of experts."""

DIGITS: Final = tuple("0123456789")
DIGEST: Final = re.compile("sha256:[0-9a-f]{64}")
NUMBER: Final = re.compile("[0-9]+")

TORCH: Final = "torch"
"""The engine that asks for every tensor as it is stored; every shard set serves it."""

TRANSFORMERS: Final = "transformers"
"""The engine that cuts as transformers' own tensor parallelism does."""

ENGINES: Final = (TORCH, TRANSFORMERS, "vllm")
"""Engines that commands offer; a shard set may know others."""

PLACEMENTS: Final = ("first", "last", "ends", "every")
"""Stages that need a tensor outside the layers: the first (embedding), the last (head), both (a tied embedding), all."""


@dataclass(frozen=True, slots=True)
class Form:
    """Dtype, full shape and layout, shared by all tensors that are alike."""

    dtype: str
    shape: tuple[int, ...]
    layout: cut.Layout
    """As it is stored."""
    engines: tuple[tuple[str, cut.Layout], ...] = ()
    """Engines that ask for it otherwise -> the layout by which they cut: whole, or along the same dim."""


class Entry(NamedTuple):
    """One tensor of the shard set. A tuple, since a large model has 100,000 of them."""

    form: Form
    layer: Layer
    expert: int | None = None
    """Which expert's tensor it is, where each expert has its own."""


class Line(NamedTuple):
    """A tensor, or those of a run of experts that are alike but for the expert's number."""

    name: str
    """Of a run it holds EXPERT where the number stands."""
    entry: Entry
    """Of a run: of each of them, but for the expert."""
    run: tuple[int, int] | None
    """Experts [start, stop)."""


def names_of(name: str, run: tuple[int, int]) -> list[str]:
    """The names of the tensors of the experts [start, stop) that a line lists under `name`."""
    before, _, behind = name.partition(EXPERT)
    return [f"{before}{expert}{behind}" for expert in range(*run)]


class Tensors(Mapping[str, Entry]):
    """The tensors of a manifest as it lists them: a worker that starts makes no list of 100,000 of which it needs few."""

    def __init__(self, lines: Iterable[Line]) -> None:
        """Raises ManifestError where two lines name the same tensor."""
        self.lines = tuple(lines)
        self._single = {line.name: line.entry for line in self.lines if line.run is None}
        self._runs = {line.name: line for line in self.lines if line.run is not None}
        self._all: dict[str, Entry] | None = None
        self._count = len(self._single) + sum(last - first for first, last in self._known_runs())
        if self._count > MAX_TENSORS:
            raise ManifestError(
                f"{self._count} tensors are more than the {MAX_TENSORS} that a manifest may list"
            )
        if self._may_repeat() and len(self._expanded()) != self._count:
            raise ManifestError("'tensors': two lines name the same tensor")

    def _known_runs(self) -> Iterator[tuple[int, int]]:
        return (line.run for line in self._runs.values() if line.run is not None)

    def _may_repeat(self) -> bool:
        """Whether two lines could name the same tensor; where not, that is proved without making their names."""
        if len(self._single) + len(self._runs) != len(self.lines):
            return True
        if any(self._in_run(name) is not None for name in self._single):
            return True
        # a name of two runs has the number of each where the other has a number in its line
        sides: dict[str, bool] = {}
        for name in self._runs:
            own = name.index(EXPERT)
            for number in NUMBER.finditer(name):
                both = f"{name[: number.start()]}{EXPERT}{name[number.end() :]}"
                if sides.setdefault(both, own < number.start()) != (own < number.start()):
                    return True
        return False

    def _in_run(self, name: str) -> Entry | None:
        for number in NUMBER.finditer(name) if self._runs else ():
            line = self._runs.get(f"{name[: number.start()]}{EXPERT}{name[number.end() :]}")
            if line is None or line.run is None or len(number[0]) > 10:
                continue
            expert = int(number[0])
            if line.run[0] <= expert < line.run[1] and str(expert) == number[0]:
                return line.entry._replace(expert=expert)
        return None

    def _expanded(self) -> dict[str, Entry]:
        if self._all is None:
            found: dict[str, Entry] = {}
            for line in self.lines:
                if line.run is None:
                    found[line.name] = line.entry
                else:
                    form, layer, _ = line.entry
                    entries = (Entry(form, layer, expert) for expert in range(*line.run))
                    found.update(zip(names_of(line.name, line.run), entries, strict=True))
            self._all = found
        return self._all

    def __getitem__(self, name: str) -> Entry:
        found = self._single.get(name)
        if found is None:
            found = self._in_run(name)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._expanded())

    def __len__(self) -> int:
        return self._count

    def items(self) -> ItemsView[str, Entry]:
        return self._expanded().items()

    def values(self) -> ValuesView[Entry]:
        return self._expanded().values()


def lines_of(tensors: Mapping[str, Entry]) -> Iterable[Line]:
    """The lines by which tensors are listed; one for each where they come from elsewhere than a manifest's file."""
    if isinstance(tensors, Tensors):
        return tensors.lines
    return (Line(name, entry, None) for name, entry in tensors.items())


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
class QuantizationReport:
    """What measured a quantized model against the original."""

    digest: str
    """`sha256:...` of the side file QUANTIZATION_REPORT, which says all of it."""
    summary: Mapping[str, Any]
    """Its summary: provenance, of which nothing is required."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linears are quantized: facts for people and engines; where tensors are cut, their forms say."""

    method: str
    bits: int
    group_size: int | None
    """Inputs that share a scale; None: all of a row."""
    symmetric: bool
    act_order: bool
    """Whether inputs belong to groups by a permutation (g_idx); every rank then has all scales of what it has."""
    format: str
    """How numbers are packed."""
    report: QuantizationReport | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """What the embedding, a layer or the head gives for the fixed inputs of a probe."""

    noise: float
    """By how much of its own size it changes where it is computed in bfloat16 instead of float32."""
    positions: tuple[tuple[float, ...], ...]
    """At each position of the inputs: the root mean square of what it gives, and projections of that."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model gives for fixed inputs, piece by piece, so that a worker of any stage can be compared with it."""

    embedding: Response
    layers: tuple[Response, ...]
    head: Response


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
    quantization: Quantization | None = None
    """None: not quantized."""
    experts: int = 0
    """Routed experts of a layer; 0: none, or none that expert parallel ranks could share."""
    engines: tuple[str, ...] = ()
    """Engines whose way of asking the forms know, beside torch."""
    stage_needs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Engine -> layers, in order, of which each of its pipeline stages must hold at least one."""
    probe: Probe | None = None
    """None: nobody recorded one, or by a method that this runtime does not know."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each once."""
        return sum(dtypes.nbytes(entry.form.dtype, entry.form.shape) for entry in self.tensors.values())


# ---------------------------------------------------------------------------------------------------------- writing


def dump(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file: one tensor and one part a line, so that it reads and diffs well."""
    # by identity first: to hash a form is slow
    distinct = {id(entry.form): entry.form for entry in manifest.tensors.values()}
    forms = list(dict.fromkeys(distinct.values()))
    place = {form: i for i, form in enumerate(forms)}
    number = {key: place[form] for key, form in distinct.items()}
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(manifest.model),
        "quantization": _dump_quantization(manifest.quantization),
        "layers": manifest.layers,
        "experts": manifest.experts,
        "grain": manifest.grain,
        "stages": manifest.stages,
        "engines": manifest.engines,
        "stage_needs": dict(manifest.stage_needs),
        "digests": {
            "headers": "sha256",
            "side_files": "sha256",
            "blocks": "blake3",
            "block_bytes": manifest.block_bytes,
        },
        "forms": [_dump_form(form) for form in forms],
        "tensors": _dump_tensors(manifest.tensors, number),
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
    if manifest.probe is not None:
        lines.append(_dump_probe(manifest.probe))
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _fields(value: Part | SideFile) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def _dump_quantization(quantization: Quantization | None) -> dict[str, Any] | None:
    if quantization is None:
        return None
    names = ("method", "bits", "group_size", "symmetric", "act_order", "format")
    found = {name: getattr(quantization, name) for name in names}
    report = quantization.report
    if report is not None:
        found["report"] = {"digest": report.digest, "summary": dict(report.summary)}
    return found


def _dump_probe(probe: Probe) -> str:
    """The field, one layer a line."""

    def response(own: Response) -> str:
        return json.dumps({"noise": own.noise, "positions": own.positions})

    layers = ",\n".join(f"      {response(layer)}" for layer in probe.layers)
    return (
        f'  "probe": {{\n    "method": {json.dumps(PROBE_METHOD)},\n    "embedding": {response(probe.embedding)},\n'
        f'    "layers": [\n{layers}\n    ],\n    "head": {response(probe.head)}\n  }}'
    )


def _dump_tensors(tensors: Mapping[str, Entry], number: Mapping[int, int]) -> dict[str, Any]:
    """Name -> where it belongs; tensors that are alike in a run of experts on one line, in place of the first.

    `number` is that of a form by its identity.
    """
    groups: dict[str, list[tuple[str, Entry, int]]] = {}
    found: dict[str, Any] = {}
    for name, entry in tensors.items():
        line = None if entry.expert is None else _line_of(name, entry.expert)
        if line is None or entry.expert is None:
            groups[name] = [(name, entry, 0)]
        else:
            groups.setdefault(line, []).append((name, entry, entry.expert))
    for line, group in groups.items():
        places = [(number[id(entry.form)], entry.layer) for _, entry, _ in group]
        experts = sorted(expert for _, _, expert in group)
        if len(group) > 1 and len(set(places)) == 1 and experts[-1] - experts[0] == len(experts) - 1:
            found[line] = [*places[0], [experts[0], experts[-1] + 1]]
            continue
        for (name, entry, _), place in zip(group, places, strict=True):
            found[name] = [*place] if entry.expert is None else [*place, entry.expert]
    return found


def _line_of(name: str, expert: int) -> str | None:
    """The name with its last word that is the expert's number replaced, where it has one."""
    words = name.split(".")
    if str(expert) not in words or EXPERT in name:
        return None
    words[len(words) - 1 - words[::-1].index(str(expert))] = EXPERT
    return ".".join(words)


def _dump_form(form: Form) -> dict[str, Any]:
    fields: dict[str, Any] = {"dtype": form.dtype, "shape": form.shape, "layout": _dump_layout(form.layout)}
    if form.engines:
        fields["engines"] = {engine: _dump_layout(layout) for engine, layout in form.engines}
    return fields


def _dump_layout(layout: cut.Layout) -> dict[str, Any]:
    experts = {"experts": True} if layout.experts else {}
    if layout.dim is None:
        return {"cut": "whole", **experts}
    return {
        "cut": "units",
        "dim": layout.dim,
        "segments": [
            {"size": s.size, "units": s.units, "uneven": True, "multiple": s.multiple}
            if s.uneven
            else [s.size, s.units, s.shared]
            for s in layout.segments
        ],
        **experts,
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
    return read_named(path, digest=digest)[0]


def read_named(path: str | os.PathLike[str], *, digest: str | None = None) -> tuple[Manifest, str]:
    """`read`, and the digest that the manifest has: by it whoever loads later loads the same."""
    file = find(path)
    where = quote(file)
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_BYTES:
            raise ManifestError(
                f"{where}: {size} bytes is more than the {MAX_BYTES} that a manifest may have"
            )
        raw = stream.read(MAX_BYTES + 1)
    found = digest_of(raw)
    if digest not in (None, found):
        raise ManifestError(f"{where}: its digest is {found}, expected {quote(digest)}; do not load it")
    return parse(raw, where=where), found


def parse(raw: bytes, *, where: str = FILE_NAME) -> Manifest:
    """Parse and check a manifest. Unknown keys are ignored, an unknown version is refused; raises ManifestError."""
    try:
        fields = loads_strict(raw.decode("utf-8"), where=where)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where}: not UTF-8 at byte {error.start}") from None
    except FormatError as error:
        raise ManifestError(str(error)) from None
    try:
        return _parse(fields)
    except ShardprepError as error:
        raise ManifestError(f"{where}: {error}") from None


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

    def flag(self, key: str) -> bool:
        if not isinstance(self.value.get(key), bool):
            raise ManifestError(f"{self.where}: {key!r} must be true or false")
        return bool(self.value[key])

    def size(self, key: str, *, low: int = 0, high: int = dtypes.MAX_ELEMENTS) -> int:
        found: int = self.get(key, int)
        if not low <= found <= high:
            raise ManifestError(f"{self.where}: {key!r} must be from {low} to {high}, found {found}")
        return found

    def path(self, key: str) -> str:
        return check_path(self.get(key, str))

    def digest(self, key: str) -> str:
        found: str = self.get(key, str)
        if not DIGEST.fullmatch(found):
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
    experts = top.size("experts", high=MAX_EXPERTS) if "experts" in raw else 0
    engines = _parse_engines(top)
    forms = [
        _parse_form(_Fields(form, f"form {i}"), grain, experts, engines)
        for i, form in enumerate(top.get("forms", list))
    ]
    tensors = _parse_tensors(top.get("tensors", dict), forms, layers, experts)
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
            if not isinstance(target, str) or target not in tensors or name in tensors:
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
        quantization=_parse_quantization(top, sides),
        experts=experts,
        engines=engines,
        stage_needs=_parse_stage_needs(top, engines, layers),
        probe=_parse_probe(top, layers),
    )


def _parse_quantization(top: _Fields, sides: tuple[SideFile, ...]) -> Quantization | None:
    value = top.value.get("quantization")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ManifestError("'quantization' must be an object or null")
    own = _Fields(value, "'quantization'")
    for key in ("method", "format"):
        if not re.fullmatch(r"[a-z0-9_.-]{1,64}", own.get(key, str)):
            raise ManifestError(
                f"'quantization': {key} {quote(value[key])} is no name: lower case, digits, _ . -"
            )
    group = own.get("group_size", (int, type(None)))
    report = None
    if value.get("report") is not None:
        found = _Fields(own.get("report", dict), "the report of 'quantization'")
        report = QuantizationReport(found.digest("digest"), found.get("summary", dict))
        side = next((side for side in sides if side.path == QUANTIZATION_REPORT), None)
        if side is None or side.digest != report.digest:
            raise ManifestError(
                f"the report of 'quantization' is not the side file {QUANTIZATION_REPORT}: "
                + ("there is none" if side is None else "their digests differ")
            )
    return Quantization(
        own.get("method", str),
        own.size("bits", low=1, high=16),
        None if group is None else own.size("group_size", low=1),
        own.flag("symmetric"),
        own.flag("act_order"),
        own.get("format", str),
        report,
    )


def _parse_probe(top: _Fields, layers: int) -> Probe | None:
    if top.value.get("probe") is None:
        return None
    own = _Fields(top.value["probe"], "'probe'")
    method = own.get("method", str)
    if not re.fullmatch(r"[a-z0-9_.-]{1,64}", method):
        raise ManifestError(f"'probe': method {quote(method)} is no name: lower case, digits, _ . -")
    if method != PROBE_METHOD:  # what it holds is for those who know it
        return None
    found = own.get("layers", list)
    if len(found) != layers:
        raise ManifestError(f"'probe' is of {len(found)} layers, the model has {layers}")
    return Probe(
        _parse_response(own.value.get("embedding"), "'probe': 'embedding'"),
        tuple(_parse_response(each, f"'probe': layer {i}") for i, each in enumerate(found)),
        _parse_response(own.value.get("head"), "'probe': 'head'"),
    )


def _parse_response(value: Any, where: str) -> Response:
    fields = _Fields(value, where)
    noise = fields.get("noise", (int, float))
    rows = fields.get("positions", list)
    if (
        len(rows) != PROBE_POSITIONS
        or not all(isinstance(row, list) and len(row) == 1 + PROBE_PROJECTIONS for row in rows)
        or not all(_is_number(each) for each in (noise, *(each for row in rows for each in row)))
        or min(noise, *(row[0] for row in rows)) < 0
    ):
        raise ManifestError(
            f"{where} must have a 'noise' and {PROBE_POSITIONS} 'positions' of {1 + PROBE_PROJECTIONS} numbers each, noise "
            f"and the first of each not negative, none beyond {PROBE_LIMIT:g}"
        )
    return Response(float(noise), tuple(tuple(map(float, row)) for row in rows))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= PROBE_LIMIT  # which NaN and infinity are not


def _parse_engines(top: _Fields) -> tuple[str, ...]:
    names = top.get("engines", list) if "engines" in top.value else []
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", name) or name == TORCH:
            raise ManifestError(
                f"'engines': {quote(name)} is no engine's name: lower case, and not {TORCH}, which asks as stored"
            )
    if len(set(names)) != len(names):
        raise ManifestError("'engines' names one of them twice")
    return tuple(names)


def _parse_stage_needs(top: _Fields, engines: tuple[str, ...], layers: int) -> dict[str, tuple[int, ...]]:
    found = {}
    for engine, needs in (top.get("stage_needs", dict) if "stage_needs" in top.value else {}).items():
        if engine not in engines and engine != TORCH:
            raise ManifestError(f"'stage_needs': {quote(engine)} is not among the engines")
        if (
            not isinstance(needs, list)
            or not needs
            or not all(map(is_size, needs))
            or needs[-1] >= layers
            or any(a >= b for a, b in pairwise(needs))
        ):
            raise ManifestError(
                f"'stage_needs' of {engine}: expected some of the {layers} layers, in order, found {quote(needs)}"
            )
        found[engine] = tuple(needs)
    return found


def _parse_form(fields: _Fields, grain: int, experts: int, engines: tuple[str, ...]) -> Form:
    dtype = dtypes.check_dtype(fields.get("dtype", str), where=fields.where)
    shape = fields.get("shape", list)
    if len(shape) > MAX_DIMS or not all(map(is_size, shape)):
        raise ManifestError(f"{fields.where}: 'shape' must be a list of at most {MAX_DIMS} sizes")
    shape = tuple(shape)
    if dtypes.nbytes(dtype, shape) > dtypes.MAX_ELEMENTS:
        raise ManifestError(f"{fields.where}: {shape} is larger than any file")
    layout = _parse_layout(_Fields(fields.get("layout", dict), f"{fields.where}: 'layout'"), shape, experts)
    if len(layout.segments) * grain > MAX_PIECES:
        raise ManifestError(f"{fields.where}: more than {MAX_PIECES} pieces of one tensor")
    if not cut.allows(layout, grain):
        raise ManifestError(f"{fields.where}: its layout does not allow the grain {grain}")
    asked = []
    for engine, value in (fields.get("engines", dict) if "engines" in fields.value else {}).items():
        where = f"{fields.where}: 'engines': {quote(engine)}"
        if engine not in engines:
            raise ManifestError(f"{where} is not among the engines of the manifest")
        found = _parse_layout(_Fields(value, where), shape, experts)
        if len(found.segments) * grain > MAX_PIECES:
            raise ManifestError(f"{where}: more than {MAX_PIECES} pieces of one tensor")
        try:
            cut.check_asked(layout, found)
        except LayoutError as error:
            raise ManifestError(f"{where}: {error}") from None
        asked.append((engine, found))
    return Form(dtype, shape, layout, tuple(asked))


def _parse_layout(fields: _Fields, shape: tuple[int, ...], experts: int) -> cut.Layout:
    kind = fields.get("cut", str)
    by_expert = fields.value.get("experts", False)
    if not isinstance(by_expert, bool):
        raise ManifestError(f"{fields.where}: 'experts' must be true or false")
    if by_expert and (not experts or not shape or shape[0] != experts):
        raise ManifestError(
            f"{fields.where}: dim 0 of {list(shape)} does not count the {experts} experts of the manifest"
        )
    if kind == "whole":
        return cut.Layout(experts=True) if by_expert else cut.WHOLE
    if kind not in ("chunks", "units"):
        raise ManifestError(f"{fields.where}: 'cut' is {quote(kind)}; this reader knows whole, units, chunks")
    dim = fields.size("dim", high=max(len(shape) - 1, 0))
    if not shape:
        raise ManifestError(f"{fields.where}: a tensor without dims cannot be cut")
    if by_expert and dim == 0:
        raise ManifestError(f"{fields.where}: dim 0 counts experts; it is not cut as well")
    if kind == "chunks":  # how uneven rows were written first
        if dim:
            raise ManifestError(f"{fields.where}: chunks are rows, along dim 0, not {dim}")
        return cut.Layout(dim, (cut.Segment(shape[dim], shape[dim], uneven=True),))
    segments = tuple(_parse_segment(each, fields.where) for each in fields.get("segments", list))
    layout = cut.Layout(dim, segments, by_expert)
    if not segments or cut.length(layout) != shape[dim]:
        raise ManifestError(
            f"{fields.where}: the segments must add up to {shape[dim]}, dim {dim} of the shape"
        )
    return layout


def _parse_segment(value: Any, where: str) -> cut.Segment:
    if isinstance(value, list):
        if len(value) != 3 or not all(map(is_size, value[:2])):
            raise ManifestError(f"{where}: each segment must be [size, units, shared] or an object")
        found = cut.Segment(*value)
    else:
        fields = _Fields(value, f"{where}: each segment that is no list")
        found = cut.Segment(
            fields.size("size"),
            fields.size("units"),
            uneven=fields.value.get("uneven"),  # type: ignore[arg-type]  # checked below
            multiple=fields.size("multiple", low=1) if "multiple" in fields.value else 1,
        )
        if found.uneven is not True:
            raise ManifestError(f"{where}: a segment that is an object must be uneven: true")
    if not isinstance(found.shared, bool):
        raise ManifestError(f"{where}: a segment's 'shared' must be true or false")
    no_rows = found.uneven and found.size == found.units == 0
    if not no_rows and (found.units < 1 or found.size % found.units):
        raise ManifestError(f"{where}: {found.size} is no multiple of {found.units} units")
    return found


def _parse_tensors(raw: dict[str, Any], forms: list[Form], layers: int, experts: int) -> Tensors:
    lines = []
    for name, value in raw.items():
        if (
            not isinstance(value, list)
            or len(value) not in (2, 3)
            or not is_size(value[0])
            or value[0] >= len(forms)
        ):
            raise ManifestError(
                f"tensor {quote(name)} must be [form, layer] or [form, layer, expert] with a form that exists"
            )
        layer = value[1]
        if not (is_size(layer) and layer < layers) and layer not in PLACEMENTS:
            raise ManifestError(
                f"tensor {quote(name)}: layer {quote(layer)} is none of the {layers} layers nor a placement"
            )
        expert, run = None, None
        if len(value) == 3:
            expert, run = _parse_experts(name, value[2], experts)
        lines.append(Line(name, Entry(forms[value[0]], layer, expert), run))
    return Tensors(lines)


def _parse_experts(name: str, value: Any, experts: int) -> tuple[int | None, tuple[int, int] | None]:
    """The expert whose tensor a line lists, or the run of them."""
    if is_size(value) and value < experts:
        return value, None
    if isinstance(value, list) and len(value) == 2 and all(map(is_size, value)):
        before, _, behind = name.partition(EXPERT)
        if name.count(EXPERT) != 1 or before[-1:] in DIGITS or behind[:1] in DIGITS:
            raise ManifestError(
                f"tensor {quote(name)}: the name for a run of experts must hold {EXPERT} once, no digit beside it"
            )
        if value[0] < value[1] <= experts:
            return None, (value[0], value[1])
    raise ManifestError(
        f"tensor {quote(name)}: expected one of the {experts} experts, or [start, stop] of a run, found {quote(value)}"
    )


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
