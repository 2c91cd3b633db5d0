"""A manifest is read strictly: what it says is checked before a file is opened, and nothing else is raised."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardprep_runtime.errors import ManifestError
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.cut import WHOLE, Layout, Segment
from shardprep_runtime.format.manifest import (
    Entry,
    Form,
    Manifest,
    Part,
    Probe,
    Quantization,
    QuantizationReport,
    Response,
    SideFile,
    digest_of,
)
from shardprep_runtime.format.read_manifest import parse_manifest, read_manifest
from shardprep_runtime.format.write_manifest import dump_manifest
from sweeps import swept

DIGEST = "sha256:" + "0" * 64

RESPONSE = Response(0.004, ((0.5, -0.25, 1e-05, 0.0, 1.5, -2.0, 3.0, 0.125, -7e29),) * 8)


def example() -> Manifest:
    """A manifest with one of everything."""
    heads = Form("BF16", (8, 4), Layout(0, (Segment(4, 2), Segment(4, 1, shared=True))))
    rows, padded = Segment(7, 7, uneven=True), Segment(7, 7, uneven=True, multiple=64)
    fused = Layout(2, (Segment(6, 3, uneven=True),), experts=True)
    return Manifest(
        model={"architecture": "LlamaForCausalLM", "source": {"files": []}},
        layers=2,
        grain=2,
        stages=((0, 1), (1, 2)),
        block_bytes=16 * 2**20,
        tensors={
            "embed": Entry(
                Form("F32", (7, 4), Layout(0, (rows,)), (("vllm", Layout(0, (padded,))),)), "ends"
            ),
            "layers.0.qkv": Entry(heads, 0),
            "layers.1.qkv": Entry(heads, 1),
            "norm": Entry(Form("F32", (4,), WHOLE), "last"),
            "layers.1.fused": Entry(Form("F32", (3, 2, 6), fused, (("vllm", WHOLE),)), 1),
            "layers.1.experts.2.w": Entry(heads, 1, 2),
        },
        aliases={"other": "embed"},
        tied={"head": "embed"},
        parts=(Part("a.safetensors", 5000, 4096, DIGEST, (0, 1), (0, 2), ("ends", "last")),),
        side_files=(SideFile("config.json", 10, DIGEST), SideFile("quantization_report.json", 10, DIGEST)),
        quantization=Quantization(
            "gptq", 4, 128, True, False, "gptq", QuantizationReport(DIGEST, {"kl": 0.01})
        ),
        experts=3,
        engines=("transformers", "vllm"),
        stage_needs={"transformers": (0, 1)},
        probe=Probe(RESPONSE, (RESPONSE, RESPONSE), RESPONSE),
    )


def fields() -> dict[str, Any]:
    """The example as JSON."""
    found: dict[str, Any] = json.loads(dump_manifest(example()))
    return found


def parse_fields(value: object) -> Manifest:
    """Parse what would be dumped as JSON."""
    return parse_manifest(json.dumps(value).encode(), where="shardprep.json")


# ------------------------------------------------------------------------------------------------------ round trip

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)
file_names = st.text("abcXYZ0_-. ~", min_size=1, max_size=8).filter(lambda name: name.strip("."))
digests = st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:".__add__)
units = st.tuples(st.integers(0, 5), st.integers(1, 4), st.sampled_from([False, True, 1, 64]))
ENGINES = ("transformers", "vllm")
words = st.sampled_from(["gptq", "awq", "gemm", "compressed-tensors", "pack-quantized"])
groups = st.none() | st.integers(1, 2**20)
quantizations = st.builds(
    Quantization, words, st.integers(1, 16), groups, st.booleans(), st.booleans(), words
)


@st.composite
def forms(draw: st.DrawFn, grain: int, experts: int) -> Form:
    """A form whose layout allows the grain."""
    dtype = draw(st.sampled_from(["F32", "BF16", "U8", "F8_E4M3"]))
    shape = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    by_expert = experts > 0 and draw(st.booleans())
    if by_expert:
        shape[0] = experts
    if (by_expert and len(shape) == 1) or draw(st.integers(0, 2)) == 0:
        return Form(dtype, tuple(shape), Layout(experts=by_expert))
    dim = draw(st.integers(int(by_expert), len(shape) - 1))
    segments = tuple(
        Segment(width * count * grain, count * grain, shared=kind)
        if isinstance(kind, bool)
        else Segment(width * count, count, uneven=True, multiple=kind)
        for width, count, kind in draw(st.lists(units, min_size=1, max_size=3))
    )
    size = shape[dim] = sum(segment.size for segment in segments)
    asked = {}
    for engine in draw(st.sets(st.sampled_from(ENGINES))):
        own = Segment(size, size, uneven=True, multiple=draw(st.integers(1, 64)))
        asked[engine] = draw(st.sampled_from([WHOLE, Layout(dim, (own,)), Layout(dim, (own,), by_expert)]))
    return Form(dtype, tuple(shape), Layout(dim, segments, by_expert), tuple(asked.items()))


@st.composite
def whole_manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that is sound."""
    grain, layers = draw(st.integers(1, 8)), draw(st.integers(0, 5))
    experts = draw(st.integers(0, 3))
    choices = draw(st.lists(forms(grain, experts), min_size=1, max_size=3))
    places = st.sampled_from([*manifests.PLACEMENTS, *range(layers)])
    whose = st.sampled_from([None, *range(experts)])
    entries = st.builds(Entry, st.sampled_from(choices), places, whose)
    tensors = draw(st.dictionaries(texts, entries, max_size=5))
    targets = st.sampled_from(sorted(tensors)) if tensors else st.nothing()
    others = texts.filter(lambda name: name not in tensors)
    tied = draw(st.dictionaries(others, targets, max_size=2)) if tensors else {}
    others = others.filter(lambda name: name not in tied)
    bounds = draw(st.lists(st.integers(1, layers), unique=True).map(sorted)) if layers else []
    cuts = [0, *(bound for bound in bounds if bound < layers), layers]
    paths = draw(st.lists(file_names, max_size=4, unique_by=str.casefold))
    span = lambda high: st.tuples(st.integers(0, high), st.integers(0, high)).map(sorted).map(tuple)  # noqa: E731
    parts, sides = [], []
    for i, path in enumerate(paths):
        size = draw(st.integers(8, 2**40))
        if i % 2:
            sides.append(SideFile(path, size, draw(digests)))
            continue
        header_size = draw(st.integers(8, min(size, 10**8)))
        placements = tuple(draw(st.lists(st.sampled_from(manifests.PLACEMENTS), max_size=2)))
        own = (draw(span(grain)), draw(span(layers)), placements)
        parts.append(Part(path, size, header_size, draw(digests), *own))
    return Manifest(
        model=draw(st.dictionaries(texts, st.none() | texts | st.integers(), max_size=2)),
        layers=layers,
        grain=grain,
        stages=draw(st.none() | st.just(tuple(itertools.pairwise(cuts)))) if layers else None,
        block_bytes=draw(st.integers(1, manifests.MAX_BLOCK_BYTES)),
        tensors=tensors,
        aliases=draw(st.dictionaries(others, targets, max_size=2)) if tensors else {},
        tied=tied,
        parts=tuple(parts),
        side_files=tuple(sides),
        quantization=draw(st.none() | quantizations),
        experts=experts,
        engines=ENGINES,
        stage_needs={"vllm": tuple(draw(st.sets(st.integers(0, layers - 1), min_size=1).map(sorted)))}
        if layers and draw(st.booleans())
        else {},
    )


