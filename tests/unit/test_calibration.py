"""Tokens for calibration: which are drawn from which text, and which text is refused or doubted."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shardprep.quantize import calibration, texts
from shardprep.quantize.calibration import (
    CORPUS,
    Passage,
    Tokens,
    read_calibration,
    read_heldout,
    write_tokens,
)
from shardprep.quantize.texts import Text, parse_dataset
from shardprep_runtime.errors import FormatError, InputError, MissingError, UnsupportedError, WriteError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("transformers, too"),
]  # one process that has imported transformers

LLAMA = Path(__file__).parent.parent / "data" / "tiny-llama"
BOS, EOS = 0, 1
LOADED = functools.cache(calibration.load_tokenizer)
HELD_OUT = LLAMA / "heldout.txt"
PROSE = " ".join(
    random.Random(0).choices(HELD_OUT.read_text().split(), k=6000)
)  # no line of it comes again, and it has some 20,000 tokens


def calibrate(where: str | Path | None, tokenizer: Path = LLAMA, **options: Any) -> Tokens:
    return read_calibration(
        where,
        tokenizer,
        **{"samples": 8, "length": 128, "seed": 0, **options},  # type: ignore[arg-type]
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(PROSE)
    return path


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens are the words w0 to w9999, 2 to 10001; it begins texts with nothing."""
    vocabulary = {"<unk>": 0, "<end>": 1, **{f"w{number}": number + 2 for number in range(10_000)}}
    core = Core(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama's tokenizer with a chat template, which begins with <s> as most do and refuses a role."""
    folder = tmp_path_factory.mktemp("chat")
    config = json.loads((LLAMA / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((LLAMA / "tokenizer.json").read_bytes())
    return folder


def decode(ids: Any, folder: Path = LLAMA) -> str:
    return str(PreTrainedTokenizerFast.from_pretrained(folder).decode(list(ids), skip_special_tokens=False))


# what is drawn


def test_the_seed_decides_and_nothing_else(text: Path, tmp_path: Path) -> None:
    first = calibrate(text)
    assert first == calibrate(text)
    other = calibrate(text, seed=1)
    assert other.digest != first.digest
    assert set(other.sequences) != set(first.sequences)
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"body": PROSE}) + "\n")
    assert calibrate(lines, column="body").sequences == first.sequences


def test_ids_are_the_same_on_every_machine() -> None:
    """Frozen: a report's digest must mean the same text in the next version."""
    found = calibrate(None, samples=128, length=256)
    assert found.digest == "sha256:f962be004e4966648fbe634d79587a6a578f37dcb72c19e7d60761c3ed404461"


