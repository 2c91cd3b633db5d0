"""Hold one stage of a model in a process, whichever way it is reached: fetch, build, step, prove, take another.

A worker begins to fetch before it imports torch, and says what its start took. A spare fetches and verifies the shards
of all stages that it may have to take. It builds each once, so that nothing is left to import, and keeps only the shards.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..errors import InputError, IntegrityError, ShardprepError, WorkerError, quote
from ..format.grid import Stages
from ..format.read_manifest import read_named
from ..format.view import Place
from ..shard.prefetch import Prefetch
from ..shard.shard_set import ShardSet
from .tensor_group import IDLE, Command, Op, TensorGroup
from .transport import Health, Step, Timing, WorkerInfo, check_name

if TYPE_CHECKING:
    import torch

    from ..stage.stage import Stage

BETWEEN_STEPS: Final = 0.05
"""Seconds that the leader of tensor ranks waits for a step to end before it leaves the sign of life to that step."""


@dataclass(frozen=True, slots=True)
class Compute:
    """What a worker computes with."""

    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: str | None = None
    """float32, bfloat16, ...; None: that of the model's config."""
    threads: int | None = None
    """Threads that torch computes with; None: as torch likes."""
    max_sequences: int = 64
    """How many sequences' caches it holds; the one that was used least recently goes first."""


CPU: Final = Compute()
"""As torch likes, on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What a worker holds, and how it comes by it."""

    shard_set: ShardSet
    stages: Stages
    """Layers [start, stop) of all stages."""
    pp_rank: int | None = None
    """Its stage; None: a spare."""
    spare_for: tuple[int, ...] | None = None
    """Stages that a spare may have to take; None: all."""
    tensor_parallel_size: int = 1
    tp_rank: int = 0
    compute: Compute = CPU

    def place(self, pp_rank: int) -> Place:
        """The place of its shard of a stage."""
        return Place.of_stage(
            pp_rank,
            stages=self.stages,
            tp_rank=self.tp_rank,
            tensor_parallel_size=self.tensor_parallel_size,
        )

    @property
    def may_hold(self) -> tuple[int, ...]:
        """The stages whose shards it fetches."""
        if self.pp_rank is not None:
            return (self.pp_rank,)
        return self.spare_for if self.spare_for is not None else tuple(range(len(self.stages)))


def check_options(options: WorkerOptions) -> WorkerOptions:
    """`options` if a worker can be started with them. Raises InputError."""
    count = len(options.stages)
    if not options.may_hold:
        raise InputError("a spare needs a stage; name those that it may have to take")
    for pp_rank in options.may_hold:
        if not 0 <= pp_rank < count:
            raise InputError(f"pp_rank {pp_rank}: there are {count} stages, from 0 to {count - 1}")
    if not 0 <= options.tp_rank < options.tensor_parallel_size:
        raise InputError(
            f"tp_rank {options.tp_rank}: of {options.tensor_parallel_size} tensor ranks they go from 0 to "
            f"{options.tensor_parallel_size - 1}"
        )
    if options.shard_set.is_remote and options.shard_set.cache is None and len(options.may_hold) > 1:
        raise InputError(
            f"a spare for {len(options.may_hold)} stages without a cache would hold the shards of all of them in "
            "memory; give it a cache, or say which one stage it is for (--spare-for)"
        )
    return options


