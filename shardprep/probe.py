"""Record what a model gives for fixed inputs, layer by layer, while its parts wait for their manifest.

`shardprep_runtime.stage.probe` decides what the inputs are and what is recorded. It builds each layer as a worker does,
from the parts themselves, so that one layer is in memory at a time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardprep_runtime.errors import (
    InputError,
    IntegrityError,
    ProblemError,
    ShardprepError,
    UnsupportedError,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import Manifest, Probe, Response
from shardprep_runtime.format.view import Place
from shardprep_runtime.format.write_manifest import dump_manifest
from shardprep_runtime.shard.loading import load_parts
from shardprep_runtime.stores.store import read

from .write.side_files import CONFIG
from .write.staging import Destination


def check_can_probe(config: Mapping[str, Any], layers: int) -> None:
    """Check before a split that the model can be computed layer by layer.

    Args:
        config: The parsed config.json.
        layers: How many layers the layout rules find.

    Raises:
        UnsupportedError: Where the config shows already that it cannot, or torch or transformers is not installed.
    """
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(
                f"--probe computes the model's layers, and {module} is not installed: "
                "pip install 'shardprep[transformers]', or split without --probe"
            )
    from shardprep_runtime.stage.model import find_layers

    from .model.skeleton import bare

    try:
        find_layers(bare(config), layers)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"--probe computes the model's layers: {error}; split without --probe"
        ) from None


def record_probe(manifest: Manifest, written: Destination, *, workers: int | None) -> Probe:
    """Compute what each layer gives for fixed inputs, before the manifest is written.

    One thread computes, so that the same machine gives the same numbers again.

    Args:
        manifest: Names the parts; it has no file yet.
        written: The destination that holds the finished parts.
        workers: Threads that read the parts.

    Raises:
        ProblemError: Where a layer cannot be computed; the parts are kept.
    """
    import torch

    found: dict[int | str, Response] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="shardprep-") as folder,
            contextlib.redirect_stdout(sys.stderr),  # where GPTQModel tells of its kernels
        ):
            _bring_config(manifest, written, Path(folder))
            digest = manifests.digest_of(dump_manifest(manifest))
            for number in range(manifest.layers):
                found |= _observed(manifest, written, number, Path(folder), digest, workers)
    except (InputError, IntegrityError) as error:  # as they are, these two would have the parts removed
        raise ProblemError(
            f"the parts are written, but the model cannot be probed: {error}; the same command without --probe ends "
            "the split with what is there"
        ) from None
    finally:
        torch.set_num_threads(threads)
    layers = tuple(found[number] for number in range(manifest.layers))
    return Probe(found["embedding"], layers, found["head"])


def _observed(
    manifest: Manifest, written: Destination, number: int, folder: Path, digest: str, workers: int | None
) -> dict[int | str, Response]:
    """Compute the responses of one layer, and of the embedding or head beside it."""
    from shardprep_runtime.stage.probe import observe, responses
    from shardprep_runtime.stage.stage import stage_of

    store, key = written.reopen()
    try:
        shard = load_parts(
            store,
            key,
            manifest,
            Place(number, stages=[(i, i + 1) for i in range(manifest.layers)]),
            workers=workers,
        )
    except BaseException:
        store.close()
        raise
    with shard:
        seen = []
        for dtype in ("float32", "bfloat16"):
            with stage_of(shard, folder, dtype=dtype, manifest_digest=digest) as stage:
                try:
                    seen.append(observe(stage))
                except ShardprepError:
                    raise
                except Exception as error:  # noqa: BLE001 - whatever the forward of a model of theirs may raise
                    problem = " ".join(str(error).split())
                    raise UnsupportedError(f"layer {number}: {type(error).__name__}: {problem}") from None
        return responses(*seen)


def _bring_config(manifest: Manifest, written: Destination, folder: Path) -> None:
    """Copy the config.json of the set into a folder, where a stage finds it."""
    side = next((side for side in manifest.side_files if side.path == CONFIG), None)
    if side is None:
        raise UnsupportedError("there is no config.json")
    store, key = written.reopen()
    with store:
        (folder / CONFIG).write_bytes(read(store, key(side), 0, side.size))
