"""Decide which token follows, as transformers' `generate` does: greedy, or drawn after its own logits processors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ...errors import InputError, WorkerError

if TYPE_CHECKING:
    import torch

MOST_STOPS: Final = 64
"""Stop strings, or stop tokens, that one request may have."""

COLDEST: Final = 1e-5
"""A temperature below this is 0: scores divided by it are not numbers any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when that ends. Raises InputError for what is out of range.

    temperature  0: the likeliest token (greedy)
    top_k        of that many likeliest tokens; 0: of all
    top_p        of the likeliest that together have this probability
    seed         of the draws; default: any. Equal to `torch.manual_seed(seed)` before transformers' `generate`
    stop         texts before which the completion ends
    ignore_eos   go on where the model would end
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_tokens", 1, 10**6),
            ("top_k", 0, 10**9),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if (name, value) != ("seed", None) and (type(value) is not int or not least <= value <= most):
                raise InputError(f"{name} is {value!r}, expected a whole number from {least} to {most}")
        for name, highest in (("temperature", 100.0), ("top_p", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
                raise InputError(f"{name} is {value!r}, expected a number from 0 to {highest:g}")
        if isinstance(self.stop, str) or not all(isinstance(each, str) and each for each in self.stop):
            raise InputError("stop: expected texts that are not empty")
        if not all(type(each) is int and each >= 0 for each in self.stop_token_ids):
            raise InputError("stop_token_ids: expected token ids")
        if max(len(self.stop), len(self.stop_token_ids)) > MOST_STOPS:
            raise InputError(f"stop: more than {MOST_STOPS} are asked for")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, sampling: Sampling, generation_config: Any | None, prompt_length: int) -> None:
        """`generation_config`: the model's, of which what shapes the scores is kept (a penalty for repetition, tokens
        that are never said), not its temperature, top_p and top_k: those are the request's."""
        import torch

        self._is_greedy = sampling.is_greedy
        self._processors = [*_shapers(generation_config, prompt_length), *_warpers(sampling)]
        self._generator: torch.Generator | None = None
        if not self._is_greedy:
            seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(7), "big")
            self._generator = torch.Generator().manual_seed(seed)

    def choose(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        """Choose the next token.

        Args:
            ids: All tokens before it, prompt included.
            logits: What the model gives for the next, [vocabulary].
        """
        import torch

        scores = logits.to(copy=True, dtype=torch.float32)[None]
        if bool(torch.isnan(scores).any()):
            raise WorkerError("the model computes no numbers (NaN); its weights, or its dtype, are not right")
        if self._processors:
            before = torch.tensor([ids])
            for process in self._processors:
                scores = process(before, scores)
        if self._is_greedy:
            return int(torch.argmax(scores, dim=-1))
        chances = torch.nn.functional.softmax(scores, dim=-1)
        return int(torch.multinomial(chances, num_samples=1, generator=self._generator))


def _shapers(config: Any | None, prompt_length: int) -> list[Any]:
    """transformers' processors of a generation_config that act whether tokens are drawn or not, in its order."""
    if config is None:
        return []
    import transformers

    def asked(name: str) -> Any:
        return getattr(config, name, None)

    found: list[Any] = []
    if asked("sequence_bias") is not None:
        found.append(transformers.SequenceBiasLogitsProcessor(config.sequence_bias))
    if asked("repetition_penalty") not in (None, 1.0):
        found.append(transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if asked("no_repeat_ngram_size"):
        found.append(transformers.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if asked("bad_words_ids") is not None:
        found.append(transformers.NoBadWordsLogitsProcessor(config.bad_words_ids, eos_of(config)))
    if asked("min_new_tokens") and eos_of(config):
        found.append(
            transformers.MinNewTokensLengthLogitsProcessor(
                prompt_length, config.min_new_tokens, eos_of(config)
            )
        )
    if asked("suppress_tokens") is not None:
        found.append(transformers.SuppressTokensLogitsProcessor(config.suppress_tokens))
    if asked("begin_suppress_tokens") is not None:
        found.append(
            transformers.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, prompt_length)
        )
    return found


def _warpers(sampling: Sampling) -> list[Any]:
    """transformers' processors of a draw, in its order."""
    if sampling.is_greedy:
        return []
    import transformers

    found: list[Any] = []
    if sampling.temperature != 1:
        found.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(transformers.TopPLogitsWarper(float(sampling.top_p)))
    return found


def eos_of(*configs: Any) -> list[int]:
    """Tokens that end a text, by the first of these configs that says so."""
    for config in configs:
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, (list, tuple)) else [int(found)]
    return []
