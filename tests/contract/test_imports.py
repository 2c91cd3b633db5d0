"""Importing defines and does nothing else; a worker imports no more than its job needs; commands keep their options."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

import frozen_models
import shardprep
import shardprep_runtime
from shardprep.cli import COMMANDS, main

SHARDS = Path(__file__).parents[1] / "data/v1/llama-tied-kv2-tp4"

HEAVY = {
    "torch", "numpy", "transformers", "ml_dtypes", "safetensors",
    "huggingface_hub", "httpx", "httpx2", "boto3", "botocore", "obstore",
}  # fmt: skip
"""What no import and no command may bring in that does not need it."""

COMMAND_LINE = {"click", "tqdm", "isal", "shardprep"}
"""What a worker has no use for either."""

LOAD = """
import shardprep_runtime
with shardprep_runtime.load({path!r}, tensor_parallel_size=2, rank=1, verify={verify!r}) as shard:
    assert sum(len(shard.memory(name)) for name in shard.view.tensors) == shard.nbytes
"""


OF_ENGINES = {
    *(f"shardprep_runtime.engines.{name}" for name in ("ray_llm", "shardtensor", "vllm_loader")),
    *(f"shardprep_runtime.stage.{name}" for name in ("kv_cache", "model", "relay", "trial", "weights")),
    *(f"shardprep.quantize.{name}" for name in ("unquantized", "walk")),
}
"""Modules that import torch, or an engine: nothing imports them before it has that."""


def run(code: str) -> str:
    """What `code` prints in a Python of its own that knows nothing of this one, warnings being errors."""
    done = subprocess.run(  # -B: what the interpreter keeps of what it compiles is no deed of ours
        [sys.executable, "-B", "-P", "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(expression: str) -> str:
    return f"\nimport json as _json, sys as _sys; print(_json.dumps({expression}))"


def imported_by(code: str) -> set[str]:
    """The top-level modules that `code` imports and a bare Python does not, however hidden."""
    return _loaded(code) - _loaded_by_nothing() - sys.stdlib_module_names


def _loaded(code: str) -> set[str]:
    names = report("sorted({name.partition('.')[0] for name in _sys.modules})")
    return set(json.loads(run(code + names).splitlines()[-1]))


@cache
def _loaded_by_nothing() -> set[str]:
    return _loaded("")


# ---------------------------------------------------------------------------------------------------- what is imported


def test_the_runtime_is_standard_library_alone() -> None:
    assert imported_by("import shardprep_runtime") == {"shardprep_runtime"}


def test_every_public_name_of_the_runtime_comes_without_torch() -> None:
    assert imported_by("from shardprep_runtime import *") == {"shardprep_runtime"}


def test_every_module_of_the_runtime_is_standard_library_alone() -> None:
    modules = [
        module.name
        for module in pkgutil.walk_packages(shardprep_runtime.__path__, "shardprep_runtime.")
        if module.name not in OF_ENGINES
    ]
    assert "shardprep_runtime.shard.tensors" in modules
    assert imported_by("import " + ", ".join(modules)) == {"shardprep_runtime"}


@pytest.mark.parametrize(
    ("verify", "expected"),
    [("off", set()), ("headers", set()), ("blocks", {"blake3"})],
)
def test_a_worker_that_reads_bytes_imports_at_most_blake3(verify: str, expected: set[str]) -> None:
    found = imported_by(LOAD.format(path=str(SHARDS), verify=verify))
    assert found == {"shardprep_runtime", *expected}
    assert not found & (HEAVY | COMMAND_LINE)


def test_a_worker_that_loads_from_a_folder_knows_no_network() -> None:
    """Neither a client nor the standard library's TLS and HTTP: they cost a worker's start what they are never used for."""
    code = LOAD.format(path=str(SHARDS), verify="blocks")
    loaded = set(json.loads(run(code + report("sorted(_sys.modules)")).splitlines()[-1]))
    assert not loaded & {"ssl", "socket", "http.client", "email", "asyncio", "subprocess", "argparse"}
    assert not loaded & {
        f"shardprep_runtime.{name}"
        for name in ("stores.s3", "stores.s3_client", "stores.connection", "shard.fetch_processes")
    }


LOAD_FROM_STORE = """
import sys
from pathlib import Path
sys.path.append({tests!r})
from stores import make_store
import shardprep_runtime
store = make_store(Path({path!r}), Path({folder!r}) / "store")
cache = Path({folder!r}) / "cache"
shardprep_runtime.prefetch(f"file://{{store}}", cache=cache, tensor_parallel_size=2, rank=1).wait()
with shardprep_runtime.load(f"file://{{store}}", cache=cache, tensor_parallel_size=2, rank=1) as shard:
    assert sum(len(shard.memory(name)) for name in shard.view.tensors) == shard.nbytes
