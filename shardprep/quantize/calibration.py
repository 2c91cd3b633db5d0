"""Make the token sequences that a quantization is calibrated with, and those that its quality is measured on.

Text may be larger than memory and comes from strangers: it is read once, front to back, in small steps. It is cut
into passages of about four sequences each, and every passage draws a key from the seed. Those with the smallest keys
are kept, just enough of them that their text is sixteen times what is asked for; that is a uniform choice among all
passages, whatever the number of them. The kept passages are put into their old order, joined by the tokenizer's
end-of-text token where something lay between them, and cut into windows that do not overlap. The seed draws the
windows too.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote

from shardprep_runtime.errors import (
    DeniedError,
    FormatError,
    InputError,
    MissingError,
    StoreError,
    UnsupportedError,
    WriteError,
    quote,
)
from shardprep_runtime.shard.filesystem import sync_folder

from ..files import open_regular

CORPUS: Final = Path(__file__).with_name("corpus") / "corpus.jsonl"
HUB: Final = "hf://datasets/"
SUFFIXES: Final = (".txt", ".jsonl", ".parquet")
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
MESSAGES: Final = "messages"

LEAST_TOKENS: Final = 512
"""Narrower than any linear of a model that is worth quantizing: GPTQ's sums over fewer inputs than a row has
are singular, and an average over so few activations is that of one paragraph."""
FEW_TOKENS: Final = 128 * 256
"""An eighth of what the paper on GPTQ takes (128 x 2048)."""
LEAST_SEQUENCES: Final = 2
FEW_HELD_OUT: Final = 4096
"""Tokens; a mean over fewer differs from one text to the next by more than quantization changes it."""
MOST_UNKNOWN: Final = 0.5
"""Share of tokens that stand for what the tokenizer does not know; more is refused."""
MANY_UNKNOWN: Final = 0.05
"""More is told."""
RUN: Final = 8
"""Tokens. Runs of so many hardly ever come again by chance, and always where lines do."""
LEAST_NEW: Final = 0.1
"""Share of runs that are different: one line again and again has almost none, books and code have more than 0.9."""
FEW_NEW: Final = 0.5
LEAST_ENTROPY: Final = 2.5
"""Bits a token, by the tokens' frequencies: English has 4.1 where a token is a letter, and 9 to 10 where it is a word."""
LOW_ENTROPY: Final = 4.0
FEW_DISTINCT: Final = 256
"""In a text of 32 times as many tokens; where a token is a byte there cannot be more."""

PASSAGE: Final = 16
"""Characters of a passage for each token of a sequence: about four sequences."""
POOL: Final = 16
"""Characters that are kept for each token asked for: about four times what is needed."""
LEAST_POOL: Final = 2**20  # characters; reading so much costs nothing, and the choice is wider
HELD_OUT_PASSAGE: Final = 2**22  # characters that are tokenized at once, so that most texts are never cut
READ: Final = 2**30
"""Characters of files that are read at most: half a minute."""
READ_HUB: Final = 2**26
"""Characters that are fetched from a hub at most."""
LINE: Final = 2**26  # bytes of one line of JSON
CHUNK: Final = 2**18  # bytes
TOKENIZED_AT_ONCE: Final = 2**20  # characters; a tokenizer's own notes on them are a hundred times as large


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids for calibration or evaluation."""

    sequences: tuple[tuple[int, ...], ...]
    source: str
    """As a report tells it: no path of this machine."""
    digest: str
    """`sha256:...` of the ids, of the very bytes that `write_tokens` writes."""
    notes: tuple[str, ...] = ()
    """What is doubtful about them, with numbers."""

    @property
    def count(self) -> int:
        """Tokens in all sequences."""
        return sum(map(len, self.sequences))

    @property
    def distinct(self) -> int:
        """Different tokens among them."""
        return len(set(chain.from_iterable(self.sequences)))


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
class Passage:
    """A piece of a document, about as long as was asked for."""

    document: int
    number: int
    """Of the document's pieces."""
    text: str

    def follows(self, other: Passage) -> bool:
        """Whether nothing lies between the two."""
        return (self.document, self.number) == (other.document, other.number + 1)


