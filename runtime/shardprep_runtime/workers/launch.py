"""Put a pipeline together: workers that a launcher starts, the transport that reaches them, what takes over for them.

    with launch("s3://bucket/llama-70b", stages=2) as running:
        running.pipeline ...

    with launch("s3://bucket/llama-70b", stages=4, launcher=RayActors(placement="STRICT_SPREAD")) as running: ...

By default workers are processes of this host, and end with this one, however it ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..format.grid import Stages
from ..format.manifest import Manifest
from ..format.view import Place, choose_stages, plan_view
from ..shard.shard_set import ShardSet, open_set
from .launchers.crew import Crew
from .launchers.launcher import Launcher, Listener, Started
from .launchers.processes import Processes
from .meeting import Meeting
from .pipeline import Pipeline
from .policy import Event, Policy
from .transport import Transport
from .worker import CPU, Compute, WorkerOptions

HERE = Processes()
"""Processes of this host, with links between them."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What runs: a pipeline, and the workers that it leads through."""

    pipeline: Pipeline
    """Sends steps through the workers, whoever holds the stages."""
    crew: Crew
    """The workers, as their launcher has gathered them."""
    shard_set: ShardSet
    """What all of them hold, whatever its revision is moved to meanwhile: its digest is said."""

    @property
    def transport(self) -> Transport:
        """What reaches the workers."""
        return self.crew.transport

    @property
    def meeting(self) -> Meeting | None:
        """Where workers meet; None where all stages are in this process."""
        return self.crew.meeting

    @property
    def workers(self) -> Mapping[str, list[Started]]:
        """Processes that the launcher has started and that run, by worker; tensor rank 0 first."""
        return self.crew.workers


@contextlib.contextmanager
def launch(
    source: str | os.PathLike[str] | ShardSet,
    *,
    stages: Sequence[Sequence[int]] | int | None = None,
    tensor_parallel_size: int = 1,
    launcher: Launcher = HERE,
    compute: Compute = CPU,
    policy: Policy | None = None,
    timeout: float | None = None,
    listener: Listener | None = None,
) -> Iterator[Launch]:
    """Have a launcher start, or wait for, the workers of a split model; end them at the end of the `with`.

    Args:
        source: The shard set. A ShardSet also says its revision, digest and cache, and what is verified.
        stages: Layers [start, stop) of each, or how many; default: those of the split, else one.
        tensor_parallel_size: Processes that share each stage.
        launcher: Who starts the workers, and what carries steps between them.
        compute: What each worker computes with. `device="cuda"` is a device of its own for each process. Where the
            launcher starts the workers they share its cores, unless `threads` says otherwise.
        policy: What is done about lost workers; spares, too.
        timeout: Seconds in which all must be there; None: however long it takes.
        listener: Is told what happens.

    Raises:
        InputError, ManifestError, LayoutError, StoreError: Before anything is started.
        ShardprepError: What the first worker that fails says; WorkerError where not all came in time.
    """
    policy, told = policy or Policy(), listener or Listener()

    # 1) what is run: one manifest for all workers, whatever the revision is moved to meanwhile
    shard_set, manifest = open_set(source).pinned()
    options = WorkerOptions(
        shard_set=shard_set,
        stages=_stages_of(manifest, stages, tensor_parallel_size),
        tensor_parallel_size=tensor_parallel_size,
        compute=compute,
    )
    with contextlib.ExitStack() as stack:
        # 2) workers, all of which are there
        crew = stack.enter_context(launcher.gather(options, policy, timeout, told))

        # 3) what leads through them, and around those that are lost
        def happened(event: Event) -> None:
            if event.kind in ("promoted", "dropped"):
                crew.refill()
            told.event(event)

        is_local = crew.meeting is None
        pipeline = Pipeline(
            crew.transport,
            options.stages,
            policy if crew.may_grow else replace(policy, replacement_timeout=0.0),
            fallback=_fallback_of(options) if policy.fallback and not is_local else None,
            replace=crew.replace,
            on_event=happened,
        )

        # 4) the end: who ends then is not lost
        stack.callback(pipeline.close)
        stack.callback(crew.stop)
        yield Launch(pipeline, crew, shard_set)


def _fallback_of(options: WorkerOptions) -> Callable[[], Transport]:
    """Makes what goes on in this process."""

    def open_here() -> Transport:
        from .local import open_fallback

        return open_fallback(options.shard_set, compute=replace(options.compute, device="cpu", threads=None))

    return open_here


def _stages_of(
    manifest: Manifest, stages: Sequence[Sequence[int]] | int | None, tensor_parallel_size: int
) -> Stages:
    """The stages that are run. Raises LayoutError where the shard set cannot be cut so."""
    if stages is None:
        chosen = manifest.stages or choose_stages(manifest)
    elif isinstance(stages, int):
        chosen = choose_stages(manifest, pipeline_parallel_size=stages)
    else:
        chosen = choose_stages(manifest, stages=stages)
    for pp_rank in range(len(chosen)):
        plan_view(
            manifest,
            Place.of_stage(pp_rank, stages=chosen, tensor_parallel_size=tensor_parallel_size),
        )
    return chosen
