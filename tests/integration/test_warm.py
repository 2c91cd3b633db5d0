"""Forked processes are to tests what processes of their own are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(code: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_a_forked_process_is_our_child_and_has_what_takes_seconds_to_import() -> None:
    found = run("import os, sys; print(os.getppid(), 'torch' in sys.modules, sys.argv)", "a", "b")
    assert found.stdout == f"{os.getpid()} True ['-c', 'a', 'b']\n", found


@pytest.mark.cold
def test_a_cold_one_has_nothing() -> None:
    assert run("import sys; print('torch' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('why')", 1),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_it_ends_as_an_interpreter_ends(code: str, status: int) -> None:
    assert run(code).returncode == status


def test_what_it_begins_is_finished_before_it_ends() -> None:
    code = "import atexit, threading; atexit.register(print, 'c'); threading.Thread(target=print, args='b').start()"
    assert run(f"print('a'); {code}").stdout.split() == ["a", "b", "c"]


def test_it_obeys_its_environment_folder_and_descriptors(tmp_path: Path) -> None:
    (tmp_path / "lies_here.py").write_text("print('found')")
    reader, writer = os.pipe()
    code = f"import lies_here, os; os.write({writer}, (os.environ['A'] + os.getcwd()).encode())"
    environment = {**os.environ, "A": "b", "PYTHONPATH": str(tmp_path)}
    found = run(code, env=environment, cwd=tmp_path, pass_fds=[writer])
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert (found.stdout, pipe.read().decode()) == ("found\n", f"b{tmp_path}")


def test_it_reads_and_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print(input()); import time; time.sleep(1000)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"yes\n")
        assert process.stdout.readline() == b"yes\n"
        assert process.poll() is None
        process.terminate()
        assert process.wait() == -signal.SIGTERM


def test_what_reads_the_environment_at_its_import_is_started_cold() -> None:
    code = "import os, sys; print('torch' in sys.modules)"
    assert run(code, env={**os.environ, "PYTHONHASHSEED": "1"}).stdout == "False\n"
