#!/usr/bin/env python3
"""Load small models with SGLang's own weight loaders, from their checkpoints and from shard sets, and compare all bits.

    python tools/check_sglang.py CHECKPOINT...

For an environment with SGLang (pip install --no-deps sglang==0.5.23, and what it needs to be imported), torch and
shardprep. Every rank's model is built in this one process, on the CPU, with the rank and sizes that SGLang's context is
told; nothing is computed. The kernels in STUBS are for GPUs: where they are not installed, empty modules stand for them,
since SGLang imports them whatever it then uses.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch.utils._triton import has_triton

from shardprep.split import split
from shardprep_runtime.engines import sglang_plugin
from shardprep_runtime.errors import ShardprepError

STUBS = ("triton", "tvm_ffi", "vllm", "sentencepiece", "torchvision", "traitlets")

SIZES = (1, 2, 4)
"""Tensor parallel."""

GRAIN = 4


class _Anything(type):
    """A class that is its own attributes, subscripts and results; as a decorator it gives back what it decorates."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else cls

    def __getitem__(cls, _: Any) -> Any:
        return cls

    def __or__(cls, _: Any) -> Any:
        return cls

    __ror__ = __or__


class _Stub(types.ModuleType):
    __version__ = "9.9.9"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nobody else found of STUBS."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.partition(".")[0] in STUBS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        made = _Stub(spec.name)
        made.__path__ = []
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main(checkpoints: list[str]) -> int:
    missing = [name for name in STUBS if importlib.util.find_spec(name) is None]
    has_triton()  # which keeps its answer, as the next import keeps its own
    importlib.import_module("transformers.models.llama.modeling_llama")
    if missing:
        torch.compile = lambda f=None, *_, **__: f if callable(f) else lambda g: g  # type: ignore[assignment]
        sys.meta_path.append(_Stubs())
    warnings.simplefilter("ignore")
    context = importlib.import_module("sglang.srt.runtime_context")
    loader = importlib.import_module("sglang.srt.model_loader.loader")
    arguments = importlib.import_module("sglang.srt.server_args")
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
    sglang_plugin.register()
    hooks.apply_hooks()
    version = importlib.import_module("sglang").__version__
    print(f"sglang {version}, torch {torch.__version__}, empty modules for {', '.join(missing) or 'nothing'}")
    differ = 0
    for checkpoint in map(Path, checkpoints):
        given = arguments.ServerArgs(
            model_path=str(checkpoint), device="cpu", dtype="bfloat16", tp_size=4, skip_tokenizer_init=True
        )
        context.publish(given, role="scheduler")
        with tempfile.TemporaryDirectory() as folder:
            shards = Path(folder, "set")
            split(checkpoint, shards, tensor_parallel_size=GRAIN)
            for tp in SIZES:
                try:
                    ranks = list(_compare(context, loader, checkpoint, shards, tp))
                except (AssertionError, ShardprepError, ValueError) as error:
                    print(f"{checkpoint.name:20} tp {tp}  {type(error).__name__}: {error}")
                    differ += isinstance(error, ShardprepError)
                    continue
                wrong = sorted({name for each, _, _ in ranks for name in each})
                differ += bool(wrong)
                print(
                    f"{checkpoint.name:20} tp {tp}  {sum(count for _, count, _ in ranks):5} tensors of "
                    f"{len(ranks)} ranks: {'DIFFER: ' + ', '.join(wrong[:4]) if wrong else 'equal'}"
                )
            for text in _wrong(context, loader, shards):
                print(f"{checkpoint.name:20} {text}")
                differ += text.endswith("LOADED")
    return int(bool(differ))


def _compare(
    context: Any, loader: Any, checkpoint: Path, shards: Path, tp: int
) -> Iterator[tuple[list[str], int, int]]:
    """Of each rank: names whose bits differ, and how many tensors it has."""
    for rank in range(tp):
        with _as_rank(context, rank, tp):
            expected = _load(loader, checkpoint).state_dict()
            found = _load(loader, shards).state_dict()
        assert expected.keys() == found.keys()
        bits = {
            name for name, tensor in expected.items() if not torch.equal(_bits(tensor), _bits(found[name]))
        }
        yield sorted(bits), len(expected), rank


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _wrong(context: Any, loader: Any, shards: Path) -> Iterator[str]:
    """What a rank is told whose layers were built for another size than its group says."""
    with _as_rank(context, 0, 2):
        model = _build(loader, shards)
    with _as_rank(context, 1, 4):
        try:
            _fill(loader, model, shards)
        except (ShardprepError, AssertionError, RuntimeError) as error:
            yield f"layers of rank 0 of 2 with the shard of rank 1 of 4: {type(error).__name__}: {str(error)[:90]}"
            return
    yield "layers of rank 0 of 2 with the shard of rank 1 of 4: LOADED"


def _as_rank(context: Any, rank: int, size: int) -> Any:
    """SGLang's context of a rank, without processes."""

    def group(rank: int, size: int) -> Any:
        return types.SimpleNamespace(
            rank_in_group=rank, world_size=size, rank=rank, is_first_rank=rank == 0,
            is_last_rank=rank == size - 1, device_group=None, cpu_group=None,
        )  # fmt: skip

    tensor, alone = group(rank, size), group(0, 1)
    return context.get_parallel().override(
        tp_rank=rank, tp_size=size, tp_group=tensor, attn_tp_rank=rank, attn_tp_size=size, attn_tp_group=tensor,
        moe_tp_rank=rank, moe_tp_size=size, moe_tp_group=tensor, moe_ep_rank=0, moe_ep_size=1, moe_ep_group=alone,
        pp_rank=0, pp_size=1, pp_group=alone,
    )  # fmt: skip


def _load(loader: Any, folder: Path) -> Any:
    model = _build(loader, folder)
    _fill(loader, model, folder)
    return model


def _build(loader: Any, folder: Path) -> Any:
    """The model of this rank, its weights set to a value that no checkpoint has."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    registry = importlib.import_module("sglang.srt.models.registry").ModelRegistry
    found, _ = registry.resolve_model_cls(config.architectures)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = found(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(77)
    return model


def _fill(loader: Any, model: Any, folder: Path) -> None:
    """Through DefaultModelLoader's own call, around which the plugin stands."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    config = types.SimpleNamespace(
        model_path=str(folder), revision=None, num_hidden_layers=layers, hf_config=None
    )
    load_config = importlib.import_module("sglang.srt.configs.load_config").LoadConfig()
    found = loader.DefaultModelLoader(load_config)
    model.load_weights(found._get_all_weights(config, model))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
