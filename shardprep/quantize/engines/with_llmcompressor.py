"""GPTQ and AWQ by llm-compressor: writes compressed-tensors (`pack-quantized`), in an environment of its own.

The model is loaded whole, and then quantized layer by layer. No run that was killed is continued.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

from .main import Job, Tell, missing, sow


def check(job: Job) -> dict[str, Any]:
    _prepare(job)
    try:
        versions = {
            "llmcompressor": version("llmcompressor"),
            "compressed-tensors": version("compressed-tensors"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        }
        import torch
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except (ImportError, PackageNotFoundError) as error:
        return {"versions": {}, "problem": _absent(error), "resumes": False}
    versions["torch"] = torch.__version__
    accelerator = torch.accelerator.is_available()
    model_type = job.config().get("model_type")
    problem = None
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        problem = f"transformers {versions['transformers']}, the newest that llm-compressor takes, has no model_type {model_type}"
    elif job.bits not in (4, 8):
        problem = f"compressed-tensors packs integers of 4 or 8 bits, not {job.bits}; --bits 4"
    elif job.device.startswith("cuda") and not torch.cuda.is_available():
        problem = f"device {job.device}: this torch sees no CUDA device; --device cpu"
    elif job.method == "awq" and not accelerator:
        problem = (
            f"AWQ by llm-compressor {versions['llmcompressor']} pins host memory, which needs an accelerator, and torch "
            f"{versions['torch']} sees none; --method gptq, or --engine gptqmodel"
        )
    elif job.act_order:
        problem = (
            "llm-compressor writes no groups in the order of activations (g_idx): its order is `static`, which it always "
            "uses and which needs none; leave the order of activations out"
        )
    return {"versions": versions, "problem": problem, "resumes": False}


def run(job: Job, tell: Tell) -> None:
    _prepare(job)
    tell("stage", name="loading")
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    sow(job.seed)
    model = AutoModelForCausalLM.from_pretrained(
        job.source, dtype=getattr(torch, job.dtype), local_files_only=True
    )
    told = _Told(tell, model.config.get_text_config().num_hidden_layers)
    tell("layer", done=0, of=told.layers)
    oneshot(
        model=model,
        # one that is not text is not looked for in the source
        processor=_NoProcessor(),
        recipe=_recipe(job, told),
        dataset=_loader(job),
        tie_word_embeddings=True,
        log_dir=None,
    )
    tell("stage", name="saving")
    shutil.rmtree(job.destination, ignore_errors=True)
    model.save_pretrained(job.destination, save_compressed=True)


class _NoProcessor:
    """Stands for a tokenizer: the calibration is token ids already."""


class _Told:
    """Tells of each layer as it is finished, and of the loss of each linear."""

    def __init__(self, tell: Tell, layers: int) -> None:
        self.tell, self.layers = tell, layers
        self.done = 0

    def finished(self, names: Sequence[str]) -> None:
        """These modules were quantized together: the layers up to theirs are done."""
        done = max((layer + 1 for layer, _ in map(_place, names) if layer is not None), default=self.done)
        if done > self.done:
            self.done = done
            self.tell("layer", done=done, of=self.layers)

    def loss(self, module: str, loss: float) -> None:
        layer, name = _place(module)
        if layer is not None:
            self.tell("module", layer=layer, name=name, loss=loss)


def _recipe(job: Job, told: _Told) -> list[Any]:
    """What llm-compressor is to do, in the order in which it does it."""
    from llmcompressor.modifiers import gptq

    groups = {
        "all": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": job.bits,
                "type": "int",
                "symmetric": job.symmetric,
                "strategy": "channel" if job.group_size == -1 else "group",
                "group_size": None if job.group_size == -1 else job.group_size,
            },
        }
    }
    ignore = ["lm_head", *map(_pattern, job.skip), *ROUTERS]
    if job.method == "awq":
        from llmcompressor.modifiers import quantization
        from llmcompressor.modifiers.transform import awq

        class AWQModifier(awq.AWQModifier):  # type: ignore[misc]
            """The library's, which says how far it is: this is the long part, rounding comes after it at once."""

            def on_sequential_epoch_end(self, state: Any, event: Any, **more: Any) -> None:
                super().on_sequential_epoch_end(state, event, **more)
                told.finished(_names(state.model, more.get("modules", ())))

        return [
            AWQModifier(duo_scaling="both"),
            quantization.QuantizationModifier(config_groups=groups, ignore=ignore),
        ]

    class GPTQModifier(gptq.GPTQModifier):  # type: ignore[misc]
        """The library's, which says how far it is. It has its name, which is written into recipe.yaml."""

        def on_sequential_epoch_end(self, state: Any, event: Any, modules: list[Any], **more: Any) -> None:
            super().on_sequential_epoch_end(state, event, modules, **more)
            told.finished(_names(state.model, modules))

        def compress_module_list(self, modules: list[Any]) -> None:
            named = dict(self._module_names)
            logger = gptq.base.CompressionLogger

            class Heard(logger):  # type: ignore[misc, valid-type]
                """Hears the losses, which the library only logs, with two digits."""

                def set_results(self, name: str | None = None, loss: float | None = None) -> None:
                    super().set_results(name, loss)
                    if loss is not None and self.module in named:
                        told.loss(named[self.module], float(loss))

            gptq.base.CompressionLogger = Heard
            try:
                super().compress_module_list(modules)
            finally:
                gptq.base.CompressionLogger = logger

    return [GPTQModifier(config_groups=groups, ignore=ignore)]


ROUTERS = (r"re:.*\.(gate|router|wg|shared_expert_gate|classifier|gating)$",)
"""Linears that choose experts: a wrong expert costs more than their bytes."""


def _loader(job: Job) -> Any:
    """The calibration as llm-compressor takes it: batches of sequences of one length, no token dropped or added."""
    import torch
    from torch.utils.data import DataLoader

    batches = [
        {
            "input_ids": torch.tensor(batch),
            "attention_mask": torch.ones(len(batch), len(batch[0]), dtype=torch.int64),
        }
        for batch in _batches(job.sequences(), job.batch_size)
    ]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list has what a dataset needs


def _batches(sequences: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for _, same in groupby(sorted(sequences, key=len, reverse=True), key=len):
        alike = list(same)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _names(model: Any, modules: Sequence[Any]) -> list[str]:
    wanted = set(map(id, modules))
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _place(module: str) -> tuple[int | None, str]:
    """A module's layer, and its name in it."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)", module)
    return (int(found[1]), found[2]) if found else (None, module)


def _pattern(name: str) -> str:
    """compressed-tensors' pattern of what is left alone, of ours."""
    if name.startswith("re:"):
        return name
    words = [".*" if word == "*" else re.escape(word) for word in re.split(r"(\*)", name)]
    return rf"re:(?:.*\.)?{''.join(words)}(?:\..*)?$"


def _prepare(job: Job) -> None:
    """Before torch is imported: llm-compressor takes any accelerator that it sees."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _absent(error: ImportError) -> str:
    if isinstance(error, PackageNotFoundError):
        reason = f"llm-compressor is not installed for {sys.executable}: no package {error.name}"
    else:
        reason = missing("llmcompressor", error)
    return (
        f"{reason}; it cannot share shardprep's environment (it wants an older transformers): make one of its own with "
        "`pip install llmcompressor==0.14.0.1`, and name its interpreter with --engine-python"
    )
