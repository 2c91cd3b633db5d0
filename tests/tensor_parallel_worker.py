"""One tensor parallel worker of a Llama, for tests: its own heads and columns, and gloo between the ranks.

Run as: tensor_parallel_worker.py SHARD_SET CHECKPOINT RANK SIZE RENDEZVOUS_FILE OUT; saves logits and greedy tokens.
The module is transformers' own LlamaForCausalLM at this rank's sizes, filled by `Shard.load_into`: a shard with the
wrong heads, columns or rows does not fit it, and one with the right sizes but wrong content gives wrong tokens.
"""

from __future__ import annotations

import copy
import datetime
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM

import shardprep_runtime

PROMPT = list(range(40, 72))
TOKENS = 8


class RowsOfVocabulary(nn.Module):
    """An embedding of which this rank holds rows [start, start + len(weight))."""

    def __init__(self, rows: int, width: int, start: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.start = start

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.start
        mine = (local >= 0) & (local < len(self.weight))
        found = nn.functional.embedding(local.clamp(0, len(self.weight) - 1), self.weight) * mine[..., None]
        dist.all_reduce(found)
        return found


def sum_over_ranks(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(output)
    return output


def main(shard_set: str, checkpoint: str, rank: int, size: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    full = AutoConfig.from_pretrained(checkpoint)
    config = copy.deepcopy(full)
    config.head_dim = full.head_dim
    config.num_attention_heads //= size
    config.num_key_value_heads = max(1, full.num_key_value_heads // size)
    config.intermediate_size //= size
    model = LlamaForCausalLM(config).eval()
    with shardprep_runtime.load(shard_set, rank=rank, tensor_parallel_size=size) as shard:
        rows = shard.describe("model.embed_tokens.weight")
        start = rows.takes[0].piece.start
        model.model.embed_tokens = RowsOfVocabulary(rows.shape[0], full.hidden_size, start)
        model.lm_head = nn.Linear(full.hidden_size, rows.shape[0], bias=False)
        shard.load_into(model)
    model = model.float()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(sum_over_ranks)
        layer.mlp.down_proj.register_forward_hook(sum_over_ranks)
    ids = torch.tensor([PROMPT])
    first = None
    with torch.no_grad():
        for _ in range(TOKENS):
            local = model(ids).logits[:, -1:].contiguous()
            parts = [torch.empty_like(local) for _ in range(size)]
            dist.all_gather(parts, local)
            logits = torch.cat(parts, -1)
            first = logits if first is None else first
            ids = torch.cat([ids, logits.argmax(-1)], 1)
    torch.save({"logits": first, "tokens": ids[0, len(PROMPT) :].tolist()}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6])
