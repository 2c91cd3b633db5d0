"""Open the store that a URI names.

Importing this module imports no client; opening `s3://` imports botocore, `gs://` and `az://` import obstore.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ..errors import InputError, quote
from .folder import FolderStore
from .store import Access, Store

SCHEMES: Final = ("file", "s3", "gs", "az")
"""Schemes of the URIs that name a store. `hf://` is a source only, and is read through huggingface_hub."""


def is_uri(source: object) -> bool:
    """Whether `source` is written as a URI rather than as a path."""
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def split_uri(uri: str) -> tuple[str, str, str]:
    """Take apart the URI of a store.

    Returns:
        Its scheme; the bucket, empty for a folder; and the prefix without slashes around it.

    Raises:
        InputError: For what is not the URI of a store.
    """
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise InputError(f"{quote(uri)}: no store is reached by {quote(scheme)}://; known are {known}")
    if scheme == "file":
        return scheme, "", rest
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{1,254}", bucket):
        raise InputError(
            f"{quote(uri)}: {quote(bucket)} is not the name of a bucket; write {scheme}://bucket/prefix"
        )
    if any(word in ("", ".", "..") for word in prefix.split("/")) and prefix:
        raise InputError(f"{quote(uri)}: the prefix {quote(prefix)} has an empty or dotted word")
    return scheme, bucket, prefix


def open_store(uri: str | Path, access: Access | None = None) -> Store:
    """The store at `s3://bucket/prefix`, `gs://`, `az://`, `file:///folder`, or in a folder given as a path.

    Makes no request.

    Args:
        access: How it is reached; None: as the user's environment says.

    Raises:
        InputError: For a URI that does not name a store, and for a client that is not installed.
    """
    if not is_uri(uri):
        return FolderStore(Path(uri))
    scheme, bucket, prefix = split_uri(str(uri))
    if scheme == "file":
        return FolderStore(Path(prefix))
    access = access or Access()
    if scheme == "s3":
        from .s3 import S3Store

        return S3Store(bucket, prefix, access)
    from .gs_az import ObstoreStore

    return ObstoreStore(scheme, bucket, prefix, access)
