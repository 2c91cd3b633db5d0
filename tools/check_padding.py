"""Pad a small model of every type that may be padded; exits with 1 where one computes something else then.

    python tools/check_padding.py [MODEL_TYPE...]

In float64, where zeros that are added to a sum change nothing but how it is blocked.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from padding import difference, small_config
from shardprep.layout.pad import HARMLESS
from shardprep.model import skeleton

MOST = 1e-12
"""Of the largest logit."""


def main() -> int:
    wrong = 0
    for model_type in sys.argv[1:] or sorted(HARMLESS):
        with tempfile.TemporaryDirectory() as folder, skeleton.quiet():
            found = difference(small_config(model_type), Path(folder))
        wrong += found >= MOST
        print(f"{'ok  ' if found < MOST else 'FAIL'} {model_type:24} {found:.1e}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
