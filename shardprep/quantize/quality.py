"""Measure what a quantization cost: how far each layer, and the tokens that the model predicts, are from the original's.

Both checkpoints are read through our index and run side by side, one layer of each in memory at a time. All is computed
in float32: the original's own values upcast, the quantized weights as exactly what their fields stand for.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import InputError, IntegrityError, WriteError, quote

from ..index import Index

if TYPE_CHECKING:
    import torch

    from .walk import Walk

BATCH: Final = 4096
"""Tokens that run through a layer at a time, or one sequence where that is longer."""

SCORES: Final = 2**28
"""Bytes of the attention scores of a batch: batches of long sequences are smaller."""

LOGITS: Final = 2**26
"""Bytes of the float32 logits that are compared at a time; of either model, and a few times that in between."""

IN_MEMORY: Final = 4 * 2**30
"""Bytes of hidden states above which they lie in a temporary file."""


@dataclass(frozen=True, slots=True)
class LayerQuality:
    """How far a layer's hidden states are from the original's: ||theirs - original's|| / ||original's||, of all tokens."""

    layer: int
    error: float
    """What this layer alone adds: both are given the original's hidden states."""
    drift: float
    """What all up to this one add: each is given those of its own model."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What a quantized model is worth beside its original, over every token of the sequences but their first."""

    tokens: int
    """Tokens that were predicted."""
    perplexity: float
    """exp of the mean of -log p(token | the tokens before it in its sequence), natural logarithms."""
    perplexity_before: float
    """The original's."""
    kl: float
    """Mean over predicted tokens of KL(original || quantized), in nats."""
    agreement: float
    """Share of predicted tokens at which both think the same token likeliest."""
    layers: tuple[LayerQuality, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dicts."""
        found = asdict(self)
        return {**found, "layers": list(found["layers"])}


def _silent(done: int, of: int) -> None:
    """Tell nobody."""


def measure(
    original: Index,
    quantized: Index,
    sequences: Sequence[Sequence[int]],
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] = _silent,
) -> Quality:
    """Compare a quantized checkpoint with the one that it was made of, on text that neither was calibrated with.

    Memory holds a layer of each model, and hidden states while they are not many.

    Args:
        original: The checkpoint as it was.
        quantized: What was made of it.
        sequences: Ids of tokens; each sequence is a context of its own, and all of its tokens but the first are
            predicted.
        device: Where both compute, as torch names it.
        progress: Told the steps that are done and how many there are: one for each layer and one for the head.

    Returns:
        What the quantized one is worth beside the original.

    Raises:
        UnsupportedError: For models that cannot be run one layer at a time.
        InputError: For checkpoints or tokens that do not belong together.
        IntegrityError: Where a model computes infinity or NaN.
    """
    from .walk import Walk, check_kind

    if not sequences or any(len(each) < 2 for each in sequences):
        raise InputError(
            "nothing to measure: expected sequences of at least two tokens, of which all but the first are predicted"
        )
    vocabulary = {token for each in sequences for token in each}
    before, after = Walk(original, vocabulary, device=device), Walk(quantized, vocabulary, device=device)
    _check_pair(before, after)
    _check_lengths(before, max(map(len, sequences)) - 1)
    check_kind(original.config)
    with before, after, tempfile.TemporaryDirectory(prefix="shardprep-") as folder:
        return _Measurement(before, after, sequences, Path(folder), progress).quality()


class _Measurement:
    """Two models on their way through the same text."""

    def __init__(
        self,
        before: Walk,
        after: Walk,
        sequences: Sequence[Sequence[int]],
        folder: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        self.before, self.after = before, after
        heads = getattr(before.config, "num_attention_heads", None)
        self.batches = list(_batches(sequences, heads if isinstance(heads, int) else 1))
        self.tokens = sum(len(each) - 1 for each in sequences)
        self.states = _States(folder, "original", self.tokens), _States(folder, "quantized", self.tokens)
        self.progress = progress

    def quality(self) -> Quality:
        steps = self.before.layers + 1
        self.progress(0, steps)
        for number, batch in enumerate(self.batches):
            for model, states in zip((self.before, self.after), self.states, strict=True):
                states.keep(number, model.embed(batch[:, :-1]))
        layers = []
        for layer in range(self.before.layers):
            layers.append(self._layer(layer))
            self.progress(layer + 1, steps)
        found = self._predictions(tuple(layers))
        self.progress(steps, steps)
        return found

    def _layer(self, layer: int) -> LayerQuality:
        """Bring all hidden states through a layer of both models."""
        for model in (self.before, self.after):
            model.load(layer)
        whole = error = drift = 0.0
        for number, batch in enumerate(self.batches):
            ids = batch[:, :-1]
            own, others = (states.of(number) for states in self.states)
            hidden = self.before.run(layer, ids, own)
            _check_finite(hidden, self.before, f"layer {layer}")
            alone = self.after.run(layer, ids, own)
            _check_finite(alone, self.after, f"layer {layer}")
            theirs = alone
            if not own.equal(others):
                theirs = self.after.run(layer, ids, others)
                _check_finite(theirs, self.after, f"layer {layer}")
            whole += _square(hidden)
            error += _square(alone - hidden)
            drift += _square(theirs - hidden)
            for states, given in zip(self.states, (hidden, theirs), strict=True):
                states.keep(number, given)
        for model in (self.before, self.after):
            model.free(layer)
        return LayerQuality(layer, _ratio(error, whole), _ratio(drift, whole))

    def _predictions(self, layers: tuple[LayerQuality, ...]) -> Quality:
        """Compare what both models predict, from the hidden states that their last layers gave."""
        for model in (self.before, self.after):
            model.load_head()
        loss = loss_before = divergence = 0.0
        agreed = 0
        for number, batch in enumerate(self.batches):
            length = batch.shape[1] - 1
            step = max(LOGITS // (4 * len(batch) * self.before.vocab_size), 1)
            for start in range(0, length, step):
                stop = min(start + step, length)
                original, quantized = (
                    _scores(model, batch[:, :-1], states.of(number), start, stop)
                    for model, states in zip((self.before, self.after), self.states, strict=True)
                )
                following = batch[:, start + 1 : stop + 1, None].to(original.device)
                loss_before -= original.gather(-1, following).sum().item()
                loss -= quantized.gather(-1, following).sum().item()
                divergence += (original.exp() * (original - quantized)).sum().item()
                agreed += int((original.argmax(-1) == quantized.argmax(-1)).sum())
        return Quality(
            self.tokens,
            _perplexity(loss / self.tokens),
            _perplexity(loss_before / self.tokens),
            max(divergence / self.tokens, 0.0),  # rounding may put equal models a hair below
            agreed / self.tokens,
            layers,
        )


class _States:
    """The hidden states of every batch between two layers: in memory, or in files where they are many."""

    def __init__(self, folder: Path, name: str, tokens: int) -> None:
        self._stem = folder / name
        self._tokens = tokens
        self._held: dict[int, torch.Tensor] = {}
        self._device: torch.device | None = None

    def of(self, batch: int) -> torch.Tensor:
        """Those of a batch."""
        return self._held[batch].to(self._device)

    def keep(self, batch: int, hidden: torch.Tensor) -> None:
        self._device = hidden.device
        if batch not in self._held:
            self._held[batch] = self._room(batch, hidden)
        self._held[batch].copy_(hidden)

    def _room(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        import torch

        width = hidden.shape[-1] * hidden.element_size()
        if 2 * self._tokens * width <= IN_MEMORY:
            return torch.empty(hidden.shape, dtype=hidden.dtype)
        path = self._stem.with_suffix(f".{batch}")
        try:
            with path.open("wb") as file:
                # a mapping of a file with holes kills the process once the disk is full
                os.posix_fallocate(file.fileno(), 0, hidden.nbytes)
        except OSError as error:
            raise WriteError(
                f"{quote(path.parent)}: no room for hidden states of {2 * self._tokens * width} bytes: "
                f"{error.strerror}; measure on less text, or set TMPDIR to a larger disk"
            ) from None
        room = torch.from_file(str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return room.view(hidden.shape)


def _batches(sequences: Sequence[Sequence[int]], heads: int) -> Iterator[torch.Tensor]:
    """Sequences of one length together, texts x tokens, so that nothing is padded."""
    import torch

    by_length: dict[int, list[Sequence[int]]] = {}
    for each in sequences:
        by_length.setdefault(len(each), []).append(each)
    for length, alike in by_length.items():
        step = max(min(BATCH // length, SCORES // (4 * heads * length * length)), 1)
        for start in range(0, len(alike), step):
            yield torch.tensor(alike[start : start + step])


def _check_pair(before: Walk, after: Walk) -> None:
    """Raises InputError where two checkpoints are not one model."""
    for what, own, others in (
        ("type", before.kind, after.kind),
        ("number of layers", before.layers, after.layers),
        ("hidden size", _size(before, "hidden_size"), _size(after, "hidden_size")),
        ("vocabulary", before.vocab_size, after.vocab_size),
    ):
        if own != others:
            raise InputError(
                f"{after.where}: a model of another {what} than {before.where}: {others}, expected {own}; "
                "compare a quantized checkpoint with the one that it was made of"
            )


def _check_lengths(model: Walk, length: int) -> None:
    """Raises InputError for contexts longer than the model's."""
    most = _size(model, "max_position_embeddings")
    if most is not None and length > most:
        raise InputError(
            f"sequences of {length + 1} tokens, of which {length} are read at once: {model.where} knows {most} positions; "
            "use shorter ones"
        )


def _size(model: Walk, name: str) -> int | None:
    found = getattr(model.config, name, None)
    return found if isinstance(found, int) else None


def _check_finite(values: torch.Tensor, model: Walk, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise IntegrityError(
            f"{model.where}: {what} gives values that are infinite or not a number, where finite ones were expected; its "
            "tensors are damaged, or were quantized from values beyond the range of their dtype"
        )


def _scores(model: Walk, ids: torch.Tensor, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Logarithms of the probabilities of every token after the positions [start, stop), in float64."""
    logits = model.logits(ids, hidden, start, stop)
    _check_finite(logits, model, "the head")
    return logits.double().log_softmax(-1)


def _square(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _ratio(difference: float, whole: float) -> float:
    """Relative norm of a difference, from squares."""
    return math.sqrt(difference / whole) if whole else math.sqrt(difference)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # no float64 holds more
