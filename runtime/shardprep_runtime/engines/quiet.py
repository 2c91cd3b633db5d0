"""Keep from our user what transformers, and what it imports, say of themselves and of what we made."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Final

NOISY: Final = ("torchao", "torch.utils._pytree")
"""Loggers that complain, as transformers is imported where torchao is installed, of kernels that are not for this machine."""


def hush_loggers() -> None:
    """Have them say errors alone, from now on; before transformers is imported."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers, and no progress bars, within this."""
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
