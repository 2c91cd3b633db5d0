"""Make `--load-format shardprep` known to vLLM: the entry point that vLLM calls in each of its processes.

(vLLM's group of entry points `vllm.general_plugins`; `register_model_loader` is there since vLLM 0.15.)
"""

from __future__ import annotations

from typing import Final

LOAD_FORMAT: Final = "shardprep"


def register() -> None:
    """Register the loader. May be called again; raises ImportError where vLLM is too old to take one."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    if LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        from .vllm_loader import ShardprepLoader

        register_model_loader(LOAD_FORMAT)(ShardprepLoader)
