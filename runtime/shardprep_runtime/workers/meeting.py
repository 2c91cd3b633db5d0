"""Have workers and the front end find each other, and prove to each other that they may.

The front end serves torch's TCPStore and puts a plan there; a worker reads it, takes a number, says what it holds, and
is welcomed or refused:

    shardprep/plan        what is run: transport, stages, manifest; with a nonce
    shardprep/members     how many numbers have been taken
    shardprep/member/N    what worker N says: name, stage, layers, manifest, process; with a nonce of its own
    shardprep/answer/N    what the front end says to that: welcome and a name, or why not

Each is JSON with an HMAC-SHA256 by the secret that both sides share, over its place, the other side's nonce and the
text; nothing is unpickled. So nobody without the secret becomes a worker or passes for the front end.

TCPStore itself asks nobody who he is, and encrypts nothing: whoever reaches its port can read, replace and delete keys,
or fill it. He cannot join, but he can keep others from it, and once a worker has joined, the links between workers are
as open as the network they run over. Keep the port within a private network, as for torch.distributed itself; an
address of the public Internet is refused unless it is asked for.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from ..errors import InputError, WorkerError, quote
from ..format.grid import Stages
from .addresses import check_host, parse_address
from .sealed import (
    PATIENCE,
    PAUSE,
    check_secret,
    connect,
    first_line,
    number_of,
    pair_of,
    seal,
    serve_store,
    text_of,
    unseal,
    wait_for,
)
from .transport import WorkerInfo, check_name

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

PLAN: Final = "shardprep/plan"
MEMBERS: Final = "shardprep/members"
MEMBER: Final = "shardprep/member/{}"
ANSWER: Final = "shardprep/answer/{}"
OVER: Final = "shardprep/over"
"""There once the front end ends because it is to end."""

MAX_WAITING: Final = 4096
"""Numbers taken by workers that have not said anything yet; more are not workers of ours."""

PLAN_TIMEOUT: Final = 5.0
"""Seconds in which a front end that serves a store puts its plan there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a front end runs, as its workers must know it."""

    transport: str
    """Name of the kind of transport, by which a worker finds how to serve."""
    stages: Stages
    """Layers [start, stop) of each stage."""
    tensor_parallel_size: int = 1
    dtype: str | None = None
    manifest_digest: str
    revision: str = "main"
    details: Mapping[str, int] = field(default_factory=dict)
    """What the kind of transport says beside, for its own workers."""
    nonce: str = ""
    """Made by `open_meeting`; what a worker says is sealed for this meeting and no other."""


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that has the secret and holds what the plan says; it waits for `welcome` or `refuse`."""

    number: int
    """Its place among those who came, strangers included: from 1."""
    info: WorkerInfo
    nonce: str

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def pp_rank(self) -> int | None:
        return self.info.pp_rank


@dataclass(frozen=True, slots=True)
class Membership:
    """A worker's place, once it is welcome."""

    name: str
    """What the front end calls it: the name that it gave, or one like it if another had that."""
    number: int
    """As the front end's `Member.number`; no other worker of this meeting has had it or will."""
    rank: int
    """How manieth it was to be welcomed, from 1 (0 is the front end): its rank where that counts."""
    plan: Plan
    store: TCPStore
    """This worker's connection. One blocking call at a time: take `store.clone()` for a thread of one's own."""
    host: str
    """Address of the front end, as this worker reaches it."""

    def is_over(self) -> bool:
        """Whether the front end has said that it ends."""
        try:
            return bool(self.store.check([OVER]))
        except RuntimeError:
            return False


