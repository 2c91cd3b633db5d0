"""Ask vLLM in a process of its own, for it keeps much of a model until its process ends.

vLLM writes to standard output too, so that what a process has found is a line with a mark.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

MARK: Final = "found: "
"""Begins the line with what a process has found."""

QUIET: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of a vLLM on a CPU that asks nobody."""


def tell(found: Mapping[str, Any]) -> None:
    """Write what this process has found."""
    print(MARK + json.dumps(found), flush=True)


def told(said: str) -> dict[str, Any] | None:
    """What a process found, by its standard output; None where it came to nothing."""
    for line in said.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    return None


def ask(
    command: Sequence[str], environment: Mapping[str, str], *, patience: float, given: str = ""
) -> dict[str, Any]:
    """What a process finds; where that is nothing, `error` says why, and its last words go to standard error.

    Args:
        environment: What it has beside QUIET and ours, of which nothing that begins with AWS_ is left.
        patience: Seconds that it may take.
        given: Its standard input.
    """
    ours = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    try:
        ended = subprocess.run(
            command,
            input=given,
            env={**ours, **QUIET, **environment},
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {patience} s"}
    if (found := told(ended.stdout)) is not None:
        return found
    print(ended.stdout[-4000:], ended.stderr[-8000:], sep="\n", file=sys.stderr)
    errors = [line.strip() for line in ended.stderr.splitlines() if re.search(r"Error\b", line)]
    return {"error": errors[-1] if errors else f"ended with status {ended.returncode}"}
