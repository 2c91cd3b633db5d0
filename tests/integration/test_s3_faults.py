"""Whatever happens on the way: never a wrong byte, little traffic more than without it, and a clear end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import s3fixtures
import small_models
from lazily import torch
from retries import retries
from s3fixtures import BUCKET, chunk, content, opened
from s3server import S3Server
from shardprep.cli import main
from shardprep.publish.pull import pull
from shardprep.publish.push import push
from shardprep.split import SplitOptions, split
from shardprep_runtime import Shard, load, read_manifest
from shardprep_runtime.errors import (
    DeniedError,
    IntegrityError,
    MissingError,
    ShardprepError,
    SourceError,
    StoreError,
)
from shardprep_runtime.format.manifest import Part
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard import fetch
from shardprep_runtime.shard.revisions import blob_key
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.stores.store import Access, Transfer, read

pytestmark = pytest.mark.slow  # a minute of waiting for what passes

MIB = 2**20
URI = f"s3://{BUCKET}/model"
BLOCK = 16 * 2**10
RUN = 4 * BLOCK
LARGE = 20_000
"""A response of so many bytes is one of blocks, not of a manifest or a header."""

WAYS = ["memory", "cache", "pull"]

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 1.4 MB in several parts, whose larger tensors have several blocks each."""
    folder = tmp_path_factory.mktemp("sets")
    config = small_models.llama_config(heads=4, head_dim=32, layers=4, intermediate=256, vocab=300)
    small_models.write_model(folder / "source", config)
    split(
        folder / "source",
        folder / "set",
        tensor_parallel_size=2,
        options=SplitOptions(max_part_bytes=200_000, block_bytes=BLOCK),
    )
    return folder / "set"


