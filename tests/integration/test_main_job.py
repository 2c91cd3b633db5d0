"""The main job on a real, trained checkpoint: what is converted, split, loaded and exported is what was trained."""

from __future__ import annotations

import filecmp
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import shardprep_runtime
from lazily import load_file, torch
from processes import ended
from shardprep.convert import convert
from shardprep.export import export
from shardprep.split import SplitOptions, split
from shardprep.verify import verify
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set

CHECKPOINT = Path(__file__).parent.parent / "data" / "tiny-llama"
ROOT = CHECKPOINT.parent.parent.parent


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """The tensors as torch reads them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(CHECKPOINT.glob("*.bin")):
        found.update(torch.load(path, weights_only=True))
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main") / "converted"
    convert(CHECKPOINT, folder, max_part_bytes=2 * 10**6)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut at grain 8: more ranks than KV heads, so each head is shared by two."""
    folder = tmp_path_factory.mktemp("main") / "shards"
    split(
        CHECKPOINT,
        folder,
        tensor_parallel_size=8,
        options=SplitOptions(max_part_bytes=2**18, block_bytes=2**14),
    )
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: equal bits, whatever they mean (NaN is equal to itself)."""
    return tensor.contiguous().flatten().view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


# ---------------------------------------------------------------------------------------------------------- convert


def test_converted_tensors_have_the_bits_of_the_pickled_ones(
    converted: Path, original: dict[str, torch.Tensor]
) -> None:
    found: dict[str, torch.Tensor] = {}
    for path in converted.glob("*.safetensors"):
        found.update(load_file(path))
    assert found.keys() == original.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in original.items())


def test_the_index_names_every_tensor_and_the_totals(
    converted: Path, original: dict[str, torch.Tensor]
) -> None:
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in original.values())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in original.values())
    files = {path.name for path in converted.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert index["weight_map"].keys() == original.keys()
    for file in files:
        with safe_open(converted / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {n for n, f in index["weight_map"].items() if f == file} == set(opened.keys())


def test_side_files_travel_byte_for_byte_and_nothing_else_does(converted: Path) -> None:
    beside = {
        p.name for p in CHECKPOINT.iterdir() if p.suffix != ".bin" and not p.name.endswith(".index.json")
    }
    assert {p.name for p in converted.iterdir() if "model" not in p.name} == beside
    assert all((converted / name).read_bytes() == (CHECKPOINT / name).read_bytes() for name in beside)


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    """safetensors' own save_file writes 0600 whatever the umask is, and pods that run as another user cannot read it."""
    old = os.umask(0o027)
    try:
        convert(CHECKPOINT, tmp_path / "out")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_large_tensors_begin_at_page_boundaries(converted: Path) -> None:
    for path in converted.glob("*.safetensors"):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        assert (8 + size) % 4096 == 0
        header = json.loads(raw[8 : 8 + size])
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        assert all(start % 4096 == 0 for start, stop in spans if (stop - start) % 4096 == 0)


