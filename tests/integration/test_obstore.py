"""What is promised of a store holds over obstore: its own stores, our S3 server with faults, and two emulators.

Azurite and fake-gcs-server are slow tests; `scripts/test_s3` installs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent

import pytest

from retries import retries
from s3fixtures import BUCKET, chunk, content, http_server
from s3server import S3Server
from shardprep_runtime.errors import (
    ConflictError,
    DeniedError,
    InputError,
    MissingError,
    SourceError,
    StoreError,
    WriteError,
)
from shardprep_runtime.stores import gs_az as obstore_store
from shardprep_runtime.stores.gs_az import SENT_BYTES, ObstoreStore
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Access, BufferSink, Chunk, FileRange, read, read_small

obstore = pytest.importorskip("obstore", reason="needs obstore: pip install 'shardprep[obstore]'")

from obstore.store import LocalStore, MemoryStore  # noqa: E402
from obstore.store import S3Store as ObstoreS3  # noqa: E402

pytestmark = pytest.mark.slow

SERVERS = Path(__file__).resolve().parents[2] / "tools" / "servers"
MIB = 2**20
NOBODY = "127.0.0.1:1"
KINDS = ["memory", "local", "s3", pytest.param("azurite", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    found = S3Server(tmp_path_factory.mktemp("s3"))
    found.make_bucket(BUCKET)
    with found:
        yield found


@pytest.fixture(scope="module")
def emulators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, str]]]:
    """Starts an emulator where it is first asked for, and says how it is reached."""
    running: dict[str, tuple[subprocess.Popen[str], dict[str, str]]] = {}

    def start(name: str) -> dict[str, str]:
        if name not in running:
            command = [sys.executable, str(SERVERS / f"{name}.py")]
            check = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
            if check.returncode:
                pytest.skip(check.stderr.strip())
            command += ["--root", str(tmp_path_factory.mktemp(name))]
            program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert program.stdout is not None
            running[name] = program, json.loads(program.stdout.readline())
        return running[name][1]

    yield start
    for program, _ in running.values():
        with program:
            program.communicate()  # closes its standard input
        assert program.returncode == 0


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's, and nothing that would have a cloud's metadata asked."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # Google's client looks there for credentials
    # should obstore ever look for a token of the machine, it finds a port where nobody is
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, NOBODY)
    monkeypatch.setenv("AZURE_MSI_ENDPOINT", f"http://{NOBODY}/")


def over(made: Any, *, uri: str, prefix: str = "", access: Access | None = None) -> ObstoreStore:
    """Ours over any object of obstore's stores, whose own settings hold."""
    scheme = uri.partition("://")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore_store, "_connect", lambda *_: lambda tries: made)
        found = ObstoreStore(scheme, "", prefix, access or Access())
    found.uri = uri
    return found


def over_s3(server: S3Server, *, prefix: str = "", bucket: str = BUCKET, **access: Any) -> ObstoreStore:
    """obstore on our S3 server, with our retries alone and the time limits that open_store would set."""
    limits = Access(**{"idle_timeout": 1.0, "deadline": 5.0} | access)
    made = ObstoreS3(
        bucket,
        endpoint=server.endpoint,
        access_key_id=server.access_key,
        secret_access_key=access.get("profile", server.secret_key),
        region=server.region,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=limits.connect_timeout),
            "read_timeout": timedelta(seconds=limits.idle_timeout),
            "timeout": timedelta(seconds=20),
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=5)},
    )
    return over(made, uri=f"s3://{bucket}/{prefix}".rstrip("/"), prefix=prefix, access=limits)


@pytest.fixture(params=KINDS)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: S3Server
) -> ObstoreStore:
    kind = request.param
    prefix = request.node.originalname
    if kind == "memory":
        return over(MemoryStore(), uri="memory://", prefix=prefix)
    if kind == "local":
        return over(LocalStore(tmp_path / "objects", mkdir=True), uri="local://", prefix=prefix)
    if kind == "s3":
        server.clear()
        return over_s3(server, prefix=prefix)
    return on_azurite(request.getfixturevalue("emulators")(kind), monkeypatch, prefix)


