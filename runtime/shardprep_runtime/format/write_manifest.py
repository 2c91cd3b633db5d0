"""Write a manifest as the bytes of its file. docs/manifest-format.md is the format's document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import cut
from .manifest import (
    EXPERT,
    FORMAT,
    PROBE_METHOD,
    VERSION,
    Entry,
    Form,
    Manifest,
    Part,
    Probe,
    Quantization,
    Response,
    SideFile,
)


def dump_manifest(manifest: Manifest) -> bytes:
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

    Args:
        tensors: What is listed.
        number: Identity of a form -> its number.
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
