#!/usr/bin/env python3
"""The measured processes of s3.py: each function moves the same bytes with another client.

Run by s3.py, each in a process of its own, with the interpreter that has the client:

    python benchmarks/s3_peers.py NAME SPEC timed|check|plain [MORE]

SPEC is a JSON file that says where and what. timed: wait for the word of the benchmark once everything is imported
and one small object was fetched; check: compare every byte afterwards; plain: neither. Every client has the same
concurrency and part size, and memory to receive into is new, as a loader's is.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import benchlib

if TYPE_CHECKING:
    from obstore.store import ClientConfig

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Object:
    """One object of the payload and the local file that has the same bytes."""

    key: str
    size: int
    file: str


Get: TypeAlias = Callable[[Object, int, int, memoryview], None]
"""Brings the bytes [start, stop) of an object into memory."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be moved."""

    endpoint: str
    bucket: str
    objects: tuple[Object, ...]
    tiny: Object
    """A small one, to fetch before the clock runs."""
    prefix: str
    """Of the shard set that holds the objects; `PREFIX-tiny` is a small set."""
    folder: str
    """The shard set as local files."""
    authority: str
    """A file of the certificate that signs the server's."""
    part: int
    concurrency: int
    mode: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def nbytes(self) -> int:
        return sum(each.size for each in self.objects)

    def parts(self, each: Object) -> list[tuple[int, int]]:
        return [(at, min(at + self.part, each.size)) for at in range(0, each.size, self.part)]


def clock(job: Job, work: Callable[[], Any], check: Callable[[Any], None] = lambda _: None) -> None:
    """Do the work and report what it took, from a process that has imported what it needs."""
    if job.mode == "timed":
        benchlib.ready()
    cpu, began = cpu_seconds(), time.perf_counter()
    found = work()
    seconds, used = time.perf_counter() - began, cpu_seconds() - cpu
    if job.mode == "check":
        check(found)
    benchlib.report(seconds=seconds, cpu=used, **(found if isinstance(found, dict) else {}))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def same(found: memoryview, file: str, start: int = 0) -> None:
    """Exits where memory differs from the bytes of a file."""
    with Path(file).open("rb") as stream:
        stream.seek(start)
        for at in range(0, len(found), CHUNK):
            block = bytes(found[at : at + CHUNK])
            if block != stream.read(len(block)):
                sys.exit(f"wrong bytes: {Path(file).name} differs at or after byte {start + at}")


