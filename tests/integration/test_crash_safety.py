"""A run that is killed, stopped or starved leaves nothing under a final name, and the same command completes it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import small_models
from lazily import torch
from processes import ended
from shardprep.cli import main
from shardprep.convert import convert
from shardprep.split import split
from shardprep.write.conduct import Conduct
from shardprep_runtime.errors import IntegrityError, SourceError
from sweeps import swept

SHARDPREP = str(Path(sys.executable).with_name("shardprep"))
PARTIAL = ".shardprep-partial"
COMMANDS = ["convert", "split", "export"]
SPLIT_FIRST = ["split", *(pytest.param(command, marks=pytest.mark.slow) for command in ("convert", "export"))]
"""For loops of many processes: the quick run has split alone, which writes all that the others do and a manifest."""


def run(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the console script to its end; no traceback, whatever it says."""
    command = [SHARDPREP, *map(str, args)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert "Traceback" not in found.stderr
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


File = tuple[int, int]
"""Inode and time of the last change: the same only where nobody wrote the file again."""


def identities(folder: Path) -> dict[str, File]:
    """The safetensors files of a folder that may be renamed under our eyes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found


def finished(destination: Path) -> dict[str, File]:
    """The finished parts of an unfinished run."""
    return identities(destination / PARTIAL)


def assert_unfinished(destination: Path) -> None:
    """Nothing stands under a final name, and no command takes the folder for anything."""
    assert [path.name for path in destination.iterdir()] == [PARTIAL]
    for command in ("inspect", "verify"):
        assert CliRunner().invoke(main, [command, str(destination)]).exit_code == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 10 MB (`source`), its shard set (`set`), and what undisturbed runs write."""
    folder = tmp_path_factory.mktemp("model")
    config = small_models.llama_config(heads=8, kv_heads=4, head_dim=16, layers=10, intermediate=512)
    small_models.write_model(folder / "source", config, dtype=torch.float32, shards=3)
    assert run("split", folder / "source", folder / "set", "-tp", 2).returncode == 0
    for command in COMMANDS:
        found = run(*arguments(command, folder, folder / f"undisturbed-{command}"))
        assert found.returncode == 0, found.stderr
    return folder


def arguments(command: str, model: Path, destination: Path) -> list[object]:
    """A command that writes many small parts, one after the other."""
    source = model / ("set" if command == "export" else "source")
    options = ["-tp", 2] if command == "split" else []
    return [command, source, destination, *options, "--max-part-size", "70KB", "--max-workers", 1]


def start(args: Sequence[object]) -> subprocess.Popen[bytes]:
    """Start the console script and come back at once."""
    return subprocess.Popen(
        [SHARDPREP, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_when(
    process: subprocess.Popen[bytes], ready: Callable[[], bool], number: int = signal.SIGKILL
) -> bool:
    """Send a signal as soon as `ready`; False where the process was done before."""
    end = time.monotonic() + 60
    try:
        while not ready() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.0005)
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()  # which does nothing to one that has ended
        process.wait()
    return process.returncode == -signal.SIGKILL


def kill_and_rerun(command: str, model: Path, destination: Path, moments: Sequence[int]) -> None:
    """Kill a run with -9 once there are as many finished parts as each moment says, then let it end, and compare."""
    args = arguments(command, model, destination)
    kept: dict[str, File] = {}
    for moment in moments:
        process = start(args)
        assert kill_when(process, lambda count=moment: len(finished(destination)) >= count)
        assert_unfinished(destination)
        found = finished(destination)
        assert len(found) >= moment
        assert kept.items() <= found.items()
        kept = found
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert contents(destination) == contents(model / f"undisturbed-{command}")
    assert kept.items() <= identities(destination).items()
    assert not (destination / PARTIAL).exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_was_killed_is_resumed_keeping_its_finished_parts(
    model: Path, tmp_path: Path, command: str
) -> None:
    kill_and_rerun(command, model, tmp_path / "there", [1, 20])


@pytest.mark.slow
# of each command one draw: a draw is but other moments of the same kill
@pytest.mark.parametrize("seed", swept(range(8), but=(0,)))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_was_killed_again_and_again_is_resumed(
    model: Path, tmp_path: Path, command: str, seed: int
) -> None:
    moments = sorted(random.Random(seed).sample(range(50), 5))
    kill_and_rerun(command, model, tmp_path / "there", moments)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_any_time_leaves_all_or_nothing(model: Path, tmp_path: Path, command: str) -> None:
    rng = random.Random(0)
    for attempt in range(15):
        destination = tmp_path / str(attempt)
        args = arguments(command, model, destination)
        process = start(args)
        with ended(process):
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            process.wait()
        if destination.exists() and process.returncode:
            last = "shardprep.json" if command == "split" else "model.safetensors.index.json"
            assert not (destination / last).exists() or complete(destination, model, command)
        done = run(*args)
        assert done.returncode == 0 or complete(destination, model, command), done.stderr
        assert complete(destination, model, command)


def complete(destination: Path, model: Path, command: str) -> bool:
    """Whether the destination holds all that an undisturbed run writes; what staging left aside."""
    found = {name: data for name, data in contents(destination).items() if not name.startswith(PARTIAL)}
    return found == contents(model / f"undisturbed-{command}")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "split"])
