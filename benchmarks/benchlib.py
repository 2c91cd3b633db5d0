"""Time whole commands beside each other, fairly on a virtual machine: primed memory, known page cache, interleaved.

What the benchmarks share. The method and its reasons are in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import platform
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARDPREP = Path(sys.executable).parent / "shardprep"
MIB = 2**20
SAMPLE_EVERY_MS = 5
FAMILY_EVERY = 0.05  # seconds
CACHESTAT = 451  # its number on every architecture; Linux 6.5
READY, GO = b"ready\n", b"go\n"
BEGAN = "BENCH_BEGAN"
"""In a measured process's environment: when it was started, on the monotonic clock that all processes share."""


# ------------------------------------------------------------------------------------------------- what is measured
@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do the job, as a command that is run whole."""

    name: str
    command: tuple[str, ...]
    reads: tuple[Path, ...]
    """Files that are in the page cache before a warm run, and evicted before a cold one."""
    writes: Path | None = None
    """A folder that is removed before and after each run; its parent exists."""
    primes: int = 0
    """Bytes of memory that are touched and freed just before the timed part: about what it will use."""
    shared: bool = True
    """Whether shared memory counts as anonymous: not where the destination is a mapped file in /dev/shm."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a variant took, children included."""

    seconds: float
    """From before the process was started until it had ended, less the pauses that it asked for."""
    cpu_seconds: float
    anonymous: int
    """Peak bytes of memory that no file backs (RssAnon and RssShmem, sampled every 5 ms): a limit cannot take it back."""
    resident: int
    """Peak bytes resident (ru_maxrss), pages of files included."""
    disk_read: int
    """Bytes that came from the disk (read_bytes of /proc/PID/io)."""
    own: dict[str, float] = field(default_factory=dict)
    """Figures that the process measured and reported itself."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure to hold. It is met at or below `limit`; `aim` is where we want it."""

    text: str
    value: float
    limit: float
    aim: float | None = None
    unit: str = "x"
    at_least: bool = False

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        ok = self.value >= self.limit if self.at_least else self.value <= self.limit
        aim = f", aim {self.aim:g}" if self.aim is not None else ""
        return f"{'met   ' if ok else 'MISSED'}  {self.text}: {self.value:.2f} {self.unit} ({sign} {self.limit:g}{aim})"


def memory_goal(state: str, runs: Sequence[Run], *, limit: float, aim: float) -> Goal:
    """The anonymous memory of the largest of `runs`, in MiB."""
    return Goal(
        f"{state}: anonymous memory", max(run.anonymous for run in runs) / MIB, limit, aim, unit="MiB"
    )


def compare(
    variants: Sequence[Variant], *, rounds: int, cold: bool, say: Callable[[str], None]
) -> dict[str, list[Run]]:
    """Run the variants interleaved, A B C A B C, each time as a fresh process."""
    found: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for variant in variants:
            run = measure(variant, cold=cold)
            found[variant.name].append(run)
            own = "".join(f"  {key} {value:.4g}" for key, value in run.own.items())
            say(
                f"{'cold' if cold else 'warm'} {number + 1}/{rounds}  {variant.name}: {run.seconds:.2f} s{own}"
            )
    return found


def measure(variant: Variant, *, cold: bool) -> Run:
    """Run a variant once. Raises SystemExit with its stderr where it fails."""
    if variant.writes:
        shutil.rmtree(variant.writes, ignore_errors=True)
        os.sync()  # nobody's writing is left to slow this run down
        variant.writes.mkdir()
    try:
        with tempfile.TemporaryFile() as errors:
            return _run(variant, cold, errors)
    finally:
        if variant.writes:
            shutil.rmtree(variant.writes)


def _settle(variant: Variant, cold: bool) -> None:
    """Bring memory and page cache into the state from which every variant begins."""
    for file in variant.reads:
        read_through(file)
    prime(variant.primes)
    if cold:
        for file in variant.reads:  # last, so that the memory that it is read into again is still ours
            evict(file)


