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
"""Kinds of file systems whose page faults go over a network (or through another process), one page after the other:
30 to 50 times slower than reading ahead in parallel. FUSE is among them: most of what is mounted by it is remote."""

LOCAL_FUSE = re.compile(r"fuse\.(fuse-overlayfs|lxcfs|bindfs|mergerfs|unionfs)|fuseblk")

log = logging.getLogger("shardprep_runtime")


def check_io(io: str) -> None:
    """Raises InputError for what is no way to read."""
    if io not in ("auto", "mmap", "read"):
        raise InputError(f"io must be auto, mmap or read, not {io!r}")


def choose_io(folder: Path, io: Io) -> Literal["mmap", "read"]:
    """How the parts in `folder` are to be read; says in the log which and why. Raises InputError for no such way."""
    check_io(io)
    kind = file_system(folder)
    chosen: Literal["mmap", "read"] = "read" if is_network(kind) else "mmap"
    if io != "auto":
        chosen = io
    why = (
        "as asked for"
        if io != "auto"
        else "a network file system"
        if chosen == "read"
        else "a local file system"
    )
    how = "mapping" if chosen == "mmap" else "reading in parallel"
    log.info("%s: %s (%s): %s", quote(folder), kind or "unknown file system", why, how)
    return chosen


def is_network(kind: str | None) -> bool:
    """Whether a file system of this kind is one whose pages are better not faulted in."""
    return kind is not None and NETWORK.fullmatch(kind) is not None and not LOCAL_FUSE.fullmatch(kind)


def file_system(path: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The kind of file system that `path` lies on, as the kernel names it; None where that cannot be known.

    (proc_pid_mountinfo(5): field 3 is the device, field 5 where it is mounted, the kind follows the separator.)
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
    """Bring a folder's names to disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
