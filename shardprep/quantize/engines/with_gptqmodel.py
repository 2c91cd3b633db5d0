"""GPTQ and AWQ by GPTQModel: layer by layer from a folder of safetensors, with a checkpoint after each layer."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .main import Job, Tell, missing, sow

RESUMED = ("llama", "qwen3_moe")
"""Model types whose runs GPTQModel 7.6 itself continues (looper/gptq_checkpoint.py)."""

ALSO_RESUMED = ("gemma2", "granite", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3")
"""Model types that it refuses to continue, of which our tests show that it can."""


def check(job: Job) -> dict[str, Any]:
    _prepare()
    try:
        import torch
        import transformers
        from gptqmodel.models.auto import MODEL_MAP
    except ImportError as error:
        return {
            "versions": {},
            "problem": f"{missing('gptqmodel', error)}; pip install 'shardprep[quantize]', or name an environment that "
            "has it with --engine-python",
            "resumes": False,
        }
    versions = {
        "gptqmodel": version("gptqmodel"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    problem = None
    model_type = job.config().get("model_type")
    if model_type not in MODEL_MAP:
        problem = f"GPTQModel {versions['gptqmodel']} has no definition of model_type {model_type}"
    elif job.bits not in ((2, 3, 4, 8) if job.method == "gptq" else (4,)):
        problem = f"GPTQModel has no {job.method} of {job.bits} bits"
    elif job.device.startswith("cuda") and not torch.cuda.is_available():
        problem = f"device {job.device}: this torch sees no CUDA device; --device cpu"
    elif job.method == "awq" and job.dtype == "float32":
        problem = "AWQ is computed in bfloat16 or float16 by GPTQModel; --dtype bfloat16"
    return {"versions": versions, "problem": problem, "resumes": _resumes(job)}


def run(job: Job, tell: Tell) -> None:
    try:
        _quantize(job, tell)
    except RuntimeError as error:
        store = Path(job.work) / "checkpoint"
        if "incompatible" not in str(error) or not store.is_dir():
            raise
        # what was captured differs by a bit from what the killed run had captured, say: what it left cannot be used
        tell("note", text=f"GPTQModel cannot go on where it was ({error}); it begins anew")
        shutil.rmtree(store)
        _quantize(job, tell)


def _quantize(job: Job, tell: Tell) -> None:
    _prepare()
    tell("stage", name="loading")
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.looper.checkpoint_store import CheckpointConfig
    from gptqmodel.quantization.config import FORMAT, METHOD

    sow(job.seed)
    work = Path(job.work)
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        desc_act=job.act_order,
        act_group_aware=not job.act_order if job.method == "gptq" else None,
        method=METHOD.GPTQ if job.method == "gptq" else METHOD.AWQ,
        format=FORMAT.GPTQ if job.method == "gptq" else FORMAT.GEMM,
        dynamic={f"-:{_pattern(each)}": {} for each in job.skip} or None,
        offload_to_disk=True,
        offload_to_disk_path=str(work / "offload"),
        device=job.device,
    )
    model = GPTQModel.load(job.source, config, dtype=getattr(torch, job.dtype))
    layers = _layers(job.config())
    told = _Told(tell, layers)
    model.layer_callback = told
    store = work / "checkpoint"
    tell("stage", name="quantizing")
    tell("layer", done=_done(store), of=layers)
    with _admitting(job):
        model.quantize(
            [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.sequences()],
            batch_size=job.batch_size,
            # the one that is chosen by itself asks for CUDA before it quantizes; this one only packs
            backend=BACKEND.AWQ_TORCH if job.method == "awq" else BACKEND.AUTO,
            calibration_data_min_length=2,
            checkpoint=CheckpointConfig(path=store) if _resumes(job) else None,
        )
    told.losses(model.quant_log)
    tell("stage", name="saving")
    shutil.rmtree(job.destination, ignore_errors=True)
    model.save(job.destination)


class _Told:
    """Tells of each layer as it is finished, and of the loss of each module at the end."""

    def __init__(self, tell: Tell, layers: int) -> None:
        self.tell, self.layers = tell, layers

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized:
            self.tell("layer", done=layer_idx + 1, of=self.layers)

    def losses(self, log: list[dict[str, Any]]) -> None:
        for entry in log:
            with contextlib.suppress(ValueError, TypeError):  # not every module has a loss of its own
                self.tell(
                    "module", layer=int(entry["layer"]), name=str(entry["module"]), loss=float(entry["loss"])
                )


def _prepare() -> None:
    """Before GPTQModel is imported: it asks two threads of the CPU, and has fewer where there are few cores."""
    os.environ.setdefault("GPTQMODEL_OFFLINE", "1")
    if (os.cpu_count() or 1) < 4:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def _resumes(job: Job) -> bool:
    return job.config().get("model_type") in (*RESUMED, *ALSO_RESUMED) and not job.skip


@contextlib.contextmanager
def _admitting(job: Job) -> Any:
    """Let it keep checkpoints of the model types that it would refuse although they are cut like llama."""
    from gptqmodel.looper import gptq_checkpoint

    judge = gptq_checkpoint.validate_checkpoint_support

    def judged(*args: Any, **options: Any) -> None:
        try:
            judge(*args, **options)
        except NotImplementedError as error:
            if "llama" not in str(error) or job.config().get("model_type") not in ALSO_RESUMED:
                raise

    gptq_checkpoint.validate_checkpoint_support = judged
    try:
        yield
    finally:
        gptq_checkpoint.validate_checkpoint_support = judge


def _done(store: Path) -> int:
    """Layers that an earlier run has finished."""
    try:
        current = json.loads((store / "CURRENT").read_text("utf-8"))
        manifest = json.loads((store / "objects" / current["generations"][0]).read_text("utf-8"))
        return int(manifest["cursor"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _layers(config: Any) -> int:
    text = config.get("text_config") or config
    return next(
        (
            text[key]
            for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if isinstance(text.get(key), int)
        ),
        0,
    )


def _pattern(name: str) -> str:
    """GPTQModel's pattern of what is left alone, of ours."""
    import re

    if name.startswith("re:"):
        return name.removeprefix("re:")
    words = [".*" if word == "*" else re.escape(word) for word in re.split(r"(\*)", name)]
    return rf"(?:.*\.)?{''.join(words)}(?:\..*)?$"
