"""Decide what is fed to the pipeline, and when a completion ends: tokens and text of any number of prompts at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ...errors import InputError
from ..pipeline import OpenSequence, Pipeline
from .breakdown import Breakdown, breakdown_of, table
from .sampling import Sampler, Sampling, eos_of
from .speculative import Draft

__all__ = ["Breakdown", "Completion", "FinishReason", "Generator", "Sampling", "Token", "table"]

FinishReason = Literal["stop", "length"]

UNFINISHED: Final = "\ufffd"
"""What a decoder writes for bytes that are not a character, or not yet."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a completion."""

    id: int
    text: str
    """That can be said now. Bytes of a character that is not whole yet, and what may become a stop string, come with a
    later token; of a stop string, and of the token that ended the text, nothing comes."""
    finish_reason: FinishReason | None
    """Why the last token is the last: stop (the model has ended, or a stop was found) or length."""
    breakdown: Breakdown | None
    """Where the time went of the trip through the stages that gave it; None: it came with the token before it."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows a prompt."""

    text: str
    tokens: tuple[int, ...]
    """The one that ended it included."""
    prompt_tokens: int
    finish_reason: FinishReason
    trips: int
    """Through the stages."""
    breakdowns: tuple[Breakdown, ...] = ()
    """One for each trip."""


