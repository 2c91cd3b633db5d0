"""Launch the workers of a split model for `run` and `serve`: their common options, and what is told of the workers."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shardprep_runtime.errors import quote
from shardprep_runtime.format.grid import Stages, parse_stages
from shardprep_runtime.shard.shard_set import ShardSet, open_set

from . import parse, render

if TYPE_CHECKING:
    from shardprep_runtime.workers.launchers.launcher import Launcher
    from shardprep_runtime.workers.pipeline import Pipeline
    from shardprep_runtime.workers.policy import Event
    from shardprep_runtime.workers.text.generate import Generator
    from shardprep_runtime.workers.transport import WorkerInfo

    _CountType = click.ParamType[int | Stages]
else:  # only the newest clicks let the class be subscripted when it runs
    _CountType = click.ParamType

TRANSPORTS: Final = ("links", "rpc", "ray", "local")

ENDED: Final = 128 + signal.SIGTERM
"""The exit status of a process that a SIGTERM ends, as a shell reports it."""


class StageCount(_CountType):
    """The number of even stages, or the layers of each: 2, or 0-5,6-11."""

    name = "stages"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Stages:
        if isinstance(value, int | tuple):
            return value
        if value.isdecimal():
            count = int(value) if len(value) < 5 else 0
            if not 0 < count <= 4096:
                self.fail(
                    f"{value} stages; expected 1 to 4096, or the layers of each: 0-15,16-31", param, ctx
                )
            return count
        stages = parse_stages(value)
        if stages is None:
            self.fail(
                f"{value!r} is not a list of stages; write how many, or the layers of each: 0-15,16-31",
                param,
                ctx,
            )
        return tuple(stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The options of `run` and `serve` that say how a model is split over workers."""

    shard_set: ShardSet
    stages: int | Stages | None
    tensor_parallel_size: int
    spares: int
    transport: str
    no_replace: bool
    no_fallback: bool
    draft: Path | str | None
    draft_tokens: int
    max_in_flight: int
    device: str
    threads: int | None
    dtype: str | None
    step_timeout: float | None


