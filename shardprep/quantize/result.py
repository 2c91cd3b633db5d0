"""Check what an engine made against what was asked for, and say in its config.json what is quantized and what is not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardprep_runtime.errors import InputError, ProblemError, quote
from shardprep_runtime.format.dtypes import TORCH

from ..index import Index
from ..layout import Scheme, normalize
from ..layout.quantization import PACKED, Modules, list_modules, with_lists
from ..model.describe import lay_out_index, scheme_of
from ..source.bytes import Sources, numpy_dtype, open_reader
from .names import PARTS

FIELDS: Final = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_zero_point|weight_g_idx|weight_shape)$"
)


@dataclass(frozen=True, slots=True)
class Made:
    """What an engine made of a checkpoint."""

    scheme: Scheme
    modules: Modules


def check_made(made: Index, source: Index, asked: Scheme, *, without: Collection[str] = ()) -> Made:
    """What was made, if it is all of what was asked for, but for what no engine keeps.

    Args:
        made: What an engine wrote, under the source's names.
        source: The checkpoint that was quantized.
        asked: How it should be quantized.
        without: Tensors of the source that no engine keeps.

    Raises:
        ProblemError: For anything else.
    """
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
    return Made(scheme, list_modules({name: tensor.shape for name, tensor in made.tensors.items()}))


def _path(name: str) -> str:
    """Up to the number of an expert, and a dot."""
    path, _, _ = name.removesuffix(".weight").rpartition(".")
    return f"{path}."


def _check_scales(made: Index) -> None:
    """Raises ProblemError where a scale is infinite or NaN: a weight that overflowed while it was quantized."""
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

    Args:
        config: The source's.
        made: What an engine wrote, whose config.json says how.
        found: As `check_made` gives it.
        dtype: Of what is not quantized.
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
    for key in ("modules_in_block_to_quantize", "modules_to_not_convert"):
        how.pop(key, None)
    how = with_lists(how, {name: tensor.shape for name, tensor in made.tensors.items()})
    if scheme.method == "awq":
        how |= {"zero_point": not scheme.symmetric, "version": "gemm"}
    result = {**config, "quantization_config": how}
    named = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    assert dtype in TORCH.values(), dtype
    result[named] = dtype
    return result
