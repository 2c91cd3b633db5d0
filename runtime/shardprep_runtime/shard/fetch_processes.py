"""Help another process to fetch: one Python spends a core on TLS, several fill the same parts side by side.

The parts' files (which may be nameless memory) and their maps are inherited; the locks on the maps share the runs
out. A helper reaches the store as its parent does, from the user's own settings: no credentials pass between them.
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
    """`count` processes that fetch the runs of one fetch."""

    def __init__(self, count: int, manifest: Manifest) -> None:
        self._count, self._manifest = count, manifest
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, fetch: Fetch) -> None:
        """Begin; a store that others cannot open as we did (one in this process's hands alone) is left to us."""
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
                ]
                for arrival in fetch.arrivals
            ],
            "in_memory": [arrival.landing.in_memory for arrival in fetch.arrivals],
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
            # a helper reads all of it before it works; it ends when its end of the pipe does
            threading.Thread(target=_tell, args=(process, text), name="shardprep-helper", daemon=True).start()

    def stop(self) -> None:
        """End them."""
        for process in self._running:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with suppress(OSError):  # what it had not read yet
                    process.stdin.close()
        self._running = []


def _tell(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(len(text).to_bytes(8, "little") + text)
        process.stdin.flush()
    except OSError:
        pass  # it has ended: what it would have done is done by others


def main() -> None:
    """What a helper does: read its job, fetch, end. Ends at once when its parent does."""
    stream = sys.stdin.buffer
    job = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 0
    try:
        _fetch(job)
    except ShardprepError:
        status = 1  # the parent meets the same and says it
    os._exit(status)


def _end_with_parent() -> None:
    sys.stdin.buffer.read(1)
    os._exit(2)


def _fetch(job: dict[str, Any]) -> None:
    manifest = parse_manifest(job["manifest"].encode())
    parts = {part.path: part for part in manifest.parts}
    arrivals = []
    for (path, key, version, data, chart), in_memory in zip(job["arrivals"], job["in_memory"], strict=True):
        part = parts[path]
        raw = os.pread(data, part.header_size, 0)
        opened = OpenPart(data, raw, part, manifest, where=path, check_digest=False)
        # the inherited descriptor shares its locks with the parent's: one of our own excludes the others
        chart = os.open(f"/proc/self/fd/{chart}", os.O_RDWR | os.O_CLOEXEC)
        arrivals.append(Arrival(opened, Landing(part, data, chart, in_memory=in_memory), key, version))
        arrivals[-1].old = bytearray(
            len(arrivals[-1].old)
        )  # what was there before is looked at by the parent
    runs = [Run(arrivals[i], first, last) for i, first, last in job["runs"]]
    with open_store(job["uri"], Access(**job["access"])) as store:
        fetch = Fetch(store, arrivals, runs, verify=job["verify"], workers=job["workers"])
        fetch.start()
        fetch.wait_all()
        fetch.join()
