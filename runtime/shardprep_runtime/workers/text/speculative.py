"""Have a small model guess tokens, and prove a run of guesses by one trip through the stages of the large one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final

from ...errors import CacheLostError, InputError
from ..pipeline import OpenSequence, Pipeline
from .breakdown import Breakdown, breakdown_of
from .sampling import Sampler

MOST_GUESSES: Final = 64


class Draft:
    """A draft model, which is asked for `count` tokens at a time. Safe to use from several threads."""

    def __init__(self, pipeline: Pipeline, count: int) -> None:
        if not 1 <= count <= MOST_GUESSES:
            raise InputError(f"draft_tokens is {count}, expected 1 to {MOST_GUESSES}")
        self._pipeline = pipeline
        self._count = count
        self._checking = threading.Lock()
        self._is_checked = False

    def tokens(
        self, target: OpenSequence, ids: Sequence[int], sampler: Sampler, max_tokens: int
    ) -> Iterator[tuple[int, Breakdown | None]]:
        """The tokens that a greedy sampler chooses, each with its trip; None: of the same trip as the one before.

        Args:
            target: The sequence of the large model, which proves what the draft guesses.
            ids: The prompt.
            sampler: Chooses greedily.
            max_tokens: How many tokens at most.

        Raises:
            InputError: Where the two models do not go together.
        """
        self._check(target)
        with self._pipeline.sequence() as draft:
            yield from self._rounds(target, draft, ids, sampler, max_tokens)

    def _rounds(
        self,
        target: OpenSequence,
        draft: OpenSequence,
        ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
    ) -> Iterator[tuple[int, Breakdown | None]]:
        import torch

        known = list(ids)
        end = len(known) + max_tokens
        while len(known) < end:
            began = time.perf_counter()
            is_prefill = target.positions == 0
            # the trip itself gives one token; the prompt's has no guesses, so that the first token is not late
            count = 0 if is_prefill else min(self._count, end - len(known) - 1)
            guesses = self._guess(draft, known, count)
            guessed = time.perf_counter()
            fed = [*known[target.positions :], *guesses]
            base = len(known)
            logits = target.feed(torch.tensor([fed]), keep="all" if guesses else "last")[0]
            came = time.perf_counter()
            found: list[int] = []
            # the last 1 + guesses positions: what follows what was known, and what follows each guess
            for place in range(len(guesses) + 1):
                token = sampler.choose(known, logits[place - len(guesses) - 1])
                known.append(token)
                found.append(token)
                if place == len(guesses) or token != guesses[place]:
                    break
            accepted = len(found) - 1
            target.rewind(base + accepted)
            draft.rewind(min(draft.positions, base + accepted))
            assert target.output is not None
            breakdown = breakdown_of(
                target.output,
                trip=target.seconds,
                sampling=time.perf_counter() - came,
                drafting=guessed - began,
                recovery=target.recovery,
                is_prefill=is_prefill,
                tokens=len(found),
            )
            for place, token in enumerate(found):
                yield token, breakdown if place == 0 else None

    def _guess(self, draft: OpenSequence, known: Sequence[int], count: int) -> list[int]:
        """The tokens that the draft model finds likeliest."""
        import torch

        found: list[int] = []
        for _ in range(count):
            try:
                logits = draft.feed(torch.tensor([[*known, *found][draft.positions :]]))
            except InputError:  # beyond its last position, which may come before the large model's
                break
            found.append(int(logits[0, -1].argmax()))
        return found

    def _check(self, target: OpenSequence) -> None:
        """Once: whether both models know the same tokens, and their caches can be cropped."""
        with self._checking:
            if self._is_checked:
                return
            sizes = []
            for what, pipeline in (("the split model", target.pipeline), ("the draft model", self._pipeline)):
                with pipeline.sequence() as trial:
                    sizes.append(_try_out(what, trial))
            if sizes[0] != sizes[1]:
                raise InputError(
                    f"the draft model has a vocabulary of {sizes[1]} tokens, the split model one of {sizes[0]}; use a "
                    "draft model of the same family"
                )
            self._is_checked = True


def _try_out(what: str, sequence: OpenSequence) -> int:
    """The size of a model's vocabulary, once positions were taken back from its caches."""
    import torch

    sequence.feed(torch.tensor([[0, 0, 0]]))
    sequence.rewind(1)
    try:
        logits = sequence.feed(torch.tensor([[0]]), can_renew=False)
    except CacheLostError as error:
        raise InputError(
            f"{what} cannot take back what a draft model has guessed wrong ({error}); run it without one"
        ) from None
    return logits.shape[-1]
