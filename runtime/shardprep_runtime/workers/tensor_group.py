"""Have the tensor ranks of one stage do the same at the same time: rank 0 leads, the others follow.

The ranks of a stage are a process group of their own, the default one of their processes, which is also what
transformers' tensor parallelism talks over. Whoever asks the worker asks the leader. It broadcasts a command of a fixed
size, and the inputs after it, and all do it; nothing is pickled. A rank that fails otherwise than all would ends, which
the leader learns from the next thing that they do together: the group cannot go on then, and its processes end.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from .. import environment
from ..errors import InputError, WorkerError, quote
from ..stage.stage import Keep
from .addresses import interface_of
from .sealed import (
    MAX_MESSAGE,
    PAUSE,
    connect,
    first_line,
    seal,
    serve_store,
    unseal,
    wait_for,
)

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store, TCPStore
    from torch.distributed.device_mesh import DeviceMesh

GROUP: Final = "shardprep/group/{}"
"""Where the leader of a group says in the meeting's store where its ranks meet."""

TIMEOUT: Final = 120.0
"""Seconds after which a rank that waits for the others gives up."""

IDLE: Final = 10.0
"""Seconds between two signs of life of a leader that has nothing to do."""

VERSION: Final = 1
NAME_WORDS: Final = 8
HEADER_WORDS: Final = 10 + NAME_WORDS
MOST_ELEMENTS: Final = 2**31
"""Most elements of the inputs of one step; a header that says more is not believed."""

DTYPES: Final = ("int64", "float32", "bfloat16", "float16", "float64")
"""Dtypes of the inputs, by number."""

KEEPS: Final[tuple[Keep, ...]] = ("last", "all")


class Op(IntEnum):
    """What a leader has its followers do."""

    NOTHING = 0
    STEP = 1
    RESET = 2
    PROBE = 3
    PROMOTE = 4
    FORGET = 5
    END = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One thing that all ranks do."""

    op: Op
    sequence: str = ""
    past: int = 0
    keep: Keep = "last"
    pp_rank: int = 0


class TensorGroup:
    """The tensor ranks of one stage, as one of them sees them. One thread at a time."""

    def __init__(self, store: Store, tp_rank: int, size: int, mesh: DeviceMesh) -> None:
        self.tp_rank, self.size, self.mesh = tp_rank, size, mesh
        self._store = store

    def send(self, command: Command, inputs: torch.Tensor | None = None) -> None:
        """Have the followers do something.

        Args:
            command: What.
            inputs: What it is done to: ids of tokens, or hidden states.

        Raises:
            WorkerError: Where one of them has ended.
        """
        import torch
        import torch.distributed as dist

        header = torch.zeros(HEADER_WORDS, dtype=torch.int64)
        name = command.sequence.encode("ascii")
        words = [
            VERSION,
            command.op,
            command.past,
            KEEPS.index(command.keep),
            command.pp_rank,
            len(name),
            *_shape(inputs),
        ]
        header[: len(words)] = torch.tensor(words, dtype=torch.int64)
        padded = name.ljust(8 * NAME_WORDS, b"\0")
        header[-NAME_WORDS:] = torch.frombuffer(bytearray(padded), dtype=torch.int64)
        try:
            dist.broadcast(header, 0)
            if inputs is not None:
                dist.broadcast(inputs.cpu().contiguous(), 0)
        except RuntimeError as error:
            raise self.failed(error) from None

    def receive(self) -> tuple[Command, torch.Tensor | None]:
        """What the leader wants next. Raises WorkerError where it has ended."""
        import torch
        import torch.distributed as dist

        header = torch.zeros(HEADER_WORDS, dtype=torch.int64)
        try:
            dist.broadcast(header, 0)
            words: list[int] = header.tolist()
            command, shape, dtype = _read(words)
            inputs = None
            if shape is not None:
                inputs = torch.empty(shape, dtype=getattr(torch, DTYPES[dtype]))
                dist.broadcast(inputs, 0)
        except RuntimeError as error:
            raise WorkerError(f"the leader of the tensor ranks has ended: {first_line(error)}") from None
        return command, inputs

    def failed(self, error: BaseException) -> WorkerError:
        """The error to raise for one that broke the group: what a follower said before it ended, if one did."""
        with suppress(RuntimeError):
            for rank in range(1, self.size):
                if self._store.check([f"error/{rank}"]):
                    said = self._store.get(f"error/{rank}")[:MAX_MESSAGE].decode("ascii", "replace")
                    return WorkerError(f"tensor rank {rank}: {quote(said, limit=1000)}")
        return WorkerError(f"the tensor ranks of this worker have lost each other: {first_line(error)}")

    def say_error(self, message: str) -> None:
        """Leave word for the leader of why this rank ends."""
        with suppress(RuntimeError):
            self._store.set(f"error/{self.tp_rank}", quote(message, limit=1000))

    def close(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _shape(inputs: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Dtype's number + 1 (0: no inputs), batch, positions, width (0: ids)."""
    if inputs is None:
        return 0, 0, 0, 0
    dtype = DTYPES.index(str(inputs.dtype).removeprefix("torch."))
    batch, positions, *width = inputs.shape
    return dtype + 1, batch, positions, width[0] if width else 0


