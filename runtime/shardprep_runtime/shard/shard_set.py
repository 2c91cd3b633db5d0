"""Say once where a shard set is and how it is read: the value that every request for weights begins with.

    models = open_set("s3://models/llama-70b", digest="sha256:...")
    with models.load(Place(rank=3, tensor_parallel_size=8)) as shard:
        weight = shard["model.layers.0.mlp.down_proj.weight"]

`ShardSet` says where the bytes are and how they are proved, `Place` (format/view.py) which of them a worker owns.
`load` and `prefetch` are the short call for the common case.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Final

from ..errors import IntegrityError, quote
from ..format import manifest as manifests
from ..format.manifest import Manifest
from ..format.read_manifest import find_manifest, parse_manifest, read_named
from ..format.view import Place, plan_view
from ..stores.open import is_uri, open_store
from ..stores.store import Access, Store
from .cache import Cache, open_cache
from .filesystem import Io, check_io
from .loading import fetched, folder_shard
from .prefetch import Prefetch
from .revisions import DEFAULT_REVISION, blob_key, read_revision
from .shard import Shard, Verify, check_verify
from .side_files import bring_side_files, is_here

FIRST: Final = Place()
"""The only worker of a grid of one."""


@dataclass(frozen=True, slots=True)
class ShardSet:
    """A shard set: where it is, which of its revisions, and how its bytes are fetched and proved.

    `open_set` makes it. It reads nothing before one of its methods is called, so it can be sent to another process.
    """

    source: str
    """A folder, the path of a manifest, or a URI: s3://bucket/prefix, gs:// or az://."""
    _: KW_ONLY
    revision: str = DEFAULT_REVISION
    """Name of the manifest in a store."""
    digest: str | None = None
    """`sha256:...` that the manifest must have: the root of the chain of trust. None: any manifest is followed."""
    access: Access = Access()  # noqa: RUF009 - frozen, and has no state
    """Endpoint, profile and the like of a store; the user's environment and files say the rest."""
    cache: Cache | str | None = "host"
    """Where what is fetched is kept for all workers of this host: a folder, or "host" (SHARDPREP_CACHE_DIR, else
    ~/.cache/shardprep). None: it lands in the memory of the process."""
    verify: Verify = "blocks"
    """What is proved before a tensor is handed out. "blocks": every block, by its digest. "headers": the digests of
    headers, and by them sizes, shapes and places. "off": sizes and places, without any digest."""
    connections: int | None = None
    """Threads that fetch (default: 16) or, of a folder, verify (default: the cores of the process, at most 8)."""
    processes: int = 1
    """Processes that fetch, with `connections` each: more than one where TLS keeps one core busy."""
    io: Io = "auto"
    """How a folder is read: "mmap", "read" (into memory, in parallel), or "auto": "read" on network file systems."""

    def __post_init__(self) -> None:
        check_verify(self.verify)
        check_io(self.io)

    @property
    def is_remote(self) -> bool:
        """Whether the set lies in a store, and not in a folder of this machine."""
        return is_uri(self.source)

    # ------------------------------------------------------------------------------------------------- what it holds
    def manifest(self) -> Manifest:
        """Read the manifest, which lists what the set holds.

        Raises:
            ManifestError: For one that is malformed, too new, or has another digest.
            MissingError, StoreError: Where a store does not have the revision, or cannot be read.
        """
        return self.pinned()[1]

    def pinned(self) -> tuple[ShardSet, Manifest]:
        """Read the manifest, and pin the set to it.

        Whoever uses the pinned set reads this manifest or is refused, wherever the revision moves meanwhile.

        Returns:
            This set with the manifest's digest, and the manifest.

        Raises:
            ShardprepError: What `manifest` raises.
        """
        if self.is_remote:
            with open_store(self.source, self.access) as store:
                raw, manifest = self._fetch_manifest(store, open_cache(self.cache))
            digest = manifests.digest_of(raw)
        else:
            manifest, digest = read_named(self.source, digest=self.digest)
        return replace(self, digest=digest), manifest

    def _fetch_manifest(self, store: Store, cache: Cache | None) -> tuple[bytes, Manifest]:
        """The manifest, as bytes and parsed: from the cache where it has the pinned one, else from the store."""
        if cache is not None and self.digest is not None:
            raw = cache.manifest(self.digest)
            if raw is not None and manifests.digest_of(raw) == self.digest:
                return raw, parse_manifest(raw)
        raw, manifest = read_revision(store, self.revision, self.digest)
        if cache is not None:
            cache.keep_manifest(manifests.digest_of(raw), raw)
        return raw, manifest

    # --------------------------------------------------------------------------------------------------- the weights
    def load(self, place: Place = FIRST, *, tensors: Collection[str] | None = None) -> Shard:
        """Load the shard of one worker.

        From a store this returns once the parts' headers are checked. The bytes arrive in threads; what goes wrong
        there is raised to whoever asks for a tensor.

        Args:
            place: Which shard; default: that of the only worker of a grid of one.
            tensors: Names of those to load, whatever their stage; default: all that belong to the place.

        Returns:
            The shard, which the caller closes.

        Raises:
            ManifestError, LayoutError, FormatError, IntegrityError: Before any tensor exists.
            StoreError: Where the store cannot be reached.
        """
        if not self.is_remote:
            file = find_manifest(self.source)
            manifest, _ = read_named(file, digest=self.digest)
            view = plan_view(manifest, place, tensors=tensors)
            return folder_shard(
                file.parent, view, manifest, io=self.io, verify=self.verify, workers=self.connections
            )
        with ExitStack() as stack:
            store = stack.enter_context(open_store(self.source, self.access))
            cache = open_cache(self.cache)
            _, manifest = self._fetch_manifest(store, cache)
            view = plan_view(manifest, place, tensors=tensors)
            shard = fetched(
                store,
                [blob_key(part.digest) for part in view.parts],
                view,
                manifest,
                cache,
                verify=self.verify,
                workers=self.connections,
                processes=self.processes,
            )
            stack.pop_all()
            return shard

    def prefetch(self, place: Place = FIRST) -> Prefetch:
        """Begin to fetch a worker's shard into the host's cache; returns at once, before any request.

        The shard of a folder is verified instead. Nothing fails here. A fetch that ends early leaves the rest to the
        next `load`.
        """
        return Prefetch(lambda: self.load(place))

    # ------------------------------------------------------------------------------------------------- what is beside
    @contextmanager
    def side_files(self) -> Iterator[Path]:
        """Have a folder with config.json and the tokenizer: the set's own, or one that ends with the `with`.

        Raises:
            IntegrityError: Where a side file is not the manifest's.
        """
        if self.is_remote:
            with tempfile.TemporaryDirectory(prefix="shardprep-") as folder:
                yield self.fetch_side_files(Path(folder, "side"))
            return
        own = find_manifest(self.source).parent
        for side in self.manifest().side_files:
            if (own / side.path).exists() and not is_here(own, side):
                raise IntegrityError(
                    f"{quote(own / side.path)}: does not match its digest in the manifest; the copy that lies here is "
                    "damaged, or was edited"
                )
        yield own

    def fetch_side_files(self, destination: Path) -> Path:
        """Bring the side files and the manifest from the store into a folder.

        Several processes may do so at once, and ranks may be pulled into the same folder. What is there of this very
        manifest is kept.

        Args:
            destination: The folder; it is made where it is missing.

        Returns:
            The folder.

        Raises:
            InputError: Before anything is written, for a folder that holds something else.
            StoreError, IntegrityError, WriteError: Later; the same call then resumes.
        """
        with open_store(self.source, self.access) as store:
            raw, manifest = read_revision(store, self.revision, self.digest)
            return bring_side_files(store, raw, manifest, destination)


