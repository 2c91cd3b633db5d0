"""Open the place that a user names as a source: a path, a URI of a store, or a model of the Hugging Face hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from shardprep_runtime.errors import DeniedError, FormatError, UnsupportedError, quote
from shardprep_runtime.shard.revisions import MANIFESTS
from shardprep_runtime.stores.open import is_uri, open_store
from shardprep_runtime.stores.store import Access

from ..files import LocalFolder
from .names import is_weights
from .source import Source
from .store_files import StoreFolder, is_plain

HUB: Final = "hf://"


def open_source(place: Path | str, access: Access | None = None, *, data: bool = True) -> Source:
    """Open the checkpoint at a path or URI.

    Args:
        place: A path, `s3://bucket/prefix` (`gs://`, `az://`, `file://`) or `hf://org/name@revision`.
        access: Endpoint, profile and the like of a store.
        data: Whether tensors will be read; False: only what describes them, so that `hf://` downloads no weights.

    Raises:
        FormatError: Where nothing lies at the place.
        StoreError: Where a store does not answer, or denies the answer.
    """
    if isinstance(place, str) and place.startswith(HUB):
        from .hub import open_hub

        return open_hub(place, data=data)
    if isinstance(place, str) and is_uri(place):
        return _in_store(place, access)
    return _on_disk(Path(place))


def _on_disk(path: Path) -> Source:
    one = path.is_file()
    if not one and not path.is_dir():
        raise FormatError(f"{quote(path)}: no such file or folder")
    uri = path.resolve().name  # its last word alone: a manifest is public, and the user's folders are private
    return Source(LocalFolder(path.parent), path.name, uri) if one else Source(LocalFolder(path), None, uri)


def _in_store(uri: str, access: Access | None) -> Source:
    scheme, _, rest = uri.partition("://")
    uri = f"{scheme}://{rest.rstrip('/')}"
    parent, _, name = uri.rpartition("/")
    # ask for a weight file by its name first: listing it together with its neighbours may take many requests
    if is_weights(name) and (found := _object(parent, name, uri, access)):
        return found
    store = open_store(uri, access)
    try:
        objects, deeper, shard_sets = {}, "", False
        for stat in store.list(""):
            if is_plain(stat.key):
                objects[stat.key] = stat
            elif "/" in stat.key:
                deeper, shard_sets = stat.key, shard_sets or stat.key.startswith(MANIFESTS)
        if shard_sets and not any(map(is_weights, objects)):
            raise UnsupportedError(
                f"{quote(uri)}: a store of shard sets; `shardprep revisions` lists them, `shardprep pull` fetches one"
            )
        if objects:
            return Source(StoreFolder(store, objects), None, _told(uri))
    except BaseException:
        store.close()
        raise
    store.close()
    if not is_weights(name) and (found := _object(parent, name, uri, access)):
        return found
    hint = f", only further below, such as {quote(deeper)}" if deeper else ""
    raise FormatError(f"{quote(uri)}: no objects under this prefix{hint}")


def _object(parent: str, name: str, uri: str, access: Access | None) -> Source | None:
    """Open the one object `name`, with the config.json beside it; None where there is no such object."""
    if not parent.partition("://")[2]:
        return None  # a bucket alone
    store = open_store(parent, access)
    try:
        found = store.head(name)
        if found is not None:
            objects = {name: found}
            with suppress(DeniedError):  # S3 answers 403, and not 404, to a user who may not list the bucket
                config = store.head("config.json")
                objects |= {config.key: config} if config else {}
            return Source(StoreFolder(store, objects), name, _told(uri))
    except BaseException:
        store.close()
        raise
    store.close()
    return None


def _told(uri: str) -> str:
    """The URI as a manifest records it: only the last word of a folder on this machine."""
    return uri.rpartition("/")[2] if uri.startswith("file://") else uri
