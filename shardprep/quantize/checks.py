"""Refuse before the work what would fail after hours of it: sizes, text, room, what cannot be measured."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardprep_runtime.errors import InputError, LayoutError, UnsupportedError, quote

from ..index import Index
from ..layout.packed import pack
from ..layout.rules import text_config
from ..model.describe import Model
from ..write.side_files import read_chunks
from .calibration import Tokens, read_heldout
from .forecast import Forecast, forecast
from .recipe import LENGTH, Recipe

SEQUENCES_MEASURED: Final = 8
"""Sequences of the calibration on which quality is measured where no other text is given."""

TOKENS_MEASURED: Final = 2**15
"""Tokens of a text that are measured at most, unless more are asked for."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """On what the quality of a result is measured."""

    text: str | Path | None = None
    """As `read_heldout` takes it; None: a part of the calibration, on which every method looks better than it is."""
    tokens: int = TOKENS_MEASURED
    max_kl: float | None = None
    """Above which the result is not published."""
    skip: bool = False


def check_empty(destination: Path) -> None:
    """Refuse before the work what the writer would refuse after it."""
    if destination.is_dir():
        there = sorted(entry.name for entry in destination.iterdir() if entry.name != ".shardprep-partial")
        if there and not (destination / ".shardprep-partial").is_dir():
            raise InputError(
                f"{quote(destination)}: holds {quote(there[0])}; nothing is overwritten: choose an empty or new folder"
            )
    elif destination.exists() or destination.is_symlink():
        raise InputError(f"{quote(destination)}: exists and is not a folder; choose another destination")


def foretell(model: Model, recipe: Recipe, length: int, *, staged: bool) -> Forecast:
    """What it will take.

    Args:
        model: The model as it is.
        recipe: As `settle` gives it.
        length: Tokens of a calibration sequence.
        staged: Whether the source has to be copied first.

    Raises:
        InputError: Where a pattern of `recipe.skip` names no linear.
        LayoutError: Where the sizes do not fit groups, or the ranks that were asked for.
    """
    for each in recipe.skip:
        _check_skip(model, recipe, each)
    found = forecast(model, recipe, length=length, staged=staged)
    if found.kept:
        name = found.kept[0]
        shape = model.packed.tensors[name][1]
        fits = [size for size in (256, 128, 64, 32, 16) if shape[-1] % size == 0 and size < recipe.group_size]
        ways = [f"--group-size {fits[0]}"] if fits else []
        raise LayoutError(
            f"{quote(name)}: {list(shape)} does not divide into groups of {recipe.group_size} and words of "
            f"{32 // recipe.bits} numbers ({len(found.kept)} linears do not); "
            f"{' or '.join([*ways, f'--skip {_last_word(name)} to keep them as they are'])}"
        )
    if not found.quantized:
        raise LayoutError("no linear of a layer would be quantized; is everything in --skip?")
    if found.problems and recipe.tensor_parallel_size is not None:
        more = f"; --pad-to-tp {recipe.tensor_parallel_size} makes it {found.pad_to}" if found.pad_to else ""
        raise LayoutError(f"{found.problems[0]}{more}")
    return found


def _check_skip(model: Model, recipe: Recipe, pattern: str) -> None:
    """Raises InputError for a pattern that names no linear: it was meant to."""
    tensors = model.packed.tensors
    options: Mapping[str, Any] = {"method": recipe.method, "bits": recipe.bits, "group": None}
    with_it = pack(model.layout, tensors, **options)
    without = pack(model.layout, tensors, **options, skip=[pattern])
    if with_it.tensors.keys() == without.tensors.keys():
        raise InputError(f"--skip {quote(pattern)}: no linear of the model is called so")


def _last_word(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def sequence_length(recipe: Recipe, index: Index) -> int:
    """Tokens of a calibration sequence.

    Args:
        recipe: Which may say how many.
        index: The checkpoint, whose config.json says how many the model takes.

    Raises:
        InputError: For more than the model takes.
    """
    config = text_config(index.config)
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(longest, int) or longest < 1:
        return recipe.length or LENGTH
    if recipe.length is not None and recipe.length > longest:
        raise InputError(
            f"--sequence-length {recipe.length}: the model takes at most {longest} tokens (max_position_embeddings)"
        )
    return recipe.length or min(LENGTH, longest)


def draw_heldout(
    evaluation: Evaluation, calibration: Tokens, tokenizer: Path, length: int, column: str
) -> Tokens:
    """The text on which the result is measured; a part of the calibration where no other is given.

    Args:
        evaluation: What text, and how much of it.
        calibration: The tokens that were drawn for calibration.
        tokenizer: A folder with a tokenizer's files.
        length: Tokens of a sequence.
        column: Of a JSON line or a table.
    """
    if evaluation.text is None:
        return replace(calibration, sequences=calibration.sequences[:SEQUENCES_MEASURED])
    return read_heldout(evaluation.text, tokenizer, length=length, limit=evaluation.tokens, column=column)


def check_measurable(index: Index, heldout: Tokens, device: str) -> None:
    """Refuse before the work what could not be measured after it.

    Args:
        index: The checkpoint that is to be quantized.
        heldout: The tokens on which it will be measured.
        device: On which.

    Raises:
        InputError: With the way around.
    """
    from .walk import Walk, check_kind

    try:
        check_kind(index.config)
        Walk(index, {token for each in heldout.sequences for token in each}, device=device)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; --no-evaluate quantizes it unmeasured") from None


def plain_folder(index: Index) -> Path | None:
    """The folder where an engine can read the checkpoint as it is; None: it must be staged."""
    folder = index.folder.path
    if folder is None or index.kind != "safetensors" or index.edited or "config.json" not in index.side_files:
        return None
    extents = (extent for tensor in index.tensors.values() for extent in tensor.extents)
    return folder if all(extent.file for extent in extents) else None


def copy_small(index: Index, into: Path) -> None:
    """Copy the side files, where a tokenizer and an engine's check find them; its config.json is the index's.

    Args:
        index: The checkpoint whose they are.
        into: A folder that is there.
    """
    for name in index.side_files:
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with index.folder.open(name) as file, open(path, "wb") as out:
            for chunk in read_chunks(file):
                out.write(chunk)
    (into / "config.json").write_text(json.dumps(dict(index.config)), "utf-8")


def check_room(destination: Path, work: Path, expected: Forecast) -> None:
    """See that the disks have room for what will lie there at the same time.

    Args:
        destination: Where the result will stand.
        work: The folder for what lies there meanwhile; what an earlier run left in it counts as there.
        expected: What will be written.

    Raises:
        InputError: Where they have not.
    """
    needs: Counter[Path] = Counter()
    needs[_existing(destination)] += expected.disk.result
    # what the engine makes is copied into the destination, and removed after that
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())  # of a run that was killed
    needs[_existing(work)] += max(
        expected.disk.staged + expected.disk.journal + expected.disk.result - there, 0
    )
    devices: dict[int, tuple[Path, int]] = {}
    for path, needed in needs.items():
        before = devices.get(path.stat().st_dev, (path, 0))
        devices[path.stat().st_dev] = before[0], before[1] + needed
    for path, needed in devices.values():
        free = shutil.disk_usage(path).free
        if needed > free:
            raise InputError(
                f"{quote(path)}: about {needed:,} bytes are needed, {free:,} are free; make room, or put the work "
                "elsewhere with --work"
            )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())
