"""Say which vLLM, in which grid, may load a folder of sharded_state files: the record that lies beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import (
    FormatError,
    IntegrityError,
    LayoutError,
    ManifestError,
    quote,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.header import is_size, loads_strict, read_header
from shardprep_runtime.format.manifest import SideFile, check_path, digest_of

from ..files import LocalFolder, open_regular
from ..write.side_files import check_side_file, read_chunks

if TYPE_CHECKING:
    pass

RECORD: Final = "shardprep-sharded-state.json"
"""Name of the record. It is written last, so that a folder that has it is complete."""

FORMAT: Final = "shardprep-sharded-state"
VERSION: Final = 1
"""The newest version of a record that is read here. It rises when an old reader would misread a new record."""

MAX_RECORD_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, slots=True)
class StateFile:
    """One file of one rank's state."""

    path: str
    size: int
    digest: str
    """`sha256:...` of the whole file."""
    pp_rank: int
    tp_rank: int


@dataclass(frozen=True, slots=True)
class Record:
    """What the files of a folder hold, and which vLLM they are for."""

    vllm: str
    torch: str
    shardprep: str
    architecture: str
    dtype: str
    """The dtype of tensors that are not quantized, in vLLM's words."""
    quantization: str | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool
    """Whether whole experts belong to the ranks of a stage, as with --enable-expert-parallel."""
    manifest_digest: str
    """`sha256:...` of the manifest of the shard set that was exported."""
    files: tuple[StateFile, ...]
    side_files: tuple[SideFile, ...]


def dump_record(record: Record) -> bytes:
    """Write a record as JSON."""
    fields = {"format": FORMAT, "version": VERSION, **asdict(record)}
    return (json.dumps(fields, indent=2) + "\n").encode()


def parse_record(raw: bytes, *, where: str = RECORD) -> Record:
    """Parse and check a record. Unknown keys are ignored.

    Args:
        where: The record as error messages name it.

    Raises:
        ManifestError: For an unknown version, and for anything that is not a record.
    """
    try:
        found = loads_strict(raw.decode("utf-8"), where=where)
    except (UnicodeDecodeError, FormatError) as error:
        raise ManifestError(str(error) if isinstance(error, FormatError) else f"{where}: not UTF-8") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ManifestError(f"{where}: no record of sharded_state files: its format is not {FORMAT}")
    version = found.get("version")
    if type(version) is not int or version > VERSION:
        raise ManifestError(
            f"{where}: version {quote(version)}, newer than {VERSION}, the newest that this shardprep reads; upgrade it"
        )
    try:
        return Record(
            **{name: _typed(found, name, str) for name in _TEXTS},
            quantization=found["quantization"] and _typed(found, "quantization", str),
            tensor_parallel_size=_typed(found, "tensor_parallel_size", int),
            pipeline_parallel_size=_typed(found, "pipeline_parallel_size", int),
            expert_parallel=_typed(found, "expert_parallel", bool),
            files=tuple(
                StateFile(**_file(each), **{name: _typed(each, name, int) for name in ("pp_rank", "tp_rank")})
                for each in _typed(found, "files", list)
            ),
            side_files=tuple(SideFile(**_file(each)) for each in _typed(found, "side_files", list)),
        )
    except KeyError as error:
        raise ManifestError(f"{where}: has no {quote(error.args[0])}") from None
    except (TypeError, ManifestError) as error:
        raise ManifestError(f"{where}: {error}") from None


_TEXTS: Final = ("vllm", "torch", "shardprep", "architecture", "dtype", "manifest_digest")