@given(whole_manifests())
def test_what_is_dumped_is_parsed_again(manifest: Manifest) -> None:
    raw = dump_manifest(manifest)
    assert parse_manifest(raw) == manifest
    assert dump_manifest(parse_manifest(raw)) == raw
    assert raw.isascii()


def test_the_example_is_sound() -> None:
    assert parse_manifest(dump_manifest(example())) == example()


def test_forms_that_are_alike_are_stored_once() -> None:
    assert len(fields()["forms"]) == 4


# ------------------------------------------------------------------------------------------------- runs of experts


def with_experts(count: int, *names: str) -> Manifest:
    """The example with `count` experts, each with a tensor of each of `names`, in which # is its number."""
    tensors = {name: entry for name, entry in example().tensors.items() if name != "layers.1.fused"}
    for i in range(count):
        for name in names:
            tensors[name.replace("#", str(i))] = Entry(tensors["layers.0.qkv"].form, 1, i)
    return dataclasses.replace(example(), experts=count, tensors=tensors)


def test_tensors_of_experts_that_are_alike_stand_on_one_line_and_are_found_by_their_names() -> None:
    manifest = with_experts(300, "layers.1.e.#.up", "layers.1.e.#.down")
    raw = dump_manifest(manifest)
    listed = json.loads(raw)["tensors"]
    assert listed["layers.1.e.{expert}.up"] == [1, 1, [0, 300]]
    assert len(listed) == len(manifest.tensors) - 598
    found = parse_manifest(raw)
    assert len(found.tensors) == len(manifest.tensors)
    assert found.tensors["layers.1.e.299.down"] == manifest.tensors["layers.1.e.299.down"]
    for missing in (
        "layers.1.e.300.up",
        "layers.1.e.007.up",
        "layers.1.e.{expert}.up",
        "layers.2.e.7.up",
        "7",
        "",
    ):
        assert missing not in found.tensors
    assert found == manifest
    assert dict(found.tensors) == dict(manifest.tensors)


