"""Make a small model of an architecture, and make one proof about it after another."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardprep_runtime.errors import InputError, UnsupportedError, quote
from shardprep_runtime.format.manifest import ENGINES
from shardprep_runtime.stores.store import Access

from ..files import LocalFolder
from ..model import skeleton
from ..source import open_source
from ..source.checkpoint import read_config, read_json
from .heads import prove_heads
from .processes import Ranks
from .ranks import prove_ranks
from .report import CheckReport, Differs, Proof
from .shard_set import prove_export, prove_logits, prove_split
from .small import SmallModel
from .stages import prove_stages
from .sums import prove_sums
from .views import prove_views


def check_arch(
    source: Path | str,
    *,
    tensor_parallel_size: int = 4,
    pipeline_parallel_size: int = 2,
    expert_parallel_size: int = 2,
    engines: Sequence[str] = ENGINES,
    access: Access | None = None,
    ranks: Ranks | None = None,
    tell: Callable[[Proof], None] = lambda _: None,
) -> CheckReport:
    """Check the layout rules of an architecture. What was tried and found wrong is in the report.

        report = check_arch("llama", tensor_parallel_size=8)
        assert report.ok, report.difference

    Args:
        source: A checkpoint (path or URI), whose config.json alone is read; a config.json; or a model type.
        tensor_parallel_size: The grain; every size that divides it is checked.
        pipeline_parallel_size: Every number of stages up to this is checked.
        expert_parallel_size: Every size up to this is checked, for a model with experts.
        engines: Engines whose views are checked.
        access: Endpoint, profile and the like of a store.
        ranks: Processes for transformers' tensor parallelism; default: started for this check.
        tell: Called with each proof as soon as it is made.

    Raises:
        InputError: For a model, a size or a config that is not supported.
    """
    _demand()
    config = skeleton.shrink(read_model_config(source, access))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardprep-check-")))
        stack.enter_context(_quiet())
        small = SmallModel(
            config,
            folder,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            expert_parallel_size=expert_parallel_size,
            engines=tuple(engines),
        )
        if "transformers" not in small.engines or tensor_parallel_size == 1:
            ranks = None
        elif ranks is None:
            ranks = stack.enter_context(Ranks())  # its process imports torch while the first proofs are made
        proofs: list[Proof] = []
        difference = None
        try:
            for proof in _proofs(small, ranks):
                proofs.append(proof)
                tell(proof)
        except Differs as differs:
            difference = differs.difference
        return CheckReport(
            model_type=str(config.get("model_type")),
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            expert_parallel_size=expert_parallel_size,
            engines=small.engines,
            tensors=len(small.tensors),
            nbytes=small.nbytes,
            proofs=tuple(proofs),
            difference=difference,
        )


def _proofs(small: SmallModel, ranks: Ranks | None) -> Iterator[Proof]:
    """Yield each proof as it is made; later proofs rest on earlier ones. Raise Differs at the first thing that is wrong."""
    yield from prove_split(small)
    yield from prove_views(small)
    yield from prove_heads(small)
    unproved = None
    try:
        yield from prove_sums(small)
    except Differs as differs:
        if "vllm" in small.engines or "transformers" not in small.engines:
            raise
        unproved = differs  # not an error yet: an engine may exchange results of its ranks inside a module
    yield from prove_logits(small)
    real = True
    for proof in prove_ranks(small, ranks) if ranks is not None else ():
        real = real and not proof.assembled
        yield proof
    if unproved is not None:
        if not real:
            raise unproved
        yield Proof(
            "sums",
            f"{unproved.difference.tensor}: partial results do not add up: ranks exchange them inside of it",
        )
    yield from prove_stages(small)
    yield from prove_export(small)


def _demand() -> None:
    """Raise UnsupportedError where torch or transformers is not installed."""
    for module in ("torch", "transformers", "safetensors"):
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(
                f"check-arch builds and runs a small model, and {module} is not installed: "
                "pip install 'shardprep[transformers]'"
            )


def read_model_config(source: Path | str, access: Access | None = None) -> Mapping[str, Any]:
    """Read the config.json of a checkpoint, or that file itself, or make transformers' default config of a model type.

    Args:
        source: A path or URI, or the name of a model type.
        access: Endpoint, profile and the like of a store.

    Raises:
        InputError: For a source without a config.
    """
    path = Path(source)
    if isinstance(source, Path) or "://" not in str(source):
        if path.is_file() and path.suffix == ".json":
            return read_json(LocalFolder(path.parent), path.name)
        if not path.exists() and re.fullmatch(r"[a-z][a-z0-9_-]*", str(source)):
            return skeleton.default_config(str(source))
    with open_source(source, access, data=False) as opened:
        config = read_config(opened.folder)
    if not config:
        raise InputError(f"{quote(source)}: no config.json, which says what architecture it is")
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Switch off transformers' progress bars and its notes on so small a model, and compute in one thread.

    Threads would cost more than they gain on a small model.
    """
    import torch
    import transformers

    logging: Any = transformers.logging
    level, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
