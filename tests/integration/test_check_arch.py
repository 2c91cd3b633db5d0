"""What check-arch claims of an architecture is true of it; and a rule that is wrong is found, and named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import shardprep.check.shard_set
import shardprep.check.small
import shardprep.model.describe
from s3server import S3Server, file_name
from shardprep.check import CheckReport, Ranks, check_arch, read_model_config
from shardprep.cli import main
from shardprep.layout import ModelLayout, Placed, derive_layout
from shardprep.model.skeleton import default_config
from shardprep_runtime.errors import InputError, UnsupportedError
from shardprep_runtime.format.cut import WHOLE, Layout, Segment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("transformers"),
]  # one process that has imported transformers

LLAMA: dict[str, Any] = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "num_hidden_layers": 32,
}  # fmt: skip
QUICK: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2": (4, {}),
}
"""Model type -> grain, and what differs from its default config."""

SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    **{
        name: (4, {})
        for name in (
            "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gemma4_text",
            "gpt_neox", "gpt_oss", "glm4", "glm4_moe", "olmo2", "granite", "granitemoe", "starcoder2", "cohere",
            "falcon", "opt", "bloom", "mpt", "bert", "llama4_text", "qwen3_next", "exaone4", "minimax",
            "mixtral", "jamba",
        )
    },
    "llama": (4, LLAMA),
    "phi3": (4, {"num_key_value_heads": 8}),
    "nemotron": (4, {"num_key_value_heads": 8}),
    "deepseek_v2": (
        4,
        {
            "head_dim": None, "num_experts_per_tok": 6, "n_routed_experts": 64, "n_shared_experts": 2, "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (4, {"head_dim": None}),
    "roberta": (2, {}),
    "hunyuan_v1_dense": (2, {}),
}  # fmt: skip
"""The same; a key that is None is left out, as published configs leave it out."""

CHOSEN = (
    "llama",
    "phi3",
    "gpt_neox",
    "mixtral",
    "deepseek_v3",
    "gemma3_text",
    "falcon",
    "bert",
    "qwen3_next",
)
"""Those that run without `--sweep`: each has a rule that most others share, or one of its own. Projections apart, side by
side, and interleaved by head; experts; latent attention; a tied head and windows; one KV head; no decoder; states."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Path]:
    """Writes the config.json of a model type, with some values changed, or left out where they are None."""

    def write(model_type: str, **changes: Any) -> Path:
        path = tmp_path / f"{model_type}.json"
        config = {**default_config(model_type), **changes}
        left_out = {key for key, value in changes.items() if value is None}
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in left_out}))
        return path

    return write


def names(report: CheckReport) -> set[str]:
    return {proof.name for proof in report.proofs}


def of(report: CheckReport, name: str) -> list[str]:
    return [proof.text for proof in report.proofs if proof.name == name]


# ----------------------------------------------------------------------------------------------- rules that are right


