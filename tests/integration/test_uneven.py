"""Tensors whose ranks' blocks begin inside a piece, or skip experts, arrive as numpy would slice them, on every way."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from s3fixtures import BUCKET, isolate, put_shard_set
from s3server import S3Server
from shardprep.cli import main
from shardprep.layout import ModelLayout, Placed
from shardprep.split import SplitOptions, split
from shardprep_runtime import Shard, load
from shardprep_runtime.format.cut import WHOLE, Layout, Segment
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard import tensors as joining
from shardprep_runtime.shard.shard_set import ShardSet, open_set
from shardprep_runtime.stores.open import open_store
from stores import make_store

EXPERTS = 5
GRAIN = 8


def uneven(size: int, multiple: int = 1) -> Segment:
    return Segment(size, size, uneven=True, multiple=multiple)


SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.narrow": (3000, 97),
    "layers.0.wide": (5, 200_003),
    "layers.0.rows": (1003, 6),
    "layers.0.three": (4, 97, 50),
    "layers.0.fused": (EXPERTS, 2 * 97, 20),
    "layers.0.down": (EXPERTS, 40, 97),
    "layers.0.scales": (EXPERTS, 3),
    **{f"layers.0.experts.{i}.w": (30, 97) for i in range(EXPERTS)},
}
LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "narrow": (Layout(1, (uneven(97),)), Layout(1, (uneven(97, 64),))),
    "wide": (Layout(1, (uneven(200_003),)), Layout(1, (uneven(100_000), uneven(100_003)))),
    "rows": (Layout(0, (uneven(1003),)), Layout(0, (uneven(503), uneven(500)))),
    "three": (Layout(1, (uneven(97),)), WHOLE),
    "fused": (Layout(1, (uneven(97), uneven(97)), experts=True), Layout(1, (uneven(194),), experts=True)),
    "down": (Layout(2, (uneven(97),), experts=True), Layout(2, (uneven(97, 8),), experts=True)),
    "scales": (Layout(experts=True), Layout(experts=True)),
    "w": (Layout(1, (uneven(97),)), Layout(1, (uneven(97, 64),))),
}
"""Last word of a name -> how it is stored, and how vllm asks for it here."""

GRIDS = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2), (4, 4)]
"""Tensor and expert parallel sizes."""


def full(name: str) -> np.ndarray:
    rng = np.random.default_rng(sum(name.encode()))
    return rng.integers(0, 2**16, SHAPES[name], dtype=np.uint16)


def expected(name: str, *, size: int, ep: int, rank: int, engine: str) -> np.ndarray | None:
    """What a rank must hold; None: an expert of others."""
    layout = LAYOUTS[name.split(".")[-1]][engine == "vllm"]
    value, group = full(name), size // ep
    mine = np.array_split(np.arange(EXPERTS), ep)[rank // group]
    if ".experts." in name:
        if int(name.split(".")[3]) not in mine:
            return None
        size, rank = group, rank % group
    if layout.experts:
        value, size, rank = value[mine], group, rank % group
    if layout.dim is None:
        return value
    blocks, base = [], 0
    for segment in layout.segments:
        block = value.take(range(base, base + segment.size), axis=layout.dim)
        width = -(-(-(-segment.size // segment.multiple) * segment.multiple) // size)
        stop = min((rank + 1) * width, segment.size)
        blocks.append(block.take(range(rank * width, stop), axis=layout.dim))
        base += segment.size
    return np.concatenate(blocks, axis=layout.dim)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set at grain 8, in blocks of 4 KiB."""
    folder = tmp_path_factory.mktemp("uneven")
    write_checkpoint(folder / "source")
    layout = ModelLayout(
        "uneven",
        1,
        {
            name: Placed(
                0,
                LAYOUTS[name.split(".")[-1]][0],
                (("vllm", LAYOUTS[name.split(".")[-1]][1]),),
                int(name.split(".")[3]) if ".experts." in name else None,
            )
            for name in SHAPES
        },
        {},
        experts=EXPERTS,
        engines=("vllm",),
    )
    with pytest.MonkeyPatch.context() as patch:
        # no model type is as awkward as this
        patch.setattr("shardprep.model.describe.derive_layout", lambda *_, **__: layout)
        split(
            folder / "source",
            folder / "set",
            tensor_parallel_size=GRAIN,
            options=SplitOptions(block_bytes=4096),
        )
    return folder / "set"


def write_checkpoint(folder: Path) -> None:
    folder.mkdir()
    header: dict[str, Any] = {}
    data = b""
    for name, shape in SHAPES.items():
        own = full(name).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(own)],
        }
        data += own
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text('{"model_type": "uneven"}')


def check(shard: Shard, *, size: int, ep: int, rank: int, engine: str) -> None:
    wanted = {name: expected(name, size=size, ep=ep, rank=rank, engine=engine) for name in SHAPES}
    assert sorted(shard) == sorted(name for name, value in wanted.items() if value is not None)
    for name in shard:
        value = wanted[name]
        assert value is not None
        assert shard.describe(name).shape == value.shape, name
        assert bytes(shard.memory(name)) == value.tobytes(), name
    assert shard.nbytes == sum(value.nbytes for value in wanted.values() if value is not None)


