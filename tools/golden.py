"""Golden plans: which ranges of each checkpoint tensor the ranks of an engine read, as that engine's loader says.

One JSON file per engine and model type, of a small config (shardprep/model/shrink.py), one tensor a line:

    engine, version   who was asked
    config            the config.json
    shapes            name -> "dtype [shape]"
    reads             plan ("tp4", or "tp4ep4" with experts shared out) -> tensor -> what each rank reads, in order of
                      ranks: "*" all of it, "-" nothing, or blocks joined by "+"; a block names the dims that it cuts
                      ("0:0-130", "1:64-128", "0:2-4,2:0-32")

A tensor that is left out of `reads` is read as the first of its kind is, by name and shape, whatever its layer; and the
first of a kind is left out where all ranks read it whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from shardprep.model import skeleton
from shardprep.model.shrink import Sizes

FOLDER = Path(__file__).parents[1] / "tests" / "golden"

LEFT_OUT = {
    "emu3": "its text model has a type of its own that no config names",
    "phi4_multimodal": "of several towers, without a text_config",
    "moss_transcribe_diarize": "of several towers, whose layers are not those that its config counts",
    "hrm_text": "the cut that was inferred is not one that ranks can compute with",
    "inkling_text": "the cut that was inferred is not one that ranks can compute with",
    "longcat_flash": "it numbers experts that have no weights",
}
"""Types that get no rules -> why."""

Block: TypeAlias = list[list[int]]
"""[start, stop) of each dim."""

Log: TypeAlias = list[tuple[str, Block]]
"""What one rank reads: name and block."""

Reads: TypeAlias = dict[str, list[list[Block]]]
"""Tensor -> for each rank, the blocks that it reads."""


@dataclass(frozen=True, slots=True)
class Golden:
    """What one engine reads of one model."""

    engine: str
    version: str
    config: Mapping[str, Any]
    shapes: skeleton.Shapes
    reads: Mapping[str, Reads]
    """Plan -> reads; of a file that was read, what it says (see `reads_of_all`)."""


def small_configs(model_type: str, sizes: Sizes = Sizes()) -> Iterator[dict[str, Any]]:  # noqa: B008 - frozen
    """The small configs of a type that plans are made of, the best first: with KV heads that queries share, if it can."""
    small = skeleton.shrink(skeleton.default_config(model_type), sizes)
    if (
        "num_key_value_heads" in small
        and "kv_lora_rank" not in small
        and small["num_key_value_heads"] != sizes.kv_heads
    ):
        yield small | {"num_key_value_heads": sizes.kv_heads}
    yield small


def reads_of(ranks: Sequence[Log], shapes: skeleton.Shapes) -> Reads:
    """What each rank reads of each tensor; adjacent blocks are joined, repeated and empty ones left out."""
    found: Reads = {name: [[] for _ in ranks] for name in sorted(shapes)}
    for rank, log in enumerate(ranks):
        for name, block in log:
            if all(start < stop for start, stop in block):
                found[name][rank].append(block)
    return {name: [_joined(blocks) for blocks in row] for name, row in found.items()}


def _joined(blocks: list[Block]) -> list[Block]:
    left = sorted(
        [list(map(list, block)) for block in {json.dumps(block): block for block in blocks}.values()]
    )
    done: list[Block] = []
    while left:
        block = left.pop(0)
        other = next((each for each in left if _differ_in_one(block, each)), None)
        if other is None:
            done.append(block)
            continue
        left.remove(other)
        left.insert(0, [[min(a[0], b[0]), max(a[1], b[1])] for a, b in zip(block, other, strict=True)])
        left.sort()
    return done


def _differ_in_one(a: Block, b: Block) -> bool:
    """Whether two blocks are one block when they are put together."""
    differing = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    return not differing or (
        len(differing) == 1
        and differing[0][0][0] <= differing[0][1][1]
        and differing[0][1][0] <= differing[0][0][1]
    )


def dump(golden: Golden) -> str:
    """The text of its file."""
    return "\n".join(_lines(golden)) + "\n"


def _lines(golden: Golden) -> Iterator[str]:
    yield "{"
    for key in ("engine", "version", "config"):
        yield f"{json.dumps(key)}: {json.dumps(getattr(golden, key))},"
    yield '"shapes": {'
    yield ",\n".join(
        f"{json.dumps(name)}: {json.dumps(f'{dtype} {list(shape)}')}"
        for name, (dtype, shape) in sorted(golden.shapes.items())
    )
    yield '},\n"reads": {'
    plans = []
    for plan, reads in golden.reads.items():
        first: dict[str, str] = {}
        rows = []
        for name, row in sorted(reads.items()):
            shape = golden.shapes[name][1]
            text = " ".join(_dump(blocks, shape) for blocks in row)
            kind = f"{kind_of(name)} {shape}"
            if text != first.get(kind, " ".join("*" for _ in row)):
                rows.append(f"{json.dumps(name)}: {json.dumps(text)}")
            first.setdefault(kind, text)
        plans.append(f"{json.dumps(plan)}: {{\n" + ",\n".join(rows) + "\n}")
    yield ",\n".join(plans)
    yield "}}"


def kind_of(name: str) -> str:
    """The name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".{layer}.", name, count=1)


def _dump(blocks: list[Block], shape: tuple[int, ...]) -> str:
    whole = [[0, size] for size in shape]
    if whole in blocks:
        return "*"
    return (
        "+".join(
            ",".join(f"{dim}:{a}-{b}" for dim, (a, b) in enumerate(block) if [a, b] != whole[dim])
            for block in blocks
        )
        or "-"
    )


def read(path: Path) -> Golden:
    """The golden plan in a file."""
    raw = json.loads(path.read_text("utf-8"))
    shapes: skeleton.Shapes = {}
    for name, text in raw["shapes"].items():
        dtype, _, shape = text.partition(" ")
        shapes[name] = dtype, tuple(json.loads(shape))
    reads = {
        plan: {name: [_parse(word, shapes[name][1]) for word in text.split()] for name, text in rows.items()}
        for plan, rows in raw["reads"].items()
    }
    return Golden(raw["engine"], raw["version"], raw["config"], shapes, reads)


def read_all(path: Path) -> Golden:
    """The golden plan in a file, with the reads of all tensors."""
    found = read(path)
    return replace(found, reads={plan: reads_of_all(found, plan) for plan in found.reads})


def reads_of_all(golden: Golden, plan: str) -> Reads:
    """The reads of all tensors, those included that a file leaves out."""
    said = golden.reads[plan]
    ranks = int(plan.removeprefix("tp").partition("ep")[0])
    first: dict[tuple[str, tuple[int, ...]], list[list[Block]]] = {}
    found = {}
    for name, (_, shape) in sorted(golden.shapes.items()):
        kind = kind_of(name), shape
        whole = [[[[0, size] for size in shape]]] * ranks
        found[name] = said.get(name, first.get(kind, whole))
        first.setdefault(kind, found[name])
    return found


def _parse(word: str, shape: tuple[int, ...]) -> list[Block]:
    if word == "-":
        return []
    whole = [[0, size] for size in shape]
    if word == "*":
        return [whole]
    blocks = []
    for each in word.split("+"):
        block = [list(bounds) for bounds in whole]
        for part in each.split(","):
            dim, _, bounds = part.partition(":")
            start, _, stop = bounds.partition("-")
            block[int(dim)] = [int(start), int(stop)]
        blocks.append(block)
    return blocks