def open_set(
    source: str | os.PathLike[str] | ShardSet,
    *,
    digest: str | None = None,
    revision: str = DEFAULT_REVISION,
    access: Access | None = None,
    cache: Cache | str | os.PathLike[str] | None = "host",
    verify: Verify = "blocks",
    connections: int | None = None,
    processes: int = 1,
) -> ShardSet:
    """Say where a shard set is, and how it is read. Reads nothing yet.

        with open_set("s3://models/llama-70b").load(Place(rank=3, tensor_parallel_size=8)) as shard:
            weight = shard["lm_head.weight"]

    Args:
        source: A folder, the path of a manifest, or a store (`s3://bucket/prefix`). A ShardSet is given back as it is:
            the other arguments are then ignored.
        digest: `sha256:...` that the manifest must have; default: whatever lies there is followed.
        revision: Name of the manifest in a store.
        access: Endpoint, profile and the like; default: the user's environment and files.
        cache: A folder that keeps what is fetched, "host" (SHARDPREP_CACHE_DIR, else ~/.cache/shardprep), or None.
        verify: "blocks", "headers" or "off", as `ShardSet.verify` has it.
        connections: Threads that fetch (default: 16) or verify (default: the cores of this process, at most 8).
        processes: Processes that fetch, with `connections` each.

    Raises:
        LayoutError: For a `verify` that does not exist.
    """
    if isinstance(source, ShardSet):
        return source
    return ShardSet(
        os.fspath(source),
        revision=revision,
        digest=digest,
        access=access or Access(),
        cache=cache if cache is None or isinstance(cache, Cache) else os.fspath(cache),
        verify=verify,
        connections=connections,
        processes=processes,
    )


