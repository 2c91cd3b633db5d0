"""Read text of others in a stream, by the library `datasets`: files that lie here, or a data set of a hub.

Nothing is kept of it on the disk, and a file that lies here is read without the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote

from shardprep_runtime.errors import (
    FormatError,
    InputError,
    MissingError,
    StoreError,
    UnsupportedError,
    quote,
)

from ..files import open_regular
from ..source.hub import explained

HUB: Final = "hf://datasets/"
KINDS: Final[Mapping[str, Mapping[str, Any]]] = {
    ".txt": {"path": "text", "keep_linebreaks": True, "encoding": "utf-8-sig"},
    ".jsonl": {"path": "text", "encoding": "utf-8-sig"},  # "json" refuses objects that are not all alike
    ".parquet": {"path": "parquet", "batch_size": 64},  # what a page says of its size may be a lie
}
"""Suffix -> what `datasets` is told of such a file."""
MESSAGES: Final = "messages"
READ: Final = 2**30
"""Characters of files that are read at most: a minute or two."""
READ_HUB: Final = 2**26
"""Characters that are fetched from a hub at most."""
ROWS: Final = 64
"""Lines of JSON that are held at a time; of plain text 16 times as many."""


class Tokenizer(Protocol):
    """What we use of a tokenizer of transformers."""

    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Text:
    """A stretch of a document. Those of one document follow each other."""

    document: int
    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A text that can be read, from its start each time."""

    texts: Callable[[], Iterator[Text]]
    source: str
    """As a report tells it: no path of this machine."""
    notes: list[str]
    """What is to be said of it. Reading adds to it where not all is read."""


def open_text(where: str | Path, column: str, tokenizer: Tokenizer) -> Opened:
    """Find what `where` names.

    Args:
        where: A file or folder, or hf://datasets/...; as `read_calibration` takes it.
        column: Of a JSON line or a table, a text or a list of messages; `messages` is taken where there is none.
        tokenizer: Whose chat template makes a text of messages.

    Raises:
        InputError: Where there is nothing that can be read.
        UnsupportedError: Where `datasets` is not installed.
        StoreError: Where the hub cannot be reached; MissingError, DeniedError: where it refuses.
    """
    parts: list[tuple[str, Mapping[str, Any]]]
    if isinstance(where, str) and where.startswith(HUB):
        named = parse_dataset(where)
        _check_installed(where)
        with explained(where, "data set"):
            named["revision"] = _commit(named["path"], named["revision"])
        within = (f":{named['name']}" if named["name"] else "") + f"/{named['split']}"
        parts, notes, most = [(f"{HUB}{named['path']}{within}", named)], list[str](), READ_HUB
        source = f"{HUB}{named['path']}@{named['revision']}{within}"
    else:
        files, notes = _files(Path(where))
        _check_installed(Path(where).name)
        parts = [(str(path), {**KINDS[path.suffix], "data_files": path, "split": "train"}) for path in files]
        source, most = quote(Path(where).resolve().name), READ

    def texts() -> Iterator[Text]:
        """Documents until they have `most` characters."""
        left = most
        for text in _texts(parts, column, tokenizer):
            if left <= 0:
                note = f"only the first {most:,} characters were read; to draw from all of a larger text, name a part of it"
                notes.extend({note}.difference(notes))
                return
            yield text
            left -= len(text.text)

    return Opened(texts, source, notes)


def parse_dataset(uri: str) -> dict[str, Any]:
    """What `datasets` is told of hf://datasets/org/name[@revision][:config][/split]. Raises InputError."""
    found = _DATASET.fullmatch(uri)
    if not found:
        raise InputError(f"{quote(uri)}: expected {HUB}org/name[@revision][:config][/split]")
    revision = unquote(found["revision"]) if found["revision"] else None
    return {**found.groupdict(), "revision": revision, "split": found["split"] or "train"}


_DATASET: Final = re.compile(
    rf"{HUB}(?P<path>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[^/:]+|[^/:]+))?"
    r"(:(?P<name>[^/:]+))?(/(?P<split>\w[\w.-]*))?"
)


def missing(library: str, what: str) -> UnsupportedError:
    """The refusal of what needs a library that is not installed.

    Args:
        library: As pip names it.
        what: What needs it.
    """
    return UnsupportedError(f"{what} needs {library}: pip install 'shardprep[quantize]'")


def words(error: BaseException) -> str:
    """What an error of others says, on one line."""
    return quote(" ".join(str(error).split()) or type(error).__name__, limit=300)


