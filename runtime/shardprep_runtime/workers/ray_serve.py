"""Serve a shard set with Ray Serve: a replica is our HTTP front end, and behind it workers that are actors of Ray.

    serve run shardprep_runtime.workers.ray_serve:build source=s3://bucket/llama tensor_parallel_size=2

A replica answers what `shardprep serve` answers. Where a worker is lost, Serve replaces the replica with its workers. It
is for small models and for trying things out; what serves many users is an engine (ray.serve.llm, see ray_llm.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import environment
from ..errors import InputError
from ..shard import options as words
from ..shard.shard_set import ShardSet
from .http.app import build_app, check_installed
from .launch import launch
from .launchers.launcher import Listener
from .launchers.ray_actors import RayActors
from .policy import Policy
from .text.generate import Generator
from .worker import Compute

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `build` can be told, by `serve run` (name=value) or as `args` of a Serve config."""

    shard_set: ShardSet
    """The shard set, the same on every node, by the words of shard/options.py."""
    model: str | None = None
    """Name of the model in requests; None: the last part of the source."""
    tensor_parallel_size: int = 1
    """Workers of each replica, which share the model."""
    dtype: str | None = None
    """What the model computes in: float32, bfloat16, ...; None: what its config says."""
    num_replicas: int = 1
    """How many replicas there are, each with workers of its own."""
    cpus_per_worker: float = 1
    """What Ray sets aside for each worker."""
    request_timeout_s: float = 600
    """Seconds after which a step of a request counts as hung, and its replica is replaced."""
    health_check_period_s: float = 5
    """Seconds between two questions to the model."""

    @property
    def name(self) -> str:
        """Name of the model in requests."""
        return self.model or self.shard_set.source.rstrip("/").rpartition("/")[2]


def read_options(args: Mapping[str, object]) -> Options:
    """`args` as a Serve config or a command line gives them. Raises InputError for what is not an option, or no such value."""
    if not args.get("source"):
        raise InputError("source: give the folder or URI of a shard set (source=s3://bucket/prefix)")
    found = words.read_options(Options, args, from_text=True)
    for name, least in (("tensor_parallel_size", 1), ("num_replicas", 1), ("cpus_per_worker", 0)):
        if getattr(found, name) < least:
            raise InputError(f"{name} is {getattr(found, name)}, expected at least {least}")
    return found


def build(args: dict[str, Any]) -> Application:
    """The Serve application; `args` are `Options` by name."""
    check_installed()
    from ray import serve

    options = read_options(args)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="WorkerGroup",
        num_replicas=options.num_replicas,
        # the replica itself only waits for its workers, whose places are set aside together
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[{"CPU": options.cpus_per_worker}] * options.tensor_parallel_size,
        placement_group_strategy="PACK",
        health_check_period_s=options.health_check_period_s,
    )
    found: Application = deployment.bind(options)
    return found


class Replica:
    """The front end and its workers. Serve starts it, asks for its health, and replaces it where that fails."""

    def __init__(self, options: Options) -> None:
        """Raises what makes a start hopeless (manifest, layout) before a worker is started, then what one of them says."""
        self._options = options
        self._stack = ExitStack()
        running = self._stack.enter_context(
            launch(
                options.shard_set,
                stages=1,
                tensor_parallel_size=options.tensor_parallel_size,
                launcher=RayActors(cpus=options.cpus_per_worker),
                compute=Compute(dtype=options.dtype),
                # another replica takes over, not another worker: Serve sees to both nodes and places
                policy=Policy(step_timeout=options.request_timeout_s, replace=False, fallback=False),
                listener=Listener(_say),
            )
        )
        folder = self._stack.enter_context(running.shard_set.side_files())
        self._generator = Generator.from_folder(running.pipeline, folder)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._app = build_app(
            self._generator,
            model=self._options.name,
            secret=environment.secret(),
            api_key=environment.api_key(),
        )
        return self._app

    async def check_health(self) -> None:
        """Serve's question, which replaces the replica where this raises: a forward of the model."""
        await self._app.state.front.control.probed()

    def __del__(self) -> None:
        self._stack.close()


def _say(line: str) -> None:
    print(f"shardprep: {line}", flush=True)