def on_azurite(about: dict[str, str], monkeypatch: pytest.MonkeyPatch, prefix: str = "") -> ObstoreStore:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", about["access_key"])
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", about["secret_key"])
    found = open_store(
        f"az://{about['bucket']}/{prefix}", Access(endpoint_url=about["endpoint"], deadline=5.0)
    )
    assert isinstance(found, ObstoreStore)
    return found


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.node.callspec.params["store"]
    return found


# ------------------------------------------------------------------------------------------------- what every one does


@pytest.mark.parametrize("key", ["plain", "a/b c+d=e~.json", "x" * 200])
def test_what_is_put_is_found_and_read(store: ObstoreStore, key: str) -> None:
    data = content(3 * MIB + 5)
    assert store.head(key) is None
    put = store.put(key, data)
    found = store.head(key)
    assert found is not None
    assert (found.key, found.size, found.version) == (key, len(data), put.version)
    assert abs(found.modified - time.time()) < 60
    assert read_small(store, key, most=len(data)) == (data, found)
    for start, stop in ((0, 1), (10, 20), (len(data) - 5, len(data)), (1, len(data))):
        assert read(store, key, start, stop, version=put.version) == data[start:stop]


def test_a_range_is_read_in_the_version_that_was_asked_for_or_not_at_all(store: ObstoreStore) -> None:
    old = store.put("k", b"old bytes").version
    assert read(store, "k", 0, 3, version=old) == b"old"
    time.sleep(0.01)
    new = store.put("k", b"new bytes").version
    assert new != old
    with pytest.raises(SourceError, match="replaced while it was read"):
        read(store, "k", 0, 3, version=old)
    assert read(store, "k", 0, 3, version=new) == b"new"


@pytest.mark.parametrize("start", [0, 4, 9, 100])
def test_a_range_beyond_the_end_is_an_error_of_the_source(store: ObstoreStore, start: int) -> None:
    store.put("k", b"nine byte")
    with pytest.raises(SourceError):
        read(store, "k", start, start + 10)


def test_a_missing_object_is_none_to_head_and_an_error_to_get(store: ObstoreStore) -> None:
    assert store.head("absent") is None
    with pytest.raises(MissingError, match="absent: no such object"):
        read(store, "absent", 0, 1)


def test_an_object_is_put_only_where_there_is_none(store: ObstoreStore) -> None:
    store.put_if("once", b"first", version=None)
    with pytest.raises(ConflictError, match="written by somebody else"):
        store.put_if("once", b"second", version=None)
    assert read(store, "once", 0, 5) == b"first"


def test_an_object_is_replaced_only_in_its_version(store: ObstoreStore, kind: str) -> None:
    old = store.put("name", b"first").version
    if kind == "local":
        with pytest.raises(StoreError, match="cannot replace an object conditionally; use a new name"):
            store.put_if("name", b"second", version=old)
        return
    new = store.put_if("name", b"second", version=old).version
    with pytest.raises(ConflictError):
        store.put_if("name", b"third!", version=old)
    assert read(store, "name", 0, 6, version=new) == b"second"
    store.delete(["name"])
    with pytest.raises(ConflictError):
        store.put_if("name", b"fourth", version=new)
    assert store.head("name") is None


def test_of_many_who_put_at_once_one_is_first(store: ObstoreStore) -> None:
    def put(number: int) -> int | None:
        try:
            store.put_if("race", b"%d" % number, version=None)
        except ConflictError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        won = [each for each in pool.map(put, range(8)) if each is not None]
    assert len(won) == 1
    assert read(store, "race", 0, 1) == b"%d" % won[0]


