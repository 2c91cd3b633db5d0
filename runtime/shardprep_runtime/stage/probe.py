"""Say what a stage gives for fixed inputs, and whether it is what the manifest recorded when the set was split.

A probe is one real forward of a stage, whatever its cut: the input of each layer is replaced by the same fixed hidden
states, and what each adds to them is caught; so are what the embedding gives for fixed tokens and what the head gives
for the states. What comes out differs in its last bits between CPUs, devices, dtypes and tensor parallel sizes. So a
manifest holds a few projections of it, and they are compared within a tolerance that was measured with them.

It finds what changes the numbers: the shard of another stage or revision, tensors that are missing, damaged or in
another's place, a config.json with another RoPE base or norm, kernels that compute wrongly, NaN.

It does not find a change below the tolerance: 0.05 % of what a layer adds in float32, 0.5 % in float16, 2 to 5 % in
bfloat16 and of quantized models. Nor does it find an expert to which hardly a position is routed, or a row of the
embedding that none of the tokens asks for. Tensor ranks may have changed places in a sum. What matters only far behind the
first positions is not seen either: windows, RoPE scaling. That every byte is the right one is what digests prove.
"""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, Any, Final

from ..errors import IntegrityError
from ..format.manifest import PROBE_LIMIT, PROBE_POSITIONS, PROBE_PROJECTIONS, Probe, Response

if TYPE_CHECKING:
    import torch

    from .stage import Stage

Rows = tuple[tuple[float, ...], ...]
"""At each position: the root mean square of what came out, and its projections."""

Place = int | str
"""The number of a layer, or one of the two below."""

EMBEDDING: Final = "embedding"
HEAD: Final = "head"

SCALES: Final = (2, 4, 6, 8)
"""Powers of two by which the states of one position after the other are made small. A trained layer adds little to
states of size 1, and little of that is left where the sum is rounded to 8 bits; and how near a norm's epsilon is to
the squares shows only where they are small."""

