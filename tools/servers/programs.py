"""Run the programs of a server as long as somebody wants it, and leave none behind.

What the servers that tests start have in common. A server ends on SIGTERM or SIGINT, when its standard input closes
(whoever started it is gone), and when one of its programs ends; should it be killed itself, the kernel ends them.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

PATIENCE = 10.0
"""Seconds that a program has to end by itself."""


class Stopped(Exception):  # noqa: N818 - no error: it is how a server ends
    """SIGTERM or SIGINT has come; `Programs` ends then without a word."""


class Programs:
    """Programs in the foreground, ended in the reverse order of their start."""

    def __init__(self) -> None:
        self._running: list[tuple[str, Path, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Programs:
        def stop(number: int, frame: FrameType | None) -> NoReturn:
            raise Stopped

        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        for _, _, program in reversed(self._running):
            program.terminate()
        until = time.monotonic() + PATIENCE
        for _, _, program in reversed(self._running):
            try:
                program.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
        return kind is Stopped

    def start(self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> None:
        """Start one, whose output goes to `log`."""
        with log.open("wb") as out:
            program = subprocess.Popen(
                # in a session of its own, so that Ctrl-C reaches us alone and we end them in order
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )
        self._running.append((name, log, program))

    def check(self) -> None:
        """Exit with the last lines of a program that has ended."""
        for name, log, program in self._running:
            if program.poll() is not None:
                said = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                sys.exit(f"{name} ended with {program.returncode}; its last words in {log}:\n{said}")

    def wait_until(self, ready: Callable[[], bool], *, what: str, seconds: float) -> None:
        """Return once `ready()`; exit where that takes longer than `seconds`."""
        until = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > until:
                sys.exit(f"{what}: not ready after {seconds:.0f} s; see {self._running[-1][1]}")
            time.sleep(0.1)

    def serve(self, about: Mapping[str, str]) -> None:
        """Say on one line how the server is reached, and return when it is no longer wanted."""
        print(json.dumps(about), flush=True)
        while True:
            self.check()
            readable, _, _ = select.select([sys.stdin], [], [], 1.0)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                return


def main(
    doc: str, *, missing: Callable[[], str | None], setup: Callable[[], None], serve: Callable[[Path], None]
) -> None:
    """Parse the command line of a server, and do what it asks for.

    Args:
        missing: Says why the server cannot be run here; None where it can.
        setup: Installs what is missing.
        serve: Serves until it is no longer wanted, with all data in the folder that it is given.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument(
        "--root", type=Path, help="folder for all data; it need not exist, and radosgw's must not"
    )
    parser.add_argument("--setup", action="store_true", help="install what is missing")
    parser.add_argument("--check", action="store_true", help="say what is missing")
    given = parser.parse_args()
    if given.setup and missing():
        setup()
    if reason := missing():
        sys.exit(reason)
    if given.root is not None:
        serve(given.root.absolute())
    elif not (given.setup or given.check):
        parser.error("--root is missing")


def run(command: Sequence[str], *, env: Mapping[str, str], log: Path) -> str:
    """Run a program to its end and give what it said. Exits with its words where it fails."""
    try:
        found = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=dict(env),
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"{' '.join(command)}: did not end in 60 s")
    with log.open("a") as out:
        out.write(found.stdout + found.stderr)
    if found.returncode:
        sys.exit(f"{' '.join(command)}: ended with {found.returncode}:\n{found.stderr.strip()}")
    return found.stdout


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def answers(port: int) -> bool:
    """Whether somebody listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def install(packages: Sequence[str]) -> None:
    """Install packages of Debian or Ubuntu."""
    lead = [] if Path("/usr/bin/apt-get").exists() and _is_root() else ["sudo"]
    command = [*lead, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes"]
    command += ["--no-install-recommends", *packages]
    print(f"running {' '.join(command)}", file=sys.stderr)
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit("the packages could not be installed; `apt-get update` may help")


def _is_root() -> bool:
    return Path("/proc/self").stat().st_uid == 0
