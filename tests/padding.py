"""Pad small models as `shardprep quantize` does, and say by how much what they compute differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import golden
from lazily import load_file, torch
from shardprep.check.models import forward
from shardprep.convert import write_checkpoint
from shardprep.index import Index
from shardprep.layout.pad import Padding, pad_to
from shardprep.layout.ties import settle_aliases
from shardprep.model import skeleton
from shardprep.source import open_source, read_checkpoint
from shardprep.write.conduct import Conduct
from shardprep.write.plan import plan_convert

GROUP, RANKS = 16, 2


def padded(
    source: Path | str,
    destination: Path,
    *,
    ranks: int = RANKS,
    group: int = GROUP,
    skip: Sequence[str] = (),
    dtype: str | None = None,
    part_bytes: int = 10**9,
    conduct: Conduct = Conduct(),  # noqa: B008 - frozen
) -> tuple[Index, Padding]:
    """Write the checkpoint at `source`, padded, as `shardprep quantize` stages it."""
    with open_source(source) as opened:
        index, padding = pad_to(
            settle_aliases(read_checkpoint(opened)), tensor_parallel_size=ranks, group=group, skip=skip
        )
        plan = plan_convert(index, max_part_bytes=part_bytes, dtype=dtype, aliases=index.aliases)
        write_checkpoint(plan, index, destination, dtype=dtype, conduct=conduct)
    return index, padding


MIXERS = ("mamba", "linear_attn", "b_proj", "mixer.in_proj")
"""What a small model has too few heads for; a large one's users leave it as it is too."""


def small_config(model_type: str) -> dict[str, Any]:
    """A small config of a type: 256 wide, with MLPs of 320 units and experts of 64."""
    plans = [golden.FOLDER / engine / f"{model_type}.json" for engine in ("transformers", "vllm")]
    plan = next((path for path in plans if path.exists()), None)
    config = golden.read(plan).config if plan is not None else next(golden.small_configs(model_type))
    plain = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return plain | MORE.get(model_type, {})


def difference(config: Mapping[str, Any], folder: Path, dtype: str = "float64") -> float:
    """By how much the padded model's logits differ, of the largest of the model's."""
    model = skeleton.build(config, dtype=dtype)
    model.save_pretrained(folder / "in")
    index, padding = padded(folder / "in", folder / "out", ranks=2, group=128, skip=MIXERS)
    assert padding.sizes
    assert {
        name: tuple(tensor.shape) for name, tensor in load_file(folder / "out/model.safetensors").items()
    } == {name: tensor.shape for name, tensor in index.tensors.items()}
    found = []
    prompt = torch.randint(3, model.config.get_text_config().vocab_size, (2, 12))
    for each in ("in", "out"):
        loaded, told = type(model).from_pretrained(
            folder / each, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
        )
        assert not any(told.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        loaded.set_experts_implementation("eager")  # the others know no float64
        found.append(forward(loaded.eval(), prompt))
    before, after = found
    assert before.abs().max() > 0.01
    return float((before - after).abs().max() / before.abs().max())


MORE: dict[str, dict[str, Any]] = {
    "codegen": {"n_inner": 320},
    "falcon": {"ffn_hidden_size": 320},
    "gpt-sw3": {"n_inner": 320},
    "gpt2": {"n_inner": 320},
    "gpt_bigcode": {"n_inner": 320},
    "gpt_neo": {"intermediate_size": 320},
    "gptj": {"n_inner": 320},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "llama": {"mlp_bias": True},
}
"""What small configs do not say; units of 4 x the hidden size can be shared wherever heads can."""
