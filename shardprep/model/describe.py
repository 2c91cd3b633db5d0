"""Read what a plan needs to know of a model: its tensors and how each is cut, from headers or a config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from shardprep_runtime.errors import InputError, quote
from shardprep_runtime.format import dtypes
from shardprep_runtime.stores.store import Access

from ..files import LocalFolder
from ..index import Index
from ..layout import ModelLayout, PackedModel, Scheme, derive_layout, lay_out, read_scheme
from ..layout.packed import pack
from ..layout.quantization import legacy_names
from ..layout.rules import text_config
from ..layout.ties import settle_aliases
from ..source import open_source, read_checkpoint
from ..source.checkpoint import read_json

QUANTIZERS: Final = ("awq", "gptq")
"""Methods of 4-bit quantization that a plan can assume."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a plan needs it: its config, its tensors and how each is cut."""

    config: Mapping[str, Any]
    packed: PackedModel
    """The model's tensors, quantized or not."""
    quantization: str | None
    """The method by which the model is quantized; None where it is not."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about what had to be assumed."""

    @property
    def layout(self) -> ModelLayout:
        return self.packed.layout

    @property
    def nbytes(self) -> int:
        return sum(dtypes.nbytes(dtype, shape) for dtype, shape in self.packed.tensors.values())

    def dtypes(self) -> dict[str, int]:
        """dtype -> bytes of its tensors, the most first."""
        found: Counter[str] = Counter()
        for dtype, shape in self.packed.tensors.values():
            found[dtype] += dtypes.nbytes(dtype, shape)
        return dict(found.most_common())


def read_model(
    source: Path | str,
    *,
    quantize: str | None = None,
    group_size: int = 128,
    allow_generic: bool = False,
    access: Access | None = None,
) -> Model:
    """Describe the model at `source`, from headers alone, or from a config.json as transformers would build it.

    Args:
        source: A checkpoint, a shard set, a URI, or a config.json.
        quantize: Describe it as "awq" or "gptq" would leave it, in 4 bits.
        group_size: Numbers of a row that share a scale, where `quantize` is given; -1: the whole row.
        allow_generic: Cut the rows of the linears of a model type that has no rules.
        access: Endpoint, profile and the like of a store.

    Raises:
        InputError: Where it cannot be read, is quantized already, or has no layout rules.
    """
    if isinstance(source, Path) and source.suffix == ".json":
        model = _from_config(source, allow_generic=allow_generic)
    else:
        with open_source(source, access, data=False) as opened:
            index = settle_aliases(read_checkpoint(opened))
            model = model_of(index, allow_generic=allow_generic)
    if quantize is None:
        return model
    if quantize not in QUANTIZERS:
        raise InputError(f"{quote(quantize)}: planned can be {', '.join(QUANTIZERS)}")
    return quantized(model, quantize, group_size)


def model_of(index: Index, *, allow_generic: bool = False) -> Model:
    """Describe the model that a checkpoint holds.

    Args:
        allow_generic: Cut the rows of the linears of a model type that has no rules.
    """
    packed = lay_out_index(index, allow_generic=allow_generic)
    return Model(index.config, packed, packed.scheme.method if packed.scheme else None)


def lay_out_index(index: Index, *, allow_generic: bool = False) -> PackedModel:
    """Lay out the tensors of a checkpoint, quantized or not. Plans and splits go by this.

    Args:
        allow_generic: Cut the rows of the linears of a model type that has no rules.

    Raises:
        InputError: For a checkpoint without a config.json.
        UnsupportedError: For a model type or a quantization without rules.
    """
    if not index.config:
        raise InputError(
            f"{index.folder.where()}: no config.json, which says what architecture the tensors belong to"
        )
    tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items()}
    derive = partial(derive_layout, allow_generic=allow_generic)
    return lay_out(index.config, tensors, legacy=read_legacy(index), derive=derive)


def read_legacy(index: Index) -> Mapping[str, Any] | None:
    """Read the file in which AutoGPTQ or AutoAWQ describes its quantization, if config.json does not describe it."""
    if read_scheme(index.config) is not None or not any(name.endswith(".qweight") for name in index.tensors):
        return None
    name = next((name for name in legacy_names if index.folder.has(name)), None)
    return None if name is None else read_json(index.folder, name)


def scheme_of(index: Index) -> Scheme | None:
    """Read how a checkpoint is quantized, from its config.json or an older tool's file; None where it is not."""
    return read_scheme(index.config, read_legacy(index))


def _from_config(path: Path, *, allow_generic: bool) -> Model:
    from .skeleton import shapes_of

    if not path.is_file():
        raise InputError(f"{quote(path)}: no such file")
    config = read_json(LocalFolder(path.parent), path.name)
    scheme = read_scheme(config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    derive = partial(derive_layout, allow_generic=allow_generic)
    packed = lay_out(plain, shapes_of(plain), derive=derive)
    notes: tuple[str, ...] = ()
    text = text_config(config)
    if not any(text.get(key) for key in ("dtype", "torch_dtype")):
        notes = ("config.json names no dtype; weights are counted as float32",)
    if scheme is None:
        return Model(config, packed, None, notes)
    packed = pack(
        packed.layout,
        packed.tensors,
        method=scheme.method,
        bits=scheme.bits,
        group=scheme.group,
        skip=scheme.kept,
        symmetric=scheme.symmetric,
        act_order=scheme.act_order,
    )
    return Model(config, packed, scheme.method, notes)


def quantized(model: Model, method: str, group_size: int) -> Model:
    """Describe the model as it would be once `method` has brought the linears of its layers to 4 bits.

    Args:
        method: "awq" or "gptq".
        group_size: Numbers of a row that share a scale; -1: the whole row.

    Raises:
        InputError: Where the model is quantized already, or for a group size that does not exist.
    """
    if model.quantization is not None:
        raise InputError(f"the checkpoint is quantized already, by {quote(model.quantization)}")
    if group_size == 0 or group_size < -1:
        raise InputError(f"groups of {group_size} numbers: at least 1, or -1 for a whole row")
    packed = pack(
        model.layout, model.packed.tensors, method=method, group=group_size if group_size > 0 else None
    )
    notes: tuple[str, ...] = ()
    if packed.kept:
        notes = (
            f"{len(packed.kept)} linears stay as they are, since their sizes are not multiples of {group_size} and 8, "
            f"such as {quote(packed.kept[0])}",
        )
    return replace(model, packed=packed, quantization=method, notes=(*model.notes, *notes))
