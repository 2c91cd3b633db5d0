"""AWQ by AutoAWQ, which is no longer developed: runs with transformers 4.51, in an environment of its own.

The model is loaded whole, and then quantized layer by layer. No run that was killed is continued.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .main import Job, Tell, missing, sow
from .old_transformers import is_old, readable, respell, spell

OUTPUTS = 64
"""The output size of each linear must be a multiple of this (awq/quantize/quantizer.py, _compute_best_clip)."""


def check(job: Job) -> dict[str, Any]:
    _prepare(job)
    try:
        versions = {
            "autoawq": version("autoawq"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        }
        import torch
        from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    except (ImportError, PackageNotFoundError) as error:
        return {"versions": {}, "problem": _absent(error), "resumes": False}
    versions["torch"] = torch.__version__
    problem, notes = None, []
    if is_old(versions["transformers"]):
        try:
            notes += [f"config.json: {note}" for note in spell(job.config())[1]]
        except ValueError as error:
            problem = str(error)
    model_type = job.config().get("model_type")
    if job.method != "awq":
        problem = "AutoAWQ has only AWQ; --method awq, or --engine gptqmodel"
    elif model_type not in AWQ_CAUSAL_LM_MODEL_MAP:
        problem = (
            f"AutoAWQ {versions['autoawq']} has no definition of model_type {model_type}; --engine gptqmodel"
        )
    elif job.bits != 4:
        problem = f"AutoAWQ has 4 bits only, not {job.bits}"
    elif job.group_size < 1:
        problem = "AutoAWQ needs a group size; --group-size 128"
    elif job.symmetric:
        problem = "AutoAWQ's gemm packing always has zero points; ask for asymmetric quantization"
    elif job.device.startswith("cuda") and not torch.cuda.is_available():
        problem = f"device {job.device}: this torch sees no CUDA device; --device cpu"
    if job.device == "cpu":
        notes.append(
            "the search of scales is given weights of its own: on a CPU AutoAWQ 0.2.9 scales the model's (see run)"
        )
    return {"versions": versions, "problem": problem, "resumes": False, "notes": notes}


def run(job: Job, tell: Tell) -> None:
    _prepare(job)
    tell("stage", name="loading")
    import torch
    import transformers
    from awq import AutoAWQForCausalLM

    sow(job.seed)
    source = readable(job.source, Path(job.work, "source"), transformers.__version__)
    model = AutoAWQForCausalLM.from_pretrained(
        source, torch_dtype=getattr(torch, job.dtype), trust_remote_code=False, device_map=None
    )
    sequences = job.sequences()
    longest = max(map(len, sequences))
    if any(len(each) != longest for each in sequences):
        print(
            f"AutoAWQ joins sequences of several lengths and cuts them anew, {longest} tokens each",
            flush=True,
        )
    told = _quantizer(job, tell)
    model.quantize(
        tokenizer=None,
        quant_config={
            "zero_point": True,
            "q_group_size": job.group_size,
            "w_bit": job.bits,
            "version": "GEMM",
        },
        calib_data=sequences,  # lists of token ids are taken as they are
        max_calib_samples=len(sequences),
        max_calib_seq_len=longest,
        n_parallel_calib_samples=job.batch_size,
        quantizer_cls=told,
    )
    tell("stage", name="saving")
    shutil.rmtree(job.destination, ignore_errors=True)
    Path(job.destination).mkdir(parents=True)
    model.quant_config.modules_to_not_convert = _left(model.model)
    model.save_quantized(job.destination)
    respell(job.source, job.destination, job.dtype)


def _quantizer(job: Job, tell: Tell) -> type:
    """AutoAWQ's quantizer, which says how far it is, leaves alone what the job says, and works on a CPU."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.module import get_op_name

    class Apart(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        """A module whose state is a copy.

        AutoAWQ remembers the weights by `.cpu()` before it scales them in place, which does not copy on a CPU. The
        search would start from weights that its own first step has scaled, and leave them so.
        """

        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Any, **options: Any) -> Any:
            return self.module(*arguments, **options)

        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return {
                name: each.clone() for name, each in self.module.state_dict(*arguments, **options).items()
            }

        def load_state_dict(
            self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
        ) -> Any:
            return self.module.load_state_dict(state_dict, strict, assign)

    class Told(AwqQuantizer):  # type: ignore[misc, unused-ignore]
        """AutoAWQ's quantizer with our ears."""

        def quantize(self) -> None:
            self.layer = 0
            self.errors: list[float] = []
            tell("layer", done=0, of=len(self.modules))
            super().quantize()

        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, linears2scale: Any, *more: Any
        ) -> Any:
            self.errors = []
            scales = super()._compute_best_scale(
                x, w_mean, x_mean, Apart(module2inspect), linears2scale, *more
            )
            for linear in linears2scale:
                name = get_op_name(self.modules[self.layer], linear)
                tell("module", layer=self.layer, name=name, loss=min(self.errors))
            return scales

        def _compute_loss(self, *arguments: Any) -> float:
            self.errors.append(float(super()._compute_loss(*arguments)))
            return self.errors[-1]

        def _search_best_clip(self, layer: Any, named_linears: Mapping[str, Any], input_feat: Any) -> Any:
            return super()._search_best_clip(layer, self.wanted(layer, named_linears), input_feat)

        def _apply_quant(self, module: Any, named_linears: Mapping[str, Any]) -> None:
            super()._apply_quant(module, self.wanted(module, named_linears))
            self.layer += 1
            tell("layer", done=self.layer, of=len(self.modules))

        def wanted(self, layer: Any, linears: Mapping[str, Any]) -> dict[str, Any]:
            """Those linears of a layer that the job does not leave alone.

            Args:
                layer: The layer's module.
                linears: Its linears by name, within the layer.
            """
            stem = get_op_name(self.model, layer)
            return {
                name: linear
                for name, linear in linears.items()
                if not any(_names(pattern, f"{stem}.{name}") for pattern in job.skip)
            }

    return Told


def _left(model: Any) -> list[str]:
    """The linears that are not quantized, as config.json must list them."""
    import torch

    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def _names(pattern: str, name: str) -> bool:
    """Whether the job's list of what is left alone means this linear."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    words = [".*" if word == "*" else re.escape(word) for word in re.split(r"(\*)", pattern)]
    return re.search(rf"(^|\.){''.join(words)}(\.|$)", name) is not None


def _prepare(job: Job) -> None:
    """Before torch is imported: AutoAWQ takes any accelerator that it sees, and warns of its own end."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore", DeprecationWarning)
    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _absent(error: ImportError) -> str:
    if isinstance(error, PackageNotFoundError):
        reason = f"AutoAWQ is not installed for {sys.executable}: no package {error.name}"
    else:
        reason = missing("autoawq", error)
    return (
        f"{reason}; it is no longer developed and wants an old transformers: make an environment of its own with "
        "`pip install autoawq==0.2.9 transformers==4.51.3`, and name its interpreter with --engine-python"
    )
