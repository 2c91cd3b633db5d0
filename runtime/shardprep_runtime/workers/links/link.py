"""Carry frames between two processes over a gloo process group of exactly these two, and notice when one has gone.

A frame is one message, or two where its tensor is large:

    header   16 int64, little-endian: magic, op, number, generation, dtype, batch, positions, width, past, keep, bytes
             of the tensor, bytes of the tail, and four that are 0
    tensor   token ids [batch, positions] (width 0) or hidden states or logits [batch, positions, width], as they lie in
             memory; a message of its own where the frame would exceed EAGER bytes
    tail     JSON: an object

Nothing is unpickled. What a header says is checked against limits before memory is set aside for it.

What gloo does, measured with torch 2.13 on Linux:

- A wait that runs out of time closes the connection for good, so an idle link waits for years.
- `abort` and `shutdown` leave a wait of this process as it is, and end nothing at the other side. So a link is closed by
  a second wait of a millisecond.
- A process that exits while one of its threads waits is aborted (SIGABRT), so links are closed before.
- A message that is longer than the memory that waits for it ends the process that receives it, so both sides hold to
  EAGER.
- A send is lost where nobody keeps its handle.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from ...errors import FormatError, InputError, WorkerError, quote
from ...format.dtypes import BITS, TORCH
from ..addresses import address_towards

if TYPE_CHECKING:
    import torch

HEADER: Final = struct.Struct("<16q")

MAGIC: Final = int.from_bytes(b"shplink\x01", "little")
"""The last byte is the version."""

EAGER: Final = 2**20
"""Bytes of the memory that waits for the next message of a link. A frame that does not fit takes two."""

MAX_TAIL: Final = 16 * 2**10
"""Bytes."""

DTYPES: Final = ("I64", "BF16", "F16", "F32", "F64")
"""Dtypes of what is sent. The first is for token ids; the code in a header is the place from 1, 0 means no tensor."""

CODES: Final[dict[str | None, int]] = {None: 0} | {name: code for code, name in enumerate(DTYPES, 1)}

NAMES: Final = {f"torch.{TORCH[name]}": name for name in DTYPES}
"""By what torch prints."""

NO_SHAPE: Final = (0, 0, 0)

UNUSED: Final = (0,) * 4

MAX_PENDING: Final = 4
"""Messages on their way, or there already: gloo does not say. Who sends another waits for the first."""

MAX_PENDING_BYTES: Final = 64 * 2**20
"""Likewise, but one message may be longer."""

MAX_PENDING_CONTROL: Final = 2**10
"""Messages of a control link that may wait, which are short: nobody waits because a worker hangs."""

FOREVER: Final = timedelta(days=3650)

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds in which two sides that are there must have connected."""

LEAST_BOX: Final = 32 * 2**10

MAX_VIEWS: Final = 16

LOOK_EVERY: Final = 0.002
"""Seconds between two looks whether the other side of a link is there."""


DATA, CLOSING = 0, 1
"""Tags."""


class Op(IntEnum):
    """What a frame is about."""

    PING = 1
    PONG = 2
    ROUTE = 3
    """Take a place in a route: connect its two links."""
    DROP = 4
    """Leave a route."""
    BROKEN = 5
    """A link of a route does not work."""
    STEP = 6
    RESET = 7
    HEALTH = 8
    PROMOTE = 9
    ANSWER = 10
    """To HEALTH or PROMOTE of the same number."""
    FAILED = 11
    """A STEP, HEALTH or PROMOTE of that number did."""
    END = 12


