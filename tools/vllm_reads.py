"""Say which indices of which checkpoint tensor each rank of vLLM reads, by asking vLLM's own weight loaders.

vLLM's model of a rank is built (shardprep.vllm.ranks), and its `load_weights` is handed tensors without data that tick
off what is read of them. Runs in an environment with vLLM and shardprep (scripts/make_vllm makes it); requests come as
lines of JSON on standard input, answers leave as such. Each is served by a forked process, for vLLM's registries
remember.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import json
import logging
import math
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from vllm import triton_utils
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from shardprep.vllm.ranks import as_rank, build_config, build_model, current

aten = torch.ops.aten
Block = list[list[int]]

PATIENCE = 90
"""Seconds of work that one request may take."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPARSE = ("topk_indices_buffer", "index_group_builder")
"""What sparse attention gives to a kernel that a CPU has not."""

SAME_VALUES = (aten.clone.default, aten._to_copy.default, aten.contiguous.default)


class Ticked(torch.Tensor):
    """A tensor without data, and a view of the mask in which reading it ticks off what was read.

    Views of it view the mask alike; a copy, a cast too, may wait until it is known what is wanted of it. Any other
    operation reads all that the view shows, and answers with zeros.
    """

    mask: torch.Tensor
    twin: torch.Tensor
    dims: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, mask: torch.Tensor, twin: torch.Tensor, dims: int) -> Ticked:
        made = torch.Tensor._make_wrapper_subclass(
            cls, twin.shape, strides=twin.stride(), storage_offset=twin.storage_offset(), dtype=twin.dtype,
            device=torch.device("cpu"), requires_grad=False,
        )  # fmt: skip
        made.mask, made.twin, made.dims = mask, twin, dims
        return made

    def tick(self) -> None:
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.mask.stride())
        self.mask[once].fill_(True)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default:
            args[0].tick()
            return 1
        if function is aten.copy_.default and not isinstance(args[0], Ticked):
            args[1].tick()
            return args[0]
        if (
            function is aten.index.Tensor
            and isinstance(args[0], Ticked)
            and (run := _run(args[1])) is not None
        ):
            function, args = aten.slice.Tensor, (args[0], 0, run[0], run[1])
        if isinstance(args[0], Ticked):
            seen = args[0]
            returns = function._schema.returns
            if any(each.alias_info and each.alias_info.is_write for each in returns):
                _read(args)
                return seen
            with contextlib.suppress(RuntimeError):  # a mask of another order cannot be viewed so
                if function is aten._unsafe_view.default:
                    function = aten.view.default
                    returns = function._schema.returns
                if any(each.alias_info for each in returns):
                    masks = function(seen.mask, *args[1:], **kwargs)
                    twins = function(seen.twin, *args[1:], **kwargs)
                    if isinstance(masks, torch.Tensor):
                        return Ticked(masks, twins, seen.dims)
                    return [Ticked(m, t, seen.dims) for m, t in zip(masks, twins, strict=True)]
                if function in SAME_VALUES and sum(n > 1 for n in seen.mask.shape) <= seen.dims:
                    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
                    return Ticked(seen.mask, function(seen.twin, **kwargs), seen.dims)
        return function(*_read(args), **{key: _read(value) for key, value in kwargs.items()})


def _run(indices: Sequence[Any]) -> tuple[int, int] | None:
    """The run [start, stop) of the first dim that an index picks, if it is one (the experts of a rank)."""
    if len(indices) != 1 or not isinstance(indices[0], torch.Tensor) or isinstance(indices[0], Ticked):
        return None
    picked = indices[0].tolist()
    if indices[0].dim() != 1 or indices[0].dtype == torch.bool or not picked:
        return None
    start, stop = picked[0], picked[0] + len(picked)
    return (start, stop) if picked == list(range(start, stop)) else None


def _read(value: Any) -> Any:
    """The same arguments with what was ticked as zeros."""
    if isinstance(value, Ticked):
        value.tick()
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_read(each) for each in value)
    return value


def blocks(mask: torch.Tensor) -> list[Block] | str | None:
    """The True elements as disjoint blocks ("*": all of them, None: none), in the order of the first dim."""
    if not mask.any():
        return None
    return "*" if mask.all() else _blocks(mask)


def _blocks(mask: torch.Tensor) -> list[Block]:
    along = (
        [mask.amax([d for d in range(mask.dim()) if d != dim]) for dim in range(mask.dim())]
        if mask.dim() > 1
        else [mask]
    )
    if math.prod(int(each.sum()) for each in along) == int(mask.sum()):
        found: list[Block] = [[]]
        for each in along:
            found = [[*block, run] for block in found for run in _runs(each)]
        return found
    found = []
    start = 0
    for stop in range(1, len(mask) + 1):
        if stop == len(mask) or not torch.equal(mask[stop], mask[start]):
            if mask[start].any():
                found += [[[start, stop], *rest] for rest in _blocks(mask[start])]
            start = stop
    return found


