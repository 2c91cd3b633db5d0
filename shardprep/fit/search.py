"""Find the ways of dividing one model among given devices: which are possible, what each holds, and which is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from shardprep_runtime.errors import InputError, LayoutError, quote
from shardprep_runtime.format.cut import allows

from ..layout import ModelLayout
from ..layout.packed_linear import Grain
from ..layout.pad import share_evenly
from ..layout.rules import text_config
from ..model.describe import Model
from .budget import GridFit, Shape, Workload, fill
from .kv_cache import BYTES, Kept, read_kept
from .weights import Census, Weights

KV_BYTES: Final = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
"""Name of the KV cache's dtype -> bytes of one number."""

MOST_DEVICES: Final = 512
"""The largest number of devices that is tried when any number may be used."""

MOST_RANKS: Final = 64
"""The largest tensor parallel size that is tried."""


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices that a model may be divided among."""

    memory: tuple[int, ...]
    """Bytes of each device, in the order of ranks; all are used. A single entry: any number of devices of that size."""
    per_host: int = 8
    """Devices of a host, which reach each other without the network."""

    def __post_init__(self) -> None:
        if not self.memory or min(self.memory) < 1 or self.per_host < 1:
            raise InputError("at least one device, of at least one byte, is needed on each host")


@dataclass(frozen=True, slots=True)
class Refused:
    """A tensor parallel size that the model does not allow."""

    tensor_parallel_size: int
    why: str
    pad_to: int | None = None
    """The padded length at which quantization groups would allow the size; None where padding does not help."""


class Search:
    """Every way of dividing one model among given devices that is worth looking at."""

    def __init__(
        self,
        model: Model,
        workload: Workload,
        devices: Devices,
        kv_dtype: str,
        engine: str,
        grain: int | None,
        most: int = MOST_DEVICES,
        like: Search | None = None,
    ) -> None:
        self.model = model
        self.workload = workload
        self.devices = devices
        self.engine = engine
        self.grain = grain
        self.most = most
        self.grids: list[GridFit] = []
        self.refused: dict[int, Refused] = {}
        self.census: Census
        self.mixed: set[int]
        self.weighed: dict[tuple[int, int], Weights | None] = {}
        if (
            like is not None and like.model is model
        ):  # these depend on the model alone, and are slow to work out
            self.census, self.mixed, self.weighed = like.census, like.mixed, like.weighed
        else:
            self.census = Census(model.layout, model.packed.tensors)
            self.mixed = _shared_mixers(model.layout)
        own, own_bytes = _dtype(model)
        self.kv_dtype = _kv_dtype(model, own) if kv_dtype == "auto" else kv_dtype
        layers = model.layout.layers
        kept = read_kept(
            model.config,
            layers,
            kv_bytes=KV_BYTES[self.kv_dtype],
            dtype_bytes=own_bytes,
            latent=engine != "transformers",
        )
        self.kept: tuple[Kept, ...] = tuple(
            each if engine == "vllm" or i in self.mixed else each.uncut() for i, each in enumerate(kept)
        )
        self.shape = _shape(model, own_bytes)
        self.needs = list(
            model.layout.stage_needs.values()
        )  # those of every engine: split refuses stages that one of the engines cannot run
        self.filled: dict[tuple[Any, ...], GridFit | None] = {}

    def again(
        self,
        *,
        model: Model | None = None,
        workload: Workload | None = None,
        devices: Devices | None = None,
        kv_dtype: str | None = None,
        most: int = MOST_DEVICES,
    ) -> GridFit | None:
        """Find the best grid with something changed; what is None stays as it is.

        Args:
            kv_dtype: The dtype of the KV cache.
            most: The largest number of devices that is tried.

        Returns:
            The best grid; None where none fits.
        """
        other = Search(
            model or self.model,
            workload or self.workload,
            devices or self.devices,
            kv_dtype or self.kv_dtype,
            self.engine,
            self.grain,
            most,
            self,
        )
        other.run()
        return other.best()

    def best(self) -> GridFit | None:
        """Choose a grid that fits: one with the fewest devices, then with tensor parallelism within a host before stages."""
        fitting = [grid for grid in self.grids if grid.fits and self._uses_all(grid)]

        def rank(grid: GridFit) -> tuple[int, bool, int, int, int]:
            size = grid.tensor_parallel_size
            across = size > self.devices.per_host
            return grid.devices, across, size if across else -size, grid.expert_parallel_size, -grid.spare

        return min(fitting, key=rank, default=None)

    def _uses_all(self, grid: GridFit) -> bool:
        return len(self.devices.memory) in (1, grid.devices)

    def run(self) -> None:
        """Look at all grids, and fill `grids` and `refused`."""
        given = len(self.devices.memory)
        for size in self._sizes():
            if self.weights(size, 1) is None:
                continue
            for groups in self._groups(size):
                if given > 1:
                    self._listed(size, groups)
                elif self.weights(size, groups) is not None:
                    self._any_number(size, groups)

    def _sizes(self) -> Iterator[int]:
        host, given = self.devices.per_host, len(self.devices.memory)
        sizes = {*range(1, min(host, MOST_RANKS) + 1)}
        sizes |= {host * times for times in (2, 4, 8, 16, 32, 64)}
        for size in sorted(sizes):
            if size > min(MOST_RANKS, self.most) or (self.grain or size) % size:
                continue
            if given == 1 or given % size == 0:
                yield size

    def _groups(self, size: int) -> Iterator[int]:
        if self.model.layout.experts:
            for groups in range(1, size + 1):
                if size % groups == 0 and (size <= 16 or groups in (1, size)):
                    yield groups
        else:
            yield 1

    def weights(self, size: int, groups: int) -> Weights | None:
        """Give the bytes that each rank holds.

        Args:
            size: Tensor parallel size.
            groups: Groups of expert parallel ranks.

        Returns:
            The bytes; None, with the reason in `refused`, where the model does not allow these sizes.
        """
        key = size, groups
        if key not in self.weighed:
            self.weighed[key] = None
            why = self._refusal(size) if groups == 1 else None
            if why is not None:
                self.refused[size] = why
                return None
            try:
                self.weighed[key] = self.census.weigh(size, groups, engine=self.engine)
            except LayoutError as error:
                if groups == 1:
                    self.refused[size] = Refused(size, str(error))
        elif self.weighed[key] is None and groups == 1 and size not in self.refused:
            self.refused[size] = self._refusal(size) or Refused(size, "cannot be cut")
        return self.weighed[key]

    def _refusal(self, size: int) -> Refused | None:
        """Say why `size` tensor ranks cannot share the model's tensors; None where they can."""
        grains = self.model.packed.grains
        unaligned: dict[tuple[int, int], Grain] = {}
        for name, entry in self.census.entries.items():  # one of each kind
            grain = grains.get(name)
            layout = entry.form.layout if grain is None else grain.layout
            if not allows(layout, size):  # padding to whole groups would not help
                units = " + ".join(str(segment.units) for segment in layout.segments)
                return Refused(size, f"{quote(name)}: {units} units cannot be shared by {size} ranks")
            if grain is not None and not allows(entry.form.layout, size):
                unaligned.setdefault((grain.size, grain.multiple), grain)
        if not unaligned:
            return None
        lines = []
        pads = []
        for grain in unaligned.values():
            pads.append(share_evenly(grain.size, grain.multiple, size))
            each, rest = divmod(grain.size, size)
            share = f"{grain.size} / {size} = {each}" + (f" rest {rest}" if rest else "")
            lines.append(
                f"{quote(grain.weight)}: {share} is not a multiple of {grain.multiple}, in which its quantization comes; "
                f"padded to {pads[-1]}, the next multiple of {grain.multiple} x {size}, it could be shared"
            )
        return Refused(size, "; ".join(lines), pads[0])

    def _listed(self, size: int, groups: int) -> None:
        memory = self.devices.memory
        stages = [memory[i : i + size] for i in range(0, len(memory), size)]
        unequal = next((stage for stage in stages if len(set(stage)) > 1), None)
        if unequal is not None:
            self.refused[size] = Refused(
                size,
                f"tensor ranks share the work evenly, and {gib(unequal[0])} and "
                f"{gib(next(each for each in unequal if each != unequal[0]))} are not the same; "
                "put equal devices next to each other",
            )
            return
        if size in self.refused:
            return
        grid = self.grid(size, groups, tuple(stage[0] for stage in stages))
        if grid is not None:
            self.grids.append(grid)
        if len(set(memory)) == 1:  # fewer may do as well
            for count in range(1, len(stages)):
                fewer = self.grid(size, groups, (memory[0],) * count)
                if fewer is not None:
                    self.grids.append(fewer)

    def _any_number(self, size: int, groups: int) -> None:
        """Try numbers of stages: those before the first number that fits, that one, and some more."""
        room = self.devices.memory[0]
        limit = min(self.most // size, self.model.layout.layers)
        weights = self.weights(size, groups)
        assert weights is not None
        all_of_it = max(weights.stage(0, self.model.layout.layers, first=True, last=True))
        all_of_it += self.workload.batch * sum(k.of_sequence(self.workload.context, size) for k in self.kept)
        first = None
        for count in range(min(max(all_of_it // room, 1), max(limit, 1)), limit + 1):
            grid = self.grid(size, groups, (room,) * count)
            if grid is not None and grid.fits:
                first = count
                break
        wanted = {limit} if first is None else {first - 1, first, first + 1, first + 2}
        if first is not None:
            wanted |= {2**i for i in range(10) if first <= 2**i <= 4 * first}
        for count in sorted(wanted):
            if 1 <= count <= limit:
                grid = self.grid(size, groups, (room,) * count)
                if grid is not None:
                    self.grids.append(grid)

    def grid(self, size: int, groups: int, memory: tuple[int, ...]) -> GridFit | None:
        weights = self.weights(size, groups)
        if weights is None:
            return None
        # where all experts can be shared evenly, the groups make no difference
        key = size, memory, weights.layers, tuple(sorted(weights.outside.items()))
        if key not in self.filled:
            self.filled[key] = fill(
                weights,
                self.kept,
                self.shape,
                self.workload,
                memory=memory,
                ranks=size,
                groups=groups,
                needs=self.needs,
            )
        found = self.filled[key]
        return found and replace(found, expert_parallel_size=groups)

    def notes(self) -> Iterator[str]:
        for kind in dict.fromkeys(each.kind for each in self.kept if each.guessed):
            yield f"what layers of the kind {quote(kind)} keep of a sequence is not known; counted as full attention"
        fewest = min(map(len, self.needs), default=0)
        if fewest:
            yield f"at most {fewest} stages: each must hold at least one of the layers with full attention"


def _shared_mixers(layout: ModelLayout) -> set[int]:
    """Layers whose attention (or what replaces it) is shared by tensor ranks, and not only their MLP."""
    return {
        placed.layer
        for name, placed in layout.tensors.items()
        if isinstance(placed.layer, int)
        and placed.layout.dim is not None
        and placed.expert is None
        and not (placed.layout.experts or MLPS.intersection(name.split(".")))
    }


MLPS: Final = frozenset(
    (
        "mlp",
        "feed_forward",
        "ffn",
        "block_sparse_moe",
        "experts",
        "shared_experts",
        "shared_mlp",
        "fc1",
        "fc2",
    )
)
"""Words in the names of tensors that belong to an MLP, and so do not change what a layer keeps of a sequence."""


def _dtype(model: Model) -> tuple[str, int]:
    """The dtype in which the model computes, and its bytes."""
    text = text_config(model.config)
    named = next((str(c[k]) for c in (text, model.config) for k in ("dtype", "torch_dtype") if c.get(k)), "")
    named = named.removeprefix("torch.")
    if named in BYTES:
        return named, BYTES[named]
    kinds = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = next((kinds[dtype] for dtype in model.dtypes() if dtype in kinds), "bfloat16")
    return found, BYTES[found]


def _kv_dtype(model: Model, own: str) -> str:
    how = model.config.get("quantization_config")
    if isinstance(how, Mapping):
        scheme = how.get("kv_cache_scheme")
        if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8:
            return "fp8"
        if str(how.get("kv_cache_quant_algo", "")).upper() == "FP8":
            return "fp8"
    return {"float32": "fp32", "float16": "fp16"}.get(own, "bf16")


def _shape(model: Model, dtype_bytes: int) -> Shape:
    text = text_config(model.config)

    def number(*keys: str) -> int:
        found = next((text[key] for key in keys if type(text.get(key)) is int), 0)
        return max(found, 0)

    hidden = number("hidden_size", "n_embd", "d_model", "dim")
    dense = number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff") or 4 * hidden
    chosen = number("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    own = number("moe_intermediate_size", "expert_ffn_hidden_size") or (dense if chosen else 0)
    shared = number("shared_expert_intermediate_size") or number("n_shared_experts") * own
    return Shape(hidden, max(dense, chosen * own + shared), number("vocab_size"), dtype_bytes)


def gib(nbytes: int) -> str:
    """Write a number of bytes for a sentence."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
