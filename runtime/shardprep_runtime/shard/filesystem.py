"""Choose how a folder is read, by the kind of file system that it lies on."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Literal

from ..errors import InputError, quote

Io = Literal["auto", "mmap", "read"]

NETWORK = re.compile(
    r"nfs\d?|cifs|smb3?|smbfs|ceph|lustre|gpfs|beegfs|orangefs|pvfs2|9p|afs|glusterfs|ocfs2|wekafs|"
    r"virtiofs|fuse(\..*)?"
)
"""Kinds of file systems whose page faults go over a network, or through another process, one page after the other.

That is 30 to 50 times slower than reading ahead in parallel. FUSE is among them, since most of its mounts are remote.
"""

LOCAL_FUSE = re.compile(r"fuse\.(fuse-overlayfs|lxcfs|bindfs|mergerfs|unionfs)|fuseblk")
"""Kinds of FUSE whose files lie on this machine."""

log = logging.getLogger("shardprep_runtime")


def check_io(io: str) -> None:
    """Raises InputError unless `io` is a way to read."""
    if io not in ("auto", "mmap", "read"):
        raise InputError(f"io must be auto, mmap or read, not {io!r}")


def choose_io(folder: Path, io: Io) -> Literal["mmap", "read"]:
    """Choose how parts are read, and say in the log which way and why.

    Args:
        folder: The folder that has the parts.
        io: "mmap" or "read", which are obeyed, or "auto": read on network file systems, map on others.

    Raises:
        InputError: For another `io`.
    """
    check_io(io)
    kind = file_system(folder)
    chosen: Literal["mmap", "read"]
    if io != "auto":
        chosen, why = io, "as asked for"
    elif is_network(kind):
        chosen, why = "read", "a network file system"
    else:
        chosen, why = "mmap", "a local file system"
    how = "mapping" if chosen == "mmap" else "reading in parallel"
    log.info("%s: %s (%s): %s", quote(folder), kind or "unknown file system", why, how)
    return chosen


def is_network(kind: str | None) -> bool:
    """Whether a file system of this kind is better read than mapped; an unknown one is mapped."""
    return kind is not None and NETWORK.fullmatch(kind) is not None and not LOCAL_FUSE.fullmatch(kind)


def file_system(path: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The kind of file system that a path lies on, as the kernel names it (ext4, nfs4); None where nothing says it.

    proc_pid_mountinfo(5): field 3 is the device, field 5 where it is mounted, and the kind follows the separator.

    Args:
        path: A file or folder.
        mounts: The kernel's list of mounts.
    """
    try:
        device = path.stat().st_dev
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = None
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            found = rest.split()[0]  # the last one covers those before it
    return found


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk, so that renames in it survive a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