def _run(variant: Variant, cold: bool, errors: Any) -> Run:
    _settle(variant, cold)
    began = time.monotonic()
    process = subprocess.Popen(
        variant.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        bufsize=0,
        env={**os.environ, BEGAN: repr(began)},
    )
    assert process.stdin and process.stdout
    pid_fd = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(pid_fd, select.POLLIN)
    poll.register(process.stdout, select.POLLIN)
    said, paused, unbacked = b"", 0.0, 0
    family, looked = [process.pid], began
    try:
        while True:
            events = dict(poll.poll(SAMPLE_EVERY_MS))
            now = time.monotonic()
            if events.get(process.stdout.fileno(), 0) & select.POLLIN:
                said += os.read(process.stdout.fileno(), 2**16)
                if said.endswith(READY):
                    _settle(variant, cold)
                    paused += time.monotonic() - now
                    process.stdin.write(GO)
            elif process.stdout.fileno() in events:
                poll.unregister(process.stdout)
            if pid_fd in events:
                break
            if now - looked > FAMILY_EVERY:
                family, looked = descendants(process.pid), now
            unbacked = max(unbacked, anonymous(*family, shared=variant.shared))
    except BaseException:  # stopped by hand: it must not go on without us
        process.kill()
        raise
    os.close(pid_fd)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its /proc entry stays until it is reaped
    disk_read = counters(process.pid)["read_bytes"]
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said += process.stdout.read()
    process.stdin.close()
    process.stdout.close()
    if process.returncode:
        errors.seek(0)
        sys.exit(f"{variant.name}: exit {process.returncode}\n{errors.read().decode()}")
    last = said.decode().strip().rpartition("\n")[2]
    own = json.loads(last) if last.startswith('{"own"') else {"own": {}}
    return Run(
        seconds=now - began - paused,
        cpu_seconds=used.ru_utime + used.ru_stime,
        anonymous=unbacked,
        resident=used.ru_maxrss * 1024,
        disk_read=disk_read,
        own=own["own"],
    )


# ------------------------------------------------------------------------------------------ within a measured process
def ready() -> None:
    """Called by a measured process once its imports are done: memory is primed now, and the clock stands still."""
    os.write(1, READY)
    if os.read(0, len(GO)) != GO:
        sys.exit("not started by the benchmark")


def report(**own: float) -> None:
    """Called by a measured process: hand figures of its own to the benchmark."""
    print(json.dumps({"own": own}), flush=True)


