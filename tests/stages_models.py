"""Small models of any architecture, for tests of stages, and what transformers computes with the whole of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from lazily import torch
from shardprep.model import skeleton
from shardprep.model.shrink import Sizes
from shardprep.split import split
from shardprep_runtime.errors import UnsupportedError
from shardprep_runtime.stage.stage import Stage, build_stage

SMALL: Final = Sizes(heads=4, kv_heads=2, head_dim=16, intermediate=64, expert=32, experts=4)


def prompt() -> torch.Tensor:
    """Ids of two sequences."""
    return torch.tensor([[5, 6, 7, 8, 9], [11, 3, 4, 20, 21]])


Cut = list[list[int]]


def make_set(model_type: str, folder: Path, *, grain: int = 1, **changes: Any) -> Path:
    """A shard set of a small random model; its checkpoint lies beside it, in `in`."""
    default = skeleton.default_config(model_type)
    for sizes in (SMALL, Sizes()):
        with skeleton.quiet():
            try:
                model = skeleton.build({**skeleton.shrink(default, sizes), **changes})
            except UnsupportedError:  # its sizes depend on each other
                if sizes != SMALL:
                    raise
            else:
                model.save_pretrained(folder / "in")
                break
    split(folder / "in", folder / "set", tensor_parallel_size=grain)
    return folder / "set"


def layers_of(shards: Path) -> int:
    found: int = json.loads((shards / "shardprep.json").read_text())["layers"]
    return found


def cuts(layers: int) -> list[Cut]:
    """Two stages, three, and uneven ones."""

    def cut(*bounds: int) -> Cut:
        ends = [0, *bounds, layers]
        return [[start, stop] for start, stop in pairwise(ends)]

    found = [cut(layers // 2)]
    if layers >= 3:
        found.append(cut(max(layers // 3, 1), max(2 * layers // 3, 2)))
    if layers >= 4:
        found.append(cut(1, layers - 1))
    return found


def stages_of(shards: Path, cut: Sequence[Sequence[int]], **options: Any) -> list[Stage]:
    return [build_stage(shards, pp_rank=rank, stages=cut, **options) for rank in range(len(cut))]


def run(stages: Iterable[Stage], ids: torch.Tensor, past: int = 0, *, name: str = "a") -> torch.Tensor:
    """The logits of all positions of a step."""
    given = ids
    for stage in stages:
        given = stage.step(name, given, past, keep="all")
    return given


def greedy(stages: Sequence[Stage], ids: torch.Tensor, tokens: int, *, name: str = "a") -> torch.Tensor:
    """The tokens that follow, as a front end chooses them."""
    past, found = 0, []
    for _ in range(tokens):
        given = ids
        for stage in stages:
            given = stage.step(name, given, past)
        past, ids = past + ids.shape[1], given[:, -1].argmax(-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, 1)


def whole(shards: Path, dtype: Any = None) -> Any:
    """The model as transformers loads it from the checkpoint, in float32 unless `dtype` says otherwise."""
    from transformers import AutoModelForCausalLM

    with skeleton.quiet():
        return AutoModelForCausalLM.from_pretrained(shards.parent / "in", dtype=dtype or torch.float32)


def generated(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens that transformers' generate gives."""
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    tokens_of: torch.Tensor = found[:, ids.shape[1] :]
    return tokens_of