def test_experts_that_differ_or_leave_a_gap_stand_on_lines_of_their_own() -> None:
    manifest = with_experts(4, "e.#.up", "1.e.#")
    tensors = dict(manifest.tensors)
    del tensors["e.2.up"]
    tensors["1.e.3"] = Entry(tensors["norm"].form, 1, 3)
    manifest = dataclasses.replace(manifest, tensors=tensors)
    assert not any("{expert}" in name for name in json.loads(dump_manifest(manifest))["tensors"])
    assert parse_manifest(dump_manifest(manifest)) == manifest


def test_a_name_that_holds_the_placeholder_itself_is_a_name() -> None:
    tensors = {**example().tensors, "a.{expert}.0": Entry(example().tensors["norm"].form, 1, 0)}
    manifest = dataclasses.replace(example(), tensors=tensors)
    assert parse_manifest(dump_manifest(manifest)) == manifest


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(["#", "0", "1", "12", "a"]), min_size=1, max_size=4).map(".".join),
                  st.integers(0, 3), st.integers(1, 13)),
        min_size=1, max_size=4, unique_by=lambda line: line[0],
    )
)  # fmt: skip
def test_lines_that_name_the_same_tensor_are_refused_and_no_others(lines: list[tuple[str, int, int]]) -> None:
    found = json.loads(dump_manifest(with_experts(20)))
    found["tensors"], found["aliases"], found["tied"] = {}, {}, {}
    names = []
    for name, first, count in lines:
        if name.count("#") > 1:
            continue
        run = "#" in name
        found["tensors"][name.replace("#", "{expert}")] = [2, 1, [first, first + count]] if run else [2, 1]
        names += [name.replace("#", str(i)) for i in range(first, first + (count if run else 1))]
    if len(set(names)) == len(names):
        tensors = parse_fields(found).tensors
        assert sorted(tensors) == sorted(names)
        assert all(name in tensors and tensors[name].layer == 1 for name in names)
    else:
        with pytest.raises(ManifestError, match="two lines name the same tensor"):
            parse_fields(found)


@pytest.mark.parametrize("name", ["w", "e.1{expert}", "e.{expert}2", "{expert}.{expert}", "e.{Expert}"])
def test_a_run_of_experts_needs_the_placeholder_once_and_apart_from_digits(name: str) -> None:
    found = fields()
    found["tensors"][name] = [1, 1, [0, 3]]
    with pytest.raises(ManifestError, match="once, no digit beside it"):
        parse_fields(found)


@pytest.mark.parametrize(
    "run", [[0, 4], [2, 2], [2, 1], [0], [0, 1, 2], [0, True], [0, 2.0], ["0", "1"], [-1, 2]]
)
def test_a_run_that_is_none_is_refused(run: Any) -> None:
    found = fields()
    found["tensors"]["e.{expert}.w"] = [1, 1, run]
    with pytest.raises(ManifestError, match="expected one of the 3 experts, or"):
        parse_fields(found)


