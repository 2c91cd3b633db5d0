"""Decide by its name what a file of a checkpoint folder is: weights, a file that travels with them, or neither."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shardprep_runtime.format.manifest import FILE_NAME

SAFETENSORS: Final = (".safetensors",)
TORCH: Final = (".bin", ".pt", ".pth", ".ckpt")
INDEX: Final = ".index.json"
SIDE_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm", ".bpe")
SIDE_NAMES: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
CODE_SUFFIXES: Final = (".py",)
NOT_WEIGHTS: Final = (
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
    "scaler.pt",
)
"""What trainers leave beside the weights under weights' suffixes (also rng_state*.pth)."""


def choose_weights(names: Iterable[str]) -> tuple[str, list[str], list[str]]:
    """Choose safetensors files where there are any, else torch files.

    Returns:
        The kind ("safetensors" or "torch"), the files of that kind, and the files that are a second copy of the weights.
    """
    weights = [name for name in names if not name.startswith("rng_state") and name not in NOT_WEIGHTS]
    files = [name for name in weights if name.endswith(SAFETENSORS)]
    others = [name for name in weights if name.endswith(TORCH)]
    return ("safetensors", files, others) if files else ("torch", others, [])


def is_weights(name: str) -> bool:
    """Whether a file of this name may hold tensors."""
    return name.endswith((*SAFETENSORS, *TORCH))


def is_side_file(name: str, *, include_code: bool) -> bool:
    """Whether a file of this name beside the weights travels with them.

    Args:
        include_code: Let *.py files travel too.
    """
    suffixes = (*SIDE_SUFFIXES, *CODE_SUFFIXES) if include_code else SIDE_SUFFIXES
    wanted = name.endswith(suffixes) or name.split(".")[0].upper() in SIDE_NAMES
    return wanted and not name.endswith(INDEX) and name != FILE_NAME
