"""Prove that the shard set can be written, that its tensors make the model, and that it exports as the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardprep_runtime.errors import InputError, ProblemError
from shardprep_runtime.shard.shard_set import open_set

from ..export import export
from ..split import SplitOptions, split
from .blocks import blocks_of, same_bits
from .models import answers
from .report import Differs, Proof, Workers
from .small import SmallModel, read_tensors

if TYPE_CHECKING:
    import torch


def prove_split(small: SmallModel) -> Iterator[Proof]:
    """Write the shard set, with parts that end at stages, if engines can run these stages."""
    refused = next(filter(None, (small.refusal(engine, small.pp) for engine in small.engines)), None)
    try:
        report = split(
            small.checkpoint,
            small.shard_set,
            tensor_parallel_size=small.grain,
            stages=small.stages(small.pp) if small.layout.layers and refused is None else None,
            options=SplitOptions(max_part_bytes=max(small.nbytes // 4, 4096)),
        )
    except InputError as error:
        raise Differs(
            "split", "the checkpoint", None, Workers(small.grain), expected="to be cut", found=str(error)
        ) from None
    yield Proof(
        "split",
        f"grain {small.grain}: {report.tensors} tensors in {len(report.parts)} parts, "
        f"{report.stored_bytes / report.source_bytes:.3f} x the model",
    )
    if refused is not None:
        yield Proof("stages", f"refused as it should be: {refused}")


def prove_logits(small: SmallModel) -> Iterator[Proof]:
    """Prove that the tensors of one rank at size 1, and those of all ranks joined, give the model's logits."""
    import torch

    for size, engine in ((1, small.engines[0]), (small.grain, small.engines[-1])):
        workers = Workers(size, engine=engine)
        logits, tokens = answers(small.model_of(_joined(small, workers)), small.prompt)
        if not torch.equal(logits, small.logits) or not torch.equal(tokens, small.tokens):
            off = float((logits - small.logits).abs().max())
            raise Differs(
                "logits",
                "the model",
                None,
                workers,
                expected="the model's logits, bit for bit",
                found=f"some that are off by {off:.2g}",
            )
    yield Proof(
        "logits", f"what tp 1 loads, and what {small.grain} ranks load, has the model's logits, bit for bit"
    )


def _joined(small: SmallModel, workers: Workers) -> dict[str, torch.Tensor]:
    """Join the tensors of all ranks to those of the model."""
    import torch

    state = {name: torch.zeros_like(full) for name, full in small.tensors.items()}
    for rank in range(workers.world_size):
        with open_set(small.shard_set, verify="headers").load(workers.place_of(rank)) as shard:
            for name, view in shard.view.tensors.items():
                for block, local in blocks_of(view):
                    state[name][block] = shard[name][local]
    return state


def prove_export(small: SmallModel) -> Iterator[Proof]:
    """Prove that the exported checkpoint has the bytes of the original."""
    exported = small.folder / "exported"
    workers = Workers(small.grain)
    try:
        export(small.shard_set, exported)
    except ProblemError as error:
        raise Differs(
            "export", "the shard set", None, workers, expected="the checkpoint", found=str(error)
        ) from None
    found = read_tensors(exported)
    for name, full in small.tensors.items():
        if name not in found or not same_bits(full, found[name]):
            other = "other bytes" if name in found else "no such tensor"
            raise Differs("export", name, None, workers, expected="the original's bytes", found=other)
    config = (exported / "config.json").read_bytes()
    if found.keys() != small.tensors.keys() or config != (small.checkpoint / "config.json").read_bytes():
        raise Differs(
            "export", "config.json", None, workers, expected="the checkpoint's files", found="others"
        )
    yield Proof("export", f"{len(found)} tensors and config.json are the checkpoint's, bit for bit")