def _read(words: list[int]) -> tuple[Command, tuple[int, ...] | None, int]:
    """A header: command, shape of the inputs that follow, number of their dtype. Raises WorkerError."""
    version, op, past, keep, pp_rank, length, dtype, batch, positions, width = words[:10]
    if (
        version != VERSION
        or op not in list(Op)
        or not 0 <= keep < len(KEEPS)
        or not 0 <= length <= 8 * NAME_WORDS
        or not 0 <= dtype <= len(DTYPES)
        or min(past, pp_rank, batch, positions, width) < 0
        or batch * positions * max(width, 1) > MOST_ELEMENTS
    ):
        raise WorkerError("the leader of the tensor ranks says what no shardprep of this version does")
    name = b"".join(word.to_bytes(8, "little", signed=True) for word in words[-NAME_WORDS:])[:length]
    command = Command(
        op=Op(op), sequence=name.decode("ascii", "replace"), past=past, keep=KEEPS[keep], pp_rank=pp_rank
    )
    shape = None if dtype == 0 else (batch, positions, width) if width else (batch, positions)
    return command, shape, dtype - 1


# --------------------------------------------------------------------------------------------------------- the meeting
@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The tensor ranks of one worker, and which of them this process is."""

    name: str
    """What they have in common, and no others."""
    tp_rank: int
    size: int
    """How many there are."""
    device: str
    """What they compute on: cpu, cuda or cuda:N."""


def form_group(
    store: Store, ranks: Ranks, *, host: str, secret: str, nonce: str, timeout: float = 600.0
) -> TensorGroup:
    """Wait for the other tensor ranks of a worker, and be one group with them.

    Args:
        store: Which all of them reach; the leader leaves word there of where the group meets.
        host: The address of this process, at which the others reach it.
        secret: What they share with the front end.
        nonce: That of the front end's plan.
        timeout: Seconds in which all must be there.

    Raises:
        WorkerError: Where not all come in time.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    deadline = time.monotonic() + timeout
    place = GROUP.format(ranks.name)
    tp_rank, size = ranks.tp_rank, ranks.size
    if tp_rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        own = serve_store(host, socket.create_server((host, 0), family=family, backlog=128))
        said = {"host": host, "port": own.port, "nonce": secrets.token_hex(16)}
        store.set(place, seal(secret, place, nonce, said))
        _all_here(own, ranks, deadline)
    else:
        own = _reach(store, place, ranks, secret=secret, nonce=nonce, deadline=deadline)
    environment.use_interface(interface_of(host))
    kind = ranks.device.partition(":")[0]
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:nccl"
    try:
        dist.init_process_group(
            backend, store=own, rank=tp_rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
        )
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("tp",))
    except RuntimeError as error:
        raise WorkerError(
            f"the tensor ranks of {quote(ranks.name)} did not come together: {first_line(error)}"
        ) from None
    return TensorGroup(own, tp_rank, size, mesh)


def _reach(store: Store, place: str, ranks: Ranks, *, secret: str, nonce: str, deadline: float) -> TCPStore:
    """The leader's store. What an earlier leader of that name left is not there any more when it is tried."""
    while True:
        raw = wait_for(store, place, max(0.0, deadline - time.monotonic()))
        if raw is None:
            raise WorkerError(f"{quote(place)}: no leader (tensor rank 0) came in time")
        said = unseal(secret, place, nonce, raw)
        if not isinstance(said.get("host"), str) or type(said.get("port")) is not int:
            raise InputError("a message that no shardprep made; look whether versions are the same")
        with suppress(WorkerError):
            own = connect(said["host"], said["port"], min(deadline, time.monotonic() + 1))
            _all_here(own, ranks, deadline)
            return own
        if time.monotonic() > deadline:
            raise WorkerError(f"{quote(place)}: the leader (tensor rank 0) cannot be reached")
        time.sleep(PAUSE)


def _all_here(own: TCPStore, ranks: Ranks, deadline: float) -> None:
    """Return once all ranks are: only then is a process group begun, which waits less patiently."""
    try:
        own.set(f"here/{ranks.tp_rank}", str(os.getpid()))
        while not own.check([f"here/{rank}" for rank in range(ranks.size)]):
            if time.monotonic() > deadline:
                missing = [rank for rank in range(ranks.size) if not own.check([f"here/{rank}"])]
                raise WorkerError(f"tensor ranks {json.dumps(missing)} of this worker did not come in time")
            time.sleep(PAUSE)
    except RuntimeError as error:
        raise WorkerError(f"the leader of the tensor ranks has ended: {first_line(error)}") from None
