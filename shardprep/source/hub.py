"""Open a model of the Hugging Face hub: through huggingface_hub and its cache, one kind of weights only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from shardprep_runtime.errors import (
    DeniedError,
    FormatError,
    InputError,
    MissingError,
    SourceError,
    StoreError,
    quote,
)
from shardprep_runtime.stores.store import Sink, Stat

from ..files import LocalFolder
from .names import INDEX, choose_weights, is_side_file, is_weights
from .source import Source
from .store_files import StoreFolder, is_plain

_URI = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)


@dataclass(frozen=True, slots=True)
class Named:
    """What hf://org/name[@revision][/folder/file] names."""

    repo: str
    revision: str | None
    folder: str
    """The folder within the repository; empty for its top."""
    file: str | None
    """The one weight file that the URI names, without its folder; None where it names a folder."""

    @property
    def uri(self) -> str:
        """The URI without the revision, which a manifest states in a field of its own."""
        return "/".join(word for word in (f"hf://{self.repo}", self.folder, self.file) if word)


def parse_uri(uri: str) -> Named:
    """Take hf://org/name[@revision][/folder/file] apart. Raises InputError."""
    found = _URI.fullmatch(uri)
    path = (found["path"] or "").removesuffix("/") if found else ""
    if not found or (path and any(word in ("", ".", "..") for word in path.split("/"))):
        raise InputError(
            f"{quote(uri)}: expected hf://org/name, hf://org/name@revision or a weight file in it"
        )
    folder, _, name = path.rpartition("/")
    if path and not is_weights(name):
        folder, name = path, ""
    return Named(
        found["repo"], unquote(found["revision"]) if found["revision"] else None, folder, name or None
    )


def open_hub(uri: str, *, data: bool) -> Source:
    """Open a model of the hub. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count as they do in huggingface_hub.

    Args:
        uri: `hf://org/name[@revision][/folder/file]`.
        data: Whether tensors will be read. True downloads the files into the cache of huggingface_hub (HF_HOME);
            False reads only what describes the tensors, by ranges.

    Raises:
        InputError: For a URI that does not name a model, or where huggingface_hub is not installed.
        MissingError: Where the hub has no such model, revision or file.
        DeniedError: Where the token does not open it.
        StoreError: For any other answer of the hub.
    """
    named = parse_uri(uri)
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise InputError(f"{quote(uri)}: needs huggingface_hub: pip install 'shardprep[hub]'") from None
    with explained(uri):
        if constants.HF_HUB_OFFLINE:
            return _from_cache(hub, named)
        api = hub.HfApi(library_name="shardprep")
        try:
            commit = api.model_info(named.repo, revision=named.revision).sha
        except errors.HfHubHTTPError:
            raise
        except (errors.HTTPError, ConnectionError):
            return _from_cache(hub, named)  # the files that an earlier run fetched may be enough
        files = _files(api, named, commit)
        if not data:
            ranges = _Ranges(hub, named, commit)
            return Source(StoreFolder(ranges, files), named.file, named.uri, commit)
        inner = f"{named.folder}/" if named.folder else ""
        path = hub.snapshot_download(
            named.repo,
            revision=named.revision,
            allow_patterns=[escape(inner + name) for name in files],
            library_name="shardprep",
        )
        return _snapshot(Path(path), named)


