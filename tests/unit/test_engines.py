"""An engine's folder means one shard set or none: whose weights are loaded is never guessed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shardprep_runtime.engines.options import Options, find_shard_set, read_options
from shardprep_runtime.errors import InputError, ManifestError, MissingError
from shardprep_runtime.format.manifest import FILE_NAME, digest_of
from shardprep_runtime.shard.shard_set import ShardSet
from shardprep_runtime.stores.store import Access
from stores import make_store

SHARDS = Path(__file__).parents[1] / "data/v1/llama-tied-kv2-tp4"
OTHER = Path(__file__).parents[1] / "data/v1/mixtral-each-tp2"
DIGEST = digest_of((SHARDS / FILE_NAME).read_bytes())


@pytest.fixture
def side_files(tmp_path: Path) -> Path:
    """A folder with the side files of the shard set, as an engine is given one."""
    folder = tmp_path / "side"
    folder.mkdir()
    shutil.copy(SHARDS / "config.json", folder)
    return folder


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"file://{make_store(SHARDS, tmp_path / 'store')}"


def test_the_folder_of_a_shard_set_means_that() -> None:
    found = find_shard_set(SHARDS, Options())
    assert found is not None
    assert found[0] == ShardSet(str(SHARDS), digest=DIGEST)
    assert find_shard_set(SHARDS, Options(ShardSet("s3://elsewhere/x"))) == found  # all of it is here


def test_a_manifest_alone_pins_what_the_store_has(side_files: Path, uri: str) -> None:
    shutil.copy(SHARDS / FILE_NAME, side_files)
    found = find_shard_set(side_files, Options(ShardSet(uri)))
    assert found is not None
    assert (found[0].source, found[0].digest) == (uri, DIGEST)


def test_side_files_alone_and_a_uri_are_enough(side_files: Path, uri: str) -> None:
    found = find_shard_set(side_files, Options(ShardSet(uri)))
    assert found is not None
    assert (found[0].source, found[0].digest) == (uri, DIGEST)
    with pytest.raises(ManifestError, match="its digest is"):
        find_shard_set(side_files, Options(ShardSet(uri, digest="sha256:" + "0" * 64)))
    with pytest.raises(MissingError, match="no revision other"):
        find_shard_set(side_files, Options(ShardSet(uri, revision="other")))


@pytest.mark.parametrize("manifest", [True, False])
def test_weights_of_another_model_than_the_folder_says_are_refused(
    side_files: Path, uri: str, manifest: bool
) -> None:
    text = (side_files / "config.json").read_text()
    (side_files / "config.json").write_text(text.replace("{", "{ ", 1))
    if manifest:
        shutil.copy(SHARDS / FILE_NAME, side_files)
    with pytest.raises(ManifestError, match=r"but the shard set's is sha256:.*--hf-overrides"):
        find_shard_set(side_files, Options(ShardSet(uri)))
    (side_files / "config.json").unlink()
    with pytest.raises(ManifestError, match=r"config\.json: cannot be read"):
        find_shard_set(side_files, Options(ShardSet(uri)))


def test_a_draft_model_is_no_shard_set_unless_its_own_folder_is_one(side_files: Path, uri: str) -> None:
    assert find_shard_set(side_files, Options()) is None
    assert find_shard_set(side_files, Options(ShardSet(uri)), is_draft=True) is None
    found = find_shard_set(SHARDS, Options(ShardSet(uri, digest="sha256:" + "0" * 64)), is_draft=True)
    assert found is not None and found[0].source == str(SHARDS)  # whatever was pinned is the main model's


def test_a_manifest_other_than_the_pinned_one_is_refused() -> None:
    with pytest.raises(ManifestError, match="digest"):
        find_shard_set(SHARDS, Options(ShardSet("", digest="sha256:" + "0" * 64)))


def test_a_path_is_no_uri(side_files: Path) -> None:
    with pytest.raises(InputError, match="expected s3://"):
        find_shard_set(side_files, Options(ShardSet("/somewhere")))


def test_options_are_those_of_load() -> None:
    assert read_options({}) == Options()
    given: dict[str, Any] = {
        "uri": "s3://b/p",
        "verify": "headers",
        "cache": None,
        "workers": 4,
        "anonymous": True,
    }
    assert read_options(given) == Options(
        ShardSet("s3://b/p", verify="headers", cache=None, connections=4, access=Access(anonymous=True))
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "s3://b/p"}, "url is not known; shardprep takes source, uri, revision"),
        ({"verify": "some"}, "verify is some; use blocks, headers or off"),
        ({"workers": "4"}, "workers is 4, expected int"),
        ({"workers": True}, "workers is True, expected int"),
        ({"uri": 3}, "uri is 3, expected str"),
        ({"anonymous": 1}, "anonymous is 1, expected bool"),
    ],
)
def test_options_that_are_not_known_or_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_options(given)
