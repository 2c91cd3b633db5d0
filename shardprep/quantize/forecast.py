"""Say what quantizing a model will take, from headers alone: bytes, memory, time, and whether ranks can share the result.

Bytes of the result are exact. Work is counted, and divided by what this machine does of each kind of it in a third of a
second; by how much more GPTQModel takes was fitted (`EFFORT`), so that the time is an order of magnitude, given as a
range. Memory follows from what GPTQModel 7.6 holds at a time (`_memory`).

Measured with GPTQModel 7.6.0 and torch 2.13 on 2 cores of a Xeon with AMX that others used too, hence in CPU seconds;
random Llamas in bfloat16, groups of 128, of hidden x intermediate size and layers:

    GPTQ  512 x 1536, 4    8,192 tokens   10 s    744 MB   computed 10 to 11 s,     760 MB
    GPTQ 1024 x 2816, 3    8,192 tokens   21 s  1,001 MB   computed 22 to 25 s,   1,057 MB
    GPTQ  512 x 1536, 4   32,768 tokens   24 s    954 MB   computed 24 to 28 s,     930 MB
    AWQ   512 x 1536, 4    4,096 tokens  113 s  1,188 MB   computed 80 to 145 s,  1,132 MB
    GPTQ 1024 x 2816, 3   16,384 tokens   34 s  1,105 MB   computed 33 to 38 s,   1,141 MB   not fitted to
    AWQ   256 x 1024, 2    2,048 tokens   19 s    922 MB   computed 15 to 23 s,     914 MB   not fitted to

What was computed varies with what else the machine did while it was measured. Nothing was measured on a GPU, nor of
models of many GiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import InputError, quote
from shardprep_runtime.format import dtypes
from shardprep_runtime.format.cut import allows

from ..layout.packed import PackedModel, fields_of, pack
from ..layout.pad import share_evenly
from ..layout.rules import text_config
from ..model.describe import QUANTIZERS, Model

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

VLLM_GROUPS: Final = (None, 32, 64, 128)
"""Group sizes of GPTQ that vLLM 0.32 takes; None: a scale for each row."""

AWQ_PACK: Final = 8


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
        """How long it takes a device."""
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
class Disk:
    """Bytes that are written."""

    staged: int
    """The source as a folder of safetensors, where it is none."""
    journal: int
    """What a killed run resumes from: hidden states, and the layers that are done."""
    result: int

    @property
    def total(self) -> int:
        """All at the same time."""
        return self.staged + self.journal + self.result


@dataclass(frozen=True, slots=True)
class Forecast:
    """What quantizing a model will take."""

    method: str
    bits: int
    group: int | None
    device: str
    tensor_parallel_size: int
    tokens: int
    layers: int
    nbytes: int
    """Of the tensors as they are."""
    result: int
    """Of those that it will have."""
    quantized: int
    """Linears that are quantized."""
    kept: tuple[str, ...]
    """Linears that stay as they are since their sizes do not divide into groups."""
    disk: Disk
    host: int
    """Bytes of memory of this machine at the most."""
    on_device: int
    """Bytes of memory of the device at the most; 0 where that is this machine."""
    work: Work
    rates: Rates
    seconds: tuple[float, float]
    """At the least and at the most, loading and saving left out."""
    problems: tuple[str, ...] = ()
    """Why the result could not be shared by so many tensor ranks; empty: it can."""
    pad_to: int | None = None
    """The length at which it could, where padding an MLP would help (`--pad-to-tp`)."""
    warnings: tuple[str, ...] = field(default=())
    """What an engine will not take, by name."""

    def as_json(self) -> dict[str, Any]:
        """As `--json` gives it."""
        found = asdict(self)
        found["disk"]["total"] = self.disk.total
        return found

    def lines(self) -> list[str]:
        """What a person wants to know, a fact a line."""
        group = f"groups of {self.group}" if self.group else "one scale a row"
        found = [
            f"{self.method}, {self.bits} bits, {group}: {self.quantized} linears in {self.layers} layers",
            f"result {_size(self.result)}, {self.result / max(self.nbytes, 1):.0%} of {_size(self.nbytes)}",
            f"disk {_size(self.disk.total)}: staged {_size(self.disk.staged)}, journal {_size(self.disk.journal)}, "
            f"result {_size(self.disk.result)}",
            f"memory of this machine up to about {_size(self.host)}"
            + (f", of {self.device} {_size(self.on_device)}" if self.on_device else ""),
            f"time {_time(self.seconds[0])} to {_time(self.seconds[1])} on {self.device}, by an estimate, for "
            f"{self.tokens:,} tokens of calibration",
        ]
        if self.kept:
            found.append(f"{len(self.kept)} linears stay as they are, such as {quote(self.kept[0])}")
        return [*found, *self.problems, *(f"warning: {each}" for each in self.warnings)]


def forecast(
    model: Model,
    *,
    method: str,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = True,
    act_order: bool = False,
    skip: Sequence[str] = (),
    samples: int = 128,
    length: int = 2048,
    batch: int = 8,
    device: str = "cpu",
    tensor_parallel_size: int = 1,
    staged: bool = True,
    rates: Rates | None = None,
) -> Forecast:
    """What quantizing `model` will take.

    Reads nothing. Raises InputError where the model is quantized already, or the method is not known.

    Args:
        group: Numbers of a row that share a scale; None: all of them.
        skip: Names of linears that stay as they are, as `pack` takes them.
        samples: Sequences of calibration text.
        length: Tokens of each sequence.
        batch: Sequences that are run together.
        device: "cpu", or a torch device on which the layers are quantized one by one.
        staged: Whether the source has to be copied first: it is no folder of safetensors, or it is padded.
        rates: What the device does in a second; None: measured now, in a third of a second.
    """
    if model.quantization is not None:
        raise InputError(f"the checkpoint is quantized already, by {quote(model.quantization)}")
    if method not in QUANTIZERS:
        raise InputError(f"{quote(method)}: known are {', '.join(QUANTIZERS)}")
    tensors = model.packed.tensors
    packed = pack(model.layout, tensors, method=method, bits=bits, group=group, skip=skip)
    linears = list(_linears(model, packed, method, bits, group))
    tokens = samples * length
    width = max((dtypes.BITS[tensors[each.name][0]] // 8 for each in linears), default=2)
    work = _work(linears, method, tokens, length, _attention(model))
    result = sum(dtypes.nbytes(dtype, shape) for dtype, shape in packed.tensors.values())
    hidden = tokens * _hidden(model, linears) * width
    host, on_device = _memory(model, linears, method, hidden, width, batch * length, tokens, device)
    if rates is None:
        rates = measure(device, width)
    seconds = work.seconds(rates, method)
    problems, pad = _alignment(packed, tensor_parallel_size)
    layers_packed = result - sum(
        dtypes.nbytes(*packed.tensors[name])
        for name, placed in packed.layout.tensors.items()
        if not isinstance(placed.layer, int)
    )
    return Forecast(
        method=method,
        bits=bits,
        group=group,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        tokens=tokens,
        layers=model.layout.layers,
        nbytes=model.nbytes,
        result=result,
        quantized=sum(each.count for each in linears),
        kept=packed.kept,
        disk=Disk(model.nbytes if staged else 0, 3 * hidden + 2 * layers_packed, result),
        host=host,
        on_device=on_device,
        work=work,
        rates=rates,
        seconds=(seconds / SPREAD, seconds * SPREAD),
        problems=tuple(problems),
        pad_to=pad,
        warnings=tuple(_warnings(packed, method, bits, group, symmetric, act_order, tensor_parallel_size)),
    )


# -------------------------------------------------------------------------------------------------------------- work


@dataclass(frozen=True, slots=True)
class _Linear:
    """One linear that is quantized, or all experts of a layer in one tensor."""

    name: str
    layer: int
    out: int
    inner: int
    """Numbers of a row: its inputs."""
    count: int
    """Experts in the tensor; else 1."""
    share: float
    """Of all tokens, those that it sees."""
    dim: int
    """Along which ranks share it: 0 outputs, 1 inputs, -1 not at all."""

    @property
    def numbers(self) -> int:
        return self.out * self.inner * self.count


def _linears(
    model: Model, packed: PackedModel, method: str, bits: int, group: int | None
) -> Iterator[_Linear]:
    text = text_config(model.config)
    chosen = next((text[key] for key in CHOSEN if type(text.get(key)) is int), 1)
    share = min(1.0, chosen / model.layout.experts) if model.layout.experts else 1.0
    weight = fields_of(method, bits=bits, group=group)[0]
    for name, placed in model.layout.tensors.items():
        stem = name.removesuffix(".weight") + weight.suffix
        if name in packed.tensors or stem not in packed.tensors:
            continue
        *lead, first, second = packed.tensors[stem][1]
        sizes = {dim: size * step for (dim, step), size in zip(weight.dims, (first, second), strict=True)}
        is_expert = placed.expert is not None or placed.layout.experts
        dim = placed.layout.dim
        assert isinstance(placed.layer, int)  # no other linears are quantized
        yield _Linear(
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


def _hidden(model: Model, linears: Sequence[_Linear]) -> int:
    text = text_config(model.config)
    found = next((text[key] for key in ("hidden_size", "n_embd", "d_model") if type(text.get(key)) is int), 0)
    return found or min((each.inner for each in linears), default=0)


def _work(linears: Sequence[_Linear], method: str, tokens: int, length: int, attention: int) -> Work:
    forward = sum(2 * each.numbers * tokens * each.share for each in linears)
    layers = {each.layer for each in linears}
    scores = len(layers) * 4 * tokens * length * attention
    inputs = _inputs(linears)
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


def _inputs(linears: Sequence[_Linear]) -> list[tuple[int, int, float]]:
    """(width, count, share of tokens) of each input that a Hessian is of; linears beside each other have one."""
    found: dict[tuple[int, str, int, bool], tuple[int, int, float]] = {}
    for each in linears:
        module = each.name.removesuffix(".weight").rpartition(".")[0]
        # what is cut along its inputs has another input than what is cut along its outputs
        found[each.layer, module, each.inner, each.dim == 1] = each.inner, each.count, each.share
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------ memory

PROCESS: Final = 560 * 2**20
"""Bytes of a process that has imported GPTQModel, torch and transformers, and has begun: measured."""

CONTEXT: Final = 600 * 2**20
"""Bytes that a CUDA process takes of its device before it does anything; as others report, not measured here."""

HIDDEN_COPIES: Final = 5
"""Of the hidden states of all tokens: a layer's inputs, its outputs, and a journal's copy while it is written."""

WORKERS: Final = 2
"""Linears that are quantized at the same time."""


def _memory(
    model: Model,
    linears: Sequence[_Linear],
    method: str,
    hidden: int,
    width: int,
    batch_tokens: int,
    tokens: int,
    device: str,
) -> tuple[int, int]:
    """Bytes at the most, of this machine and of another device.

    GPTQModel holds one layer, the hidden states before and behind it on the host, and the embeddings. While it works
    on a layer, for GPTQ: a float32 Hessian of each input of a group of linears (and a copy, and its inverse, of those
    that are being worked on), and float32 copies of the weights, of the quantized ones and of the losses. For AWQ: the
    inputs of all linears of the layer, a float32 copy of a group's weights, and products of 256 rows with the tokens
    on which clipping is tried.
    """
    layer = _most(linears, lambda own: sum(each.numbers for each in own)) * width
    outside = sum(
        dtypes.nbytes(*form)
        for name, form in model.packed.tensors.items()
        if not isinstance(model.layout.tensors[name].layer, int)
    )
    widest = max((each.inner for each in linears), default=0)
    largest = max((each.out * each.inner for each in linears), default=0)
    beside = max((each.out for each in linears), default=0)
    activations = batch_tokens * (3 * beside + 4 * widest) * max(width, 4)
    host = PROCESS + outside + HIDDEN_COPIES * hidden
    if method == "gptq":
        hessians = _most(linears, lambda own: sum(w * w * n for w, n, _ in _inputs(own))) * 4
        working = hessians + 3 * 4 * widest**2 + WORKERS * 6 * 4 * largest
        on_device = layer + working + activations
    else:
        held = _most(linears, lambda own: sum(w * int(tokens * s) * n for w, n, s in _inputs(own))) * width
        sample = tokens // max(1, tokens // CLIP_TOKENS)
        host += 2 * held
        on_device = layer + activations + 6 * largest * 4 + 256 * sample * widest * width
    if device == "cpu":
        return host + on_device, 0
    return host + layer, CONTEXT + on_device


def _most(linears: Sequence[_Linear], of: Callable[[Sequence[_Linear]], float]) -> int:
    """The most that `of` gives for the linears of any layer."""
    layers: dict[int, list[_Linear]] = {}
    for each in linears:
        layers.setdefault(each.layer, []).append(each)
    return max((int(of(own)) for own in layers.values()), default=0)


# -------------------------------------------------------------------------------------------------------------- rates


def measure(device: str, width: int) -> Rates:
    """What `device` does in a second, of numbers of `width` bytes; takes about 0.3 s. Needs torch."""
    import torch

    dtype = torch.float32 if width > 2 else torch.bfloat16
    on = torch.device(device)

    def rate(amount: float, what: Callable[[], object]) -> float:
        """The best of a few: another process may have had the machine meanwhile."""
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


# ---------------------------------------------------------------------------------------------------------- alignment


def _alignment(packed: PackedModel, size: int) -> tuple[list[str], int | None]:
    """Why `size` ranks could not share the result, one line for each kind of linear, and what an MLP can be padded to."""
    found: dict[tuple[Any, ...], str] = {}
    pads = []
    for name, grain in packed.grains.items():
        own = packed.layout.tensors[name].layout
        if allows(own, size):
            continue
        key = grain.layout, grain.size, grain.multiple
        if key in found:
            continue
        sizes = [each for each in range(1, 65) if allows(own, each)]
        works = ", ".join(map(str, sizes))
        share = f"{grain.size} / {size} = {grain.size / size:g}"
        line = f"{quote(grain.weight)}: {share} is no multiple of {grain.multiple}, in which its quantization comes; sizes that work: {works}"
        if all(segment.uneven for segment in grain.layout.segments):  # an MLP's: heads cannot be padded
            pads.append(share_evenly(grain.size, grain.multiple, size))
            line += f"; padded to {pads[-1]} it works (--pad-to-tp {size})"
        found[key] = line
    for name, placed in packed.layout.tensors.items():
        if name not in packed.grains and not allows(placed.layout, size):
            units = " + ".join(str(segment.units) for segment in placed.layout.segments)
            found.setdefault(
                (placed.layout,), f"{quote(name)}: {units} units cannot be shared by {size} ranks"
            )
    return list(found.values()), max(pads, default=None)


def _warnings(
    packed: PackedModel,
    method: str,
    bits: int,
    group: int | None,
    symmetric: bool,
    act_order: bool,
    size: int,
) -> Iterator[str]:
    """What vLLM 0.32 does not take of the result."""
    if method == "awq":
        if bits != 4:
            yield f"vLLM takes AWQ of 4 bits, not of {bits}"
        if group is not None:
            yield from _awq_shares(packed, group, size)
        return
    if bits not in (4, 8):
        yield f"vLLM takes GPTQ of 4 and 8 bits, not of {bits}"
    if not symmetric:
        yield "vLLM takes symmetric GPTQ alone (sym)"
    if group not in VLLM_GROUPS:
        yield f"vLLM takes GPTQ in groups of 32, 64 or 128, or one a row, not of {group}"
    if act_order and group is not None:
        yield "vLLM refuses GPTQ with desc_act and groups"


def _awq_shares(packed: PackedModel, group: int, size: int) -> Iterator[str]:
    """vLLM's own conditions on a rank's share: whole groups of inputs, whole words of outputs."""
    seen: set[tuple[int, int, int]] = set()
    for name, (_, shape) in packed.tensors.items():
        if not name.endswith(".qweight") or len(shape) != 2:
            continue
        inner, out = shape[0], shape[1] * AWQ_PACK
        dim = packed.layout.tensors[name].layout.dim
        key = inner, out, -1 if dim is None else dim
        if key in seen:
            continue
        seen.add(key)
        if dim == 0 and (inner % size or (inner // size) % group):
            yield f"vLLM refuses {quote(name)} at {size} tensor ranks: {inner} / {size} inputs are no multiple of {group}"
        if dim == 1 and (out % size or (out // size) % AWQ_PACK):
            yield f"vLLM refuses {quote(name)} at {size} tensor ranks: {out} / {size} outputs are no multiple of {AWQ_PACK}"


# ---------------------------------------------------------------------------------------------------------- rendering


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