def _typed(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields[key]
    if type(value) is not kind or (kind is int and not is_size(value)):
        raise TypeError(f"{quote(key)} is {quote(value)}, expected {kind.__name__}")
    return value


def _file(fields: Mapping[str, Any]) -> dict[str, Any]:
    path, digest = check_path(_typed(fields, "path", str)), _typed(fields, "digest", str)
    if not manifests.DIGEST.fullmatch(digest):
        raise TypeError(f"{quote(path)}: its digest is {quote(digest)}, expected sha256:...")
    return {"path": path, "size": _typed(fields, "size", int), "digest": digest}


def is_sharded_state(path: Path) -> bool:
    """Whether a folder holds sharded_state files, and not a shard set."""
    return not (path / manifests.FILE_NAME).exists() and (path / RECORD).is_file()


def read_record(folder: Path) -> tuple[Record, str]:
    """Read the record of a folder of sharded_state files.

    Returns:
        The record, and `sha256:...` of its bytes.

    Raises:
        ManifestError: Where it cannot be read, or is not a record.
    """
    path = folder / RECORD
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ManifestError(
                f"{quote(path)}: more bytes than the {MAX_RECORD_BYTES} that a record may have"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{quote(path)}: cannot be read: {error.strerror}") from None
    return parse_record(raw, where=quote(path)), digest_of(raw)


def check_record(
    record: Record | Mapping[str, Any],
    vllm_version: str,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    *,
    expert_parallel: bool | None = None,
) -> None:
    """Check that a vLLM may load sharded_state files. vLLM itself does not: it may load wrong rows, and say nothing.

    Args:
        record: The record, or the object in its JSON.
        vllm_version: Version of the vLLM that would load the files.
        tensor_parallel_size: Size of its grid; so is the next.
        expert_parallel: Whether it shares experts whole; None: not known.

    Raises:
        LayoutError: Where the files are for another version or another grid.
    """
    if not isinstance(record, Record):
        record = parse_record(json.dumps(dict(record)).encode())
    if release(vllm_version) != release(record.vllm):
        raise LayoutError(
            f"these sharded_state files are vLLM {quote(record.vllm)}'s, and this is vLLM {quote(vllm_version)}, which "
            "may name or shape a rank's weights otherwise; "
            f"install vllm=={release(record.vllm)}, or export the shard set again with this version"
        )
    made = record.tensor_parallel_size, record.pipeline_parallel_size
    if (tensor_parallel_size, pipeline_parallel_size) != made:
        raise LayoutError(
            f"these sharded_state files are for tensor parallel size {made[0]} and pipeline parallel size {made[1]}, "
            f"not {tensor_parallel_size} and {pipeline_parallel_size}; start vLLM with --tensor-parallel-size {made[0]} "
            f"--pipeline-parallel-size {made[1]}, or export the shard set again with -tp {tensor_parallel_size} "
            f"-pp {pipeline_parallel_size}"
        )
    if expert_parallel is not None and expert_parallel != record.expert_parallel:
        how = "with" if record.expert_parallel else "without"
        raise LayoutError(
            f"these sharded_state files are for vLLM {how} --enable-expert-parallel; start it {how}, or export again"
        )


def release(version: str) -> str:
    """Strip what names a build from a version: 0.32.0+cpu becomes 0.32.0."""
    return version.partition("+")[0]


@dataclass(frozen=True, slots=True)
class RecordReport:
    """What `verify_record` has read and compared."""

    path: Path
    record_digest: str
    vllm: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    files: int
    side_files: int
    nbytes: int
    """Bytes of files of weights that were digested; 0 with `fast`."""


def verify_record(folder: Path, *, fast: bool = False, record_digest: str | None = None) -> RecordReport:
    """Check a folder of sharded_state files against its record: sizes, headers, side files, and every byte.

    Args:
        fast: Do not read the weights.
        record_digest: `sha256:...` that the record must have.

    Raises:
        ManifestError, FormatError, IntegrityError: Naming the first bad file.
    """
    record, digest = read_record(folder)
    if record_digest is not None and record_digest != digest:
        raise ManifestError(
            f"{quote(folder / RECORD)}: its digest is {digest}, expected {quote(record_digest)}; do not load it"
        )
    for side in record.side_files:
        check_side_file(LocalFolder(folder), side)
    digested = 0
    for file in record.files:
        path = folder / file.path
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            if size != file.size:
                raise IntegrityError(f"{quote(path)}: has {size} bytes, expected {file.size}; copy it again")
            read_header(fd, where=quote(path))
        finally:
            os.close(fd)
        if fast:
            continue
        hasher = hashlib.sha256()
        with LocalFolder(folder).open(file.path) as opened:
            for chunk in read_chunks(opened):
                hasher.update(chunk)
        if f"sha256:{hasher.hexdigest()}" != file.digest:
            raise IntegrityError(f"{quote(path)}: does not match its digest in {RECORD}; copy it again")
        digested += size
    return RecordReport(
        path=folder,
        record_digest=digest,
        vllm=record.vllm,
        tensor_parallel_size=record.tensor_parallel_size,
        pipeline_parallel_size=record.pipeline_parallel_size,
        files=len(record.files),
        side_files=len(record.side_files),
        nbytes=digested,
    )