def test_sequences_have_exactly_the_length_and_begin_as_the_tokenizer_begins_texts(text: Path) -> None:
    found = calibrate(text)
    assert [len(each) for each in found.sequences] == [128] * 8
    assert all(each[0] == BOS and BOS not in each[1:] for each in found.sequences)
    assert found.count == 1024
    assert found.distinct == len({token for each in found.sequences for token in each})
    everything = decode(PreTrainedTokenizerFast.from_pretrained(LLAMA)(PROSE)["input_ids"][1:])
    for each in found.sequences:
        assert decode(each[1:]) in everything


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 1500), min_size=1, max_size=6),
    samples=st.integers(4, 40),
    length=st.integers(64, 300),
    seed=st.integers(0, 2**64),
    pool=st.sampled_from([500, 5000, 2**20]),
)
def test_windows_do_not_overlap_and_hold_nothing_but_the_text(
    words: Path, tmp_path: Path, lengths: list[int], samples: int, length: int, seed: int, pool: int
) -> None:
    """Every word is there once, so that a word that comes twice was taken twice."""
    path = tmp_path / "documents.jsonl"
    ends, at, documents = set(), 0, []
    for size in lengths:
        documents.append(" ".join(f"w{number}" for number in range(at, at + size)))
        at += size
        ends.add(at + 1)  # the id of a document's last word
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    available = at + sum(size > 0 for size in lengths) - 1  # and an end between each two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "LEAST_POOL", pool)
        patch.setattr(calibration, "POOL", 1)
        patch.setattr(calibration, "load_tokenizer", LOADED)
        in_windows = available // length * length
        if samples * length < 512 or in_windows < max(512, 2 * length):
            with pytest.raises(InputError, match=r"too (few|little) to calibrate with"):
                calibrate(path, words, samples=samples, length=length, seed=seed)
            return
        found = calibrate(path, words, samples=samples, length=length, seed=seed)
    assert {len(each) for each in found.sequences} == {length}
    taken = [token for each in found.sequences for token in each if token != 1]
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(range(2, at + 2))
    whole = pool == 2**20
    if whole:
        assert len(found.sequences) == min(samples, available // length)
    for each in found.sequences:
        for one, two in pairwise(each):
            if two == 1:  # what ends a text: a document, or a passage behind which one was left out
                assert one in ends or not whole
            elif one != 1:
                assert two == one + 1


@given(texts=st.lists(st.tuples(st.integers(0, 3), st.text("ab \n", max_size=80))), size=st.integers(1, 40))
def test_passages_are_the_documents_in_pieces(texts: list[tuple[int, str]], size: int) -> None:
    given_texts = [Text(number, each) for number, each in sorted(texts, key=lambda pair: pair[0])]
    found = list(calibration._passages(given_texts, size))
    assert all(0 < len(each.text) <= size and each.text.strip() for each in found)
    for document in range(4):
        pieces = [each for each in found if each.document == document]
        numbers = [each.number for each in pieces]
        assert numbers == sorted(set(numbers))
        joined = "".join(each.text for each in given_texts if each.document == document)
        assert "".join("".join(each.text for each in pieces).split()) == "".join(joined.split())
        at = 0
        for each in pieces:
            at = joined.index(each.text, at) + len(each.text)


def test_every_passage_is_drawn_equally_often() -> None:
    texts = [Text(number, f"{number:>10}") for number in range(20)]
    drawn: Counter[str] = Counter()
    for seed in range(400):
        whole, found = calibration._draw(texts, size=100, pool=50, seed=seed)
        assert not whole
        assert len(found) == 5
        assert [each.document for each in found] == sorted(each.document for each in found)
        drawn.update(each.text for each in found)
    assert len(drawn) == 20
    assert all(60 <= count <= 140 for count in drawn.values())  # 100 expected, standard deviation 8.7


def test_a_larger_pool_keeps_what_a_smaller_one_had() -> None:
    texts = [Text(number, "x" * 10) for number in range(50)]
    small, large = (
        {each.document for each in calibration._draw(texts, size=100, pool=pool, seed=3)[1]}
        for pool in (60, 200)
    )
    assert small < large


def test_text_of_few_tokens_a_character_is_read_until_it_suffices(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "LEAST_POOL", 1)
    path = tmp_path / "wide.txt"
    path.write_text((" " * 200).join(f"w{number}" for number in range(3000)))
    found = calibrate(path, words, samples=8, length=256)
    assert len(found.sequences) == 8
    assert not any("instead of" in note for note in found.notes)


def test_documents_are_set_apart_by_the_end_of_text(words: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": " ".join(f"w{number}" for number in range(start, start + 600))}) + "\n\n"
            for start in (0, 600)
        )
    )
    (whole,) = read_heldout(path, words, length=2000).sequences
    assert whole == (*range(2, 602), 1, *range(602, 1202))


# what is read