"""


def test_a_store_in_a_folder_needs_no_client(tmp_path: Path) -> None:
    code = LOAD_FROM_STORE.format(tests=str(SHARDS.parents[2]), path=str(SHARDS), folder=str(tmp_path))
    assert imported_by(code) == {"shardprep_runtime", "blake3", "stores"}


def test_the_command_that_fetches_before_a_worker_is_the_runtime_alone() -> None:
    code = "from shardprep_runtime.shard.prefetch_command import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert imported_by(code) == {"shardprep_runtime"}


def test_a_tensor_imports_torch_and_nothing_of_the_preparing_side() -> None:
    code = LOAD.format(path=str(SHARDS), verify="blocks") + "    shard['model.norm.weight']\n"
    found = imported_by(code)
    assert "torch" in found
    assert not found & (COMMAND_LINE - {"tqdm"} | {"transformers", "boto3", "safetensors"})


def test_the_preparing_side_imports_nothing_until_asked() -> None:
    assert imported_by("import shardprep") == {"shardprep", "shardprep_runtime"}


def test_check_arch_imports_neither_torch_nor_transformers_until_a_check_begins() -> None:
    assert not imported_by("import shardprep.check, shardprep.check.worker") & HEAVY


def command(*args: str) -> str:
    return f"from shardprep.cli import main\nmain({list(args)!r}, standalone_mode=False)"


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_click_alone(args: list[str]) -> None:
    assert imported_by(command(*args)) == {"click", "shardprep", "shardprep_runtime"}


def test_help_imports_no_command() -> None:
    modules = json.loads(run(command("--help") + report("list(_sys.modules)")).splitlines()[-1])
    ours = {name for name in modules if name.partition(".")[0] == "shardprep"}
    assert ours == {"shardprep", "shardprep.cli"}


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain pytorch_model.bin and its config."""
    import torch

    folder = tmp_path_factory.mktemp("pickled")
    model = frozen_models.MODELS["smallest"]
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in model.shapes.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(model.config))
    return folder


def test_commands_on_a_plain_pickle_import_neither_torch_nor_numpy(pickled: Path, tmp_path: Path) -> None:
    shards, tensors, back = (str(tmp_path / name) for name in ("shards", "tensors", "back"))
    for args in (
        ["convert", str(pickled), tensors],
        ["split", str(pickled), shards, "-tp", "2"],
        ["verify", shards],
        ["export", shards, back],
        ["inspect", str(pickled), "--json"],
        ["plan", str(pickled), "--device-memory", "4GiB"],
        ["push", shards, f"file://{tmp_path}/store"],
        ["pull", f"file://{tmp_path}/store", str(tmp_path / "pulled"), "--all"],
    ):
        found = imported_by(command(*args))
        assert not found & HEAVY, args
        assert found <= {"blake3", "click", "isal", "shardprep", "shardprep_runtime"}, args


