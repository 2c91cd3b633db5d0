"""Check what an engine made against what was asked for, and say in its config.json what is quantized and what is not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardprep_runtime.dtypes import TORCH
from shardprep_runtime.errors import InputError, ProblemError, quote

from ..index import Index
from ..layout import Scheme, normalize
from ..model import lay_out_index, scheme_of
from ..plan import natural
from ..read import Sources, numpy_dtype, open_reader
from .names import PARTS

PACKED: Final = re.compile(r"\.(qweight|weight_packed)$")
FIELDS: Final = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_zero_point|weight_g_idx|weight_shape)$"
)


@dataclass(frozen=True, slots=True)
class Made:
    """What an engine made of a checkpoint."""

    scheme: Scheme
    quantized: int
    """Linears that are quantized."""
    linears: tuple[str, ...]
    """What they are called: within a layer where all layers have the same, else each by its whole name."""
    kept: tuple[str, ...]
    """Modules with matrices that are not, by their whole names: engines take a part of one for all names that have it."""


def check_made(made: Index, source: Index, asked: Scheme, *, without: Collection[str] = ()) -> Made:
    """What was made, if it is all of what was asked for, but for what no engine keeps. Raises ProblemError for anything
    else."""
    where = made.folder.where()
    scheme = scheme_of(made)
    if scheme is None:
        raise ProblemError(f"{where}: the engine left a checkpoint that is not quantized")
    for key in ("bits", "group", "symmetric", "act_order"):
        if getattr(scheme, key) != getattr(asked, key):
            raise ProblemError(
                f"{where}: the engine made a checkpoint with {key} {getattr(scheme, key)}, asked for was "
                f"{getattr(asked, key)}"
            )
    packed = {PACKED.sub(".weight", name) for name in made.tensors if PACKED.search(name)}
    plain = {name for name in made.tensors if not FIELDS.search(name)}
    stands_for = packed | plain | made.aliases.keys()
    wanted = source.tensors.keys() | source.aliases.keys()
    # experts that are fused in the source are taken apart, since no classic format has a place for them
    apart = {_path(name) for name in packed}
    fused = {
        name
        for name in wanted
        if name.rpartition(".")[2] in PARTS and f"{name.rpartition('.')[0]}.0." in apart
    }
    for name in sorted(source.tensors.keys() - stands_for - fused - set(without)):
        raise ProblemError(f"{where}: the engine left out {quote(name)}")
    for name in sorted(stands_for - wanted):
        if normalize(name)[2] is None or not fused:
            raise ProblemError(f"{where}: the engine made {quote(name)}, which the source does not have")
    for name in sorted(plain & source.tensors.keys()):
        if made.tensors[name].shape != source.tensors[name].shape:
            raise ProblemError(
                f"{where}: {quote(name)} is {list(made.tensors[name].shape)}, in the source "
                f"{list(source.tensors[name].shape)}"
            )
    try:
        lay_out_index(made)
    except InputError as error:  # what could not be split, and sizes that contradict each other
        raise ProblemError(f"{where}: the engine made what cannot be used: {error}") from None
    _check_scales(made)
    kept = (
        name.removesuffix(".weight")
        for name in plain
        if name.endswith(".weight") and len(made.tensors[name].shape) >= 2
    )
    return Made(scheme, len(packed), _called(packed), tuple(sorted(kept, key=natural)))


def _called(packed: set[str]) -> tuple[str, ...]:
    layers: dict[str, set[str]] = {}
    for name in packed:
        layer, _, rest = re.sub(r"^(.*?\.\d+)\.", r"\1 ", name.removesuffix(".weight")).partition(" ")
        layers.setdefault(layer, set()).add(rest)
    kinds = {frozenset(each) for each in layers.values()}
    if len(kinds) == 1 and "" not in next(iter(kinds)):
        return tuple(sorted(next(iter(kinds)), key=natural))
    return tuple(sorted((name.removesuffix(".weight") for name in packed), key=natural))


def _path(name: str) -> str:
    """Up to the number of an expert, and a dot."""
    path, _, _ = name.removesuffix(".weight").rpartition(".")
    return f"{path}."


def _check_scales(made: Index) -> None:
    """Raises ProblemError where a scale is no finite number: a weight that overflowed while it was quantized."""
    import numpy as np

    with Sources(made) as sources:
        for name, tensor in made.tensors.items():
            if not name.endswith((".scales", ".weight_scale")):
                continue
            reader = open_reader(sources, tensor, tensor.dtype)
            values = np.frombuffer(reader.read(0, tensor.nbytes), numpy_dtype(tensor.dtype))
            if not np.isfinite(values.astype(np.float32)).all():
                raise ProblemError(
                    f"{made.folder.where()}: {quote(name)} is not finite: the model overflowed while it was "
                    "quantized; --dtype bfloat16 reaches further"
                )


def configured(config: Mapping[str, Any], made: Index, found: Made, dtype: str) -> dict[str, Any]:
    """The source's config.json with how it is quantized, and explicit lists of what is and what is not.

    vLLM and transformers guess from names where nothing is listed, and guess wrong where parts of a checkpoint are
    moved.
    """
    how = {
        key: value
        for key, value in made.config["quantization_config"].items()
        if key not in ("meta", "kernel")
    }
    meta = made.config["quantization_config"].get("meta")
    if isinstance(meta, Mapping) and isinstance(meta.get("quantizer"), list):
        how["meta"] = {"quantizer": meta["quantizer"]}
    scheme = found.scheme
    if scheme.method == "gptq":
        # optimum sums the lists up and asks how names end, vLLM what is in a name
        how["modules_in_block_to_quantize"] = [list(found.linears)]
    if scheme.method in ("gptq", "awq"):
        how["modules_to_not_convert"] = list(found.kept)
    if scheme.method == "awq":
        how |= {"zero_point": not scheme.symmetric, "version": "gemm"}
    result = {**config, "quantization_config": how}
    named = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    assert dtype in TORCH.values(), dtype
    result[named] = dtype
    return result