def split_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a model is split over workers to a command, which gets them as one `split: Split`."""

    @functools.wraps(command)  # keeps the options that are declared below this decorator
    def with_split(*arguments: Any, **options: Any) -> Any:
        given = {each.name: options.pop(each.name) for each in fields(Split)}
        return command(*arguments, split=Split(**given), **options)

    found: Callable[..., Any] = parse.set_options(with_split)
    for option in (
        click.option("--manifest-digest", metavar="sha256:...", help="The digest that the manifest must have."),
        parse.revision_option,
        click.option(
            "--verify",
            type=click.Choice(["blocks", "headers", "off"]),
            default="blocks",
            show_default=True,
            help="What each worker checks of its own weights.",
        ),
        click.option(
            "--step-timeout",
            type=parse.Duration(),
            help="Time after which a step counts as hung.  [default: 30s, and more for long prompts]",
        ),
        click.option("--dtype", help="dtype of the model: float32, bfloat16, ...  [default: as stored]"),
        click.option(
            "--threads",
            type=click.IntRange(1, 4096),
            help="Threads that each worker computes with.  [default: a share of this host's cores]",
        ),
        click.option(
            "--device", default="cpu", show_default=True, help="Device of each worker: cpu, cuda, cuda:1."
        ),
        click.option(
            "--max-in-flight",
            type=click.IntRange(1, 1024),
            default=8,
            show_default=True,
            help="Sequences that are computed at once; the stages work on different ones.",
        ),
        click.option(
            "--draft-tokens", type=click.IntRange(1, 64), default=5, show_default=True, help="Guessed at a time."
        ),
        click.option(
            "--draft",
            type=parse.STORE,
            metavar="SHARD_SET",
            help="A small model with the same vocabulary, which runs in this process and guesses tokens that one pass "
            "of the stages proves. Greedy only.",
        ),
        click.option(
            "--no-fallback", is_flag=True, help="Never compute in this process where no worker can be had."
        ),
        click.option("--no-replace", is_flag=True, help="Do not start a worker for one that was lost."),
        click.option(
            "--transport",
            type=click.Choice(TRANSPORTS),
            default="links",
            show_default=True,
            help="How workers are reached; local: all stages in this process.",
        ),
        click.option("--spares", type=click.IntRange(0, 256), default=0, show_default=True,
                     help="Workers that hold no stage until one is lost."),
        click.option("-tp", "--tensor-parallel-size", type=click.IntRange(1, 4096), default=1, show_default=True,
                     help="Processes that share each stage."),
        click.option("--stages", type=StageCount(), help="Number of stages, or the layers of each: 2, or 0-5,6-11.  "
                     "[default: those of the shard set]"),
        click.argument("source", type=parse.STORE),
    ):  # fmt: skip
        found = option(found)
    return found


@contextmanager
def open_generator(split: Split, launcher: Launcher | None = None) -> Iterator[Generator]:
    """Open the workers, the pipeline, the draft model and the tokenizer.

    Args:
        launcher: Who starts the workers; default: the one that `--transport` names.
    """
    from shardprep_runtime.workers.launch import launch
    from shardprep_runtime.workers.launchers.launcher import Listener
    from shardprep_runtime.workers.launchers.words import LAUNCHERS
    from shardprep_runtime.workers.local import open_local
    from shardprep_runtime.workers.pipeline import Pipeline
    from shardprep_runtime.workers.policy import Policy
    from shardprep_runtime.workers.text.generate import Generator
    from shardprep_runtime.workers.worker import Compute
    from shardprep_runtime.workers.worker_process import quiet

    quiet()
    policy = Policy(spares=split.spares, replace=not split.no_replace, fallback=not split.no_fallback)
    if split.step_timeout is not None:
        policy = replace(policy, step_timeout=split.step_timeout)
    with ExitStack() as stack:
        running = stack.enter_context(
            launch(
                split.shard_set,
                stages=split.stages,
                tensor_parallel_size=split.tensor_parallel_size,
                launcher=launcher or LAUNCHERS[split.transport],
                compute=Compute(
                    split.device, split.dtype, split.threads, max_sequences=max(64, 2 * split.max_in_flight)
                ),
                policy=policy,
                listener=Listener(tell, tell_event),
            )
        )
        folder = stack.enter_context(running.shard_set.side_files())
        draft = None
        if split.draft is not None:
            draft = stack.enter_context(
                Pipeline(open_local(open_set(split.draft, access=split.shard_set.access)), 1)
            )
        yield Generator.from_folder(
            running.pipeline,
            folder,
            draft=draft,
            draft_tokens=split.draft_tokens,
            max_in_flight=split.max_in_flight,
        )


@contextmanager
def ended_by_sigterm(status: int) -> Iterator[None]:
    """Turn a SIGTERM into an exception, as Python does with Ctrl-C, so that everything that is open is closed.

    Args:
        status: The exit status that the process then ends with.
    """
    asked, is_over = threading.Event(), threading.Event()
    repeating: list[threading.Thread] = []

    def repeat(number: int) -> None:
        # an exception is lost where C code looks for an attribute just then, as an import does: raise it again
        while not is_over.wait(0.5):
            os.kill(os.getpid(), number)

    def end(number: int, _: object) -> None:
        if not asked.is_set():
            asked.set()
            repeating.append(threading.Thread(target=repeat, args=(number,), daemon=True))
            repeating[0].start()
        handled = sys.exc_info()[1]
        while handled is not None:
            if isinstance(handled, SystemExit | KeyboardInterrupt):
                return  # the exception is under way
            handled = handled.__context__
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(status)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        is_over.set()
        for thread in repeating:
            thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------- what is told
def tell(line: str) -> None:
    """Print a line on stderr, from any thread. A closed stderr is ignored: it must not stop a route from being mended."""
    with suppress(OSError):
        click.echo(line, err=True)


def tell_start(pipeline: Pipeline) -> None:
    """Print on stderr which worker holds what."""
    for info in pipeline.workers():
        tell(started(info))


def started(info: WorkerInfo) -> str:
    """Describe a worker that is ready, in one line."""
    what = "spare" if info.pp_rank is None else f"stage {info.pp_rank}"
    if info.layers is not None:
        what += f" (layers {info.layers[0]} to {info.layers[1] - 1})"
    return (
        f"{what}: worker {quote(info.name)}, process {info.pid} on {quote(info.host)}; {render.size(info.nbytes)}, "
        f"{render.size(info.bytes_fetched)} of them fetched"
    )


def tell_event(event: Event) -> None:
    """Print on stderr what happened to a worker."""
    tell(told(event))


def told(event: Event) -> str:
    """Describe an event in one line."""
    worker = "" if event.worker is None else f"worker {quote(event.worker)}"
    stage = "" if event.stage is None or event.stage < 0 else f"stage {event.stage}"
    of_stage = f" ({stage})" if stage else ""
    why = quote(event.message, limit=500)
    took = f" in {event.seconds:.2f} s"
    return {
        "lost": f"{worker}{of_stage} was lost: {why}",
        "retried": f"{worker}{of_stage} answers again{took}",
        "replaced": f"{worker} took {stage}{took}: {why}",
        "promoted": f"spare {quote(event.worker or '')} took {stage}{took}",
        "dropped": f"{worker}{of_stage} is not used any more: {why}",
        "fallback": f"this process took over{took}: {why}",
        "restored": f"the workers took over again{took}: {why}",
        "prefilled": f"computed {why}{took}",
        "failed": f"no worker is left to take over: {why}",
    }.get(event.kind, f"{event.kind} {worker}{of_stage}: {why}")
