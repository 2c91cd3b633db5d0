#!/usr/bin/env python3
"""Write the built-in calibration text from what every Python has: its language reference and some of its library.

Nothing of it may be in tests/data/tiny-llama/heldout.txt, on which the tests measure quality: a shared line refuses.
The same Python gives the same bytes; the digest is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parent.parent
STDLIB = Path(sysconfig.get_path("stdlib"))
MADE_WITH = (3, 11, 7)
TOPICS = (
    "assignment",
    "comparisons",
    "compound",
    "debugger",
    "execmodel",
    "formatstrings",
    "import",
    "strings",
    "types",
)
MODULES = (
    "copy.py",
    "fnmatch.py",
    "glob.py",
    "graphlib.py",
    "hmac.py",
    "html/__init__.py",
    "json/decoder.py",
    "linecache.py",
    "operator.py",
    "sched.py",
    "shelve.py",
    "string.py",
)  # none of which states a licence or a copyright of its own
COMMON = 20  # characters; shorter lines are such as `return result`, which all code has


def documents() -> list[dict[str, str]]:
    """Prose and code in turn, so that any part of the text has both."""
    prose = [(f"pydoc_data/topics.py: {name}", topics[name]) for name in TOPICS]
    code = [(name, (STDLIB / name).read_text(encoding="utf-8")) for name in MODULES]
    found = []
    while prose or code:
        found += [prose.pop(0)] if prose else []
        found += [code.pop(0)] if code else []
    return [{"origin": origin, "text": text} for origin, text in found]


def held_out_lines() -> set[str]:
    text = (ROOT / "tests/data/tiny-llama/heldout.txt").read_text(encoding="utf-8")
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= COMMON}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out", type=Path, nargs="?", default=ROOT / "shardprep/quantize/corpus", metavar="OUT"
    )
    out = parser.parse_args().out
    if sys.version_info[:3] != MADE_WITH:
        sys.exit(f"the text is that of Python {'.'.join(map(str, MADE_WITH))}; run this with it")
    found, held_out = documents(), held_out_lines()
    for document in found:
        if shared := sorted({line.strip() for line in document["text"].splitlines()} & held_out):
            sys.exit(f"{document['origin']}: in the held-out text too: {shared}")
    data = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in found).encode()
    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.jsonl").write_bytes(data)
    shutil.copyfile(ROOT / "tests/data/tiny-llama/LICENSE", out / "LICENSE")
    print(f"{len(found)} documents, {len(data):,} bytes, sha256:{hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