def load(
    source: str | os.PathLike[str],
    *,
    rank: int = 0,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int | None = None,
    manifest_digest: str | None = None,
    cache: Cache | str | os.PathLike[str] | None = "host",
    verify: Verify = "blocks",
    access: Access | None = None,
) -> Shard:
    """Load the shard of `rank` from a shard set's folder or manifest, or from a store (`s3://bucket/prefix`).

        with load("s3://models/llama-70b", rank=3, tensor_parallel_size=8) as shard:
            weight = shard["model.layers.0.mlp.down_proj.weight"]

    It is `open_set(source, ...).load(Place(rank, ...))`, which also knows stages, engines, experts and revisions.

    Args:
        source: A folder, the path of a manifest, or a store (`s3://bucket/prefix`).
        rank: pp_rank * tensor_parallel_size + tp_rank.
        tensor_parallel_size: Ranks that share each tensor.
        pipeline_parallel_size: Stages; default: one.
        manifest_digest: `sha256:...` that the manifest must have; default: whatever lies there is followed.
        cache: As `open_set` has it.
        verify: As `open_set` has it.
        access: As `open_set` has it.

    Returns:
        The shard, which the caller closes.

    Raises:
        ShardprepError: What `ShardSet.load` raises.
    """
    shard_set = open_set(source, digest=manifest_digest, access=access, cache=cache, verify=verify)
    return shard_set.load(Place(rank, tensor_parallel_size, pipeline_parallel_size))


def prefetch(
    source: str | os.PathLike[str],
    *,
    rank: int = 0,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int | None = None,
    manifest_digest: str | None = None,
    cache: Cache | str | os.PathLike[str] = "host",
    verify: Verify = "blocks",
    access: Access | None = None,
) -> Prefetch:
    """Begin to fetch the shard of `rank` into the host's cache before the imports; returns at once.

        fetching = prefetch("s3://models/llama-70b", rank=3, tensor_parallel_size=8)
        import torch
        shard = fetching.shard()

    It is `open_set(source, ...).prefetch(Place(rank, ...))`.

    Args:
        source: As `load` has it, and the same for all that follow.
        rank: pp_rank * tensor_parallel_size + tp_rank.
        tensor_parallel_size: Ranks that share each tensor.
        pipeline_parallel_size: Stages; default: one.
        manifest_digest: `sha256:...` that the manifest must have; default: whatever lies there is followed.
        cache: As `open_set` has it.
        verify: As `open_set` has it.
        access: As `open_set` has it.
    """
    shard_set = open_set(source, digest=manifest_digest, access=access, cache=cache, verify=verify)
    return shard_set.prefetch(Place(rank, tensor_parallel_size, pipeline_parallel_size))
