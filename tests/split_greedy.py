"""A small trained model, split in two stages, and its greedy tokens as transformers and as a transport find them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shardprep.split import split
from shardprep_runtime.format.manifest import digest_of
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.transport import Step, Transport
from shardprep_runtime.workers.worker import Compute, WorkerOptions

TINY = Path(__file__).parent / "data/tiny-llama"
STAGES = ((0, 3), (3, 6))
PROMPT = (17, 301, 1999, 42, 5)
OTHER = (7, 7, 1200)
COUNT = 10


def split_options(folder: Path) -> WorkerOptions:
    """Of workers for the shard set that this writes into `folder`."""
    split(TINY, folder, tensor_parallel_size=1)
    digest = digest_of((folder / "shardprep.json").read_bytes())
    return WorkerOptions(
        shard_set=open_set(str(folder), digest=digest),
        stages=STAGES,
        compute=Compute(dtype="float32", threads=1),
    )


@cache
def reference(prompt: tuple[int, ...] = PROMPT, count: int = COUNT) -> list[int]:
    """What transformers generates."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return [int(each) for each in found[0, len(prompt) :]]


def greedy(
    transport: Transport,
    route: Sequence[str],
    sequence: str,
    prompt: Sequence[int] = PROMPT,
    count: int = COUNT,
) -> list[int]:
    """What comes out of the stages of `route`, token by token."""
    ids, past, found = torch.tensor([prompt]), 0, list[int]()
    while len(found) < count:
        output = transport.step(route, Step(sequence, past), ids, timeout=30).result(40)
        assert [timing.worker for timing in output.timings] == list(route)
        past += ids.shape[1]
        found.append(int(output.logits[0, -1].argmax()))
        ids = torch.tensor([found[-1:]])
    return found
