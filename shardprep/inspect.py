"""Say what a checkpoint or a shard set holds, without reading tensor data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardprep_runtime.errors import InputError
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Part
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.stores.store import Access

from .index import Index, LeftOut, SourceFile, Tensor, natural
from .layout import Scheme
from .layout.packed import unpack
from .model.describe import scheme_of
from .source import open_source, read_checkpoint


@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of a checkpoint or a shard set."""

    path: Path | str
    kind: str
    """`torch`, `safetensors` or `shard set`."""
    model_type: str | None
    tensors: tuple[Tensor, ...]
    """Tensors in natural order of their names: layer 2 before layer 10."""
    aliases: Mapping[str, str]
    """Other names of tied tensors -> the name in `tensors`."""
    left_out: tuple[LeftOut, ...]
    """Contents that are not weights, each with the reason."""
    files: tuple[SourceFile, ...]
    side_files: tuple[str, ...]
    parameters: int
    """Number of the model's parameters, tied ones once. Packed tensors count as the weights that they stand for."""
    nbytes: int
    by_dtype: Mapping[str, tuple[int, int]]
    """dtype -> (tensors, bytes)."""
    by_layer: Mapping[str, tuple[int, int]]
    """Layer number, or `outside the layers` -> (tensors, bytes)."""
    parts: tuple[Part, ...] = ()
    """The parts of a shard set."""
    grain: int | None = None
    """The tensor parallel size that a shard set was split at; None for a checkpoint."""
    experts: int = 0
    """Routed experts of a layer, as the manifest of a shard set says."""
    engines: tuple[str, ...] = ()
    """Engines for which views of a shard set can be cut."""
    probe: bool = False
    """Whether the manifest of a shard set says what the model gives for fixed inputs."""
    quantization: Scheme | None = None
    """The scheme by which it is quantized; None: it is not quantized, or its scheme is unknown."""
    unknown_quantization: str | None = None
    """The reason why the scheme of a quantized checkpoint is unknown."""

    @property
    def tied(self) -> list[list[str]]:
        """Groups of names that are one tensor; the first is the one that is stored."""
        groups: dict[str, list[str]] = {}
        for alias, name in self.aliases.items():
            groups.setdefault(name, [name]).append(alias)
        return list(groups.values())


OUTSIDE = "outside the layers"


def inspect(path: Path | str, *, access: Access | None = None) -> Inspection:
    """Read what a checkpoint or a shard set holds, without tensor data.

        found = inspect("s3://models/llama-70b/pytorch_model.bin")
        print(found.kind, found.parameters)

    Args:
        path: A path or a URI, as `open_source` takes it.
        access: Endpoint, profile and the like of a store.

    Raises:
        InputError: Where it is damaged, contradicts itself, or cannot be carried over.
    """
    with open_source(path, access, data=False) as source:
        index = read_checkpoint(source)
        scheme, parameters, unknown = _numbers(index)
    manifest = read_manifest(path) if index.kind == "shard set" else None
    tensors = tuple(sorted(index.tensors.values(), key=lambda tensor: natural(tensor.name)))
    model_type = index.config.get("model_type")
    return Inspection(
        path=path,
        kind=index.kind,
        model_type=model_type if isinstance(model_type, str) else None,
        tensors=tensors,
        aliases=index.aliases,
        left_out=index.left_out,
        files=index.files,
        side_files=index.side_files,
        parameters=parameters,
        nbytes=index.nbytes,
        by_dtype=_totals((tensor.dtype, tensor) for tensor in tensors),
        by_layer=_totals((layer_of(tensor.name), tensor) for tensor in tensors),
        parts=manifest.parts if manifest else (),
        grain=manifest.grain if manifest else None,
        experts=manifest.experts if manifest else 0,
        engines=(manifests.TORCH, *manifest.engines) if manifest else (),
        probe=manifest is not None and manifest.probe is not None,
        quantization=scheme,
        unknown_quantization=unknown,
    )


def _numbers(index: Index) -> tuple[Scheme | None, int, str | None]:
    """Give the scheme of quantization, the number of parameters, and the reason where the scheme is unknown."""
    elements = sum(prod(tensor.shape) for tensor in index.tensors.values())
    try:
        scheme = scheme_of(index)
        if scheme is None:
            return None, elements, None
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items()}
        return scheme, unpack(tensors, scheme).parameters, None
    except InputError as error:  # its tensors can be listed all the same
        return None, elements, str(error)


def layer_of(name: str) -> str:
    """Give the first number in a tensor's name, which is its layer in every model we know, or OUTSIDE."""
    return next((word for word in name.split(".") if word.isascii() and word.isdigit()), OUTSIDE)


def _totals(items: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for key, tensor in items:
        counts[key] += 1
        sizes[key] += tensor.nbytes
    return {key: (counts[key], sizes[key]) for key in counts}
