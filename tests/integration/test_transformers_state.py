"""transformers loads a shard set at every size that it can run, each rank from its own bytes; and never wrong weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import small_models
from lazily import load_file, torch
from quantized_models import write_quantized
from s3fixtures import BUCKET, isolate, opened, put_shard_set
from s3server import S3Server
from shardprep.cli import main
from shardprep.layout.quantization import Scheme
from shardprep.split import SplitOptions, split
from shardprep_runtime import read_manifest
from shardprep_runtime.engines.transformers_state import check_loaded, transformers_state
from shardprep_runtime.errors import InputError, IntegrityError, LayoutError
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set
from stores import make_store
from transformers_ranks import Ranks

# one process that starts transformers' ranks for all of this file
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers, too")]

GRAIN = 4

LLAMA: dict[str, Any] = small_models.llama_config(heads=8, kv_heads=4, hidden_size=64)
"""A vocabulary of 50: the ranks of four have 13, 13, 13 and 11 rows."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "even": {**LLAMA, "vocab_size": 48},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "mixtral": {
        **LLAMA,
        "vocab_size": 48,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **LLAMA,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
}
"""The last two have one tensor an expert in their checkpoints, which transformers fuses as it loads."""

EXPERTS = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


Case = tuple[Path, Path, dict[str, Any]]
"""A checkpoint, its shard set, and what transformers computes with the checkpoint."""