UNIT: Final = {"float64": 2.0**-24, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""By how much of its size a number changes when it is rounded; float64 is compared as float32."""

FLOOR: Final = {"float64": 5e-4, "float32": 5e-4, "float16": 3e-3, "bfloat16": 1e-2}
"""What may differ in any case: libraries, devices and orders of summing."""

MARGIN: Final = 3.0
"""How much more than what was measured at the split may differ."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a stage gave for the inputs of the probe."""

    rows: Mapping[Place, Rows]
    """What the embedding (of the first stage), each layer by its number in the model, and the head (of the last) gave."""
    precision: str
    """That of the arithmetic, as torch names dtypes."""
    digest: str
    """`sha256:...` of all bits that came out: the same as long as neither the weights in memory nor threads and device
    change, where the kernels are deterministic. Not to be compared between workers."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A stage whose probe went well."""

    digest: str
    """That of `Observed`."""
    proven: bool | None
    """True: it gave what the manifest says. None: the manifest says nothing."""
    seconds: float
    """How long the forward took."""


# ------------------------------------------------------------------------------------------------------ the inputs


def probe_tokens(vocabulary: int) -> torch.Tensor:
    """The tokens, [1, positions], int64."""
    import torch

    return (_mixed(torch.arange(PROBE_POSITIONS), stream=1) % vocabulary)[None]


def probe_states(hidden: int) -> torch.Tensor:
    """The hidden states, [1, positions, hidden], float32; every dtype from 8 bits of precision on holds them exactly."""
    import torch

    flat = _mixed(torch.arange(PROBE_POSITIONS * hidden), stream=2) % 17 - 8  # from -8 to 8
    scales = torch.tensor([2.0 ** -SCALES[i % len(SCALES)] for i in range(PROBE_POSITIONS)])
    return flat.reshape(1, PROBE_POSITIONS, hidden).float() * scales[None, :, None] / 4


@lru_cache(maxsize=4)
def _signs(width: int) -> torch.Tensor:
    """Which numbers a projection adds and which it subtracts, [width, projections], as 1 and -1 over sqrt(width)."""
    import torch

    flat = _mixed(torch.arange(width * PROBE_PROJECTIONS), stream=3) % 2 * 2 - 1
    return flat.reshape(width, PROBE_PROJECTIONS).float() / sqrt(width)


def _mixed(numbers: torch.Tensor, *, stream: int) -> torch.Tensor:
    """Numbers below 2^32 without a pattern, made by integers alone, which come out the same everywhere."""
    found = numbers + (stream << 40)
    found = (found ^ (found >> 23)) % 2**32
    for _ in range(2):
        found = (found ^ (found >> 16)) * 0x45D9F3B % 2**32  # below 2^59: nothing overflows
    return found ^ (found >> 16)


# ------------------------------------------------------------------------------------------------------ observing


def observe(stage: Stage) -> Observed:
    """Compute one forward of `stage` for the probe's inputs. With tensor parallel, all ranks of the stage at once.

    Raises IntegrityError, naming the layer, where NaN or infinity comes out.
    """
    import torch

    start, stop = stage.layers
    fixed = probe_states(stage.hidden_size)
    states = fixed.to(stage.device, stage.dtype)
    caught: dict[Place, torch.Tensor] = {}
    hooks: list[Any] = []
    own_thread = threading.get_ident()  # a step that another thread has begun is left alone

    def watch(number: int, layer: torch.nn.Module) -> None:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if threading.get_ident() != own_thread:
                return None
            if number == start and stage.is_first:
                caught[EMBEDDING] = _on_host(args[0] if args else kwargs["hidden_states"])
            own = states.clone()  # which the layer may change in place
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

        def behind(_: Any, args: Any, output: Any) -> Any:
            if threading.get_ident() != own_thread:
                return None
            is_tuple = isinstance(output, tuple)
            caught[number] = _on_host(output[0] if is_tuple else output)
            return (states.clone(), *output[1:]) if is_tuple else states.clone()

        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(behind, prepend=True))

    try:
        for number, layer in zip(range(start, stop), stage.layer_modules, strict=True):
            watch(number, layer)
        inputs = probe_tokens(stage.vocab_size) if stage.is_first else states.clone()
        with torch.no_grad():
            output = stage.forward(inputs)
        if stage.is_last:
            caught[HEAD] = _on_host(output)
    finally:
        for hook in hooks:
            hook.remove()
    digest = hashlib.sha256()
    rows: dict[Place, Rows] = {}
    for place, tensor in caught.items():
        digest.update(f"{place} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
        rows[place] = _rows(tensor.double() - fixed if isinstance(place, int) else tensor.double())
        if not all(isfinite(each) for row in rows[place] for each in row):
            raise IntegrityError(
                f"{_named(place)} gives NaN or infinity in {stage.dtype}: its weights in memory are damaged, or the dtype "
                "is too narrow for this model; start the worker again, and in another dtype if it stays so"
            )
    return Observed(rows, _precision(stage), f"sha256:{digest.hexdigest()}")


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _rows(output: torch.Tensor) -> Rows:
    """[1, positions, width] of doubles."""
    found = output[0]
    sizes = found.square().mean(dim=-1, keepdim=True).sqrt()
    projections = found @ _signs(found.shape[-1]).double()
    return tuple(
        (size, *values) for (size,), values in zip(sizes.tolist(), projections.tolist(), strict=True)
    )


def _precision(stage: Stage) -> str:
    """The dtype whose precision the products of matrices have."""
    import torch

    if stage.manifest.quantization is not None:  # each kernel for them rounds in a way of its own
        return "bfloat16"
    name = str(stage.dtype).removeprefix("torch.")
    backend: Any = torch.backends.cuda if torch.device(stage.device).type == "cuda" else torch.backends.mkldnn
    chosen = getattr(backend.matmul, "fp32_precision", "none")
    if chosen == "none":
        chosen = getattr(torch.backends, "fp32_precision", "none")
    # TF32 has as many bits behind the point as float16
    return {"tf32": "float16", "bf16": "bfloat16"}.get(chosen, name) if name == "float32" else name


# ------------------------------------------------------------------------------------------------------ comparing


def check_stage(stage: Stage) -> Checked:
    """Probe `stage`, and compare with what the manifest recorded, if anything.

    Raises:
        IntegrityError: That names the first layer which gives something else, or NaN.
    """
    begun = time.monotonic()
    observed = observe(stage)
    seconds = time.monotonic() - begun
    probe = stage.manifest.probe
    if probe is None or observed.precision not in UNIT:
        return Checked(observed.digest, None, seconds)
    for place, rows in observed.rows.items():
        found = difference(rows, _response(probe, place).positions, observed.precision)
        allowed = tolerance(_response(probe, place), observed.precision)
        if not found <= allowed:
            raise IntegrityError(
                f"{_named(place)} of stage {stage.pp_rank} gives something else than was recorded at the split: it differs "
                f"by {found:.2g} of its size, at most {allowed:.2g} is expected in {observed.precision}"
                f"{_mistaken(rows, probe, place, observed.precision)}; its weights in memory, its config.json or this "
                "machine's arithmetic are not the right ones: do not use it, load the stage again from "
                f"manifest {stage.manifest_digest}, with blocks verified"
            )
    return Checked(observed.digest, True, seconds)


def difference(rows: Rows, recorded: Rows, precision: str) -> float:
    """How much of its size an output differs from the recorded one.

    Rounding may route a position to other experts: in float32 rarely, so that the worst position but one counts; in
    coarser arithmetic often enough that their median does.

    Args:
        rows: What came out.
        recorded: What the manifest has.
        precision: Of the arithmetic, as in `UNIT`.
    """
    each = sorted(_apart(own, other) for own, other in zip(rows, recorded, strict=True))
    return each[-2] if UNIT[precision] < 1e-6 else statistics.median(each)


def _apart(own: Sequence[float], recorded: Sequence[float]) -> float:
    """How far one position is from the recorded one. Signs are random, so the mean square of projections is about the mean square of the output."""
    error = sqrt(sum((a - b) ** 2 for a, b in zip(own[1:], recorded[1:], strict=True)) / (len(own) - 1))
    return error / recorded[0] if recorded[0] else inf if error else 0.0


def tolerance(response: Response, precision: str) -> float:
    """What may differ: some of it anywhere, and as much more as rounding was seen to change this output.

    Args:
        response: As recorded.
        precision: Of the arithmetic, as in `UNIT`.
    """
    return FLOOR[precision] + MARGIN * response.noise * UNIT[precision] / UNIT["bfloat16"]


def _response(probe: Probe, place: Place) -> Response:
    if isinstance(place, int):
        return probe.layers[place]
    return probe.embedding if place == EMBEDDING else probe.head


def _mistaken(rows: Rows, probe: Probe, place: Place, precision: str) -> str:
    """Whose output it is, where it is another layer's."""
    for number, other in enumerate(probe.layers if isinstance(place, int) else ()):
        if difference(rows, other.positions, precision) <= tolerance(other, precision):
            return f", and what layer {number} should give is what it gives"
    return ""


def _named(place: Place) -> str:
    return f"layer {place}" if isinstance(place, int) else f"the {place}"


# ------------------------------------------------------------------------------------------------------ recording


def responses(exact: Observed, coarse: Observed) -> dict[Place, Response]:
    """What to record of a stage.

    Args:
        exact: What it gave in float32.
        coarse: What it gave in bfloat16.

    Raises:
        IntegrityError: Where numbers are too large to be compared with.
    """
    found = {}
    for place, rows in exact.rows.items():
        noise = difference(coarse.rows[place], rows, coarse.precision)
        rounded = tuple(tuple(float(f"{each:.6g}") for each in row) for row in rows)
        if max(noise, *(abs(each) for row in rounded for each in row)) > PROBE_LIMIT:
            raise IntegrityError(
                f"{_named(place)} gives numbers beyond {PROBE_LIMIT:g}; nothing can be compared with it"
            )
        found[place] = Response(float(f"{noise:.3g}"), rounded)
    return found
