"""The names in a store of shard sets, and reading a manifest from one."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardprep_runtime.errors import InputError, ManifestError, MissingError
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.manifest import digest_of
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.shard import revisions as remote
from shardprep_runtime.stores.folder import FolderStore

SHARDS = Path(__file__).parents[1] / "data/v1/llama-tied-kv2-tp4"
RAW = (SHARDS / "shardprep.json").read_bytes()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """A store that holds one revision, `main`."""
    found = FolderStore(tmp_path / "store")
    found.put("manifests/main.json", RAW)
    return found


def test_a_blob_is_named_by_the_hex_of_its_digest() -> None:
    digest = digest_of(b"x")
    assert remote.blob_key(digest) == "blobs/" + digest.removeprefix("sha256:")
    assert remote.is_blob_key(remote.blob_key(digest))


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "A" * 64, "md5:" + "a" * 64, "a" * 64])
def test_what_is_no_digest_names_no_blob(digest: str) -> None:
    with pytest.raises(ManifestError, match="is not a digest"):
        remote.blob_key(digest)


@pytest.mark.parametrize("key", ["blobs/x", "blobs/" + "a" * 63, "blobs/" + "a" * 65, "x/" + "a" * 64])
def test_other_keys_are_no_blobs(key: str) -> None:
    assert not remote.is_blob_key(key)


@pytest.mark.parametrize("revision", ["main", "v1.2", "a", "_x", "-x", "A" * 128, "2026-01-01_a.b"])
def test_the_key_of_a_manifest_tells_its_revision(revision: str) -> None:
    assert remote.manifest_key(revision) == f"manifests/{revision}.json"
    assert remote.revision_of(remote.manifest_key(revision)) == revision


@pytest.mark.parametrize(
    "revision", ["", ".", "..", ".x", "a/b", "../x", "a b", "ä", "a\n", "A" * 129, "a\0"]
)
def test_what_is_no_name_of_a_revision_is_refused(revision: str) -> None:
    with pytest.raises(InputError, match="is not a revision's name"):
        remote.manifest_key(revision)


@pytest.mark.parametrize("key", ["manifests/.x.json", "manifests/a/b.json", "manifests/x", "blobs/x.json"])
def test_foreign_keys_are_no_revisions(key: str) -> None:
    assert remote.revision_of(key) is None


def test_a_manifest_is_read_as_its_exact_bytes(store: FolderStore) -> None:
    raw, manifest = remote.read_revision(store, "main")
    assert raw == RAW
    assert manifest == read_manifest(SHARDS)
    assert remote.read_revision(store, "main", digest_of(RAW))[0] == RAW


def test_a_manifest_with_another_digest_is_refused(store: FolderStore) -> None:
    with pytest.raises(ManifestError, match="do not load it"):
        remote.read_revision(store, "main", digest_of(b"another"))


def test_a_missing_revision_is_an_error_that_names_those_there_are(store: FolderStore) -> None:
    with pytest.raises(MissingError, match=r"no revision mian; there are main$"):
        remote.read_revision(store, "mian")
    for i in range(11):
        store.put(f"manifests/v{i:02}.json", RAW)
    with pytest.raises(MissingError, match=r"there are main, v00, .*v08 and 2 more$"):
        remote.read_revision(store, "mian")


def test_an_empty_store_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="nothing has been pushed there"):
        remote.read_revision(FolderStore(tmp_path / "empty"), "main")
    with pytest.raises(MissingError, match="cannot be listed"):
        remote.read_revision(FolderStore(tmp_path / "none"), "main")


def test_a_manifest_that_is_too_large_is_refused_before_it_is_read(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "MAX_BYTES", len(RAW) - 1)
    monkeypatch.setattr(store, "get", None)
    with pytest.raises(ManifestError, match=f"{len(RAW)} bytes, more than"):
        remote.read_revision(store, "main")


def test_a_manifest_that_is_damaged_is_an_error_that_names_its_object(store: FolderStore) -> None:
    store.put("manifests/bad.json", RAW[:-20])
    with pytest.raises(ManifestError, match=r"manifests/bad\.json"):
        remote.read_revision(store, "bad")


def test_revisions_are_listed_by_name_and_other_objects_are_not(store: FolderStore) -> None:
    for key in ("manifests/a.json", "manifests/.hidden.json", "manifests/a/b.json", "manifests/notes.txt"):
        store.put(key, RAW)
    found = remote.list_revisions(store)
    assert list(found) == ["a", "main"]
    assert all(stat.size == len(RAW) for stat in found.values())
