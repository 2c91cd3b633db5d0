"""What load and verify refuse: a grid that the set does not serve, and any part that is not the one that was split."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import small_models
from lazily import torch
from shardprep.model import describe as models
from shardprep.split import SplitOptions, split
from shardprep.verify import verify
from shardprep_runtime import Manifest, load, plan_view, read_manifest
from shardprep_runtime.errors import FormatError, IntegrityError, LayoutError, ManifestError
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.header import parse_header
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard import Verify
from shardprep_runtime.shard.shard_set import open_set

FROZEN = Path(__file__).parents[1] / "data/v1"
BLOCK = 256
"""Bytes of a block, so that the small tensors have several."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shard sets of two models of the same shapes, cut at grain 4, in two stages."""
    folder = tmp_path_factory.mktemp("sets")
    found = {}
    for seed, name in enumerate(("set", "other")):
        source = small_models.write_model(folder / f"{name}-source", seed=seed)
        found[name] = folder / name
        split(
            source,
            found[name],
            tensor_parallel_size=4,
            pipeline_parallel_size=2,
            options=SplitOptions(block_bytes=BLOCK),
        )
    return found


@pytest.fixture
def folder(sets: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the first set, to be damaged."""
    return Path(shutil.copytree(sets["set"], tmp_path / "set"))


def part_of(manifest: Manifest, *, rank: int, stage: int = 0) -> str:
    """The part of a rank of the grain and a stage."""
    found = [part.path for part in manifest.parts if part.ranks == (rank, rank + 1)]
    return found[stage]


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> bytes [start, stop) of the file, of each tensor of a part."""
    raw = path.read_bytes()
    header = parse_header(raw[: 8 + int.from_bytes(raw[:8], "little")], len(raw), where="part")
    return {name: (span.start, span.stop) for name, span in header.tensors.items()}


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 4]))