# ------------------------------------------------------------------------------------------------------ the front end
class Meeting:
    """Where a front end waits for workers."""

    def __init__(self, host: str, store: TCPStore, plan: Plan, secret: str) -> None:
        self.host, self.port = host, store.port
        self.plan = plan
        self.store = store
        """Served by this process. One blocking call at a time: take `store.clone()` for a thread of one's own."""
        self._secret = secret
        self._lock = threading.Lock()
        self._is_closed = False
        self._waiting: dict[int, float] = {}
        self._seen = 0
        self._welcomed = 0
        self._names: set[str] = set()
        self._ready: list[Member] = []

    @property
    def address(self) -> str:
        """host:port, as `--master` takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def joined(self, timeout: float) -> Member | None:
        """The next worker that may join, under a name that no other has had; None if none comes in `timeout` seconds.

        Who has not the secret, or holds another manifest or other layers than the plan's, is refused here, with the
        reason. Raises WorkerError where the store is not what it was.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                self._look()
                if self._ready:
                    return self._ready.pop(0)
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(PAUSE, left))

    def welcome(self, member: Member) -> int:
        """Tell a worker that it has joined; its rank."""
        with self._lock:
            self._welcomed += 1
            rank = self._welcomed
        self._answer(member.number, member.nonce, {"name": member.name, "rank": rank})
        return rank

    def refuse(self, member: Member, why: str) -> None:
        """Tell a worker that it cannot join.

        Args:
            why: What people read there.
        """
        self._answer(member.number, member.nonce, {"refused": why})

    def _look(self) -> None:
        if self._is_closed:
            raise WorkerError(f"the meeting at {self.address} was closed")
        now = time.monotonic()
        try:
            taken = self.store.add(MEMBERS, 0)
            if not self._seen <= taken <= self._seen + MAX_WAITING:
                raise WorkerError(
                    f"the store at {self.address} says that {taken} workers have come, {self._seen} had before: "
                    "somebody else writes to it; serve it where only workers reach it"
                )
            self._waiting |= dict.fromkeys(range(self._seen + 1, taken + 1), now + PATIENCE)
            self._seen = taken
            for number in list(self._waiting):
                if self.store.check([MEMBER.format(number)]):
                    del self._waiting[number]
                    raw = self.store.get(MEMBER.format(number))
                    self.store.delete_key(MEMBER.format(number))
                    self._hear(number, raw)
                elif self._waiting[number] < now:
                    del self._waiting[number]
        except RuntimeError as error:
            raise WorkerError(f"the store at {self.address} does not work: {first_line(error)}") from None

    def _hear(self, number: int, raw: bytes) -> None:
        """Take what a worker says of itself, or refuse it."""
        nonce = ""
        try:
            said = unseal(self._secret, MEMBER.format(number), self.plan.nonce, raw)
            nonce = text_of(said, "nonce")
            info = read_info(said)
            self._check(info)
        except InputError as error:
            self._answer(number, nonce, {"refused": str(error)})
            return
        name, again = info.name, 1
        while name in self._names:
            again += 1
            name = f"{info.name[:58]}-{again}"
        self._names.add(name)
        self._ready.append(Member(number, replace(info, name=name), nonce))

    def _check(self, info: WorkerInfo) -> None:
        plan = self.plan
        if info.manifest_digest != plan.manifest_digest:
            raise InputError(
                f"this worker's manifest is {quote(info.manifest_digest)}, the front end runs {plan.manifest_digest}; "
                "give both the same source and revision, or --manifest-digest"
            )
        if info.pp_rank is None:
            return
        if not 0 <= info.pp_rank < len(plan.stages):
            raise InputError(
                f"pp_rank {info.pp_rank}: the front end runs {len(plan.stages)} stages, from 0 to "
                f"{len(plan.stages) - 1}"
            )
        start, stop = plan.stages[info.pp_rank]
        if info.layers != (start, stop):
            held = "no layers" if info.layers is None else f"layers {info.layers[0]} to {info.layers[1] - 1}"
            raise InputError(
                f"stage {info.pp_rank}: this worker holds {held}, the front end runs layers {start} to {stop - 1} "
                "there; give both the same --stages"
            )

    def _answer(self, number: int, nonce: str, said: Mapping[str, object]) -> None:
        place = ANSWER.format(number)
        with suppress(RuntimeError):  # a store that is gone tells the worker enough
            self.store.set(place, seal(self._secret, place, nonce, said))

    def end(self) -> None:
        """Say that this front end ends because it is to end: for `Membership.is_over`."""
        with suppress(RuntimeError):
            self.store.set(OVER, "1")
            self.store.check([OVER])  # torch's set does not wait until the server has it

    def close(self) -> None:
        """Stop to serve: those who are connected see that the front end has gone."""
        with self._lock:
            self._is_closed = True
            del self.store  # torch has no other way


def open_meeting(host: str, port: int = 0, *, plan: Plan, secret: str, allow_public: bool = False) -> Meeting:
    """Serve a meeting.

    Args:
        host: An address of this machine.
        port: 0: one that is free.
        plan: What workers are told; its nonce is made here.
        secret: What they must have.
        allow_public: Serve also where the Internet may reach it.

    Raises:
        InputError: For a public address without `allow_public`, and where the address or port cannot be had.
    """
    check_secret(secret)
    family, address = check_host(host, allow_public=allow_public)
    try:
        # torch alone would listen on all addresses of the machine
        listener = socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        raise InputError(
            f"{quote(host)}:{port}: nothing can be served there: {os.strerror(error.errno or 0)}; use an address of this "
            "machine and a port that is free (0: any)"
        ) from None
    store = serve_store(address, listener)
    plan = replace(plan, nonce=secrets.token_hex(16))
    store.add(MEMBERS, 0)
    store.set(PLAN, seal(secret, PLAN, "", asdict(plan)))
    return Meeting(host, store, plan, secret)