def read_calibration(
    where: str | Path | None,
    tokenizer: Path,
    *,
    samples: int,
    length: int,
    seed: int,
    column: str = "text",
) -> Tokens:
    """Draw `samples` sequences of `length` tokens from a text; the same for the same text, tokenizer and seed.

    A text that is too short gives fewer sequences, and a note. Raises InputError for one that is no use, or cannot be
    read; UnsupportedError where the library that reads it is not installed.

    Args:
        where: A .txt, .jsonl or .parquet file, a folder of such, hf://datasets/org/name[@revision][:config][/split], or
            None: a small text of our own, for trying.
        tokenizer: A folder with a tokenizer's files.
        length: In tokens; the first is the one that the tokenizer begins texts with, where it does.
        column: Of a JSON line or a table, a text or a list of messages.
    """
    if samples < LEAST_SEQUENCES or samples * length < LEAST_TOKENS:
        raise InputError(
            f"{_of(samples, length)} tokens are too few to calibrate with: expected at least {LEAST_SEQUENCES} "
            f"sequences and {LEAST_TOKENS} tokens; {FEW_TOKENS:,} (128 x 256) or more are usual"
        )
    reader = Reader(load_tokenizer(tokenizer), "text" if where is None else column)
    body = length - len(reader.prefix)
    if body < 1:
        raise InputError(f"calibration sequences of {length} tokens are too short; expected at least 16")
    name = "the built-in text" if where is None else _shown(where)
    opened = reader.open(CORPUS if where is None else where)
    pool, needed = max(LEAST_POOL, POOL * samples * length), samples * body
    while True:
        whole, passages = _draw(
            opened.texts(), size=PASSAGE * length, pool=pool, seed=seed, most=opened.most, notes=opened.notes
        )
        stream = reader.tokenize(passages)
        if whole or len(stream) >= needed:
            break
        pool *= 4  # few tokens for so many characters, such as long runs of spaces
    count = len(stream) // body
    if count * length < LEAST_TOKENS or count < LEAST_SEQUENCES:
        raise InputError(
            f"{name}: {len(stream):,} tokens, {_of(count, length)}; too little to calibrate with: expected "
            f"{_of(samples, length)}, and not less than {LEAST_TOKENS} tokens in {LEAST_SEQUENCES} sequences"
        )
    keys = random.Random(f"windows {seed}")  # noqa: S311 - a fair draw, no secret
    drawn = sorted((keys.random(), at) for at in range(count))[:samples]
    head = tuple(reader.prefix)
    sequences = tuple(head + tuple(stream[at * body : (at + 1) * body]) for _, at in drawn)
    notes = [*opened.notes]
    if count < samples:
        notes.append(f"{name}: only {_of(count, length)} instead of {samples:,}; there was no more text")
    taken = len(sequences) * length
    if taken < FEW_TOKENS:
        notes.append(
            f"{name}: {taken:,} tokens are few to calibrate with; {FEW_TOKENS:,} (128 x 256) or more are usual"
        )
    if where is None:
        notes.append(
            "the built-in text (English documentation and Python) is for trying; calibrate with text like that "
            "which the model will see"
        )
    notes += _examine(sequences, reader.unknown, name)
    return _tokens(sequences, "built-in" if where is None else opened.source, notes)


def read_heldout(
    where: str | Path, tokenizer: Path, *, length: int, limit: int | None = None, column: str = "text"
) -> Tokens:
    """Cut a text into sequences of `length` tokens, in order; the last may be shorter, but not than 2.

    Other parameters and errors as for `read_calibration`.

    Args:
        limit: Tokens that are kept at most, from the start; None: all of what is read.
    """
    reader = Reader(load_tokenizer(tokenizer), column)
    body = length - len(reader.prefix)
    if body < 1 or length < 2:
        raise InputError(f"sequences of {length} tokens are too short to be predicted; expected at least 16")
    if limit is not None and limit < 2:
        raise InputError(f"{limit} tokens are too few to be predicted; expected at least 2")
    name = _shown(where)
    opened = reader.open(where)
    passages = _passages(_bounded(opened.texts(), opened.most, opened.notes), HELD_OUT_PASSAGE)
    stream = reader.tokenize(passages, most=limit)
    head = tuple(reader.prefix)
    sequences, left = [], sys.maxsize if limit is None else limit
    for at in range(0, len(stream), body):
        sequence = (head + tuple(stream[at : at + body]))[:left]
        left -= len(sequence)
        if len(sequence) > max(1, len(head)):
            sequences.append(sequence)
    if not sequences:
        raise InputError(f"{name}: {len(stream):,} tokens; too little to measure on: expected at least 2")
    notes = [*opened.notes]
    count = sum(map(len, sequences))
    if count < FEW_HELD_OUT:
        notes.append(f"{name}: {count:,} tokens are few to measure on; {FEW_HELD_OUT:,} or more are usual")
    if count >= LEAST_TOKENS:  # fewer cannot have the variety that is asked for
        notes += _examine(sequences, reader.unknown, name)
    return _tokens(tuple(sequences), opened.source, notes)