def same(a: Any, b: Any) -> bool:
    """Whether two shards hold the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------- grids


def test_the_set_is_sound_before_it_is_damaged(folder: Path) -> None:
    report = verify(folder)
    assert report.blocks > report.pieces
    assert same(load(folder, rank=3, tensor_parallel_size=4), load(folder, rank=3, tensor_parallel_size=4))


@pytest.mark.parametrize(("tp", "pp", "rank"), [(4, 1, 4), (4, 2, 8), (1, 1, 1), (2, 2, -1), (2, 2, 100)])
def test_a_rank_outside_the_grid_is_refused(folder: Path, tp: int, pp: int, rank: int) -> None:
    with pytest.raises(LayoutError, match=rf"ranks go from 0 to {tp * pp - 1}"):
        load(folder, rank=rank, tensor_parallel_size=tp, pipeline_parallel_size=pp)


@pytest.mark.parametrize("odd", [True, 1.0, "1", None])
def test_a_rank_is_an_integer(folder: Path, odd: Any) -> None:
    with pytest.raises(LayoutError, match="is not in a grid"):
        load(folder, rank=odd, tensor_parallel_size=4)


@pytest.mark.parametrize("tp", [3, 8, 5, 16])
def test_a_tensor_parallel_size_that_does_not_divide_the_grain_is_refused_with_those_that_do(
    folder: Path, tp: int
) -> None:
    with pytest.raises(LayoutError, match=rf"parallel size {tp}; it serves 1, 2, 4$") as caught:
        load(folder, rank=0, tensor_parallel_size=tp)
    assert "weight" in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_a_size_is_an_integer_of_at_least_1(folder: Path, size: Any) -> None:
    with pytest.raises(LayoutError, match="tensor_parallel_size must be an integer of at least 1"):
        load(folder, tensor_parallel_size=size)
    with pytest.raises(LayoutError, match="must be an integer of at least 1"):
        load(folder, pipeline_parallel_size=0)


def test_more_stages_than_layers_are_refused(folder: Path) -> None:
    with pytest.raises(LayoutError, match="4 layers cannot fill 5 pipeline stages; use at most 4"):
        load(folder, pipeline_parallel_size=5)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([(0, 2)], "end at layer 2, the model has 4 layers"),
        ([(0, 2), (3, 4)], "expected the next to begin at layer 2"),
        ([(0, 2), (1, 4)], "expected the next to begin at layer 2"),
        ([(0, 4), (4, 4)], "at least one layer"),
        ([(0, 9)], "end at layer 9"),
        ([(0, 2, 4)], "expected the next"),
        ([], "end at layer 0"),
    ],
)
def test_stages_that_do_not_cover_the_layers_are_refused(folder: Path, stages: Any, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        open_set(folder).load(Place(stages=stages))


def test_stages_and_their_number_must_agree(folder: Path) -> None:
    with pytest.raises(LayoutError, match="2 stages were given for pipeline parallel size 3"):
        open_set(folder).load(Place(stages=[(0, 2), (2, 4)], pipeline_parallel_size=3))


@pytest.mark.parametrize("odd", ["sglang", "", None, 64, "\x1b[31m"])
def test_an_engine_that_the_set_does_not_know_is_refused_with_those_that_it_does(
    folder: Path, odd: Any
) -> None:
    with pytest.raises(LayoutError, match=r"cuts; it serves torch, .*vllm.*; split .* again") as caught:
        open_set(folder).load(Place(engine=odd))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("odd", [0, -1, 2.0, True, "2"])
def test_an_expert_parallel_size_is_an_integer_of_at_least_1(folder: Path, odd: Any) -> None:
    with pytest.raises(LayoutError, match="expert_parallel_size must be an integer of at least 1"):
        open_set(folder).load(Place(tensor_parallel_size=4, expert_parallel_size=odd))


def test_experts_that_do_not_divide_the_ranks_or_do_not_exist_are_refused_with_advice(folder: Path) -> None:
    with pytest.raises(LayoutError, match=r"3 does not divide tensor_parallel_size 4.*that work: 1, 2, 4$"):
        open_set(folder).load(Place(tensor_parallel_size=4, expert_parallel_size=3))
    with pytest.raises(LayoutError, match=r"this shard set knows of no experts; leave it out"):
        open_set(folder).load(Place(tensor_parallel_size=4, expert_parallel_size=2))


def test_more_expert_ranks_than_experts_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"the model has 5 experts; use at most 5"):
        plan_view(
            dataclasses.replace(read_manifest(FROZEN / "experts-each-tp4"), grain=8, tensors={}),
            Place(rank=0, tensor_parallel_size=8, expert_parallel_size=8),
        )


def test_a_stage_that_an_engine_cannot_run_is_refused_for_every_rank(folder: Path) -> None:
    change_manifest(folder, lambda fields: fields.update(stage_needs={"vllm": [3]}))
    for rank in range(2):
        load(folder, rank=rank, pipeline_parallel_size=2).close()  # torch has no such need
        with pytest.raises(LayoutError, match=r"vllm needs one of the layers 3 in every .* use at most 1"):
            open_set(folder).load(Place(rank=rank, pipeline_parallel_size=2, engine="vllm"))
    change_manifest(folder, lambda fields: fields.update(stage_needs={"vllm": [1, 3]}))
    open_set(folder).load(Place(pipeline_parallel_size=2, engine="vllm")).close()
    with pytest.raises(LayoutError, match=r"and 0-0 has none; .* --stages 0-1,2-3"):
        open_set(folder).load(Place(stages=[(0, 1), (1, 4)], engine="vllm"))


@pytest.mark.parametrize("how", [{"pipeline_parallel_size": 4}, {"stages": [(0, 2), (2, 3), (3, 4)]}])
def test_a_split_into_stages_that_an_engine_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    source = small_models.write_model(tmp_path / "source")
    real = models.derive_layout

    def with_needs(*arguments: Any, **options: Any) -> Any:
        return dataclasses.replace(real(*arguments, **options), stage_needs={"transformers": (1, 3)})

    monkeypatch.setattr(models, "derive_layout", with_needs)
    with pytest.raises(LayoutError, match=r"transformers needs one of the layers 1, 3 .* at most 2 stages"):
        split(source, tmp_path / "set", tensor_parallel_size=2, **how)
    assert not (tmp_path / "set").exists()
    split(source, tmp_path / "set", tensor_parallel_size=2, pipeline_parallel_size=2)
    assert read_manifest(tmp_path / "set").stage_needs == {"transformers": (1, 3)}


def test_an_unknown_way_to_verify_is_refused(folder: Path) -> None:
    with pytest.raises(LayoutError, match="blocks, headers or off"):
        load(folder, verify="none")  # type: ignore[arg-type]


def test_a_grid_is_refused_before_any_part_is_opened(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(LayoutError, match="it serves 1, 2, 4"):
        load(folder, tensor_parallel_size=3)


# ------------------------------------------------------------------------------------------------------ changed parts


def test_a_changed_bit_of_data_is_refused_naming_part_tensor_and_block(folder: Path) -> None:
    name = part_of(read_manifest(folder), rank=1)
    tensor, (start, _) = max(spans(folder / name).items(), key=lambda item: item[1][1] - item[1][0])
    flip(folder / name, start + 2 * BLOCK + 5)
    words = rf"{name}: tensor {tensor}: block 2 \(bytes {start + 2 * BLOCK} to {start + 3 * BLOCK}\)"
    with pytest.raises(IntegrityError, match=words):
        load(folder, rank=1, tensor_parallel_size=4, pipeline_parallel_size=2)
    with pytest.raises(IntegrityError, match=words):
        verify(folder)


def test_a_changed_bit_of_another_rank_or_stage_is_not_read(folder: Path) -> None:
    name = part_of(read_manifest(folder), rank=1, stage=0)
    flip(folder / name, next(iter(spans(folder / name).values()))[0])
    for rank in (0, 2, 3, 4, 5, 6, 7):
        load(folder, rank=rank, tensor_parallel_size=4, pipeline_parallel_size=2)
    with pytest.raises(IntegrityError):
        load(folder, rank=1, tensor_parallel_size=4, pipeline_parallel_size=2)


def test_with_headers_alone_a_changed_bit_of_data_is_not_seen_and_one_of_a_header_is(folder: Path) -> None:
    sound = {key: tensor.clone() for key, tensor in load(folder).items()}
    name = part_of(read_manifest(folder), rank=0)
    flip(folder / name, next(iter(spans(folder / name).values()))[0])
    assert not same(load(folder, verify="headers"), sound)
    verify(folder, fast=True)
    flip(folder / name, 20)
    with pytest.raises(IntegrityError, match=rf"{name}: the header's digest is"):
        load(folder, verify="headers")
    with pytest.raises(IntegrityError, match=rf"{name}: the header's digest is"):
        verify(folder, fast=True)


def test_any_changed_byte_of_a_header_is_refused(folder: Path) -> None:
    name = part_of(read_manifest(folder), rank=2)
    size = next(part.header_size for part in read_manifest(folder).parts if part.path == name)
    for at in (*range(0, size, 97), size - 1):
        flip(folder / name, at)
        with pytest.raises(IntegrityError, match=name):
            load(folder, rank=2, tensor_parallel_size=4, verify="headers")
        flip(folder / name, at)
    load(folder, rank=2, tensor_parallel_size=4)


def test_verify_names_the_first_bad_part_tensor_and_block(folder: Path) -> None:
    paths = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in paths[1:4]:
        for start, stop in spans(folder / name).values():
            flip(folder / name, stop - 1)
            flip(folder / name, start)
    tensor, (start, _) = min(spans(folder / paths[1]).items(), key=lambda item: item[1])
    for workers in (1, 4):
        with pytest.raises(IntegrityError, match=rf"{paths[1]}: tensor {tensor}: block 0 \(bytes {start} "):
            verify(folder, workers=workers)


def damage(name: str) -> Callable[[Path], Any]:
    """A way to damage a file."""

    def replace_by(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def change(path: Path) -> None:
            path.unlink()
            make(path)

        return change

    return {
        "missing": Path.unlink,
        "empty": lambda path: path.write_bytes(b""),
        "seven bytes": lambda path: path.write_bytes(path.read_bytes()[:7]),
        "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
        "cut behind the header": lambda path: path.write_bytes(
            path.read_bytes()[: min(spans(path).values())[0]]
        ),
        "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "one byte longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "a FIFO": replace_by(os.mkfifo),
        "a folder": replace_by(Path.mkdir),
        "a link to a folder": replace_by(lambda path: path.symlink_to("/tmp")),
        "a link to nothing": replace_by(lambda path: path.symlink_to("nothing")),
        "a link to itself": replace_by(lambda path: path.symlink_to(path.name)),
        "a device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    }[name]


@pytest.mark.parametrize("mode", ["blocks", "headers", "off"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "No such file"),
        ("empty", "truncated: 0 bytes"),
        ("seven bytes", "truncated: 7 bytes"),
        ("cut in the header", "truncated: 100 bytes"),
        ("cut behind the header", "truncated"),
        ("one byte short", "truncated"),
        ("one byte longer", "longer than it should be"),
        ("a FIFO", "not a regular file"),
        ("a folder", "not a regular file"),
        ("a link to a folder", "not a regular file"),
        ("a link to nothing", "No such file"),
        ("a link to itself", "symbolic links"),
        ("a device", "not a regular file"),
    ],
)
def test_a_part_that_is_not_whole_or_no_file_is_refused_without_waiting(
    folder: Path, mode: Verify, what: str, words: str
) -> None:
    name = part_of(read_manifest(folder), rank=3)
    damage(what)(folder / name)
    with pytest.raises(FormatError, match=rf"{name}: .*{words}"):
        load(folder, rank=3, tensor_parallel_size=4, verify=mode)
    with pytest.raises(FormatError, match=rf"{name}: .*{words}"):
        verify(folder, fast=True)
    load(folder, rank=2, tensor_parallel_size=4, verify=mode)


def test_parts_of_two_ranks_that_were_swapped_are_refused(folder: Path) -> None:
    manifest = read_manifest(folder)
    first, second = (folder / part_of(manifest, rank=rank) for rank in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    for mode in ("blocks", "headers"):
        with pytest.raises(IntegrityError, match="belongs to another shard set"):
            load(folder, tensor_parallel_size=4, verify=mode)
    with pytest.raises(ManifestError, match=r"no piece of ranks \[0, 1\]"):
        load(folder, tensor_parallel_size=4, verify="off")  # places are checked even so


def test_a_part_of_another_model_of_the_same_shapes_is_refused(folder: Path, sets: dict[str, Path]) -> None:
    name = part_of(read_manifest(folder), rank=0)
    shutil.copy(sets["other"] / name, folder / name)
    for mode in ("blocks", "headers"):
        with pytest.raises(
            IntegrityError, match=rf"{name}: the header's digest.*belongs to another shard set"
        ):
            load(folder, tensor_parallel_size=4, verify=mode)
    load(folder, tensor_parallel_size=4, verify="off")  # what "off" means


def test_the_manifest_of_another_model_is_refused_by_its_digest(folder: Path, sets: dict[str, Path]) -> None:
    digest = manifests.digest_of((folder / "shardprep.json").read_bytes())
    load(folder, manifest_digest=digest)
    shutil.copytree(sets["other"], folder, dirs_exist_ok=True)
    load(folder)
    with pytest.raises(ManifestError, match=rf"expected {digest}; do not load it"):
        load(folder, manifest_digest=digest)
    with pytest.raises(ManifestError, match=rf"expected {digest}; do not load it"):
        verify(folder, manifest_digest=digest)


# ------------------------------------------------------------------------------------------------- changed manifests


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest, changed."""
    path = folder / "shardprep.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors"]
)
def test_a_path_that_leaves_the_folder_is_refused_though_the_file_is_sound(folder: Path, path: str) -> None:
    name = part_of(read_manifest(folder), rank=0)
    shutil.copy(folder / name, folder.parent / "outside.safetensors")

    def change(fields: dict[str, Any]) -> None:
        next(part for part in fields["parts"] if part["path"] == name)["path"] = path

    change_manifest(folder, change)
    for open_it in (load, verify):
        with pytest.raises(ManifestError, match="leaves the folder"):
            open_it(folder)


