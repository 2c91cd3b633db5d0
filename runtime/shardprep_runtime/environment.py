"""Read the environment, for the whole runtime in this one place. Every value can be passed as an argument instead."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import InputError, quote

SUFFIXES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
"""Suffixes of sizes, as Hugging Face reads them: GB is a power of ten, GiB a power of two."""


def cache_folder() -> Path:
    """The folder of the host's cache: SHARDPREP_CACHE_DIR, or `shardprep` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SHARDPREP_CACHE_DIR")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "shardprep"
    except RuntimeError:  # the user of a container may not be in /etc/passwd
        raise InputError("this user has no home; set SHARDPREP_CACHE_DIR, or use cache=None") from None


def cache_bytes() -> int | None:
    """Bytes of the host's cache at most: SHARDPREP_CACHE_SIZE (200GB, 1TiB, a number of bytes); None where it is unset.

    Raises:
        InputError: For anything that is not a size.
    """
    given = os.environ.get("SHARDPREP_CACHE_SIZE")
    if not given:
        return None
    found = re.fullmatch(r"(\d{1,18})\s*([A-Za-z]*)", given.strip())
    if not found or found[2].upper() not in SUFFIXES:
        raise InputError(f"SHARDPREP_CACHE_SIZE is {quote(given)}; write 200GB, 1TiB or a number of bytes")
    return int(found[1]) * SUFFIXES[found[2].upper()]


def rank() -> int | None:
    """The rank of this process: RANK, which torchrun and most launchers set; None where it is unset.

    Raises:
        InputError: For anything that is not a number.
    """
    return _number("RANK")


def world_size() -> int | None:
    """The number of processes: WORLD_SIZE; None where it is unset."""
    return _number("WORLD_SIZE")


def vllm_layer_partition() -> str | None:
    """How vLLM divides layers among stages: VLLM_PP_LAYER_PARTITION, a count for each stage with commas between."""
    return os.environ.get("VLLM_PP_LAYER_PARTITION") or None


def vllm_plugins() -> str | None:
    """The plugins that vLLM may load: VLLM_PLUGINS; None: all."""
    return os.environ.get("VLLM_PLUGINS")


def secret() -> str | None:
    """The secret that a front end and its workers share: SHARDPREP_SECRET; None where it is unset."""
    return os.environ.get("SHARDPREP_SECRET") or None


def api_key() -> str | None:
    """The key that `shardprep serve` demands of requests to its /v1: SHARDPREP_API_KEY; None where it is unset."""
    return os.environ.get("SHARDPREP_API_KEY") or None


def use_interface(name: str | None) -> None:
    """Have gloo listen on a network interface, unless GLOO_SOCKET_IFNAME names one already."""
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def of_child(**values: str) -> dict[str, str]:
    """The environment for a process that is started here: that of this process, and `values`."""
    return {**os.environ, **values}


def quiet_torch() -> None:
    """Keep torch's network code from printing stacks of C++ calls, unless TORCH_CPP_LOG_LEVEL is set.

    Call it before torch is imported.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _number(name: str) -> int | None:
    given = os.environ.get(name)
    if given is None:
        return None
    if not given.isdecimal():
        raise InputError(f"the environment's {name} is {quote(given)}, expected a number")
    return int(given)
