"""Say what a manifest is: what a shard set holds, who owns which part, and the digests that everything hangs on.

docs/manifest-format.md is the format's document. `read_manifest` and `write_manifest` are its two directions.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from ..errors import ManifestError, quote
from . import cut, dtypes
from .grid import Stages

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
    """How the tensor is cut as it is stored."""
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
    """The name of the tensor; that of a run holds EXPERT where the number stands."""
    entry: Entry
    """What is said of the tensor; for a run, what is said of each but for its expert."""
    run: tuple[int, int] | None
    """Experts [start, stop)."""


def names_of(name: str, run: tuple[int, int]) -> list[str]:
    """The names of the tensors that a line lists for a run of experts.

    Args:
        name: Name of the line, with EXPERT where the number stands.
        run: Experts [start, stop).
    """
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


def digest_of(raw: bytes) -> str:
    """`sha256:...` of `raw`: how manifests, headers and side files are named."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def check_path(path: str) -> str:
    """Have a path be plain, relative, and stay in its folder.

    Returns:
        The path as it is.

    Raises:
        ManifestError: For another one.
    """
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ManifestError(f"the path {quote(path)} leaves the folder or is not plain; refused")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ManifestError(f"the path {quote(path)} is not a name that a file can have; refused") from None
    return path
