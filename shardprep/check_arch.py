"""Prove by running it that an architecture's layout rules are right: on a small random model of that architecture.

The rules say how tensors may be cut; this asks the model itself. Each proof is made from other knowledge than the
rules': the model's own attention and layers, transformers' own tensor parallelism on real processes, and its bytes.
Needs torch and transformers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import shardprep_runtime
from shardprep_runtime.errors import InputError, LayoutError, ProblemError, UnsupportedError, quote
from shardprep_runtime.grid import Grid, Stages, even_stages
from shardprep_runtime.manifest import Manifest
from shardprep_runtime.shardview import Run, runs_of
from shardprep_runtime.store import Access
from shardprep_runtime.view import TensorView

from .check_worker import Answer, Job, Ranks, answers, forward
from .export import export
from .files import LocalFolder
from .layout import ModelLayout, derive_layout
from .source import open_source
from .source.checkpoint import read_config, read_json
from .split import split

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    Tensors = Mapping[str, torch.Tensor]

ENGINES: Final = ("torch", "transformers", "vllm")

LOGITS: Final = 1e-5
"""By how much the logits of real tensor ranks may differ, in fp32, of the largest: sums are made in another order."""

PARTIAL: Final = 1e-4
"""By how much ranks' partial sums may differ from the whole, of the largest number in it."""

READ: Final = 1.02
"""Bytes that a rank may read for each that it keeps."""

PROMPT: Final = (2, 12)
"""Texts x tokens of the prompt."""


@dataclass(frozen=True, slots=True)
class Proof:
    """One thing that was proved."""

    name: str
    """split, views, heads, sums, logits, ranks, stages or export."""
    text: str
    """What holds, and how far."""
    assembled: bool = False
    """Whether the engine itself could not be run, so that its ranks' tensors were put together instead; `text` says why."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that is not as it should be."""

    proof: str
    tensor: str
    """Or the module, or what else differs."""
    rank: int | None
    grid: str
    """`tp 4 pp 1 ep 1, vllm`."""
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"rank {self.rank} of {self.grid}" if self.rank is not None else self.grid
        return f"{self.proof}: {quote(self.tensor)}, {where}: expected {self.expected}; found {self.found}"


