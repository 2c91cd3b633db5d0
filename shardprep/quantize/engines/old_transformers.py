"""Spell a checkpoint's config.json as transformers before version 5 reads it, in a folder of links to the checkpoint.

Those versions ignore keys that they do not know: a rope base in `rope_parameters` would silently become the default.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIRST_NEW = 5
"""The version of transformers that first reads and writes the new spelling."""

NESTED = ("text_config", "vision_config", "audio_config")


def is_old(transformers: str) -> bool:
    """Whether a version, like `4.51.3`, needs the old spelling."""
    return int(transformers.split(".")[0]) < FIRST_NEW


def spell(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config in the old spelling, and what was spelled anew. Raises ValueError for what it cannot say."""
    spelled, notes = dict(config), []
    if "dtype" in spelled:
        spelled.setdefault("torch_dtype", spelled.pop("dtype"))
        notes.append("dtype -> torch_dtype")
    rope = spelled.pop("rope_parameters", None)
    if rope is not None:
        if "rope_type" not in rope and any(isinstance(each, Mapping) for each in rope.values()):
            raise ValueError(
                "config.json: rope_parameters differ between kinds of layers, which transformers before 5 cannot say"
            )
        parts = dict(rope)
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in parts:
                spelled[key] = parts.pop(key)
                notes.append(f"rope_parameters.{key} -> {key}")
        if parts.get("rope_type", "default") != "default":
            spelled["rope_scaling"] = parts
            notes.append("rope_parameters -> rope_scaling")
    for key in NESTED:
        if isinstance(spelled.get(key), Mapping):
            spelled[key], inner = spell(spelled[key])
            notes += [f"{key}: {note}" for note in inner]
    return spelled, tuple(notes)


def link(source: str, folder: Path) -> tuple[str, ...]:
    """Make `folder` the checkpoint `source`, by links, with its config in the old spelling.

    Returns:
        What was spelled anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in Path(source).resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    spelled, notes = spell(json.loads(Path(source, "config.json").read_text("utf-8")))
    (folder / "config.json").write_text(json.dumps(spelled, indent=2) + "\n", "utf-8")
    return notes


def readable(source: str, folder: Path, transformers: str) -> str:
    """The source, or, for an old transformers, a folder with links to its files and a config.json that it can read.

    Args:
        source: A checkpoint's folder.
        folder: Is made where it is needed.
        transformers: The version that reads it.
    """
    if not is_old(transformers):
        return source
    for note in link(source, folder):
        print(f"config.json: {note}", flush=True)
    return str(folder)


def respell(source: str, destination: str, dtype: str) -> None:
    """Give the checkpoint that a library wrote the source's own config, as it was spelled, with how it is quantized.

    Args:
        source: The folder of the original.
        destination: The folder that the library wrote.
        dtype: torch's name of the dtype of what is not quantized.
    """
    path = Path(destination, "config.json")
    how = json.loads(path.read_text("utf-8"))["quantization_config"]
    config = json.loads(Path(source, "config.json").read_text("utf-8"))
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
        config[key] = dtype
    config["quantization_config"] = how
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
