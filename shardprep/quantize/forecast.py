"""Say what quantizing a model will take, from headers alone: bytes, memory, time, and whether ranks can share the result.

Bytes of the result are exact. Work is counted, and divided by what this machine does of each kind of it in a third of a
second; by how much more GPTQModel takes was fitted (`EFFORT`), so that the time is an order of magnitude, given as a
range (`effort`). Memory follows from what GPTQModel 7.6 holds at a time (`_memory`).

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

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from shardprep_runtime.errors import InputError, quote
from shardprep_runtime.format import dtypes
from shardprep_runtime.format.cut import allows

from ..layout.packed import PackedModel, pack
from ..layout.pad import share_evenly
from ..model.describe import QUANTIZERS, Model
from .effort import (
    CLIP_TOKENS,
    SPREAD,
    Linear,
    Rates,
    Work,
    hidden_of,
    inputs_of,
    linears_of,
    measure,
    most,
    work_of,
)
from .recipe import Recipe

VLLM_GROUPS: Final = (None, 32, 64, 128)
"""Group sizes of GPTQ that vLLM 0.32 takes; None: a scale for each row."""

AWQ_PACK: Final = 8


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that are written."""

    staged: int
    """A copy of the source as a folder of safetensors, where it does not lie in one."""
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
    """Bytes of the tensors as they are."""
    result: int
    """Bytes of those that the result will have."""
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
    model: Model, recipe: Recipe, *, length: int, staged: bool = True, rates: Rates | None = None
) -> Forecast:
    """Say what quantizing a model will take. Reads nothing.

    Args:
        model: The model as it is.
        recipe: As `settle` gives it.
        length: Tokens of each sequence of calibration.
        staged: Whether the source has to be copied first: it is not a folder of safetensors, or it is padded.
        rates: What the device does in a second; None: measured now, in a third of a second.

    Raises:
        InputError: Where the model is quantized already, or the method is not known.
    """
    method, size = recipe.method, recipe.tensor_parallel_size or 1
    if model.quantization is not None:
        raise InputError(f"the checkpoint is quantized already, by {quote(model.quantization)}")
    if method not in QUANTIZERS:
        raise InputError(f"{quote(method)}: known are {', '.join(QUANTIZERS)}")
    tensors = model.packed.tensors
    packed = pack(
        model.layout, tensors, method=method, bits=recipe.bits, group=recipe.group, skip=recipe.skip
    )
    linears = list(linears_of(model, packed, recipe))
    tokens = recipe.samples * length
    width = max((dtypes.BITS[tensors[each.name][0]] // 8 for each in linears), default=2)
    work = work_of(model, linears, recipe, length)
    result = sum(dtypes.nbytes(dtype, shape) for dtype, shape in packed.tensors.values())
    hidden = tokens * hidden_of(model, linears) * width
    host, on_device = _memory(model, linears, recipe, length, hidden, width)
    if rates is None:
        rates = measure(recipe.device, width)
    seconds = work.seconds(rates, method)
    problems, pad = _alignment(packed, size)
    layers_packed = result - sum(
        dtypes.nbytes(*packed.tensors[name])
        for name, placed in packed.layout.tensors.items()
        if not isinstance(placed.layer, int)
    )
    return Forecast(
        method=method,
        bits=recipe.bits,
        group=recipe.group,
        device=recipe.device,
        tensor_parallel_size=size,
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
        warnings=tuple(_warnings(packed, recipe)),
    )


# ------------------------------------------------------------------------------------------------------------ memory

PROCESS: Final = 560 * 2**20
"""Bytes of a process that has imported GPTQModel, torch and transformers, and has begun: measured."""

CONTEXT: Final = 600 * 2**20
"""Bytes that a CUDA process takes of its device before it does anything; as others report, not measured here."""

HIDDEN_COPIES: Final = 5
"""How often the hidden states of all tokens are held: a layer's inputs, its outputs, and a journal's copy while it is written."""

WORKERS: Final = 2
"""Linears that are quantized at the same time."""


def _memory(
    model: Model, linears: Sequence[Linear], recipe: Recipe, length: int, hidden: int, width: int
) -> tuple[int, int]:
    """Bytes at the most, of this machine and of another device.

    `hidden` is the bytes of the hidden states of all tokens, `width` those of a number. GPTQModel holds one layer, the
    hidden states before and behind it on the host, and the embeddings.

    While it works on a layer by GPTQ, it holds a float32 Hessian of each input of a group of linears. Of those that are
    being worked on it holds a copy and the inverse, too. Weights, quantized ones and losses are float32 copies.

    By AWQ it holds the inputs of all linears of the layer, and a float32 copy of a group's weights. Clipping is tried on
    products of 256 rows with the tokens.
    """
    tokens = recipe.samples * length
    layer = most(linears, lambda own: sum(each.numbers for each in own)) * width
    outside = sum(
        dtypes.nbytes(*form)
        for name, form in model.packed.tensors.items()
        if not isinstance(model.layout.tensors[name].layer, int)
    )
    widest = max((each.inner for each in linears), default=0)
    largest = max((each.out * each.inner for each in linears), default=0)
    beside = max((each.out for each in linears), default=0)
    activations = recipe.batch_size * length * (3 * beside + 4 * widest) * max(width, 4)
    host = PROCESS + outside + HIDDEN_COPIES * hidden
    if recipe.method == "gptq":
        hessians = most(linears, lambda own: sum(w * w * n for w, n, _ in inputs_of(own))) * 4
        working = hessians + 3 * 4 * widest**2 + WORKERS * 6 * 4 * largest
        on_device = layer + working + activations
    else:
        held = most(linears, lambda own: sum(w * int(tokens * s) * n for w, n, s in inputs_of(own))) * width
        sample = tokens // max(1, tokens // CLIP_TOKENS)
        host += 2 * held
        on_device = layer + activations + 6 * largest * 4 + 256 * sample * widest * width
    if recipe.device == "cpu":
        return host + on_device, 0
    return host + layer, CONTEXT + on_device


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
        line = f"{quote(grain.weight)}: {share} is not a multiple of {grain.multiple}, in which its quantization comes; sizes that work: {works}"
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


def _warnings(packed: PackedModel, recipe: Recipe) -> Iterator[str]:
    """What vLLM 0.32 does not take of the result."""
    bits, group = recipe.bits, recipe.group
    if recipe.method == "awq":
        if bits != 4:
            yield f"vLLM takes AWQ of 4 bits, not of {bits}"
        if group is not None:
            yield from _awq_shares(packed, group, recipe.tensor_parallel_size or 1)
        return
    if bits not in (4, 8):
        yield f"vLLM takes GPTQ of 4 and 8 bits, not of {bits}"
    if recipe.symmetric is False:
        yield "vLLM takes symmetric GPTQ alone (sym)"
    if group not in VLLM_GROUPS:
        yield f"vLLM takes GPTQ in groups of 32, 64 or 128, or one a row, not of {group}"
    if recipe.act_order and group is not None:
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
            yield f"vLLM refuses {quote(name)} at {size} tensor ranks: {inner} / {size} inputs are not a multiple of {group}"
        if dim == 1 and (out % size or (out // size) % AWQ_PACK):
            yield f"vLLM refuses {quote(name)} at {size} tensor ranks: {out} / {size} outputs are not a multiple of {AWQ_PACK}"


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
