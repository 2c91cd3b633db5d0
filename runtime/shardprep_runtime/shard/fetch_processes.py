"""Help another process to fetch: one Python spends a core on TLS, several fill the same parts side by side.

A helper inherits the descriptors of the parts (which may be memory without a name) and of their maps. All helpers are
given all runs; claims in the maps share them out (landing.py). A helper reaches the store from the user's own settings,
as its parent does: no credentials pass between them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ..errors import ShardprepError
from ..format.manifest import Manifest
from ..format.read_manifest import parse_manifest
from ..format.write_manifest import dump_manifest
from ..stores.open import open_store
from ..stores.s3 import S3Store
from ..stores.store import Access
from .fetch import Arrival, Fetch, Run
from .landing import Landing
from .parts import OpenPart


class HelperProcesses:
    """Processes that help one fetch (a Crew, fetch.py)."""

    def __init__(self, count: int, manifest: Manifest) -> None:
        """Start nothing yet.

        Args:
            count: How many processes.
            manifest: The manifest of the set whose parts are fetched.
        """
        self._count, self._manifest = count, manifest
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, fetch: Fetch) -> None:
        """Begin to help `fetch` where its store is S3. Others are left alone: they may exist in this process only."""
        if not isinstance(fetch.store, S3Store):
            return
        number = {arrival: i for i, arrival in enumerate(fetch.arrivals)}
        fds = [fd for arrival in fetch.arrivals for fd in (arrival.landing.data, arrival.landing.chart)]
        job = {
            "uri": fetch.store.uri,
            "access": asdict(fetch.store.access),
            "manifest": dump_manifest(self._manifest).decode(),
            "verify": fetch.verify,
            "workers": fetch.workers,
            "arrivals": [
                [
                    arrival.part.part.path,
                    arrival.key,
                    arrival.version,
                    arrival.landing.data,
                    arrival.landing.chart,
                    arrival.landing.in_memory,
                ]
                for arrival in fetch.arrivals
            ],
            "runs": [[number[run.arrival], run.first, run.last] for run in fetch.runs],
        }
        text = json.dumps(job).encode()
        for _ in range(self._count):
            process = subprocess.Popen(  # noqa: S603 - this very program
                [sys.executable, "-P", "-c", f"import {__name__} as helper; helper.main()"],
                stdin=subprocess.PIPE,
                pass_fds=fds,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            self._running.append(process)
            # a helper reads all of its job before it works; the pipe stays open, and its end is the helper's end
            threading.Thread(target=_tell, args=(process, text), name="shardprep-helper", daemon=True).start()

    def stop(self) -> None:
        """Kill the processes; returns once all have ended."""
        for process in self._running:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with suppress(OSError):  # flushes what the helper had not read
                    process.stdin.close()
        self._running = []


def _tell(process: subprocess.Popen[bytes], text: bytes) -> None:
    """Write a job to a helper: its length in 8 bytes, little end first, then JSON."""
    assert process.stdin is not None
    try:
        process.stdin.write(len(text).to_bytes(8, "little") + text)
        process.stdin.flush()
    except OSError:
        pass  # the helper has ended: others do what it would have done


def main() -> None:
    """Be a helper: read a job from stdin, fetch, end. Ends at once when its parent does, by the end of stdin."""
    stream = sys.stdin.buffer
    job = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 0
    try:
        _fetch(job)
    except ShardprepError:
        status = 1  # the parent meets the same error and says it
    os._exit(status)


def _end_with_parent() -> None:
    sys.stdin.buffer.read(1)
    os._exit(2)


def _fetch(job: dict[str, Any]) -> None:
    manifest = parse_manifest(job["manifest"].encode())
    parts = {part.path: part for part in manifest.parts}
    arrivals = []
    for path, key, version, data, chart, in_memory in job["arrivals"]:
        part = parts[path]
        raw = os.pread(data, part.header_size, 0)
        opened = OpenPart(data, raw, part, manifest, where=path, check_digest=False)
        # claims of the inherited descriptor are the parent's too; those of a new opening exclude the parent
        chart = os.open(f"/proc/self/fd/{chart}", os.O_RDWR | os.O_CLOEXEC)
        arrival = Arrival(opened, Landing(part, data, chart, in_memory=in_memory), key, version)
        arrival.old = bytearray(len(arrival.old))  # the parent verifies what was there before
        arrivals.append(arrival)
    runs = [Run(arrivals[i], first, last) for i, first, last in job["runs"]]
    with open_store(job["uri"], Access(**job["access"])) as store:
        fetch = Fetch(store, arrivals, runs, verify=job["verify"], workers=job["workers"])
        fetch.start()
        fetch.wait_all()
        fetch.join()