class Generator:
    """Completes prompts through a pipeline. Safe to use from several threads, whose sequences overlap in the stages.

    Args:
        tokenizer: Transformers'; without, prompts are token ids and no text comes out.
        config: The model's, for the size of its vocabulary and its most positions.
        generation_config: The model's: which tokens end a text, and what shapes the scores.
        draft: A pipeline over a small model with the same vocabulary, which guesses `draft_tokens` tokens that one trip
            through the stages then proves: the same tokens in fewer trips. Closed by whoever opened it.
        max_in_flight: Sequences at once; others wait for their turn.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: Any | None = None,
        *,
        config: Any | None = None,
        generation_config: Any | None = None,
        draft: Pipeline | None = None,
        draft_tokens: int = 5,
        max_in_flight: int = 8,
    ) -> None:
        if max_in_flight < 1:
            raise InputError(f"max_in_flight is {max_in_flight}, expected at least 1")
        self.pipeline = pipeline
        self.tokenizer = tokenizer
        self.max_in_flight = max_in_flight
        self._config = config.get_text_config() if config is not None else None
        self._generation_config = generation_config
        self._ends = frozenset(eos_of(generation_config, self._config))
        self._draft = Draft(draft, draft_tokens) if draft is not None else None
        self._turns = threading.BoundedSemaphore(max_in_flight)

    @classmethod
    def from_folder(cls, pipeline: Pipeline, folder: Path, **options: Any) -> Generator:
        """Take config, generation config and tokenizer from a folder, as far as it has them.

        Args:
            folder: Side files of the shard set that the pipeline runs.
            options: The other arguments of this class.
        """
        import transformers

        auto: Any = transformers
        found: dict[str, Any] = {"config": auto.AutoConfig.from_pretrained(folder)}
        if (folder / "generation_config.json").is_file():
            found["generation_config"] = auto.GenerationConfig.from_pretrained(folder)
        if any(
            (folder / name).is_file()
            for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        ):
            found["tokenizer"] = auto.AutoTokenizer.from_pretrained(folder)
        return cls(pipeline, **found, **options)

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a prompt and what follows it together; None: the model names no limit."""
        found: int | None = getattr(self._config, "max_position_embeddings", None)
        return found

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt. Raises InputError for a text where there is no tokenizer."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise InputError("prompt: this model came without a tokenizer; give token ids")
        found: list[int] = self.tokenizer(prompt).input_ids
        return found

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Iterator[Token]:
        """Generate tokens, as they come. Closing the iterator ends the sequence.

        Args:
            prompt: A text, or ids of tokens.
            sampling: How tokens are chosen; default: the likeliest, 16 of them.

        Raises:
            InputError: At once, for what the model cannot take.
        """
        sampling = sampling or Sampling()
        ids = self.encode(prompt)
        self._check(ids, sampling)
        return self._tokens(ids, sampling)

    @contextmanager
    def together(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None
    ) -> Iterator[list[Iterator[Token]]]:
        """Generate from several prompts, all in flight together, until the end of the `with`.

        Args:
            prompts: Texts, or ids of tokens.
            sampling: How tokens are chosen. With a seed, each text is drawn as if it were alone.

        Yields:
            The tokens of each prompt, as they come; they are kept for whoever asks later.

        Raises:
            InputError: At once, for what the model cannot take.
        """
        streams = [self.stream(each, sampling) for each in prompts]  # refuses before anything begins
        said: list[queue.SimpleQueue[Token | BaseException | None]] = [queue.SimpleQueue() for _ in streams]
        is_over = threading.Event()

        def run(index: int) -> None:
            try:
                for token in streams[index]:
                    said[index].put(token)
                    if is_over.is_set():
                        return
                said[index].put(None)
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for the tokens
                said[index].put(error)

        def heard(index: int) -> Iterator[Token]:
            while (found := said[index].get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found

        threads = ThreadPoolExecutor(
            min(len(streams), self.max_in_flight) or 1, thread_name_prefix="shardprep-generate"
        )
        waits = True
        try:
            for index in range(len(streams)):
                threads.submit(run, index)
            yield [heard(index) for index in range(len(streams))]
        except (KeyboardInterrupt, SystemExit):  # waits for nobody: a step that hangs ends with the pipeline
            waits = False
            raise
        finally:
            is_over.set()
            threads.shutdown(waits, cancel_futures=True)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None
    ) -> list[Completion]:
        """Complete prompts, all in flight together; the completions, in the order of the prompts.

        Args:
            prompts, sampling: As `together` has them.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        with self.together(encoded, sampling) as streams:
            return [
                completion_of(list(stream), len(ids)) for stream, ids in zip(streams, encoded, strict=True)
            ]

    # -------------------------------------------------------------------------------------------------------- one text
    def _check(self, ids: Sequence[int], sampling: Sampling) -> None:
        check_prompt(ids, sampling.max_tokens, self._config)
        if sampling.stop and self.tokenizer is None:
            raise InputError("stop: this model came without a tokenizer; use stop_token_ids")
        if self._draft is not None and not sampling.is_greedy:
            raise InputError(
                f"temperature is {sampling.temperature:g}, and a draft model was given: its guesses are proved by the "
                "likeliest token, so only a temperature of 0 gives the same tokens as without it"
            )

    def _tokens(self, ids: list[int], sampling: Sampling) -> Iterator[Token]:
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._ends)
        text = Text(self.tokenizer, sampling.stop)
        sampler = Sampler(sampling, self._generation_config, len(ids))
        with self._turns, self.pipeline.sequence() as sequence:
            if self._draft is not None:
                trips = self._draft.tokens(sequence, ids, sampler, sampling.max_tokens)
            else:
                trips = plain_tokens(sequence, ids, sampler)
            for count, (token, breakdown) in enumerate(trips, 1):
                said, is_stopped = ("", True) if token in ends else text.push(token)
                is_last = count == sampling.max_tokens
                if is_last or token in ends:
                    said += text.finish()
                reason: FinishReason | None = "stop" if is_stopped else "length" if is_last else None
                yield Token(token, said, reason, breakdown)
                if reason is not None:
                    return


def plain_tokens(
    sequence: OpenSequence, ids: Sequence[int], sampler: Sampler
) -> Iterator[tuple[int, Breakdown]]:
    """Generate token after token, each by a trip of its own, without end.

    Args:
        sequence: What the stages hold; the tokens are fed to it.
        ids: The prompt.
        sampler: Chooses the tokens.
    """
    import torch

    known = list(ids)
    fed = 0
    while True:
        logits = sequence.feed(torch.tensor([known[fed:]]))
        began = time.perf_counter()
        is_prefill, fed = fed == 0, len(known)
        token = sampler.choose(known, logits[0, -1])
        known.append(token)
        assert sequence.output is not None
        yield (
            token,
            breakdown_of(
                sequence.output,
                trip=sequence.seconds,
                sampling=time.perf_counter() - began,
                recovery=sequence.recovery,
                is_prefill=is_prefill,
            ),
        )


def completion_of(tokens: Sequence[Token], prompt_tokens: int) -> Completion:
    """Make one completion of all tokens of a stream.

    Args:
        tokens: Those of a stream that has ended.
        prompt_tokens: How many its prompt had.
    """
    reason = tokens[-1].finish_reason
    assert reason is not None, "the stream has not ended"
    breakdowns = tuple(each.breakdown for each in tokens if each.breakdown is not None)
    return Completion(
        text="".join(each.text for each in tokens),
        tokens=tuple(each.id for each in tokens),
        prompt_tokens=prompt_tokens,
        finish_reason=reason,
        trips=len(breakdowns),
        breakdowns=breakdowns,
    )


def check_prompt(tokens: Sequence[int], max_tokens: int, config: Any | None) -> None:
    """Refuse a prompt that a model cannot take.

    Args:
        tokens: Ids.
        max_tokens: How many are to follow.
        config: The model's; None: only what no model can take is refused.

    Raises:
        InputError: For a prompt that is empty, has ids that are not in the vocabulary, or is too long.
    """
    if not tokens:
        raise InputError("prompt: no tokens")
    size = getattr(config, "vocab_size", None)
    if not all(type(each) is int and each >= 0 and (size is None or each < size) for each in tokens):
        raise InputError(f"prompt: a token id is not below {size}, the size of the vocabulary")
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and len(tokens) + max_tokens > most:
        raise InputError(
            f"prompt of {len(tokens)} tokens and max_tokens {max_tokens}: together they exceed the {most} that the "
            "model was made for"
        )


class Text:
    """The text of tokens that come one by one: all of it together is what the tokenizer decodes of all tokens at once,
    up to the first stop string."""

    def __init__(self, tokenizer: Any | None, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        # how a token reads depends on the one before it (a word's first space), so some that were said are decoded
        # again with what is new: those from _from to _said
        self._from = self._said = 0
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """What can be said after this token, and whether a stop string was found."""
        if self._tokenizer is None:
            return "", False
        self._ids.append(token)
        before, now = self._decode(self._said), self._decode()
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return "", False
        self._from, self._said = self._said, len(self._ids)
        return self._sift(now[len(before) :])

    def finish(self) -> str:
        """What was held back."""
        rest = self._decode()[len(self._decode(self._said)) :] if self._tokenizer is not None else ""
        held, self._held = self._held + rest, ""
        self._from = self._said = len(self._ids)
        return held

    def _decode(self, stop: int | None = None) -> str:
        assert self._tokenizer is not None
        ids = self._ids[self._from : stop]
        found: str = self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return found

    def _sift(self, new: str) -> tuple[str, bool]:
        held = self._held + new
        found = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` may begin."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