def test_more_tensors_than_any_model_has_are_refused_before_they_are_named() -> None:
    found = fields()
    found["experts"] = manifests.MAX_EXPERTS
    found["forms"][3]["layout"].pop("experts")
    for i in range(40):
        found["tensors"][f"{i}x.{{expert}}"] = [1, 1, [0, manifests.MAX_EXPERTS]]
    with pytest.raises(ManifestError, match="tensors are more than the 2097152"):
        parse_fields(found)


# ------------------------------------------------------------------------------------------------- version and keys


def test_a_newer_version_is_refused_naming_both() -> None:
    with pytest.raises(ManifestError, match="version 7 is newer than 1") as caught:
        parse_fields({**fields(), "version": 7})
    assert "upgrade" in str(caught.value)


def test_a_newer_version_is_refused_whatever_else_it_holds() -> None:
    with pytest.raises(ManifestError, match="version 2 is newer than 1"):
        parse_fields({"format": "shardprep", "version": 2, "tensors": "elsewhere"})


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_a_version_that_never_was_is_refused(version: object) -> None:
    with pytest.raises(ManifestError, match="version"):
        parse_fields({**fields(), "version": version})


def test_another_format_is_refused() -> None:
    with pytest.raises(ManifestError, match="not a shardprep manifest"):
        parse_fields({**fields(), "format": "safetensors"})


def test_unknown_keys_are_ignored_everywhere() -> None:
    found = fields()
    for each in (found, found["digests"], *found["forms"], *found["parts"], *found["side_files"]):
        each["of a later version"] = {"a": [1]}
    for form in found["forms"]:
        form["layout"]["of a later version"] = 1
    assert parse_fields(found) == example()


