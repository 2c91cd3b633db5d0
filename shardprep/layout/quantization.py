"""Say by what scheme a checkpoint is quantized, from its config.json or from the files that older tools wrote beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardprep_runtime.errors import LayoutError, UnsupportedError, quote

from ..index import natural

PACKED: Final = re.compile(r"\.(qweight|weight_packed)$")
"""Matches the end of the name under which a quantized linear's packed numbers are stored."""

legacy_names: Final = ("quantize_config.json", "quant_config.json")
"""Files in which older AutoGPTQ and AutoAWQ say how a checkpoint is quantized; newer ones write it into config.json."""

METHODS: Final = ("awq", "gptq", "fp8", "mxfp4", "compressed-tensors", "modelopt")

FORMATS: Final = {
    "awq": "gemm", "gptq": "gptq", "fp8": "fp8", "mxfp4": "mxfp4", "compressed-tensors": "pack-quantized",
    "modelopt": "modelopt",
}  # fmt: skip
"""Method -> how its numbers are packed where the config does not say."""

PACKINGS: Final = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm",),
}
"""Method -> the packings that are known. Others have the order of one kernel, or of one kind of GPU."""

BITS: Final = {"gptq": (2, 4, 8), "awq": (4,), "compressed-tensors": (2, 4, 8)}
"""Method -> the bits that a number may have. Whole numbers of these sizes fill a word of 32 bits."""

NESTED: Final = "text_config"
"""Key under which the config of a model that reads images or sound holds the config of its language model."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linears of a checkpoint are quantized."""

    method: str
    bits: int = 4
    group: int | None = 128
    """Numbers of a row, along the input, that share a scale; None: the whole row."""
    symmetric: bool = True
    """Whether the numbers need no zero points."""
    act_order: bool = False
    """Whether inputs belong to groups by a permutation (`g_idx`) instead of in runs."""
    format: str = ""
    """The packing of the numbers: `gptq` (zero points stored less one), `gptq_v2`, `gemm` (interleaved), ..."""
    kept: tuple[str, ...] = ()
    """Linears that are not quantized: names, parts of names, or patterns behind `re:`."""

    def __post_init__(self) -> None:
        if not self.format:
            object.__setattr__(self, "format", FORMATS.get(self.method, self.method))


def read_scheme(config: Mapping[str, Any], legacy: Mapping[str, Any] | None = None) -> Scheme | None:
    """Read by what scheme a checkpoint is quantized; None where it is not.

    Args:
        config: The parsed config.json.
        legacy: The content of one of `legacy_names`, for a config.json that does not say it.

    Raises:
        UnsupportedError: For a method or a packing that is not known.
        LayoutError: For values that make no sense.
    """
    text = config.get(NESTED)
    for where in (config, text if isinstance(text, Mapping) else {}):
        how = where.get("quantization_config") or where.get("compression_config")
        if isinstance(how, Mapping):
            return _scheme(how, "config.json")
        if how:
            raise LayoutError(
                f"config.json: quantization_config is {quote(how)}, expected an object that says how"
            )
    if legacy is None or not {"bits", "w_bit"} & legacy.keys():
        return None
    method = legacy.get("quant_method") or ("awq" if "w_bit" in legacy else "gptq")
    return _scheme({**legacy, "quant_method": method}, legacy_names["w_bit" in legacy])


def spell(scheme: Scheme, *, legacy: Mapping[str, Any], head: bool = False) -> dict[str, Any]:
    """Write the quantization_config that vLLM and transformers read, for a GPTQ or AWQ checkpoint that lacks it.

    Args:
        legacy: The content of the one of `legacy_names` that the checkpoint has.
        head: Whether the lm_head is quantized too, which engines do not expect unless they are told.
    """
    size = -1 if scheme.group is None else scheme.group
    found: dict[str, Any] = {"quant_method": scheme.method, "bits": scheme.bits, "group_size": size}
    if scheme.method == "awq":
        kept = legacy.get("modules_to_not_convert")
        found |= {
            "zero_point": not scheme.symmetric,
            "version": scheme.format,
            "modules_to_not_convert": kept,
        }
    else:
        found |= {"desc_act": scheme.act_order, "sym": scheme.symmetric, "checkpoint_format": scheme.format}
        also = ("damp_percent", "static_groups", "true_sequential", "dynamic", "meta")
        found |= {key: legacy[key] for key in also if legacy.get(key) is not None}
    return found | ({"lm_head": True} if head else {})


