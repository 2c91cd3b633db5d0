"""Find the shard set that an engine's model folder means, and read what its user says of how it is to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from ..errors import InputError, ManifestError, quote
from ..format import manifest as manifests
from ..format.manifest import Manifest
from ..shard.revisions import DEFAULT_REVISION, read_manifest
from ..stores.open import is_uri, open_store
from ..stores.store import Access

CONFIG: Final = "config.json"


@dataclass(frozen=True, slots=True)
class Options:
    """What an engine's options may say (vLLM's `--model-loader-extra-config`); the words are those of `shardprep_runtime.load`."""

    uri: str | None = None
    """Of the store that has the parts; None: they are in the model's folder."""
    revision: str = DEFAULT_REVISION
    manifest_digest: str | None = None
    verify: str = "blocks"
    cache: str | None = "host"
    workers: int | None = None
    processes: int = 1
    endpoint_url: str | None = None
    profile: str | None = None
    region: str | None = None
    anonymous: bool = False
    drafts: bool = True
    """Whether an ordinary checkpoint may be loaded beside the shard set: the draft model of speculative decoding."""

    @property
    def access(self) -> Access:
        return Access(
            endpoint_url=self.endpoint_url,
            profile=self.profile,
            region=self.region,
            anonymous=self.anonymous,
        )


def read_options(given: Mapping[str, Any]) -> Options:
    """Options from the JSON that vLLM was given. Raises InputError for what is not known, or of another type."""
    known = {field.name: field for field in fields(Options)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"--model-loader-extra-config: {quote(unknown[0])} is not known; shardprep takes {', '.join(known)}"
        )
    kinds = {
        "str": (str,), "str | None": (str, type(None)), "int": (int,), "int | None": (int, type(None)),
        "bool": (bool,),
    }  # fmt: skip
    for name, value in given.items():
        kind = str(known[name].type)
        if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise InputError(
                f"--model-loader-extra-config: {name} is {quote(value)}, expected {kind.replace('None', 'null')}"
            )
    options = Options(**given)
    if options.verify not in ("blocks", "headers", "off"):
        raise InputError(
            f"--model-loader-extra-config: verify is {quote(options.verify)}; use blocks, headers or off"
        )
    return options


def find_shard_set(
    folder: Path, options: Options, *, is_draft: bool = False
) -> tuple[str | Path, Manifest, str] | None:
    """(where its parts are, manifest, its digest) of the shard set that a model's folder means; None: no shard set.

    The manifest in the folder says which it is, wherever the parts are; without one there `options.uri` does, unless
    this is a draft model, and config.json in the folder must be that shard set's. Raises ManifestError or InputError.
    """
    if (folder / manifests.FILE_NAME).is_file():
        pinned = None if is_draft else options.manifest_digest
        manifest, digest = manifests.read_named(folder, digest=pinned)
        _check_config(folder, manifest)
        store = None if is_draft else options.uri
        whole = all((folder / part.path).exists() for part in manifest.parts)
        return (store if store is not None and not whole else folder), manifest, digest
    if options.uri is None or is_draft:
        return None
    if not is_uri(options.uri):
        raise InputError(f"uri is {quote(options.uri)}; expected s3://bucket/prefix, gs:// or az://")
    with open_store(options.uri, options.access) as opened:
        raw, manifest = read_manifest(opened, options.revision, options.manifest_digest)
    _check_config(folder, manifest)
    return options.uri, manifest, manifests.digest_of(raw)


def _check_config(folder: Path, manifest: Manifest) -> None:
    """Raises ManifestError where the model that vLLM has built is not the shard set's, by its config.json."""
    expected = next((side for side in manifest.side_files if side.path == CONFIG), None)
    if expected is None:
        raise ManifestError(
            f"the shard set has no {CONFIG}: nothing says that its weights are those of {quote(folder)}"
        )
    try:
        found = manifests.digest_of((folder / CONFIG).read_bytes())
    except OSError as error:
        raise ManifestError(f"{quote(folder / CONFIG)}: cannot be read: {error.strerror}") from None
    if found != expected.digest:
        raise ManifestError(
            f"{quote(folder / CONFIG)}: {found}, but the shard set's is {expected.digest}: another model's, or an "
            f"edited one. Fetch it with `shardprep pull --no-weights`, and change values with vLLM's --hf-overrides"
        )
