"""A front end of Ray actors, in a process of its own that takes orders, for test_ray_transport.

    python ray_driver.py RAY'S FOLDER

Ray and its processes are in warnings, threads and sockets of their own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from echo_worker import EchoWorker, expected
from shardprep_runtime.errors import ShardprepError, WorkerLostError
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.ray_actors import GROUPS, RayTransport, StageActor, start_actors
from shardprep_runtime.workers.transport import Step
from shardprep_runtime.workers.worker import Compute, WorkerOptions
from split_greedy import OTHER, STAGES, greedy

IDS = torch.tensor([[1, 2, 3]])


class EchoActor(StageActor):
    """Holds no model."""

    def __init__(self, name: str, pp_rank: int | None) -> None:
        self._failure = None
        self._worker: Any = EchoWorker(name, pp_rank, 2)


class Driver:
    def __init__(self) -> None:
        self.transport: Any = None
        self.lost: list[tuple[str, float]] = []

    def begin(self, transport: RayTransport) -> list[str]:
        self.transport = transport
        self.lost = []
        transport.watch(lambda worker, why: self.lost.append((worker, time.monotonic())))
        return list(transport.workers())

    def start(self, source: str, digest: str, spares: int, **how: Any) -> list[str]:
        options = WorkerOptions(
            shard_set=open_set(source, digest=digest, cache=None),
            stages=STAGES,
            compute=Compute(dtype="float32", threads=1),
        )
        return self.begin(start_actors(options, spares=spares, **how))

    def start_echoes(self, names: dict[str, int | None], max_restarts: int) -> list[str]:
        import ray

        actors = {
            name: ray.remote(concurrency_groups=GROUPS)(EchoActor)
            .options(num_cpus=0, max_restarts=max_restarts, allow_out_of_order_execution=True)
            .remote(name, pp_rank)
            for name, pp_rank in names.items()
        }
        return self.begin(RayTransport(actors, group=None, is_ours=False))

    def close(self) -> float:
        began = time.monotonic()
        self.transport.close()
        return time.monotonic() - began

    def workers(self) -> dict[str, Any]:
        return {
            name: {"pp_rank": info.pp_rank, "layers": info.layers, "pid": info.pid}
            for name, info in self.transport.workers().items()
        }

    def greedy(self, route: Sequence[str], sequence: str) -> list[int]:
        return greedy(self.transport, route, sequence)

    def two_greedy(self, route: Sequence[str]) -> list[list[int]]:
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(greedy, self.transport, route, "one")
            other = pool.submit(greedy, self.transport, route, "other", OTHER)
            return [one.result(), other.result()]

    def step(self, route: Sequence[str], sequence: str, past: int, timeout: float) -> dict[str, Any]:
        """Seconds that it took, and what came of it."""
        began = time.monotonic()
        try:
            found = self.transport.step(route, Step(sequence, past), IDS, timeout=timeout).result(60)
        except ShardprepError as error:
            return told(error) | {"seconds": time.monotonic() - began}
        return {
            "right": torch.equal(found.logits, expected(IDS, 2)),
            "timings": [replace(each, compute=0, packing=0).worker for each in found.timings],
            "packing": found.packing,
            "seconds": time.monotonic() - began,
        }

    def steps(self, route: Sequence[str], sequences: Sequence[str]) -> dict[str, Any]:
        """All in flight together."""
        began = time.monotonic()
        steps = [self.transport.step(route, Step(each, 0), IDS, timeout=60) for each in sequences]
        right = [torch.equal(each.result(60).logits, expected(IDS, 2)) for each in steps]
        return {"right": right, "seconds": time.monotonic() - began}

    def step_of(self, route: Sequence[str], tokens: Sequence[int], past: int) -> dict[str, Any]:
        try:
            self.transport.step(route, Step("one", past), torch.tensor([tokens]), timeout=60).result(60)
        except ShardprepError as error:
            return told(error)
        return {}

    def harm_in_step(self, route: Sequence[str], sequence: str, worker: str, number: int) -> dict[str, Any]:
        pid = self.transport.workers()[worker].pid
        step = self.transport.step(route, Step(sequence, 0), IDS, timeout=60)
        time.sleep(0.5)
        began = time.monotonic()
        os.kill(pid, number)
        try:
            step.result(60)
        except WorkerLostError as error:
            return told(error) | {"seconds": time.monotonic() - began, "pid": pid}
        return {}

    def kill_idle(self, worker: str) -> dict[str, Any]:
        pid = self.transport.workers()[worker].pid
        self.lost.clear()
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while not self.lost and time.monotonic() - began < 30:
            time.sleep(0.002)
        name, at = self.lost[0]
        return {
            "worker": name,
            "seconds": at - began,
            "pid": pid,
            "there": list(self.transport.workers()),
        }

    def wait_for(self, worker: str, other_than: int) -> int:
        """The process of a worker that is there again."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            info = self.transport.workers().get(worker)
            if info is not None and info.pid != other_than:
                return int(info.pid)
            time.sleep(0.02)
        raise TimeoutError(worker)

    def health(self, worker: str, probe: bool) -> dict[str, Any]:
        found = self.transport.health(worker, probe=probe, timeout=30)
        return {"sequences": found.sequences, "probe": found.probe}

    def reset(self, worker: str, sequence: str) -> None:
        self.transport.reset(worker, sequence)

    def promote(self, worker: str, pp_rank: int) -> Any:
        found = self.transport.promote(worker, pp_rank, timeout=60)
        return found.layers

    def signal(self, pid: int, number: int) -> None:
        os.kill(pid, number)


def told(error: Exception) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "message": str(error),
        "worker": getattr(error, "worker", None),
        "is_certain": getattr(error, "is_certain", None),
    }


def main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints what its workers print
    import ray

    torch.set_num_threads(1)
    # not 127.0.0.1, which Ray takes for an address to be replaced by one that other hosts reach
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        _temp_dir=str(Path(sys.argv[1])),
        _node_ip_address="127.0.0.2",
    )
    driver = Driver()

    def answer(result: Any = None, error: Any = None) -> None:
        lines.write(json.dumps({"result": result, "error": error}) + "\n")
        lines.flush()

    answer()
    for line in sys.stdin:
        name, arguments, named = json.loads(line)
        try:
            answer(getattr(driver, name)(*arguments, **named))
        except Exception as error:  # noqa: BLE001 - the test sees it
            answer(error=told(error))
    ray.shutdown()


if __name__ == "__main__":
    import ray_driver

    ray_driver.main()  # not of __main__, which Ray would send by value
