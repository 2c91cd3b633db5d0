#!/usr/bin/env python3
"""One worker that s3.py starts, to see how long it takes from its process's start until its tensors are touched.

Run by s3.py, with the interpreter that has the client:

    python benchmarks/s3_start.py load|prefetch|files|boto3|runai SPEC timed|check

timed: report when the imports were done and when the first and the last tensor were touched, since the benchmark
started the process (or the command that became or preceded it), on the clock that all processes share. check: report
the checksum of the tensors. Nothing that could wait is imported before the fetch begins.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCRATCH = 8 * 2**20  # stays in the processor's cache: what an upload to a device reads through


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker is to start with."""

    uri: str
    """Of the shard set. The environment says where the store is, as it does for all clients."""
    rank: int
    size: int
    """Tensor parallel size."""
    folder: str
    """The host's cache, or where files are downloaded to; new and empty."""
    bucket: str
    downloads: tuple[str, ...]
    """Keys of what is downloaded; into `folder`, under the last word of the key."""
    parts: tuple[str, ...]
    """Keys of the parts that hold this rank's tensors and no others."""
    first: str
    """The tensor that a forward pass meets first."""
    transformers: bool
    """Whether transformers is imported besides torch."""
    part: int
    """Bytes of a peer's request."""
    concurrency: int
    """Connections of a peer."""

    def file(self, key: str) -> str:
        return f"{self.folder}/{key.rpartition('/')[2]}"


Tensors = Iterator[tuple[str, "torch.Tensor"]]


# ------------------------------------------------------------------------------------------------------------- clients
def ours(worker: Worker, state: dict[str, float]) -> Callable[[], Tensors]:
    """shardprep_runtime.load through the host's cache."""
    from shardprep_runtime import load

    def run() -> Tensors:
        with load(
            worker.uri, rank=worker.rank, tensor_parallel_size=worker.size, cache=worker.folder
        ) as shard:
            for name, tensor in shard.iter_tensors():
                if name in shard.view.tensors:  # each once, under whichever names
                    yield name, tensor
            state["fetched"] = shard.bytes_fetched

    return run


def prefetched(fetching: Any, state: dict[str, float]) -> Tensors:
    """The shard that `prefetch` began to fetch before the imports."""
    state["fetched"] = 0.0  # of what was left when it was asked for
    with fetching.shard() as shard:
        for name, tensor in shard.iter_tensors():
            if name in shard.view.tensors:
                yield name, tensor


def files(worker: Worker, state: dict[str, float]) -> Callable[[], Tensors]:
    """safetensors' load_file of files that are there."""
    from safetensors.torch import load_file

    def run() -> Tensors:
        tensors: dict[str, torch.Tensor] = {}
        for key in worker.parts:
            tensors |= load_file(worker.file(key))
        yield worker.first, tensors.pop(worker.first)
        yield from tensors.items()

    return run


def boto3(worker: Worker, state: dict[str, float]) -> Callable[[], Tensors]:
    """boto3's download_file of everything, then load_file."""
    from boto3 import client
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    load = files(worker, state)

    def run() -> Tensors:
        pool = Config(max_pool_connections=4 * worker.concurrency, s3={"addressing_style": "path"})
        config = TransferConfig(
            multipart_threshold=worker.part,
            multipart_chunksize=worker.part,
            max_concurrency=worker.concurrency,
            io_chunksize=2**20,
        )
        s3 = client("s3", config=pool)
        for key in worker.downloads:
            s3.download_file(worker.bucket, key, worker.file(key), Config=config)
        yield from load()

    return run


def runai(worker: Worker, state: dict[str, float]) -> Callable[[], Tensors]:
    """Run:ai's SafetensorsStreamer, in the order in which it hands tensors out."""
    from runai_model_streamer import SafetensorsStreamer

    def run() -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([f"s3://{worker.bucket}/{key}" for key in worker.parts])
            yield from streamer.get_tensors()

    return run


CLIENTS: dict[str, Callable[[Worker, dict[str, float]], Callable[[], Tensors]]] = {
    "load": ours,
    "prefetch": ours,
    "files": files,
    "boto3": boto3,
    "runai": runai,
}


# ----------------------------------------------------------------------------------------------------------- the worker
def touch(tensor: torch.Tensor, scratch: torch.Tensor) -> None:
    """Copy all of it through `scratch`."""
    import torch

    for block in tensor.contiguous().view(-1).view(torch.uint8).split(SCRATCH):  # type: ignore[no-untyped-call]
        scratch[: len(block)].copy_(block)


def checksum(tensor: torch.Tensor) -> int:
    import torch

    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def main() -> None:
    how, spec, mode, *later = sys.argv[1:]
    with open(spec) as stream:
        worker = Worker(**json.load(stream))
    fetching: Any = None
    if how == "prefetch":
        from shardprep_runtime.shard.shard_set import prefetch

        fetching = prefetch(
            worker.uri, rank=worker.rank, tensor_parallel_size=worker.size, cache=worker.folder
        )
    import torch

    if worker.transformers:
        from transformers import AutoModelForCausalLM  # noqa: F401
    state: dict[str, float] = {}
    run = CLIENTS[how](worker, state) if fetching is None else lambda: prefetched(fetching, state)
    imported = time.monotonic()

    import benchlib

    if mode == "check":
        found = [(tensor.nbytes, checksum(tensor)) for _, tensor in run()]
        benchlib.report(nbytes=sum(size for size, _ in found), checksum=sum(crc for _, crc in found))
        return
    if "prime" in later:  # nothing has been fetched yet
        benchlib.ready()
    paused = time.monotonic() - imported
    torch.set_num_threads(1)  # as an upload has one
    scratch = torch.ones(SCRATCH, dtype=torch.uint8)
    first, nbytes = 0.0, 0
    for _, tensor in run():
        touch(tensor, scratch)
        first = first or time.monotonic()
        nbytes += tensor.nbytes
    last = time.monotonic()
    if fetching is not None:
        fetching.wait()  # raises what went wrong, which load has made good
    began = float(os.environ[benchlib.BEGAN])
    benchlib.report(
        imported=imported - began,
        first=first - began - paused,
        all=last - began - paused,
        nbytes=nbytes,
        **state,
    )


if __name__ == "__main__":
    main()
