"""Tokens are chosen as transformers chooses them; text comes out whole, in order, and never beyond a stop string."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazily import torch, transformers
from shardprep_runtime.errors import InputError, WorkerError
from shardprep_runtime.workers.text.breakdown import Breakdown, breakdown_of, table
from shardprep_runtime.workers.text.generate import Text, check_prompt
from shardprep_runtime.workers.text.sampling import Sampler, Sampling, eos_of
from shardprep_runtime.workers.transport import Output, Timing

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason='needs transformers: pip install "shardprep[transformers]"'
)

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY)


# ------------------------------------------------------------------------------------------------------------ choosing
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number from 1 to"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0, expected a whole number"),
        ({"temperature": -0.5}, "temperature is -0.5, expected a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number from 0 to 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": "END"}, "stop: expected texts"),
        ({"stop": ("",)}, "stop: expected texts that are not empty"),
        ({"stop": ("x",) * 65}, "stop: more than 64"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: expected token ids"),
    ],
)
def test_a_sampling_that_is_out_of_range_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**given)


def test_the_greedy_token_is_the_likeliest() -> None:
    logits = torch.tensor([0.5, 3.0, -1.0, 2.9])
    assert Sampler(Sampling(), None, 1).choose([0], logits) == 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.3, 2]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
)
def test_draws_are_those_of_torch_with_the_same_seed(
    seed: int, temperature: float, top_p: float, top_k: int
) -> None:
    sampler = Sampler(
        Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed), None, prompt_length=1
    )
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    warpers = transformers.LogitsProcessorList()
    if temperature != 1:
        warpers.append(transformers.TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    before = torch.get_rng_state()
    found = [sampler.choose([0], each) for each in scores]
    assert torch.equal(torch.get_rng_state(), before), "other sequences draw from generators of their own"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wanted = [
            int(torch.multinomial(warpers(torch.tensor([[0]]), each[None]).softmax(-1), 1)) for each in scores
        ]
    assert found == wanted


def test_without_a_seed_no_two_sequences_draw_alike() -> None:
    flat = torch.zeros(1000)
    runs = {
        tuple(sampler.choose([0], flat) for _ in range(8))
        for sampler in (Sampler(Sampling(temperature=1), None, 1) for _ in range(4))
    }
    assert len(runs) == 4


def test_what_the_model_says_of_scores_is_kept_and_its_temperature_is_not() -> None:
    config = transformers.GenerationConfig(
        repetition_penalty=2.0, suppress_tokens=[3], begin_suppress_tokens=[2], temperature=9.0, top_k=1
    )
    sampler = Sampler(Sampling(), config, prompt_length=2)
    logits = torch.tensor([3.0, 2.0, 2.5, 9.0])
    assert sampler.choose([0, 1], logits) == 0  # 3 is never said, 2 not at first, 0 is now 1.5 and 1 is 1.0
    assert sampler.choose([0, 1, 0], logits) == 2


def test_scores_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(WorkerError, match="computes no numbers"):
        Sampler(Sampling(), None, 1).choose([0], torch.tensor([0.0, float("nan")]))


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    Sampler(Sampling(temperature=0.5, top_k=1, seed=0), None, 1).choose([0], logits)
    assert logits.tolist() == [1.0, 2.0, 3.0]


def test_ends_are_those_of_the_generation_config_before_those_of_the_config() -> None:
    first = transformers.GenerationConfig(eos_token_id=[5, 6])
    second = transformers.GenerationConfig(eos_token_id=7)
    assert eos_of(first, second) == [5, 6]
    assert eos_of(None, second) == [7]
    assert eos_of(None) == []


def test_prompts_that_the_model_cannot_take_are_refused() -> None:
    config = transformers.LlamaConfig(vocab_size=10, max_position_embeddings=8)
    check_prompt([1, 9], 6, config)
    for ids, message in (
        ([], "prompt: no tokens"),
        ([10], "a token id is not below 10, the size of the vocabulary"),
        ([-1], "a token id is not below 10"),
        (
            [1, 2, 3],
            "prompt of 3 tokens and max_tokens 6: together they exceed the 8 that the model was made for",
        ),
    ):
        with pytest.raises(InputError, match=message):
            check_prompt(ids, 6, config)


# ---------------------------------------------------------------------------------------------------------------- text
def pieces(text: Text, ids: list[int]) -> tuple[list[str], bool]:
    found: list[str] = []
    for each in ids:
        said, is_stopped = text.push(each)
        found.append(said)
        if is_stopped:
            return found, True
    return [*found, text.finish()], False


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_pieces_of_text_are_together_what_the_tokenizer_says(tokenizer: Any, written: str) -> None:
    ids = tokenizer(written).input_ids
    found, _ = pieces(Text(tokenizer), ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2047), max_size=24))
def test_tokens_that_are_no_text_give_what_the_tokenizer_says_too(tokenizer: Any, ids: list[int]) -> None:
    found, _ = pieces(Text(tokenizer), ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)


def test_no_piece_has_part_of_a_character(tokenizer: Any) -> None:
    written = "größer 日本語 🙂🏳️‍🌈 naïve"
    ids = tokenizer(written).input_ids
    assert len(ids) > len(written.split()) * 2
    found, _ = pieces(Text(tokenizer), ids)
    assert "".join(found) == written
    assert not any("\ufffd" in each for each in found)
    assert "" in found, "some tokens end within a character"


@settings(max_examples=150, deadline=None)
@given(
    written=st.text("abc ", min_size=1, max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_string_is_ever_said(tokenizer: Any, written: str, stops: list[str]) -> None:
    ids = tokenizer(written).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    found, is_stopped = pieces(Text(tokenizer, stops), ids)
    said = "".join(found)
    assert is_stopped == any(stop in whole for stop in stops)
    assert not any(stop in said for stop in stops)
    assert whole.startswith(said)
    if is_stopped:
        assert any(whole[len(said) :].startswith(stop) for stop in stops)
    else:
        assert said == whole


def test_what_may_become_a_stop_string_waits_until_it_has_not() -> None:
    class Letters:
        """A tokenizer of one letter each."""

        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids))

    text = Text(Letters(), ["END"])
    said = [text.push(ord(letter))[0] for letter in "aENbEN"]
    assert said == ["a", "", "", "ENb", "", ""]
    assert text.push(ord("D")) == ("", True)
    text = Text(Letters(), ["END"])
    assert [text.push(ord(letter))[0] for letter in "EEN"] == ["", "E", ""]
    assert text.finish() == "EN"


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = Text(None)
    assert text.push(5) == ("", False)
    assert text.finish() == ""


# ----------------------------------------------------------------------------------------------------------- breakdown
def test_what_is_left_of_a_trip_is_the_network() -> None:
    output = Output(
        torch.zeros(1), (Timing("a", 0.010, 0.001, 0.002), Timing("b", 0.020, 0.001, 0.002)), packing=0.001
    )
    found = breakdown_of(output, trip=0.050, sampling=0.003)
    assert found.compute == (0.010, 0.020)
    assert found.staging == pytest.approx(0.002)
    assert found.packing == pytest.approx(0.005)
    assert found.network == pytest.approx(0.013)
    assert found.total == pytest.approx(0.053)
    parts = sum(found.compute) + found.staging + found.packing + found.network + found.sampling
    assert parts == pytest.approx(found.total)


def test_the_table_has_medians_of_prefill_and_of_decode() -> None:
    def trip(seconds: float, *, is_prefill: bool = False) -> Breakdown:
        output = Output(torch.zeros(1), (Timing("a", seconds), Timing("b", 2 * seconds)))
        return breakdown_of(output, trip=4 * seconds, sampling=0, is_prefill=is_prefill)

    shown = table([trip(0.1, is_prefill=True), trip(0.001), None, trip(0.002), trip(0.030)])
    lines = {line[:19].strip(): line[19:].split() for line in shown.splitlines()}
    assert lines["compute of stage 0"] == ["100.00", "2.00"]
    assert lines["compute of stage 1"] == ["200.00", "4.00"]
    assert lines["network and waiting"] == ["100.00", "2.00"]
    assert lines["total"] == ["400.00", "8.00"]
    assert lines["trips"] == ["1", "3"]
    assert "drafting" not in lines
    assert table([None]) == "no trips\n"