class _Differs(Exception):  # noqa: N818 - no error but the end of a proof
    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was proved of an architecture, and what was not."""

    model_type: str
    tensor_parallel_size: int
    """The grain: every size that divides it was checked."""
    pipeline_parallel_size: int
    expert_parallel_size: int
    engines: tuple[str, ...]
    tensors: int
    nbytes: int
    """Of the small model."""
    proofs: tuple[Proof, ...]
    difference: Difference | None
    """None: all proofs hold."""

    @property
    def ok(self) -> bool:
        return self.difference is None


def check_arch(
    source: Path | str,
    *,
    tensor_parallel_size: int = 4,
    pipeline_parallel_size: int = 2,
    expert_parallel_size: int = 2,
    engines: Sequence[str] = ENGINES,
    access: Access | None = None,
    ranks: Ranks | None = None,
    tell: Callable[[Proof], None] = lambda _: None,
) -> CheckReport:
    """Check the rules of the architecture of `source`: a checkpoint (path or URI), a config.json, or a model type.

    engines        whose views are checked
    ranks          processes for transformers' tensor parallelism; None: started for this check
    tell           called with each proof as it is made
    Of a checkpoint its config.json alone is read. Raises InputError for a model, a size or a config that is not
    supported; what was tried and found wrong is in the report.
    """
    _demand()
    from . import skeleton

    config = read_model_config(source, access)
    small = skeleton.shrink(config)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardprep-check-")))
        stack.enter_context(_quiet())
        model = skeleton.build(small)
        checkpoint = folder / "checkpoint"
        model.save_pretrained(checkpoint)
        check = _Check(
            folder=folder,
            checkpoint=checkpoint,
            model=model,
            tensors=_read(checkpoint),
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            expert_parallel_size=expert_parallel_size,
            engines=tuple(engines),
        )
        if "transformers" in check.engines and tensor_parallel_size > 1:
            check.ranks = ranks or stack.enter_context(Ranks())  # it imports while the first proofs are made
        proofs: list[Proof] = []
        difference = None
        try:
            for proof in check.proofs():
                proofs.append(proof)
                tell(proof)
        except _Differs as differs:
            difference = differs.difference
        return CheckReport(
            model_type=str(small.get("model_type")),
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            expert_parallel_size=expert_parallel_size,
            engines=check.engines,
            tensors=len(check.tensors),
            nbytes=sum(tensor.nbytes for tensor in check.tensors.values()),
            proofs=tuple(proofs),
            difference=difference,
        )


def _demand() -> None:
    """Raises UnsupportedError where what builds and runs models is not installed."""
    for module in ("torch", "transformers", "safetensors"):
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(
                f"check-arch builds and runs a small model, and {module} is not installed: "
                "pip install 'shardprep[transformers]'"
            )


def read_model_config(source: Path | str, access: Access | None = None) -> Mapping[str, Any]:
    """The config.json of a checkpoint at a path or URI, of a file, or transformers' default one of a model type."""
    path = Path(source)
    if isinstance(source, Path) or "://" not in str(source):
        if path.is_file() and path.suffix == ".json":
            return read_json(LocalFolder(path.parent), path.name)
        if not path.exists() and re.fullmatch(r"[a-z][a-z0-9_-]*", str(source)):
            from . import skeleton

            return skeleton.default_config(str(source))
    with open_source(source, access, data=False) as opened:
        config = read_config(opened.folder)
    if not config:
        raise InputError(f"{quote(source)}: no config.json, which says what architecture it is")
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its notes on a model that was made to be small, and without threads,
    which so small a model does not repay."""
    import torch
    import transformers

    logging: Any = transformers.logging
    level, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found.update(load_file(file))
    return found


Views = Mapping[str, TensorView]
"""What one rank holds, by name."""


class _Check:
    """One small model, its shard set, and the proofs about them in the order of what they rest on."""

    def __init__(
        self,
        *,
        folder: Path,
        checkpoint: Path,
        model: PreTrainedModel,
        tensors: dict[str, torch.Tensor],
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
        expert_parallel_size: int,
        engines: tuple[str, ...],
    ) -> None:
        import torch

        self.folder = folder
        self.checkpoint = checkpoint
        self.shard_set = folder / "shards"
        self.model = model
        self.tensors = tensors
        self.grain = tensor_parallel_size
        self.pp = pipeline_parallel_size
        self.ep = expert_parallel_size
        self.ranks: Ranks
        self.config = json.loads((checkpoint / "config.json").read_text())
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, vocabulary, PROMPT, generator=generator)
        self.layout = self._derive()
        self.engines = tuple(each for each in engines if each == "torch" or each in self.layout.engines)
        self.manifest: Manifest
        try:
            self.logits, self.tokens = answers(model, self.prompt)
        except Exception as error:  # noqa: BLE001 - whatever transformers raises
            raise UnsupportedError(
                f"transformers cannot run a small {quote(self.config.get('model_type'))}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None
        if not torch.isfinite(self.logits).all():
            raise UnsupportedError(
                f"a small {quote(self.config.get('model_type'))} gives logits that are no numbers; nothing can be compared"
            )

    def _derive(self) -> ModelLayout:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        try:
            layout = derive_layout(self.config, shapes)
        except LayoutError as error:  # both come from one config: it is the rules that are wrong
            raise ProblemError(
                f"the rules do not fit what transformers makes of this config: {error}"
            ) from None
        layout.check_grain(self.grain)
        if self.pp > max(layout.layers, 1):
            raise LayoutError(
                f"{layout.layers} layers of the small model cannot fill {self.pp} pipeline stages; use at most {layout.layers}"
            )
        return layout

    def proofs(self) -> Iterator[Proof]:
        """Each proof as it is made. Ends with _Differs at the first thing that is wrong."""
        yield from self._split()
        yield from self._views()
        yield from self._heads()
        unproved = None
        try:
            yield from self._sums()
        except _Differs as differs:
            if "vllm" in self.engines or "transformers" not in self.engines:
                raise
            unproved = differs  # an engine may well exchange what its ranks compute inside of a module
        yield from self._assembled_logits()
        real = True
        for proof in self._real_ranks():
            real = real and not proof.assembled
            yield proof
        if unproved is not None:
            if not real:
                raise unproved
            yield Proof(
                "sums",
                f"{unproved.difference.tensor}: partial results do not add up: ranks exchange them inside of it",
            )
        yield from self._stages()
        yield self._export()

    # --------------------------------------------------------------------------------------------- split, and views
    def _split(self) -> Iterator[Proof]:
        stages = self._plain_stages(self.pp) if self.layout.layers else None
        refused = self._refusal(stages) if stages else None
        try:
            report = split(
                self.checkpoint,
                self.shard_set,
                tensor_parallel_size=self.grain,
                stages=stages if refused is None else None,
                max_part_bytes=max(sum(t.nbytes for t in self.tensors.values()) // 4, 4096),
            )
        except InputError as error:
            raise _Differs(
                Difference("split", "the checkpoint", None, f"tp {self.grain}", "to be cut", str(error))
            ) from None
        self.manifest = shardprep_runtime.read_manifest(self.shard_set)
        yield Proof(
            "split",
            f"grain {self.grain}: {report.tensors} tensors in {len(report.parts)} parts, "
            f"{report.stored_bytes / report.source_bytes:.3f} x the model",
        )
        if refused is not None:
            yield Proof("stages", f"refused as it should be: {refused}")

    def _plain_stages(self, size: int) -> Stages:
        return even_stages(self.layout.layers, size)

    def _refusal(self, stages: Stages) -> str | None:
        """Why an engine cannot run these stages, as its views say it; None where all can."""
        for engine, needs in self.layout.stage_needs.items():
            for start, stop in stages:
                if engine in self.engines and not any(start <= layer < stop for layer in needs):
                    return f"{engine} needs one of the layers {', '.join(map(str, needs))} in layers {start}-{stop - 1}"
        return None

    def _sizes(self) -> list[int]:
        return [size for size in range(1, self.grain + 1) if self.grain % size == 0]

    def _expert_sizes(self, size: int) -> list[int]:
        """Expert parallel sizes for a tensor parallel size."""
        experts = self.manifest.experts
        return [1, *(n for n in range(2, min(self.ep, size, experts) + 1) if size % n == 0)]

    def _plan(self, size: int, *, pp: int = 1, ep: int = 1, engine: str = "torch") -> list[Views]:
        """The view of every rank of a grid. Raises _Differs where one that should be there is refused."""
        found = []
        for rank in range(size * pp):
            try:
                view = shardprep_runtime.plan_view(
                    self.manifest,
                    rank=rank,
                    tensor_parallel_size=size,
                    pipeline_parallel_size=pp,
                    expert_parallel_size=ep,
                    engine=engine,
                )
            except LayoutError as error:
                raise _Differs(
                    Difference(
                        "views", "the shard set", rank, _grid(size, pp, ep, engine), "a view", str(error)
                    )
                ) from None
            found.append(view.tensors)
        return found

    def _views(self) -> Iterator[Proof]:
        """Every byte of every tensor is where its rank says, and the ranks together hold each of them."""
        proved: set[tuple[Any, ...]] = set()
        for engine in self.engines:
            grids = 0
            for size in self._sizes():
                for ep in self._expert_sizes(size):
                    for pp in range(1, self.pp + 1):
                        if self._refuses(engine, pp):
                            continue
                        ranks = self._plan(size, pp=pp, ep=ep, engine=engine)
                        grid = _grid(size, pp, ep, engine)
                        self._cover(ranks, grid)
                        for rank, views in enumerate(ranks):
                            self._check_reads(views, rank, grid)
                            new = {_key(view) for view in views.values()} - proved
                            if new:
                                names = {name for name, *_ in new}
                                self._check_bytes(names, views, rank, (size, pp, ep, engine))
                                proved |= new
                        grids += 1
            yield Proof(
                "views",
                f"{engine}: {grids} grids up to {_grid(self.grain, self.pp, self._expert_sizes(self.grain)[-1])}: every "
                "byte of every tensor is held, and is the original's",
            )

    def _refuses(self, engine: str, pp: int) -> bool:
        """Whether an engine cannot run these stages, as its views then say."""
        needs = self.layout.stage_needs.get(engine)
        return needs is not None and not all(
            any(start <= layer < stop for layer in needs) for start, stop in self._plain_stages(pp)
        )

    def _cover(self, ranks: Sequence[Views], grid: str) -> None:
        """The ranks hold every tensor, every expert of it, and every index along its dim."""
        import torch

        for name, full in self.tensors.items():
            seen = None
            for views in ranks:
                if name not in views:
                    continue
                seen = torch.zeros(_cut_shape(views[name]), dtype=torch.bool) if seen is None else seen
                for block, _ in _blocks(views[name]):
                    seen[
                        tuple(
                            each if size > 1 else slice(None)
                            for each, size in zip(block, seen.shape, strict=True)
                        )
                    ] = True
            if seen is None:
                raise _Differs(
                    Difference("views", name, None, grid, "some rank to hold it", "that none does")
                )
            if not seen.all():
                missing = torch.nonzero(~seen)[0].tolist()
                at = next((dim, index) for dim, index in enumerate(missing) if seen.shape[dim] > 1)
                raise _Differs(
                    Difference(
                        "views",
                        name,
                        None,
                        grid,
                        f"each of the {full.shape[at[0]]} indices of dim {at[0]} on some rank",
                        f"index {at[1]} on none",
                    )
                )
        extra = {name for views in ranks for name in views} - self.tensors.keys()
        if extra:
            raise _Differs(Difference("views", min(extra), None, grid, "no such tensor", "a view of it"))

    def _check_reads(self, views: Views, rank: int, grid: str) -> None:
        """A rank reads at most `READ` bytes for each byte of a tensor that it keeps, where nothing is uneven."""
        even = [
            view
            for view in views.values()
            if not view.form.engines and not any(segment.uneven for segment in view.form.layout.segments)
        ]
        read = sum(each.width * each.count for view in even for each in view.stripes)
        kept = sum(view.nbytes for view in even)
        if read > kept * READ:
            raise _Differs(
                Difference(
                    "views", "what is read", rank, grid, f"at most {READ} x {kept} bytes", f"{read} bytes"
                )
            )

    def _check_bytes(self, names: set[str], views: Views, rank: int, grid: tuple[int, int, int, str]) -> None:
        """What a rank loads are the original's blocks that its view names."""
        size, pp, ep, engine = grid
        with shardprep_runtime.load(
            self.shard_set,
            rank=rank,
            tensor_parallel_size=size,
            pipeline_parallel_size=pp,
            expert_parallel_size=ep,
            engine=engine,
        ) as shard:
            for name in names:
                tensor = shard[name]
                held = 0
                for block, local in _blocks(views[name]):
                    held += tensor[local].numel()
                    if not _same_bits(self.tensors[name][block], tensor[local]):
                        raise _Differs(
                            Difference(
                                "views",
                                name,
                                rank,
                                _grid(*grid),
                                f"the original's {_show(block)}",
                                "other bytes",
                            )
                        )
                if held != tensor.numel():
                    found = f"a tensor of shape {list(tensor.shape)}"
                    blocks = " + ".join(_show(block) for block, _ in _blocks(views[name]))
                    raise _Differs(Difference("views", name, rank, _grid(*grid), blocks, found))

    # ------------------------------------------------------------------------------------------------------- heads
    def _heads(self) -> Iterator[Proof]:
        """No rank has a part of a head: by the model's own attention modules and config, not by the rules' units."""
        heads = self._heads_of()
        if not heads:
            yield Proof("heads", "the model has no attention whose heads could be split")
            return
        cut = 0
        for engine in self.engines:
            for size in self._sizes()[1:]:
                for rank, views in enumerate(self._plan(size, engine=engine)):
                    for name, (dim, width, fused) in heads.items():
                        if name not in views or (fused and engine == "transformers"):
                            continue  # transformers gathers what it has cut of a fused one before heads are made of it
                        for run in _runs(views[name], dim):
                            cut += 1
                            if run.start % width or run.stop % width:
                                raise _Differs(
                                    Difference(
                                        "heads",
                                        name,
                                        rank,
                                        _grid(size, 1, 1, engine),
                                        f"whole heads of {width} along dim {dim}",
                                        f"[{run.start}, {run.stop}), which splits a head",
                                    )
                                )
        yield Proof(
            "heads",
            f"{len(heads)} projections, heads of {_list({w for _, w, _ in heads.values()})}: none is split",
        )

    def _heads_of(self) -> dict[str, tuple[int, int, bool]]:
        """Checkpoint tensor -> (dim along which its heads lie, indices of one head, whether q, k and v are in one)."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        found: dict[str, tuple[int, int, bool]] = {}
        if not isinstance(heads, int) or not isinstance(kv_heads, int):
            return found
        widths = {
            path: width
            for path, module in self.model.named_modules()
            if isinstance(width := _head_dim(module), int)
        }
        attentions = {
            name.rpartition(f".{kind}.")[0]
            for name in self.tensors
            if (kind := _projection(name)) in _QUERIES
        }
        for name, tensor in self.tensors.items():
            kind = _projection(name)
            parent = name.rpartition(f".{kind}.")[0]
            if (
                kind is None
                or tensor.ndim > 2
                or not any(parent == each or each.startswith(f"{parent}.") for each in attentions)
            ):
                continue
            flipped = type(self._module(name)).__name__ == "Conv1D"
            output = kind in _OUTPUTS
            if output and tensor.ndim == 1:
                continue
            dim = int(not flipped) if output else tensor.ndim - 1 if flipped else 0
            size = tensor.shape[dim]
            width = next(
                (w for path, w in widths.items() if parent == path or parent.startswith(f"{path}.")), 0
            )
            if kind in ("q_b_proj", "kv_b_proj") or not width:
                width = size // (kv_heads if kind in ("k_proj", "v_proj", "key", "value") else heads)
            if width and size % width == 0 and (not output or size == heads * width):
                found[name] = (dim, width, kind in _FUSED)
        return found

    def _module(self, name: str) -> nn.Module | None:
        """The module that a checkpoint's tensor belongs to, where it has the same name in the model."""
        with contextlib.suppress(AttributeError):
            return self.model.get_submodule(name.rpartition(".")[0])
        return None

    # -------------------------------------------------------------------------------------------------- partial sums
    def _sums(self) -> Iterator[Proof]:
        """What ranks compute from their tensors alone adds up: in each attention, each MLP, the embedding, the head."""
        engine = "torch"  # the cut as it is stored; an engine that asks otherwise may gather what its ranks compute
        for size in self._sizes()[1:]:
            for ep in self._expert_sizes(size):
                ranks = self._plan(size, ep=ep, engine=engine)
                if ep > 1:
                    ranks = [self._counted(views, rank % (size // ep)) for rank, views in enumerate(ranks)]
                modules, cut = self._add_up(ranks, _grid(size, 1, ep, engine))
                yield Proof(
                    "sums",
                    f"{_grid(size, 1, ep, engine)}: partial results of {size} ranks add up to the model's in {modules} "
                    f"modules with {cut} cut tensors",
                )

    def _counted(self, views: Views, rank_in_group: int) -> Views:
        """Without what all ranks of an expert group have whole (experts' biases), which counts once."""
        return {
            name: view
            for name, view in views.items()
            if rank_in_group == 0
            or not (view.experts is not None or self.manifest.tensors[name].expert is not None)
            or math.prod(view.shape[1:]) != math.prod(view.form.shape[1:])
            or (view.experts is None and view.shape != view.form.shape)
        }

    def _add_up(self, ranks: Sequence[Views], grid: str) -> tuple[int, int]:
        """Compare each module's result with the sum of ranks' own; (modules, cut tensors). Raises _Differs."""
        import torch

        states = [self._masked(views) for views in ranks]
        cut = {
            name
            for name, full in self.tensors.items()
            if not all(torch.equal(state[name], full) for state in states)
        }
        bare = {name: torch.zeros_like(full) if name in cut else full for name, full in self.tensors.items()}
        models = [self._load(state) for state in (*states, bare)]
        paths = [path for path, _ in self._boundaries(models)]
        exchanges = _Exchanges(self.model, models)
        handles = []

        def check(path: str, where: str, whole: torch.Tensor, partial: Sequence[torch.Tensor]) -> None:
            *own, bare = partial
            # what is whole everywhere (a bias, a shared expert) is in every partial result, and counts once
            total = torch.stack(own).sum(0) - (len(own) - 1) * bare
            off = float((total - whole).abs().max()) / max(float(whole.abs().max()), 1e-6)
            if not off <= PARTIAL:
                names = [name for name in sorted(cut) if self._under(name, path)]
                raise _Differs(
                    Difference(
                        "sums",
                        path,
                        None,
                        grid,
                        f"partial results that add up to the model's behind {where}",
                        f"a sum that is off by {off:.2g} of the largest: its ranks hold parts of tensors that do not belong "
                        f"together ({', '.join(map(quote, names[:6]))})",
                    )
                )

        for path in paths:
            others = [model.get_submodule(path) for model in models]

            def compare(
                _: nn.Module,
                arguments: Any,
                options: Any,
                output: Any,
                path: str = path,
                others: Sequence[nn.Module] = others,
            ) -> None:
                whole = _tensor(output)
                partial = [_tensor(other(*_copied(arguments), **_copied(options))) for other in others]
                for inner, summed, parts in exchanges.settle(path):
                    check(path, inner, summed, parts)
                check(path, path, whole, partial)

            handles.append(self.model.get_submodule(path).register_forward_hook(compare, with_kwargs=True))
        try:
            with exchanges:
                forward(self.model, self.prompt)
        finally:
            for handle in handles:
                handle.remove()
        return len(paths), len(cut)

    def _under(self, name: str, path: str) -> bool:
        """Whether a checkpoint's tensor belongs to a module, whatever the prefix of its name."""
        return name.startswith(path + ".") or f".{path.partition('.')[2]}." in f".{name}"

    def _masked(self, views: Views) -> dict[str, torch.Tensor]:
        """The model's tensors at full shape, zero where this rank does not hold them."""
        import torch

        state = {}
        for name, full in self.tensors.items():
            state[name] = torch.zeros_like(full)
            for block, _ in _blocks(views[name]) if name in views else ():
                state[name][block] = full[block]
        return state

    def _load(self, state: Tensors) -> PreTrainedModel:
        """A model of these tensors, loaded by transformers as it loads a checkpoint."""
        kind: Any = type(self.model)
        found: PreTrainedModel = kind.from_pretrained(
            None,
            config=self._fresh_config(),
            state_dict=dict(state),
            dtype=self.logits.dtype,
            attn_implementation="eager",
        ).eval()
        return found

    def _fresh_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.checkpoint)

    def _boundaries(self, models: Sequence[PreTrainedModel]) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose results ranks add up: the layers' own children, and outside of the layers what has weights."""
        import torch

        layers = self._layers()
        inside = f"{layers[0]}." if layers else None

        def is_cut(path: str) -> bool:
            own = dict(self.model.get_submodule(path).named_parameters())
            return any(
                not torch.equal(own[name], parameter)
                for model in models
                for name, parameter in model.get_submodule(path).named_parameters()
            )

        for path, module in self.model.named_modules():
            if inside is not None and path.startswith(inside):
                if path.removeprefix(inside).count(".") != 1:
                    continue
            elif not list(module.parameters(recurse=False)):
                continue
            if path and is_cut(path):
                yield path, module

    def _layers(self) -> tuple[str, nn.ModuleList] | None:
        """The list of the model's layers, and its path; None where transformers builds it otherwise."""
        from torch import nn

        found = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.layout.layers
        ]
        return min(found, key=lambda item: item[0].count(".")) if found else None

    # ------------------------------------------------------------------------------------------------------ logits
    def _assembled_logits(self) -> Iterator[Proof]:
        import torch

        for size, engine in ((1, self.engines[0]), (self.grain, self.engines[-1])):
            logits, tokens = answers(self._load(self._joined(size, engine)), self.prompt)
            if not torch.equal(logits, self.logits) or not torch.equal(tokens, self.tokens):
                off = float((logits - self.logits).abs().max())
                raise _Differs(
                    Difference(
                        "logits",
                        "the model",
                        None,
                        _grid(size, 1, 1, engine),
                        "the model's logits, bit for bit",
                        f"some that are off by {off:.2g}",
                    )
                )
        yield Proof(
            "logits",
            f"what tp 1 loads, and what {self.grain} ranks load, has the model's logits, bit for bit",
        )

    def _joined(self, size: int, engine: str) -> dict[str, torch.Tensor]:
        """The model's tensors, put together from those that all ranks load."""
        import torch

        state = {name: torch.full_like(full, 0) for name, full in self.tensors.items()}
        for rank in range(size):
            with shardprep_runtime.load(
                self.shard_set, rank=rank, tensor_parallel_size=size, engine=engine, verify="headers"
            ) as shard:
                for name, view in shard.view.tensors.items():
                    for block, local in _blocks(view):
                        state[name][block] = shard[name][local]
        return state

    # -------------------------------------------------------------------------------------------------- real ranks
    def _real_ranks(self) -> Iterator[Proof]:
        for size in self._sizes()[1:] if "transformers" in self.engines else ():
            for ep in dict.fromkeys((1, size if size in self._expert_sizes(size) else 1)):
                yield self._real(size, ep)

    def _real(self, size: int, ep: int) -> Proof:
        grid = _grid(size, 1, ep, "transformers")
        reason = self._lacking(ep)
        if reason is None:
            job = Job(str(self.checkpoint), str(self.shard_set), size, ep, self.prompt.tolist())
            answer = self.ranks.run(job)
            found = self._judge(answer)
            if found is None:
                return Proof(
                    "ranks",
                    f"{grid}: {size} gloo processes, each with its own view, compute the model's logits and tokens",
                )
            control = self._judge(self.ranks.run(replace(job, shard_set=None)))
            if control is None:
                raise _Differs(
                    Difference(
                        "ranks",
                        "the model",
                        answer.rank,
                        grid,
                        "what transformers makes of the checkpoint",
                        found,
                    )
                )
            reason = f"transformers cannot run it from the checkpoint itself: {control}{self._hint(size)}"
        return Proof("ranks", f"{grid}: assembled, for {reason}", assembled=True)

    def _lacking(self, ep: int) -> str | None:
        """Which plan transformers lacks."""
        name = type(self.model).__name__
        if not self.model.tp_plan:
            return f"transformers has no tensor parallel plan for {name}"
        if ep > 1 and not self.model.ep_plan:
            return f"transformers has no expert parallel plan for {name}"
        return None

    def _hint(self, size: int) -> str:
        kv_heads = getattr(self.model.config.get_text_config(), "num_key_value_heads", None)
        if isinstance(kv_heads, int) and kv_heads % size:
            return f" (it splits {kv_heads} KV heads among {size} ranks, its issue 48307)"
        return ""

    def _judge(self, answer: Answer) -> str | None:
        """What is wrong with what ranks computed; None: nothing."""
        import torch

        if answer.status != "ok":
            return answer.detail
        logits = torch.load(str(answer.logits), weights_only=True)
        if logits.shape != self.logits.shape:
            return f"logits of shape {list(logits.shape)} instead of {list(self.logits.shape)}"
        off = float((logits - self.logits).abs().max()) / max(1.0, float(self.logits.abs().max()))
        if not off <= LOGITS:
            return f"logits that are off by {off:.2g}"
        if answer.tokens != self.tokens.tolist():
            return f"tokens {answer.tokens} instead of {self.tokens.tolist()}"
        return None

    # ------------------------------------------------------------------------------------------------------ stages
    def _stages(self) -> Iterator[Proof]:
        """Each stage computes from its own tensors and the hidden states of the one before it."""
        import torch

        for pp in range(2, self.pp + 1):
            grid = _grid(1, pp, 1)
            engine = next((each for each in self.engines if not self._refuses(each, pp)), None)
            if engine is None:
                continue
            stages = self._plan(1, pp=pp, engine=engine)
            states = [{name: self.tensors[name] for name in views} for views in stages]
            found = self._relay(stages, states)
            if isinstance(found, str):
                yield Proof("stages", f"{grid}: assembled, for {found}", assembled=True)
            elif torch.equal(found, self.logits):
                yield Proof(
                    "stages",
                    f"{grid}: {pp} stages, each with its own tensors, compute the model's logits, bit for bit",
                )
            else:
                yield self._blame(stages, states, grid)

    def _blame(self, stages: Sequence[Views], states: Sequence[Tensors], grid: str) -> Proof:
        """Find the tensor that a stage lacks; or say that the model's layers need more than hidden states."""
        import torch

        outside = {
            name for views in stages for name, view in views.items() if not isinstance(view.layer, int)
        }
        everything = {name: self.tensors[name] for name in outside}
        found = self._relay(stages, [{**everything, **state} for state in states])
        if isinstance(found, str) or not torch.equal(found, self.logits):
            return Proof(
                "stages",
                f"{grid}: assembled, for its layers need more of earlier ones than their hidden states",
                assembled=True,
            )
        for rank, state in enumerate(states):
            for name in sorted(outside - state.keys()):
                rest = {each: tensor for each, tensor in everything.items() if each != name}
                tried = [
                    {**(rest if number == rank else everything), **own} for number, own in enumerate(states)
                ]
                relayed = self._relay(stages, tried)
                if isinstance(relayed, str) or not torch.equal(relayed, self.logits):
                    raise _Differs(
                        Difference(
                            "stages",
                            name,
                            rank,
                            grid,
                            "it on this stage, which computes with it",
                            "no view of it",
                        )
                    )
        raise _Differs(Difference("stages", "the model", None, grid, "the model's logits", "others"))

    def _relay(self, stages: Sequence[Views], states: Sequence[Tensors]) -> torch.Tensor | str:
        """The logits that stages compute one after another, everything that a stage has not being NaN; or why not."""
        layers = self._layers()
        if layers is None:
            return "transformers builds it of no one list of layers"
        hidden: torch.Tensor | None = None
        logits: torch.Tensor | None = None
        for views, state in zip(stages, states, strict=True):
            numbers = [view.layer for view in views.values() if isinstance(view.layer, int)]
            poisoned = {
                name: state[name] if name in state else _poison(full) for name, full in self.tensors.items()
            }
            model = self._load(poisoned)
            own = list(model.get_submodule(layers[0]).children())
            seen: list[torch.Tensor] = []

            def inject(
                _: nn.Module, arguments: Any, options: Any, given: torch.Tensor | None = hidden
            ) -> Any:
                if given is None:
                    return None
                if arguments:
                    return (given, *arguments[1:]), options
                return arguments, {**options, "hidden_states": given}

            def catch(_: nn.Module, __: Any, output: Any, seen: list[torch.Tensor] = seen) -> None:
                seen.append(_tensor(output))

            own[min(numbers)].register_forward_pre_hook(inject, with_kwargs=True)
            own[max(numbers)].register_forward_hook(catch)
            logits = forward(model, self.prompt)
            hidden = seen[-1]
        assert logits is not None
        return logits

    # ------------------------------------------------------------------------------------------------------ export
    def _export(self) -> Proof:
        exported = self.folder / "exported"
        try:
            export(self.shard_set, exported)
        except ProblemError as error:
            raise _Differs(
                Difference("export", "the shard set", None, f"tp {self.grain}", "the checkpoint", str(error))
            ) from None
        found = _read(exported)
        for name, full in self.tensors.items():
            if name not in found or not _same_bits(full, found[name]):
                raise _Differs(
                    Difference(
                        "export",
                        name,
                        None,
                        f"tp {self.grain}",
                        "the original's bytes",
                        "other bytes" if name in found else "no such tensor",
                    )
                )
        config = (exported / "config.json").read_bytes()
        if found.keys() != self.tensors.keys() or config != (self.checkpoint / "config.json").read_bytes():
            raise _Differs(
                Difference(
                    "export", "config.json", None, f"tp {self.grain}", "the checkpoint's files", "others"
                )
            )
        return Proof("export", f"{len(found)} tensors and config.json are the checkpoint's, bit for bit")


class _Exchanges:
    """While in use: what engines exchange between ranks inside of a module is there for each rank.

    A projection that is cut along its input gives ranks the sum of their results, which `settle` has checked; a norm
    over all heads is taken of all heads. What a rank then makes of it is its own again.
    """

    def __init__(self, model: PreTrainedModel, others: Sequence[PreTrainedModel]) -> None:
        self.model = model
        self.others = others
        self.handles: list[Any] = []
        self.whole: dict[str, list[torch.Tensor]] = {}
        """Results of the model's own modules, in the order of their calls."""
        self.parts: dict[str, list[list[torch.Tensor]]] = {}
        """Those of each of the others."""

    def settle(self, path: str) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
        """(path, result, those of the ranks) of each sum within a module; and forget them."""
        for inner in [each for each in self.parts if each == path or each.startswith(path + ".")]:
            for call, whole in enumerate(self.whole[inner]):
                if all(call < len(part) for part in self.parts[inner]):
                    yield inner, whole, [part[call] for part in self.parts[inner]]
            for part in self.parts[inner]:
                part.clear()
        for inner in [each for each in self.whole if each == path or each.startswith(path + ".")]:
            self.whole[inner].clear()

    def __enter__(self) -> None:
        width = min((w for m in self.model.modules() if isinstance(w := _head_dim(m), int)), default=0)
        for path, module in self.model.named_modules():
            own = [other.get_submodule(path) for other in self.others]
            weight = getattr(module, "weight", None)
            if weight is None:
                continue
            if _is_cut_along_input(module, own):
                self.parts[path] = [[] for _ in own]
            elif "Norm" not in type(module).__name__ or weight.ndim != 1 or weight.numel() <= width:
                continue
            whole = self.whole[path] = []
            self.handles.append(module.register_forward_hook(_keep(whole)))
            for number, other in enumerate(own):
                give = (
                    _give_sum(whole, self.parts[path][number]) if path in self.parts else _give_share(whole)
                )
                self.handles.append(other.register_forward_hook(give))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _keep(whole: list[torch.Tensor]) -> Callable[..., None]:
    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        whole.append(output.clone())  # who gets it may add to it in place

    return keep


def _give_sum(whole: list[torch.Tensor], parts: list[torch.Tensor]) -> Callable[..., Any]:
    def give(_: nn.Module, __: Any, output: torch.Tensor) -> Any:
        parts.append(output.clone())
        call = len(parts) - 1
        return whole[call].clone() if call < len(whole) and whole[call].shape == output.shape else None

    return give


def _give_share(whole: list[torch.Tensor]) -> Callable[..., Any]:
    def give(module: Any, arguments: Any, output: torch.Tensor) -> Any:
        given = arguments[0] if arguments else None
        if len(whole) != 1 or given is None or whole[0].shape != given.shape:
            return None
        if module.weight.numel() != given.shape[-1]:
            return None
        return whole[0] * (given != 0) * (module.weight != 0)

    return give


def _is_cut_along_input(module: nn.Module, others: Sequence[nn.Module]) -> bool:
    """Whether each of the others has some of the columns by which a projection reads its input, each of them whole."""
    from torch import nn

    flipped = type(module).__name__ == "Conv1D"  # in x out
    if not isinstance(module, nn.Linear) and not flipped:
        return False
    kept = []
    for other in others:
        held: Any = other.weight != 0
        held = held.T if flipped else held
        there = held.any(0)
        if not bool((held.float().mean(0)[there] > 0.99).all()):  # a random weight may be 0
            return False
        kept.append(bool(there.all()))
    return not any(kept)


_FUSED: Final = ("qkv_proj", "Wqkv", "query_key_value", "c_attn")
_QUERIES: Final = ("q_proj", "query", "q_b_proj", *_FUSED)
_OUTPUTS: Final = ("o_proj", "out_proj")
_PROJECTIONS: Final = (*_QUERIES, "k_proj", "v_proj", "key", "value", "kv_b_proj", *_OUTPUTS)
"""Last words of the names of what makes heads and of what takes them."""


def _projection(name: str) -> str | None:
    """Which of `_PROJECTIONS` a checkpoint's tensor belongs to."""
    words = name.split(".")
    known = len(words) > 2 and words[-2] in _PROJECTIONS and words[-1] in ("weight", "bias")
    return words[-2] if known else None


def _head_dim(module: nn.Module) -> int | None:
    for name in ("head_dim", "attention_head_size", "head_size"):
        found = getattr(module, name, None)
        if isinstance(found, int):
            return found
    return None


def _blocks(view: TensorView) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The blocks of the full tensor that a rank holds, and where each lies in what it holds."""
    dim = view.form.layout.dim
    full = [slice(0, size) for size in view.form.shape]
    local = [slice(0, size) for size in view.shape]
    if view.experts is not None:
        full[0] = slice(*view.experts)
    if dim is None:
        yield tuple(full), tuple(local)
        return
    for run in runs_of(view):
        full[dim] = slice(run.start, run.stop)
        local[dim] = slice(run.at, run.at + run.stop - run.start)
        yield tuple(full), tuple(local)


def _key(view: TensorView) -> tuple[Any, ...]:
    """What a view holds of which tensor, whoever asks for it."""
    return view.name, view.takes, view.experts


def _cut_shape(view: TensorView) -> tuple[int, ...]:
    """The shape of a tensor, 1 for the dims along which every rank has all of it."""
    return tuple(
        size if dim == view.form.layout.dim or (dim == 0 and view.form.layout.experts) else 1
        for dim, size in enumerate(view.form.shape)
    )


def _runs(view: TensorView, dim: int) -> tuple[Run, ...]:
    """What a rank holds along `dim`, where the tensor is cut along it."""
    return runs_of(view) if view.form.layout.dim == dim else ()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor


def _first(output: Any) -> torch.Tensor | None:
    """The tensor that a module gives on, of all that it returns."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((found for each in output if (found := _first(each)) is not None), None)
    return None


def _tensor(output: Any) -> torch.Tensor:
    found = _first(output)
    assert found is not None, "a module that gave a tensor once gives one again"
    return found


def _copied(value: Any) -> Any:
    """Arguments that a module may change without changing those of another."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_copied(each) for each in value)
    return copy.copy(value)


def _grid(size: int, pp: int = 1, ep: int = 1, engine: str | None = None) -> str:
    Grid(size, pp)
    named = f"tp {size}" + (f" pp {pp}" if pp > 1 else "") + (f" ep {ep}" if ep > 1 else "")
    return f"{named}, {engine}" if engine else named


def _show(block: Sequence[slice]) -> str:
    return "[" + ", ".join(f"{each.start}:{each.stop}" for each in block) + "]"


def _list(items: Any) -> str:
    return ", ".join(map(str, items))
