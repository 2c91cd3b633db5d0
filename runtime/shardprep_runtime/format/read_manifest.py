"""Read a manifest and refuse what is not one: each field has its type and bounds, and all of them fit together.

docs/manifest-format.md is the format's document. Nothing beside the manifest's own file is opened here.
"""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from ..errors import FormatError, LayoutError, ManifestError, ShardprepError, quote
from . import cut, dtypes
from .grid import check_stages
from .header import MAX_DIMS, MAX_HEADER_BYTES, is_size, loads_strict
from .manifest import (
    DIGEST,
    EXPERT,
    FILE_NAME,
    FORMAT,
    MAX_BLOCK_BYTES,
    MAX_BYTES,
    MAX_EXPERTS,
    MAX_GRAIN,
    MAX_PIECES,
    PLACEMENTS,
    PROBE_LIMIT,
    PROBE_METHOD,
    PROBE_POSITIONS,
    PROBE_PROJECTIONS,
    QUANTIZATION_REPORT,
    TORCH,
    VERSION,
    Entry,
    Form,
    Line,
    Manifest,
    Part,
    Probe,
    Quantization,
    QuantizationReport,
    Response,
    SideFile,
    Tensors,
    check_path,
    digest_of,
)

DIGITS: Final = tuple("0123456789")


def find_manifest(path: str | os.PathLike[str]) -> Path:
    """The manifest's file, whether `path` is that file or its folder.

    Raises:
        ManifestError: Where there is none.
    """
    given = Path(path)
    file = given / FILE_NAME if given.is_dir() else given
    if not file.is_file():
        raise ManifestError(
            f"{quote(file)}: no manifest here; a complete shard set has one (`shardprep split` writes it last)"
        )
    return file


def read_manifest(path: str | os.PathLike[str], *, digest: str | None = None) -> Manifest:
    """Read the manifest of a shard set in a folder.

    Args:
        path: The manifest's file, or its folder.
        digest: `sha256:...` that it must have; None: any.

    Raises:
        ManifestError: For one that is missing, malformed, newer than this reader, or another than the digest says.
    """
    return read_named(path, digest=digest)[0]


def read_named(path: str | os.PathLike[str], *, digest: str | None = None) -> tuple[Manifest, str]:
    """Read a manifest as `read_manifest` does, and say which one it is.

    Args:
        path: The manifest's file, or its folder.
        digest: `sha256:...` that it must have; None: any.

    Returns:
        The manifest, and the digest that it has: by it whoever loads later loads the same.
    """
    file = find_manifest(path)
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
    return parse_manifest(raw, where=where), found


def parse_manifest(raw: bytes, *, where: str = FILE_NAME) -> Manifest:
    """Parse and check a manifest. Unknown keys are ignored, an unknown version is refused.

    Args:
        raw: Bytes of its file.
        where: How messages name it.

    Raises:
        ManifestError: For what is not a manifest that this runtime can read.
    """
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

    def get(self, key: str, kind: type | tuple[type, ...], *, absent: Any = None) -> Any:
        if key not in self.value:
            if absent is not None:  # the key may be left out
                return absent
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
                f"'quantization': {key} {quote(value[key])} is not a name: lower case, digits, _ . -"
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
        raise ManifestError(f"'probe': method {quote(method)} is not a name: lower case, digits, _ . -")
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
    names = top.get("engines", list, absent=[])
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", name) or name == TORCH:
            raise ManifestError(
                f"'engines': {quote(name)} is not the name of an engine: lower case, and not {TORCH}, which asks as stored"
            )
    if len(set(names)) != len(names):
        raise ManifestError("'engines' names one of them twice")
    return tuple(names)


def _parse_stage_needs(top: _Fields, engines: tuple[str, ...], layers: int) -> dict[str, tuple[int, ...]]:
    found = {}
    for engine, needs in top.get("stage_needs", dict, absent={}).items():
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
    for engine, value in fields.get("engines", dict, absent={}).items():
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
        fields = _Fields(value, f"{where}: each segment that is not a list")
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
        raise ManifestError(f"{where}: {found.size} is not a multiple of {found.units} units")
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
                f"tensor {quote(name)}: layer {quote(layer)} is neither one of the {layers} layers nor a placement"
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