@pytest.mark.parametrize(
    ("model_type", "grain", "changes"),
    [
        *((name, grain, changes) for name, (grain, changes) in QUICK.items()),
        *(
            pytest.param(
                name, *SLOW[name], marks=[pytest.mark.slow, *([] if name in CHOSEN else [pytest.mark.sweep])]
            )
            for name in SLOW
        ),
    ],
)
def test_the_rules_of_an_architecture_hold(
    model_type: str, grain: int, changes: dict[str, Any], config_of: Callable[..., Path], ranks: Ranks
) -> None:
    report = check_arch(config_of(model_type, **changes), tensor_parallel_size=grain, ranks=ranks)
    assert report.ok, str(report.difference)
    assert report.model_type == model_type
    assert names(report) >= {"split", "views", "heads", "sums", "logits", "stages", "export"}
    assert len(of(report, "views")) == len(report.engines)
    for proof in report.proofs:
        assert not proof.assembled or "assembled, for " in proof.text


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "one KV head": {"num_key_value_heads": 1},
    "as many KV heads as heads": {"num_key_value_heads": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rules_hold_for_variants_of_llama(
    variant: str, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    report = check_arch(config_of("llama", **{**LLAMA, **VARIANTS[variant]}), ranks=ranks)
    assert report.ok, str(report.difference)
    real = of(report, "ranks")
    if variant == "one KV head":
        assert all("assembled" in line and "48307" in line for line in real)
    else:
        assert all("gloo processes" in line for line in real)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [("vocab_size", 257), ("intermediate_size", 97)])
def test_sizes_that_no_number_of_ranks_divides_are_shared_unevenly(
    key: str, value: int, config_of: Callable[..., Path], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardprep.model import skeleton

    real = skeleton.shrink
    monkeypatch.setattr(skeleton, "shrink", lambda config: {**real(config), key: value})
    report = check_arch(config_of("llama", **LLAMA), ranks=ranks)
    assert report.ok, str(report.difference)
    assert all("gloo processes" in line for line in of(report, "ranks"))


@pytest.mark.cold  # the ranks start once as users start them
@pytest.mark.slow
def test_experts_are_shared_by_real_expert_parallel_ranks(
    config_of: Callable[..., Path], ranks: Ranks
) -> None:
    report = check_arch(config_of("mixtral"), expert_parallel_size=4, engines=("transformers",), ranks=ranks)
    assert report.ok, str(report.difference)
    assert [line.partition(":")[0] for line in of(report, "ranks")] == [
        "tp 2, transformers",
        "tp 2 ep 2, transformers",
        "tp 4, transformers",
        "tp 4 ep 4, transformers",
    ]
    assert all("gloo processes" in line for line in of(report, "ranks"))


@pytest.mark.slow
def test_what_transformers_cannot_run_is_said_to_be_assembled(
    config_of: Callable[..., Path], ranks: Ranks
) -> None:
    report = check_arch(
        config_of("llama", **{**LLAMA, "num_key_value_heads": 1}), tensor_parallel_size=2, ranks=ranks
    )
    assert report.ok, str(report.difference)
    (line,) = of(report, "ranks")
    assert (
        "tp 2, transformers: assembled, for transformers cannot run it from the checkpoint itself: " in line
    )
    assert "it splits 1 KV heads among 2 ranks, its issue 48307" in line


# ---------------------------------------------------------------------------------------------- rules that are wrong


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, Placed], Placed]], None]:
    """Has every layout changed by a function of a tensor's name and its rule."""

    def change(alter: Callable[[str, Placed], Placed]) -> None:
        def derive(
            config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], **more: Any
        ) -> ModelLayout:
            found = derive_layout(config, shapes, **more)
            return replace(
                found, tensors={name: alter(name, placed) for name, placed in found.tensors.items()}
            )

        monkeypatch.setattr(shardprep.check.small, "derive_layout", derive)
        monkeypatch.setattr(shardprep.model.describe, "derive_layout", derive)

    return change


Wrong = Callable[[Callable[[str, Placed], Placed]], None]


def cut(placed: Placed, dim: int, *segments: Segment) -> Placed:
    """The same tensor, cut otherwise, by every engine."""
    return replace(placed, layout=Layout(dim, segments), engines=())