# ------------------------------------------------------------------------------------------------------ each field


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, each in items for path in paths_of(each, (*at, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A deep copy of `value` with `new` at `path`; `...` removes it."""
    if not path:
        return new
    found = copy.deepcopy(value)
    target = found
    for key in path[:-1]:
        target = target[key]
    if new is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = new
    return found


OPTIONAL = {
    ("quantization",), ("quantization", "report"), ("quantization", "report", "summary", "kl"),
    ("stages",), ("stage_needs",), ("probe",),
}  # fmt: skip
PATHS = paths_of(fields())
CHECKED = [
    path
    for path in PATHS
    if path
    and path[0] != "model"
    # of a probe's hundreds of numbers the first two of each response are checked
    and ("positions" not in path or path[path.index("positions") + 1 :] in ((), (0,), (0, 0), (0, 1)))
]


@pytest.mark.parametrize("path", [p for p in CHECKED if isinstance(p[-1], str)], ids=str)
def test_each_field_is_required(path: tuple[Any, ...]) -> None:
    found = replaced(fields(), path, ...)
    if path in OPTIONAL or (path[0] in ("aliases", "tied", "stage_needs") and len(path) == 2):
        parse_fields(found)  # an entry of a mapping, or what may be absent
        return
    if path[-1] == "multiple" or path[2:] in (("engines",), ("engines", "vllm")):
        parse_fields(found)
        return
    if path == ("forms", 3, "layout", "experts"):
        parse_fields(found)  # then dim 0 does not count them
        return
    if path[0] == "tensors" and len(path) == 2 and path[1] != "embed":
        parse_fields(found)
        return
    with pytest.raises(ManifestError):
        parse_fields(found)


WRONG = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**63,
    10**40,
    "",
    "x",
    "\x1b[31m",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    "\ud800",
]


@pytest.mark.parametrize("path", swept(PATHS, but=[(), *CHECKED]), ids=str)
def test_a_wrong_value_anywhere_gives_a_manifest_error_or_a_sound_manifest(path: tuple[Any, ...]) -> None:
    for wrong in WRONG:
        try:
            dump_manifest(parse_fields(replaced(fields(), path, wrong)))
        except ManifestError as error:
            assert str(error).isascii()
            assert str(error).isprintable()
            assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("layers",), -1),
        (("layers",), 1),
        (("layers",), "2"),
        (("grain",), 0),
        (("grain",), 3),
        (("grain",), 4097),
        (("stages",), [[0, 1]]),
        (("stages",), [[0, 2], [2, 2]]),
        (("stages",), [[1, 2], [0, 1]]),
        (("stages",), [0, 2]),
        (("stages",), ["02"]),
        (("stages",), [[0, 2.0]]),
        (("stages",), [[False, True], [1, 2]]),
        (("stages",), [[0, 1, 2]]),
        (("digests", "blocks"), "md5"),
        (("digests", "headers"), "blake3"),
        (("digests", "block_bytes"), 0),
        (("digests", "block_bytes"), 2**24 + 1),
        (("digests", "block_bytes"), 1.0),
        (("forms", 0, "dtype"), "F128"),
        (("forms", 0, "shape"), [-1, 4]),
        (("forms", 0, "shape"), [2**62, 2**62]),
        (("forms", 0, "shape"), [1] * 65),
        (("forms", 0, "shape"), []),
        (("forms", 0, "layout", "cut"), "diagonal"),
        (("forms", 0, "layout"), {"cut": "chunks", "dim": 1}),  # chunks are rows
        (("forms", 0, "layout"), {"cut": "chunks"}),
        (("forms", 0, "layout", "dim"), 1),
        (("forms", 0, "layout", "dim"), 2),
        (("forms", 0, "layout", "segments"), [{"size": 7, "units": 7}]),
        (("forms", 0, "layout", "segments"), [{"size": 7, "units": 7, "uneven": 1}]),
        (("forms", 0, "layout", "segments"), [{"size": 7, "units": 7, "uneven": False}]),
        (("forms", 0, "layout", "segments"), [{"size": 7, "units": 7, "uneven": True, "multiple": 0}]),
        (("forms", 0, "layout", "segments"), [{"size": 7, "units": 7, "uneven": True, "multiple": 2**63}]),
        (("forms", 0, "layout", "segments"), [{"size": 7, "units": 2, "uneven": True}]),
        (("forms", 0, "layout", "segments"), [{"size": 7, "units": 0, "uneven": True}]),
        (("forms", 0, "layout", "experts"), True),
        (("forms", 0, "layout", "experts"), 1),
        (("forms", 2, "layout", "experts"), True),
        (("forms", 0, "engines"), []),
        (("forms", 0, "engines", "sglang"), {"cut": "whole"}),
        (("forms", 0, "engines", "torch"), {"cut": "whole"}),
        (("forms", 0, "engines", "vllm", "dim"), 1),
        (("forms", 0, "engines", "vllm", "cut"), "diagonal"),
        (("forms", 0, "engines", "vllm", "experts"), True),
        (("forms", 0, "engines", "vllm", "segments"), [[6, 6, False]]),
        (("forms", 0, "engines", "vllm", "segments"), []),
        (("forms", 2, "engines"), {"vllm": {"cut": "units", "dim": 0, "segments": [[4, 4, False]]}}),
        (("forms", 3, "shape"), [4, 2, 6]),
        (("forms", 3, "layout", "dim"), 0),
        (("experts",), 2),
        (("experts",), 1.0),
        (("experts",), True),
        (("engines",), ["vllm"]),
        (("engines",), ["transformers", "vllm", "vllm"]),
        (("engines",), ["transformers", "vllm", "torch"]),
        (("engines",), ["transformers", "vllm", "a b"]),
        (("engines",), ["transformers", "vllm", ["x"]]),
        (("engines",), {"transformers": 1, "vllm": 1}),
        (("stage_needs", "transformers"), []),
        (("stage_needs", "transformers"), [1, 0]),
        (("stage_needs", "transformers"), [0, 0]),
        (("stage_needs", "transformers"), [2]),
        (("stage_needs", "transformers"), [True]),
        (("stage_needs", "transformers"), "01"),
        (("stage_needs", "sglang"), [0]),
        (("stage_needs",), []),
        (("tensors", "layers.1.experts.2.w"), [1, 1, 3]),
        (("tensors", "layers.1.experts.2.w"), [1, 1, -1]),
        (("tensors", "layers.1.experts.2.w"), [1, 1, True]),
        (("tensors", "layers.1.experts.2.w"), [1, 1, None]),
        (("tensors", "layers.1.experts.2.w"), [1, 1, 2.0]),
        (("tensors", "layers.1.experts.2.w"), [1, 1, 2, 2]),
        (("tensors", "layers.1.experts.2.w"), [1, True, 2]),
        (("tensors", "layers.1.experts.2.w"), [1, 1.0, 2]),
        (("tensors", "layers.1.experts.2.w"), {}),
        (("forms", 0, "layout", "dim"), -1),
        (("forms", 1, "layout", "segments"), []),
        (("forms", 1, "layout", "segments"), [[8, 3, False]]),
        (("forms", 1, "layout", "segments"), [[8, 0, False]]),
        (("forms", 1, "layout", "segments"), [[4, 2, False]]),
        (("forms", 1, "layout", "segments"), [[8, 2, 1]]),
        (("forms", 1, "layout", "segments"), [[8, 1, False]]),
        (("tensors", "norm"), [4, "last"]),
        (("tensors", "norm"), [-1, "last"]),
        (("tensors", "norm"), [True, "last"]),
        (("tensors", "norm"), [2, 2]),
        (("tensors", "norm"), [2, "middle"]),
        (("tensors", "norm"), [2, None]),
        (("tensors", "norm"), [2]),
        (("aliases", "other"), "nobody"),
        (("aliases", "norm"), "embed"),
        (("aliases", "other"), None),
        (("tied", "head"), "other"),
        (("tied",), {"other": "embed"}),
        (("tied", "head"), ["embed"]),
        (("parts", 0, "size"), 4095),
        (("parts", 0, "header_size"), 7),
        (("parts", 0, "header_size"), 5001),
        (("parts", 0, "digest"), "sha256:" + "0" * 63),
        (("parts", 0, "digest"), "sha256:" + "A" * 64),
        (("parts", 0, "digest"), "0" * 64),
        (("parts", 0, "digest"), DIGEST + "\n"),
        (("parts", 0, "ranks"), [0, 3]),
        (("parts", 0, "ranks"), [1, 0]),
        (("parts", 0, "ranks"), [0]),
        (("parts", 0, "layers"), [0, 3]),
        (("parts", 0, "placements"), ["middle"]),
        (("parts", 0, "placements"), [["first"]]),
        (("side_files", 0, "size"), -1),
        (("side_files", 0, "digest"), None),
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused(path: tuple[Any, ...], wrong: object) -> None:
    with pytest.raises(ManifestError, match=r"^shardprep\.json: "):
        parse_fields(replaced(fields(), path, wrong))


def test_a_header_is_not_larger_than_its_format_allows() -> None:
    """Otherwise a sparse part of a terabyte would be read into memory to check its digest."""
    found = replaced(fields(), ("parts", 0, "size"), 2**40)
    parse_fields(found)
    with pytest.raises(ManifestError, match="'header_size' must be from 8 to 100000008"):
        parse_fields(replaced(found, ("parts", 0, "header_size"), 2**40))


def test_a_tensor_of_more_pieces_than_any_has_is_refused_before_they_are_made() -> None:
    rows = {"size": 2**16, "units": 2**16, "uneven": True}
    for path, value in [
        (("forms", 2, "layout"), [[1, 1, True]] * 2**16),
        (("forms", 2, "engines"), [[1, 1, True]] * 2**16),
    ]:
        found = replaced(fields(), ("forms", 2, "shape"), [2**16])
        found["forms"][2]["layout"] = {"cut": "units", "dim": 0, "segments": [rows]}
        layout = {"cut": "units", "dim": 0, "segments": value}
        found = replaced(found, path, layout if path[2] == "layout" else {"vllm": layout})
        with pytest.raises(ManifestError, match="more than 65536 pieces"):
            parse_fields(found)


# the others are more of the same chance
@pytest.mark.parametrize("seed", swept(range(4), but=(0,)))
def test_structured_mutation_raises_nothing_but_manifest_errors(seed: int) -> None:
    rng = random.Random(seed)
    values = [
        *WRONG,
        1,
        2,
        3,
        4096,
        2**31,
        [0, 1],
        [1, 0],
        ["first"],
        "first",
        "../x",
        "units",
        "chunks",
        1e300,
    ]
    values += [each for path in PATHS for each in [_at(fields(), path)]]
    refused = 0
    for _ in range(750):
        found = fields()
        for _ in range(rng.choice((1, 2, 3))):
            path = rng.choice(paths_of(found))
            found = replaced(found, path, rng.choice(values) if rng.random() < 0.8 or not path else ...)
        try:
            dump_manifest(parse_fields(found))
        except ManifestError:
            refused += 1
    assert refused > 375


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("path", [p for p in CHECKED if len(p) < 4], ids=str)
def test_nesting_of_any_depth_is_a_manifest_error_or_harmless(path: tuple[Any, ...]) -> None:
    text = json.dumps(replaced(fields(), path, "HERE"))
    for depth in (*range(850, 1000, 15), 100_000):
        raw = text.replace('"HERE"', "[" * depth + "]" * depth).encode()
        try:
            parse_manifest(raw)
        except ManifestError as error:
            assert len(str(error)) < 500


# ------------------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"1", b'"shardprep"', b"\xff", b'{"format":NaN}', b"\xef\xbb\xbf{}", b"{}\0"],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ManifestError, match=r"^shardprep\.json"):
        parse_manifest(raw)


def test_a_key_that_stands_twice_is_refused() -> None:
    raw = dump_manifest(example()).replace(
        b'"norm": [2, "last"]', b'"norm": [2, "last"], "norm": [2, "first"]'
    )
    with pytest.raises(ManifestError, match="norm stands twice"):
        parse_manifest(raw)


def test_every_truncation_is_refused() -> None:
    raw = dump_manifest(example()).rstrip()
    for length in range(len(raw)):
        with pytest.raises(ManifestError):
            parse_manifest(raw[:length])


# ------------------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "a/../b",
        "",
        "a\\b",
        "a\0b",
        ".",
        "..",
        "a//b",
        "a/",
        "./a",
        "a/.",
        "\ud800",
        "..\\x",
    ],
)
@pytest.mark.parametrize("key", ["parts", "side_files"])
def test_a_path_that_leaves_its_folder_or_is_not_plain_is_refused(key: str, path: str) -> None:
    with pytest.raises(ManifestError, match="refused") as caught:
        parse_fields(replaced(fields(), (key, 0, "path"), path))
    assert str(caught.value).isascii()


@pytest.mark.parametrize("path", ["a.safetensors", "A.SafeTensors", "shardprep.json", "SHARDPREP.json"])
def test_two_files_of_one_path_are_refused_even_where_only_case_tells_them_apart(path: str) -> None:
    with pytest.raises(ManifestError, match="the same path"):
        parse_fields(replaced(fields(), ("side_files", 0, "path"), path))


# ------------------------------------------------------------------------------------------------- files and digests


def test_the_manifest_is_found_by_its_folder_and_by_itself(tmp_path: Path) -> None:
    raw = dump_manifest(example())
    (tmp_path / "shardprep.json").write_bytes(raw)
    assert read_manifest(tmp_path) == read_manifest(tmp_path / "shardprep.json") == example()
    assert read_manifest(tmp_path, digest=digest_of(raw)) == example()


@pytest.mark.parametrize("digest", [DIGEST, "", "sha256:", "\x1b[31m"])
def test_a_manifest_with_another_digest_is_refused_naming_both(tmp_path: Path, digest: str) -> None:
    raw = dump_manifest(example())
    (tmp_path / "shardprep.json").write_bytes(raw)
    with pytest.raises(ManifestError, match="do not load it") as caught:
        read_manifest(tmp_path, digest=digest)
    assert digest_of(raw) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest here"):
        read_manifest(tmp_path)


def test_a_manifest_of_more_bytes_than_any_has_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "shardprep.json").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ManifestError, match="1099511627776 bytes is more than"):
        read_manifest(tmp_path)


def test_a_report_must_be_the_side_file_of_its_name() -> None:
    found = fields()
    found["quantization"]["report"]["digest"] = "sha256:" + "1" * 64
    with pytest.raises(
        ManifestError, match=r"is not the side file quantization_report\.json: their digests differ"
    ):
        parse_fields(found)
    found["side_files"].pop()
    with pytest.raises(ManifestError, match="there is none"):
        parse_fields(found)
