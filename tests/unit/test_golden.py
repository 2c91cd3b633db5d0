"""What a view for an engine holds is what that engine's own loaders read, as tests/golden has it.

The golden plans are made by tools/trace_vllm and tools/trace_transformers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

import golden
from shardprep.layout import derive_layout, known_types
from shardprep_runtime.format.manifest import Entry, Form, Manifest
from shardprep_runtime.format.view import Place, TensorView, View, plan_view

TYPES = {
    engine: sorted({path.stem for path in (golden.FOLDER / engine).glob("*.json")} & set(known_types()))
    for engine in ("transformers", "vllm")
}

HEAD_OF_MASKED = "the head for masked words, which vLLM's encoders leave out"
FEW_ROWS = "vLLM pads these two rows to 64, so that the first rank has both; we hold them whole"
MORE_THAN_READ: dict[tuple[str, str], str] = {
    ("bert", r"^cls\.predictions\.bias$"): HEAD_OF_MASKED,
    ("bert", r"token_type_embeddings"): FEW_ROWS,
    ("laguna", r"e_score_correction_bias"): "vLLM reads it under another name than transformers writes",
    ("modernbert", r"^head\.|^decoder\.bias$"): HEAD_OF_MASKED,
    ("roberta", r"^lm_head\."): HEAD_OF_MASKED,
    ("roberta", r"token_type_embeddings"): FEW_ROWS,
    ("xlm-roberta", r"^lm_head\."): HEAD_OF_MASKED,
    ("xlm-roberta", r"token_type_embeddings"): FEW_ROWS,
    ("zamba2", r"adapter_list"): "vLLM cuts the adapters, transformers reads them whole; they are small",
}
"""(model type, names) of which our view holds more than vLLM reads -> why."""

COLUMNS = "transformers cuts its rows and gathers them; vLLM, and we, its columns"
OTHERWISE_CUT: dict[tuple[str, str], str] = {
    ("axk2", r"q_b_proj"): "its heads are of a width that no config value counts; whole",
    ("qwen3_next", r"linear_attn\.out_proj"): COLUMNS,
    ("qwen3_5_text", r"linear_attn\.out_proj"): COLUMNS,
    ("qwen3_5_moe_text", r"linear_attn\.out_proj"): COLUMNS,
}
"""(model type, names) of which our view for transformers holds more than it reads -> why."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES["vllm"])
def test_a_view_for_vllm_holds_the_blocks_that_its_loaders_read(model_type: str) -> None:
    """Of other sizes too, from which no rule was inferred."""
    allowed = [names for kind, names in MORE_THAN_READ if kind == model_type]
    needed, wrong = compare("vllm", model_type, lambda name, *_: match(allowed, name))
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong[:20])
    assert needed == set(allowed), "what is listed in MORE_THAN_READ is no longer needed"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES["transformers"])
def test_a_view_for_transformers_holds_the_blocks_that_its_loader_reads(model_type: str) -> None:
    """And more only where transformers cuts what we do not: a head in halves, or along another dim than vLLM does."""
    known = {names for kind, names in OTHERWISE_CUT if kind == model_type}

    def why(name: str, view: View, theirs: Sequence[golden.Block]) -> str | None:
        if shares_a_head(view.tensors[name]):
            return "shared"
        return match(known, name)

    needed, wrong = compare("transformers", model_type, why)
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong[:20])
    assert needed - {"shared"} == known, "what is listed in OTHERWISE_CUT is no longer needed"


def test_what_is_listed_is_of_a_type_that_is_tested() -> None:
    assert {model_type for model_type, _ in MORE_THAN_READ} <= set(TYPES["vllm"])
    assert {model_type for model_type, _ in OTHERWISE_CUT} <= set(TYPES["transformers"])


def match(patterns: Iterable[str], name: str) -> str | None:
    return next((each for each in patterns if re.search(each, name)), None)


