"""Count what quantizing a model takes to compute, and measure what this machine does of it in a second.

By how much more GPTQModel takes than what was counted is fitted (`EFFORT`), from the runs that `forecast` tells of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

from ..layout.packed import PackedModel, fields_of
from ..layout.rules import text_config
from ..model.describe import Model
from .recipe import Recipe

if TYPE_CHECKING:
    import torch

GRID: Final = 20
"""Scales that AWQ tries for each group of linears."""

CLIPS: Final = 11
"""Products that AWQ computes for each linear whose weights it clips: one as it is, and ten clipped."""

CLIP_TOKENS: Final = 512
"""Tokens on which it does, at least; up to twice as many."""

UNCLIPPED: Final = ("q_", "k_", "query", "key", "Wqkv")
"""Parts of the names of linears that AWQ does not clip."""

BLOCK: Final = 128
"""Columns that GPTQ works through at a time."""

PASSES: Final = {"gptq": 5, "awq": 5}
"""Times that a layer runs over all tokens: once for each group of linears that have one input, and once as quantized."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second."""

    matmul: float
    """Floating point operations of a matrix product in the model's dtype."""
    matmul32: float
    """The same in float32."""
    products: float
    """Numbers in the model's dtype that are multiplied and summed, one by one."""
    columns: float
    """Columns of 512 weights that GPTQ rounds and whose errors it spreads over 64 others, one by one."""


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do, of each kind that `Rates` has."""

    matmul: int
    matmul32: int
    products: int
    columns: int

    def seconds(self, rates: Rates, method: str) -> float:
        """How long it takes a device.

        Args:
            rates: What the device does in a second.
            method: `gptq` or `awq`.
        """
        effort = EFFORT[method]
        return (
            effort.matmul * self.matmul / rates.matmul
            + effort.matmul32 * self.matmul32 / rates.matmul32
            + effort.products * self.products / rates.products
            + effort.columns * self.columns / rates.columns
        )


@dataclass(frozen=True, slots=True)
class Effort:
    """By how much GPTQModel takes longer for each kind of work than the rates would have it."""

    matmul: float = 1.0
    matmul32: float = 1.0
    products: float = 1.0
    columns: float = 1.0


EFFORT: Final = {"gptq": Effort(1.6, 1.6, 1.0, 6.0), "awq": Effort(1.6, 1.6, 3.3, 1.0)}
"""Fitted to CPU seconds of three runs of GPTQ (10, 21 and 24 s) and one of AWQ (113 s)."""

SPREAD: Final = 2.5
"""The time lies within this factor of what was computed, either way."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear that is quantized, or all experts of a layer in one tensor."""

    name: str
    layer: int
    out: int
    inner: int
    """Numbers of a row: its inputs."""
    count: int
    """Experts in the tensor; else 1."""
    share: float
    """Which part of all tokens it sees."""
    dim: int
    """Along which ranks share it: 0 outputs, 1 inputs, -1 not at all."""

    @property
    def numbers(self) -> int:
        """Weights, all experts together."""
        return self.out * self.inner * self.count


def linears_of(model: Model, packed: PackedModel, recipe: Recipe) -> Iterator[Linear]:
    """The linears that are quantized.

    Args:
        model: The model as it is.
        packed: The model as it will be.
        recipe: What leads from the one to the other.
    """
    text = text_config(model.config)
    chosen = next((text[key] for key in CHOSEN if type(text.get(key)) is int), 1)
    share = min(1.0, chosen / model.layout.experts) if model.layout.experts else 1.0
    weight = fields_of(recipe.method, bits=recipe.bits, group=recipe.group)[0]
    for name, placed in model.layout.tensors.items():
        stem = name.removesuffix(".weight") + weight.suffix
        if name in packed.tensors or stem not in packed.tensors:
            continue
        *lead, first, second = packed.tensors[stem][1]
        sizes = {dim: size * step for (dim, step), size in zip(weight.dims, (first, second), strict=True)}
        is_expert = placed.expert is not None or placed.layout.experts
        dim = placed.layout.dim
        assert isinstance(placed.layer, int)  # no other linears are quantized
        yield Linear(
            name,
            placed.layer,
            sizes[-2],
            sizes[-1],
            prod(lead),
            share if is_expert else 1.0,
            -1 if dim is None else dim - len(lead),
        )


CHOSEN: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
"""Keys that say how many experts see a token."""


def _attention(model: Model) -> int:
    """Numbers of the queries of one token: what scores are computed with."""
    text = text_config(model.config)
    heads = next((text[key] for key in ("num_attention_heads", "n_head") if type(text.get(key)) is int), 0)
    hidden = next((text[key] for key in ("hidden_size", "n_embd") if type(text.get(key)) is int), 0)
    own = text.get("head_dim")
    return heads * own if type(own) is int else hidden


def hidden_of(model: Model, linears: Sequence[Linear]) -> int:
    """Numbers of the hidden state of one token.

    Args:
        model: Whose config.json says it, mostly.
        linears: Of which the narrowest takes hidden states, where it does not.
    """
    text = text_config(model.config)
    found = next((text[key] for key in ("hidden_size", "n_embd", "d_model") if type(text.get(key)) is int), 0)
    return found or min((each.inner for each in linears), default=0)


