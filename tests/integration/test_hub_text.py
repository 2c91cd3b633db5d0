"""hf://datasets/org/name as calibration text: the real clients against a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from shardprep.quantize.calibration import read_calibration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("transformers, too"),
    pytest.mark.skipif(
        not all(map(find_spec, ("datasets", "transformers"))), reason="needs datasets and transformers"
    ),
]

COMMIT = "c0ffee" * 6 + "c0de"
LLAMA = Path(__file__).parent.parent / "data" / "tiny-llama"
SECRET = "hf_ThisMustNeverBeSeen"
READ = """
import json, sys
from importlib.util import find_spec
from pathlib import Path
from shardprep.quantize.calibration import read_calibration
from shardprep_runtime.errors import ShardprepError
for uri in sys.argv[2:]:
    try:
        found = read_calibration(uri, Path(sys.argv[1]), samples=8, length=128, seed=0)
        print(json.dumps([found.source, found.digest]))
    except ShardprepError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(ThreadingHTTPServer):
    """Answers for the data sets in `folder`, each in a folder org/name, at the commit COMMIT and the branch main."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.status = 0
        """Answer everything by this."""
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if self.server.status:
            return self.answer(self.server.status, b"no", {})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.answer_json({"id": found[1], "sha": COMMIT}, found[1], found[2] or "main")
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            top = self.server.folder / found[1]
            inner = top / (found[3] or "")
            if top.is_dir() and not inner.is_dir():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            entries = [
                {
                    "type": "directory" if each.is_dir() else "file",
                    "oid": hashlib.sha1(each.name.encode()).hexdigest(),
                    "size": 0 if each.is_dir() else each.stat().st_size,
                    "path": each.relative_to(top).as_posix(),
                }
                for each in inner.iterdir()
            ]
            return self.answer_json(entries, found[1], found[2])
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(self.server.folder / found[1] / found[3])
        return self.answer(404, b"", {})

    def answer_json(self, value: Any, repo: str, revision: str) -> None:
        if not (self.server.folder / repo).is_dir():
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, path: Path) -> None:
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        raw = path.read_bytes()
        known = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(raw).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(len(raw), int(wanted[2] or len(raw) - 1) + 1)
            known["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw)}"
            return self.answer(206, raw[start:stop], known)
        return self.answer(200, raw, known)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "datasets"
    text = (LLAMA / "heldout.txt").read_text()
    for name, part in (("train", text[:20000]), ("test", text[20000:])):
        path = folder / "org/talk/data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"text": part[at : at + 500]}) + "\n" for at in range(0, len(part), 500))
        )
    (folder / "org/bare").mkdir()
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def read(url: str, tmp_path: Path, *uris: str, **environment: str) -> list[tuple[str, str]]:
    """(source, digest) or (kind of error, message) of each, read in a process without this machine's cache or token."""
    done = subprocess.run(
        [sys.executable, "-c", READ, LLAMA, *uris],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": SECRET,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_a_split_is_read_as_its_file_would_be_and_nothing_else_is_fetched(hub: Hub, tmp_path: Path) -> None:
    train, test = read(
        hub.url, tmp_path, "hf://datasets/org/talk", "hf://datasets/org/talk@main:default/test"
    )
    files = hub.folder / "org/talk/data"
    for found, split, config in ((train, "train", ""), (test, "test", ":default")):
        assert found == (
            f"hf://datasets/org/talk@{COMMIT}{config}/{split}",
            read_calibration(files / f"{split}.jsonl", LLAMA, samples=8, length=128, seed=0).digest,
        )
    assert not any("/resolve/" in path and COMMIT not in path for path in hub.asked)


def test_what_is_not_there_is_said_in_our_words(hub: Hub, tmp_path: Path) -> None:
    talk = "hf://datasets/org/talk"
    uris = (
        f"{talk}/nosplit",
        f"{talk}:noconfig",
        f"{talk}@v9",
        "hf://datasets/org/no",
        "hf://datasets/org/bare",
    )
    split, config, revision, missing, bare = read(hub.url, tmp_path, *uris)
    assert split[0] == config[0] == "InputError"
    assert "nosplit" in split[1]
    assert "'train', 'test'" in split[1]
    assert "noconfig" in config[1]
    assert revision == ("MissingError", f"{talk}@v9: the data set has no such revision")
    assert missing[0] == "MissingError"
    assert "no such data set, or a private one" in missing[1]
    assert bare == (
        "InputError",
        "hf://datasets/org/bare/train: no files in it that can be read as a data set",
    )


def test_a_hub_that_refuses_or_is_not_there_is_said_in_our_words(hub: Hub, tmp_path: Path) -> None:
    hub.status = 403
    ((kind, message),) = read(hub.url, tmp_path, "hf://datasets/org/talk")
    assert (kind, "status 403" in message) == ("DeniedError", True)
    ((kind, message),) = read("http://127.0.0.1:9", tmp_path, "hf://datasets/org/talk")
    assert (kind, "cannot be reached" in message) == ("StoreError", True)