def _check_installed(what: str) -> None:
    try:
        import datasets  # noqa: F401 - asked for before anything is fetched
    except ImportError:
        raise missing("datasets", f"reading {quote(what)}") from None


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """The files of text, and what to say of others. Raises InputError where there are none."""
    suffixes = f"{', '.join([*KINDS][:-1])} or {[*KINDS][-1]}"
    if not path.exists():
        raise InputError(
            f"{quote(path)}: no such file or folder; text is read from {suffixes} files, a folder of such, or "
            f"{HUB}org/name"
        )
    if not path.is_dir():
        if path.suffix not in KINDS:
            raise InputError(f"{quote(path)}: expected a {suffixes} file, or a folder of such")
        return [path], []
    files = sorted(path.iterdir(), key=_natural)
    chosen = [each for each in files if each.suffix in KINDS and each.name[0] != "." and each.is_file()]
    if not chosen:
        raise InputError(f"{quote(path)}: no {suffixes} file in this folder")
    others = [each.name for each in files if each not in chosen]
    shown = ", ".join(map(quote, others[:3])) + (", ..." if len(others) > 3 else "")
    return chosen, [f"{quote(path.name)}: {len(others)} not read as text: {shown}"] if others else []


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """part-9 before part-10."""
    parts = re.split(r"(\d{1,99})", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _texts(
    parts: Sequence[tuple[str, Mapping[str, Any]]], column: str, tokenizer: Tokenizer
) -> Iterator[Text]:
    """The documents of files or of a split, each with what `datasets` is told of it."""
    document = 0
    for where, options in parts:
        document += 1
        for place, value in _values(where, options, column):
            document += place != ""
            yield Text(document, _text_of(value, f"{quote(where)}{place}", tokenizer))


def _values(where: str, options: Mapping[str, Any], column: str) -> Iterator[tuple[str, Any]]:
    """What each row or line has in the column, and which it is; or, without a place, the next lines of a plain text."""
    suffix = options["data_files"].suffix if "data_files" in options else ""
    with tempfile.TemporaryDirectory(prefix="shardprep-") as folder, _read_as(where, options):
        import datasets

        own = {**options, "cache_dir": folder, "streaming": True}  # where it leaves a lock, and nothing else
        if "data_files" in own:
            os.close(open_regular(own["data_files"]))
            link = Path(folder, "text").with_suffix(suffix)
            link.symlink_to(own["data_files"].resolve())  # another name may be a pattern to it, or a URL
            own["data_files"] = str(link)
        rows = datasets.load_dataset(**own)
        if suffix == ".txt":
            for batch in rows.iter(batch_size=16 * ROWS):
                lines = "".join(batch["text"])
                if "\0" in lines:
                    raise FormatError(
                        f"{quote(where)}: holds NUL characters: UTF-16 or no text; save it as UTF-8"
                    )
                yield "", lines
            return
        if suffix == ".jsonl":
            lines_of = (line for batch in rows.iter(batch_size=ROWS) for line in batch["text"])
            for number, line in enumerate(lines_of, start=1):
                if line.strip():
                    place = f": line {number}"
                    record = _record(line, f"{quote(where)}{place}")
                    yield place, record[_chosen(list(record), column, f"{quote(where)}{place}")]
            return
        name = _chosen(rows.column_names or list(next(iter(rows), {})), column, quote(where))
        for number, row in enumerate(rows.select_columns([name]), start=1):
            yield f": row {number}", row[name]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({words(error)}); expected one object a line") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where}: expected an object, found {_kind(found)}")
    return found


def _chosen(names: Sequence[str], column: str, where: str) -> str:
    """The column with the text. Raises InputError where there is none."""
    for wanted in (column, MESSAGES):
        if wanted in names:
            return wanted
    shown = ", ".join(map(quote, names[:8])) + (", ..." if len(names) > 8 else "")
    raise InputError(
        f"{where}: no {quote(column)} and no {MESSAGES}; found {shown or 'nothing'}; name the one with the text"
    )


def _text_of(value: object, where: str, tokenizer: Tokenizer) -> str:
    """What a row says. Raises InputError where it is neither a text nor a conversation."""
    if value is None or isinstance(value, str):
        return _sound(value or "")
    if not isinstance(value, list):
        raise InputError(f"{where}: {_kind(value)}; expected a text or a list of messages")
    messages = []
    for at, message in enumerate(value):
        found = message if isinstance(message, Mapping) else {}
        role, content = found.get("role"), found.get("content")
        if isinstance(content, list):  # parts, of which only text can be tokenized
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise InputError(
                f'{where}: message {at} is not {{"role": a text, "content": a text}}; found {_kind(message)}'
                + (f" with {', '.join(map(quote, list(found)[:8]))}" if found else "")
            )
        # without the names of a table that has them for some rows only
        messages.append(
            {**{key: each for key, each in found.items() if each is not None}, "content": content or ""}
        )
    if not messages:
        return ""
    if not tokenizer.chat_template:
        return _sound("\n\n".join(f"{message['role']}: {message['content']}" for message in messages))
    try:
        return _sound(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    except Exception as error:  # noqa: BLE001 - a template may raise whatever Jinja can
        raise InputError(f"{where}: refused by the tokenizer's chat template: {words(error)}") from None


def _sound(text: str) -> str:
    """The text without halves of characters, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), f"a value of type {type(value).__name__}"
    )


def _commit(repo: str, revision: str | None) -> str:
    """The commit that the revision stands for, so that what is read is what is told."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise MissingError(
            f"{quote(HUB + repo)}: the hub is not asked (HF_HUB_OFFLINE); name a file instead",
            missing="repository",
        )
    found = hub.HfApi(library_name="shardprep").dataset_info(repo, revision=revision)
    return str(found.sha)


@contextlib.contextmanager
def _read_as(uri: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Say in our words what the library cannot read. No URL of its own is repeated: it may be a signed one."""
    import datasets
    import pyarrow

    where = quote(uri)
    file = options.get("data_files")
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises as well
    try:
        with explained(uri, "data set"):
            yield
    except datasets.exceptions.DatasetNotFoundError:
        raise MissingError(
            f"{where}: no such data set, or not one that may be read", missing="repository"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{where}: no files in it that can be read as a data set") from None
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8; save it as UTF-8") from None
    except (
        *(StopIteration, TypeError, ValueError, RuntimeError),  # of no rows, and of later ones that it casts
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as error:
        said = re.sub(r"\w+://\S+", "URL", words(error))
        if file is None:
            raise InputError(f"{where}: cannot be read as a data set ({said})") from None
        raise FormatError(f"{where}: cannot be read as {file.suffix.removeprefix('.')} ({said})") from None
    except OSError as error:
        if file is not None:
            raise FormatError(f"{where}: cannot be read ({words(error)})") from None
        raise StoreError(f"{where}: the hub cannot be reached; check the network and HF_ENDPOINT") from None
    finally:
        datasets.logging.set_verbosity(level)