def grids() -> Iterator[dict[str, Any]]:
    for engine in ("torch", "vllm"):
        for size, ep in GRIDS:
            for rank in range(size):
                yield {"size": size, "ep": ep, "rank": rank, "engine": engine}


def options(grid: dict[str, Any]) -> dict[str, Any]:
    return {
        "tensor_parallel_size": grid["size"],
        "expert_parallel_size": grid["ep"],
        "rank": grid["rank"],
        "engine": grid["engine"],
    }


SOME = [grid for grid in grids() if grid["size"] in (2, 4) and grid["rank"] in (0, grid["size"] - 1)]


@pytest.mark.slow
@pytest.mark.parametrize("io", ["mmap", "read"])
def test_every_rank_of_every_grid_gets_its_slices_from_a_folder(shards: Path, io: Any) -> None:
    for grid in grids() if io == "mmap" else SOME:
        with ShardSet(
            str(shards),
            io=io,
        ).load(Place(**options(grid))) as shard:
            check(shard, **grid)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [0, 2**40])
def test_reading_row_by_row_and_reading_what_lies_between_give_the_same(
    shards: Path, monkeypatch: pytest.MonkeyPatch, wide: int
) -> None:
    monkeypatch.setattr(joining, "WIDE", wide)
    for grid in SOME:
        with open_set(shards).load(Place(**options(grid))) as shard:
            check(shard, **grid)


def test_a_read_that_is_cut_short_is_finished(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal cuts it."""
    real = joining.os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        return real(fd, buffers[: max(1, len(buffers) // 3)], offset, *flags)

    monkeypatch.setattr(joining.os, "preadv", short)
    for grid in SOME:
        with open_set(shards).load(Place(**options(grid))) as shard:
            check(shard, **grid)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_they_arrive_from_a_store(shards: Path, tmp_path: Path, cached: bool) -> None:
    store = make_store(shards, tmp_path / "store")
    for grid in SOME:
        with open_set(f"file://{store}", cache=tmp_path / "cache" if cached else None).load(
            Place(**options(grid))
        ) as shard:
            check(shard, **grid)


def test_they_arrive_from_s3(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("botocore")
    with S3Server(tmp_path / "server") as server:
        isolate(monkeypatch, tmp_path, server)
        server.make_bucket(BUCKET)
        with open_store(f"s3://{BUCKET}/set") as store:
            put_shard_set(store, shards)
        for grid in SOME[::4]:
            with open_set(f"s3://{BUCKET}/set", cache=None).load(Place(**options(grid))) as shard:
                check(shard, **grid)


def test_what_was_pulled_for_a_rank_is_what_it_loads(shards: Path, tmp_path: Path) -> None:
    store = make_store(shards, tmp_path / "store")
    for number, grid in enumerate(SOME[::3]):
        folder = tmp_path / str(number)
        arguments = [
            "--rank",
            grid["rank"],
            "-tp",
            grid["size"],
            "-ep",
            grid["ep"],
            "--engine",
            grid["engine"],
        ]
        found = CliRunner().invoke(main, ["pull", str(store), str(folder), *map(str, arguments)])
        assert found.exit_code == 0, found.output
        with open_set(folder).load(Place(**options(grid))) as shard:
            check(shard, **grid)


def test_only_its_own_experts_are_read(shards: Path) -> None:
    """Of each piece one run of bytes: the rows of the experts."""
    with open_set(shards, verify="off").load(
        Place(tensor_parallel_size=4, expert_parallel_size=4, rank=3)
    ) as shard:
        pieces = [
            (piece, stop - start) for _, piece, start, stop in shard.ranges() if piece.name.endswith("down")
        ]
        assert len(pieces) == GRAIN
        for piece, count in pieces:
            assert count * EXPERTS == piece.span.stop - piece.span.start
        names = [name for name in shard if ".experts." in name]
        assert names == ["layers.0.experts.4.w"]


def test_bytes_read_are_those_of_whole_rows_where_parts_of_rows_are_wanted(shards: Path) -> None:
    with load(shards, tensor_parallel_size=2, rank=1, verify="off") as shard:
        read = sum(stop - start for _, piece, start, stop in shard.ranges() if piece.name.endswith("narrow"))
        kept = shard.describe("layers.0.narrow").nbytes
        # 58 columns of pieces of 13, of the first only the last 3; but its first 10 stand before no wanted byte
        assert (kept, read) == (3000 * 48 * 2, 3000 * 58 * 2 - 10 * 2)
        headers = sum(part.header_size for part in shard.view.parts)
        assert shard.bytes_read == headers + sum(stop - start for *_, start, stop in shard.ranges())


def test_joining_parts_of_rows_needs_little_memory_beside_the_tensor(shards: Path) -> None:
    with load(shards, tensor_parallel_size=2, rank=1, verify="off") as shard:
        tracemalloc.start()
        try:
            shard.memory("layers.0.narrow")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 600 * 2**10
