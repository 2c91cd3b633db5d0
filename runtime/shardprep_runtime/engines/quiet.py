"""Keep messages of transformers, and of what it imports, from a user who can do nothing about them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Final

NOISY: Final = ("torchao", "torch.utils._pytree")
"""Loggers that complain of kernels for other machines when transformers is imported beside torchao."""


def hush_loggers() -> None:
    """Let the noisy loggers report only errors from now on. Call it before transformers is imported."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' warnings and progress bars until the context ends."""
    hush_loggers()
    import transformers

    own: Any = transformers.logging
    level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_error()
    own.disable_progress_bar()
    try:
        yield
    finally:
        own.set_verbosity(level)
        if bars:
            own.enable_progress_bar()
