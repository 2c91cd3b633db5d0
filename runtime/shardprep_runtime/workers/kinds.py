"""Know the kinds of transport whose workers meet the front end: what both do with each, by the name that a plan says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from ..errors import InputError, quote

if TYPE_CHECKING:
    from .meeting import Meeting, Membership
    from .transport import Transport
    from .worker import Worker


class TransportKind(ABC):
    """A transport before it is opened."""

    name: str
    """As `--transport` and the plan of a meeting have it."""
    outlives_front_end = True
    """Whether a worker that has served one front end can serve the next."""

    def details(self, workers: int) -> Mapping[str, int]:
        """What the plan of a meeting says beside, for so many workers, spares included."""
        return {}

    @abstractmethod
    def open(self, meeting: Meeting, still_missing: Callable[[str], None]) -> Transport:
        """Reach the workers that join the meeting.

        Args:
            still_missing: Is told who has not come yet, again and again while somebody must be waited for; raises once
                it is vain to wait.
        """

    @abstractmethod
    def serve(self, worker: Worker, membership: Membership) -> bool:
        """Have a worker answer a front end.

        Args:
            membership: Its place there.

        Returns:
            Whether the front end has said that this is the end; else it is gone.

        Raises:
            WorkerError: Where the front end cannot be reached.
        """


class Links(TransportKind):
    """Workers join and leave as they like, and learn their neighbours with their routes."""

    name = "links"

    def open(self, meeting: Meeting, still_missing: Callable[[str], None]) -> Transport:
        from .links.transport import LinkTransport

        return LinkTransport(meeting)

    def serve(self, worker: Worker, membership: Membership) -> bool:
        from .links.served import serve_links

        return serve_links(worker, membership)


class Rpc(TransportKind):
    """All processes are one group from the start, whose size is part of the plan."""

    name = "rpc"
    outlives_front_end = False

    def details(self, workers: int) -> Mapping[str, int]:
        from .rpc.group import WORLD_SIZE

        return {WORLD_SIZE: workers + 1}  # and the front end

    def open(self, meeting: Meeting, still_missing: Callable[[str], None]) -> Transport:
        from .rpc.transport import open_rpc

        return open_rpc(meeting, still_missing)

    def serve(self, worker: Worker, membership: Membership) -> bool:
        from .rpc.group import serve_rpc

        return serve_rpc(worker, membership)


LINKS: Final = Links()
RPC: Final = Rpc()
KINDS: Final[Mapping[str, TransportKind]] = {each.name: each for each in (LINKS, RPC)}
"""By name."""


def kind_named(name: str) -> TransportKind:
    """The kind of that name. Raises InputError where this version knows none."""
    if name not in KINDS:
        raise InputError(f"a plan for the transport {quote(name)}; this version knows {' and '.join(KINDS)}")
    return KINDS[name]
