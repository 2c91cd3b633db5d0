"""Decide which of a checkpoint's tied tensors are stored once."""

from __future__ import annotations

from dataclasses import replace

from ..index import Index
from .rules import known_types, ties_head


def settle_aliases(index: Index) -> Index:
    """Store a tied tensor once only where the model's config ties it again; otherwise store it under each name.

    A model with known rules, whose config does not tie two tensors, needs both of them. That they shared memory in the
    checkpoint does not help: a loader would leave the second one random. Tied tensors of a model without rules stay
    tied. Where head and embedding are tied, the embedding is stored.
    """
    pair = ties_head(index.config)
    tensors, aliases = dict(index.tensors), {}
    for alias, name in index.aliases.items():
        if pair == (name, alias):
            tensors[alias] = replace(tensors.pop(name), name=alias)
            aliases[name] = alias
        elif pair == (alias, name) or index.config.get("model_type") not in known_types():
            aliases[alias] = name
        else:
            tensors[alias] = replace(tensors[name], name=alias)
    while any(
        name in aliases for name in aliases.values()
    ):  # three names of one tensor, and the middle one moved
        aliases = {alias: aliases.get(name, name) for alias, name in aliases.items()}
    return replace(index, tensors=dict(sorted(tensors.items())), aliases=dict(sorted(aliases.items())))