def test_a_folder_is_read_in_natural_order_and_says_what_it_left_out(words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(
        ("part-2.txt", "part-10.jsonl", "part-9.txt", ".hidden.txt", "picture.png")
    ):
        body = " ".join(f"w{at}" for at in range(number * 400, number * 400 + 400))
        (folder / name).write_text(json.dumps({"text": body}) if name.endswith("jsonl") else body)
    (folder / "more.txt").mkdir()
    found = read_heldout(folder, words, length=5000)
    assert found.sequences == ((*range(2, 402), 1, *range(802, 1202), 1, *range(402, 802)),)
    assert found.source == "texts"
    assert any("3 not read as text: .hidden.txt, more.txt, picture.png" in note for note in found.notes)


@pytest.mark.parametrize("column", ["text", "body"])
def test_a_table_is_read_as_json_lines_are(tmp_path: Path, column: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    bodies = [PROSE[at : at + 700] for at in range(0, len(PROSE), 700)]
    lines, table = tmp_path / "t.jsonl", tmp_path / "t.parquet"
    lines.write_text("".join(json.dumps({"id": 1, column: each}) + "\n" for each in [*bodies, None]))
    columns = pyarrow.table({"id": list(range(len(bodies) + 1)), column: [*bodies, None]})
    parquet.write_table(columns, table, row_group_size=7)
    assert calibrate(table, column=column).sequences == calibrate(lines, column=column).sequences


def test_conversations_go_through_the_chat_template(chat: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    conversations = [
        [
            {"role": "user", "content": PROSE[at : at + 300]},
            {"role": "assistant", "content": PROSE[at + 300 : at + 700]},
        ]
        for at in range(0, 7000, 700)
    ]
    lines, table = tmp_path / "c.jsonl", tmp_path / "c.parquet"
    lines.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    parquet.write_table(pyarrow.table({"messages": conversations}), table)
    found = read_heldout(lines, chat, length=100_000)
    (sequence,) = found.sequences
    assert sequence.count(BOS) == 1  # the template's own are not doubled, nor left where texts meet
    shown = decode(sequence, chat)
    assert shown.startswith(f"<s>[user]{PROSE[:300]}</s>[assistant]{PROSE[300:700]}</s></s>[user]")
    assert read_heldout(table, chat, length=100_000).sequences == found.sequences


def test_without_a_template_a_conversation_is_told_by_its_roles(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    parts = [{"type": "image"}, {"type": "text", "text": PROSE[:3000]}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": PROSE[3000:6000]}]
    path.write_text(json.dumps({"chat": talk}))
    (sequence,) = read_heldout(path, LLAMA, length=100_000, column="chat").sequences
    assert decode(sequence) == f"<s>user: {PROSE[:3000]}\n\nassistant: {PROSE[3000:6000]}"


def test_objects_of_a_file_need_not_be_alike(words: Path, tmp_path: Path) -> None:
    path, own = tmp_path / "t.jsonl", [None, 1, 1.5, "x", ["x"], {"a": 1}, {"a": "1", "b": 2}]
    lines = [
        {"text": " ".join(f"w{number}" for number in range(at * 200, at * 200 + 200)), "own": own[at % 7]}
        for at in range(14)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "w9", "late": 1}]))
    (found,) = read_heldout(path, words, length=5000).sequences
    assert [token for token in found if token != 1] == [*range(2, 2802), 11]


def test_halves_of_characters_marks_of_byte_order_and_ends_of_lines_do_no_harm(
    text: Path, tmp_path: Path
) -> None:
    halves = tmp_path / "t.jsonl"
    halves.write_text('{"text": "\\ud83d ' + PROSE.replace("\\", "/").replace('"', "'") + '"}')
    assert len(calibrate(halves).sequences) == 8
    marked = tmp_path / "marked.txt"
    marked.write_text(PROSE, encoding="utf-8-sig")
    assert calibrate(marked).digest == calibrate(text).digest
    lines = [PROSE[at : at + 500] for at in range(0, len(PROSE), 500)]
    digests = set()
    for end in ("\n", "\r\n"):
        (tmp_path / "lines.txt").write_bytes(end.join(lines).encode())
        digests.add(calibrate(tmp_path / "lines.txt").digest)
    assert len(digests) == 1


def test_a_file_is_read_without_the_network_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own, in which nothing else has asked the network or filled a cache."""
    (tmp_path / "x::[a]*.jsonl").write_text(json.dumps({"text": PROSE}))
    code = (
        "import socket, sys, tempfile\nfrom pathlib import Path\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from shardprep.quantize.calibration import read_calibration\n"
        "read_calibration(sys.argv[1], Path(sys.argv[2]), samples=8, length=128, seed=0)\n"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    own = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "temporary", "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x::[a]*.jsonl", LLAMA],
        env={**environment, **{name: str(value) for name, value in own.items()}},
        check=True,
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "x::[a]*.jsonl"]


def test_no_more_is_read_than_the_bound(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "READ", 9000)
    path = tmp_path / "t.jsonl"
    documents = [" ".join(f"w{number}" for number in range(at, at + 100)) for at in range(0, 9000, 100)]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    for found in (calibrate(path, words), read_heldout(path, words, length=128)):
        (_,) = [note for note in found.notes if "only the first 9,000 characters were read" in note]
        assert max(token for each in found.sequences for token in each) < 2000


def test_the_text_for_evaluation_is_whole_and_in_order() -> None:
    expected = PreTrainedTokenizerFast.from_pretrained(LLAMA)(HELD_OUT.read_text())["input_ids"][1:]
    found = read_heldout(HELD_OUT, LLAMA, length=256)
    assert [token for each in found.sequences for token in each[1:]] == expected
    assert {each[0] for each in found.sequences} == {BOS}
    assert {len(each) for each in found.sequences[:-1]} == {256}
    assert found.source == "heldout.txt"
    assert found.notes == ()


@pytest.mark.parametrize(
    ("limit", "lengths"),
    [(3, [3]), (1024, [256] * 4), (1026, [256] * 4 + [2]), (1025, [256] * 4), (600, [256, 256, 88])],
)
def test_a_limit_cuts_the_text_for_evaluation(limit: int, lengths: list[int]) -> None:
    found = read_heldout(HELD_OUT, LLAMA, length=256, limit=limit)
    assert [len(each) for each in found.sequences] == lengths
    assert any("tokens are few to measure on" in note for note in found.notes)


# the built-in text


def test_the_built_in_text_holds_nothing_that_the_tests_measure_on() -> None:
    held_out = {line.strip() for line in HELD_OUT.read_text().splitlines() if len(line.strip()) >= 20}
    documents = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    assert len(documents) == 21
    for document in documents:
        lines = [line.strip() for line in document["text"].splitlines()]
        assert held_out.isdisjoint(lines), document["origin"]
    assert 200_000 < CORPUS.stat().st_size < 300_000
    assert (
        "sha256 `" + hashlib.sha256(CORPUS.read_bytes()).hexdigest()
        in CORPUS.with_name("README.md").read_text()
    )
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in CORPUS.with_name("LICENSE").read_text()


def test_the_built_in_text_suffices_for_trying_and_says_what_it_is() -> None:
    found = calibrate(None, samples=128, length=256, column="body")  # which is for texts of one's own
    assert (len(found.sequences), found.count, found.source) == (128, 32768, "built-in")
    assert [note for note in found.notes if "is for trying" in note] == list(found.notes)


# what is doubtful


def test_a_short_text_gives_fewer_sequences_and_says_so(text: Path) -> None:
    found = calibrate(text, samples=1000)
    assert 100 < len(found.sequences) < 1000
    assert any(
        f"only {len(found.sequences)} sequences of 128 instead of 1,000" in note for note in found.notes
    )
    assert any(f"{found.count:,} tokens are few to calibrate with; 32,768" in note for note in found.notes)


def doubts(tokens: list[int], unknown: int | None = 0) -> list[str]:
    return calibration._examine([tokens], unknown, "t.txt")


def test_ordinary_tokens_raise_no_doubt() -> None:
    assert doubts(random.Random(0).choices(range(1, 1000), k=20_000)) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0] * 900 + list(range(1, 700)), "56% of 1,599 tokens are unknown to the tokenizer"),
        ([1, 2, 3, 4] * 1000, "4 different tokens in 4,000, 2.0 bits a token; too uniform"),
        (list(range(1, 60)) * 40, "the same again and again: 2.5% of all runs of 8 tokens are different"),
    ],
)
def test_useless_tokens_are_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(InputError, match=r"t\.txt: ") as refused:
        doubts(tokens)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0] * 100 + list(range(1, 901)), "10.0% of 1,000 tokens are unknown"),
        (
            random.Random(0).choices(range(1, 13), k=2000),
            "little variety: 12 different tokens in 2,000, 3.6 bits",
        ),
        (random.Random(0).choices(range(1, 200), k=20_000), "little variety: 199 different tokens in 20,000"),
        (list(range(1, 1000)) * 3, "repeats itself: 33% of all runs of 8 tokens are different"),
    ],
)
def test_doubtful_tokens_are_told_with_numbers(tokens: list[int], message: str) -> None:
    (note,) = doubts(tokens)
    assert message in note


def test_one_line_again_and_again_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 2000)
    with pytest.raises(InputError, match=r"lines\.txt: the same again and again"):
        calibrate(path)
    with pytest.raises(InputError, match="the same again and again"):
        read_heldout(path, LLAMA, length=128)


def test_a_language_that_the_tokenizer_does_not_know_is_refused(words: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(" ".join(f"w{number} was ist das" for number in range(2000)))
    with pytest.raises(InputError, match="75% of 1,024 tokens are unknown"):
        calibrate(path, words)


# what is refused


@pytest.mark.parametrize("body", ["", " \n" * 500, "a few words", PROSE[:1200]])
def test_too_little_text_is_refused_with_numbers(tmp_path: Path, body: str) -> None:
    path = tmp_path / "t.txt"
    path.write_text(body)
    with pytest.raises(
        InputError, match=r"t\.txt: [\d,]+ tokens, \d sequences of 128; too little"
    ) as refused:
        calibrate(path)
    assert "expected 8 sequences of 128, and not less than 512 tokens in 2 sequences" in str(refused.value)


def test_too_few_or_too_short_sequences_are_refused(text: Path) -> None:
    with pytest.raises(
        InputError, match="1 sequences of 128 tokens are too few to calibrate with: expected at least 2"
    ):
        calibrate(text, samples=1)
    with pytest.raises(InputError, match="8 sequences of 63 tokens are too few"):
        calibrate(text, length=63)
    with pytest.raises(InputError, match="sequences of 1 tokens are too short"):  # that is <s> alone
        calibrate(text, samples=512, length=1)
    with pytest.raises(InputError, match="0 sequences of 100,000; too little"):
        calibrate(text, length=100_000)
    with pytest.raises(InputError, match="sequences of 1 tokens are too short to be predicted"):
        read_heldout(text, LLAMA, length=1)
    with pytest.raises(InputError, match="1 tokens are too few to be predicted"):
        read_heldout(text, LLAMA, length=128, limit=1)


def test_an_empty_text_for_evaluation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n")
    with pytest.raises(InputError, match=r"t\.txt: 0 tokens; too little to measure on"):
        read_heldout(path, LLAMA, length=128)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"abc\xffdef", "not UTF-8; save it as UTF-8"),
        ("t.txt", "wide".encode("utf-16-le"), "holds NUL characters: UTF-16 or no text"),
        ("t.csv", b"a,b", "expected a .txt, .jsonl or .parquet file"),
        ("t.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON (Expecting value"),
        ("t.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("t.jsonl", b"[" * 100_000, "line 1: not JSON ("),
        ("t.jsonl", b'["text"]', "line 1: expected an object, found a list"),
        (
            "t.jsonl",
            b'{"body": "a", "id": 3}',
            "line 1: no text and no messages; found body, id; name the one",
        ),
        ("t.jsonl", b"{}", "line 1: no text and no messages; found nothing"),
        ("t.jsonl", b'\n\n{"text": 3}', "line 3: a value of type int; expected a text or a list of messages"),
        ("t.jsonl", b'{"text": ["a"]}', 'message 0 is not {"role": a text, "content": a text}; found a text'),
        ("t.jsonl", b'{"messages": [{"from": "x", "value": "y"}]}', "found an object with from, value"),
        (
            "t.jsonl",
            b'{"messages": [{"role": "tool", "content": "y"}]}',
            "refused by the tokenizer's chat template",
        ),
        ("t.parquet", b"PAR1 and then nothing", "cannot be read as parquet ("),
        ("t.parquet", b"", "cannot be read as parquet ("),
    ],
)
def test_text_that_cannot_be_read_is_refused(
    chat: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        calibrate(path, chat)
    assert message in str(refused.value)
    assert name in str(refused.value)


def test_a_table_without_the_column_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"body": ["a"], "number": [1]}), path)
    with pytest.raises(InputError, match=r"t\.parquet: no text and no messages; found body, number"):
        calibrate(path)
    with pytest.raises(InputError, match=r"t\.parquet: row 1: a value of type int"):
        calibrate(path, column="number")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no such file or folder; text is read from \.txt, \.jsonl or \.parquet"
    ):
        calibrate(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no \.txt, \.jsonl or \.parquet file in this folder"):
        calibrate(tmp_path)


def test_a_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.txt")
    with pytest.raises(FormatError, match="not a regular file"):
        calibrate(tmp_path / "t.txt")


def _nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this was run')\n")
    auto = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_nothing, "no tokenizer; none of tokenizer.json, tokenizer.model"),
        (_damaged, "cannot be loaded from tokenizer.json, tokenizer_config.json ("),
        (_own_code, "without running code of theirs"),
    ],
)
def test_a_tokenizer_that_is_missing_or_broken_is_refused(
    tmp_path: Path, text: Path, write: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    with pytest.raises(InputError) as refused:
        calibrate(text, folder)
    assert message in str(refused.value)
    with pytest.raises(InputError, match="no such folder"):
        calibrate(text, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("library", "where"),
    [("transformers", "t.txt"), ("datasets", "t.txt"), ("datasets", "hf://datasets/org/name")],
)
def test_a_library_that_is_not_installed_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, where: str
) -> None:
    (tmp_path / where.rpartition("/")[2]).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnsupportedError, match=r"pip install 'shardprep\[quantize\]'"):
        calibrate(where if ":" in where else tmp_path / where)


# the hub


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://datasets/org/name", ("org/name", None, None, "train")),
        ("hf://datasets/org/name@v1:english/test", ("org/name", "v1", "english", "test")),
        ("hf://datasets/org/name/validation", ("org/name", None, None, "validation")),
        ("hf://datasets/o/n@refs/convert/parquet:en", ("o/n", "refs/convert/parquet", "en", "train")),
        ("hf://datasets/o/n@a%2Fb", ("o/n", "a/b", None, "train")),
    ],
)
def test_a_data_set_is_named_by_its_uri(uri: str, expected: tuple[str | None, ...]) -> None:
    assert parse_dataset(uri) == dict(zip(("path", "revision", "name", "split"), expected, strict=True))


@pytest.mark.parametrize(
    "rest", ["", "name", "org/name/", "org/name/train/more", "org/name@", "org/na me", "o/n:"]
)
def test_other_uris_of_data_sets_are_refused(rest: str) -> None:
    with pytest.raises(
        InputError, match=r"expected hf://datasets/org/name\[@revision\]\[:config\]\[/split\]"
    ):
        calibrate(f"hf://datasets/{rest}")


def test_no_data_set_is_fetched_where_the_hub_must_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="the hub is not asked"):
        calibrate("hf://datasets/org/name")


# what is written


def test_the_file_for_engines_is_json_lines_and_the_digest_is_of_its_bytes(
    text: Path, tmp_path: Path
) -> None:
    found = calibrate(text)
    path = tmp_path / "calibration.jsonl"
    write_tokens(found, path)
    assert tuple(tuple(json.loads(line)) for line in path.read_text().splitlines()) == found.sequences
    assert f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == found.digest
    assert sorted(each.name for each in tmp_path.iterdir()) == ["calibration.jsonl", "text.txt"]


def test_a_file_that_cannot_be_written_leaves_no_trace(text: Path, tmp_path: Path) -> None:
    found = calibrate(text)
    folder = tmp_path / "out"
    (folder / "calibration.jsonl").mkdir(parents=True)
    with pytest.raises(WriteError, match="cannot be written"):
        write_tokens(found, folder / "calibration.jsonl")
    assert [each.name for each in folder.iterdir()] == ["calibration.jsonl"]
    with pytest.raises(WriteError, match="cannot be written"):
        write_tokens(found, tmp_path / "nowhere" / "calibration.jsonl")


def test_passages_follow_each_other_only_within_a_document() -> None:
    first = Passage(1, 0, "a")
    assert Passage(1, 1, "b").follows(first)
    assert not Passage(1, 2, "c").follows(first)
    assert not Passage(2, 1, "d").follows(first)