@pytest.fixture(scope="module")
def expected(shards: Path) -> Tensors:
    with load(shards) as shard:
        return dict(shard)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("faults")) as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def filled(running: S3Server, shards: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        s3fixtures.isolate(patch, shards, running)
        with opened("model") as store:
            s3fixtures.put_shard_set(store, shards)


@pytest.fixture(autouse=True)
def server(
    running: S3Server, filled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[S3Server]:
    """The server, without faults; the environment is its own. Several runs make a part."""
    s3fixtures.isolate(monkeypatch, tmp_path, running)
    monkeypatch.setattr(fetch, "RUN_BYTES", RUN)
    running.clear()
    running.reset_stats()
    yield running
    running.clear()


def by_turns(faults: Sequence[tuple[Any, ...]], ways: Sequence[str]) -> list[Any]:
    """Every fault in every way; the quick run has each fault once."""
    return [
        pytest.param(
            *fault,
            way,
            id=f"{fault[0]}-{number}-{way}",
            marks=[] if ways[number % len(ways)] == way else [pytest.mark.slow],
        )
        for number, fault in enumerate(faults)
        for way in ways
    ]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def bring(way: str, folder: Path, **how: Any) -> Tensors:
    """All tensors of the shard set at URI, as they come by this way."""
    access = Access(**{"idle_timeout": 1.0, "deadline": 10.0} | how)
    if way == "pull":
        pull(open_set(URI, access=access), folder / "out", place=Place(0))
        with load(folder / "out") as shard:
            return dict(shard)
    with load(URI, cache=folder / "cache" if way == "cache" else None, access=access) as shard:
        shard.wait()
        return dict(shard)


def large_parts(shards: Path) -> list[Part]:
    """The largest first: each has several runs."""
    return sorted(read_manifest(shards).parts, key=lambda part: -part.size)


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def clean(
    running: S3Server, filled: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, int]]:
    """Bytes and requests of each way where nothing happens."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        s3fixtures.isolate(patch, Path("/nonexistent"), running)
        patch.setattr(fetch, "RUN_BYTES", RUN)
        for way in WAYS:
            running.clear()
            running.reset_stats()
            bring(way, tmp_path_factory.mktemp("clean"))
            stats = running.stats()
            found[way] = stats["sent"], stats["requests"]
    return found


def test_every_byte_is_asked_for_once(
    clean: dict[str, tuple[int, int]], shards: Path, expected: Tensors
) -> None:
    manifest = read_manifest(shards)
    raw = (shards / "shardprep.json").stat().st_size + sum(part.size for part in manifest.parts)
    assert clean["memory"][0] == clean["cache"][0] == raw
    assert clean["pull"][0] == raw + sum(side.size for side in manifest.side_files)


# ------------------------------------------------------------------------------------------------------- what passes

ERROR = 1000
"""More than the body of an error."""

PASSING: list[tuple[str, dict[str, Any], int]] = [
    # fault, how, bytes more for each time: what is lost, or in flight
    ("status", {"code": 503, "times": 5}, ERROR),
    ("status", {"code": 500, "times": 3}, ERROR),
    ("status", {"code": 429, "times": 3}, ERROR),
    ("status", {"code": 503, "times": 2, "match": "manifests/"}, ERROR),
    ("reset", {"times": 3, "after": 0}, 0),
    ("reset", {"times": 3, "after": 30_000, "min_bytes": LARGE}, 30_000),
    ("truncate", {"times": 3, "after": 0}, 0),
    ("truncate", {"times": 4, "after": 17_001, "min_bytes": LARGE}, 0),
    ("slow_first_byte", {"times": 3, "delay": 0.2}, 0),
    ("stall", {"times": 2, "after": 17_001, "min_bytes": LARGE}, 0),
    ("hang", {"times": 2}, 0),
    ("drip", {"times": 2, "rate": 1000, "min_bytes": LARGE}, 1000),
    ("shift", {"times": 1, "min_bytes": LARGE}, RUN),
    ("shift", {"times": 1, "by": -5, "min_bytes": LARGE}, RUN),
    ("wrong_range", {"times": 2, "min_bytes": LARGE}, RUN),
    ("html", {"times": 2, "min_bytes": LARGE}, RUN),
    ("html", {"times": 2, "short": True, "min_bytes": LARGE}, ERROR),
    ("full200", {"times": 2, "min_bytes": LARGE}, 210_000),
]


@pytest.mark.parametrize(("mode", "how", "extra", "way"), by_turns(PASSING, WAYS))
def test_what_passes_is_survived_and_costs_what_was_lost(
    mode: str,
    how: dict[str, Any],
    extra: int,
    way: str,
    server: S3Server,
    expected: Tensors,
    clean: dict[str, tuple[int, int]],
    tmp_path: Path,
) -> None:
    server.fault(mode, **{"match": "blobs/", "method": "GET"} | how)
    assert same(bring(way, tmp_path), expected)
    stats = server.stats()
    assert stats["modes"] == {mode: how["times"]}
    assert clean[way][0] <= stats["sent"] <= clean[way][0] + how["times"] * extra


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("status", {"code": 503, "times": 3}),
        ("truncate", {"times": 3, "after": 17_001, "min_bytes": LARGE}),
        ("stall", {"times": 2, "after": 17_001, "min_bytes": LARGE}),
        ("drip", {"times": 1, "rate": 1000, "min_bytes": LARGE}),
        ("hang", {"times": 1}),
        ("shift", {"times": 1, "min_bytes": LARGE}),
        ("full200", {"times": 1, "min_bytes": LARGE}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_passes_is_survived_through_boto3_too(
    mode: str,
    how: dict[str, Any],
    server: S3Server,
    expected: Tensors,
    clean: dict[str, tuple[int, int]],
    tmp_path: Path,
) -> None:
    server.fault(mode, **{"match": "blobs/", "method": "GET"} | how)
    assert same(bring("memory", tmp_path, transfer="boto3"), expected)
    assert server.stats()["modes"] == {mode: how["times"]}
    if mode in ("truncate", "stall"):
        assert server.stats()["sent"] == clean["memory"][0]


def test_a_flipped_bit_costs_one_block_more(
    way: str, server: S3Server, expected: Tensors, clean: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    server.fault("flip", at=BLOCK + 5, match="blobs/", method="GET", min_bytes=2 * BLOCK)
    assert same(bring(way, tmp_path), expected)
    sent, requests = clean[way]
    stats = server.stats()
    assert stats["requests"] == requests + 1
    assert 0 < stats["sent"] - sent <= BLOCK
    flipped = [each["range"] for each in stats["log"] if each["fault"] == "flip"]
    first, last = map(int, flipped[0].removeprefix("bytes=").split("-"))
    again = [
        each
        for each in stats["log"]
        if each["sent"] == stats["sent"] - sent and first <= _start(each) <= first + BLOCK + 5 <= last
    ]
    assert again


def _start(record: dict[str, Any]) -> int:
    return int((record["range"] or "bytes=-1").removeprefix("bytes=").split("-")[0] or -1)


def test_a_flipped_bit_in_a_header_costs_that_header_more(
    way: str,
    server: S3Server,
    shards: Path,
    expected: Tensors,
    clean: dict[str, tuple[int, int]],
    tmp_path: Path,
) -> None:
    part = read_manifest(shards).parts[0]
    server.fault("flip", at=100, match=blob_key(part.digest), method="GET")
    assert same(bring(way, tmp_path), expected)
    assert server.stats()["sent"] == clean[way][0] + part.header_size


@pytest.mark.parametrize("mode", ["stall", "hang"])
def test_a_stall_costs_its_idle_timeout_and_one_more_request(
    mode: str, server: S3Server, expected: Tensors, clean: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    server.fault(
        mode, match="blobs/", method="GET", min_bytes=LARGE, **({"after": 17_001} if mode == "stall" else {})
    )
    assert same(bring("memory", tmp_path, idle_timeout=2.5), expected)
    stats = server.stats()
    assert stats["modes"] == {mode: 1}
    assert stats["requests"] == clean["memory"][1] + 1


def test_an_idle_timeout_is_no_limit_for_what_is_slow_but_moves(
    server: S3Server, expected: Tensors, clean: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    server.fault("drip", rate=40_000, match="blobs/", method="GET", min_bytes=LARGE)
    assert same(bring("memory", tmp_path, idle_timeout=0.5), expected)
    assert server.stats()["sent"] == clean["memory"][0]


# ----------------------------------------------------------------------------------------------------- what does not

LASTING: list[tuple[str, dict[str, Any], type[ShardprepError], str, int]] = [
    # fault, how, error, its words, requests of the range at most (0: as often as the deadline allows)
    ("status", {"code": 503}, StoreError, r"answered 503 SlowDown.*given up after \d+ tries", 0),
    ("status", {"code": 500}, StoreError, r"answered 500 InternalError.*given up after \d+ tries", 0),
    ("status", {"code": 429}, StoreError, r"answered 429 TooManyRequests.*given up", 0),
    ("reset", {"after": 0}, StoreError, r"given up after \d+ tries", 0),
    ("truncate", {"after": 0}, StoreError, r"ended before all bytes had come; given up", 0),
    ("stall", {"after": 0}, StoreError, r"(timed out|nothing came).*given up", 0),
    ("hang", {}, StoreError, r"no answer: timed out; given up", 0),
    ("flip", {}, IntegrityError, r"block \d+ .*does not match its digest, 3 times", 3),
    ("shift", {}, IntegrityError, r"does not match its digest, 3 times", 0),
    ("wrong_range", {}, StoreError, r"were asked for, the store answered bytes .*given up after 4 tries", 4),
    ("html", {}, StoreError, r"is 200 without a range \(text/html\).*or is not a store; given up after 3", 3),
    ("html", {"short": True}, StoreError, r"200 without a range \(text/html\).*given up after 3 tries", 3),
    ("full200", {}, StoreError, r"is 200 without a range .*knows no ranges", 3),
    ("gzip", {}, StoreError, r"the bytes were sent compressed \(gzip\)", 1),
    ("status", {"code": 403}, DeniedError, r"the store refuses: 403 AccessDenied", 1),
    ("status", {"code": 404}, MissingError, r"no such object", 1),
    ("status", {"code": 301, "region": "eu-north-1"}, DeniedError, r"the bucket is in eu-north-1", 1),
    ("status", {"code": 307, "name": "TemporaryRedirect"}, DeniedError, r"another region or endpoint", 1),
    ("status", {"code": 400, "name": "ExpiredToken"}, DeniedError, r"credentials have expired; renew", 1),
    ("status", {"code": 403, "name": "RequestTimeTooSkewed"}, DeniedError, r"the clock of this machine", 1),
]


@pytest.mark.parametrize(
    ("mode", "how", "error", "words", "most", "way"), by_turns(LASTING, ["cache", "pull"])
)
def test_what_lasts_ends_clearly_and_what_has_come_is_kept(
    mode: str,
    how: dict[str, Any],
    error: type[ShardprepError],
    words: str,
    most: int,
    way: str,
    server: S3Server,
    shards: Path,
    expected: Tensors,
    clean: dict[str, tuple[int, int]],
    tmp_path: Path,
) -> None:
    """One part's blocks cannot be had; a second run, once they can, brings what is missing and nothing else."""
    hit = large_parts(shards)[0]
    server.fault(mode, times=0, match=blob_key(hit.digest), min_bytes=hit.header_size + 1, **how)
    with pytest.raises(error, match=words) as caught:
        bring(way, tmp_path, deadline=1.0, idle_timeout=0.3)
    assert caught.type is error
    assert "\n" not in str(caught.value)
    stats = server.stats()
    broken = [each["range"] for each in stats["log"] if each["fault"]]
    if most:
        assert max(map(broken.count, broken)) <= most
    if way == "pull":
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names <= {".shardprep-pull"} | {
            each.path + end for each in read_manifest(shards).parts for end in (".sparse", ".sparse.landed")
        }
    before = sum(each["sent"] for each in stats["log"] if not each["fault"])
    server.clear()
    server.reset_stats()
    assert same(bring(way, tmp_path), expected)
    # a second run asks for the manifest again, and for nothing that had come (a run that was cut off midway: its blocks)
    manifest = (shards / "shardprep.json").stat().st_size
    assert server.stats()["sent"] <= clean[way][0] - before + manifest + 16 * RUN


@pytest.mark.parametrize("verify", ["blocks", "off"])
def test_an_object_that_is_replaced_midway_is_an_error_and_never_a_mixture(
    verify: Any, way: str, server: S3Server, shards: Path, expected: Tensors, tmp_path: Path
) -> None:
    part = large_parts(shards)[0]
    raw = (shards / part.path).read_bytes()
    server.fault("replace", match=blob_key(part.digest), method="GET")  # when its header is read
    try:
        with pytest.raises(SourceError, match="the object was replaced while it was read; run again"):
            if way == "pull" or verify == "blocks":
                bring(way, tmp_path)
            else:
                cache = tmp_path / "cache" if way == "cache" else None
                with load(URI, cache=cache, verify=verify, access=Access(deadline=5.0)) as shard:
                    shard.wait()
    finally:
        with opened("model") as store:
            store.put(blob_key(part.digest), raw)
    assert same(bring(way, tmp_path), expected)


def test_a_store_whose_copy_is_damaged_never_gives_a_tensor_of_it(
    server: S3Server, shards: Path, expected: Tensors, tmp_path: Path
) -> None:
    """And gives all others."""
    part = read_manifest(shards).parts[-1]
    raw = bytearray((shards / part.path).read_bytes())
    raw[-1] ^= 1
    good: Tensors = {}
    bad = []
    with opened("model") as store:
        store.put(blob_key(part.digest), bytes(raw))
        try:
            with load(URI, cache=None, access=Access(deadline=5.0)) as shard:
                for name in shard:
                    try:
                        good[name] = shard[name]
                    except IntegrityError as error:
                        bad.append(str(error))
        finally:
            store.put(blob_key(part.digest), (shards / part.path).read_bytes())
    assert bad
    assert all("put it there again" in each for each in bad)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in good.items())