def _files(api: Any, named: Named, commit: str) -> dict[str, Stat]:
    """The files that make up the checkpoint: one kind of weights, and what may travel with them."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(named.repo, named.folder or None, revision=commit)
    there = {
        name: Stat(name, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, 0.0)
        for entry in tree
        if isinstance(entry, RepoFile)
        for name in [entry.path.rpartition("/")[2]]
        if is_plain(name)
    }
    _, weights, _ = choose_weights(sorted(there))
    if named.file is not None:
        weights = [named.file]
        if named.file not in there:
            raise FormatError(f"{quote(named.uri)}: no such file in the repository")
    return {
        name: stat
        for name, stat in there.items()
        if name in weights or name.endswith(INDEX) or is_side_file(name, include_code=True)
    }


def _from_cache(hub: Any, named: Named) -> Source:
    # ask for config.json alone: a snapshot that lacks the other kind of weights is whole for our purpose
    path = hub.snapshot_download(
        named.repo, revision=named.revision, allow_patterns=["config.json"], local_files_only=True
    )
    return _snapshot(Path(path), named)


def _snapshot(path: Path, named: Named) -> Source:
    """A snapshot in the cache, whose folder is named by its commit."""
    folder = path / named.folder
    if not folder.is_dir():
        raise FormatError(f"{quote(named.uri)}: no such folder in the repository")
    return Source(LocalFolder(folder), named.file, named.uri, path.name)


class _Ranges:
    """Reads ranges of the files of one commit. A commit never changes, so there is nothing to compare afterwards."""

    def __init__(self, hub: Any, named: Named, commit: str) -> None:
        self.hub, self.named, self.commit = hub, named, commit
        self.uri = "/".join(word for word in (f"hf://{named.repo}", named.folder) if word)

    def get(self, key: str, start: int, sink: Sink, *, version: str | None = None) -> str:
        """Bring a range into `sink`, as `Store.get` does.

        Args:
            key: Path of the file in the repository.
            start: First byte; the last is where the sink is full (exclusive).
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        count = sink.left
        if not count:
            return self.commit
        where = f"{self.uri}/{key}"
        with explained(where):
            url = self.hub.hf_hub_url(
                self.named.repo, key, subfolder=self.named.folder or None, revision=self.commit
            )
            headers = {
                **build_hf_headers(library_name="shardprep"),
                "Range": f"bytes={start}-{start + count - 1}",
            }
            headers["Accept-Encoding"] = "identity"
            answer = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(answer)
            body = memoryview(answer.content)
        if len(body) != count or answer.status_code != 206:
            raise SourceError(
                f"{quote(where)}: {count} bytes from {start} were asked for, the hub sent {len(body)} with status "
                f"{answer.status_code}; run again"
            )
        while body:
            room = sink.room()[: len(body)]
            room[:] = body[: len(room)]
            sink.landed(len(room))
            body = body[len(room) :]
        return self.commit

    def close(self) -> None:
        pass


@contextmanager
def explained(uri: str, what: str = "model") -> Iterator[None]:
    """Say in our words what the hub refuses. Nothing of its own message is repeated: it may hold a signed URL.

    Args:
        uri: What was asked for.
        what: Its kind: a model or a data set.

    Raises:
        InputError, MissingError, DeniedError, StoreError: For what huggingface_hub raises within; it must be installed.
    """
    from huggingface_hub import errors

    where = quote(uri)
    try:
        yield
    except errors.HFValidationError:
        raise InputError(f"{where}: not a name of a {what}; write hf://org/name") from None
    except errors.GatedRepoError:
        raise DeniedError(
            f"{where}: a gated {what}: ask for access on its page at the hub, and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise MissingError(
            f"{where}: no such {what}, or a private one that HF_TOKEN does not open (`hf auth login`)",
            missing="repository",
        ) from None
    except errors.RevisionNotFoundError:
        raise MissingError(f"{where}: the {what} has no such revision", missing="revision") from None
    except errors.LocalEntryNotFoundError:
        raise MissingError(
            f"{where}: not in the cache (HF_HOME), and the hub is not asked (HF_HUB_OFFLINE) or cannot be reached",
            missing="repository",
        ) from None
    except errors.EntryNotFoundError:
        raise MissingError(f"{where}: no such file or folder in the repository") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise DeniedError(
                f"{where}: the hub does not let us (status {status}); check HF_TOKEN", status=status
            ) from None
        raise StoreError(
            f"{where}: the hub answered with status {status}; try again later", status=status
        ) from None
    except (errors.HTTPError, ConnectionError, errors.FileMetadataError, errors.XetDownloadError):
        raise StoreError(f"{where}: the hub cannot be reached; check the network and HF_ENDPOINT") from None
