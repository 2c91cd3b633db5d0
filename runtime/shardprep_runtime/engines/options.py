"""Find the shard set that an engine's model folder means, and read how its user wants it loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..errors import InputError, ManifestError, quote
from ..format import manifest as manifests
from ..format.manifest import Manifest
from ..format.read_manifest import read_named
from ..shard import options as words
from ..shard.shard_set import ShardSet
from ..stores.open import is_uri

CONFIG: Final = "config.json"


@dataclass(frozen=True, slots=True)
class Options:
    """What an engine's options may say, in vLLM `--model-loader-extra-config`.

    They are the words of shard/options.py, which `shard_set` holds, and these.
    """

    shard_set: ShardSet = ShardSet("")  # noqa: RUF009 - frozen, and has no state
    """Where the parts are, and how they are read. An empty source means the model's folder."""
    drafts: bool = True
    """Whether an ordinary checkpoint may be loaded beside the shard set: the draft model of speculative decoding."""


def read_options(given: Mapping[str, Any]) -> Options:
    """Read options from the JSON that vLLM was given. Raises InputError for unknown words and values of other types."""
    return words.read_options(Options, given, what="--model-loader-extra-config")


def find_shard_set(
    folder: Path, options: Options, *, is_draft: bool = False
) -> tuple[ShardSet, Manifest] | None:
    """Find the shard set that a model's folder means.

    The manifest in the folder says which set it is, wherever the parts are. Without one, the `uri` of the options says
    it, unless this is a draft model. config.json in the folder must be that set's.

    Args:
        folder: The model's folder.
        options: What the user said.
        is_draft: Whether this is the draft model of speculative decoding: it is not what digest and `uri` speak of.

    Returns:
        The set, pinned to its manifest, and the manifest; None for an ordinary checkpoint.

    Raises:
        ManifestError: For a manifest or a config.json that does not fit.
        InputError: For a `uri` that is not one.
        StoreError: Where the store cannot be read.
    """
    wanted = options.shard_set
    if (folder / manifests.FILE_NAME).is_file():
        manifest, digest = read_named(folder, digest=None if is_draft else wanted.digest)
        _check_config(folder, manifest)
        whole = all((folder / part.path).exists() for part in manifest.parts)
        source = wanted.source if wanted.source and not whole and not is_draft else str(folder)
        return replace(wanted, source=source, digest=digest), manifest
    if not wanted.source or is_draft:
        return None
    if not is_uri(wanted.source):
        raise InputError(f"uri is {quote(wanted.source)}; expected s3://bucket/prefix, gs:// or az://")
    pinned, manifest = wanted.pinned()
    _check_config(folder, manifest)
    return pinned, manifest


def _check_config(folder: Path, manifest: Manifest) -> None:
    """Raises ManifestError unless config.json in the folder, which vLLM has built the model of, is the shard set's."""
    expected = next((side for side in manifest.side_files if side.path == CONFIG), None)
    if expected is None:
        raise ManifestError(
            f"the shard set has no {CONFIG}, so nothing says that its weights are those of {quote(folder)}"
        )
    try:
        found = manifests.digest_of((folder / CONFIG).read_bytes())
    except OSError as error:
        raise ManifestError(f"{quote(folder / CONFIG)}: cannot be read: {error.strerror}") from None
    if found != expected.digest:
        raise ManifestError(
            f"{quote(folder / CONFIG)}: {found}, but the shard set's is {expected.digest}: it is another "
            f"model's, or was edited. Fetch it with `shardprep pull --no-weights`, and change values with vLLM's --hf-overrides"
        )
