"""Python processes that tests start, forked from one that has imported what takes seconds to import.

A process that imports torch and transformers spends five seconds of a core before it does anything; one that is forked
from a process that has them spends hundredths. An integration test starts its processes as ever, by `subprocess.Popen`
with `sys.executable` or our console script first, and gets forked ones. What it gets is a child of the test's process
in each respect: process id, signals, exit status, descriptors, environment and working folder.

Three things differ, and tests whose subject they are say `@pytest.mark.cold`. Modules are there before they are asked
for. Limits and the umask are those that the test run began with. And a process that a forked one starts is cold.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import fcntl
import gc
import inspect
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NoReturn

PRELOADED: Final = (
    "torch",
    "torch.distributed.rpc",
    "torch.distributed.tensor",
    "transformers",
    "transformers.distributed.tensor_parallel",
    "transformers.generation.utils",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "safetensors.torch",
    "shardprep.cli",
    "shardprep.convert",
    "shardprep.split",
    "shardprep_runtime.stage.stage",
    "shardprep_runtime.workers.links.transport",
    "shardprep_runtime.workers.text.generate",
    "shardprep_runtime.workers.worker_process",
)
"""What the process that is forked imports. Importing must do nothing but define, so that a fork cannot tell."""

READ_AT_IMPORT: Final = ("CUDA_", "HF_HOME", "HF_HUB_CACHE", "LD_", "MALLOC_", "PYTHON", "TRANSFORMERS_")
"""Beginnings of names of variables that are read when something is imported; one that differs makes a process cold."""

SETTLED_HERE: Final = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH", "PYTHONUNBUFFERED")
"""Such variables that a forked process still obeys: a device is looked for when it is first used."""

SUBREAPER: Final = 36
"""PR_SET_CHILD_SUBREAPER of Linux."""

COLD = subprocess.Popen


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in SETTLED_HERE
    }


class _Server:
    """The process that is forked, started with the first process that is wanted of it."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._said: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.environment = dict(os.environ)

    def fork(self, job: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """The process id of a new child of this process."""
        with self._lock:
            if self._socket is None:
                self._start()
            assert self._socket is not None
            # The fork's parent ends at once, and the system gives its child to the nearest ancestor that wants orphans:
            # this process, for as long as that takes.
            libc = ctypes.CDLL(None)
            libc.prctl(SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._socket, [json.dumps(job).encode()], descriptors)
                answer = self._socket.recv(64)
                self._socket.recv(64)  # the fork's parent has ended
            finally:
                libc.prctl(SUBREAPER, 0, 0, 0, 0)
        assert answer, f"the process that is forked has ended: {self.said()}"
        return int(answer)

    def said(self) -> str:
        """What it printed so far."""
        assert self._said is not None
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        with theirs:
            self._process = COLD(
                [sys.executable, __file__, str(theirs.fileno())],
                env={**self.environment, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"},
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait()
        if self._said is not None:
            self._said.close()
        self._socket = self._process = self._said = None


SERVER: Final = _Server()


class WarmPopen(subprocess.Popen[Any]):
    """A Popen that forks Python processes, where that comes to the same as starting them."""

    def _execute_child(self, *args: Any) -> None:
        names = list(inspect.signature(COLD._execute_child).parameters)[1:]  # type: ignore[attr-defined]
        given = dict(zip(names, args, strict=True))
        job = _job(given)
        if job is None:
            super()._execute_child(*args)  # type: ignore[misc]
            return
        pipes = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        standard = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        self.pid = SERVER.fork(job, [*standard, *job["fds"]])
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def _job(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a forked process is to do; None: only a process of its own does it."""
    command = given["args"]
    if isinstance(command, str | bytes | os.PathLike) or given["shell"] or given["preexec_fn"]:
        return None
    if not given["close_fds"] or any(given[name] is not None for name in ("gid", "gids", "uid")):
        return None
    words = [os.fsdecode(each) for each in command]
    if words[0] != sys.executable:
        scripts = Path(sys.executable).parent
        head = f"#!{scripts}/".encode()
        if Path(words[0]).parent != scripts or not Path(words[0]).read_bytes().startswith(head):
            return None
        words = [sys.executable, "-P", *words]
    environment = {os.fsdecode(k): os.fsdecode(v) for k, v in (given["env"] or os.environ).items()}
    if _read_at_import(environment) != _read_at_import(SERVER.environment):
        return None
    is_safe = words[1:2] == ["-P"]
    words = words[2:] if is_safe else words[1:]
    if not words or (words[0].startswith("-") and words[0] not in ("-c", "-m")):
        return None
    return {
        "words": words,
        "is_safe": is_safe,
        "environment": environment,
        "folder": os.fspath(Path(given["cwd"] or os.curdir).absolute()),
        "fds": sorted(given["pass_fds"]),
        "new_session": given["start_new_session"],
        "group": given.get("process_group", -1),
        "umask": given["umask"],
    }


def choose(is_warm: bool) -> None:
    """Let processes that are started from now on be forked ones, or cold ones."""
    subprocess.Popen = WarmPopen if is_warm else COLD  # type: ignore[misc]


# --------------------------------------------------------------------------------------- in the process that is forked


def main() -> None:
    """Fork for each request, until the one who asks is gone."""
    import importlib

    base = [each for each in sys.path[1:] if each not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
    sys.path.insert(1, os.fspath(Path(__file__).parents[1] / "runtime"))
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child that collects would copy every page of what is shared
    connection = socket.socket(fileno=int(sys.argv[1]))
    while True:
        request, fds, _, _ = socket.recv_fds(connection, 1 << 20, 64)
        if not request:
            return
        child = os.fork()
        if child == 0:
            between = os.getpid()
            grandchild = os.fork()
            if grandchild == 0:
                connection.close()
                _be(json.loads(request), fds, between, base)
            connection.send(str(grandchild).encode())
            os._exit(0)
        os.waitpid(child, 0)
        connection.send(b"done")
        for fd in fds:
            os.close(fd)


def _be(job: Mapping[str, Any], fds: Sequence[int], between: int, base: Sequence[str]) -> NoReturn:
    """Be the process that was asked for, and end as an interpreter ends."""
    while os.getppid() == between:  # the one who asked is not our parent yet
        time.sleep(0.0005)
    if job["new_session"]:
        os.setsid()
    elif job["group"] not in (None, -1):
        os.setpgid(0, job["group"])
    if job["umask"] is not None and job["umask"] >= 0:
        os.umask(job["umask"])
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 500) for fd in fds]
    os.closerange(0, 500)
    for fd, number in zip(high, [0, 1, 2, *job["fds"]], strict=True):
        os.dup2(fd, number, inheritable=True)
        os.close(fd)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    _obey(job["environment"])
    status = 1
    try:
        try:
            _run(job["words"], job["is_safe"], job["environment"], base)
            status = 0
        finally:
            threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit as end:
        status = _status(end.code)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - what an interpreter does with an error that nobody caught
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _status(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _obey(environment: Mapping[str, str]) -> None:
    """Do what an interpreter and the libraries do with the environment when they begin."""
    through = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(open(0, "rb", closefd=False))  # noqa: SIM115
    out = open(1, "wb", closefd=False, buffering=0 if through else -1)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(out, write_through=through)
    errors = open(2, "wb", closefd=False, buffering=0 if through else -1)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        errors, errors="backslashreplace", line_buffering=True, write_through=through
    )
    import huggingface_hub.constants
    import torch

    offline = environment.get("HF_HUB_OFFLINE", environment.get("TRANSFORMERS_OFFLINE", ""))
    huggingface_hub.constants.HF_HUB_OFFLINE = offline.upper() in ("1", "ON", "YES", "TRUE")
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


def _run(words: Sequence[str], is_safe: bool, environment: Mapping[str, str], base: Sequence[str]) -> None:
    path = [
        os.fspath(Path(each).absolute())
        for each in environment.get("PYTHONPATH", "").split(os.pathsep)
        if each
    ]
    if words[0] == "-m":
        first, name, sys.argv = os.fspath(Path.cwd()), words[1], ["-m", *words[2:]]
    elif words[0] == "-c":
        first, name, sys.argv = "", "", ["-c", *words[2:]]
    else:
        first, name, sys.argv = os.fspath(Path(words[0]).resolve().parent), "", list(words)
    sys.path[:] = [*([] if is_safe else [first]), *path, *base]
    if words[0] == "-m":
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    if words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), module.__dict__)
        return
    module.__file__ = words[0]
    exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), module.__dict__)


if __name__ == "__main__":
    main()