def test_an_error_reaches_whoever_waits_and_closing_does_not_hang(server: S3Server) -> None:
    server.fault("status", code=403, times=0, match="blobs/", min_bytes=LARGE)
    shard: Shard = load(URI, cache=None, access=Access(deadline=5.0))
    with retries() as found:
        for _ in range(2):
            with pytest.raises(DeniedError, match="403 AccessDenied"):
                shard.wait()
        shard.close()
    assert found == []


def test_what_is_not_transient_ends_a_pull_at_once_although_others_still_try(
    server: S3Server, shards: Path, tmp_path: Path
) -> None:
    """A refusal of one range is not held up by the patience that another one has."""
    one, other = large_parts(shards)[:2]
    server.fault("status", code=503, times=0, match=blob_key(one.digest), min_bytes=LARGE)
    server.fault("status", code=403, times=0, match=blob_key(other.digest), min_bytes=LARGE, skip=1)
    with pytest.raises(DeniedError):
        bring("pull", tmp_path, deadline=1e6)  # patience until the end of which no test waits


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("mode", "how", "words"),
    [
        ("status", {"code": 403}, "the store refuses: 403 AccessDenied"),
        ("status", {"code": 400, "name": "ExpiredToken"}, "credentials have expired"),
        ("flip", {}, "does not match its digest, 3 times"),
        ("html", {}, "or is not a store"),
        ("full200", {}, "knows no ranges"),
        ("gzip", {}, "compressed"),
        ("wrong_range", {}, "the store answered bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_the_command_says_what_is_wrong_and_a_second_one_completes(
    mode: str,
    how: dict[str, Any],
    words: str,
    server: S3Server,
    shards: Path,
    expected: Tensors,
    tmp_path: Path,
) -> None:
    part = large_parts(shards)[0]
    server.fault(mode, times=0, match=blob_key(part.digest), min_bytes=part.header_size + 1, **how)
    command = ["pull", URI, str(tmp_path / "out"), "--all"]
    failed = CliRunner().invoke(main, command)
    assert failed.exit_code == 1
    assert words in failed.stderr
    assert 1 <= len(failed.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in failed.stderr
    assert isinstance(failed.exception, SystemExit)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]
    assert not (tmp_path / "out/shardprep.json").exists()
    server.clear()
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    with load(tmp_path / "out") as shard:
        assert same(dict(shard), expected)
    assert not [
        path for path in (tmp_path / "out").iterdir() if path.suffix not in (".safetensors", ".json", "")
    ]


# ------------------------------------------------------------------------------------------------------------ uploads

PARTS = [(0, 5 * MIB), (5 * MIB, 10 * MIB), (10 * MIB, 10 * MIB + 1234)]


@pytest.fixture(params=["native", "boto3"])
def transfer(request: pytest.FixtureRequest) -> Transfer:
    found: Transfer = request.param
    return found


@pytest.mark.parametrize(
    ("mode", "how", "lost"),
    [
        ("drop_upload", {"times": 2, "after": 100_000, "method": "PUT"}, 2 * 5 * MIB),
        ("lost_response", {"method": "PUT"}, 5 * MIB),
        ("lost_response", {"method": "POST"}, 0),
        ("lost_response", {"method": "POST", "skip": 1}, 0),
        ("status", {"code": 503, "times": 2, "method": "PUT"}, 2 * 5 * MIB),
        ("status", {"code": 503, "times": 2, "method": "POST"}, 0),
        ("status", {"code": 500, "times": 2, "method": "POST", "skip": 1}, 0),
        pytest.param("hang", {"method": "PUT"}, 5 * MIB, marks=pytest.mark.slow),
        ("reset", {"method": "PUT"}, 5 * MIB),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_upload_survives_what_passes(
    mode: str, how: dict[str, Any], lost: int, transfer: Transfer, server: S3Server
) -> None:
    data = content(PARTS[-1][1])
    with opened("up", transfer=transfer, idle_timeout=2.0, deadline=15.0) as store:
        server.fault(mode, **how)
        upload = store.upload(f"{mode}-{lost}", PARTS)
        for number, (start, stop) in enumerate(PARTS):
            assert upload.send(number, chunk(data[start:stop]))
        done = upload.finish()
        stats = server.stats()
        assert stats["modes"] == {mode: how.get("times", 1)}
        assert read(store, f"{mode}-{lost}", 0, len(data), version=done.version) == data
        store.delete([f"{mode}-{lost}"])
        store.abort_uploads("", before=time.time() + 60)
    received = stats["operations"]["UploadPart"]["received"]
    assert len(data) <= received <= len(data) + lost


def test_an_upload_whose_checksum_comes_back_wrong_fails(server: S3Server, transfer: Transfer) -> None:
    altered = {"x-amz-checksum-crc32": "AAAAAA=="}
    handler = type("Here", (s3fixtures.Proxy,), {"seen": [], "upstream": server.endpoint, "altered": altered})
    with (
        s3fixtures.http_server(handler) as endpoint,
        opened("up", transfer=transfer, endpoint_url=endpoint) as store,
        pytest.raises(StoreError, match="the store received other bytes than were sent"),
    ):
        store.upload("wrong", [(0, 9)]).send(0, chunk(b"nine byte"))


def test_a_part_that_arrives_as_other_bytes_is_sent_again_and_then_given_up(
    server: S3Server, transfer: Transfer
) -> None:
    with opened("up", transfer=transfer) as store:
        wrong = chunk(b"nine byte")
        with pytest.raises(StoreError, match=r"400 BadDigest.*given up after 4 tries"):
            store.upload("k", [(0, 9)]).send(0, type(wrong)(b"xine byte", wrong.crc32))
        assert store.head("k") is None
    assert server.stats()["operations"]["PutObject"]["requests"] == 4


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("drop_upload", {"times": 3, "after": 1000, "method": "PUT"}),
        ("lost_response", {"times": 3, "method": "PUT"}),
        ("lost_response", {"method": "PUT", "match": "manifests/"}),
        ("status", {"code": 503, "times": 5, "method": "PUT"}),
        ("status", {"code": 429, "times": 3, "method": "HEAD"}),
        ("hang", {"method": "PUT"}),
        ("reset", {"times": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_push_survives_what_passes(
    mode: str, how: dict[str, Any], server: S3Server, shards: Path, tmp_path: Path
) -> None:
    uri = f"s3://{BUCKET}/{tmp_path.name}"
    server.fault(mode, **how)
    push(shards, uri, access=Access(idle_timeout=1.0, deadline=10.0))
    assert server.stats()["modes"] == {mode: how.get("times", 1)}
    there = {key: path.read_bytes() for key, path in server.objects(BUCKET).items()}
    manifest = read_manifest(shards)
    for each in (*manifest.parts, *manifest.side_files):
        assert there[f"{tmp_path.name}/{blob_key(each.digest)}"] == (shards / each.path).read_bytes()
    assert there[f"{tmp_path.name}/manifests/main.json"] == (shards / "shardprep.json").read_bytes()


@pytest.mark.parametrize(
    ("how", "error"),
    [({"code": 403}, DeniedError), ({"code": 400, "name": "ExpiredToken"}, DeniedError)],
)
def test_a_push_that_is_refused_publishes_nothing(
    how: dict[str, Any], error: type[Exception], server: S3Server, shards: Path, tmp_path: Path
) -> None:
    uri = f"s3://{BUCKET}/{tmp_path.name}"
    server.fault("status", times=0, method="PUT", **how)
    with pytest.raises(error):
        push(shards, uri, access=Access(deadline=5.0))
    assert not [key for key in server.objects(BUCKET) if key.startswith(f"{tmp_path.name}/manifests")]