def work_of(model: Model, linears: Sequence[Linear], recipe: Recipe, length: int) -> Work:
    """What an engine computes.

    Args:
        model: The model as it is.
        linears: Those that are quantized.
        recipe: How, and with how many sequences.
        length: Tokens of each sequence.
    """
    method, tokens = recipe.method, recipe.samples * length
    forward = sum(2 * each.numbers * tokens * each.share for each in linears)
    layers = {each.layer for each in linears}
    scores = len(layers) * 4 * tokens * length * _attention(model)
    inputs = inputs_of(linears)
    if method == "gptq":
        hessians = sum(2 * tokens * share * inner**2 * count for inner, count, share in inputs)
        # a factor, its inverse, and a factor of that
        inverses = sum(2 * inner**3 * count for inner, count, _ in inputs)
        updates = sum(each.numbers * each.inner for each in linears)
        columns = sum(each.inner * each.count for each in linears)
        touched = sum(each.numbers for each in linears) * BLOCK // 2
        return Work(
            matmul=int((forward + scores) * PASSES[method]),
            matmul32=int(hessians + inverses + updates),
            products=touched,
            columns=columns,
        )
    clipped = [each for each in linears if not any(part in each.name for part in UNCLIPPED)]
    sample = tokens // max(1, tokens // CLIP_TOKENS)
    return Work(
        matmul=int((forward + scores) * (PASSES[method] + GRID + 1)),
        matmul32=0,
        products=sum(each.numbers for each in clipped) * CLIPS * sample
        + sum(each.numbers for each in linears) * GRID * 12,
        columns=0,
    )


def inputs_of(linears: Sequence[Linear]) -> list[tuple[int, int, float]]:
    """(width, count, share of tokens) of each input that a Hessian is of; linears beside each other have one."""
    found: dict[tuple[int, str, int, bool], tuple[int, int, float]] = {}
    for each in linears:
        module = each.name.removesuffix(".weight").rpartition(".")[0]
        # what is cut along its inputs has another input than what is cut along its outputs
        found[each.layer, module, each.inner, each.dim == 1] = each.inner, each.count, each.share
    return list(found.values())


def most(linears: Sequence[Linear], of: Callable[[Sequence[Linear]], float]) -> int:
    """The most that `of` gives for the linears of any layer.

    Args:
        linears: Of all layers.
        of: A number for those of one layer.
    """
    layers: dict[int, list[Linear]] = {}
    for each in linears:
        layers.setdefault(each.layer, []).append(each)
    return max((int(of(own)) for own in layers.values()), default=0)


def measure(device: str, width: int) -> Rates:
    """What a device does in a second; takes about 0.3 s. Needs torch.

    Args:
        device: As torch names it.
        width: Bytes of a number of the model.
    """
    import torch

    dtype = torch.float32 if width > 2 else torch.bfloat16
    on = torch.device(device)

    def rate(amount: float, what: Callable[[], object]) -> float:
        """The best of a few: another process may have had the machine meanwhile.

        Args:
            amount: What is done each time.
            what: Does it.
        """
        best = 0.0
        stop = time.perf_counter() + 0.07
        while best == 0.0 or time.perf_counter() < stop:
            began = time.perf_counter()
            what()
            if on.type == "cuda":
                torch.cuda.synchronize(on)
            best = max(best, amount / (time.perf_counter() - began))
        return best

    size, sample = (512, 64) if on.type == "cpu" else (4096, 1024)
    a, b = torch.ones(size, size, device=on, dtype=dtype), torch.ones(size, size, device=on)
    x = torch.ones(1, sample, 8, 128, device=on, dtype=dtype)
    w = torch.ones(64, 1, 8, 128, device=on, dtype=dtype)
    column = _Column(on)
    with torch.inference_mode():
        for each in (lambda: a @ a, lambda: b.T @ b, lambda: (x * w).sum(-1), column):
            each()  # kernels are made at first use
        return Rates(
            matmul=rate(2 * size**3, lambda: a @ a),
            matmul32=rate(2 * size**3, lambda: b.T @ b),
            products=rate(w.numel() * sample, lambda: (x * w).sum(-1)),
            columns=rate(1, column),
        )


class _Column:
    """What GPTQ does with one column of 512 weights."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.weights = torch.ones(512, BLOCK, device=device)
        self.rounded, self.errors = torch.ones_like(self.weights), torch.ones_like(self.weights)
        self.factor = torch.ones(BLOCK, BLOCK, device=device)
        self.scale, self.zero = torch.ones(512, 1, device=device), torch.ones(512, 1, device=device)

    def __call__(self) -> None:
        own, at = self.weights, BLOCK // 2
        rounded = own[:, at].unsqueeze(1).div(self.scale).round().add(self.zero).clamp(0, 15)
        rounded = rounded.sub(self.zero).mul(self.scale).flatten()
        self.rounded[:, at] = rounded
        error = (own[:, at] - rounded).div(self.factor[at, at])
        self.errors[:, at] = error.square()
        own[:, at:] -= error.unsqueeze(1) * self.factor[at, at:].unsqueeze(0)