def test_a_package_is_not_a_command() -> None:
    for name in ("shardprep", "shardprep_runtime"):
        done = subprocess.run([sys.executable, "-m", name], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "cannot be directly executed" in done.stderr


# ---------------------------------------------------------------------------------------------------- what it does

SPY = """
import os, sys, threading
seen = []  # [event, what, file of the caller]

def caller():  # the first frame that is none of the mapping's own
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename in (os.__file__, "<frozen os>", "<frozen _collections_abc>"):
        frame = frame.f_back
    return frame.f_code.co_filename

class Spy(type(os.environ)):
    def __getitem__(self, key):
        seen.append(["environment", str(key), caller()])
        return super().__getitem__(key)
    def __iter__(self):
        seen.append(["environment", "all", caller()])
        return super().__iter__()
    def __setitem__(self, key, value):
        seen.append(["environment", str(key), caller()])
        super().__setitem__(key, value)
    __contains__ = lambda self, key: self.get(key) is not None

os.environ.__class__ = Spy

def start(thread, real=threading.Thread.start):  # not every Python reports it to the audit hook
    seen.append(["thread", thread.name, ""])
    real(thread)

threading.Thread.start = start
"""

AUDIT = """
def audit(event, args):
    if event == "open":
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else str(args[0])
        if not path.endswith((".py", ".pyc", ".so")):
            seen.append([event, path, ""])
    elif event.partition(".")[0] in ("socket", "subprocess", "_thread", "shutil", "tempfile", "signal", "ctypes") \\
            or event in ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.putenv", "os.unsetenv", "os.mkdir",
                         "os.remove", "os.rename", "os.chmod", "os.utime", "mmap.__new__", "sys.setprofile"):
        seen.append([event, str(args), ""])

sys.addaudithook(audit)
"""


def deeds(code: str, *, after: str = "") -> list[list[str]]:
    """What `code` does beside defining: [event, what, file of the caller]. `after` is imported unobserved."""
    watched = after + SPY + AUDIT + code + report("seen")
    return json.loads(run(watched).splitlines()[-1])


def all_modules() -> str:
    """An import of every module of both packages."""
    names = [
        module.name
        for package in (shardprep_runtime, shardprep)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if module.name not in OF_ENGINES
    ]
    assert "shardprep.source.torch_zip" in names
    return "import shardprep_runtime, shardprep\n" + "\n".join(f"import {name}" for name in names)


def test_the_spy_sees_what_it_should() -> None:
    code = "import threading\nos.environ.get('HOME'); os.getenv('USER'); 'PATH' in os.environ; list(os.environ)\n"
    code += "open('/dev/null').close(); threading.Thread(name='mine', target=int).start()\n"
    found = deeds(code)
    assert ["environment", "HOME", "<string>"] in found
    assert ["environment", "USER", "<string>"] in found
    assert ["environment", "PATH", "<string>"] in found
    assert ["environment", "all", "<string>"] in found
    assert ["open", "/dev/null", ""] in found
    assert ["thread", "mine", ""] in found


def test_importing_the_runtime_does_nothing_at_all() -> None:
    assert deeds("import shardprep_runtime") == []


def test_importing_what_a_worker_calls_first_does_nothing_at_all() -> None:
    assert (
        deeds(
            "import shardprep_runtime.shard.prefetch, shardprep_runtime.shard.cache, shardprep_runtime.stores.store"
        )
        == []
    )


def test_importing_any_module_of_ours_does_nothing() -> None:
    """What others do when they are imported is theirs: they are imported first."""
    theirs = "import blake3, click, isal.isal_zlib, importlib.resources\n"
    found = deeds(all_modules(), after=theirs)
    # click asks for the language when an option is declared, to translate its own words
    assert [deed for deed in found if not deed[2].endswith("/gettext.py")] == []


def test_importing_changes_nothing_that_is_shared() -> None:
    code = (
        "import logging, signal, warnings, sys\n"
        "def state():\n"
        "    return [logging.root.level, len(logging.root.handlers), list(map(repr, warnings.filters)),\n"
        "            repr(signal.getsignal(signal.SIGINT)), sys.getrecursionlimit(), len(sys.path), sys.excepthook is"
        " sys.__excepthook__]\n"
        "import blake3, click, isal.isal_zlib\n"
        "before = state()\n" + all_modules()
    )
    assert json.loads(run(code + report("before == state()")))


def test_no_environment_variable_of_the_command_line() -> None:
    """A Kubernetes Service named shardprep sets SHARDPREP_PORT and the like in every pod."""
    assert main.context_settings.get("auto_envvar_prefix") is None
    for name in COMMANDS:
        assert not [param.name for param in get_command(name).params if param.envvar]
    environment = {**os.environ, "SHARDPREP_PORT": "tcp://10.0.0.1:80", "SHARDPREP_SPLIT_JSON": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command("--version")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == run(command("--version"))


# ---------------------------------------------------------------------------------------------------- the command line

ACCESS = ["--endpoint-url", "--profile", "--region", "--no-sign-request"]

OF_SPLIT = [
    "SOURCE",
    "--stages",
    "-tp/--tensor-parallel-size",
    "--spares",
    "--transport",
    "--no-replace",
    "--no-fallback",
    "--draft",
    "--draft-tokens",
    "--max-in-flight",
    "--device",
    "--threads",
    "--dtype",
    "--step-timeout",
    "--verify",
    "--revision",
    "--manifest-digest",
    *ACCESS,
]
"""Of what runs a split model."""

SURFACE: dict[str, list[str]] = {
    "quantize": [
        "SOURCE",
        "DESTINATION",
        "--method",
        "--bits",
        "--group-size",
        "--symmetric",
        "--act-order",
        "--skip",
        "-tp/--tensor-parallel-size",
        "--pad-to-tp",
        "--engine",
        "--engine-python",
        "--device",
        "--dtype",
        "--calibration",
        "--samples",
        "--sequence-length",
        "--column",
        "--seed",
        "--batch-size",
        "--evaluate",
        "--evaluate-tokens",
        "--no-evaluate",
        "--max-kl",
        "--work",
        "--max-part-size",
        "--dry-run",
        "--trial",
        *ACCESS,
        "--json",
    ],
    "inspect": ["PATH", *ACCESS, "--json"],
    "plan": [
        "SOURCE",
        "--device-memory",
        "--devices-per-host",
        "--context",
        "--batch",
        "--kv-dtype",
        "--reserve",
        "--quantize",
        "--group-size",
        "--engine",
        "--allow-generic",
        "--network",
        "--bandwidth",
        *ACCESS,
        "--json",
    ],
    "convert": [
        "SOURCE",
        "DESTINATION",
        "--max-part-size",
        "--dtype",
        "--include-code",
        *ACCESS,
        "--max-workers",
        "--json",
    ],
    "split": [
        "SOURCE",
        "DESTINATION",
        "-tp/--tensor-parallel-size",
        "-pp/--pipeline-parallel-size",
        "--stages",
        "--device-memory",
        "--context",
        "--batch",
        "--kv-dtype",
        "--reserve",
        "--max-part-size",
        "--include-code",
        "--allow-generic",
        "--probe",
        "--dry-run",
        "--revision",
        "--scratch",
        *ACCESS,
        "--max-workers",
        "--json",
    ],
    "check-arch": [
        "MODEL",
        "-tp/--tensor-parallel-size",
        "-pp/--pipeline-parallel-size",
        "-ep/--expert-parallel-size",
        "--engine",
        *ACCESS,
        "--json",
    ],
    "push": [
        "SHARD_SET",
        "STORE",
        "--revision",
        "--manifest-digest",
        "--dry-run",
        *ACCESS,
        "--max-workers",
        "--json",
    ],
    "pull": [
        "SOURCE",
        "DESTINATION",
        "--revision",
        "-tp/--tensor-parallel-size",
        "-pp/--pipeline-parallel-size",
        "-ep/--expert-parallel-size",
        "--engine",
        "--stages",
        "--rank",
        "--all",
        "--no-weights",
        "--manifest-digest",
        *ACCESS,
        "--max-workers",
        "--json",
    ],
    "revisions": ["STORE", *ACCESS, "--json"],
    "prune": ["STORE", "--grace", "--delete-revision", "--dry-run", *ACCESS, "--json"],
    "run": [
        *OF_SPLIT,
        "--prompt",
        "--prompt-file",
        "--tokens",
        "--chat",
        "--max-tokens",
        "--temperature",
        "--top-p",
        "--top-k",
        "--seed",
        "--stop",
        "--ignore-eos",
        "--breakdown",
        "--json",
    ],
    "serve": [
        *OF_SPLIT,
        "--workers",
        "--master",
        "--host",
        "--port",
        "--allow-public",
        "--model",
        "--api-key",
        "--max-waiting",
        "--grace",
    ],
    "worker": [
        "--manifest",
        "--pp-rank",
        "--spare",
        "--spare-for",
        "--master",
        "--stages",
        "-tp/--tensor-parallel-size",
        "--tp-rank",
        "--group",
        "--name",
        "--device",
        "--dtype",
        "--threads",
        "--max-sequences",
        "--wait",
        "--reconnect",
        "--revision",
        "--manifest-digest",
        "--verify",
        "--cache",
        "--no-cache",
        "--max-workers",
        "--processes",
        *ACCESS,
    ],
    "vllm": [
        "SOURCE",
        "[-- ARGUMENTS OF VLLM SERVE]",
        "--revision",
        "--manifest-digest",
        "--verify",
        "--folder",
        "--no-prefetch",
        *ACCESS,
        "--dry-run",
        "--json",
    ],
    "verify": ["SHARD_SET", "--fast", "--manifest-digest", "--max-workers", "--json"],
    "export": [
        "SHARD_SET",
        "DESTINATION",
        "--format",
        "-tp/--tensor-parallel-size",
        "-pp/--pipeline-parallel-size",
        "-ep/--expert-parallel-size",
        "--dtype",
        "--max-part-size",
        "--max-workers",
        "--json",
    ],
}
"""Scripts are written against these. Adding is free; a name that goes or changes breaks somebody."""


def get_command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def surface(params: list[click.Parameter]) -> list[str]:
    return [p.human_readable_name if isinstance(p, click.Argument) else "/".join(p.opts) for p in params]


@pytest.mark.parametrize("name", SURFACE)
def test_a_command_keeps_its_arguments_and_options(name: str) -> None:
    params: list[Any] = get_command(name).params
    arguments = [each for each in surface(params) if not each.startswith("-")]
    assert arguments == [each for each in SURFACE[name] if not each.startswith("-")]
    missing = set(SURFACE[name]) - set(surface(params))
    assert not missing


def test_every_command_is_in_the_frozen_surface() -> None:
    assert set(COMMANDS) == set(SURFACE)
    for name in COMMANDS:
        added = set(surface(get_command(name).params)) - set(SURFACE[name])
        assert not added, f"{name}: freeze what is new: {added}"


def test_help_lists_every_command_and_a_misspelt_one_is_guessed() -> None:
    from click.testing import CliRunner

    shown = CliRunner().invoke(main, ["-h"])
    assert shown.exit_code == 0
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in " ".join(shown.output.split())
    wrong = CliRunner().invoke(main, ["spilt"])
    assert wrong.exit_code == 2
    assert "No such command 'spilt'. Did you mean 'split'?" in wrong.output


def test_the_names_that_the_runtime_exports() -> None:
    assert set(shardprep_runtime.__all__) >= {
        "Access",
        "Cache",
        "Grid",
        "Manifest",
        "Prefetch",
        "Shard",
        "ShardprepError",
        "View",
        "__version__",
        "load",
        "plan_view",
        "prefetch",
        "read_manifest",
    }
    assert callable(shardprep_runtime.load)
    assert callable(shardprep_runtime.prefetch)
    assert all(hasattr(shardprep_runtime, name) for name in shardprep_runtime.__all__)


@pytest.mark.parametrize("name", ["shardprep", "shardprep-prefetch"])
def test_a_console_script_is_a_function_that_ends_with_its_status(name: str) -> None:
    """What an installer makes of the entry is sys.exit(function())."""
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[name].partition(":")
    code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; sys.exit({function}())"
    problem = ["revisions", "/no-such-place"] if name == "shardprep" else ["file:///no-such-place"]
    for args, status in ((["--help"], 0), (problem, 1), (["--no-such-option"], 2)):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *args], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, (args, done.stderr)
        assert "Traceback" not in done.stderr
