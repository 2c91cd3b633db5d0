"""hf://org/name as a source: the real client of the hub against a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import small_models
from shardprep.convert import convert
from shardprep_runtime.errors import InputError

pytest.importorskip("huggingface_hub")

from shardprep.source.hub import Named, parse_uri

pytestmark = pytest.mark.slow  # each starts a hub

COMMIT, OLDER = "c0ffee" * 6 + "c0de", "0" * 40
SECRET = "hf_ThisMustNeverBeSeen"
SHARDPREP = Path(sys.executable).with_name("shardprep")


class Hub(ThreadingHTTPServer):
    """Answers for the models in `folder`, each in a folder org/name, at the commit COMMIT and the branch main."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.log: list[tuple[str, str, int]] = []
        """(method, path, bytes sent) of each request."""
        self.status = 0
        """Answer everything by this."""
        self.code = ""
        """X-Error-Code of such an answer."""
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent(self, ending: str) -> int:
        """Bytes of files whose name ends so."""
        return sum(count for method, path, count in self.log if method == "GET" and path.endswith(ending))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.status:
            return self.answer(self.server.status, b"no", {"X-Error-Code": self.server.code})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.answer_json({"id": found[1], "sha": COMMIT}, found[1], found[2] or "main")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            return self.tree(found[1], found[2], found[3] or "")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(found[1], found[3])
        return self.answer(404, b"", {})

    def answer_json(self, value: Any, repo: str, revision: str) -> None:
        if not (self.server.folder / repo).is_dir():
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "refs/pr/1", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def tree(self, repo: str, revision: str, inner: str) -> None:
        top = self.server.folder / repo
        if inner and not (top / inner).is_dir():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        entries = [
            {
                "type": "directory" if path.is_dir() else "file",
                "oid": hashlib.sha1(path.name.encode()).hexdigest(),
                "size": 0 if path.is_dir() else path.stat().st_size,
                "path": path.relative_to(top).as_posix(),
            }
            for path in (
                (top / inner).rglob("*") if "recursive=true" in self.path.lower() else (top / inner).iterdir()
            )
        ]
        return self.answer_json(entries, repo, revision)

    def file(self, repo: str, name: str) -> None:
        path = self.server.folder / repo / name
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        raw = path.read_bytes()
        known = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(raw).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or len(raw) - 1) + 1
            known["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw)}"
            return self.answer(206, raw[start:stop], known)
        return self.answer(200, raw, known)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0
        if self.command == "GET":
            self.wfile.write(body)
            sent = len(body)
        self.server.log.append((self.command, urlsplit(self.path).path, sent))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "models"
    small_models.write_model(folder / "org/small", kind="safetensors", shards=2)
    small_models.write_model(folder / "org/small", kind="torch")
    config = small_models.llama_config(head_dim=64, intermediate=500, layers=2)
    small_models.write_model(folder / "org/pickled", config, kind="torch")
    (folder / "org/small/modeling.py").write_text("print()\n")
    (folder / "org/small/onnx").mkdir()
    (folder / "org/small/onnx/model.onnx").write_bytes(bytes(1000))
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def shardprep(
    hub: Hub | str, tmp_path: Path, *args: str | Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The console script with an empty home of its own, so that nothing of this machine's cache or token counts."""
    done = subprocess.run(
        [SHARDPREP, *map(str, args)],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.url if isinstance(hub, Hub) else hub,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": SECRET,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_convert_writes_what_it_writes_of_a_folder(hub: Hub, tmp_path: Path) -> None:
    shardprep(hub, tmp_path, "convert", "hf://org/small", tmp_path / "far")
    (hub.folder / "org/small/pytorch_model.bin").unlink()
    convert(hub.folder / "org/small", tmp_path / "near")
    assert contents(tmp_path / "near") == contents(tmp_path / "far")
    assert hub.sent(".safetensors") > 0
    assert hub.sent(".bin") == hub.sent(".onnx") == 0  # one kind of weights only
    assert hub.tokens == {f"Bearer {SECRET}"}


def test_pickles_are_fetched_only_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    shardprep(hub, tmp_path, "convert", "hf://org/pickled", tmp_path / "far")
    convert(hub.folder / "org/pickled", tmp_path / "near")
    assert contents(tmp_path / "near") == contents(tmp_path / "far")


@pytest.mark.parametrize("model", ["small", "pickled"])
def test_inspect_fetches_no_weights(hub: Hub, tmp_path: Path, model: str) -> None:
    done = shardprep(hub, tmp_path, "inspect", f"hf://org/{model}", "--json")
    weights = sum(path.stat().st_size for path in (hub.folder / f"org/{model}").glob("*model*.[sb]*"))
    assert json.loads(done.stdout)["model_type"] == "llama"
    assert 0 < hub.sent(".safetensors") + hub.sent(".bin") < weights / 3
    assert not list((tmp_path / "home").rglob("snapshots/*/*"))


def test_a_cached_model_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    shardprep(hub, tmp_path, "convert", "hf://org/small", tmp_path / "first")
    hub.log.clear()
    for number, (endpoint, environment) in enumerate(
        [(hub.url, {"HF_HUB_OFFLINE": "1"}), (f"http://127.0.0.1:{free_port()}", {})]
    ):
        new = tmp_path / f"again{number}"
        shardprep(endpoint, tmp_path, "convert", "hf://org/small", new, **environment)
        assert contents(new) == contents(tmp_path / "first")
        shardprep(endpoint, tmp_path, "inspect", "hf://org/small@main", **environment)
        shardprep(endpoint, tmp_path, "inspect", f"hf://org/small@{COMMIT}", **environment)
    assert not hub.log


def free_port() -> int:
    """One where nobody listens."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def test_a_manifest_tells_the_model_and_its_commit(hub: Hub, tmp_path: Path) -> None:
    shardprep(hub, tmp_path, "split", "hf://org/small@main", tmp_path / "new", "-tp", "2")
    told = json.loads((tmp_path / "new/shardprep.json").read_text())["model"]["source"]
    assert (told["uri"], told["revision"]) == ("hf://org/small", COMMIT)


def test_one_file_is_a_source(hub: Hub, tmp_path: Path) -> None:
    shardprep(hub, tmp_path, "inspect", "hf://org/small/pytorch_model.bin")
    shardprep(hub, tmp_path, "convert", "hf://org/small@refs/pr/1/pytorch_model.bin", tmp_path / "new")
    assert list(contents(tmp_path / "new")) == ["model.safetensors"]
    done = shardprep(hub, tmp_path, "inspect", "hf://org/small/other.bin", code=2)
    assert "no such file in the repository" in done.stderr


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://org/none", "no such model, or a private one"),
        ("hf://org/small@none", "the model has no such revision"),
        ("hf://org/small/none", "no such file or folder in the repository"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_what_the_hub_does_not_have_is_said_in_words(
    hub: Hub, tmp_path: Path, command: str, uri: str, words: str
) -> None:
    args = [command, uri] if command == "inspect" else [command, uri, str(tmp_path / "new")]
    assert words in shardprep(hub, tmp_path, *args, code=1).stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "a gated model: ask for access"),
        (401, "RepoNotFound", "no such model, or a private one"),
        (403, "", "the hub does not let us (status 403)"),
        (418, "", "the hub answered with status 418"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    hub: Hub, tmp_path: Path, status: int, code: str, words: str
) -> None:
    hub.status, hub.code = status, code
    assert words in shardprep(hub, tmp_path, "inspect", "hf://org/small", code=1).stderr


def test_what_is_not_cached_cannot_be_had_without_a_network(hub: Hub, tmp_path: Path) -> None:
    done = shardprep(hub, tmp_path, "inspect", "hf://org/small", code=1, HF_HUB_OFFLINE="1")
    assert "not in the cache (HF_HOME)" in done.stderr
    done = shardprep(f"http://127.0.0.1:{free_port()}", tmp_path, "inspect", "hf://org/small", code=1)
    assert "cannot be reached" in done.stderr


def test_a_missing_client_is_named_with_what_installs_it(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('none here')\n")
    done = shardprep("http://127.0.0.1:1", tmp_path, "inspect", "hf://a/b", code=2, PYTHONPATH=str(tmp_path))
    assert "pip install 'shardprep[hub]'" in done.stderr


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("hf://org/name", Named("org/name", None, "", None)),
        ("hf://org/name/", Named("org/name", None, "", None)),
        ("hf://org/name@v1.0", Named("org/name", "v1.0", "", None)),
        ("hf://org/name@refs/pr/7", Named("org/name", "refs/pr/7", "", None)),
        ("hf://org/name@refs%2Fpr%2F7/x.bin", Named("org/name", "refs/pr/7", "", "x.bin")),
        ("hf://org/name/original/x.00.pth", Named("org/name", None, "original", "x.00.pth")),
        ("hf://org/name@main/sub/folder", Named("org/name", "main", "sub/folder", None)),
    ],
)
def test_a_uri_names_a_model_a_revision_and_a_place_in_it(uri: str, named: Named) -> None:
    assert parse_uri(uri) == named


@pytest.mark.parametrize(
    "uri",
    [
        "hf://",
        "hf://name",
        "hf://org/name@",
        "hf://org/name/../x",
        "hf://org/name//x",
        "hf://o g/n",
        "hf:///n",
    ],
)
def test_what_is_no_uri_of_a_model_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="expected hf://org/name"):
        parse_uri(uri)