@dataclass(frozen=True, slots=True)
class Modules:
    """The linears of a checkpoint that are quantized and those that are not, by the names of its tensors."""

    count: int
    """Number of quantized linears."""
    linears: tuple[str, ...]
    """Names of quantized linears: within a layer where all layers have the same ones, else each by its whole name."""
    kept: tuple[str, ...]
    """Whole names of modules with matrices that are not quantized. A part would not do: an engine would take it for every
    name that contains it."""


def list_modules(shapes: Mapping[str, Sequence[int]]) -> Modules:
    """List the quantized linears, and those that are not, of tensors with these names and shapes."""
    packed = {PACKED.sub("", name) for name in shapes if PACKED.search(name)}
    layers: dict[str, set[str]] = {}
    for name in packed:
        layer, _, rest = re.sub(r"^(.*?\.\d+)\.", r"\1 ", name).partition(" ")
        layers.setdefault(layer, set()).add(rest)
    kinds = {frozenset(each) for each in layers.values()}
    linears = next(iter(kinds)) if len(kinds) == 1 and "" not in next(iter(kinds)) else packed
    kept = (
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) >= 2
    )
    return Modules(len(packed), tuple(sorted(linears, key=natural)), tuple(sorted(kept, key=natural)))


def with_lists(how: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Add explicit lists of what is quantized and what is not to a quantization_config of GPTQ or AWQ that has none.

    Without lists vLLM and transformers guess from names or from the headers of the files. In a shard set they would
    guess wrong, because the files are not there.

    Args:
        how: The quantization_config.
        shapes: Tensor name -> shape.
    """
    found, modules = dict(how), list_modules(shapes)
    if modules.count and not found.get("dynamic"):  # GPTQModel's `dynamic` is such a list already
        if found.get("quant_method") == "gptq" and not found.get("modules_in_block_to_quantize"):
            # optimum joins the lists and compares the ends of names; vLLM looks for an entry anywhere in a name
            found["modules_in_block_to_quantize"] = [list(modules.linears)]
        if found.get("quant_method") in ("gptq", "awq") and not found.get("modules_to_not_convert"):
            found["modules_to_not_convert"] = list(modules.kept)
    return found


def check_method(method: object) -> str:
    """Give `method` back if its tensors are known.

    Raises:
        UnsupportedError: Where they are not.
    """
    if method not in METHODS:
        raise UnsupportedError(
            f"config.json: quantized by {quote(method)}; known are {', '.join(METHODS[:-1])} and {METHODS[-1]}"
        )
    return str(method)


def _scheme(how: Mapping[str, Any], file: str) -> Scheme:
    match check_method(how.get("quant_method")):
        case "gptq":
            found = _gptq(how, file)
        case "awq":
            found = _awq(how, file)
        case "compressed-tensors":
            found = _compressed(how, file)
        case "fp8":
            group = _group(_last(how.get("weight_block_size")), file)
            found = Scheme("fp8", 8, group, kept=_names(how, "modules_to_not_convert", file))
        case "mxfp4":
            found = Scheme("mxfp4", 4, 32, kept=_names(how, "modules_to_not_convert", file))
        case _:
            four = "4" in str(how.get("quant_algo") or how.get("quantization") or "FP4")
            found = Scheme(
                "modelopt", 4 if four else 8, 16 if four else None, kept=_names(how, "ignore", file)
            )
    sizes = BITS.get(found.method)
    if sizes is not None and found.bits not in sizes:
        if found.bits == 3:
            raise UnsupportedError(
                f"{file}: a quantization of 3 bits, which do not fill a word of 32; expected "
                f"{_or(sizes)}; quantize the original to 4"
            )
        raise LayoutError(f"{file}: a quantization of {found.bits} bits; expected {_or(sizes)}")
    packings = PACKINGS.get(found.method)
    if packings is not None and found.format not in packings:
        raise UnsupportedError(
            f"{file}: {found.method} weights packed as {quote(found.format)}, the order of one kernel; expected "
            f"{_or(packings)}; convert it with the tool that made it, or quantize the original"
        )
    return found


def _gptq(how: Mapping[str, Any], file: str) -> Scheme:
    packing = how.get("checkpoint_format") or how.get("format") or "gptq"
    if how.get("is_marlin_format"):
        packing = "marlin"
    kept = list(_names(how, "modules_to_not_convert", file))
    dynamic = how.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise LayoutError(f"{file}: dynamic is {quote(dynamic)}, expected an object of patterns")
    for (
        pattern,
        other,
    ) in dynamic.items():  # GPTQModel: `-:pattern` is left alone, `+:pattern` quantized otherwise
        if pattern.startswith("-:"):
            kept.append(f"re:{pattern[2:]}")
            continue
        for key in ("bits", "group_size", "desc_act", "sym"):
            if isinstance(other, Mapping) and other.get(key, how.get(key)) != how.get(key):
                raise UnsupportedError(
                    f"{file}: {quote(pattern)} is quantized with {key} {quote(other[key])}, the rest with "
                    f"{quote(how.get(key))}; expected one scheme for all"
                )
    return Scheme(
        "gptq",
        _int(how, "bits", 4, file),
        _group(how.get("group_size"), file),
        _bool(how, "sym", True, file),
        _bool(how, "desc_act", False, file),
        str(packing).lower(),
        tuple(kept),
    )


def _awq(how: Mapping[str, Any], file: str) -> Scheme:
    bits, group = ("w_bit", "q_group_size") if "w_bit" in how else ("bits", "group_size")
    return Scheme(
        "awq",
        _int(how, bits, 4, file),
        _group(how.get(group), file),
        not _bool(how, "zero_point", True, file),
        False,
        str(how.get("version") or how.get("format") or "gemm").lower(),
        _names(how, "modules_to_not_convert", file),
    )


def _compressed(how: Mapping[str, Any], file: str) -> Scheme:
    groups = how.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(each, Mapping) for each in groups.values()):
        raise LayoutError(f"{file}: config_groups is {quote(groups)}, expected an object of objects")
    packing = str(how.get("format") or "pack-quantized")
    found = []
    for each in groups.values():
        weights = each.get("weights")
        if not isinstance(weights, Mapping):
            continue
        order = weights.get("actorder")
        found.append(
            Scheme(
                "compressed-tensors",
                _int(weights, "num_bits", 4, file),
                _group(weights.get("group_size") or _last(weights.get("block_structure")), file),
                _bool(weights, "symmetric", True, file),
                order is True or str(order).lower() in ("group", "dynamic"),
                str(each.get("format") or packing),
                _names(how, "ignore", file),
            )
        )
    for other in found[1:]:
        if other != found[0]:
            raise UnsupportedError(
                f"{file}: config_groups of {len(found)} schemes, such as {found[0].bits} and {other.bits} bits; "
                "expected one scheme for all linears"
            )
    return found[0] if found else Scheme("compressed-tensors", group=None, format=packing)


def _int(how: Mapping[str, Any], key: str, default: int, file: str) -> int:
    value = how.get(key)
    if value is None:
        return default
    if type(value) is not int:
        raise LayoutError(f"{file}: {key} is {quote(value)}, expected an integer")
    return value


def _bool(how: Mapping[str, Any], key: str, default: bool, file: str) -> bool:
    value = how.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise LayoutError(f"{file}: {key} is {quote(value)}, expected true or false")
    return value


def _group(value: object, file: str) -> int | None:
    if value is None or value == -1:
        return None
    if type(value) is not int or value < 1:
        raise LayoutError(
            f"{file}: groups of {quote(value)} numbers; expected at least 1, or -1 for a whole row"
        )
    return value


def _last(block: object) -> object:
    """The number of inputs of a block, given as rows x inputs."""
    return block[-1] if isinstance(block, list) and block else None


def _names(how: Mapping[str, Any], key: str, file: str) -> tuple[str, ...]:
    value = how.get(key) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise LayoutError(f"{file}: {key} must be a list of names: what is not quantized")
    return tuple(value)


def _or(values: tuple[object, ...]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))