@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
def test_a_cast_gives_the_bits_that_torch_gives(source: str, target: str, tmp_path: Path) -> None:
    edges = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        math.inf,
        -math.inf,
        1e-8,
        6e-5,
        65504.0,
        65520.0,
        7e4,
        3e38,
        1e300,
        1 + 2**-8,
        1 + 3 * 2**-9,
        1 + 2**-11 + 2**-40,  # torch rounds to float32 on the way to float16
    ]
    drawn = torch.randn(999, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensor = torch.cat([torch.tensor(edges, dtype=torch.float64), drawn]).to(getattr(torch, source))
    torch.save(
        {"w": tensor, "transposed": tensor[:1012].view(4, 253).t(), "ids": torch.arange(5)},
        tmp_path / "m.bin",
    )
    convert(tmp_path / "m.bin", tmp_path / "out", dtype=target)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = getattr(
        torch, {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[target]
    )
    assert same_bits(found["w"], tensor.to(wanted))
    assert same_bits(found["transposed"], tensor[:1012].view(4, 253).t().to(wanted))
    assert same_bits(found["ids"], torch.arange(5))


def test_a_cast_is_written_into_the_config(tmp_path: Path) -> None:
    convert(CHECKPOINT, tmp_path / "out", dtype="F32")
    config, before = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", CHECKPOINT))
    assert config == {**before, "dtype": "float32"}


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        **{
            "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
            **changes,
        }
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("order", ["embedding first", "head first"])
def test_a_tied_head_is_stored_once_and_transformers_ties_it_again(order: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tie_word_embeddings=True)
    state = dict(sorted(model.state_dict().items(), reverse=order == "embedding first"))
    (tmp_path / "in").mkdir()
    torch.save(state, tmp_path / "in" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "in")
    report = convert(tmp_path / "in", tmp_path / "out")
    assert report.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert "lm_head.weight" not in set(opened.keys())
        assert opened.metadata() == {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    split(tmp_path / "in", tmp_path / "shards", tensor_parallel_size=2)
    last = shardprep_runtime.load(tmp_path / "shards", rank=1, pipeline_parallel_size=2)
    assert same_bits(last["lm_head.weight"], state["lm_head.weight"])
    assert same_bits(last["model.embed_tokens.weight"], state["lm_head.weight"])


def test_tensors_that_share_memory_but_are_not_tied_by_the_config_are_both_stored(tmp_path: Path) -> None:
    """transformers would leave the second one at random."""
    from transformers import AutoModelForCausalLM

    model = llama(tie_word_embeddings=False)
    state = dict(model.state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    report = convert(tmp_path, tmp_path / "out")
    assert report.aliases == {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in state.items())


# ------------------------------------------------------------------------------------------------- split and export


def test_export_gives_the_very_files_that_convert_gives(
    converted: Path, shards: Path, tmp_path: Path
) -> None:
    report = export(shards, tmp_path / "exported", max_part_bytes=2 * 10**6)
    assert report.blocks == verify(shards).blocks
    names = sorted(path.name for path in converted.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert filecmp.cmpfiles(converted, tmp_path / "exported", names, shallow=False)[0] == names


def test_pickle_and_safetensors_sources_give_the_same_parts(
    converted: Path, shards: Path, tmp_path: Path
) -> None:
    split(
        converted,
        tmp_path / "again",
        tensor_parallel_size=8,
        options=SplitOptions(max_part_bytes=2**18, block_bytes=2**14),
    )
    parts = sorted(path.name for path in shards.glob("*.safetensors"))
    assert parts == sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert filecmp.cmpfiles(shards, tmp_path / "again", parts, shallow=False)[0] == parts


def test_the_split_reads_every_source_byte_once(tmp_path: Path) -> None:
    """By the kernel's count of bytes read: the records once, and the little that describes them."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom shardprep.split import split\n"
        "import shardprep.source, shardprep.write.side_files, blake3, isal.isal_zlib, json, ast, importlib.resources\n"
        "def rchar(): return int(next(l for l in open('/proc/self/io') if l.startswith('rchar')).split()[1])\n"
        "before = rchar()\n"
        "split(Path(sys.argv[1]), Path(sys.argv[2]), tensor_parallel_size=4)\n"
        "print(rchar() - before)\n"
    )
    if not Path("/proc/self/io").exists():
        pytest.skip("the kernel does not count bytes read")
    done = subprocess.run(
        [sys.executable, "-c", script, CHECKPOINT, tmp_path / "out"], check=True, stdout=subprocess.PIPE
    )
    files = sum(path.stat().st_size for path in CHECKPOINT.iterdir())
    assert files <= int(done.stdout) <= files * 1.1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_view_reads_what_it_keeps_and_no_more(shards: Path, size: int) -> None:
    for rank in range(size):
        with shardprep_runtime.load(shards, rank=rank, tensor_parallel_size=size) as shard:
            headers = sum(part.header_size for part in shard.view.parts)
            assert shard.bytes_read == shard.nbytes + headers
            assert (shard.bytes_mapped == shard.nbytes) == (size == 8)


@pytest.mark.parametrize("stages", [[(0, 6)], [(0, 1), (1, 6)], [(0, 3), (3, 4), (4, 6)]])
def test_the_stages_together_hold_each_tensor_once(
    shards: Path, stages: list[tuple[int, int]], original: Any
) -> None:
    held: list[str] = []
    for rank in range(len(stages)):
        with open_set(shards).load(Place(rank=rank, stages=stages)) as shard:
            held += shard
            assert all(same_bits(tensor, original[name]) for name, tensor in shard.items())
            names = [name for name, _ in shard.iter_tensors()]
            layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
            assert layers == sorted(layers)
    assert sorted(held) == sorted(original)


def test_tensors_are_mapped_and_stay_valid_after_close(
    shards: Path, original: dict[str, torch.Tensor]
) -> None:
    shard = shardprep_runtime.load(shards, rank=3, tensor_parallel_size=8)
    tensor = shard["model.layers.0.mlp.up_proj.weight"]
    shard.close()
    rows = original["model.layers.0.mlp.up_proj.weight"].chunk(8)[3]
    assert same_bits(tensor, rows)


def test_writing_to_a_mapped_tensor_never_reaches_the_file(shards: Path) -> None:
    with shardprep_runtime.load(shards, rank=0, tensor_parallel_size=8) as shard:
        for _, tensor in shard.iter_tensors():
            tensor.zero_()
    verify(shards)


def test_joined_memory_belongs_to_one_process(shards: Path) -> None:
    """Python's anonymous mappings are shared with children unless they are told otherwise."""
    script = (
        "import os, sys\nimport shardprep_runtime\n"
        "memory = shardprep_runtime.load(sys.argv[1]).memory('lm_head.weight')\n"
        "before = bytes(memory)\n"
        "child = os.fork()\n"
        "if child == 0:\n    memory[:] = bytes(len(memory)); os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "assert bytes(memory) == before and any(before)\n"
    )
    subprocess.run([sys.executable, "-c", script, shards], check=True)


def test_load_into_refuses_a_module_of_other_shapes_before_it_assigns(shards: Path) -> None:
    module = llama(num_hidden_layers=6)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with (
        shardprep_runtime.load(shards) as shard,
        pytest.raises(shardprep_runtime.ShardprepError, match=r"the module has shape .* the shard"),
    ):
        shard.load_into(module)
    assert all(same_bits(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_load_into_fills_a_module_on_the_meta_device(shards: Path, original: dict[str, torch.Tensor]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(CHECKPOINT), dtype=torch.bfloat16
        )
    with shardprep_runtime.load(shards) as shard:
        shard.load_into(module)
    assert all(same_bits(module.state_dict()[name], tensor) for name, tensor in original.items())


# ----------------------------------------------------------------------------------------------------------- meaning


@pytest.fixture(scope="module")
def reference() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_real_tensor_parallel_workers_compute_what_one_process_computes(
    shards: Path, size: int, reference: Any, tmp_path: Path
) -> None:
    """Each with its own heads (at 8 a KV head is shared by two), columns and rows, and gloo between them."""
    import tensor_parallel_worker

    script = Path(tensor_parallel_worker.__file__)
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                script,
                shards,
                CHECKPOINT,
                str(rank),
                str(size),
                tmp_path / "meet",
                tmp_path / f"{rank}.pt",
            ]
        )
        for rank in range(size)
    ]
    with ended(workers):
        assert [worker.wait(timeout=180) for worker in workers] == [0] * size
    ids = torch.tensor([tensor_parallel_worker.PROMPT])
    with torch.no_grad():
        logits = reference(ids).logits[:, -1:]
        tokens = reference.generate(
            ids,
            max_new_tokens=tensor_parallel_worker.TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    for rank in range(size):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(found["logits"], logits, atol=1e-4)
        assert found["tokens"] == tokens[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_perplexity_of_the_loaded_shards_is_that_of_the_training(shards: Path) -> None:
    """A wrong weight anywhere would show: an untrained model has 2048, unigrams have 627."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(CHECKPOINT), dtype=torch.float32
    ).eval()
    with shardprep_runtime.load(shards) as shard:
        model.load_state_dict({name: tensor.float() for name, tensor in shard.items()})
    ids = AutoTokenizer.from_pretrained(CHECKPOINT)((CHECKPOINT / "heldout.txt").read_text()).input_ids
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss for row in rows]
    assert 55 < math.exp(torch.stack(losses).mean()) < 61


@pytest.mark.slow
@pytest.mark.sweep  # five minutes of a core; scripts/demo is a run of its own
def test_the_demo_proves_what_it_claims() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "--json"], check=True, stdout=subprocess.PIPE
    )
    facts = json.loads(done.stdout)
    assert facts["logits_equal"] and facts["from_pretrained_equal"] and facts["dcp_equal"]
    assert facts["export_equals_convert"]
    assert [(grid["tp"], grid["pp"]) for grid in facts["grids"]] == [
        (t, p) for p in (1, 2, 3) for t in (1, 2, 4)
    ]
    for grid in facts["grids"]:
        for worker in grid["workers"]:
            assert (worker["bytes_mapped"] == worker["bytes_kept"]) == (grid["tp"] == 4)