def _runs(line: torch.Tensor) -> list[list[int]]:
    edges = torch.diff(
        line.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)
    )
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [list(each) for each in zip(starts, stops, strict=True)]


def reads_of_rank(
    config: VllmConfig,
    shapes: Mapping[str, Any],
    *,
    tp: int,
    tp_size: int,
    ep: bool,
    pp: int = 0,
    pp_size: int = 1,
) -> dict[str, Any]:
    """What one rank reads of each tensor, and the class of the model."""
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, (_, shape) in shapes.items()}
    rank = as_rank(tp_rank=tp, tp_size=tp_size, pp_rank=pp, pp_size=pp_size, expert_parallel=ep)
    with rank, current(config):
        model = build_model(config)
        model.load_weights(  # type: ignore[operator]
            (name, Ticked(masks[name], torch.empty(shape, dtype=DTYPES[dtype], device="meta"), len(shape)))
            for name, (dtype, shape) in shapes.items()
        )
    return {"model": type(model).__name__, "reads": {name: blocks(mask) for name, mask in masks.items()}}


def _allow_all() -> None:
    """Build what this machine could not run: nothing will run."""
    registry._run_in_subprocess = lambda function: function()  # this process is one already
    CPUUnquantizedExperts.is_supported_config = staticmethod(lambda *_: (True, None))
    refuse = FusedMoEConfig.__post_init__

    def allow(self: FusedMoEConfig) -> None:
        with contextlib.suppress(NotImplementedError):  # the last thing that it does
            refuse(self)

    FusedMoEConfig.__post_init__ = allow
    choose = type(current_platform).get_attn_backend_cls

    def choose_dense(*args: Any, attn_selector_config: Any, **named: Any) -> str:
        return str(
            choose(*args, attn_selector_config=attn_selector_config._replace(use_sparse=False), **named)
        )

    type(current_platform).get_attn_backend_cls = staticmethod(choose_dense)
    build = MLACommonImpl.__init__

    def build_dense(*args: Any, **named: Any) -> None:
        build(*args, **{key: value for key, value in named.items() if key not in SPARSE})

    MLACommonImpl.__init__ = build_dense
    torch.cuda.Stream = MagicMock()  # type: ignore[misc]
    triton_utils.triton.set_allocator = lambda _: None
    sys.meta_path.append(_Pretend())


class _Pretend(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of GPU kernels that the models of some types import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        pretended = name.partition(".")[0] in ("cutlass", "cuda", "deep_gemm", "flashinfer", "torchvision")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if pretended else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        pass


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The reads of each layout asked for: "tp4", "tp4ep4", "tp2pp2" (then ranks of the first stage come first)."""
    _allow_all()
    shapes = request["shapes"]
    found: dict[str, Any] = {"reads": {}, "errors": {}}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(request["config"]))
        config = build_config(folder, dtype="bfloat16", load_format="dummy", **request.get("overrides", {}))
        for layout in request["layouts"]:
            try:
                found["model"], found["reads"][layout] = _reads(config, shapes, layout)
            except Exception as error:  # noqa: BLE001 - whatever it is, the one who asked shall know
                traceback.print_exc()
                found["errors"][layout] = _say(error)
    return found


def _reads(config: VllmConfig, shapes: Mapping[str, Any], layout: str) -> tuple[str, dict[str, Any]]:
    """The class of the model, and what each rank reads of each tensor that not all read whole."""
    size = {kind: int(layout.partition(kind)[2][:1]) for kind in ("tp", "ep", "pp") if kind in layout}
    stages = size.get("pp", 1)
    ranks = [
        reads_of_rank(config, shapes, tp=tp, tp_size=size["tp"], ep="ep" in size, pp=pp, pp_size=stages)
        for pp in range(stages)
        for tp in range(size["tp"])
    ]
    rows = {name: [rank["reads"][name] for rank in ranks] for name in shapes}
    return ranks[0]["model"], {name: row for name, row in rows.items() if any(each != "*" for each in row)}


def _say(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def serve(line: str) -> str:
    """The answer to one request, made by a process of its own."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
        try:
            found = answer(json.loads(line))
        except BaseException as error:  # noqa: BLE001 - vLLM refuses the config
            traceback.print_exc()
            found = {"reads": {}, "errors": {"config": _say(error)}}
        with os.fdopen(into, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        got = pipe.read()
    _, status = os.waitpid(child, 0)
    end = f"not done after {PATIENCE} s" if os.WIFSIGNALED(status) else f"ended with status {status}"
    return got or json.dumps({"reads": {}, "errors": {"process": end}})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    logging.disable(logging.WARNING)
    for line in sys.stdin:
        print(serve(line), file=answers, flush=True)


if __name__ == "__main__":
    main()