def counters(pid: int | str = "self") -> dict[str, int]:
    """/proc/PID/io: rchar are bytes asked for by read calls, read_bytes those that came from the disk."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}


def anonymous(*pids: int | str, shared: bool = True) -> int:
    """Bytes of processes' memory that no file backs; a shared anonymous mapping counts as shmem, and once."""
    own, common = 0, 0
    for pid in pids or ("self",):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            found = {
                kind: int(size) * 1024
                for kind, size in re.findall(r"^Rss(Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE)
            }
            own += found.get("Anon", 0)
            common = max(common, found.get("Shmem", 0))
    return own + (common if shared else 0)


def descendants(pid: int) -> list[int]:
    """A process and everything that it has started and that is still there."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


# -------------------------------------------------------------------------------------------- memory and page cache
def prime(size: int) -> None:
    """Touch and free memory, in a process of its own, so that the host has given it to this machine.

    A virtual machine gives freed memory back to its host within a second; what touches it next pays 2 to 3 s per GiB.
    """
    if size:
        subprocess.run([sys.executable, "-S", __file__, "prime", str(size)], check=True)


def _prime(size: int) -> None:
    size = min(size, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE * 3 // 4)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # huge pages go back to the host at once when they are freed
        memory[:: mmap.PAGESIZE] = bytes(-(-size // mmap.PAGESIZE))


def read_through(file: Path) -> None:
    """Bring a file into the page cache."""
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(MIB)
        while stream.readinto(buffer):
            pass


def evict(file: Path) -> None:
    """Take a file out of the page cache. Exits where the kernel keeps any of it."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = cached_pages(stream.fileno())
        if left:
            sys.exit(f"{file.name}: {left} pages stay in memory; use --warm, or --work on a disk")


def cached_pages(fd: int) -> int | None:
    """Pages of a file that are in the page cache; None where the kernel cannot say."""
    everything, found = (ctypes.c_uint64 * 2)(0, 2**62), (ctypes.c_uint64 * 5)()
    return None if ctypes.CDLL(None).syscall(CACHESTAT, fd, everything, found, 0) else found[0]


# -------------------------------------------------------------------------------------------------- the benchmarks
def options(
    doc: str, *, extra: Callable[[argparse.ArgumentParser], object] = lambda _: None
) -> argparse.Namespace:
    """Parse what all benchmarks take."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--size", default="2GiB", help="of the random checkpoint that is made (default: 2GiB)"
    )
    parser.add_argument(
        "--max-shard-size", default="1GB", help="of one file of it (default: 1GB); a tensor is never cut"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="use this Llama checkpoint of .bin files instead of a random one"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each variant (default: 5)")
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--cold", action="store_true", help="only with the source evicted from the page cache")
    state.add_argument("--warm", action="store_true", help="only with the source in the page cache")
    parser.add_argument(
        "--json", action="store_true", help="every run as JSON on stdout; the table to stderr"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".bench", help="a folder on a disk (default: .bench)"
    )
    extra(parser)
    found = parser.parse_args()
    if found.rounds < 1:
        parser.error("--rounds: at least 1")
    found.states = [cold for cold, other in ((False, found.cold), (True, found.warm)) if not other]
    return found


def compare_states(
    variants: Sequence[Variant], chosen: argparse.Namespace
) -> dict[str, dict[str, list[Run]]]:
    """What `compare` finds in each state of the page cache that was asked for."""
    return {
        "cold" if cold else "warm": compare(variants, rounds=chosen.rounds, cold=cold, say=say)
        for cold in chosen.states
    }


@contextlib.contextmanager
def workspace(chosen: argparse.Namespace) -> Iterator[Path]:
    """A new folder for one benchmark's files, removed at its end."""
    chosen.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=chosen.work) as folder:
        yield Path(folder)
    with contextlib.suppress(OSError):  # someone else's files are in it
        chosen.work.rmdir()


def make_checkpoint(chosen: argparse.Namespace, out: Path, *, kind: str = "bin", size: str = "") -> Path:
    """A random Llama-shaped checkpoint; the same model in whichever format."""
    script = ROOT / "benchmarks/make_random_checkpoint.py"
    run_once(
        sys.executable,
        script,
        out,
        "--size",
        size or chosen.size,
        "--format",
        kind,
        "--max-shard-size",
        chosen.max_shard_size,
    )
    return out


