"""Say what quantize did: to its caller, and in quantization_report.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shardprep_runtime import __version__

from ..layout import Scheme
from ..layout.pad import Padding
from .calibration import Tokens
from .checks import Evaluation
from .forecast import Forecast
from .quality import Quality

REPORT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What quantize did, or would do."""

    destination: Path
    scheme: Scheme
    engine: str
    versions: Mapping[str, str]
    resumes: bool
    """Whether the engine goes on at the layer at which it was killed."""
    forecast: Forecast
    calibration: Mapping[str, Any]
    padding: Padding
    quantized: int = 0
    """Linears that are quantized."""
    kept: tuple[str, ...] = ()
    """Modules with matrices that are not."""
    source_bytes: int = 0
    nbytes: int = 0
    """Bytes of the result's tensors; as forecast in a dry run."""
    quality: Quality | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    """On what text."""
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    """(name, size) of each weight file; none in a dry run."""


def about(heldout: Tokens, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "source": heldout.source,
        "sequences": len(heldout.sequences),
        "tokens": heldout.count,
        "digest": heldout.digest,
        "calibrated_on": evaluation.text is None,
    }


def as_told(report: QuantizeReport, made: Mapping[str, Any]) -> dict[str, Any]:
    """The content of quantization_report.json: facts alone that a second run finds again, so no times.

    Args:
        report: Of the run.
        made: What the engine told of its work, with the losses of linears.
    """
    scheme, quality = report.scheme, report.quality
    summary: dict[str, Any] = {
        "method": scheme.method,
        "bits": scheme.bits,
        "group_size": -1 if scheme.group is None else scheme.group,
        "symmetric": scheme.symmetric,
        "act_order": scheme.act_order,
        "engine": f"{report.engine} {report.versions.get(report.engine, '')}".strip(),
        "calibration": report.calibration,
    }
    if quality is not None:
        summary |= {
            "measured_on": report.measured,
            "perplexity_before": quality.perplexity_before,
            "perplexity": quality.perplexity,
            "kl": quality.kl,
            "top1_agreement": quality.agreement,
        }
    losses: dict[int, dict[str, float]] = {}
    for each in made.get("losses", ()):
        losses.setdefault(each["layer"], {})[each["name"]] = each["loss"]
    layers = [
        {
            "layer": number,
            **({"error": own.error, "drift": own.drift} if own is not None else {}),
            **({"losses": losses[number]} if number in losses else {}),
        }
        for number, own in (
            [(each.layer, each) for each in quality.layers]
            if quality is not None
            else [(n, None) for n in sorted(losses)]
        )
    ]
    return {
        "version": REPORT_VERSION,
        "tool": f"shardprep {__version__}",
        "summary": summary,
        "versions": dict(report.versions),
        "linears_quantized": report.quantized,
        "kept": list(report.kept),
        "padding": report.padding.as_json(),
        "bytes": {"before": report.source_bytes, "after": report.nbytes},
        "notes": list(report.notes),
        "layers": layers,
    }
