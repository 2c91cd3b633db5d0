"""Read what a plan needs to know of a model: its tensors and how each is cut, from headers or a config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

from shardprep_runtime import dtypes
from shardprep_runtime.errors import InputError, LayoutError, quote
from shardprep_runtime.store import Access

from .files import LocalFolder
from .layout import ModelLayout, derive_layout
from .layout.packed import Derive, PackedModel, Shapes, derive_packed, pack
from .memory import text_config
from .plan import settle_aliases
from .source import open_source, read_checkpoint
from .source.checkpoint import read_json

QUANTIZERS: Final = ("awq", "gptq")
"""What a model can be planned to be quantized by, to 4 bits."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a plan needs to know of a model."""

    config: Mapping[str, Any]
    packed: PackedModel
    """Its tensors, quantized or not."""
    quantization: str | None
    notes: tuple[str, ...] = ()

    @property
    def layout(self) -> ModelLayout:
        return self.packed.layout

    @property
    def nbytes(self) -> int:
        return sum(dtypes.nbytes(dtype, shape) for dtype, shape in self.packed.tensors.values())

    def dtypes(self) -> dict[str, int]:
        """dtype -> bytes, the most first."""
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
    """The model at `source`: its tensors and how each is cut, from headers or, of a config.json, as it would be built."""
    derive = partial(derive_layout, allow_generic=allow_generic)
    if isinstance(source, Path) and source.suffix == ".json":
        model = _from_config(source, derive)
    else:
        with open_source(source, access, data=False) as opened:
            index = settle_aliases(read_checkpoint(opened))
        if not index.config:
            raise InputError(
                f"{quote(source)}: no config.json, which says what architecture the tensors belong to"
            )
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items()}
        model = _of_tensors(index.config, tensors, derive)
    if quantize is None:
        return model
    if quantize not in QUANTIZERS:
        raise InputError(f"{quote(quantize)}: planned can be {', '.join(QUANTIZERS)}")
    return quantized(model, quantize, group_size)


def _from_config(path: Path, derive: Derive) -> Model:
    from .skeleton import shapes_of

    if not path.is_file():
        raise InputError(f"{quote(path)}: no such file")
    config = read_json(LocalFolder(path.parent), path.name)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    tensors = shapes_of(plain)
    model = _of_tensors(plain, tensors, derive)
    text = text_config(config)
    if not any(text.get(key) for key in ("dtype", "torch_dtype")):
        model = replace(model, notes=("config.json names no dtype; weights are counted as float32",))
    how = config.get("quantization_config")
    if not isinstance(how, Mapping):
        return model
    block = how.get("weight_block_size")
    group = block[0] if isinstance(block, list) and block else how.get("group_size", how.get("q_group_size"))
    bits = how.get("bits", how.get("w_bit", 4))
    skip = how.get("modules_to_not_convert") or how.get("ignore") or ()
    if not isinstance(skip, Sequence) or not all(isinstance(each, str) for each in skip):
        raise LayoutError("config.json: what is not quantized must be a list of names")
    if bits not in (2, 4, 8) or (type(group) is not int and group is not None):
        raise LayoutError(
            f"config.json: a quantization of {quote(bits)} bits in groups of {quote(group)} is not known"
        )
    method = str(how.get("quant_method"))
    packed = pack(
        model.layout,
        model.packed.tensors,
        method=method,
        bits=bits,
        group=group if group and group > 0 else None,
        skip=skip,
    )
    return replace(model, config=config, packed=packed, quantization=method)


def _of_tensors(config: Mapping[str, Any], tensors: Shapes, derive: Derive) -> Model:
    how = config.get("quantization_config")
    if isinstance(how, Mapping):
        packed = derive_packed(config, tensors, derive)
        return Model(config, packed, str(how.get("quant_method")))
    layout = derive(config, {name: shape for name, (_, shape) in tensors.items()})
    numbers = sum(prod(shape) for _, shape in tensors.values())
    return Model(config, PackedModel(tensors, layout, numbers, {}), None)


def quantized(model: Model, method: str, group_size: int) -> Model:
    """The model once `method` has brought the linears of its layers to 4 bits. Raises InputError where it is quantized."""
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
            f"{len(packed.kept)} linears stay as they are, since their sizes are no multiples of {group_size} and 8, "
            f"such as {quote(packed.kept[0])}",
        )
    return replace(model, packed=packed, quantization=method, notes=(*model.notes, *notes))
