"""Say which launcher a user's word names: the one table of the words of `--transport`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..kinds import RPC
from .in_process import InThisProcess
from .launcher import Launcher
from .processes import Processes
from .ray_actors import RayActors

LAUNCHERS: Final[Mapping[str, Launcher]] = {
    "links": Processes(),
    "rpc": Processes(transport=RPC),
    "ray": RayActors(),
    "local": InThisProcess(),
}
"""By word. What is named by a transport's word starts processes of this host."""