def test_a_run_that_was_interrupted_says_so_and_is_resumed(model: Path, tmp_path: Path, command: str) -> None:
    destination = tmp_path / "there"
    args = arguments(command, model, destination)
    process = subprocess.Popen(
        [SHARDPREP, *map(str, args)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    with ended(process):
        kill_when(process, lambda: bool(finished(destination)), signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        process.stderr.close()
    assert process.returncode == 1
    assert b"Abort" in said
    assert b"Traceback" not in said
    assert_unfinished(destination)
    assert not list((destination / PARTIAL).glob("*.unfinished"))
    assert run(*args).returncode == 0
    assert contents(destination) == contents(model / f"undisturbed-{command}")


# --------------------------------------------------------------------------------------------------- while publishing

KILL_IN_PUBLISH = """
import os, signal, sys
from shardprep.write import staging
from shardprep.cli import main
number, real = int(sys.argv.pop(1)), staging.Staging._publish
def publish(self, name):
    global number
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    number -= 1
    real(self, name)
def remove(self):
    os.kill(os.getpid(), signal.SIGKILL)
staging.Staging._publish, staging.Staging._remove = publish, remove
main()
"""
"""Runs a command and kills it -9 before the rename of that number, or before the staging folder is removed."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small sound checkpoint of one .bin."""
    return small_models.write_model(tmp_path / "source")


def killed_in_publish(number: int, *args: object) -> None:
    """Run a command that is killed before its rename of this number."""
    command = [sys.executable, "-c", KILL_IN_PUBLISH, str(number), *map(str, args)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL


def writing(command: str, source: Path, destination: Path) -> tuple[list[object], list[str]]:
    """A command that writes a few files, and their names in the order of renaming."""
    sides = ["LICENSE", "config.json", "tokenizer.json"]
    if command == "split":
        parts = [f"shard-{n:05}-model-00001-of-00001.safetensors" for n in (1, 2, 3)]
        return ["split", source, destination, "-tp", 2], [*parts, *sides, "shardprep.json"]
    names = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    return [command, source, destination, "--max-part-size", "40KB"], [
        *names,
        *sides,
        "model.safetensors.index.json",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", SPLIT_FIRST)
def test_a_run_that_was_killed_between_renames_is_completed(
    small: Path, tmp_path: Path, command: str
) -> None:
    source = small
    if command == "export":
        source = tmp_path / "set"
        assert run("split", small, source, "-tp", 2).returncode == 0
    args, names = writing(command, source, tmp_path / "undisturbed")
    assert run(*args).returncode == 0
    expected = contents(tmp_path / "undisturbed")
    assert set(expected) == set(names)
    for number in range(len(names) + 1):
        destination = tmp_path / f"killed-{number}"
        args, _ = writing(command, source, destination)
        killed_in_publish(number, *args)
        assert {path.name for path in destination.iterdir()} == {PARTIAL, *names[:number]}
        for check in ("verify", "inspect"):
            code = CliRunner().invoke(main, [check, str(destination)]).exit_code
            assert code == (0 if number == len(names) and command == "split" else 2), check
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        assert contents(destination) == expected


@pytest.mark.slow
def test_what_was_partly_published_is_not_mixed_with_another_run(small: Path, tmp_path: Path) -> None:
    destination = tmp_path / "there"
    killed_in_publish(2, "split", small, destination, "-tp", 2)
    before = contents(destination)
    for args in (
        ["split", small, destination, "-tp", 4],
        ["split", small, destination, "-tp", 2, "--stages", "0-1,2-3"],
        ["convert", small, destination],
    ):
        found = run(*args)
        assert found.returncode == 2
        assert "nothing is overwritten" in found.stderr
    os.utime(small / "pytorch_model.bin")
    assert "files of another unfinished run" in run("split", small, destination, "-tp", 2).stderr
    assert contents(destination) == before


def test_a_source_that_holds_files_named_as_our_own_is_resumed_too(small: Path, tmp_path: Path) -> None:
    (small / "journal.json").write_text("{}")
    (small / "lock.json").write_text("{}")
    killed_in_publish(6, "split", small, tmp_path / "there", "-tp", 2)
    assert run("split", small, tmp_path / "there", "-tp", 2).returncode == 0
    assert (tmp_path / "there" / "journal.json").read_text() == "{}"
    assert not (tmp_path / "there" / PARTIAL).exists()


# ------------------------------------------------------------------------------------- reruns that are not the same


def killed(model: Path, destination: Path, *, parts: int = 5) -> dict[str, File]:
    """Leave an unfinished split with some parts finished; these."""
    assert kill_when(
        start(arguments("split", model, destination)), lambda: len(finished(destination)) >= parts
    )
    return finished(destination)


@pytest.mark.slow
def test_a_rerun_with_other_options_discards_what_was_begun(model: Path, tmp_path: Path) -> None:
    begun = killed(model, tmp_path / "there")
    args = [*arguments("split", model, tmp_path / "there"), "--stages", "0-3,4-9"]
    found = run(*args)
    assert found.returncode == 0
    assert "an unfinished run with other input or options is discarded" in found.stderr
    args[2] = tmp_path / "fresh"
    assert run(*args).returncode == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "fresh")
    assert not begun.items() & identities(tmp_path / "there").items()


@pytest.mark.slow
def test_a_rerun_of_another_command_discards_what_was_begun(model: Path, tmp_path: Path) -> None:
    killed(model, tmp_path / "there")
    assert run(*arguments("convert", model, tmp_path / "there")).returncode == 0
    assert contents(tmp_path / "there") == contents(model / "undisturbed-convert")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "config.json"])
def test_a_rerun_after_the_source_changed_does_not_mix_the_two(
    model: Path, tmp_path: Path, what: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model / "source", copy / "source")
    killed(copy, tmp_path / "there")
    if what == "weights":
        path = sorted((copy / "source").glob("*.bin"))[0]
        torch.save({name: -tensor for name, tensor in torch.load(path).items()}, path)
    else:
        config = json.loads((copy / "source" / what).read_bytes())
        (copy / "source" / what).write_text(json.dumps({**config, "of_mine": 1}))
    assert run(*arguments("split", copy, tmp_path / "there")).returncode == 0
    assert run(*arguments("split", copy, tmp_path / "fresh")).returncode == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "fresh")
    assert contents(tmp_path / "there") != contents(model / "undisturbed-split")


def test_of_two_runs_to_one_destination_the_second_is_refused_and_the_first_goes_on(
    model: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "there"
    first = start(arguments("split", model, destination))
    while not finished(destination):
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    try:
        for args in (arguments("split", model, destination), arguments("convert", model, destination)):
            second = run(*args)
            assert second.returncode == 2
            assert "another shardprep is writing here" in second.stderr
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert contents(destination) == contents(model / "undisturbed-split")


def test_a_complete_destination_is_not_written_again(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "undisturbed-split", tmp_path / "there")
    found = run(*arguments("split", model, tmp_path / "there"))
    assert found.returncode == 2
    assert "nothing is overwritten" in found.stderr
    assert contents(tmp_path / "there") == contents(model / "undisturbed-split")


# ------------------------------------------------------------------------------------------- disks that are too small


@pytest.mark.parametrize("command", SPLIT_FIRST)
def test_a_file_that_grows_beyond_its_limit_is_a_problem_and_the_rerun_resumes(
    small: Path, tmp_path: Path, command: str
) -> None:
    """RLIMIT_FSIZE fails a write as a full disk does, and needs no root."""
    assert run("split", small, tmp_path / "set", "-tp", 2).returncode == 0
    source, options = (tmp_path / "set", []) if command == "export" else (small, [])
    options = ["-tp", 2] if command == "split" else options
    destination = tmp_path / "there"
    for limit in (10, 600, 4096, 20_000):
        found = run(
            *(command, source, destination, *options),
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert found.returncode == 1
        assert "there: cannot be written: File too large" in found.stderr
        assert "the same command resumes" in found.stderr
        assert len(found.stderr.splitlines()) <= 3
        assert_unfinished(destination)
        assert limit < 100 or not list((destination / PARTIAL).glob("*.unfinished"))
    assert run(command, source, destination, *options).returncode == 0
    assert run(command, source, tmp_path / "fresh", *options).returncode == 0
    assert contents(destination) == contents(tmp_path / "fresh")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system in memory of so many KiB, or gives it another size; the test is skipped where it may not."""
    folder = tmp_path / "disk"

    def resize(kib: int) -> Path:
        options = f"size={kib}k" if not folder.exists() else f"remount,size={kib}k"
        folder.mkdir(exist_ok=True)
        found = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {found.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield resize
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("command", SPLIT_FIRST)
def test_a_disk_that_is_too_small_is_a_problem_and_the_rerun_resumes(
    small: Path, tmp_path: Path, command: str, tiny_disk: Callable[[int], Path]
) -> None:
    assert run("split", small, tmp_path / "set", "-tp", 2).returncode == 0
    source = tmp_path / "set" if command == "export" else small
    options = ["-tp", 2] if command == "split" else []
    disk = tiny_disk(40)
    (disk / "mine").write_text("mine")
    args = [command, source, disk / "there", *options]
    found = run(*args)
    assert found.returncode == 1
    assert "bytes are needed" in found.stderr
    assert "are free; make room or write elsewhere" in found.stderr
    tiny_disk(88)  # enough for the data, too little for the headers and side files beside them
    found = run(*args)
    assert found.returncode == 1, found.stderr
    assert "cannot be written: No space left on device" in found.stderr
    assert len(found.stderr.splitlines()) <= 3
    assert_unfinished(disk / "there")
    tiny_disk(1000)
    assert run(*args).returncode == 0
    assert run(command, source, tmp_path / "fresh", *options).returncode == 0
    assert contents(disk / "there") == contents(tmp_path / "fresh")
    assert (disk / "mine").read_text() == "mine"


# ------------------------------------------------------------------------------------------ sources that do not stand still


Write = Callable[[Path, Path, Callable[[int], None]], Any]


def by_convert(source: Path, destination: Path, progress: Callable[[int], None]) -> None:
    convert(source, destination, conduct=Conduct(workers=1, progress=progress))


def by_split(source: Path, destination: Path, progress: Callable[[int], None]) -> None:
    split(source, destination, tensor_parallel_size=2, conduct=Conduct(workers=1, progress=progress))


def once(action: Callable[[], Any]) -> Callable[[int], None]:
    """A progress callback that acts when the first bytes were moved."""
    calls = []

    def progress(nbytes: int) -> None:
        if nbytes and not calls:
            calls.append(nbytes)
            action()

    return progress


@pytest.mark.parametrize("write", [by_convert, by_split])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_source_that_changes_while_it_is_read_gives_an_error_and_nothing_else(
    tmp_path: Path, write: Write, kind: str
) -> None:
    actions: dict[str, Callable[[Path], Any]] = {
        "touched": lambda path: os.utime(path),
        "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
        "emptied": lambda path: os.truncate(path, 0),
        "appended to": lambda path: os.truncate(path, path.stat().st_size + 1),
        "overwritten": lambda path: path.write_bytes(path.read_bytes()),
    }
    for what, action in actions.items():
        source = small_models.write_model(tmp_path / what, kind=kind)
        path = next(source.glob("*model.*"))
        os.utime(path, ns=(0, 0))
        with pytest.raises(SourceError, match=path.name) as caught:
            write(source, tmp_path / "there", once(lambda path=path, action=action: action(path)))
        assert "changed while it was read" in str(caught.value)
        assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("write", [by_convert, by_split])
def test_a_shard_that_is_replaced_before_it_is_opened_gives_an_error(tmp_path: Path, write: Write) -> None:
    source = small_models.write_model(tmp_path / "source", shards=3)
    other = small_models.write_model(tmp_path / "other", shards=3, seed=1)
    later = "pytorch_model-00002-of-00003.bin"
    with pytest.raises(SourceError, match=later):
        write(source, tmp_path / "there", once(lambda: (other / later).replace(source / later)))
    assert not (tmp_path / "there").exists()


def test_a_source_that_is_replaced_as_a_whole_is_read_to_its_end(tmp_path: Path) -> None:
    """The descriptor holds the old file: what was indexed is what is written."""
    source = small_models.write_model(tmp_path / "source")
    other = small_models.write_model(tmp_path / "other", seed=1)
    by_convert(source, tmp_path / "undisturbed", lambda _: None)
    replace = once(lambda: (other / "pytorch_model.bin").replace(source / "pytorch_model.bin"))
    by_convert(source, tmp_path / "there", replace)
    assert contents(tmp_path / "there") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("write", [by_convert, by_split])
def test_bytes_that_are_changed_in_place_unseen_are_caught_by_their_crc(tmp_path: Path, write: Write) -> None:
    source = small_models.write_model(tmp_path / "source")
    path = source / "pytorch_model.bin"
    tensor = torch.load(path)["model.layers.3.mlp.up_proj.weight"].view(torch.uint8).numpy().tobytes()
    at = path.read_bytes().index(tensor[:64])

    def change() -> None:
        before = path.stat()
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([tensor[0] ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(IntegrityError, match="crc32"):
        write(source, tmp_path / "there", once(change))
    assert not (tmp_path / "there").exists()


def test_a_failed_run_keeps_a_destination_that_was_there(tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    (tmp_path / "there").mkdir()
    with pytest.raises(SourceError):
        by_split(source, tmp_path / "there", once(lambda: os.utime(source / "pytorch_model.bin", ns=(0, 0))))
    assert list((tmp_path / "there").iterdir()) == []