@pytest.fixture(scope="module")
def case(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Makes the case of a model once."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            (answer,) = ranks.run("make", config=MODELS[name], to=str(folder / "in"))
            assert not answer["error"], answer
            split(
                folder / "in",
                folder / "set",
                tensor_parallel_size=GRAIN,
                options=SplitOptions(max_part_bytes=60_000),
            )
            (answer,) = ranks.run("folder", source=str(folder / "in"), dtype="float32")
            assert not answer["error"], answer
            made[name] = folder / "in", folder / "set", answer
        return made[name]

    return make


def assert_same(answers: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All ranks computed what the one process did that loaded the checkpoint."""
    logits = torch.load(expected["logits"])
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    for answer in answers:
        assert not answer["error"], answer
        assert answer["tokens"] == expected["tokens"]
        found = torch.load(answer["logits"])
        if len(answers) == 1:
            assert torch.equal(found, logits)
        else:  # sums are made in another order
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def refused(answers: list[dict[str, Any]], *words: str) -> None:
    """At least one rank was refused in these words, and none has a model."""
    assert all(answer["error"] for answer in answers), answers
    assert any(all(word in answer["message"] for word in words) for answer in answers), answers


# ------------------------------------------------------------------------------------------------ the folder as it is


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 4))])
def test_transformers_reads_the_folder_as_it_is(size: int, case: Callable[[str], Case], ranks: Ranks) -> None:
    _, shards, expected = case("llama")
    assert_same(ranks.run("folder", size, source=str(shards), dtype="float32", tp_size=size), expected)


@pytest.mark.parametrize(
    ("model", "name"), [("tied", "lm_head.weight"), ("mixtral", "mlp.experts.down_proj")]
)
def test_what_transformers_cannot_read_as_it_is_it_refuses(
    model: str, name: str, case: Callable[[str], Case], ranks: Ranks
) -> None:
    """It wants both names of a tied head, and the names of its own fused experts."""
    _, shards, _ = case(model)
    for size in (1, 2):
        found = ranks.run("folder", size, source=str(shards), dtype="float32", tp_size=size)
        refused(found, "Missing key in checkpoint state_dict", name)


# ------------------------------------------------------------------------------------------------------ own bytes only


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("llama", 2), ("tied", 2),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (
            ("llama", 1), ("llama", 4), ("tied", 1), ("mixtral", 2), ("tied", 4), ("mixtral", 1), ("mixtral", 4), ("qwen3_moe", 1), ("qwen3_moe", 2), ("qwen3_moe", 4),
        )),
    ],
)  # fmt: skip
def test_a_rank_loads_from_a_folder_of_its_own_bytes(
    model: str, size: int, case: Callable[[str], Case], ranks: Ranks, tmp_path: Path
) -> None:
    """What the other ranks have is not there: nothing else can have been read."""
    _, shards, expected = case(model)
    store = make_store(shards, tmp_path / "store")
    for rank in range(size):
        folder = tmp_path / str(rank)
        pull(f"file://{store}", folder, "--rank", rank, "-tp", size, "--engine", "transformers")
        for other in set(range(size)) - {rank}:
            with pytest.raises(InputError):
                open_set(folder).load(Place(rank=other, tensor_parallel_size=size, engine="transformers"))
    found = ranks.run(
        "state", size, source=f"{tmp_path}/{{rank}}", config=str(shards), dtype="float32", tp_size=size
    )
    assert_same(found, expected)
    for answer in found:
        assert answer["one_tensor"] == (model == "tied")


@pytest.mark.parametrize("model", ["even", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_rank_asks_a_store_for_its_own_bytes(
    model: str,
    case: Callable[[str], Case],
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, shards, expected = case(model)
    with S3Server(tmp_path / "server") as server:
        server.make_bucket(BUCKET)
        isolate(monkeypatch, tmp_path, server)
        with opened(model) as store:
            put_shard_set(store, shards)
        server.reset_stats()
        found = ranks.run(
            "state",
            2,
            source=f"s3://{BUCKET}/{model}",
            config=str(shards),
            dtype="float32",
            tp_size=2,
            cache=None,
            environment=server.environment(),
        )
        sent = server.stats()["sent"]
    assert_same(found, expected)
    # to the byte, where no rank needs part of a piece (which is fetched in whole blocks, to be verified)
    manifest = (shards / "shardprep.json").stat().st_size
    assert sent == sum(answer["bytes_read"] for answer in found) + 2 * manifest
    for answer in found:
        assert answer["fetched"] == answer["nbytes"]


@pytest.mark.slow
def test_weights_that_are_one_piece_are_not_copied(case: Callable[[str], Case], ranks: Ranks) -> None:
    _, shards, _ = case("llama")
    for answer in ranks.run("state", GRAIN, source=str(shards), config=str(shards), tp_size=GRAIN):
        assert not answer["error"], answer
        assert answer["mapped"] == answer["nbytes"]
        assert answer["parameters_mapped"] == answer["nbytes"]


@pytest.mark.slow
@pytest.mark.parametrize("model", EXPERTS)
def test_expert_parallel_ranks_load_their_own_experts(
    model: str, case: Callable[[str], Case], ranks: Ranks
) -> None:
    _, shards, expected = case(model)
    found = ranks.run(
        "state", 2, source=str(shards), config=str(shards), dtype="float32", tp_size=2, ep_size=2,
        experts=2,
    )  # fmt: skip
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "tied"])
def test_stages_load_their_own_layers(model: str, case: Callable[[str], Case], ranks: Ranks) -> None:
    _, shards, expected = case(model)
    found = ranks.run(
        "state", 2, source=str(shards), config=str(shards), dtype="float32", pp_size=2,
        load={"pipeline_parallel_size": 2},
    )  # fmt: skip
    assert_same(found, expected)


# -------------------------------------------------------------------------------------------------------- fail closed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 5}, ("the checkpoint lacks model.layers.4.", "and 6 more")),
        ({"num_hidden_layers": 3}, ("the model lacks model.layers.3.",)),
    ],
)
def test_a_model_that_is_not_the_checkpoints_is_refused(
    changes: dict[str, Any], words: tuple[str, ...], case: Callable[[str], Case], ranks: Ranks
) -> None:
    """transformers itself logs a warning, and computes with random weights."""
    _, shards, _ = case("llama")
    for size in (1, 2):
        found = ranks.run(
            "state", size, source=str(shards), config=str(shards), changes=changes, tp_size=size
        )
        refused(found, *words)
        assert {answer["error"] for answer in found} == {"LayoutError"}


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_a_shape_that_differs_is_refused(
    options: dict[str, bool], case: Callable[[str], Case], ranks: Ranks
) -> None:
    _, shards, _ = case("llama")
    (found,) = ranks.run(
        "state", source=str(shards), config=str(shards), changes={"vocab_size": 60}, options=options
    )
    refused([found], "shapes differ in lm_head.weight, model.embed_tokens.weight")
    assert found["error"] == "LayoutError"


@pytest.mark.parametrize(
    ("size", "load", "grid", "words"),
    [
        (2, {}, {}, ("was asked for, this rank holds",)),
        (1, {"tensor_parallel_size": 2, "rank": 1}, {}, ("was asked for, this rank holds",)),
        (2, {"tensor_parallel_size": 4, "rank": 1}, {"tp_size": 2}, ("was asked for, this rank holds",)),
        (2, {"tensor_parallel_size": 2, "rank": 1}, {"tp_size": 2}, ("was asked for, this rank holds",)),
        (2, {"tensor_parallel_size": 4}, {"tp_size": 2}, ("there are 2 processes, for a grid of 4 x 1",)),
        (2, {"pipeline_parallel_size": 4}, {"tp_size": 2}, ("2 processes cannot be 4 stages",)),
        (2, {"pipeline_parallel_size": 2}, {"tp_size": 2}, ("nothing of it belongs to this rank",)),
    ],
)
def test_a_rank_that_asks_for_another_ranks_bytes_is_refused(
    size: int,
    load: dict[str, Any],
    grid: dict[str, int],
    words: tuple[str, ...],
    case: Callable[[str], Case],
    ranks: Ranks,
) -> None:
    _, shards, _ = case("llama")
    found = ranks.run("state", size, source=str(shards), config=str(shards), load=load, **grid)
    wrong = [answer for answer in found if answer["error"] == "LayoutError"]
    assert wrong and all(word in wrong[0]["message"] for word in words), found


def test_nobody_leaves_a_state_without_having_looked(case: Callable[[str], Case], ranks: Ranks) -> None:
    _, shards, expected = case("llama")
    job: dict[str, Any] = {"source": str(shards), "config": str(shards), "dtype": "float32"}
    refused(ranks.run("state", how_loaded="unchecked", **job), "nobody checked", "state.check")
    assert_same(ranks.run("state", how_loaded="checked", **job), expected)
    more: dict[str, Any] = {"changes": {"num_hidden_layers": 5}, **job}
    refused(ranks.run("state", how_loaded="checked", **more), "the checkpoint lacks model.layers.4.")


def test_a_state_that_nobody_read_can_be_left(case: Callable[[str], Case]) -> None:
    _, shards, _ = case("llama")
    with transformers_state(shards) as state:
        assert len(state) == len(read_manifest(shards).tensors)
        assert state["lm_head.weight"].get_shape() == [50, 64]
    with pytest.raises(ZeroDivisionError), transformers_state(shards) as state:
        dict(state)
        raise ZeroDivisionError


def test_what_was_begun_before_the_imports_is_the_state(case: Callable[[str], Case], tmp_path: Path) -> None:
    """From a folder that is verified meanwhile, and from a store; nothing is read or fetched a second time."""
    _, shards, _ = case("llama")
    for source in (str(shards), f"file://{make_store(shards, tmp_path / 'store')}"):
        begun = open_set(source, cache=tmp_path / "cache").prefetch(
            Place(rank=1, tensor_parallel_size=4, engine="transformers")
        )
        with closing(transformers_state(begun)) as state:
            assert state.shard is begun.shard()
            assert state["lm_head.weight"][13:26].shape == (13, 64)
            with pytest.raises(LayoutError, match="this rank"):
                state["lm_head.weight"][0:13]
            begun.wait()


def test_what_was_begun_for_another_engine_is_refused(case: Callable[[str], Case]) -> None:
    _, shards, _ = case("llama")
    begun = open_set(str(shards)).prefetch(Place(rank=1, tensor_parallel_size=4, engine="vllm"))
    with pytest.raises(LayoutError, match="cut as vllm asks; pass engine='transformers'"):
        transformers_state(begun)
    begun.wait()


def test_what_is_joined_is_not_kept_beside_what_the_model_has(case: Callable[[str], Case]) -> None:
    """A model on a device would otherwise cost its size in memory again."""
    _, shards, _ = case("llama")
    with closing(transformers_state(shards, tensor_parallel_size=1)) as state:
        read = sum(each[...].nbytes for each in state.values())
        assert read == state.shard.nbytes > state.shard.bytes_mapped
        assert not state.shard._tensors and not state.shard._memory


def test_a_damaged_byte_is_found_before_there_is_a_model(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, shards, _ = case("llama")
    shutil.copytree(shards, tmp_path / "set")
    part = tmp_path / "set" / read_manifest(shards).parts[0].path
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(IntegrityError, match=part.name):
        transformers_state(tmp_path / "set")


def test_the_place_comes_from_the_launcher(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shards, _ = case("llama")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with transformers_state(shards) as state:
        assert (state.shard.view.rank, state.shard.view.grid.tensor_parallel_size) == (3, 4)
    with transformers_state(shards, pipeline_parallel_size=2) as state:
        assert (state.shard.view.pp_rank, state.shard.view.tp_rank) == (1, 1)
    with transformers_state(shards, tensor_parallel_size=1) as state:  # each process the whole model
        assert state.shard.view.rank == 0


def test_what_was_found_is_told_in_a_few_names() -> None:
    nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    check_loaded(nothing)
    with pytest.raises(LayoutError, match=r"the checkpoint lacks a, b, c and 1 more; the model lacks x\\ny;"):
        check_loaded({**nothing, "missing_keys": set("abcd"), "unexpected_keys": {"x\ny"}})


# ----------------------------------------------------------------------------------------------------------- quantized

SCHEMES = {"gptq": Scheme("gptq", group=32), "awq": Scheme("awq", group=32, symmetric=False)}


@pytest.fixture(scope="module")
def quantized(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """Makes a quantized checkpoint and its shard set once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(model: str, how: str) -> tuple[Path, Path]:
        if (model, how) not in made:
            folder = tmp_path_factory.mktemp(f"{model}-{how}")
            config = {**MODELS[model], "intermediate_size": 128, "moe_intermediate_size": 64}
            (answer,) = ranks.run("make", config=config, to=str(folder / "before"))
            assert not answer["error"], answer
            write_quantized(folder / "before", folder / "in", SCHEMES[how])
            split(folder / "in", folder / "set", tensor_parallel_size=2)
            made[model, how] = folder / "in", folder / "set"
        return made[model, how]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("how", SCHEMES)
def test_one_rank_loads_a_quantized_shard_set(
    how: str, quantized: Callable[[str, str], tuple[Path, Path]], ranks: Ranks
) -> None:
    source, shards = quantized("llama", how)
    (expected,) = ranks.run("folder", source=str(source), dtype="bfloat16")
    found = ranks.run("state", source=str(shards), config=str(shards), dtype="bfloat16")
    assert_same(found, expected)


@pytest.mark.parametrize("how", SCHEMES)
def test_several_ranks_of_a_quantized_shard_set_are_refused_at_once(
    how: str, quantized: Callable[[str, str], tuple[Path, Path]], ranks: Ranks
) -> None:
    _, shards = quantized("llama", how)
    found = ranks.run("state", 2, source=str(shards), config=str(shards), tp_size=2)
    refused(found, f"{how} at tensor parallel size 2: transformers does not cut", "vLLM")


@pytest.mark.slow
@pytest.mark.parametrize("how", SCHEMES)
def test_transformers_itself_cannot_run_a_quantized_checkpoint_on_several_ranks(
    how: str, quantized: Callable[[str, str], tuple[Path, Path]], ranks: Ranks
) -> None:
    """The reason of the refusal: once this fails, the refusal can go."""
    source, _ = quantized("llama", how)
    refused(
        ranks.run("folder", 2, source=str(source), dtype="bfloat16", tp_size=2),
        "got mixed torch.Tensor and DTensor",
    )


@pytest.mark.slow
def test_quantized_experts_which_transformers_makes_random_are_refused(
    quantized: Callable[[str, str], tuple[Path, Path]], ranks: Ranks
) -> None:
    source, shards = quantized("qwen3_moe", "gptq")
    (random,) = ranks.run("folder", source=str(source), dtype="bfloat16")
    assert not random["error"], "transformers has found no fault in the checkpoint itself"
    found = ranks.run("state", source=str(shards), config=str(shards), dtype="bfloat16")
    refused(found, "the checkpoint lacks model.layers.0.mlp.experts.down_proj")


def test_the_folder_of_a_quantized_shard_set_is_refused_by_transformers(
    quantized: Callable[[str, str], tuple[Path, Path]], ranks: Ranks
) -> None:
    _, shards = quantized("llama", "gptq")
    refused(
        ranks.run("folder", source=str(shards)), "Quantization is not supported when loading a distributed"
    )


# ------------------------------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "dims"), [((2,), (0,)), ((3,), (0,)), ((2, 2), (0, 1)), ((2, 2), (1, 0)), ((4,), (-1,))]
)
def test_torch_loads_the_folder_at_any_mesh(
    mesh: tuple[int, ...], dims: tuple[int, ...], case: Callable[[str], Case], ranks: Ranks
) -> None:
    """Of fused and per-expert tensors too: the names and shapes are the checkpoint's."""
    for model in ("llama", "mixtral"):
        source, shards, _ = case(model)
        size = int(torch.tensor(mesh).prod())
        found = ranks.run("dcp", size, source=str(shards), mesh=mesh, dims=dims, checkpoint=str(source))
        names = load_file(source / "model.safetensors").keys()
        assert [answer.get("equal") for answer in found] == [len(names)] * size, found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "tied", *EXPERTS])
def test_consolidating_gives_the_checkpoint_back(
    model: str, case: Callable[[str], Case], ranks: Ranks, tmp_path: Path
) -> None:
    source, shards, _ = case(model)
    (answer,) = ranks.run("consolidate", source=str(shards), to=str(tmp_path / "out"))
    assert not answer["error"], answer
    (file,) = (tmp_path / "out").glob("*.safetensors")
    before, after = load_file(source / "model.safetensors"), load_file(file)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def pull(*args: object) -> None:
    found = CliRunner().invoke(main, ["pull", *map(str, args)], env={"RANK": None, "WORLD_SIZE": None})
    assert found.exit_code == 0, found.output