# --------------------------------------------------------------------------------------------------------- the worker
class Invitation:
    """A meeting that a worker has found, whose plan was made by who has the secret."""

    def __init__(self, host: str, port: int, store: TCPStore, plan: Plan, secret: str) -> None:
        self.host, self.port = host, port
        self.store, self.plan = store, plan
        self._secret = secret

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def join(self, info: WorkerInfo, *, timeout: float = PATIENCE) -> Membership:
        """Say what this worker holds, and wait to be welcomed.

        Args:
            info: What the worker holds; its name is the one that it asks for.
            timeout: Seconds for which the answer is waited for.

        Raises:
            RefusedError: With the front end's reason.
            WorkerError: Where the front end has gone, or does not answer.
        """
        check_name(info.name)
        nonce = secrets.token_hex(16)
        said = {**asdict(info), "seconds": dict(info.seconds or {}), "nonce": nonce}
        try:
            number = self.store.add(MEMBERS, 1)
            place = MEMBER.format(number)
            self.store.set(place, seal(self._secret, place, self.plan.nonce, said))
            raw = wait_for(self.store, ANSWER.format(number), timeout)
        except RuntimeError as error:
            raise WorkerError(f"the front end at {self.address} has gone: {first_line(error)}") from None
        if raw is None:
            raise WorkerError(f"the front end at {self.address} gave no answer in {timeout:g} seconds")
        try:
            answer = unseal(self._secret, ANSWER.format(number), nonce, raw)
        except InputError as error:
            raise RefusedError(f"what answers at {self.address} is not the front end: {error}") from None
        if "refused" in answer:
            raise RefusedError(
                f"the front end at {self.address} refuses this worker: {quote(text_of(answer, 'refused'), limit=1000)}"
            )
        return Membership(
            name=check_name(text_of(answer, "name")),
            number=number,
            rank=number_of(answer, "rank"),
            plan=self.plan,
            store=self.store,
            host=self.host,
        )


class RefusedError(WorkerError):
    """The front end does not want this worker: it need not ask again."""


def find_meeting(master: str, *, secret: str, timeout: float = 300.0) -> Invitation:
    """Find a meeting, once its front end is there.

    Args:
        master: host:port, as the front end prints it.
        secret: What the front end must have, too.
        timeout: Seconds for which it is waited for.

    Raises:
        InputError: For what is not an address.
        RefusedError: Where the front end has another secret or speaks otherwise.
        WorkerError: Where there is none in time.
    """
    host, port = parse_address(master)
    check_secret(secret)
    deadline = time.monotonic() + timeout
    while True:
        store = connect(host, port, deadline)
        raw, why = None, "something answers, but no front end put a plan there"
        try:
            raw = wait_for(store, PLAN, min(PLAN_TIMEOUT, max(0.0, deadline - time.monotonic())))
            if store.check([OVER]):
                raw, why = None, "the front end there is about to end, and no other came"
        except RuntimeError as error:
            raw, why = None, f"the front end there has gone: {first_line(error)}"
        if raw is not None:
            break
        if time.monotonic() > deadline:
            raise WorkerError(f"{quote(master)}: {why}")
        time.sleep(0.2)
    try:
        plan = _plan(unseal(secret, PLAN, "", raw))
    except InputError as error:
        raise RefusedError(f"the front end at {quote(master)}: {error}") from None
    return Invitation(host, port, store, plan, secret)


def join(master: str, info: WorkerInfo, *, secret: str, timeout: float = 300.0) -> Membership:
    """Find a meeting and join it, for a worker that is ready.

    Args:
        master, secret, timeout: As `find_meeting` has them.
        info: What the worker holds.
    """
    return find_meeting(master, secret=secret, timeout=timeout).join(info, timeout=timeout)


def read_info(said: Mapping[str, Any]) -> WorkerInfo:
    """What a worker says of itself. Raises InputError for what cannot be read."""
    seconds = said.get("seconds")
    if not isinstance(seconds, dict) or not all(type(each) in (int, float) for each in seconds.values()):
        raise InputError("a message whose seconds are not numbers; look whether versions are the same")
    return WorkerInfo(
        name=check_name(text_of(said, "name")),
        pp_rank=None if said.get("pp_rank") is None else number_of(said, "pp_rank"),
        layers=None if said.get("layers") is None else pair_of(said["layers"], "layers"),
        host=text_of(said, "host"),
        pid=number_of(said, "pid"),
        manifest_digest=text_of(said, "manifest_digest"),
        nbytes=number_of(said, "nbytes"),
        bytes_fetched=number_of(said, "bytes_fetched"),
        seconds={name: float(each) for name, each in seconds.items()},
    )


def _plan(said: Mapping[str, Any]) -> Plan:
    stages, details = said.get("stages"), said.get("details")
    if not isinstance(stages, list) or not stages:
        raise InputError("a plan without stages; look whether versions are the same")
    if not isinstance(details, dict):
        raise InputError("a plan without details; look whether versions are the same")
    return Plan(
        transport=text_of(said, "transport"),
        stages=tuple(pair_of(each, "stages") for each in stages),
        tensor_parallel_size=number_of(said, "tensor_parallel_size"),
        dtype=None if said.get("dtype") is None else text_of(said, "dtype"),
        manifest_digest=text_of(said, "manifest_digest"),
        revision=text_of(said, "revision"),
        details={name: number_of(details, name) for name in details},
        nonce=text_of(said, "nonce"),
    )
