"""One worker of the demo: start from the store, report what it cost, and the digest of every tensor. No torch.

Run as: demo_worker.py STORE RANK TP PP STAGES(json) VERIFY CACHE; prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard import check_verify
from shardprep_runtime.shard.shard_set import open_set


def status(path: str, key: str) -> int | None:
    """A number of /proc/self/io or /proc/self/status, or None where there is none."""
    try:
        with open(path) as stream:
            return next((int(line.split()[1]) for line in stream if line.startswith(key)), None)
    except OSError:
        return None


def main(store: str, rank: str, tp: str, pp: str, stages: str, verify: str, cache: str) -> None:
    anonymous = status("/proc/self/status", "RssAnon:")
    started = time.perf_counter()
    shard = open_set(store, verify=check_verify(verify), cache=cache).load(
        Place(
            rank=int(rank),
            tensor_parallel_size=int(tp),
            pipeline_parallel_size=int(pp),
            stages=json.loads(stages),
        )
    )
    shard.wait()
    milliseconds = (time.perf_counter() - started) * 1e3
    digests = {name: hashlib.sha256(shard.memory(name)).hexdigest() for name in shard}
    anonymous_after = status("/proc/self/status", "RssAnon:")
    assert "torch" not in sys.modules
    report = {
        "rank": int(rank),
        "pp_rank": shard.view.pp_rank,
        "tp_rank": shard.view.tp_rank,
        "layers": shard.view.layers,
        "tensors": len(shard.view.tensors),
        "bytes_kept": shard.nbytes,
        "bytes_needed": shard.bytes_read,
        "bytes_mapped": shard.bytes_mapped,
        "bytes_fetched": shard.bytes_fetched,
        "anonymous_kib": None
        if anonymous is None or anonymous_after is None
        else anonymous_after - anonymous,
        "milliseconds": milliseconds,
        "digests": digests,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
