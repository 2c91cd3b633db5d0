"""Prove that transformers' own tensor parallelism, on real processes, computes the model's results from our views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from .processes import Answer, Job, Ranks
from .report import Differs, Proof, Workers
from .small import SmallModel

LOGITS: Final = 1e-5
"""Share of the largest logit by which the logits of real tensor ranks may differ in fp32: they sum in another order."""


def prove_ranks(small: SmallModel, ranks: Ranks) -> Iterator[Proof]:
    """Make one proof for each size, without expert parallelism and with as much as the model allows.

    Args:
        small: The model.
        ranks: The processes that compute.
    """
    for size in small.sizes()[1:]:
        for ep in dict.fromkeys((1, size if size in small.expert_sizes(size) else 1)):
            yield _prove(small, ranks, Workers(size, expert_parallel_size=ep, engine="transformers"))


def _prove(small: SmallModel, ranks: Ranks, workers: Workers) -> Proof:
    size, ep = workers.tensor_parallel_size, workers.expert_parallel_size
    reason = _lacking(small, ep)
    if reason is None:
        job = Job(str(small.checkpoint), str(small.shard_set), size, ep, small.prompt.tolist())
        answer = ranks.run(job)
        found = _judge(small, answer)
        if found is None:
            return Proof(
                "ranks",
                f"{workers}: {size} gloo processes, each with its own view, compute the model's logits and tokens",
            )
        control = _judge(small, ranks.run(replace(job, shard_set=None)))
        if control is None:
            raise Differs(
                "ranks",
                "the model",
                answer.rank,
                workers,
                expected="what transformers makes of the checkpoint",
                found=found,
            )
        reason = f"transformers cannot run it from the checkpoint itself: {control}{_hint(small, size)}"
    return Proof("ranks", f"{workers}: assembled, for {reason}", assembled=True)


def _lacking(small: SmallModel, ep: int) -> str | None:
    """Name the plan that transformers lacks for the model; None where it has the plan."""
    name = type(small.model).__name__
    if not small.model.tp_plan:
        return f"transformers has no tensor parallel plan for {name}"
    if ep > 1 and not small.model.ep_plan:
        return f"transformers has no expert parallel plan for {name}"
    return None


def _hint(small: SmallModel, size: int) -> str:
    kv_heads = getattr(small.model.config.get_text_config(), "num_key_value_heads", None)
    if isinstance(kv_heads, int) and kv_heads % size:
        return f" (it splits {kv_heads} KV heads among {size} ranks, its issue 48307)"
    return ""


def _judge(small: SmallModel, answer: Answer) -> str | None:
    """Say what is wrong with the results of the ranks; None where they are right."""
    import torch

    if answer.status != "ok":
        return answer.detail
    logits = torch.load(str(answer.logits), weights_only=True)
    if logits.shape != small.logits.shape:
        return f"logits of shape {list(logits.shape)} instead of {list(small.logits.shape)}"
    off = float((logits - small.logits).abs().max()) / max(1.0, float(small.logits.abs().max()))
    if not off <= LOGITS:
        return f"logits that are off by {off:.2g}"
    if answer.tokens != small.tokens.tolist():
        return f"tokens {answer.tokens} instead of {small.tokens.tolist()}"
    return None