def test_a_tensor_whose_piece_is_in_no_part_is_refused(folder: Path) -> None:
    change_manifest(folder, lambda fields: fields["parts"].pop(0))
    for open_it in (load, verify):
        with pytest.raises(ManifestError, match="a piece of it is in none of the parts"):
            open_it(folder)


def test_a_tensor_that_is_stored_twice_is_refused(folder: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["parts"].append({**fields["parts"][0], "path": "again.safetensors"})
        shutil.copy(folder / fields["parts"][0]["path"], folder / "again.safetensors")

    change_manifest(folder, change)
    with pytest.raises(ManifestError, match="the same piece is in"):
        verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["parts"][0].update(ranks=[1, 2]),
        lambda fields: fields["digests"].update(block_bytes=BLOCK * 2),
        lambda fields: fields["forms"][0].update(dtype="F16"),
        lambda fields: fields["tensors"].pop("model.layers.0.self_attn.q_proj.weight"),
        lambda fields: fields.update(grain=2),
    ],
)
def test_a_manifest_that_contradicts_its_parts_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    change_manifest(folder, change)
    with pytest.raises((ManifestError, LayoutError)):
        verify(folder, fast=True)
    with pytest.raises((ManifestError, LayoutError)):
        load(folder, verify="off")


METADATA: list[Any] = [None, [], "x", 1, {}, {"block_bytes": BLOCK}, {"block_bytes": BLOCK, "pieces": {}}]


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Rewrite the header of a part, changed, and the manifest so that it fits; the part's name."""
    name = part_of(read_manifest(folder), rank=0)
    raw = (folder / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    forged = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    (folder / name).write_bytes(forged)

    def follow(fields: dict[str, Any]) -> None:
        part = next(part for part in fields["parts"] if part["path"] == name)
        digest = manifests.digest_of(forged[: 8 + len(text)])
        part.update(size=len(forged), header_size=8 + len(text), digest=digest)

    change_manifest(folder, follow)
    return name


@pytest.mark.parametrize("own", METADATA, ids=str)
def test_a_part_whose_own_metadata_is_malformed_is_refused(folder: Path, own: Any) -> None:
    name = forge(folder, lambda metadata: metadata.update(shardprep=json.dumps(own)))
    with pytest.raises(ManifestError, match=name):
        load(folder)
    with pytest.raises(ManifestError, match=name):
        verify(folder)


@pytest.mark.parametrize("key", ["shape", "offset", "blocks"])
@pytest.mark.parametrize(
    "wrong", [..., None, 1, "x", "\x1b[31m", [], [[]], ["\x1b[31m"] * 2, [-1, 0], [None] * 2, {}]
)
def test_a_piece_whose_description_is_malformed_is_refused(folder: Path, key: str, wrong: Any) -> None:
    def change(metadata: dict[str, Any]) -> None:
        own = json.loads(metadata["shardprep"])
        piece = own["pieces"]["model.layers.0.self_attn.q_proj.weight"]
        piece[key] = wrong
        if wrong is ...:
            del piece[key]
        metadata["shardprep"] = json.dumps(own)

    name = forge(folder, change)
    for open_it in (load, verify):
        with pytest.raises(ManifestError, match=name) as caught:
            open_it(folder)
        assert str(caught.value).isprintable()


def test_a_part_without_our_metadata_is_refused(folder: Path) -> None:
    name = forge(folder, lambda metadata: metadata.pop("shardprep"))
    with pytest.raises(ManifestError, match=rf"{name}: .*not a part of a shard set"):
        load(folder)


def test_a_part_that_lies_elsewhere_behind_a_link_is_loaded(folder: Path) -> None:
    """The Hugging Face cache is made of links; what counts is the digest."""
    name = part_of(read_manifest(folder), rank=0)
    sound = {key: value.clone() for key, value in load(folder).items()}
    (folder / name).rename(folder.parent / "blob")
    (folder / name).symlink_to(folder.parent / "blob")
    assert same(load(folder), sound)


def descriptors() -> int:
    """Open descriptors of this process, those of mappings that nobody can reach any more closed."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_refused_load_leaves_no_descriptor_open(folder: Path) -> None:
    name = part_of(read_manifest(folder), rank=0)
    flip(folder / name, max(spans(folder / name).values())[1] - 1)
    before = descriptors()
    for _ in range(5):
        with pytest.raises(IntegrityError):
            load(folder)
        with pytest.raises(IntegrityError):
            verify(folder)
    assert descriptors() == before
