"""A front end whose workers are Ray's actors, in a process of its own that takes orders, for test_ray_actors.

    python ray_driver.py RAY'S FOLDER

Ray and its processes are in warnings, threads and sockets of their own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shardprep_runtime.errors import ShardprepError
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.launch import Launch, launch
from shardprep_runtime.workers.launchers.launcher import Listener
from shardprep_runtime.workers.launchers.ray_actors import RayActors
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.worker import Compute
from split_greedy import COUNT, STAGES


class Driver:
    def __init__(self) -> None:
        self.running: Launch | None = None
        self.said: list[str] = []
        self._stack = ExitStack()

    def start(
        self,
        source: str,
        digest: str | None,
        *,
        how: dict[str, Any],
        policy: dict[str, Any],
        **more: Any,
    ) -> list[str]:
        """Names of the workers; `how` and `policy`: fields of RayActors and Policy."""
        self.said.clear()
        self.running = self._stack.enter_context(
            launch(
                open_set(source, digest=digest, cache=None),
                **{"stages": STAGES, "timeout": 150, **more},
                launcher=RayActors(**how),
                compute=Compute(dtype="float32"),
                policy=Policy(**{"probe_period": 0, "fallback": False, **policy}),
                listener=Listener(self.said.append),
            )
        )
        return sorted(self.running.transport.workers())

    def close(self) -> None:
        self._stack.close()

    @property
    def launched(self) -> Launch:
        assert self.running is not None
        return self.running

    def workers(self) -> dict[str, Any]:
        return {name: asdict(info) for name, info in self.launched.transport.workers().items()}

    def processes(self) -> dict[str, list[int | None]]:
        """Of each worker that runs, one for each tensor rank."""
        return {name: [each.pid for each in ranks] for name, ranks in self.launched.workers.items()}

    def lines(self) -> list[str]:
        return self.said

    def secret(self) -> str:
        """What front end and workers share here."""
        meeting = self.launched.meeting
        assert meeting is not None
        return meeting._secret

    def route(self) -> Any:
        return self.launched.pipeline.route

    def events(self) -> list[str]:
        return [each.kind for each in self.launched.pipeline.events]

    def health(self) -> list[str | None]:
        """What a forward of each stage gave."""
        return [each.probe for each in self.launched.pipeline.health()]

    def greedy(self, prompt: list[int], stage: int | None = None, number: int = 0) -> list[int]:
        """Tokens after the prompt; `number` is sent to the worker that holds `stage` in the middle of it."""
        found: list[int] = []
        given = torch.tensor([prompt])
        with self.launched.pipeline.sequence() as sequence:
            while len(found) < COUNT:
                if stage is not None and len(found) == COUNT // 2:
                    self.signal(stage, number)
                    stage = None
                given = sequence.feed(given)[:, -1:].argmax(-1)
                found.append(int(given))
        return found

    def signal(self, stage: int, number: int) -> int:
        """The process of the worker that holds a stage, which is sent a signal."""
        route = self.launched.pipeline.route
        assert route is not None
        pid = self.launched.transport.workers()[route[stage]].pid
        os.kill(pid, signal.Signals(number))
        return pid

    def wait_for_spare(self) -> str:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            for name, info in self.launched.transport.workers().items():
                if info.pp_rank is None:
                    return name
            time.sleep(0.05)
        raise TimeoutError


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
        except ShardprepError as error:
            answer(error={"error": type(error).__name__, "message": str(error)})
        except Exception as error:  # noqa: BLE001 - the test sees it
            answer(error={"error": type(error).__name__, "message": repr(error)})
    ray.shutdown()


if __name__ == "__main__":
    main()