class Clock:
    """What a start takes, by what it does, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.monotonic()

    def end(self, what: str) -> None:
        """What was done since the last time was this."""
        now = time.monotonic()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._mark
        self._mark = now


class Worker:
    """A stage, or none yet, in this process. Safe to use from several threads: one forward at a time."""

    def __init__(
        self,
        name: str,
        options: WorkerOptions,
        *,
        meet: Callable[[], TensorGroup] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Prepare nothing yet.

        Args:
            options: What it holds.
            meet: How this process finds the other tensor ranks of its stage, once its shard is here.
            clock: Of the process's start, where that began before.
        """
        self.name = check_name(name)
        """Set it to the name that the front end gives (`Membership.name`)."""
        self.options = check_options(options)
        if (meet is None) != (options.tensor_parallel_size == 1):
            raise InputError(
                "tensor_parallel_size is above 1 for a worker that has other tensor ranks to meet, only"
            )
        self._meet = meet
        self._group: TensorGroup | None = None
        self._turn = threading.RLock()  # of whoever computes
        self._stack = ExitStack()
        self._folder: Any = None
        self._fetches: dict[int, Prefetch] = {}
        self._fetching: threading.Thread | None = None
        self._fetch_error: BaseException | None = None
        self._stage: Stage | None = None
        self._pp_rank: int | None = None
        self._digest: str | None = options.shard_set.digest
        self._proofs: dict[int, str] = {}  # pp_rank -> what the first forward gave
        self._clock = clock or Clock()
        self._is_closed = threading.Event()
        self._idle: threading.Thread | None = None
        self.broken: str | None = None
        """Why this process cannot go on, where its tensor ranks have lost each other: it should end."""
        self.on_broken: Callable[[str], None] | None = None
        """Called with that, once, from any thread."""

    # --------------------------------------------------------------------------------------------------- the start
    def begin(self) -> None:
        """Begin to fetch, in threads; imports nothing. `prepare` does it if nobody has."""
        if self._fetching is None:
            self._fetching = threading.Thread(target=self._fetch_all, name="shardprep-fetch", daemon=True)
            self._fetching.start()

    def _fetch_all(self) -> None:
        """One shard after the other: each has the connection for itself, and the first is wanted first."""
        try:
            for pp_rank in self.options.may_hold:
                if self._is_closed.is_set():
                    return
                self._fetches[pp_rank] = self.options.shard_set.prefetch(self.options.place(pp_rank))
                self._fetches[pp_rank].wait()
        except BaseException as error:  # noqa: BLE001 - told to `prepare`, in whose thread it belongs
            self._fetch_error = error

    def prepare(self) -> None:
        """Fetch, import, build and prove by a forward; once, before anything else. Raises what any of it does."""
        self.begin()
        options = self.options
        import torch
        import transformers

        from ..stage.model import read_config

        if options.compute.threads is not None:
            torch.set_num_threads(options.compute.threads)
        self._clock.end("imports")
        self._folder = self._stack.enter_context(options.shard_set.side_files())
        is_brought = options.shard_set.is_remote  # the manifest too; a folder's may have another name
        manifest, self._digest = read_named(self._folder if is_brought else options.shard_set.source)
        mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        mapping.get(
            type(read_config(self._folder)), None
        )  # imports the model's module while its weights come
        self._clock.end("config")
        assert self._fetching is not None
        self._fetching.join()
        if self._fetch_error is not None:
            raise self._fetch_error
        if any(each.shard().manifest != manifest for each in self._fetches.values()):
            raise WorkerError(
                f"{quote(options.shard_set.source)}: revision {quote(options.shard_set.revision)} was moved while this worker started; start "
                "it again, or pin the manifest by its digest"
            )
        self._clock.end("fetch and verify")
        if self._meet is not None:
            self._group = self._meet()
            self._clock.end("meet")
        for pp_rank in options.may_hold:
            self._take(pp_rank)
            if options.pp_rank is None:
                self._drop()
            else:
                self._fetches[pp_rank].close()  # its tensors stay
        if self._group is not None and options.tp_rank == 0:
            self._idle = threading.Thread(target=self._show_life, name="shardprep-group", daemon=True)
            self._idle.start()

    def _take(self, pp_rank: int) -> None:
        """Build a stage and prove it."""
        from ..stage.stage import stage_of

        compute = self.options.compute
        self._stage = stage_of(
            self._fetches[pp_rank].shard(),
            self._folder,
            device=compute.device,
            dtype=compute.dtype,
            mesh=self._group.mesh if self._group is not None else None,
            max_sequences=compute.max_sequences,
            manifest_digest=self._digest,
        )
        self._pp_rank = pp_rank
        self._clock.end("build")
        try:
            self._prove()
        except BaseException:
            self._drop()
            raise
        self._clock.end("first forward")

    def _drop(self) -> None:
        if self._stage is not None:
            self._stage.close()
        self._stage, self._pp_rank = None, None

    def _prove(self) -> Any:
        """A forward of the stage on known inputs. Raises IntegrityError where it gives something else than it must."""
        from ..stage.probe import check_stage

        stage, pp_rank = self._held()
        found = check_stage(stage)
        first = self._proofs.setdefault(pp_rank, found.digest)
        if first != found.digest:
            raise IntegrityError(
                f"stage {pp_rank}: the same forward gives something else ({found.digest}) than at the start ({first}): "
                "memory, or the file that is mapped, has changed; replace this worker"
            )
        return found

    # ---------------------------------------------------------------------------------------------- what it is asked
    def info(self) -> WorkerInfo:
        stage = self._stage
        fetches = list(self._fetches.values())
        return WorkerInfo(
            name=self.name,
            pp_rank=self._pp_rank,
            layers=self.options.stages[self._pp_rank] if self._pp_rank is not None else None,
            host=socket.gethostname(),
            pid=os.getpid(),
            manifest_digest=self._digest or "",
            nbytes=stage.nbytes if stage is not None else sum(each.nbytes for each in fetches),
            bytes_fetched=sum(each.bytes_fetched for each in fetches),
            seconds=dict(self._clock.seconds),
        )

    def step(self, step: Step, inputs: torch.Tensor) -> tuple[torch.Tensor, Timing]:
        """Compute a step.

        Args:
            inputs: Ids of tokens for the first stage, [batch, positions]; else hidden states, [batch, positions, width].

        Returns:
            What the stage gives, on the CPU and contiguous, and what was spent on it.
        """
        import torch

        with self._turn, self._asked():
            stage, _ = self._held()
            self._lead(Command(op=Op.STEP, sequence=step.sequence, past=step.past, keep=step.keep), inputs)
            begin = time.monotonic()
            given = inputs.to(stage.device)
            middle = time.monotonic()
            with torch.no_grad():
                found = stage.step(step.sequence, given, step.past, step.keep)
            _wait_for_device(found)
            computed = time.monotonic()
            on_cpu = found.cpu().contiguous()
            end = time.monotonic()
        return on_cpu, Timing(
            self.name, compute=computed - middle, staging=(middle - begin) + (end - computed)
        )

    def health(self, *, probe: bool) -> Health:
        """Without `probe` this answers at once, also while a step is computed. Raises IntegrityError."""
        if not probe:
            if self.broken is not None:
                raise WorkerError(self.broken)
            return Health(self.info(), self._count())
        with self._turn, self._asked():
            if self._stage is None:
                return Health(self.info(), 0)
            self._lead(Command(op=Op.PROBE))
            found = self._prove()
            return Health(
                self.info(), self._count(), probe=found.digest, proven=found.proven, seconds=found.seconds
            )

    def reset(self, sequence: str) -> None:
        """Forget a sequence, once the step that is computed has ended."""
        with self._turn, self._asked():
            if self._stage is not None:
                self._lead(Command(op=Op.RESET, sequence=check_name(sequence)))
                self._stage.reset(sequence)

    def promote(self, pp_rank: int) -> WorkerInfo:
        """Take a stage, as a spare does, and prove it. Asked again for the stage that it has, it proves that anew.

        Raises:
            WorkerError: Where it has another stage.
            InputError: Where it did not prepare for this one.
        """
        with self._turn, self._asked():
            if self._pp_rank not in (None, pp_rank):
                raise WorkerError(f"holds stage {self._pp_rank} already, and cannot take stage {pp_rank}")
            if pp_rank not in self._fetches:
                can = ", ".join(map(str, self.options.may_hold))
                raise InputError(f"stage {pp_rank}: this spare has the shards of stages {can} only")
            self._lead(Command(op=Op.PROMOTE, pp_rank=pp_rank))
            self._promote(pp_rank)
            return self.info()

    def _promote(self, pp_rank: int) -> None:
        if self._pp_rank is None:
            self._clock = Clock()
            self._take(pp_rank)
        else:
            self._prove()

    def forget(self) -> None:
        """Forget all sequences, and be a spare again if it began as one: for a front end that begins anew."""
        with self._turn, self._asked():
            self._lead(Command(op=Op.FORGET))
            self._forget()

    def _forget(self) -> None:
        if self._stage is None:
            return
        for sequence in list(self._stage.sequences):
            self._stage.reset(sequence)
        if self.options.pp_rank is None:
            self._drop()

    def _held(self) -> tuple[Stage, int]:
        if self._stage is None or self._pp_rank is None:
            raise WorkerError("holds no stage; it is a spare: promote it first")
        return self._stage, self._pp_rank

    def _count(self) -> int:
        stage = self._stage
        return len(stage.sequences) if stage is not None else 0

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """What goes wrong is one of our errors; with other tensor ranks, what not all of them meet alike is the end."""
        if self.broken is not None:
            raise WorkerError(self.broken)
        if self._is_closed.is_set():
            raise WorkerError("is closed")
        try:
            yield
        except ShardprepError:
            raise
        except Exception as error:
            wrong = _said(error)
            if self._group is not None:
                wrong = self._break(str(self._group.failed(error)))
            raise WorkerError(wrong) from error

    # ------------------------------------------------------------------------------------------- the tensor ranks
    def _lead(self, command: Command, inputs: torch.Tensor | None = None) -> None:
        """Have the other tensor ranks do the same; whoever calls does it next."""
        if self._group is None or self.options.tp_rank > 0:
            return
        try:
            self._group.send(command, inputs)
        except WorkerError as error:
            self._break(str(error))
            raise

    def _break(self, why: str) -> str:
        if self.broken is None:
            self.broken = why
            if self.on_broken is not None:
                self.on_broken(why)
        return why

    def _show_life(self) -> None:
        while not self._is_closed.wait(IDLE) and self.broken is None:
            if self._turn.acquire(timeout=BETWEEN_STEPS):
                try:
                    self._lead(Command(op=Op.NOTHING))
                except WorkerError:
                    return
                finally:
                    self._turn.release()

    def follow(self) -> None:
        """Do what tensor rank 0 does, until it says that this is the end. Raises WorkerError where it has ended."""
        import torch

        assert self._group is not None
        while True:
            command, inputs = self._group.receive()
            if command.op == Op.END:
                return
            try:
                with torch.no_grad():
                    self._follow(command, inputs)
            except IntegrityError as error:
                self._group.say_error(str(error))
                raise
            except (InputError, WorkerError):
                pass  # of what was asked: the leader meets the same, and says it
            except Exception as error:
                self._group.say_error(_said(error))
                raise WorkerError(_said(error)) from error

    def _follow(self, command: Command, inputs: torch.Tensor | None) -> None:
        if command.op == Op.STEP and inputs is not None:
            stage, _ = self._held()
            stage.step(command.sequence, inputs.to(stage.device), command.past, command.keep)
        elif command.op == Op.RESET and self._stage is not None:
            self._stage.reset(command.sequence)
        elif command.op == Op.PROBE:
            self._prove()
        elif command.op == Op.PROMOTE:
            self._promote(command.pp_rank)
        elif command.op == Op.FORGET:
            self._forget()

    # --------------------------------------------------------------------------------------------------------- the end
    def close(self) -> None:
        """Let go of everything; a leader ends its followers."""
        if self._is_closed.is_set():
            return
        with self._turn:
            self._is_closed.set()
            if self._group is not None:
                if self.options.tp_rank == 0 and self.broken is None and self._idle is not None:
                    with suppress(WorkerError):  # they have ended
                        self._group.send(Command(op=Op.END))
                self._group.close()
            self._drop()
        if self._idle is not None:
            self._idle.join()
        for fetch in list(self._fetches.values()):
            fetch.close()
        if self._fetching is not None:
            self._fetching.join()
        self.clean()

    def clean(self) -> None:
        """Remove what lies outside of this process: config and tokenizer of a store's set."""
        self._stack.close()


def _wait_for_device(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        import torch

        torch.cuda.synchronize(tensor.device)


def _said(error: BaseException) -> str:
    """An error of a library on one line: torch puts a stack of C++ calls below its first."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {quote(lines[0], limit=500)}" if lines else type(error).__name__
