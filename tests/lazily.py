"""torch, transformers, and how tensors lie in files, imported when a test first uses them: collecting needs none.

    from lazily import load_file, torch

A test module that uses torch while it is imported (a default, a decorator, a base class) imports it then.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any


class _Later(types.ModuleType):
    """Stands for a module: what is asked of it is asked of the module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and self.__name__ not in sys.modules:
            raise AttributeError(name)  # pytest asks every name of a test module whether it is a test
        return getattr(importlib.import_module(self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(importlib.import_module(self.__name__), name, value)


def load_file(path: str | Path) -> dict[str, Any]:
    """safetensors' own."""
    from safetensors.torch import load_file

    return load_file(path)


def save_file(tensors: dict[str, Any], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)


torch: Any = _Later("torch")
transformers: Any = _Later("transformers")