def write_tokens(tokens: Tokens, path: Path) -> None:
    """Write JSON lines, a list of ids for each sequence. The file is whole or not there. Raises WriteError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.writelines(_lines(tokens.sequences))
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(f"{quote(path)}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, by transformers, without the network and without code of the folder's own.

    Raises:
        InputError: Where there is none or a broken one, UnsupportedError without transformers.
    """
    if not folder.is_dir():
        raise InputError(f"{quote(folder)}: no such folder; expected one with a tokenizer's files")
    if not any(found.is_file() for pattern in TOKENIZER_FILES for found in folder.glob(pattern)):
        raise InputError(
            f"{quote(folder)}: no tokenizer; none of {', '.join(TOKENIZER_FILES)} is there; "
            "copy the files of the original model to it"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise _missing("transformers", "tokenizing text") from None
    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        found(["a"], verbose=False)
    except Exception as error:  # noqa: BLE001 - every kind of tokenizer raises classes of its own
        there = sorted({each.name for pattern in TOKENIZER_FILES for each in folder.glob(pattern)})
        raise InputError(
            f"{quote(folder)}: the tokenizer cannot be loaded from {', '.join(map(quote, there))} "
            f"({_words(error)}); expected files that transformers reads without running code of theirs"
        ) from None
    return found


@dataclass(frozen=True, slots=True)
class Opened:
    """A text that can be read, from its start each time."""

    texts: Callable[[], Iterator[Text]]
    source: str
    most: int
    """Characters that are read at most."""
    notes: list[str]


class Reader:
    """Reads text for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, column: str) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.prefix = _prefix(tokenizer)
        end, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
        self.end = [] if end is None else [end]
        self.unknown = None if unknown == end else unknown  # GPT-2's is its end of text

    def open(self, where: str | Path) -> Opened:
        """What `where` names. Raises InputError where there is nothing that can be read."""
        if isinstance(where, str) and where.startswith(HUB):
            return self._open_hub(where)
        path, notes = Path(where), list[str]()
        if path.is_dir():
            files = sorted(path.iterdir(), key=_natural)
            chosen = [
                each for each in files if each.suffix in SUFFIXES and each.name[0] != "." and each.is_file()
            ]
            if not chosen:
                raise InputError(f"{quote(path)}: no {_either(SUFFIXES)} file in this folder")
            if others := [each.name for each in files if each not in chosen]:
                shown = ", ".join(map(quote, others[:3])) + (", ..." if len(others) > 3 else "")
                notes.append(f"{quote(path.name)}: {len(others)} not read as text: {shown}")
        elif path.exists():
            if path.suffix not in SUFFIXES:
                raise InputError(f"{quote(path)}: expected a {_either(SUFFIXES)} file, or a folder of such")
            chosen = [path]
        else:
            raise InputError(
                f"{quote(where)}: no such file or folder; text is read from {_either(SUFFIXES)} files, a folder of "
                f"such, or {HUB}org/name"
            )
        return Opened(lambda: self._files(chosen), quote(path.resolve().name), READ, notes)

    def tokenize(self, passages: Iterable[Passage], *, most: int | None = None) -> array[int]:
        """One stream of ids; it may stop once it has `most`."""
        stream, last = array("q"), None
        for batch in _batches(passages):
            texts = [passage.text for passage in batch]
            for passage, ids in zip(batch, self._ids(texts), strict=True):
                if last is not None and not passage.follows(last):
                    stream.extend(self.end)
                if self.prefix and ids[: len(self.prefix)] == self.prefix:
                    ids = ids[len(self.prefix) :]  # written by a chat template
                stream.extend(ids)
                last = passage
            if most is not None and len(stream) >= most:
                break
        return stream

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    def _files(self, paths: Sequence[Path]) -> Iterator[Text]:
        kinds = {".txt": _plain, ".jsonl": self._json_lines, ".parquet": self._table}
        document = 0
        for path in paths:
            last = 0
            for text in kinds[path.suffix](path):
                last = text.document
                yield Text(document + last, text.text)
            document += last + 1

    def _json_lines(self, path: Path) -> Iterator[Text]:
        with os.fdopen(open_regular(path), "rb", buffering=CHUNK) as file:
            for number in itertools.count(1):
                line = file.readline(LINE + 1)
                if not line:
                    return
                where = f"{quote(path)}: line {number}"
                if len(line) > LINE:
                    raise FormatError(f"{where}: longer than {LINE:,} bytes; expected one document a line")
                if line.strip():
                    yield Text(number, self._value(_json(line, where), where))

    def _table(self, path: Path) -> Iterator[Text]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise _missing("datasets", f"reading {quote(path.name)}") from None
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
                names = table.schema_arrow.names
                chosen = self._column(names, quote(path))
                # few rows at a time: what a page says of its size may be a lie
                rows = table.iter_batches(batch_size=64, columns=[chosen], use_threads=False)
                number = 0
                for batch in rows:
                    for value in batch.column(0).to_pylist():
                        number += 1
                        yield Text(number, self._text_of(value, chosen, f"{quote(path)}: row {number}"))
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise FormatError(f"{quote(path)}: cannot be read as parquet ({_words(error)})") from None

    def _value(self, record: object, where: str) -> str:
        if not isinstance(record, Mapping):
            raise FormatError(f"{where}: expected an object with {quote(self.column)}, found {_kind(record)}")
        chosen = self._column(list(record), where)
        return self._text_of(record[chosen], chosen, where)

    def _column(self, names: Sequence[object], where: str) -> str:
        for wanted in (self.column, MESSAGES):
            if wanted in names:
                return wanted
        shown = ", ".join(map(quote, names[:8])) + (", ..." if len(names) > 8 else "")
        raise InputError(
            f"{where}: no {quote(self.column)} and no {MESSAGES}; found {shown or 'nothing'}; name the one with the text"
        )

    def _text_of(self, value: object, column: str, where: str) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return _sound(value)
        if isinstance(value, list):
            return _sound(self._conversation(value, f"{where}: {quote(column)}"))
        raise InputError(f"{where}: {quote(column)} is {_kind(value)}; expected a text or a list of messages")

    def _conversation(self, value: list[object], where: str) -> str:
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
        if not self.tokenizer.chat_template:
            return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # noqa: BLE001 - a template may raise whatever Jinja can
            raise InputError(f"{where}: refused by the tokenizer's chat template: {_words(error)}") from None

    def _open_hub(self, uri: str) -> Opened:
        named = parse_dataset(uri)
        try:
            import datasets  # noqa: F401 - asked for before anything is fetched
        except ImportError:
            raise _missing("datasets", quote(uri)) from None
        with _explained(uri):
            commit = _commit(named)
        return Opened(lambda: self._rows(named, commit), f"{named.uri}@{commit}{named.within}", READ_HUB, [])

    def _rows(self, named: Dataset, commit: str) -> Iterator[Text]:
        import datasets

        where = quote(named.uri + named.within)
        with _explained(named.uri):
            rows = iter(
                datasets.load_dataset(
                    named.repo, name=named.config, split=named.split, revision=commit, streaming=True
                )
            )
        for number in itertools.count(1):
            with _explained(named.uri):
                row = next(rows, None)
            if row is None:
                return
            yield Text(number, self._value(row, f"{where}: row {number}"))


@dataclass(frozen=True, slots=True)
class Dataset:
    """What hf://datasets/org/name[@revision][:config][/split] names."""

    repo: str
    revision: str | None
    config: str | None
    split: str = "train"

    @property
    def uri(self) -> str:
        return HUB + self.repo

    @property
    def within(self) -> str:
        """What follows the revision."""
        return (f":{self.config}" if self.config else "") + f"/{self.split}"


_DATASET: Final = re.compile(
    rf"{HUB}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[^/:]+|[^/:]+))?"
    r"(:(?P<config>[^/:]+))?(/(?P<split>\w[\w.-]*))?"
)


def parse_dataset(uri: str) -> Dataset:
    """Take hf://datasets/org/name[@revision][:config][/split] apart. Raises InputError."""
    found = _DATASET.fullmatch(uri)
    if not found:
        raise InputError(f"{quote(uri)}: expected {HUB}org/name[@revision][:config][/split]")
    revision = unquote(found["revision"]) if found["revision"] else None
    return Dataset(found["repo"], revision, found["config"], found["split"] or "train")


def _commit(named: Dataset) -> str:
    """The commit that the revision stands for, so that what is read is what is told."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise MissingError(
            f"{quote(named.uri)}: the hub is not asked (HF_HUB_OFFLINE); name a file instead",
            missing="repository",
        )
    try:
        found = hub.HfApi(library_name="shardprep").dataset_info(named.repo, revision=named.revision)
    except errors.RepositoryNotFoundError:
        raise MissingError(
            f"{quote(named.uri)}: no such data set, or a private one that HF_TOKEN does not open (`hf auth login`)",
            missing="repository",
        ) from None
    return str(found.sha)


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Say in our words what the hub and its library refuse. No URL of theirs is repeated: it may be a signed one."""
    import datasets
    from huggingface_hub import errors

    where = quote(uri)
    try:
        yield
    except errors.GatedRepoError:
        raise DeniedError(
            f"{where}: a gated data set: ask for access on its page at the hub, and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise MissingError(f"{where}: the data set has no such revision", missing="revision") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise DeniedError(
                f"{where}: the hub does not let us (status {status}); check HF_TOKEN", status=status
            ) from None
        raise StoreError(
            f"{where}: the hub answered with status {status}; try again later", status=status
        ) from None
    except datasets.exceptions.DatasetNotFoundError:
        raise MissingError(
            f"{where}: no such data set, or not one that may be read", missing="repository"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{where}: no files in it that can be read as a data set") from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = re.sub(r"\w+://\S+", "URL", _words(error))
        raise InputError(f"{where}: cannot be read as a data set ({said})") from None
    except (errors.HTTPError, ConnectionError, OSError):
        raise StoreError(f"{where}: the hub cannot be reached; check the network and HF_ENDPOINT") from None


def _plain(path: Path) -> Iterator[Text]:
    """A file of text: one document."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while True:
            chunk = file.read(CHUNK) or b""
            before = at - len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise FormatError(
                    f"{quote(path)}: not UTF-8 at byte {before + error.start}; save it as UTF-8"
                ) from None
            if "\0" in text:
                raise FormatError(f"{quote(path)}: holds NUL characters: UTF-16 or no text; save it as UTF-8")
            yield Text(0, text if before else text.removeprefix("\ufeff"))
            at += len(chunk)
            if not chunk:
                return


def _draw(
    texts: Iterable[Text], *, size: int, pool: int, seed: int, most: int, notes: list[str]
) -> tuple[bool, list[Passage]]:
    """(whether that is all there is, passages in their order): those of the smallest keys with `pool` characters."""
    keys = random.Random(f"passages {seed}")  # noqa: S311 - a fair draw, no secret
    kept: list[tuple[float, int, Passage]] = []
    total, whole = 0, True
    notes_read: list[str] = []
    for place, passage in enumerate(_passages(_bounded(texts, most, notes_read), size)):
        heapq.heappush(kept, (-keys.random(), place, passage))
        total += len(passage.text)
        while total - len(kept[0][2].text) >= pool:
            total -= len(heapq.heappop(kept)[2].text)
            whole = False
    notes += [note for note in notes_read if note not in notes]
    return whole, [passage for _, _, passage in sorted(kept, key=lambda each: each[1])]


def _passages(texts: Iterable[Text], size: int) -> Iterator[Passage]:
    """Cut documents into pieces of at most `size` characters, behind a line or a word where there is one."""
    held, document, number = "", -1, 0
    for text in texts:
        if text.document != document:
            if held.strip():
                yield Passage(document, number, held)
            held, document, number = "", text.document, 0
        held += text.text
        start = 0
        while len(held) - start > size:
            stop = _break(held, start, start + size)
            if not held[start:stop].isspace():
                yield Passage(document, number, held[start:stop])
            start, number = stop, number + 1
        held = held[start:]
    if held.strip():
        yield Passage(document, number, held)


def _break(text: str, start: int, stop: int) -> int:
    middle = (start + stop) // 2
    for mark in ("\n", " "):
        if (at := text.rfind(mark, middle, stop)) >= 0:
            return at + 1
    return stop


def _bounded(texts: Iterable[Text], most: int, notes: list[str]) -> Iterator[Text]:
    """Texts until they have `most` characters; says so where there is more."""
    left = most
    for text in texts:
        if left <= 0:
            notes.append(
                f"only the first {most:,} characters were read; to draw from all of a larger text, name a part of it"
            )
            return
        yield text
        left -= len(text.text)


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    batch, size = list[Passage](), 0
    for passage in passages:
        batch.append(passage)
        size += len(passage.text)
        if size >= TOKENIZED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _examine(sequences: Sequence[Sequence[int]], unknown: int | None, name: str) -> list[str]:
    """What is doubtful about the tokens. Raises InputError where they are no use."""
    counts = Counter(chain.from_iterable(sequences))
    total = counts.total()
    strange = counts[unknown] / total if unknown is not None else 0.0
    if strange > MOST_UNKNOWN:
        raise InputError(
            f"{name}: {strange:.0%} of {total:,} tokens are unknown to the tokenizer (at most {MOST_UNKNOWN:.0%}); "
            "take text in a language that the model knows"
        )
    entropy = -sum(count / total * math.log2(count / total) for count in counts.values())
    variety = f"{len(counts):,} different tokens in {total:,}, {entropy:.1f} bits a token"
    if entropy < LEAST_ENTROPY:
        raise InputError(
            f"{name}: {variety}; too uniform (at least {LEAST_ENTROPY} bits): take ordinary text, such as the "
            "model will see"
        )
    runs = {hash(run) for each in sequences for run in _runs(each)}
    possible = sum(max(0, len(each) - RUN + 1) for each in sequences)
    new = len(runs) / possible if possible else 1.0
    if new < LEAST_NEW:
        raise InputError(
            f"{name}: the same again and again: {new:.1%} of all runs of {RUN} tokens are different (at least "
            f"{LEAST_NEW:.0%}; ordinary text has more than 90%)"
        )
    notes = []
    if strange > MANY_UNKNOWN:
        notes.append(f"{name}: {strange:.1%} of {total:,} tokens are unknown to the tokenizer")
    if entropy < LOW_ENTROPY or (len(counts) < FEW_DISTINCT and total >= FEW_DISTINCT * 32):
        notes.append(f"{name}: little variety: {variety}")
    if new < FEW_NEW:
        notes.append(f"{name}: repeats itself: {new:.0%} of all runs of {RUN} tokens are different")
    return notes


def _runs(sequence: Sequence[int]) -> Iterable[tuple[int, ...]]:
    return zip(*(islice(sequence, start, None) for start in range(RUN)), strict=False)


def _tokens(sequences: tuple[tuple[int, ...], ...], source: str, notes: Iterable[str]) -> Tokens:
    digest = hashlib.sha256()
    for line in _lines(sequences):
        digest.update(line)
    return Tokens(sequences, source, f"sha256:{digest.hexdigest()}", tuple(notes))


def _lines(sequences: Iterable[Sequence[int]]) -> Iterator[bytes]:
    for sequence in sequences:
        yield b"[%s]\n" % ",".join(map(str, sequence)).encode()


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer begins every text with, such as <s>."""
    plain = tokenizer(["a"], add_special_tokens=False, verbose=False)["input_ids"][0]
    full = tokenizer(["a"], verbose=False)["input_ids"][0]
    for at in range(len(full) - len(plain) + 1):
        if list(full[at : at + len(plain)]) == list(plain):
            return list(full[:at])
    return []


def _json(line: bytes, where: str) -> object:
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8))
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({_words(error)}); expected one object a line") from None


def _sound(text: str) -> str:
    """The text without halves of characters, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """part-9 before part-10."""
    words = re.split(r"(\d{1,99})", path.name)
    return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words]


def _shown(where: str | Path) -> str:
    return quote(where if str(where).startswith(HUB) else Path(where).name or where)


def _missing(library: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"{what} needs {library}: pip install 'shardprep[quantize]'")


def _words(error: BaseException) -> str:
    return quote(" ".join(str(error).split()) or type(error).__name__, limit=300)


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _of(count: int, length: int) -> str:
    return f"{count:,} sequences of {length:,}"