def memory(size: int) -> memoryview:
    """New memory that nothing has touched."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def into_memory(job: Job, get: Get, *, once: Callable[[], object] = lambda: None) -> None:
    """Fetch all parts into new memory; `once` runs at the end of each thread."""

    def work() -> list[memoryview]:
        buffers = [memory(each.size) for each in job.objects]
        fetch_parts(job, get, buffers, once)
        return buffers

    clock(job, work, lambda found: compare_memory(job, found))


def fetch_parts(
    job: Job, get: Get, places: Iterable[memoryview], once: Callable[[], object] = lambda: None
) -> None:
    """Fetch all parts with threads, each into its place."""
    tasks = [
        partial(get, each, start, stop, into[start:stop])
        for each, into in zip(job.objects, places, strict=True)
        for start, stop in job.parts(each)
    ]
    in_threads(job.concurrency, tasks, once)


def compare_memory(job: Job, found: Iterable[memoryview]) -> None:
    for each, buffer in zip(job.objects, found, strict=True):
        same(buffer, each.file)


def in_threads(
    count: int, tasks: Iterable[Callable[[], None]], once: Callable[[], object] = lambda: None
) -> None:
    """Run tasks in `count` threads; the first error ends it."""
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def run() -> None:
        try:
            while True:
                waiting.get_nowait()()
        except queue.Empty:
            once()

    with ThreadPoolExecutor(count) as pool:
        for each in [pool.submit(run) for _ in range(count)]:
            each.result()


# --------------------------------------------------------------------------------------------------------------- ours
def ours_pull(job: Job, out: str) -> None:
    """`shardprep pull` without the start of the interpreter."""
    from shardprep.cli import main

    def pull(uri: str, folder: str) -> None:
        main(["pull", uri, folder, "--all", "--endpoint-url", job.endpoint], standalone_mode=False)

    sys.stdout = sys.stderr  # the report is all that the benchmark reads
    pull(f"{job.uri}-tiny", f"{out}/tiny-set")
    sys.stdout = sys.__stdout__

    def work() -> None:
        sys.stdout = sys.stderr
        pull(job.uri, f"{out}/set")
        sys.stdout = sys.__stdout__

    clock(job, work)


def ours_memory(job: Job, verify: str, rank: str = "0", size: str = "1", idle: str = "") -> None:
    """shardprep_runtime.load without a cache, until every tensor is there."""
    from shardprep_runtime import load
    from shardprep_runtime.stores.store import Access

    access = Access(endpoint_url=job.endpoint)
    if idle:
        access = replace(access, idle_timeout=float(idle))

    def get(uri: str, rank: int, size: int) -> Any:
        shard = load(
            uri,
            rank=rank,
            tensor_parallel_size=size,
            verify=verify,  # type: ignore[arg-type]  # s3.py gives one of the three
            cache=None,
            access=access,
        )
        shard.wait()
        return shard

    def check(shard: Any) -> None:
        local = load(job.folder, rank=int(rank), tensor_parallel_size=int(size), verify="off")
        if set(shard) != set(local):
            sys.exit("wrong names: the shard from the store has others than the local one")
        for name in local.view.tensors:
            if bytes(shard.memory(name)) != bytes(local.memory(name)):
                sys.exit(f"wrong bytes: {name}")

    if job.mode != "plain":
        get(f"{job.uri}-tiny", 0, 1)
    clock(job, lambda: get(job.uri, int(rank), int(size)), check)


# ------------------------------------------------------------------------------------------------------------- limits
def raw_memory(job: Job) -> None:
    """The least that can be done: sockets received into memory, nothing signed, looked at or retried."""
    url = urlsplit(job.endpoint)
    context = ssl.create_default_context(cafile=job.authority) if url.scheme == "https" else None
    local = threading.local()

    def connect() -> socket.socket:
        if not hasattr(local, "socket"):
            local.socket = socket.create_connection((url.hostname or "", url.port or 0))
            if context:
                local.socket = context.wrap_socket(local.socket, server_hostname=url.hostname)
        found: socket.socket = local.socket
        return found

    def get(each: Object, start: int, stop: int, into: memoryview) -> None:
        connection = connect()
        connection.sendall(
            f"GET /{job.bucket}/{each.key} HTTP/1.1\r\nHost: {url.netloc}\r\nRange: bytes={start}-{stop - 1}\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        head, _, rest = head.partition(b"\r\n\r\n")
        if b" 206 " not in head[:16]:
            sys.exit(f"not 206: {head[:80]!r}")
        into[: len(rest)] = rest
        at, flags = len(rest), 0 if context else socket.MSG_WAITALL
        while at < len(into):
            got = connection.recv_into(into[at:], 0, flags)
            if not got:
                sys.exit("the connection ended early")
            at += got

    into_memory(job, get, once=lambda: local.socket.close() if hasattr(local, "socket") else None)


# -------------------------------------------------------------------------------------------------------------- s5cmd
def s5cmd_memory(job: Job, s5cmd: str) -> None:
    """`s5cmd cat`, read from a pipe into memory, at most four objects at a time."""

    def read(each: Object, into: memoryview) -> None:
        command = [s5cmd, "cat", "-c", str(job.concurrency), "-p", str(job.part // 2**20)]
        with subprocess.Popen(
            [*command, f"s3://{job.bucket}/{each.key}"], stdout=subprocess.PIPE, bufsize=0, pipesize=2**20
        ) as process:
            assert process.stdout
            at = 0
            while got := process.stdout.readinto(into[at:]):  # type: ignore[attr-defined]
                at += got
        if process.returncode or at != each.size:
            sys.exit(f"s5cmd cat: exit {process.returncode}, {at} of {each.size} bytes")

    def work() -> list[memoryview]:
        buffers = [memory(each.size) for each in job.objects]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, job.objects, buffers))
        return buffers

    clock(job, work, lambda found: compare_memory(job, found))


# -------------------------------------------------------------------------------------------------------------- boto3
def boto3_client(job: Job) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=4 * job.concurrency, s3={"addressing_style": "path"})
    return boto3.client("s3", endpoint_url=job.endpoint, config=config)


def transfer_config(job: Job) -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=job.part,
        multipart_chunksize=job.part,
        max_concurrency=job.concurrency,
        io_chunksize=2**20,
    )


def boto3_download(job: Job, out: str) -> None:
    client, config = boto3_client(job), transfer_config(job)
    client.download_file(job.bucket, job.tiny.key, f"{out}/tiny", Config=config)

    def work() -> None:
        for each in job.objects:
            client.download_file(job.bucket, each.key, f"{out}/{each.key.rpartition('/')[2]}", Config=config)

    clock(job, work)


def boto3_memory(job: Job) -> None:
    """get_object of ranges, read into memory by threads."""
    client = boto3_client(job)
    client.get_object(Bucket=job.bucket, Key=job.tiny.key)["Body"].read()

    def get(each: Object, start: int, stop: int, into: memoryview) -> None:
        with client.get_object(Bucket=job.bucket, Key=each.key, Range=f"bytes={start}-{stop - 1}")[
            "Body"
        ] as body:
            at = 0
            while at < len(into):
                got = body.readinto(into[at:])
                if not got:
                    sys.exit("the body ended early")
                at += got

    into_memory(job, get)


def boto3_upload(job: Job) -> None:
    client, config = boto3_client(job), transfer_config(job)

    def work() -> None:
        for each in job.objects:
            client.upload_file(
                each.file, job.bucket, each.key, Config=config, ExtraArgs={"ChecksumAlgorithm": "CRC32"}
            )

    clock(job, work)


# ------------------------------------------------------------------------------------------------------------ obstore
def obstore_store(job: Job, **more: Any) -> Any:
    from obstore.store import S3Store

    options: ClientConfig = {"allow_http": True}
    if job.endpoint.startswith("https"):
        options["root_certificate"] = Path(job.authority).read_bytes()
    return S3Store(
        job.bucket,
        endpoint=job.endpoint,
        region="us-east-1",
        access_key_id="bench",
        secret_access_key="benchsecret",
        virtual_hosted_style_request=False,
        client_options=options,
        **more,
    )


def obstore_getter(job: Job) -> Get:
    import numpy
    import obstore

    store = obstore_store(job)
    obstore.get_range(store, job.tiny.key, start=0, end=job.tiny.size)

    def get(each: Object, start: int, stop: int, into: memoryview) -> None:
        got = obstore.get_range(store, each.key, start=start, end=stop)
        # numpy's copy releases the GIL, a memoryview's does not
        numpy.frombuffer(into, numpy.uint8)[:] = numpy.frombuffer(memoryview(got), numpy.uint8)

    return get


def obstore_memory(job: Job) -> None:
    into_memory(job, obstore_getter(job))


def obstore_download(job: Job, out: str) -> None:
    """get_range by threads into the mapped files, which is faster than its stream or pwrite."""
    get = obstore_getter(job)

    def work() -> None:
        maps = []
        for each in job.objects:
            fd = os.open(f"{out}/{each.key.rpartition('/')[2]}", os.O_RDWR | os.O_CREAT)
            os.posix_fallocate(fd, 0, each.size)
            maps.append(memoryview(mmap.mmap(fd, each.size)))
            os.close(fd)
        fetch_parts(job, get, maps)

    clock(job, work)


def obstore_upload(job: Job, checksum: str) -> None:
    """put of a file; with "crc64nvme" each part has its checksum. The payload is left unsigned, which is fastest."""
    import obstore

    more = {"checksum_algorithm": "CRC64NVME"} if checksum == "crc64nvme" else {}
    store = obstore_store(job, unsigned_payload=True, **more)

    def work() -> None:
        for each in job.objects:
            obstore.put(
                store,
                each.key,
                Path(each.file),
                use_multipart=each.size > job.part,
                chunk_size=job.part,
                max_concurrency=job.concurrency,
            )

    clock(job, work)


# ------------------------------------------------------------------------------------------------------------- Run:ai
def runai_memory(job: Job) -> None:
    """SafetensorsStreamer as engines use it; the tensors are kept."""
    from runai_model_streamer import SafetensorsStreamer

    def stream(objects: Iterable[Object]) -> list[tuple[str, Any]]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([f"s3://{job.bucket}/{each.key}" for each in objects])
            return list(streamer.get_tensors())

    if job.mode != "plain":
        stream([job.tiny])

    def check(found: list[tuple[str, Any]]) -> None:
        import torch

        tensors = dict(found)
        for each in job.objects:
            with Path(each.file).open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            for name, tensor in header.items():
                if name != "__metadata__":
                    flat = tensors[name].contiguous().view(-1).view(torch.uint8).numpy()
                    same(memoryview(flat), each.file, 8 + size + tensor["data_offsets"][0])

    clock(job, lambda: stream(job.objects), check)


PEERS: dict[str, Callable[..., None]] = {
    each.__name__: each
    for each in (
        *(ours_pull, ours_memory, raw_memory, s5cmd_memory),
        *(boto3_download, boto3_memory, boto3_upload),
        *(obstore_download, obstore_memory, obstore_upload, runai_memory),
    )
}


def main() -> None:
    name, spec, mode, *more = sys.argv[1:]
    fields = json.loads(Path(spec).read_text())
    fields["objects"] = tuple(Object(**each) for each in fields["objects"])
    fields["tiny"] = Object(**fields["tiny"])
    PEERS[name](Job(**fields, mode=mode), *more)


if __name__ == "__main__":
    main()
