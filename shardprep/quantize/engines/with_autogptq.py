"""GPTQ by AutoGPTQ, which is archived: runs with transformers 4.51 and a CUDA device, in an environment of its own.

The model is loaded whole, and then quantized layer by layer. No run that was killed is continued.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .main import Job, Tell, missing, sow
from .old_transformers import is_old, readable, respell, spell


def check(job: Job) -> dict[str, Any]:
    _prepare()
    try:
        versions = {
            "auto-gptq": version("auto-gptq"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        }
        import torch

        versions["torch"] = torch.__version__
        if not torch.cuda.is_available():
            # said before the rest is imported: whatever is mended there, this remains
            return {"versions": versions, "problem": _no_cuda(torch.__version__), "resumes": False}
        from auto_gptq.modeling._const import SUPPORTED_MODELS
    except (ImportError, PackageNotFoundError) as error:
        return {"versions": {}, "problem": _absent(error), "resumes": False}
    problem, notes = None, []
    if is_old(versions["transformers"]):
        try:
            notes += [f"config.json: {note}" for note in spell(job.config())[1]]
        except ValueError as error:
            problem = str(error)
    model_type = job.config().get("model_type")
    if job.method != "gptq":
        problem = "AutoGPTQ has only GPTQ; --method gptq, or --engine gptqmodel"
    elif model_type not in SUPPORTED_MODELS:
        problem = f"AutoGPTQ {versions['auto-gptq']} has no definition of model_type {model_type}; --engine gptqmodel"
    elif job.bits not in (2, 3, 4, 8):
        problem = f"AutoGPTQ has no {job.bits} bits; --bits 4"
    elif job.skip:
        problem = "AutoGPTQ quantizes all linears of the layers and can leave none alone; --engine gptqmodel"
    elif not job.device.startswith("cuda"):
        problem = f"AutoGPTQ quantizes on a CUDA device only, not on {job.device}; --device cuda, or --engine gptqmodel"
    return {"versions": versions, "problem": problem, "resumes": False, "notes": notes}


def run(job: Job, tell: Tell) -> None:
    _prepare()
    tell("stage", name="loading")
    import torch
    import transformers
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    sow(job.seed)
    source = readable(job.source, Path(job.work, "source"), transformers.__version__)
    model = AutoGPTQForCausalLM.from_pretrained(
        source,
        BaseQuantizeConfig(
            bits=job.bits, group_size=job.group_size, sym=job.symmetric, desc_act=job.act_order
        ),
        torch_dtype=getattr(torch, job.dtype),
    )
    without = {
        name
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.bias is None
    }
    heard = _Heard(tell)
    logger = logging.getLogger("auto_gptq")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    try:
        model.quantize(
            [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.sequences()],
            batch_size=job.batch_size,
        )
    finally:
        logger.removeHandler(heard)
    heard.finished()
    for name, module in model.model.named_modules():
        if name in without and hasattr(module, "qweight"):
            module.bias = None  # it gives every linear one, of zeros, which no engine expects of this model
    tell("stage", name="saving")
    shutil.rmtree(job.destination, ignore_errors=True)
    model.save_quantized(job.destination, use_safetensors=True)
    # the name that all readers look for; AutoGPTQ has one that tells the bits, and only itself reads
    (weights,) = Path(job.destination).glob("*.safetensors")
    weights.rename(weights.with_name("model.safetensors"))
    respell(job.source, job.destination, job.dtype)


class _Heard(logging.Handler):
    """Tells what AutoGPTQ logs of its progress: it has no other way to say it."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(logging.INFO)
        self.tell = tell
        self.of = 0
        self.layer, self.module = 0, ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if found := re.fullmatch(r"Start quantizing layer (\d+)/(\d+)", message):
            self.of = int(found[2])
            self.tell("layer", done=int(found[1]) - 1, of=self.of)
        elif found := re.match(r"Quantizing (\S+) in layer (\d+)/", message):
            self.layer, self.module = int(found[2]) - 1, found[1]
        elif found := re.fullmatch(r"avg loss: (\S+)", message):
            self.tell("module", layer=self.layer, name=self.module, loss=float(found[1]))

    def finished(self) -> None:
        self.tell("layer", done=self.of, of=self.of)


def _prepare() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _no_cuda(torch: str) -> str:
    return (
        f"AutoGPTQ quantizes on a CUDA device only, and torch {torch} sees none: nothing can be done about it here; "
        "--engine gptqmodel writes the same format on any device"
    )


def _absent(error: ImportError) -> str:
    if isinstance(error, PackageNotFoundError):
        reason = f"AutoGPTQ is not installed for {sys.executable}: no package {error.name}"
    else:
        reason = missing("auto-gptq", error)
    return (
        f"{reason}; it is archived and wants old libraries: make an environment of its own with "
        "`pip install auto-gptq==0.7.1 transformers==4.51.3 peft==0.13.2`, and name its interpreter with --engine-python"
    )