def test_a_kv_head_that_is_cut_in_half_is_found(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    wrong(lambda name, placed: cut(placed, 0, Segment(32, 2)) if ".k_proj." in name else placed)
    report = check_arch(
        config_of("llama", **{**LLAMA, "num_key_value_heads": 1}), tensor_parallel_size=2, ranks=ranks
    )
    assert not report.ok
    assert str(report.difference) == (
        "heads: model.layers.0.self_attn.k_proj.weight, rank 0 of tp 2, torch: expected whole heads of 32 along dim 0; "
        "found [0, 16), which splits a head"
    )


def test_segments_of_a_fused_projection_in_the_wrong_order_are_found(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    """Every head is whole and every byte is held, but a rank has the keys of other heads than it has queries of."""

    def alter(name: str, placed: Placed) -> Placed:
        q, k, v = Segment(256, 8), Segment(128, 4, shared=True), Segment(128, 4, shared=True)
        return cut(placed, 0, k, q, v) if "qkv_proj" in name else placed

    wrong(alter)
    report = check_arch(
        config_of("phi3", num_key_value_heads=8), engines=("torch",), tensor_parallel_size=2, ranks=ranks
    )
    assert names(report) == {"split", "views", "heads"}
    assert report.difference is not None
    assert report.difference.tensor == "model.layers.0.self_attn"
    assert "partial results that add up to the model's behind model.layers.0.self_attn.o_proj" in str(
        report.difference
    )
    assert "model.layers.0.self_attn.qkv_proj.weight" in str(report.difference)


def test_a_projection_that_is_cut_along_the_wrong_dim_is_found(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    wrong(lambda name, placed: cut(placed, 0, Segment(256, 8)) if ".o_proj." in name else placed)
    report = check_arch(config_of("llama", **LLAMA), tensor_parallel_size=2, ranks=ranks)
    assert report.difference is not None
    assert (report.difference.proof, report.difference.tensor) == ("sums", "model.layers.0.self_attn")


@pytest.mark.slow
def test_a_vocabulary_that_is_off_by_one_is_found_by_the_ranks_that_ask_for_it(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    """It is all there, and whole rows of it; but the ranks of no engine take these rows."""

    def alter(name: str, placed: Placed) -> Placed:
        return (
            cut(placed, 0, Segment(129, 129, uneven=True), Segment(130, 130, uneven=True))
            if "lm_head" in name
            else placed
        )

    wrong(alter)
    report = check_arch(config_of("llama", **LLAMA), tensor_parallel_size=2, ranks=ranks)
    assert report.difference is not None
    assert report.difference.proof == "ranks"
    assert (
        "lm_head.weight: [0, 130) of dim 0 of [259, 256] was asked for, this rank holds [0, 65), [129, 194)"
        in str(report.difference)
    )


def test_a_vocabulary_of_one_row_less_is_not_split(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    wrong(
        lambda name, placed: cut(placed, 0, Segment(258, 258, uneven=True)) if "lm_head" in name else placed
    )
    report = check_arch(config_of("llama", **LLAMA), tensor_parallel_size=2, ranks=ranks)
    assert report.difference is not None
    assert report.difference.proof == "split"
    assert "segments of 258 along dim 0 do not fit [259, 256]" in report.difference.found


def test_an_expert_that_no_rank_holds_is_found(
    config_of: Callable[..., Path], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shardprep_runtime.format.view
    from shardprep_runtime.format.grid import experts_of

    def too_few(experts: int, size: int, rank: int) -> tuple[int, int]:
        start, stop = experts_of(experts, size, rank)
        return start, stop - (rank == 1)

    monkeypatch.setattr(shardprep_runtime.format.view, "experts_of", too_few)
    report = check_arch(config_of("mixtral", num_hidden_layers=2), tensor_parallel_size=2, ranks=ranks)
    assert report.difference is not None
    assert report.difference.proof == "views"
    assert "experts.7." in report.difference.tensor
    assert str(report.difference).endswith(
        "tp 2 ep 2, torch: expected some rank to hold it; found that none does"
    )


@pytest.mark.slow
def test_an_expert_of_the_wrong_rank_is_found_by_the_rank_that_asks_for_it(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    wrong(lambda name, placed: replace(placed, expert=0) if ".experts.7." in name else placed)
    report = check_arch(config_of("mixtral", num_hidden_layers=2), tensor_parallel_size=2, ranks=ranks)
    assert report.difference is not None
    assert (report.difference.proof, report.difference.rank) == ("ranks", 1)
    assert "experts.7.w1.weight: it was asked for, but nothing of it belongs to this rank" in str(
        report.difference
    )


def test_a_tensor_on_the_wrong_stage_is_found(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    wrong(lambda name, placed: replace(placed, layer="first") if name == "model.norm.weight" else placed)
    report = check_arch(
        config_of("llama", **LLAMA), tensor_parallel_size=1, pipeline_parallel_size=3, ranks=ranks
    )
    assert str(report.difference) == (
        "stages: model.norm.weight, rank 1 of tp 1 pp 2: expected it on this stage, which computes with it; found no view of it"
    )


def test_a_tensor_that_is_whole_where_others_are_cut_is_no_error(
    wrong: Wrong, config_of: Callable[..., Path], ranks: Ranks
) -> None:
    """What is stored whole costs bytes and is right: every rank computes with all of it."""
    wrong(lambda name, placed: replace(placed, layout=WHOLE, engines=()) if ".mlp." in name else placed)
    report = check_arch(config_of("llama", **LLAMA), tensor_parallel_size=2, engines=("torch",), ranks=ranks)
    assert report.ok, str(report.difference)


def test_an_export_of_another_config_is_found(
    config_of: Callable[..., Path], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardprep.export import export

    def altered(source: Path, destination: Path) -> None:
        export(source, destination)
        (destination / "config.json").write_text("{}")

    monkeypatch.setattr(shardprep.check.shard_set, "export", altered)
    report = check_arch(
        config_of("llama", **LLAMA), tensor_parallel_size=1, pipeline_parallel_size=1, ranks=ranks
    )
    assert report.difference is not None
    assert (report.difference.proof, report.difference.tensor) == ("export", "config.json")


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_line_for_each_proof(config_of: Callable[..., Path]) -> None:
    config = config_of("llama", **LLAMA)
    done = CliRunner().invoke(main, ["check-arch", str(config), "-tp", "2", "--engine", "torch"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", name] for name in ("split", "views", "heads", "sums", "logits", "stages", "export")
    ]
    assert lines[-1].startswith("llama: 7 proofs hold on a model of 39 tensors, ")


def test_the_command_ends_with_1_and_the_first_difference(
    wrong: Wrong, config_of: Callable[..., Path]
) -> None:
    wrong(lambda name, placed: cut(placed, 0, Segment(256, 8)) if ".o_proj." in name else placed)
    options = ["-tp", "2", "--engine", "torch", "--json"]
    done = CliRunner().invoke(main, ["check-arch", str(config_of("llama", **LLAMA)), *options])
    assert done.exit_code == 1
    facts = json.loads(done.stdout)
    assert facts["ok"] is False
    assert facts["difference"]["proof"] == "sums"
    assert [proof["name"] for proof in facts["proofs"]] == ["split", "views", "heads"]
    assert "model.layers.0.self_attn" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["no_such_type"], "knows no model_type no_such_type"),
        (["llama", "-tp", "3"], "cannot be shared by 3"),
        (["llama", "-pp", "9"], "cannot fill 9 pipeline stages; use at most 4"),
        (["/no/such/place"], "no such file or folder"),
        (["llama", "--engine", "sglang"], "'sglang' is not one of"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_2(options: list[str], words: str) -> None:
    done = CliRunner().invoke(main, ["check-arch", *options])
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_a_missing_transformers_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UnsupportedError, match=r"transformers is not installed: pip install 'shardprep\[transformers\]'"
    ):
        check_arch("llama")


def test_of_a_checkpoint_in_a_store_the_config_alone_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("botocore")
    config = {"model_type": "llama", "hidden_size": 64}
    with S3Server(tmp_path / "s3", anonymous_read=True) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        server.make_bucket("models")
        for key, data in (
            ("m/config.json", json.dumps(config).encode()),
            ("m/model.safetensors", b"\0" * 999),
        ):
            (server.root / "models" / file_name(key)).write_bytes(data)
        assert read_model_config("s3://models/m") == config
        read = [each["key"] for each in server.stats()["log"] if each["method"] == "GET" and each["key"]]
    assert "m/config.json" in read
    assert "m/model.safetensors" not in read


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"no config\.json, which says what architecture it is"):
        read_model_config(tmp_path)
