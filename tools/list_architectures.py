"""Write docs/architectures.md: every model type that has rules, who was asked about it, and what a rank holds of it.

    python tools/list_architectures.py [--check]

The shares are of transformers' default config of the type, built without memory for its weights.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import golden
from shardprep.layout import ModelLayout, derive_layout, known_types
from shardprep.model import skeleton
from shardprep_runtime.errors import LayoutError, ShardprepError
from shardprep_runtime.format import dtypes
from shardprep_runtime.format.cut import allows, takes

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SIZES = (2, 4, 8)

HEAD = """# Model types that have rules

Made by `tools/list_architectures.py`; [layouts.md](layouts.md) says how the rules came about. *Engines* are those whose
own loaders were asked, and whose way of cutting a view can follow; `--engine torch` works for all. The shares are what
the largest rank holds of transformers' default config of the type at tensor parallel size 2, 4 and 8, in percent of the
model's bytes (a perfect cut is 50.0, 25.0, 12.5); `-` where heads do not divide.

| model type | engines | experts | TP 2 | TP 4 | TP 8 |
|---|---|---|---|---|---|
"""


def share(layout: ModelLayout, shapes: skeleton.Shapes, size: int) -> float | None:
    """The part of the model's bytes that the largest tensor rank of `size` holds; None where it cannot be cut so."""
    if not all(allows(placed.layout, size) for placed in layout.tensors.values()):
        return None
    alike = Counter((layout.tensors[name].layout, dtype, shape) for name, (dtype, shape) in shapes.items())
    whole = 0
    held = [0] * size
    for (own, dtype, shape), count in alike.items():
        nbytes = dtypes.nbytes(dtype, shape) * count
        whole += nbytes
        for rank in range(size):
            if own.dim is None:
                held[rank] += nbytes
            elif shape[own.dim]:
                taken = takes(own, shape, size, size=size, rank=rank)
                held[rank] += nbytes * sum(t.stop - t.start for t in taken) // shape[own.dim]
    return max(held) / whole


def row(model_type: str) -> str:
    engines = "-"
    experts = ""
    cells = ["", "", ""]
    config = None
    try:
        config = skeleton.default_config(model_type)
        shapes = skeleton.shapes_of(config)
        layout = derive_layout(config, {name: shape for name, (_, shape) in shapes.items()})
    except (LayoutError, ShardprepError):  # some default configs contradict themselves: a small one then
        plan = next(
            golden.read(path)
            for engine in ("transformers", "vllm")
            if (path := golden.FOLDER / engine / f"{model_type}.json").exists()
        )
        shapes = plan.shapes
        layout = derive_layout(plan.config, {name: shape for name, (_, shape) in shapes.items()})
        model_type += " (small)"
    engines = ", ".join(layout.engines)
    experts = str(layout.experts or "")
    cells = ["-" if (part := share(layout, shapes, size)) is None else f"{100 * part:.1f}" for size in SIZES]
    return f"| `{model_type}` | {engines} | {experts} | {' | '.join(cells)} |"


@skeleton.quiet()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="fail where the page is not what would be written"
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    text = HEAD + "\n".join(row(model_type) for model_type in known_types()) + "\n"
    if given.check:
        return int(PAGE.read_text("utf-8") != text)
    PAGE.write_text(text, "utf-8")
    print(f"{len(known_types())} model types")
    return 0


if __name__ == "__main__":
    sys.exit(main())
