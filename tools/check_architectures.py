"""Run `shardprep check-arch` over every model type that has rules, one line each; exits with 1 where one fails.

    python tools/check_architectures.py [-tp 4] [-pp 2] [-ep 2] [MODEL_TYPE...]

It takes the small configs of tests/golden where there are some, else transformers' default of the type.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import golden
from shardprep.check import CheckReport, Ranks, check_arch
from shardprep.layout import known_types
from shardprep.model import skeleton
from shardprep_runtime.errors import LayoutError, ShardprepError


def check(model_type: str, folder: Path, ranks: Ranks, *, tp: int, pp: int, ep: int) -> CheckReport:
    plans = [golden.FOLDER / engine / f"{model_type}.json" for engine in ("vllm", "transformers")]
    plan = next((path for path in plans if path.exists()), None)
    config = golden.read(plan).config if plan is not None else skeleton.default_config(model_type)
    file = folder / "config.json"
    file.write_text(json.dumps(dict(config)))
    checked = partial(check_arch, file, tensor_parallel_size=tp, expert_parallel_size=ep, ranks=ranks)
    try:
        return checked(pipeline_parallel_size=pp)
    except LayoutError as error:
        if "stage" not in str(error):
            raise
        return checked(pipeline_parallel_size=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for axis, default in (("tp", 4), ("pp", 2), ("ep", 2)):
        parser.add_argument(f"-{axis}", type=int, default=default)
    parser.add_argument("model_types", nargs="*")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    failed = 0
    with tempfile.TemporaryDirectory() as folder, Ranks() as ranks:
        for model_type in given.model_types or known_types():
            began = time.monotonic()
            try:
                report = check(model_type, Path(folder), ranks, tp=given.tp, pp=given.pp, ep=given.ep)
            except ShardprepError as error:
                line, bad = f"could not be checked: {error}", True
            else:
                bad = report.difference is not None
                assembled = sorted({proof.text for proof in report.proofs if proof.assembled})
                line = f"{len(report.proofs)} proofs"
                line += f", assembled: {assembled[0]}" if assembled else ""
                line = f"FAILED: {report.difference}" if bad else line
            failed += bad
            print(
                f"{model_type:24} {time.monotonic() - began:5.1f} s  {' '.join(line.split())[:400]}",
                flush=True,
            )
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