def test_a_list_keeps_to_its_prefix_which_may_end_within_a_word(store: ObstoreStore) -> None:
    keys = {f"many/{number:03}" for number in range(30)}
    for key in [*keys, "manyother", "other"]:
        store.put(key, key.encode())
    found = list(store.list("many/"))
    assert {each.key for each in found} == keys
    assert len(found) == len(keys)
    assert {each.key for each in store.list("many/00")} == {f"many/00{number}" for number in range(10)}
    assert {each.key for each in store.list("")} == keys | {"manyother", "other"}
    assert list(store.list("nothing/")) == []
    stat = store.head("many/003")
    assert stat is not None
    listed = next(each for each in found if each.key == "many/003")
    assert (listed.size, listed.version) == (stat.size, stat.version)


def test_deleting_removes_and_what_is_gone_is_no_error(store: ObstoreStore) -> None:
    for key in "ab":
        store.put(key, b"x")
    store.delete(["a", "never"])
    assert [each.key for each in store.list("")] == ["b"]


@pytest.mark.parametrize("size", [0, 1, SENT_BYTES, SENT_BYTES + 1, 3 * SENT_BYTES + 7])
def test_an_upload_is_one_part_from_a_file_or_from_memory(
    store: ObstoreStore, size: int, tmp_path: Path
) -> None:
    data = content(size + 20)
    file = tmp_path / "file"
    file.write_bytes(data)
    middle = size // 2
    with file.open("rb") as source:
        for key, body in {
            "memory": memoryview(data)[10 : 10 + size],
            "file": FileRange(source.fileno(), 10, 10 + size),
        }.items():
            upload = store.upload(key, [(0, middle), (middle, size)])
            assert list(upload.parts) == [(0, size)]
            assert not upload.has(0, lambda: chunk(b""))
            assert upload.send(0, Chunk(body)) is False
            stat = upload.finish()
            assert stat == store.head(key)
            if size:
                assert read(store, key, 0, size, version=stat.version) == data[10 : 10 + size]


def test_many_uploads_at_once_do_not_wait_for_each_other(store: ObstoreStore) -> None:
    datas = [content(SENT_BYTES + 1000, seed=seed) for seed in range(4)]

    def put(number: int) -> None:
        upload = store.upload(f"at once {number}", [(0, len(datas[number]))])
        upload.send(0, Chunk(datas[number]))
        upload.finish()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, range(4)))
    for number, data in enumerate(datas):
        assert read(store, f"at once {number}", 0, len(data)) == data


def test_a_file_that_becomes_shorter_leaves_nothing(store: ObstoreStore, tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(content(SENT_BYTES + 5))
    with file.open("rb") as source:
        upload = store.upload("short", [(0, 2 * SENT_BYTES)])
        with pytest.raises(WriteError, match="became shorter while it was sent"):
            upload.send(0, Chunk(FileRange(source.fileno(), 0, 2 * SENT_BYTES)))
    assert store.head("short") is None


# -------------------------------------------------------------------------------------------------------------- faults


class Counting(BufferSink):
    """Knows how much came."""

    def __init__(self, size: int) -> None:
        self.into = bytearray(size)
        super().__init__(memoryview(self.into))


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("status", {"code": 503, "times": 3}),
        ("status", {"code": 500, "times": 2}),
        ("reset", {"times": 2, "after": 700_000}),
        ("truncate", {"times": 3, "after": 300_000}),
        ("stall", {"times": 1, "after": 900_000}),
        ("hang", {"times": 1}),
    ],
)
def test_what_passes_is_waited_for_and_what_landed_is_not_fetched_again(
    server: S3Server, fault: str, how: dict[str, Any]
) -> None:
    store = over_s3(server, prefix="faults")
    data = content(2 * MIB)
    version = store.put("k", data).version
    server.reset_stats()
    server.fault(fault, method="GET", **how)
    sink = Counting(len(data) - 1)
    assert store.get("k", 1, sink, version=version) == version
    assert bytes(sink.into) == data[1:]
    stats = server.stats()
    assert stats["modes"] == {fault: how["times"]}
    # obstore holds up to SCRATCH bytes back, which are lost with the connection
    assert stats["sent"] < len(data) + how["times"] * (MIB + 300_000)
    server.clear()


