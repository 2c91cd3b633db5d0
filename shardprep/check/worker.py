"""Run transformers' own tensor parallelism for `Ranks`: each rank is a process that reads only its own view.

`python -P -m shardprep.check.worker` reads jobs from standard input and writes their answers, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.engines.transformers_state import check_loaded, transformers_state
from shardprep_runtime.errors import LayoutError
from shardprep_runtime.format.manifest import TORCH, TRANSFORMERS
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set

from .models import answers, model_class
from .processes import Answer, Job

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TIMEOUT: Final = 120
"""Seconds after which a rank that hangs is ended."""


def main() -> None:
    """Answer jobs from standard input until it ends."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing a library prints is taken for an answer
    import transformers
    import transformers.distributed.tensor_parallel  # what every rank needs is imported once

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for line in sys.stdin:
        job = Job(**json.loads(line))
        lines.write(json.dumps(asdict(_run(job))) + "\n")
        lines.flush()


def _run(job: Job) -> Answer:
    """Fork the ranks of a job, and put their answers together."""
    import importlib

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.checkpoint)
    found = model_class(config)._model_mapping[type(config)]
    importlib.import_module((found[0] if isinstance(found, tuple | list) else found).__module__)
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=Path(job.checkpoint).parent))
    children = {}
    for rank in range(job.size):
        child = os.fork()
        if child == 0:
            _child(job, rank, folder)
        children[child] = rank
    _await(children)
    found_answers = []
    for rank in range(job.size):
        file = folder / f"{rank}.json"
        if file.exists():
            found_answers.append(Answer(**json.loads(file.read_text())))
        else:
            found_answers.append(Answer("failed", rank, f"rank {rank} ended without an answer"))
    # a rank that is refused ends, and the others then fail because it is gone
    for status in ("refused", "failed"):
        of_status = [each for each in found_answers if each.status == status]
        lonely = [each for each in of_status if "onnection closed by peer" not in each.detail]
        if of_status:
            return (lonely or of_status)[0]
    return found_answers[0]


def _await(children: Mapping[int, int]) -> None:
    """Wait until all children have ended, and end those that hang."""
    left = set(children)
    deadline = time.monotonic() + TIMEOUT
    while left:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            left.discard(done)
            if status and left:  # the other ranks would wait in vain for this one
                deadline = min(deadline, time.monotonic() + 5)
        elif time.monotonic() > deadline:
            for child in left:
                os.kill(child, 9)
            deadline += 5
        else:
            time.sleep(0.005)


def _child(job: Job, rank: int, folder: Path) -> None:
    """Be one rank: write an answer, and end this process without the clean-up that belongs to its parent."""
    status = 1
    threading.Thread(target=_outlive, args=(os.getppid(),), daemon=True).start()
    try:
        answer = _rank(job, rank, folder)
        _write(folder / f"{rank}.json", answer)
        status = answer.status != "ok"
    except BaseException:  # noqa: BLE001 - a forked process must not return to its parent's loop
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _outlive(parent: int) -> None:
    """End this process once its parent has ended, since nobody reads its answer then."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _write(file: Path, answer: Answer) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(answer)))
    temporary.rename(file)


class _Watched:
    """A slice of a tensor that records what it refused, since transformers replaces errors of loading by its own."""

    def __init__(self, found: Any, refused: list[str]) -> None:
        self.found = found
        self.refused = refused

    def get_shape(self) -> list[int]:
        shape: list[int] = self.found.get_shape()
        return shape

    def get_dtype(self) -> str:
        dtype: str = self.found.get_dtype()
        return dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self.found[index]
            return tensor
        except LayoutError as error:
            self.refused.append(str(error))
            raise


def _rank(job: Job, rank: int, folder: Path) -> Answer:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=job.size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    refused: list[str] = []
    try:
        with _source(job, rank) as source:
            model = _distribute(job, {name: _Watched(each, refused) for name, each in source.items()})
            logits, tokens = answers(model, torch.tensor(job.prompt))
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the answer
        if refused:
            return Answer("refused", rank, refused[0])
        return Answer("failed", rank, _first_line(error))
    if rank == 0:
        torch.save(logits, folder / "logits.pt")
    dist.barrier()
    dist.destroy_process_group()
    return Answer("ok", rank, "", str(folder / "logits.pt"), tokens.tolist())


def _first_line(error: BaseException) -> str:
    """Give the message of an error whose text may begin with a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()[:300]}"


@contextlib.contextmanager
def _source(job: Job, rank: int) -> Iterator[Mapping[str, Any]]:
    """Open the tensors of the checkpoint as this rank has them: name -> slice."""
    if job.shard_set is None:
        from safetensors import safe_open

        with safe_open(Path(job.checkpoint) / "model.safetensors", "pt") as opened:
            yield {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        return
    place = Place(
        rank,
        job.size,
        expert_parallel_size=job.expert_parallel_size,
        engine=TRANSFORMERS if job.size > 1 else TORCH,
    )
    state = transformers_state(open_set(job.shard_set, verify="headers").load(place))
    with contextlib.closing(state):
        yield state


def _distribute(job: Job, tensors: Mapping[str, Any]) -> PreTrainedModel:
    """Build the model of one rank, and have transformers' own loader take its tensors from `tensors`.

    This is what `from_pretrained(distributed_config=...)` does; that itself demands accelerate and a file to read.
    """
    import torch
    from transformers import AutoConfig, initialization
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.utils import initialize_distributed_mesh
    from transformers.modeling_utils import LoadStateDictConfig

    config = AutoConfig.from_pretrained(job.checkpoint)
    with (
        torch.device("meta"),
        initialization.no_tie_weights(),
        initialization.meta_device_safe_creation_ops(),
    ):
        model = model_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    model = model.eval()
    conversions: Any = get_model_conversion_mapping(model)
    wanted = DistributedConfig(tp_size=job.size, ep_size=job.expert_parallel_size)
    _, mesh = initialize_distributed_mesh(wanted)
    model = type(model).maybe_distribute_model(model, wanted, mesh)
    loading = LoadStateDictConfig(
        pretrained_model_name_or_path=job.checkpoint,
        device_map={"": "cpu"},
        dtype=torch.float32,
        weight_mapping=conversions,
        device_mesh=model._device_mesh,
    )
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), loading)
    info = type(model)._finalize_model_loading(model, loading, info)
    check_loaded(info.to_dict())
    found: PreTrainedModel = model
    return found


if __name__ == "__main__":
    main()
