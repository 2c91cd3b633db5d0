"""`split --probe` records what a model gives, by which a worker of any stage proves itself, and a wrong one is found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lazily import load_file, save_file, torch
from probe_ranks import ProbeRanks
from quantized_models import write_quantized
from shardprep.cli import main
from shardprep.inspect import inspect
from shardprep.layout.quantization import Scheme
from shardprep.model.skeleton import build, default_config, shrink
from shardprep.split import SplitOptions, split
from shardprep.verify import verify
from shardprep_runtime.errors import IntegrityError, ProblemError, UnsupportedError
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.read_manifest import read_manifest, read_named
from shardprep_runtime.shard import revisions
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.stage.probe import Checked, check_stage
from shardprep_runtime.stage.stage import build_stage
from shardprep_runtime.stores.open import open_store

# one process that starts the ranks for all of this file
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers, probed")]

TRAINED = Path(__file__).parents[1] / "data/tiny-llama"
"""Six layers in bfloat16."""

LAYERS = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProbeRanks]:
    with ProbeRanks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed") / "shards"
    assert split(TRAINED, folder, tensor_parallel_size=2, options=SplitOptions(probe=True)).probe
    return folder


def check(
    folder: Path, dtype: str, pp_rank: int = 0, stages: Sequence[Sequence[int]] | None = None
) -> Checked:
    with build_stage(folder, pp_rank=pp_rank, stages=stages, dtype=dtype) as stage:
        return check_stage(stage)


Change = Callable[[dict[str, Any]], object]


def spoilt(
    probed: Path, to: Path, change: Change | None = None, config: dict[str, Any] | None = None
) -> Path:
    """A sound shard set of a changed model, whose manifest has the probe of the model as it was."""
    from shardprep.export import export

    export(probed, to / "model")
    if change is not None:
        tensors = load_file(to / "model/model.safetensors")
        change(tensors)
        save_file(tensors, to / "model/model.safetensors", metadata={"format": "pt"})
    if config is not None:
        file = to / "model/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    split(to / "model", to / "shards", tensor_parallel_size=2)
    written = to / "shards/shardprep.json"
    fields = {
        **json.loads(written.read_text()),
        "probe": json.loads((probed / "shardprep.json").read_text())["probe"],
    }
    written.write_text(json.dumps(fields))
    return to / "shards"


# ------------------------------------------------------------------------------------------------ the right shards


@pytest.mark.parametrize(
    ("stages", "dtype"),
    [
        (
            [(0, 3), (3, 5), (5, 6)],
            "bfloat16",
        ),  # a first stage, one between, and a last one, as they are stored
        *(
            pytest.param(stages, dtype, marks=pytest.mark.slow)
            for stages in ([(0, 6)], [(0, 1), (1, 6)], [(0, 3), (3, 5), (5, 6)])
            for dtype in ("float32", "bfloat16", "float16")
            if (len(stages), dtype) != (3, "bfloat16")
        ),
    ],
)
def test_every_stage_in_every_dtype_proves_itself(
    probed: Path, dtype: str, stages: Sequence[Sequence[int]]
) -> None:
    for pp_rank in range(len(stages)):
        found = check(probed, dtype, pp_rank, stages)
        assert found.proven is True
        assert check(probed, dtype, pp_rank, stages).digest == found.digest


def test_threads_make_no_difference_that_counts(probed: Path) -> None:
    torch.set_num_threads(2)
    try:
        assert check(probed, "float32").proven is True
        assert check(probed, "bfloat16").proven is True
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_two_tensor_ranks_prove_what_one_process_recorded(
    probed: Path, ranks: ProbeRanks, dtype: str
) -> None:
    for pp_rank in range(2):
        job = {"source": str(probed), "pp_rank": pp_rank, "stages": 2, "dtype": dtype}
        found = ranks.run("probe", 2, **job)
        assert [each.get("proven") for each in found] == [True, True], found
        assert len({digest for each in found for digest in each["digests"]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-3, 1e-4])
def test_a_model_that_rounding_upsets_proves_itself_too(probed: Path, tmp_path: Path, factor: float) -> None:
    """Of little that is added to much, little is left where the sum is rounded: each layer has a tolerance of its own."""

    def weaken(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "o_proj" in name or "down_proj" in name:
                tensor *= factor

    spoilt(probed, tmp_path, weaken)
    split(tmp_path / "model", tmp_path / "weak", tensor_parallel_size=2, options=SplitOptions(probe=True))
    probes = [read_manifest(folder).probe for folder in (probed, tmp_path / "weak")]
    noises = [max(layer.noise for layer in probe.layers) for probe in probes if probe is not None]
    assert noises[1] > 2 * noises[0]
    torch.set_num_threads(2)
    try:
        for dtype in ("float32", "bfloat16", "float16"):
            assert check(tmp_path / "weak", dtype).proven is True
    finally:
        torch.set_num_threads(1)
    # in float32 another layer is found all the same
    with pytest.raises(IntegrityError, match=r"^layer 2 of stage 0 gives something else"):
        check(spoilt(tmp_path / "weak", tmp_path / "swapped", swap), "float32")


# not bfloat16, in which tensors are mapped and cannot be written
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("pp_rank", "place"), [(0, "the embedding"), (1, "layer 3")])
@pytest.mark.slow
def test_tensor_ranks_that_hold_the_same_are_found(
    probed: Path, ranks: ProbeRanks, dtype: str, pp_rank: int, place: str
) -> None:
    job = {"source": str(probed), "pp_rank": pp_rank, "stages": 2, "dtype": dtype}
    found = ranks.run("probe", 2, is_wrong=True, **job)
    assert [each["error"] for each in found] == ["IntegrityError"] * 2, found
    assert found[0]["message"].startswith(
        f"{place} of stage {pp_rank} gives something else than was recorded"
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "qwen3_moe", "mamba2", "olmo2", "phi3"])
def test_other_architectures_prove_themselves(model_type: str, tmp_path: Path) -> None:
    config = shrink(default_config(model_type))
    build(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    split(tmp_path / "model", tmp_path / "shards", tensor_parallel_size=2, options=SplitOptions(probe=True))
    layers = read_manifest(tmp_path / "shards").layers
    for dtype in ("float32", "bfloat16", "float16"):
        for pp_rank, stages in ((0, [(0, layers)]), (0, [(0, 1), (1, layers)]), (1, [(0, 1), (1, layers)])):
            assert check(tmp_path / "shards", dtype, pp_rank, stages).proven is True


@pytest.mark.filterwarnings("ignore")  # of GPTQModel and what it imports
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.slow
def test_a_quantized_model_proves_itself_and_wrong_scales_are_found(method: str, tmp_path: Path) -> None:
    write_quantized(TRAINED, tmp_path / "model", Scheme(method, group=32))
    split(tmp_path / "model", tmp_path / "shards", tensor_parallel_size=2, options=SplitOptions(probe=True))
    for dtype in ("float32", "bfloat16", "float16"):
        assert check(tmp_path / "shards", dtype, 1, [(0, 4), (4, 6)]).proven is True

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.scales"] *= 1.25

    with pytest.raises(IntegrityError, match=r"^layer 1 of stage 0 gives something else"):
        check(spoilt(tmp_path / "shards", tmp_path / "other", change), "float16")


# ------------------------------------------------------------------------------------------------ the wrong shards


def swap(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        other = name.replace(".layers.2.", ".layers.3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def perturb(tensors: dict[str, torch.Tensor]) -> None:
    """Another revision: each weight of a layer a few percent off."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".layers.4." in name:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor.float() * (1 + 0.03 * noise)).to(tensor.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap, "^layer 2 of stage 0 .*and what layer 3 should give is what it gives"),
        (perturb, "^layer 4 of stage 0 gives something else"),
    ],
    ids=["swapped", "perturbed"],
)
def test_layers_of_another_place_or_revision_are_found(
    probed: Path, tmp_path: Path, change: Change, words: str, dtype: str
) -> None:
    with pytest.raises(IntegrityError, match=words):
        check(spoilt(probed, tmp_path, change), dtype)