@dataclass(frozen=True, slots=True)
class Limits:
    """Up to what a header is believed."""

    batch: int = 2**12
    positions: int = 2**24
    width: int = 2**22
    """Hidden size or size of the vocabulary."""
    nbytes: int = 2**32
    """Most bytes of a tensor. Whoever sends holds to it as well."""


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says before its tensor and its tail."""

    op: Op
    number: int = 0
    """Number of the step or question."""
    generation: int = 0
    """Number of the route that a step takes."""
    dtype: str | None = None
    """One of DTYPES; None: no tensor."""
    batch: int = 0
    positions: int = 0
    width: int = 0
    past: int = 0
    keep_all: bool = False
    tail_bytes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.positions, self.width) if self.width else (self.batch, self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        if self.dtype is None:
            return 0
        return self.batch * self.positions * (self.width or 1) * (BITS[self.dtype] // 8)

    @property
    def is_one_message(self) -> bool:
        return HEADER.size + self.nbytes + MAX_TAIL <= EAGER


def write_header(header: Header) -> bytes:
    """As `read_header` reads it."""
    raw = bytearray(HEADER.size)
    _write(raw, header, header.dtype, header.shape, header.nbytes, header.tail_bytes)
    return bytes(raw)


def _write(
    into: bytearray, header: Header, dtype: str | None, shape: tuple[int, ...], nbytes: int, tail: int
) -> None:
    HEADER.pack_into(
        into,
        0,
        MAGIC,
        header.op,
        header.number,
        header.generation,
        CODES[dtype],
        *shape,
        *NO_SHAPE[len(shape) :],
        header.past,
        header.keep_all,
        nbytes,
        tail,
        *UNUSED,
    )


def read_header(raw: bytes | bytearray | memoryview, limits: Limits) -> Header:
    """Read the header of a frame.

    Args:
        raw: Its bytes, all of them.
        limits: What a peer may announce.

    Raises:
        FormatError: For bytes that are not a header, contradict themselves or exceed the limits.
    """
    if len(raw) != HEADER.size:
        raise FormatError(f"a frame's header has {HEADER.size} bytes, not {len(raw)}")
    values = HEADER.unpack(raw)
    magic, op, number, generation, code, batch, positions, width, past, keep, nbytes, tail = values[:12]
    if magic != MAGIC:
        raise FormatError("not a frame, or of another version; run the same shardprep_runtime on all hosts")
    try:
        known = Op(op)
    except ValueError:
        raise FormatError(f"a frame of the unknown kind {op}") from None
    for name, value, least, most in (
        ("number", number, 0, 2**62),
        ("generation", generation, 0, 2**62),
        ("dtype", code, 0, len(DTYPES)),
        ("batch", batch, 0, limits.batch),
        ("positions", positions, 0, limits.positions),
        ("width", width, 0, limits.width),
        ("past", past, 0, limits.positions),
        ("keep", keep, 0, 1),
        ("bytes of the tensor", nbytes, 0, limits.nbytes),
        ("bytes of the tail", tail, 0, MAX_TAIL),
        *(("unused", value, 0, 0) for value in values[12:]),
    ):
        if not least <= value <= most:
            raise FormatError(f"a frame says {name} {value}; from {least} to {most} is allowed")
    dtype = DTYPES[code - 1] if code else None
    if (dtype is None) != (batch == 0) or (batch == 0) != (positions == 0) or (width and not batch):
        raise FormatError(f"a frame with a tensor of dtype {dtype} and shape [{batch}, {positions}, {width}]")
    if dtype is not None and (dtype == DTYPES[0]) != (width == 0):
        raise FormatError(f"a frame with a tensor of dtype {dtype} and width {width}; only token ids are I64")
    header = Header(known, number, generation, dtype, batch, positions, width, past, bool(keep), tail)
    if header.nbytes != nbytes:
        raise FormatError(f"a frame says {nbytes} bytes for a {dtype} tensor of {list(header.shape)}")
    return header


def read_tail(raw: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The object that a frame ends with; {} where there is none. Raises FormatError."""
    if not len(raw):
        return {}
    try:
        found = json.loads(str(raw, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the tail of a frame is not JSON: {quote(error)}") from None
    if not isinstance(found, dict):
        raise FormatError("the tail of a frame is not an object")
    return found


def write_tail(tail: Mapping[str, object]) -> bytes:
    """As `read_tail` reads it. Raises WorkerError for what is too long."""
    raw = json.dumps(tail).encode() if tail else b""
    if len(raw) > MAX_TAIL:
        raise WorkerError(f"a message of {len(raw)} bytes; at most {MAX_TAIL} can be sent")
    return raw


class BrokenLink(Exception):  # noqa: N818 - becomes a WorkerLostError that names a worker where one is known
    """A link does not work any more."""

    def __init__(self, why: str, *, is_closed: bool = False) -> None:
        super().__init__(why)
        self.is_closed = is_closed
        """The other side closed the connection, or its process has ended."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What has come."""

    header: Header
    tensor: torch.Tensor | None = None
    tail: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Seconds that unpacking took."""


class Box:
    """Memory from which frames are sent, one after the other."""

    __slots__ = ("_views", "raw", "tensor")

    def __init__(self, size: int) -> None:
        import torch

        self.raw = bytearray(size)
        self.tensor = torch.frombuffer(self.raw, dtype=torch.uint8)
        self._views: dict[tuple[torch.dtype, torch.Size], torch.Tensor] = {}

    def put(self, tensor: torch.Tensor) -> None:
        """Copy a tensor to where that of a frame is."""
        key = tensor.dtype, tensor.shape
        view = self._views.get(key)
        if view is None:
            stop = HEADER.size + tensor.nbytes
            view = self.tensor[HEADER.size : stop].view(tensor.dtype).view(tensor.shape)
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            self._views[key] = view  # step after step has the same shape
        view.copy_(tensor)


class Parcel:
    """A tensor, ready to be sent: copied where its bytes are few, otherwise to be left as it is until it is sent.

    Args:
        boxes: Where those that have been sent are.
    """

    __slots__ = ("_large", "_start", "box", "dtype", "nbytes", "shape")

    def __init__(self, tensor: torch.Tensor | None, boxes: list[Box] | None = None) -> None:
        self.dtype: str | None = None
        self.shape: tuple[int, ...] = ()
        self.nbytes = 0
        self._large: torch.Tensor | None = None
        self._start = HEADER.size
        self.box: Box | None = None
        if tensor is None:
            return
        self.dtype, self.shape, self.nbytes = _name_of(tensor.dtype), tuple(tensor.shape), tensor.nbytes
        room = HEADER.size + self.nbytes + MAX_TAIL
        if room <= EAGER:
            box = boxes.pop() if boxes else None
            if box is None or len(box.raw) < room:
                box = Box(max(LEAST_BOX, 1 << (room - 1).bit_length()))
            box.put(tensor)
            self.box = box
            self._start += self.nbytes
        elif self.nbytes > DEFAULT_LIMITS.nbytes:
            raise InputError(
                f"{self.nbytes} bytes of shape {list(self.shape)} are too many for one step, which sends at most "
                f"{DEFAULT_LIMITS.nbytes}; feed fewer positions at once"
            )
        else:
            self._large = _bytes_of(tensor)

    def messages(self, header: Header, tail: bytes) -> list[torch.Tensor]:
        """What to send.

        Args:
            header: The frame's, but for what is known of the tensor.
            tail: Bytes that go with the header.
        """
        start, stop = self._start, self._start + len(tail)
        box = self.box or Box(stop)
        _write(box.raw, header, self.dtype, self.shape, self.nbytes, len(tail))
        box.raw[start:stop] = tail
        first = box.tensor.narrow(0, 0, stop)
        return [first] if self._large is None else [first, self._large]


class Link:
    """One end of a connection between two processes. One thread receives; any may send or close."""

    def __init__(self, group: Any, rank: int, limits: Limits, max_pending: int) -> None:
        import torch

        self._group = group
        self._peer = 1 - rank
        self._limits = limits
        self._max_pending = max_pending
        self._sending = threading.Lock()
        self._pending: deque[tuple[Any, torch.Tensor, Box | None]] = deque()  # handles, and what they send
        self._pending_bytes = 0
        self._boxes: list[Box] = []
        self._closing = threading.Lock()
        self._is_closed = False
        self._dtypes = {name: getattr(torch, TORCH[name]) for name in DTYPES}
        self._inbox = bytearray(EAGER)
        self._inbox_tensor = torch.frombuffer(self._inbox, dtype=torch.uint8)
        self._coming = self._post(self._inbox_tensor)

    def pack(self, tensor: torch.Tensor) -> Parcel:
        """For `send`."""
        return Parcel(tensor, self._boxes)

    def send(
        self, header: Header, tail: Mapping[str, object] | None = None, parcel: Parcel | None = None
    ) -> None:
        """Have a frame sent; waits only while many are on their way.

        Args:
            tail: What JSON can say, behind the tensor.
            parcel: The tensor; None: the frame has none.

        Raises:
            BrokenLink: Where it cannot be sent any more.
        """
        messages = (parcel or Parcel(None)).messages(header, write_tail(tail or {}))
        nbytes = sum(each.nbytes for each in messages)
        with self._sending:
            while self._pending and (
                len(self._pending) >= self._max_pending or self._pending_bytes + nbytes > MAX_PENDING_BYTES
            ):
                self._finish_one(FOREVER)
            for message in messages:
                try:
                    work = self._group.send([message], self._peer, DATA)
                except RuntimeError as error:
                    raise _broken(error) from None
                is_first = message is messages[0]
                self._pending.append((work, message, parcel.box if is_first and parcel else None))
                self._pending_bytes += message.nbytes

    def flush(self, timeout: float) -> None:
        """Wait until all is sent. Raises BrokenLink, also when `timeout` seconds are over: the link is closed then."""
        deadline = time.monotonic() + timeout
        with self._sending:
            while self._pending:
                self._finish_one(timedelta(seconds=max(0.001, deadline - time.monotonic())))

    def receive(
        self, timeout: float | None = None, *, check: Callable[[Header], None] = lambda _: None
    ) -> Frame:
        """The next frame.

        Raises BrokenLink, also when nothing has come for `timeout` seconds: the link is closed then.

        Args:
            check: Raises FormatError for a header that is not to be believed, before there is memory for it.
        """
        import torch

        _wait(self._coming, FOREVER if timeout is None else timedelta(seconds=timeout))
        began = time.perf_counter()
        inbox = memoryview(self._inbox)
        try:
            header = read_header(inbox[: HEADER.size], self._limits)
            check(header)
            inline = header.nbytes if header.is_one_message else 0
            start = HEADER.size + inline
            tail = read_tail(inbox[start : start + header.tail_bytes])
        except FormatError as error:
            self.close()
            raise BrokenLink(f"what comes is not what it should be: {error}") from None
        tensor = None
        if header.dtype is not None:
            dtype = self._dtypes[header.dtype]
            if inline:
                raw = bytearray(inbox[HEADER.size : start])
                tensor = torch.frombuffer(raw, dtype=dtype).view(header.shape)
            else:
                try:
                    tensor = torch.empty(header.shape, dtype=dtype)
                except RuntimeError:  # of the allocator
                    self.close()
                    raise BrokenLink(f"no memory for {header.nbytes} bytes that were sent") from None
                _wait(self._post(_bytes_of(tensor)), FOREVER)
        seconds = time.perf_counter() - began if inline else 0.0
        self._coming = self._post(self._inbox_tensor)
        return Frame(header, tensor, tail, seconds)

    def close(self) -> None:
        """Close the connection: who waits here or there has a BrokenLink. Never raises, and can be called again."""
        import torch

        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            with suppress(RuntimeError):  # the time that is over closes the connection, and nothing else does
                self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, CLOSING).wait(
                    timedelta(milliseconds=1)
                )

    def _post(self, tensor: torch.Tensor) -> Any:
        try:
            return self._group.recv([tensor], self._peer, DATA)
        except RuntimeError as error:
            raise _broken(error) from None

    def _finish_one(self, timeout: timedelta) -> None:
        work, message, box = self._pending[0]
        _wait(work, timeout)
        self._pending.popleft()
        self._pending_bytes -= message.nbytes
        if box is not None and len(self._boxes) < self._max_pending:
            self._boxes.append(box)


def open_device(host: str) -> Any:
    """What gloo connects by: at the address of this machine by which it reaches `host`."""
    from torch.distributed import ProcessGroupGloo

    try:
        return ProcessGroupGloo.create_device(hostname=address_towards(host))
    except OSError as error:
        raise WorkerError(f"{quote(host)} cannot be reached from here: {error.strerror}") from None


def connect(
    store: Any,  # a TCPStore
    name: str,
    rank: int,
    device: Any,
    *,
    timeout: float,
    limits: Limits = DEFAULT_LIMITS,
    max_pending: int = MAX_PENDING,
    is_over: Callable[[], bool] = lambda: False,
) -> Link:
    """One end of the link of that name, once both sides are there.

    Args:
        rank: 0 at one side, 1 at the other.
        device: gloo's, which says on which address it listens.
        timeout: Seconds in which the other side must come.
        limits: What the other side may announce.
        max_pending: Frames that may wait to be sent.
        is_over: Whether not to wait any longer.

    Raises:
        BrokenLink: Where the other side does not come.
    """
    import torch.distributed

    dist: Any = torch.distributed
    gloo = dist.ProcessGroupGloo
    deadline = time.monotonic() + timeout
    try:
        store = dist.PrefixStore(
            f"link/{name}", store.clone()
        )  # a connection of one's own: each call keeps it busy
        store.set(f"here/{rank}", b"")
        # gloo would wait for somebody who never comes, and print a stack then
        while not store.check([f"here/{1 - rank}"]):
            if is_over():
                raise BrokenLink("given up")
            if time.monotonic() > deadline:
                raise BrokenLink(f"the other side did not come in {timeout:g} seconds")
            time.sleep(LOOK_EVERY)
        options = gloo._Options()  # torch has no public way to say on which address
        options._devices = [device]
        options._threads = 1
        options._timeout = timedelta(seconds=min(timeout, HANDSHAKE_TIMEOUT))
        return Link(gloo(store, rank, 2, options), rank, limits, max_pending)
    except RuntimeError as error:
        raise _broken(error) from None


def _wait(work: Any, timeout: timedelta) -> None:
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise _broken(error) from None


def _broken(error: RuntimeError) -> BrokenLink:
    """gloo says in words alone which of its errors it is."""
    text = (str(error).splitlines() or [""])[0]
    if any(each in text for each in ("closed by peer", "reset by peer", "Broken pipe")):
        return BrokenLink("the connection was closed", is_closed=True)
    if "imed out" in text or "timeout" in text:
        return BrokenLink("given up: nothing came in time")
    return BrokenLink(quote(text.rpartition("] ")[2], limit=300))


def _name_of(dtype: torch.dtype) -> str:
    found = NAMES.get(str(dtype))
    if found is None:
        raise WorkerError(f"a tensor of {dtype} cannot be sent; only {', '.join(NAMES)}")
    return found


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor, or of a copy where that is not in one piece."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)