def test_an_object_that_is_replaced_meanwhile_is_not_mixed(server: S3Server) -> None:
    store = over_s3(server, prefix="replaced")
    old, new = content(4 * MIB, seed=2), content(4 * MIB, seed=3)
    store.put("k", old)
    server.fault("truncate", method="GET", after=3 * MIB)

    class Swap(Counting):
        swapped = False

        def landed(self, count: int) -> None:
            super().landed(count)
            if not self.swapped:
                self.swapped = True
                store.put("k", new)

    with pytest.raises(SourceError, match="replaced while it was read"):
        store.get("k", 0, Swap(len(old)))
    server.clear()


def test_a_store_that_only_says_503_is_given_up(server: S3Server) -> None:
    store = over_s3(server, prefix="never", deadline=1.5)
    server.fault("status", code=503, times=0)
    with pytest.raises(StoreError, match=r"503.*given up after \d+ tries"):
        store.head("k")
    server.clear()


def test_an_upload_that_is_refused_midway_is_sent_again_and_then_given_up(server: S3Server) -> None:
    store = over_s3(server, prefix="upload", deadline=4.0)
    data = content(2 * SENT_BYTES + 5)
    server.fault("status", code=503, method="PUT", times=1)
    upload = store.upload("again", [(0, len(data))])
    upload.send(0, Chunk(data))
    assert upload.finish().size == len(data)
    assert read(store, "again", 0, len(data)) == data
    server.fault("status", code=503, method="PUT", times=0)
    with pytest.raises(StoreError, match="given up after"):
        store.upload("never", [(0, len(data))]).send(0, Chunk(data))
    server.clear()
    assert store.head("never") is None


def test_an_error_of_the_sink_is_not_taken_for_one_of_the_store(server: S3Server) -> None:
    store = over_s3(server, prefix="sink")
    store.put("k", content(MIB))

    class Full(Counting):
        def landed(self, count: int) -> None:
            raise PermissionError(13, "the sink's own")

    with pytest.raises(PermissionError, match="the sink's own"):
        store.get("k", 0, Full(MIB))


def test_a_refusal_is_told_at_once_and_holds_no_secret(server: S3Server) -> None:
    store = over_s3(server, profile="wrong-secret-of-the-user")
    for refused in (
        lambda: store.head("k"),
        lambda: read(store, "k", 0, 1),
        lambda: store.put("k", b"x"),
        lambda: list(store.list("")),
    ):
        with retries() as found, pytest.raises(DeniedError) as said:
            refused()
        assert found == []
        assert "wrong-secret" not in str(said.value)
        assert server.secret_key not in str(said.value)


def test_an_unknown_bucket_is_missing(server: S3Server) -> None:
    store = over_s3(server, bucket="never-made")
    for asked in (
        lambda: read(store, "k", 0, 1),
        lambda: store.put("k", b"x"),
        lambda: store.put_if("k", b"x", version=None),
        lambda: list(store.list("")),
    ):
        with pytest.raises(MissingError, match="no such bucket"):
            asked()


# ------------------------------------------------------------------------------------------------- gs:// and az:// as such


