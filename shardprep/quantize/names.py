"""Give what an engine made the names that the source's tensors have: engines write those of transformers' modules.

Where transformers fuses the experts of a layer, engines take them apart again. They call the parts of each expert
`gate_proj`, `up_proj` and `down_proj`, whatever the checkpoint called them (Mixtral's w1, w3 and w2). GPTQModel takes
Phi-3's `gate_up_proj` apart too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from ..index import Index, Tensor
from ..model import skeleton

FIELDS: Final = ("qweight", "qzeros", "scales", "g_idx")

PARTS: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What an expert's part of a fused tensor is called once it is alone, in the order in which they are fused."""


@dataclass(frozen=True, slots=True)
class Names:
    """What transformers calls the tensors of a checkpoint."""

    modules: Mapping[str, str]
    """Module, as an engine names it -> the same module in the checkpoint."""
    unknown: tuple[str, ...]
    """Tensors that transformers does not load, and no engine keeps: heads that predict further tokens, old buffers."""


def rename_as_source(made: Index, source: Index, names_of_source: Names) -> Index:
    """The index of what was made, with the source's names. Those that neither has stay as they are.

    Args:
        made: What an engine wrote.
        source: The checkpoint that was quantized.
        names_of_source: As `names_of` gives them.
    """
    known = names_of_source.modules
    names = {name: _renamed(name, known) for name in made.tensors}
    tensors = {new: replace(made.tensors[name], name=new) for name, new in names.items()}
    for name in source.tensors:
        path, _, word = name.removesuffix(".weight").rpartition(".")
        parts = [f"{path}.{part}" for part in PARTS.get(word, ())]
        if len(parts) > 1 and all(f"{part}.qweight" in tensors for part in parts):
            _fuse(tensors, parts, f"{path}.{word}")
    return replace(
        made,
        tensors=dict(sorted(tensors.items())),
        aliases={_renamed(alias, known): _renamed(name, known) for alias, name in made.aliases.items()},
    )


def _fuse(tensors: dict[str, Tensor], parts: list[str], stem: str) -> None:
    """Put the fields of linears that share their input beside each other, output behind output, as they were."""
    for field in FIELDS:
        found = [tensors.pop(f"{part}.{field}", None) for part in parts]
        own = [each for each in found if each is not None]
        if len(own) < len(found):
            continue
        name, first = f"{stem}.{field}", own[0]
        if len(first.shape) < 2:  # g_idx: without act-order the same for all
            tensors[name] = replace(first, name=name)
            continue
        extents, at = [], 0
        for each in own:
            extents.append(replace(each.extents[0], start=at, stop=at + each.shape[1]))
            at += each.shape[1]
        tensors[name] = replace(first, name=name, shape=(first.shape[0], at), extents=tuple(extents), dim=1)


def _renamed(name: str, known: Mapping[str, str]) -> str:
    stem, _, field = name.rpartition(".")
    return f"{known[stem]}.{field}" if stem in known else name


def names_of(source: Index) -> Names:
    """The names of a checkpoint's tensors, by transformers' own rules of loading it; from headers alone."""
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    model: Any = skeleton.bare(source.config)
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, loading.WeightConverter)]
    found = {}
    unknown = []
    for name in source.tensors:
        key, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state:
            unknown.append(name)
            continue
        stem = name.rpartition(".")[0]
        if pattern is None:
            found[key.rpartition(".")[0]] = stem
        else:
            for part in _alone(name, key, pattern, converters):
                found[part] = stem
    return Names(found, tuple(unknown))


def _alone(name: str, key: str, pattern: str, converters: list[Any]) -> Iterator[str]:
    """The module of one expert that a tensor is, of those that are fused into `key`."""
    expert = re.search(r"experts\.(\d+)\.", name)
    path, _, fused = key.rpartition(".")
    if expert is None or fused not in PARTS:
        return
    for converter in converters:
        patterns = list(converter.source_patterns)
        if pattern in patterns and len(patterns) == len(PARTS[fused]):
            yield f"{path}.{expert[1]}.{PARTS[fused][patterns.index(pattern)]}"
            return