@pytest.mark.slow
def test_every_tensor_that_is_zero_is_found_in_every_dtype(probed: Path, tmp_path: Path) -> None:
    names = [name for name in read_manifest(probed).tensors if ".layers." not in name or ".layers.1." in name]
    assert len(names) == 12
    for number, name in enumerate(names):
        folder = spoilt(probed, tmp_path / str(number), lambda tensors, name=name: tensors[name].zero_())
        place = "the embedding" if "embed" in name else "layer 1" if ".layers." in name else "the head"
        for dtype in ("float32", "bfloat16", "float16"):
            with pytest.raises(IntegrityError, match=f"^{place} of stage 0 gives something else"):
                check(folder, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "config",
    [{"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}],
    ids=["eps", "rope"],
)
def test_another_config_is_found(probed: Path, tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    with pytest.raises(IntegrityError, match=r"its config\.json or this machine's arithmetic"):
        check(spoilt(probed, tmp_path, config=config), dtype)


def test_a_tiny_change_is_what_digests_are_for(probed: Path, tmp_path: Path) -> None:
    """The limit of a probe, and the chain of trust behind it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] *= 1.01

    folder = spoilt(probed, tmp_path, change)
    assert check(folder, "float32").proven is True
    expected = read_named(probed)[1]
    with pytest.raises(manifests.ManifestError, match="its digest is"):
        build_stage(open_set(folder, digest=expected))


def test_nan_is_found_without_a_recorded_probe(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    split(TRAINED, tmp_path / "sound", tensor_parallel_size=2)
    from shardprep.export import export

    export(tmp_path / "sound", tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    split(tmp_path / "model", tmp_path / "shards", tensor_parallel_size=2)
    assert check(tmp_path / "sound", "bfloat16").proven is None
    with pytest.raises(IntegrityError, match=r"layer 1 gives NaN or infinity in torch\.bfloat16"):
        check(tmp_path / "shards", "bfloat16")
    with pytest.raises(ProblemError, match="cannot be probed: layer 1 gives NaN"):
        split(
            tmp_path / "model", tmp_path / "again", tensor_parallel_size=2, options=SplitOptions(probe=True)
        )


# ------------------------------------------------------------------------------------------------ split --probe


def test_a_probe_is_all_that_is_added_and_the_same_again(probed: Path, tmp_path: Path) -> None:
    split(TRAINED, tmp_path / "plain", tensor_parallel_size=2)
    names = sorted(path.name for path in probed.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "plain").iterdir())
    for name in names:
        if name != "shardprep.json":
            assert (probed / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    raw = (probed / "shardprep.json").read_bytes()
    plain = (tmp_path / "plain/shardprep.json").read_bytes()
    assert raw[: raw.index(b',\n  "probe"')] == plain.removesuffix(b"\n}\n")
    torch.set_num_threads(2)
    try:
        split(TRAINED, tmp_path / "again", tensor_parallel_size=2, options=SplitOptions(probe=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (tmp_path / "again/shardprep.json").read_bytes() == raw
    assert verify(probed).manifest_digest == manifests.digest_of(raw)
    assert inspect(probed).probe
    assert not inspect(tmp_path / "plain").probe


@pytest.mark.parametrize("grain", [1, 4])
def test_the_probe_does_not_depend_on_the_grain(probed: Path, tmp_path: Path, grain: int) -> None:
    split(
        TRAINED,
        tmp_path / "shards",
        tensor_parallel_size=grain,
        pipeline_parallel_size=3,
        options=SplitOptions(probe=True),
    )
    assert read_manifest(tmp_path / "shards").probe == read_manifest(probed).probe


def test_a_store_is_given_the_same_probe(probed: Path, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/store"
    report = split(
        TRAINED, uri, tensor_parallel_size=2, options=SplitOptions(probe=True, scratch=tmp_path / "scratch")
    )
    with open_store(uri) as store:
        raw, manifest = revisions.read_revision(store, "main", report.manifest_digest)
    assert raw == (probed / "shardprep.json").read_bytes()
    assert manifest.probe is not None
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_a_split_that_was_killed_while_it_renamed_is_probed_again(probed: Path, tmp_path: Path) -> None:
    """Some parts then stand under their final names, others still wait."""
    folder = tmp_path / "shards"
    with pytest.MonkeyPatch.context() as patch:
        import shardprep.write.staging

        renamed: list[str] = []

        def publish(
            self: shardprep.write.staging.Staging,
            name: str,
            real: Any = shardprep.write.staging.Staging._publish,
        ) -> None:
            if len(renamed) == 2:
                raise KeyboardInterrupt
            real(self, name)
            renamed.append(name)

        patch.setattr(shardprep.write.staging.Staging, "_publish", publish)
        with pytest.raises(KeyboardInterrupt):
            split(TRAINED, folder, tensor_parallel_size=2, options=SplitOptions(probe=True))
    assert (folder / ".shardprep-partial").is_dir()
    assert not (folder / "shardprep.json").exists()
    split(TRAINED, folder, tensor_parallel_size=2, options=SplitOptions(probe=True))
    assert (folder / "shardprep.json").read_bytes() == (probed / "shardprep.json").read_bytes()
    assert not (folder / ".shardprep-partial").exists()


def test_without_transformers_it_says_so_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = CliRunner().invoke(
        main, ["split", str(TRAINED), str(tmp_path / "shards"), "-tp", "2", "--probe", "--dry-run"]
    )
    assert done.exit_code == 2
    assert "transformers is not installed: pip install 'shardprep[transformers]'" in " ".join(
        done.output.split()
    )
    assert not (tmp_path / "shards").exists()


def test_a_model_that_transformers_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shutil.copytree(TRAINED, tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "no such activation"}))
    with pytest.raises(
        UnsupportedError, match=r"--probe computes the model's layers: .*; split without --probe"
    ):
        split(
            tmp_path / "model", tmp_path / "shards", tensor_parallel_size=2, options=SplitOptions(probe=True)
        )
    assert not (tmp_path / "shards").exists()


def test_a_model_that_fails_when_it_runs_keeps_its_parts(tmp_path: Path) -> None:
    """A head dim that RoPE's rotations do not fit shows only there."""
    config = shrink(default_config("deepseek_v3"))
    build(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    file = tmp_path / "model/config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "head_dim": fields["qk_rope_head_dim"] * 2}))
    with pytest.raises(
        ProblemError, match=r"cannot be probed: layer 0: RuntimeError: .*without --probe ends the"
    ):
        split(
            tmp_path / "model", tmp_path / "shards", tensor_parallel_size=2, options=SplitOptions(probe=True)
        )
    kept = list((tmp_path / "shards/.shardprep-partial").glob("*.safetensors"))
    assert kept
    before = {path.name: path.stat().st_mtime_ns for path in kept}
    split(tmp_path / "model", tmp_path / "shards", tensor_parallel_size=2)
    verify(tmp_path / "shards")
    assert {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in before} == before


def test_the_command_says_that_there_is_a_probe(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["split", str(TRAINED), str(tmp_path / "shards"), "-tp", "2", "--probe"])
    assert done.exit_code == 0, done.output
    assert "probe: what the embedding, each of the 6 layers and the head give for fixed inputs" in done.output
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "shards")])
    assert "views for torch, transformers, vllm; with a probe of each layer" in shown.output
    dry = CliRunner().invoke(
        main, ["split", str(TRAINED), str(tmp_path / "no"), "-tp", "2", "--probe", "--dry-run"]
    )
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "no").exists()
