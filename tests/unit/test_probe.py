"""The inputs of a probe are the same for ever, and what is compared with a recorded one is compared fairly."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lazily import torch
from shardprep_runtime.errors import IntegrityError
from shardprep_runtime.format.manifest import PROBE_POSITIONS, Probe, Response
from shardprep_runtime.stage.probe import (
    Observed,
    Rows,
    check_stage,
    difference,
    observe,
    probe_states,
    probe_tokens,
    responses,
    tolerance,
)

HIDDEN, VOCABULARY = 64, 50


class Layer(nn.Module):
    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor) -> Any:
        hidden_states += torch.tanh(self.linear(hidden_states))  # in place, as some do
        return (hidden_states, None) if self.returns_tuple else hidden_states


class Small:
    """Layers behind each other with what `observe` asks of a stage; a real one needs a shard set."""

    def __init__(
        self, *, first: int = 0, stop: int = 3, returns_tuple: bool = False, by_name: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        layers = [Layer(returns_tuple) for _ in range(3)]
        self.layer_modules = layers[first:stop]
        self.layers = first, stop
        self.is_first, self.is_last = first == 0, stop == 3
        self.hidden_size, self.vocab_size = HIDDEN, VOCABULARY
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.pp_rank, self.manifest_digest = 0, "sha256:" + "0" * 64
        self.manifest = SimpleNamespace(probe=None, quantization=None)
        self.by_name = by_name
        self.returns_tuple = returns_tuple

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(inputs) if self.is_first else inputs
        for layer in self.layer_modules:
            out = layer(hidden_states=hidden) if self.by_name else layer(hidden)
            hidden = out[0] if self.returns_tuple else out
        return self.head(hidden) if self.is_last else hidden


def seen(stage: Small) -> Observed:
    return observe(stage)  # type: ignore[arg-type]


def checked(stage: Small) -> Any:
    return check_stage(stage)  # type: ignore[arg-type]


def recorded(stage: Small) -> Probe:
    found = seen(stage)
    made = responses(found, Observed(found.rows, "bfloat16", found.digest))
    return Probe(made["embedding"], tuple(made[number] for number in range(3)), made["head"])


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ the inputs


def mixed(number: int, stream: int) -> int:
    """As docs/manifest-format.md says it."""
    x = number + stream * 2**40
    x = (x ^ x >> 23) % 2**32
    for _ in range(2):
        x = ((x ^ x >> 16) * 73244475) % 2**32
    return x ^ x >> 16


def test_tokens_and_states_are_those_of_the_format() -> None:
    assert probe_tokens(32003).tolist() == [[mixed(p, 1) % 32003 for p in range(PROBE_POSITIONS)]]
    hidden = 24
    expected = [
        [(mixed(p * hidden + i, 2) % 17 - 8) / 4 / 2 ** [2, 4, 6, 8][p % 4] for i in range(hidden)]
        for p in range(PROBE_POSITIONS)
    ]
    assert probe_states(hidden).tolist() == [expected]


def test_projections_are_those_of_the_format() -> None:
    found = seen(Small())
    stage = Small()
    logits = stage.head(probe_states(HIDDEN)).double()[0]
    for position, row in enumerate(found.rows["head"]):
        own = logits[position].tolist()
        assert row[0] == pytest.approx((sum(y * y for y in own) / VOCABULARY) ** 0.5, rel=1e-6)
        for j, value in enumerate(row[1:]):
            signs = [2 * (mixed(8 * i + j, 3) % 2) - 1 for i in range(VOCABULARY)]
            assert value == pytest.approx(
                sum(s * y for s, y in zip(signs, own, strict=True)) / VOCABULARY**0.5, rel=1e-5, abs=1e-7
            )


def test_the_inputs_never_change() -> None:
    """A manifest that was written once is compared with them for ever."""
    assert digest(probe_tokens(128_256)) == "5e04fa3fbca483a4"
    assert digest(probe_states(8192)) == "78671dc64a0c9537"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_holds_the_states_exactly(dtype: torch.dtype) -> None:
    states = probe_states(4096)
    assert torch.equal(states.to(dtype).float(), states)
    sizes = states[0].square().mean(-1).sqrt()
    assert torch.allclose(sizes, 1.2247 / torch.tensor([4.0, 16.0, 64.0, 256.0] * 2), rtol=0.05)
    correlations = torch.corrcoef(states[0])
    assert float((correlations - torch.eye(PROBE_POSITIONS)).abs().max()) < 0.06


def test_tokens_differ_and_are_of_the_vocabulary() -> None:
    for size in (300, 32_000, 262_144):
        tokens = probe_tokens(size)
        assert len(set(tokens[0].tolist())) == PROBE_POSITIONS
        assert int(tokens.max()) < size
    assert probe_tokens(1).tolist() == [[0] * PROBE_POSITIONS]


# ------------------------------------------------------------------------------------------------------ observing


@pytest.mark.parametrize("returns_tuple", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_any_cut_gives_the_same_of_each_layer(returns_tuple: bool, by_name: bool) -> None:
    how = {"returns_tuple": returns_tuple, "by_name": by_name}
    whole = seen(Small(**how))
    assert list(whole.rows) == ["embedding", 0, 1, 2, "head"]
    parts = [seen(Small(first=first, stop=stop, **how)) for first, stop in ((0, 1), (1, 2), (2, 3))]
    assert [list(part.rows) for part in parts] == [["embedding", 0], [1], [2, "head"]]
    assert {place: rows for part in parts for place, rows in part.rows.items()} == whole.rows
    assert len({part.digest for part in (*parts, whole)}) == 4


def test_a_layer_is_recorded_by_what_it_adds() -> None:
    found, stage = seen(Small()), Small()
    for number, layer in enumerate(stage.layer_modules):
        added = torch.tanh(layer.linear(probe_states(HIDDEN))).double()
        assert [row[0] for row in found.rows[number]] == pytest.approx(
            added[0].square().mean(-1).sqrt().tolist()
        )


def test_a_probe_leaves_nothing_behind() -> None:
    stage = Small()
    ids = torch.arange(7)[None]
    before = stage.forward(ids)
    first, second = seen(stage), seen(stage)
    assert first == second
    assert torch.equal(stage.forward(ids), before)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in stage.layer_modules)


def test_one_bit_of_a_weight_changes_the_digest() -> None:
    stage = Small()
    before = seen(stage)
    weight = stage.layer_modules[1].linear.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1 << 12
    after = seen(stage)
    assert after.digest != before.digest
    assert difference(after.rows[1], before.rows[1], "float32") < 1e-3  # which only the digest shows


def test_a_step_of_another_thread_is_left_alone() -> None:
    stage = Small()
    ids = torch.arange(5)[None]
    expected = stage.forward(ids)
    found: list[torch.Tensor] = []
    forward = stage.forward

    def meanwhile(inputs: torch.Tensor) -> torch.Tensor:
        other = threading.Thread(target=lambda: found.append(forward(ids)))
        other.start()
        other.join()
        return forward(inputs)

    alone = seen(Small())
    stage.forward = meanwhile  # type: ignore[method-assign]
    assert seen(stage) == alone
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("place", "words"), [("layer", "layer 1 gives NaN"), ("head", "the head gives NaN")])
def test_what_is_not_finite_is_refused_without_a_recorded_probe(value: float, place: str, words: str) -> None:
    stage = Small()
    linear = stage.head if place == "head" else stage.layer_modules[1].linear
    with torch.no_grad():
        linear.weight[3, 5] = value if place == "head" else float("nan")
    with pytest.raises(IntegrityError, match=words):
        checked(stage)


# ------------------------------------------------------------------------------------------------------ comparing


def test_without_a_recorded_probe_nothing_is_proven() -> None:
    found = checked(Small())
    assert found.proven is None
    assert found.digest == seen(Small()).digest
    assert found.seconds > 0


def test_what_was_recorded_is_proven_and_another_layer_is_named() -> None:
    stage = Small()
    stage.manifest.probe = probe = recorded(stage)
    assert checked(stage).proven is True
    other = Small()
    other.manifest.probe = Probe(probe.embedding, (probe.layers[1], *probe.layers[1:]), probe.head)
    with pytest.raises(IntegrityError) as caught:
        checked(other)
    said = str(caught.value)
    assert said.startswith(
        "layer 0 of stage 0 gives something else than was recorded at the split: it differs by 1."
    )
    assert "at most 0.0005 is expected in float32;" in said
    assert f"from manifest {other.manifest_digest}" in said
    swapped = Small()
    swapped.manifest.probe = Probe(probe.embedding, probe.layers[::-1], probe.head)
    with pytest.raises(IntegrityError, match="what layer 2 should give is what it gives"):
        checked(swapped)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_float32_with_shortened_products_is_compared_as_what_it_is() -> None:
    assert seen(Small()).precision == "float16"


def rows_with(changed: dict[int, float]) -> Rows:
    """Rows of which some positions differ by so much of their size."""
    return tuple((1.0, *[1.0 + changed.get(position, 0.0)] * 8) for position in range(PROBE_POSITIONS))


def test_a_difference_is_relative_to_the_size_of_what_was_recorded() -> None:
    own = tuple((2.0, *[2.5] * 8) for _ in range(PROBE_POSITIONS))
    base = tuple((2.0, *[2.0] * 8) for _ in range(PROBE_POSITIONS))
    assert difference(own, base, "float32") == pytest.approx(0.25)
    nothing = ((0.0,) * 9,) * PROBE_POSITIONS
    assert difference(nothing, nothing, "float32") == 0
    assert difference(own, nothing, "float32") == float("inf")


def test_positions_that_rounding_has_routed_elsewhere_do_not_count() -> None:
    one, two, four = (dict.fromkeys(range(n), 0.5) for n in (1, 2, 5))
    base = rows_with({})
    assert difference(rows_with(one), base, "float32") == 0
    assert difference(rows_with(two), base, "float32") == pytest.approx(0.5)
    assert difference(rows_with(two), base, "bfloat16") == 0
    assert difference(rows_with(four), base, "bfloat16") == pytest.approx(0.5)


def test_the_tolerance_grows_with_the_noise_and_the_coarseness_of_the_dtype() -> None:
    calm, nervous = (Response(noise, rows_with({})) for noise in (0.0, 0.1))
    allowed = [tolerance(calm, dtype) for dtype in ("float32", "float16", "bfloat16")]
    assert allowed == sorted(allowed)
    assert tolerance(nervous, "bfloat16") == pytest.approx(allowed[2] + 0.3)
    assert tolerance(nervous, "float16") == pytest.approx(allowed[1] + 0.3 / 8)
    assert tolerance(nervous, "float32") == pytest.approx(allowed[0] + 0.3 / 2**16)


def test_what_is_recorded_has_six_digits() -> None:
    found = recorded(Small())
    for response in (found.embedding, *found.layers, found.head):
        assert all(float(f"{each:.6g}") == each for row in response.positions for each in row)


def test_numbers_that_no_manifest_holds_are_refused() -> None:
    huge = Observed({0: ((1e31, *[0.0] * 8),) * PROBE_POSITIONS}, "float32", "")
    with pytest.raises(IntegrityError, match=r"layer 0 gives numbers beyond 1e\+30"):
        responses(huge, huge)
