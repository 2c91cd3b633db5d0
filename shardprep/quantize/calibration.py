"""Make the token sequences that a quantization is calibrated with, and those that its quality is measured on.

Text may be larger than memory and comes from strangers: it is read once, front to back, in small steps. It is cut
into passages of about four sequences each, and every passage draws a key from the seed. Those with the smallest keys
are kept, just enough of them that their text is sixteen times what is asked for; that is a uniform choice among all
passages, whatever the number of them. The kept passages are put into their old order, joined by the tokenizer's
end-of-text token where something lay between them, and cut into windows that do not overlap. The seed draws the
windows too.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import math
import os
import random
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Final

from shardprep_runtime.errors import InputError, WriteError, quote
from shardprep_runtime.shard.filesystem import sync_folder

from .texts import HUB, Text, Tokenizer, missing, open_text, words

CORPUS: Final = Path(__file__).with_name("corpus") / "corpus.jsonl"
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


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document, about as long as was asked for."""

    document: int
    number: int
    """Which of the document's pieces it is."""
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

    A text that is too short gives fewer sequences, and a note.

    Args:
        where: A .txt, .jsonl or .parquet file, a folder of such, hf://datasets/org/name[@revision][:config][/split], or
            None: a small text of our own, for trying.
        tokenizer: A folder with a tokenizer's files.
        samples: Sequences, at least 2.
        length: In tokens; the first is the one that the tokenizer begins texts with, where it does.
        seed: Any number; it draws passages and windows.
        column: Of a JSON line or a table, a text or a list of messages.

    Raises:
        InputError: For a text that cannot be read, or is not worth calibrating with.
        UnsupportedError: Where the library that reads it is not installed.
    """
    if samples < LEAST_SEQUENCES or samples * length < LEAST_TOKENS:
        raise InputError(
            f"{_of(samples, length)} tokens are too few to calibrate with: expected at least {LEAST_SEQUENCES} "
            f"sequences and {LEAST_TOKENS} tokens; {FEW_TOKENS:,} (128 x 256) or more are usual"
        )
    reader = Reader(load_tokenizer(tokenizer))
    body = length - len(reader.prefix)
    if body < 1:
        raise InputError(f"calibration sequences of {length} tokens are too short; expected at least 16")
    name = "the built-in text" if where is None else _shown(where)
    opened = open_text(where or CORPUS, "text" if where is None else column, reader.tokenizer)
    pool, needed = max(LEAST_POOL, POOL * samples * length), samples * body
    while True:
        whole, passages = _draw(opened.texts(), size=PASSAGE * length, pool=pool, seed=seed)
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

    Raises what `read_calibration` does.

    Args:
        where: As `read_calibration` takes it.
        tokenizer: A folder with a tokenizer's files.
        length: In tokens.
        limit: Tokens that are kept at most, from the start; None: all of what is read.
        column: Of a JSON line or a table, a text or a list of messages.
    """
    reader = Reader(load_tokenizer(tokenizer))
    body = length - len(reader.prefix)
    if body < 1 or length < 2:
        raise InputError(f"sequences of {length} tokens are too short to be predicted; expected at least 16")
    if limit is not None and limit < 2:
        raise InputError(f"{limit} tokens are too few to be predicted; expected at least 2")
    name = _shown(where)
    opened = open_text(where, column, reader.tokenizer)
    stream = reader.tokenize(_passages(opened.texts(), HELD_OUT_PASSAGE), most=limit)
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
    """Write JSON lines, a list of ids for each sequence. The file is whole or not there.

    Args:
        tokens: Whose `digest` is that of the bytes that are written.
        path: The file, in a folder that is there.

    Raises:
        WriteError: Where it cannot be written.
    """
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
        raise missing("transformers", "tokenizing text") from None
    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        found(["a"], verbose=False)
    except Exception as error:  # noqa: BLE001 - every kind of tokenizer raises classes of its own
        there = sorted({each.name for pattern in TOKENIZER_FILES for each in folder.glob(pattern)})
        raise InputError(
            f"{quote(folder)}: the tokenizer cannot be loaded from {', '.join(map(quote, there))} "
            f"({words(error)}); expected files that transformers reads without running code of theirs"
        ) from None
    return found


class Reader:
    """Makes tokens of text, by one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = _prefix(tokenizer)
        end, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
        self.end = [] if end is None else [end]
        self.unknown = None if unknown == end else unknown  # GPT-2's is its end of text

    def tokenize(self, passages: Iterable[Passage], *, most: int | None = None) -> array[int]:
        """One stream of ids, passages that do not follow each other apart by the tokenizer's end of text.

        Args:
            passages: In the order of the text.
            most: Ids after which it may stop.
        """
        stream, last = array("q"), None
        for batch in _batches(passages):
            texts = [passage.text for passage in batch]
            found = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            for passage, ids in zip(batch, found["input_ids"], strict=True):
                if last is not None and not passage.follows(last):
                    stream.extend(self.end)
                written = bool(self.prefix) and ids[: len(self.prefix)] == self.prefix  # by a chat template
                stream.extend(ids[len(self.prefix) :] if written else ids)
                last = passage
            if most is not None and len(stream) >= most:
                break
        return stream


def _draw(texts: Iterable[Text], *, size: int, pool: int, seed: int) -> tuple[bool, list[Passage]]:
    """(whether that is all there is, passages in their order): those of the smallest keys with `pool` characters."""
    keys = random.Random(f"passages {seed}")  # noqa: S311 - a fair draw, no secret
    kept: list[tuple[float, int, Passage]] = []
    total, whole = 0, True
    for place, passage in enumerate(_passages(texts, size)):
        heapq.heappush(kept, (-keys.random(), place, passage))
        total += len(passage.text)
        while total - len(kept[0][2].text) >= pool:
            total -= len(heapq.heappop(kept)[2].text)
            whole = False
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
    """What is doubtful about the tokens. Raises InputError where they are not worth computing with."""
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


def _shown(where: str | Path) -> str:
    return quote(where if str(where).startswith(HUB) else Path(where).name or where)


def _of(count: int, length: int) -> str:
    return f"{count:,} sequences of {length:,}"
