"""Prove that no rank holds a part of a head. The heads are those of the model's attention and config, not the rules'."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardprep_runtime.engines.shardview import runs_of

from .models import head_dim, is_flipped
from .report import Differs, Proof, Workers
from .small import SmallModel

if TYPE_CHECKING:
    from torch import nn

_FUSED: Final = ("qkv_proj", "Wqkv", "query_key_value", "c_attn")
_QUERIES: Final = ("q_proj", "query", "q_b_proj", *_FUSED)
_KEYS_AND_VALUES: Final = ("k_proj", "v_proj", "key", "value")
_OUTPUTS: Final = ("o_proj", "out_proj")
_PROJECTIONS: Final = (*_QUERIES, *_KEYS_AND_VALUES, "kv_b_proj", *_OUTPUTS)
"""Last words in the names of projections that make heads, or take them."""


@dataclass(frozen=True, slots=True)
class _Heads:
    """The heads of a projection."""

    dim: int
    """The dim along which heads lie."""
    width: int
    """Indices of one head along the dim."""
    fused: bool
    """Whether queries, keys and values are one projection."""


def prove_heads(small: SmallModel) -> Iterator[Proof]:
    """Prove that every run of indices that a rank holds of a projection begins and ends between heads."""
    heads = _heads_of(small)
    if not heads:
        yield Proof("heads", "the model has no attention whose heads could be split")
        return
    for engine in small.engines:
        for size in small.sizes()[1:]:
            workers = Workers(size, engine=engine)
            for rank, views in enumerate(small.plan(workers)):
                for name, each in heads.items():
                    if name not in views or (each.fused and engine == "transformers"):
                        continue  # transformers gathers a fused projection before it makes heads of it
                    if views[name].form.layout.dim != each.dim:
                        continue
                    for run in runs_of(views[name]):
                        if run.start % each.width or run.stop % each.width:
                            raise Differs(
                                "heads",
                                name,
                                rank,
                                workers,
                                expected=f"whole heads of {each.width} along dim {each.dim}",
                                found=f"[{run.start}, {run.stop}), which splits a head",
                            )
    widths = ", ".join(map(str, {each.width for each in heads.values()}))
    yield Proof("heads", f"{len(heads)} projections, heads of {widths}: none is split")


def _heads_of(small: SmallModel) -> dict[str, _Heads]:
    """Name of each checkpoint tensor that has heads -> its heads."""
    config = small.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    found: dict[str, _Heads] = {}
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return found
    widths = {
        path: width
        for path, module in small.model.named_modules()
        if isinstance(width := head_dim(module), int)
    }
    attentions = {
        name.rpartition(f".{kind}.")[0] for name in small.tensors if (kind := _projection(name)) in _QUERIES
    }
    for name, tensor in small.tensors.items():
        kind = _projection(name)
        parent = name.rpartition(f".{kind}.")[0]
        if (
            kind is None
            or tensor.ndim > 2
            or not any(parent == each or each.startswith(f"{parent}.") for each in attentions)
        ):
            continue
        flipped = is_flipped(_module(small, name))
        output = kind in _OUTPUTS
        if output and tensor.ndim == 1:
            continue
        dim = int(not flipped) if output else tensor.ndim - 1 if flipped else 0
        size = tensor.shape[dim]
        width = next((w for path, w in widths.items() if parent == path or parent.startswith(f"{path}.")), 0)
        if kind in ("q_b_proj", "kv_b_proj") or not width:
            width = size // (kv_heads if kind in _KEYS_AND_VALUES else heads)
        if width and size % width == 0 and (not output or size == heads * width):
            found[name] = _Heads(dim, width, kind in _FUSED)
    return found


def _projection(name: str) -> str | None:
    """The word of `_PROJECTIONS` that a checkpoint's tensor belongs to; None where it is not a projection."""
    words = name.split(".")
    known = len(words) > 2 and words[-2] in _PROJECTIONS and words[-1] in ("weight", "bias")
    return words[-2] if known else None


def _module(small: SmallModel, name: str) -> nn.Module | None:
    """The module that a checkpoint's tensor belongs to, if it has the same name in the model."""
    with contextlib.suppress(AttributeError):
        return small.model.get_submodule(name.rpartition(".")[0])
    return None