def shares_a_head(tensor: TensorView) -> bool:
    """Whether several ranks hold what this one holds of a piece, since its units ran out."""
    return any(take.piece.last_rank - take.piece.first_rank > 1 for take in tensor.takes) and any(
        segment.shared for segment in tensor.form.layout.segments
    )


def compare(
    engine: str, model_type: str, why: Callable[[str, View, Sequence[golden.Block]], str | None]
) -> tuple[set[str], list[str]]:
    """The reasons (of `why`) for which views hold more than what is read, and what differs without one."""
    needed, wrong = set(), []
    for path in sorted((golden.FOLDER / engine).rglob(f"{model_type}.json")):
        for name, grid, rank, ours, theirs, view in differences(engine, golden.read(path)):
            reason = why(name, view, theirs)
            if reason is not None and all(any(inside(block, own) for own in ours) for block in theirs):
                needed.add(reason)
            else:
                where = f"{path.parent.name}, {grid}, rank {rank}"
                wrong.append(f"{name} ({where}): {engine} reads {theirs}, the view holds {ours}")
    return needed, wrong


Difference = tuple[str, str, int, list[golden.Block], list[golden.Block], View]
"""Tensor, grid and rank, what our view holds, what the engine reads, and the view."""


def differences(engine: str, plan: golden.Golden) -> Iterator[Difference]:
    manifest = manifest_of(plan)
    for grid, size, experts in grids(plan):
        reads = golden.reads_of_all(plan, grid)
        for rank in range(size):
            view = plan_view(
                manifest,
                Place(
                    rank=rank,
                    tensor_parallel_size=size,
                    expert_parallel_size=experts if manifest.experts else 1,
                    engine=engine,
                ),
            )
            for name in plan.shapes:
                ours, theirs = held(view, name), reads[name][rank]
                if ours != theirs:
                    yield name, grid, rank, ours, theirs, view


def manifest_of(plan: golden.Golden) -> Manifest:
    """What split would write of the small checkpoint, its files aside."""
    shapes = {name: shape for name, (_, shape) in plan.shapes.items()}
    layout = derive_layout(plan.config, shapes)
    grain = max(size for _, size, _ in grids(plan))
    layout.check_grain(grain)
    return Manifest(
        model={},
        layers=layout.layers,
        grain=grain,
        stages=None,
        block_bytes=2**20,
        tensors={
            name: Entry(
                Form(plan.shapes[name][0], shapes[name], placed.layout, placed.engines),
                placed.layer,
                placed.expert,
            )
            for name, placed in layout.tensors.items()
        },
        aliases={},
        tied=layout.tied,
        parts=(),
        side_files=(),
        experts=layout.experts,
        engines=layout.engines,
        stage_needs=layout.stage_needs,
    )


def grids(plan: golden.Golden) -> Iterator[tuple[str, int, int]]:
    """Name, tensor parallel size and expert parallel size of each grid that was traced."""
    for name in plan.reads:
        tensor, _, experts = name.removeprefix("tp").partition("ep")
        yield name, int(tensor), int(experts or 1)


def held(view: View, name: str) -> list[golden.Block]:
    """The blocks of a tensor that a view holds, in order, neighbours joined."""
    tensor = view.tensors.get(name)
    if tensor is None:
        return []
    block = [[0, size] for size in tensor.form.shape]
    if tensor.experts is not None:
        block[0] = list(tensor.experts)
    dim = tensor.form.layout.dim
    if dim is None:
        return [block]
    return [[*block[:dim], run, *block[dim + 1 :]] for run in runs(tensor)]


def runs(tensor: TensorView) -> list[list[int]]:
    found: list[list[int]] = []
    for start, stop in sorted((t.piece.start + t.start, t.piece.start + t.stop) for t in tensor.takes):
        if found and found[-1][1] == start:
            found[-1][1] = stop
        else:
            found.append([start, stop])
    return found


def inside(block: golden.Block, other: golden.Block) -> bool:
    return all(b[0] >= o[0] and b[1] <= o[1] for b, o in zip(block, other, strict=True))
