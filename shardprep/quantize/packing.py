"""Unpack the tensors that stand for a quantized weight: numbers of a few bits in words of 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from shardprep_runtime.errors import FormatError, UnsupportedError, quote

from ..layout.quantization import Scheme

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

INTERLEAVED: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of the eight numbers of a word lies at each place, the lowest bits first: AutoAWQ's gemm packing."""

PACKED: Final = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
"""Method -> the field that holds the numbers."""

FIELDS: Final = (
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
)  # fmt: skip


def dequantize(
    fields: Tensors, scheme: Scheme, *, dtype: torch.dtype | None = None
) -> torch.Tensor:  # out x in
    """The weight that fields stand for, out x in: (number - zero point) * scale.

    The g_idx of a view counts groups of the whole weight: where inputs lie in runs (no act-order) its scales are those of
    the groups that occur, which are counted anew; with act-order every rank has all of the scales.

    Args:
        fields: By their suffixes (`qweight`): whole ones, or a tensor rank's view of them.
        scheme: How they are packed.
        dtype: Of the weight; None: float32, which holds it exactly for scales of 16 bits.

    Raises:
        UnsupportedError: Where the field with the numbers is not among them.
        FormatError: Where they do not belong together.
    """
    import torch

    if PACKED.get(scheme.method) not in fields:
        raise UnsupportedError(
            f"{quote(scheme.method)}: fields {', '.join(map(quote, fields))}; expected "
            f"{PACKED.get(scheme.method, 'the packed numbers of gptq, awq or compressed-tensors')}"
        )
    wide = dtype or torch.float32
    if scheme.method == "compressed-tensors":
        return _dequantize_compressed(fields, scheme).to(wide)
    order = INTERLEAVED if scheme.method == "awq" else None
    zeros = fields["qzeros"]
    if scheme.format == "gptq":
        # by words, as GPTQModel does: what a zero point of 0 borrowed from its neighbour is returned
        zeros = zeros + _ones(scheme.bits)
    zero = _unpack(zeros, scheme.bits, -1, order)  # groups x out
    number = _unpack(fields["qweight"], scheme.bits, -1 if order else -2, order)  # in x out
    scales = fields["scales"].float()
    group = _groups(fields.get("g_idx"), number, -2, scales.shape[-2], scheme)
    found = (number - zero.index_select(-2, group)).float() * scales.index_select(-2, group)
    return found.transpose(-1, -2).contiguous().to(wide)


def dequantized(tensors: Tensors, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The state dict with every quantized linear replaced by its `.weight`, in float32, and all else as it is.

    Args:
        tensors: By the names that a checkpoint has.
        scheme: How the quantized ones are packed.
    """
    linears: dict[str, dict[str, torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    for name in tensors:
        stem, _, suffix = name.rpartition(".")
        if suffix == PACKED.get(scheme.method):
            linears[stem] = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem in linears and suffix in FIELDS:
            linears[stem][suffix] = tensor
        else:
            found[name] = tensor
    return found | {f"{stem}.weight": dequantize(fields, scheme) for stem, fields in linears.items()}


def _dequantize_compressed(fields: Tensors, scheme: Scheme) -> torch.Tensor:
    import torch

    number = _unpack(fields["weight_packed"], scheme.bits, -1)  # out x in
    scale = fields["weight_scale"].float()  # out x groups
    shape = fields.get("weight_shape")
    if shape is not None and 0 < number.shape[-1] - int(shape[-1]) < 32 // scheme.bits:
        number = number[..., : int(shape[-1])]  # the last word of a row was filled up
    zero = torch.full((1, 1), 2 ** (scheme.bits - 1), dtype=torch.int32, device=number.device)
    group = _groups(fields.get("weight_g_idx"), number, -1, scale.shape[-1], scheme)
    if "weight_zero_point" in fields:
        zero = _unpack(fields["weight_zero_point"], scheme.bits, -2)[..., : number.shape[-2], :]
        zero = zero.index_select(-1, group)
    return (number - zero).float() * scale.index_select(-1, group)


def _groups(
    index: torch.Tensor | None, number: torch.Tensor, dim: int, groups: int, scheme: Scheme
) -> torch.Tensor:
    """For each input (along `dim` of the numbers) its row of the scales that are at hand."""
    import torch

    inputs, device = number.shape[dim], number.device
    if groups == 1 and not scheme.act_order:
        return torch.zeros(inputs, dtype=torch.int64, device=device)
    if index is None:
        found = torch.arange(inputs, device=device) // (scheme.group or -(-inputs // groups))
    else:
        found = index.long()
        if not scheme.act_order:  # in runs: the scales at hand are those of the groups that occur, in order
            present, anew = torch.unique(found, return_inverse=True)
            if len(present) == groups:
                found = anew
    if len(found) != inputs or (inputs and not 0 <= int(found.min()) <= int(found.max()) < groups):
        raise FormatError(
            f"{inputs} inputs belong to groups {int(found.min())} to {int(found.max())}, but there are scales of "
            f"{groups}; the tensors of this weight do not belong together"
        )
    return found


def _ones(bits: int) -> int:
    """A word of which each number is 1."""
    return int(sum(1 << at for at in range(0, 32, bits)))


def _shifts(bits: int, order: tuple[int, ...] | None) -> list[int]:
    """How far each number of a word lies above the lowest bit."""
    places = range(32 // bits) if order is None else (order.index(i) for i in range(len(order)))
    return [place * bits for place in places]


def _unpack(words: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The numbers, int32, of which each index along `dim` (-1 or -2) of `words` holds 32 / bits."""
    import torch

    if words.dtype != torch.int32:
        raise FormatError(f"packed numbers of dtype {words.dtype}; expected int32")
    shifts = torch.tensor(_shifts(bits, order), dtype=torch.int32, device=words.device)
    if dim == -2:
        shifts = shifts[:, None]
    found: torch.Tensor = (words.unsqueeze(dim if dim == -1 else -2) >> shifts) & (2**bits - 1)
    shape = list(words.shape)
    shape[dim] *= len(shifts)
    return found.reshape(shape)