def run_once(*command: str | Path, timeout: float | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command that is not measured. Exits with what it said where it fails. Returns its stderr."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=env)
    if done.returncode:
        sys.exit(f"{shlex.join(words)}: exit {done.returncode}\n{done.stderr}")
    return done.stderr


def peer(name: str, *words: str | Path | int) -> tuple[str, ...]:
    """The command that runs function `name` of the script that is running, in a process of its own."""
    return (sys.executable, str(Path(sys.argv[0]).resolve()), "peer", name, *map(str, words))


def run_peer(peers: Mapping[str, Callable[..., None]]) -> bool:
    """Whether this process is a measured one; then it has done its work."""
    if sys.argv[1:2] != ["peer"]:
        return False
    peers[sys.argv[2]](*sys.argv[3:])
    return True


def imports_torch(*command: str | Path) -> bool:
    """Whether a Python script imports torch (`-X importtime` lists every import). Runs it."""
    log = run_once(sys.executable, "-X", "importtime", *command)
    return bool(re.search(r"\| +torch(\.|$)", log, re.MULTILINE))


WITHOUT_FSYNC = (
    sys.executable,
    "-c",
    "import os; os.fsync = lambda fd: None; from shardprep.cli import main; main()",
)
"""shardprep without its fsyncs: for comparing with a cp that has none either, never for use."""


def cp_and_sync(files: Sequence[Path], out: Path) -> tuple[str, ...]:
    """cp, then the files to disk: what our commands do before they say that they are done."""
    return (
        "sh",
        "-c",
        'out=$1; shift; cp "$@" "$out" && exec sync "$out"/*',
        "sh",
        str(out),
        *map(str, files),
    )


# ------------------------------------------------------------------------------------------------------------- tables
def middle(runs: Sequence[Run], figure: Callable[[Run], float]) -> float:
    return median(map(figure, runs))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first the heading, in columns; all but the first column to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def of_commands(found: Mapping[str, Sequence[Run]], *, ours: str) -> str:
    """The table of whole commands: against cp, the first variant, and against `ours`."""
    cp = middle(next(iter(found.values())), lambda run: run.seconds)
    own = middle(found[ours], lambda run: run.seconds)
    rows = [("", "seconds", "min-max", "x cp", "x ours", "CPU s", "anon MiB", "RSS MiB", "disk MB")]
    for name, runs in found.items():
        seconds = [run.seconds for run in runs]
        rows.append(
            (
                name,
                f"{median(seconds):.2f}",
                f"{min(seconds):.2f}-{max(seconds):.2f}",
                f"{median(seconds) / cp:.2f}",
                f"{median(seconds) / own:.2f}",
                f"{middle(runs, lambda run: run.cpu_seconds):.2f}",
                f"{max(run.anonymous for run in runs) / MIB:.0f}",
                f"{max(run.resident for run in runs) / MIB:.0f}",
                f"{middle(runs, lambda run: run.disk_read) / 1e6:.0f}",
            )
        )
    return table(rows)


def machine() -> dict[str, object]:
    """What the figures depend on; nothing that names this machine."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    import importlib.metadata as metadata

    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.machine(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE / 2**30, 1),
        "kernel": platform.release().partition("-")[0],
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "safetensors", "blake3")},
    }


def commit() -> str:
    """The commit that is measured; `+` behind it where the working tree differs."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "shardprep", "runtime", "benchmarks")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def publish(
    chosen: argparse.Namespace,
    about: str,
    sections: Sequence[tuple[str, str]],
    goals: Sequence[Goal],
    results: Mapping[str, Mapping[str, Sequence[Run]]],
) -> None:
    """Print tables and goals for people, and with --json every run for programs."""
    hidden = {
        "--checkpoint",
        "--work",
        "--cache",
    }  # where things lie on this machine is nobody else's business
    arguments = [
        word
        for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)
        if word not in hidden and before not in hidden and not word.startswith(tuple(f"{h}=" for h in hidden))
    ]
    command = shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    about_machine, revision = machine(), commit()
    out = sys.stderr if chosen.json else sys.stdout
    print(f"\n{about}\ncommand: {command}   commit: {revision}   rounds: {chosen.rounds}, medians", file=out)
    print("machine: " + ", ".join(f"{key} {value}" for key, value in about_machine.items()), file=out)
    for title, body in sections:
        print(f"\n{title}\n{body}", file=out)
    print("\ngoals\n" + "\n".join(goal.line() for goal in goals), file=out)
    if chosen.json:
        fields = {
            "command": command,
            "commit": revision,
            "about": about,
            "machine": about_machine,
            "goals": [asdict(goal) for goal in goals],
            "runs": {
                state: {name: [asdict(run) for run in runs] for name, runs in found.items()}
                for state, found in results.items()
            },
        }
        print(json.dumps(fields, indent=2))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _prime(int(sys.argv[2]))
