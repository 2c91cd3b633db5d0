"""Fine-tune a small model in stages, and publish what has changed: split training from end to end.

    python examples/split_training/train.py --work /tmp/example

Takes the trained model of the tests and a text that it has not seen, freezes the lower half, trains the upper half in
`--stages` processes on all of the text but its end, and pushes the result beside the original in a store. README.md has the limits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer import SplitTrainer

TINY = Path(__file__).resolve().parents[2] / "tests/data/tiny-llama"
SHARDPREP = Path(sys.executable).parent / "shardprep"


def shardprep(*args: str | Path) -> dict[str, Any]:
    """Run one shardprep command; its report."""
    done = subprocess.run([SHARDPREP, *args, "--json"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def batches(text: Path, tokenizer: Path, *, rows: int, length: int) -> list[list[list[int]]]:
    """The text's tokens, in batches of `rows` sequences of `length`; what does not fill one is left out."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer)).encode(text.read_text("utf-8")).ids
    size = rows * length
    whole = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return [[batch[i : i + length] for i in range(0, size, length)] for batch in whole]


def run(args: argparse.Namespace, work: Path) -> None:
    store = args.store or f"file://{work / 'store'}"
    shardprep("split", TINY, work / "base", "-tp", "2", "--max-part-size", "1MB")
    first = shardprep("push", work / "base", store, "--revision", "base")
    print(f"base: {first['bytes_sent']:,} bytes sent to {store}")
    *learnt, kept = batches(TINY / "heldout.txt", TINY / "tokenizer.json", rows=4, length=128)
    frozen = ("first", 0, 1, 2)
    with SplitTrainer(
        store, revision="base", stages=args.stages, learning_rate=1e-3, freeze=frozen, threads=1
    ) as trainer:
        print(f"{len(trainer.stages)} stages, layers {trainer.stages}, processes {trainer.pids}")
        print(
            f"before: loss {trainer.evaluate(learnt[0]):.3f}, on text that it does not learn {trainer.evaluate(kept):.3f}"
        )
        for number in range(args.steps):
            begun = time.perf_counter()
            loss = trainer.step(learnt[number % len(learnt)])
            print(f"step {number}: loss {loss:.3f}, {(time.perf_counter() - begun) * 1e3:.0f} ms")
        print(
            f"after: loss {trainer.evaluate(learnt[0]):.3f}, on text that it does not learn {trainer.evaluate(kept):.3f}"
        )
        saved = trainer.save(work / "tuned-checkpoint")
    print(
        f"saved: {len(saved.changed)} tensors have changed; shardprep split {' '.join(saved.split_options)}"
    )
    shardprep("split", saved.folder, work / "tuned", *saved.split_options)
    second = shardprep("push", work / "tuned", store, "--revision", "tuned")
    print(f"tuned: {second['bytes_sent']:,} bytes sent, {second['bytes_present']:,} were there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="an empty or new folder; default: a temporary one")
    parser.add_argument(
        "--store", help="where the shard sets go (s3://bucket/prefix); default: a folder in --work"
    )
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardprep-example-") as scratch:
        run(args, args.work or Path(scratch))


if __name__ == "__main__":
    main()
