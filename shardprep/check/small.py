"""Make the small random model that is checked: its checkpoint, its layout, and the views of its ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import shardprep_runtime
from shardprep_runtime.errors import LayoutError, ProblemError, UnsupportedError, quote
from shardprep_runtime.format.grid import Stages, even_stages
from shardprep_runtime.format.manifest import Manifest

from ..layout import ModelLayout, derive_layout
from ..model import skeleton
from .blocks import Views
from .models import answers
from .report import Differs, Workers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Tensors = Mapping[str, torch.Tensor]

PROMPT: Final = (2, 12)
"""Shape of the prompt: texts x tokens."""


class SmallModel:
    """A small random model, with the sizes and the engines that it is checked for.

    Tensor parallel sizes divide the one that is given; numbers of stages and of expert groups do not exceed theirs.
    `shard_set.prove_split` writes the model's shard set.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        *,
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
        expert_parallel_size: int,
        engines: tuple[str, ...],
    ) -> None:
        import torch

        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.shard_set = folder / "shards"
        self.model = skeleton.build(config)
        self.model.save_pretrained(self.checkpoint)
        self.tensors = read_tensors(self.checkpoint)
        self.grain = tensor_parallel_size
        self.pp = pipeline_parallel_size
        self.ep = expert_parallel_size
        self.config = json.loads((self.checkpoint / "config.json").read_text())
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, vocabulary, PROMPT, generator=generator)
        self.layout = self._derive()
        self.engines = tuple(each for each in engines if each == "torch" or each in self.layout.engines)
        try:
            self.logits, self.tokens = answers(self.model, self.prompt)
        except Exception as error:  # noqa: BLE001 - whatever transformers raises
            raise UnsupportedError(
                f"transformers cannot run a small {quote(self.config.get('model_type'))}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None
        if not torch.isfinite(self.logits).all():
            raise UnsupportedError(
                f"a small {quote(self.config.get('model_type'))} gives logits that are not finite; nothing can be compared"
            )

    def _derive(self) -> ModelLayout:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        try:
            layout = derive_layout(self.config, shapes)
        except LayoutError as error:  # config and shapes belong together, so the rules are wrong
            raise ProblemError(
                f"the rules do not fit what transformers makes of this config: {error}"
            ) from None
        layout.check_grain(self.grain)
        if self.pp > max(layout.layers, 1):
            raise LayoutError(
                f"{layout.layers} layers of the small model cannot fill {self.pp} pipeline stages; use at most {layout.layers}"
            )
        return layout

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def manifest(self) -> Manifest:
        return shardprep_runtime.read_manifest(self.shard_set)

    # ------------------------------------------------------------------------------------- what is checked of it
    def sizes(self) -> list[int]:
        """List the tensor parallel sizes that are checked."""
        return [size for size in range(1, self.grain + 1) if self.grain % size == 0]

    def expert_sizes(self, size: int) -> list[int]:
        """List the expert parallel sizes that are checked at a tensor parallel size."""
        experts = self.manifest.experts
        return [1, *(n for n in range(2, min(self.ep, size, experts) + 1) if size % n == 0)]

    def stages(self, pp: int) -> Stages:
        """The layers of each of `pp` stages."""
        return even_stages(self.layout.layers, pp)

    def refusal(self, engine: str, pp: int) -> str | None:
        """Say why an engine cannot run `pp` stages, so that its views must be refused; None where it can.

        Args:
            pp: Number of stages.
        """
        needs = self.layout.stage_needs.get(engine)
        if needs is None:
            return None
        for start, stop in self.stages(pp):
            if not any(start <= layer < stop for layer in needs):
                return f"{engine} needs one of the layers {', '.join(map(str, needs))} in layers {start}-{stop - 1}"
        return None

    def plan(self, workers: Workers) -> list[Views]:
        """Plan the view of every rank of a grid.

        Raises:
            Differs: Where a view is refused that should be allowed.
        """
        found = []
        for rank in range(workers.world_size):
            try:
                view = shardprep_runtime.plan_view(self.manifest, workers.place_of(rank))
            except LayoutError as error:
                raise Differs(
                    "views", "the shard set", rank, workers, expected="a view", found=str(error)
                ) from None
            found.append(view.tensors)
        return found

    # ----------------------------------------------------------------------------------------------- the model
    def model_of(self, state: Tensors) -> PreTrainedModel:
        """Have transformers load these tensors as it loads a checkpoint."""
        from transformers import AutoConfig

        kind: Any = type(self.model)
        found: PreTrainedModel = kind.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(self.checkpoint),
            state_dict=dict(state),
            dtype=self.logits.dtype,
            attn_implementation="eager",
        ).eval()
        return found

    def layers_path(self) -> str | None:
        """The path of the model's list of layers; None where transformers builds the model of no such list."""
        from torch import nn

        found = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.layout.layers
        ]
        return min(found, key=lambda path: path.count("."), default=None)


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the safetensors files in a folder."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found.update(load_file(file))
    return found
