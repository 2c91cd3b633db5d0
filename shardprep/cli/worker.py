"""shardprep worker"""

from __future__ import annotations

import os
import signal
from types import FrameType

import click

from shardprep_runtime.shard.shard_set import ShardSet

from . import parse
from .launching import ENDED


@click.command("worker")
@click.option(
    "--manifest",
    "source",
    type=parse.STORE,
    required=True,
    metavar="SOURCE",
    help="The shard set: s3://bucket/prefix, or a folder.",
)
@click.option("--pp-rank", type=click.IntRange(0), help="The stage to hold, from 0.")
@click.option("--spare", is_flag=True, help="Hold no stage until another worker is lost.")
@click.option(
    "--spare-for",
    type=click.IntRange(0),
    multiple=True,
    metavar="STAGE",
    help="A stage that a spare may have to take; may be given several times.  [default: all]",
)
@click.option("--master", required=True, metavar="HOST:PORT", help="Where the front end's workers meet.")
@click.option(
    "--stages",
    type=parse.StageList(),
    help="Layers of all stages, so that fetching can begin before the front end is there: 0-15,16-31.  [default: as the "
    "front end says]",
)
@click.option(
    "-tp",
    "--tensor-parallel-size",
    type=click.IntRange(1, 4096),
    help="Processes that share the stage; with --stages.  [default: as the front end says]",
)
@click.option(
    "--tp-rank",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of this process among them.",
)
@click.option(
    "--group",
    metavar="NAME",
    help="Name that the tensor ranks of one worker share, and no others.  [default: the worker's name]",
)
@click.option(
    "--name", metavar="NAME", help="Name by which the front end calls it.  [default: stage-N, or spare]"
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--dtype", help="float32, bfloat16, ...  [default: as the front end says]")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads to compute with.  [default: torch's]"
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Sequences whose caches are kept; the least recently used go first.",
)
@click.option(
    "--wait",
    type=parse.Duration(),
    default="10m",
    show_default=True,
    help="Time to wait for the front end.",
)
@click.option(
    "--reconnect/--no-reconnect",
    default=True,
    show_default=True,
    help="When the front end goes, keep the stage and wait for the next one at the same address, or end.",
)
@parse.revision_option
@click.option("--manifest-digest", metavar="sha256:...", help="The digest that the manifest must have.")
@click.option(
    "--verify",
    type=click.Choice(["blocks", "headers", "off"]),
    default="blocks",
    show_default=True,
    help="What this worker checks of its weights.",
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Folder in which this host's workers keep what they fetch.  [default: SHARDPREP_CACHE_DIR]",
)
@click.option("--no-cache", is_flag=True, help="Fetch into memory alone.")
@parse.connections_option
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that fetch, with as many connections each.",
)
@parse.set_options
def command(
    pp_rank: int | None,
    spare: bool,
    spare_for: tuple[int, ...],
    master: str,
    stages: list[tuple[int, int]] | None,
    tensor_parallel_size: int | None,
    tp_rank: int,
    group: str | None,
    name: str | None,
    device: str,
    dtype: str | None,
    threads: int | None,
    max_sequences: int,
    wait: float,
    reconnect: bool,
    shard_set: ShardSet,
) -> None:
    """Hold one stage of a model for `shardprep serve --workers elsewhere`, on this host.

    It fetches and verifies the tensors of that stage alone, proves them by a forward, and joins the front end at --master,
    with which it shares the secret SHARDPREP_SECRET:

    \b
        export SHARDPREP_SECRET=...
        shardprep worker --manifest s3://bucket/llama-70b --pp-rank 1 --master 10.0.0.5:7070

    It may be started before the front end. It ends with status 1 when the front end refuses it, does not come in time, or
    (with --no-reconnect) goes away. A tensor rank also ends when another one of its stage is lost. Have systemd or
    Kubernetes start it again.
    """
    from shardprep_runtime.workers.worker import Compute, WorkerOptions
    from shardprep_runtime.workers.worker_process import WorkerJob, run_worker

    if (pp_rank is None) != spare:
        raise click.UsageError("give --pp-rank N, or --spare")
    if spare_for and not spare:
        raise click.UsageError("--spare-for is for a --spare")
    if stages is None and tensor_parallel_size is not None:
        raise click.UsageError(
            "--tensor-parallel-size goes with --stages; without it the front end says both"
        )
    options = WorkerOptions(
        shard_set=shard_set,
        stages=tuple(stages or ()),
        pp_rank=pp_rank,
        spare_for=spare_for or None,
        tensor_parallel_size=tensor_parallel_size or 1,
        tp_rank=tp_rank,
        compute=Compute(device, dtype, threads, max_sequences),
    )
    job = WorkerJob(options=options, master=master, name=name, group=group, wait=wait, reconnect=reconnect)
    # the first process of a container ignores a SIGTERM for which it has no handler
    signal.signal(signal.SIGTERM, _end)
    try:
        run_worker(job, say=click.echo)
    except (SystemExit, KeyboardInterrupt) as ended:
        os._exit(ENDED if isinstance(ended, SystemExit) else 128 + signal.SIGINT)


def _end(_: int, __: FrameType | None) -> None:
    raise SystemExit(ENDED)
