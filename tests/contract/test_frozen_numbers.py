"""What the trained model of the tests is worth, and how many bytes its workers fetch, does not move.

`python tests/contract/test_frozen_numbers.py --write` writes the files anew; a change of theirs is then seen in review.
"""

from __future__ import annotations

import difflib
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shardprep.split import SplitOptions
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set

if __name__ == "__main__":  # as pytest finds them
    sys.path.insert(0, str(Path(__file__).parents[1]))

DATA = Path(__file__).parents[1] / "data"
FROZEN = DATA / "frozen"
TINY = DATA / "tiny-llama"
CONTEXT = 256
"""Tokens that are predicted in a context, as in the README of the model."""

LAYERS, GRAIN, PART = 6, 4, 2**20
GRIDS = [(tp, pp) for pp in (1, 2, 3) for tp in (1, 2, 4)]
"""Of the demo, as its grain and its size of parts."""


def uneven(pp: int) -> list[list[int]]:
    """The stages of the demo: the first is one layer shorter than an even share where it can be."""
    bounds = [0, *sorted(max(i, LAYERS * i // pp - 1) for i in range(1, pp)), LAYERS]
    return [list(pair) for pair in pairwise(bounds)]


def fetched(folder: Path) -> dict[str, Any]:
    """Bytes that come from a store: of each rank of the demo's grids with one empty cache a grid, and of pulls."""
    from shardprep.publish.pull import pull
    from shardprep.split import split
    from shardprep_runtime import prefetch, read_manifest
    from stores import make_store

    shards = folder / "shards"
    split(TINY, shards, tensor_parallel_size=GRAIN, options=SplitOptions(max_part_bytes=PART))
    store = f"file://{make_store(shards, folder / 'store')}"
    found: dict[str, Any] = {"stored": sum(part.size for part in read_manifest(shards).parts)}
    for tp, pp in GRIDS:
        ranks = []
        for rank in range(tp * pp):
            cache = folder / f"cache-{tp}-{pp}"
            with open_set(store, cache=cache).load(
                Place(tensor_parallel_size=tp, stages=uneven(pp), rank=rank)
            ) as shard:
                shard.wait()
                ranks.append(shard.bytes_fetched)
        found[f"load tp{tp} pp{pp}"] = ranks
    ahead = prefetch(store, tensor_parallel_size=2, rank=1, cache=folder / "prefetched")
    try:
        assert ahead.wait()
        found["prefetch tp2 rank 1"] = ahead.bytes_fetched
    finally:
        ahead.close()
    found["pull"] = pull(store, folder / "pulled").bytes_fetched
    found["pull tp4 rank 3"] = pull(store, folder / "of-3", place=Place(3, 4)).bytes_fetched
    return found


def computed_by() -> dict[str, str]:
    """What the last bits of a float depend on."""
    import torch
    import transformers

    # kernels are chosen by more than the vector width: two processors of one width may differ in the last bit
    info = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    said = dict(line.split("\t", 1) for line in info.splitlines() if "\t" in line)
    model = " ".join(said.get(key, "").strip("\t :") for key in ("vendor_id", "cpu family", "model"))
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {model.strip()}",
    }


def quality(folder: Path) -> dict[str, Any]:
    """Perplexity and KL of the trained model in 4 bits on held-out text, every float as its exact hexadecimal."""
    from tokenizers import Tokenizer

    from quantized_models import one_thread, write_quantized
    from shardprep.layout.quantization import Scheme
    from shardprep.quantize.quality import measure
    from shardprep.source import open_source, read_checkpoint

    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode((TINY / "heldout.txt").read_text()).ids
    text = [ids[i : i + CONTEXT + 1] for i in range(0, len(ids) - 1, CONTEXT)]
    packed = write_quantized(TINY, folder / "packed", Scheme("gptq", 4, 32))
    with ExitStack() as stack, one_thread():
        original, quantized = (
            read_checkpoint(stack.enter_context(open_source(place))) for place in (TINY, packed)
        )
        measured = measure(original, quantized, text).as_json()
    layers = [{key: _exact(value) for key, value in layer.items()} for layer in measured.pop("layers")]
    return {
        "by": computed_by(),
        **{key: _exact(value) for key, value in measured.items()},
        "layers": layers,
    }


def _exact(value: float) -> int | str:
    return value.hex() if isinstance(value, float) else value


FILES: dict[str, Callable[[Path], dict[str, Any]]] = {"fetched.json": fetched, "quality.json": quality}


def dumped(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"


def compare(name: str, found: str) -> None:
    """Fails with what differs, and how to write it anew."""
    kept = (FROZEN / name).read_text("utf-8")
    lines = difflib.unified_diff(kept.splitlines(), found.splitlines(), f"frozen {name}", "now", lineterm="")
    if found != kept:
        shown = "\n".join(lines)
        pytest.fail(
            f"{shown}\nMeant to change? python tests/contract/test_frozen_numbers.py --write", pytrace=False
        )


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_workers_fetch_the_bytes_that_they_did(tmp_path: Path) -> None:
    compare("fetched.json", dumped(fetched(tmp_path)))


@pytest.mark.slow
@pytest.mark.xdist_group("transformers, too")  # one process that has imported transformers
def test_the_trained_model_is_worth_what_it_was_to_the_last_bit(tmp_path: Path) -> None:
    kept = json.loads((FROZEN / "quality.json").read_text("utf-8"))
    if kept["by"] != computed_by():
        pytest.skip(f"the last bits were frozen with {kept['by']}, and here is {computed_by()}")
    compare("quality.json", dumped(quality(tmp_path)))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    sys.dont_write_bytecode = True
    for file, make in FILES.items():
        with tempfile.TemporaryDirectory(prefix="shardprep-") as made:
            (FROZEN / file).write_text(dumped(make(Path(made))), "utf-8")
