"""Read the environment, in this one place; every value can be passed instead."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import InputError, quote

SUFFIXES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
"""Of sizes, as Hugging Face reads them: GB is a power of ten, GiB of two."""


def cache_folder() -> Path:
    """SHARDPREP_CACHE_DIR, or `shardprep` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SHARDPREP_CACHE_DIR")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "shardprep"
    except RuntimeError:  # a container's user that is in no list
        raise InputError("this user has no home; set SHARDPREP_CACHE_DIR, or use cache=None") from None


def cache_bytes() -> int | None:
    """SHARDPREP_CACHE_SIZE (200GB, 1TiB, a number of bytes), or None. Raises InputError for what is no size."""
    given = os.environ.get("SHARDPREP_CACHE_SIZE")
    if not given:
        return None
    found = re.fullmatch(r"(\d{1,18})\s*([A-Za-z]*)", given.strip())
    if not found or found[2].upper() not in SUFFIXES:
        raise InputError(f"SHARDPREP_CACHE_SIZE is {quote(given)}; write 200GB, 1TiB or a number of bytes")
    return int(found[1]) * SUFFIXES[found[2].upper()]


def rank() -> int | None:
    """RANK, which torchrun and most launchers set; None without. Raises InputError for what is no rank."""
    return _number("RANK")


def world_size() -> int | None:
    """WORLD_SIZE; None without."""
    return _number("WORLD_SIZE")


def vllm_layer_partition() -> str | None:
    """VLLM_PP_LAYER_PARTITION: by it vLLM deals layers out to stages, their counts with commas between."""
    return os.environ.get("VLLM_PP_LAYER_PARTITION") or None


def vllm_plugins() -> str | None:
    """VLLM_PLUGINS: the plugins that vLLM may load; None: all."""
    return os.environ.get("VLLM_PLUGINS")


def secret() -> str | None:
    """SHARDPREP_SECRET, which a front end and its workers share; None without."""
    return os.environ.get("SHARDPREP_SECRET") or None


def api_key() -> str | None:
    """SHARDPREP_API_KEY, which `shardprep serve` asks of those who use its /v1; None without."""
    return os.environ.get("SHARDPREP_API_KEY") or None


def use_interface(name: str | None) -> None:
    """Have gloo listen on this network interface, unless GLOO_SOCKET_IFNAME says which."""
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def of_child(**values: str) -> dict[str, str]:
    """The environment for a process that is started here: this one's, and `values`."""
    return {**os.environ, **values}


def quiet_torch() -> None:
    """Have torch's network code print no stacks of C++ calls, unless TORCH_CPP_LOG_LEVEL is set; before its import."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _number(name: str) -> int | None:
    given = os.environ.get(name)
    if given is None:
        return None
    if not given.isdecimal():
        raise InputError(f"the environment's {name} is {quote(given)}, expected a number")
    return int(given)