class Recording(BaseHTTPRequestHandler):
    """Answers 404 to everything and keeps the lines of requests."""

    seen: list[str]
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 - http.server calls them so

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("gs://bucket/some/prefix", "HEAD /bucket/some%2Fprefix%2Fk"),
        ("az://container/p", "HEAD /acc/container/p/k"),
    ],
)
def test_requests_go_to_the_endpoint_that_was_given(
    uri: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
    handler = type("Handler", (Recording,), {"seen": []})
    with http_server(handler) as endpoint:
        at = f"{endpoint}/acc" if uri.startswith("az") else endpoint
        with open_store(uri, Access(endpoint_url=at, anonymous=True)) as store:
            assert store.uri == uri
            assert store.head("k") is None
            assert store.abort_uploads("", before=time.time()) == 0
    assert handler.seen == [line]


def test_google_is_only_read_without_credentials() -> None:
    """obstore would ask the machine's metadata for a token: no request is made, and none elsewhere."""
    handler = type("Handler", (Recording,), {"seen": []})
    with (
        http_server(handler) as endpoint,
        open_store("gs://bucket", Access(endpoint_url=endpoint, anonymous=True)) as store,
    ):
        for write in (
            lambda: store.put("k", b"x"),
            lambda: store.put_if("k", b"x", version=None),
            lambda: store.upload("k", [(0, 1)]),
            lambda: store.delete(["k"]),
        ):
            with pytest.raises(DeniedError, match="without credentials gs:// can only be read"):
                write()
        assert store.head("k") is None
    assert handler.seen == ["HEAD /bucket/k"]


def test_what_only_s3_has_is_refused() -> None:
    with pytest.raises(InputError, match="a profile and a region are of s3://, not of gs://"):
        open_store("gs://bucket", Access(profile="mine"))


def test_an_account_that_is_missing_is_said_before_any_request() -> None:
    with pytest.raises(InputError, match=r"az://container: .*[Aa]ccount"):
        open_store("az://container", Access(anonymous=True))


@pytest.mark.slow
def test_a_wrong_key_of_azure_is_refused_and_not_shown(
    emulators: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    about = emulators("azurite")
    wrong = "d3JvbmcgYnV0IHdlbGwgZm9ybWVkIGtleQ=="
    with on_azurite(about | {"secret_key": wrong}, monkeypatch) as store:
        for refused in (lambda: store.head("k"), lambda: store.put("k", b"x"), lambda: list(store.list(""))):
            with pytest.raises(DeniedError) as said:
                refused()
            assert wrong not in str(said.value)


@pytest.mark.slow
def test_an_unknown_container_of_azure_is_missing(
    emulators: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_azurite(emulators("azurite") | {"bucket": "never-made"}, monkeypatch) as store:
        for asked in (lambda: read(store, "k", 0, 1), lambda: store.put("k", b"x")):
            with pytest.raises(MissingError, match="no such bucket"):
                asked()


@pytest.mark.slow
def test_public_objects_of_google_are_read(emulators: Callable[[str], dict[str, str]]) -> None:
    """The emulator takes no writes as obstore sends them: what is read was put by its JSON interface."""
    about = emulators("gcs")
    data = content(3 * MIB)

    def put(key: str, body: bytes) -> None:
        at = f"{about['endpoint']}/upload/storage/v1/b/{about['bucket']}/o?uploadType=media&name={percent(key, safe='')}"
        headers = {"Content-Type": "application/octet-stream"}
        with urllib.request.urlopen(urllib.request.Request(at, data=body, headers=headers)) as answer:
            answer.read()

    put("p/some/k", data)
    put("p/some/other", b"x")
    put("elsewhere", b"x")
    with open_store(
        f"gs://{about['bucket']}/p", Access(endpoint_url=about["endpoint"], anonymous=True, deadline=5.0)
    ) as store:
        assert store.head("absent") is None
        with pytest.raises(MissingError):
            read(store, "absent", 0, 1)
        found = store.head("some/k")
        assert found is not None
        assert found.size == len(data)
        assert read(store, "some/k", 1000, len(data), version=found.version) == data[1000:]
        with pytest.raises(SourceError, match="were expected"):
            read(store, "some/k", 10, len(data) + 1)
        assert {each.key: each.size for each in store.list("some/")} == {"some/k": len(data), "some/other": 1}
        put("p/some/k", data[::-1])
        with pytest.raises(SourceError, match="replaced while it was read"):
            read(store, "some/k", 0, 10, version=found.version)


def test_threads_share_one_store(server: S3Server) -> None:
    store = over_s3(server, prefix="threads")
    data = content(3 * MIB)
    version = store.put("k", data).version
    started = threading.Barrier(6)

    def part(number: int) -> bytes:
        started.wait()
        return read(store, "k", number * MIB // 2, (number + 1) * MIB // 2, version=version)

    with ThreadPoolExecutor(6) as pool:
        assert b"".join(pool.map(part, range(6))) == data
