"""The format is what docs/manifest-format.md and the schema say, and what was written at version 1 is read for ever."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import frozen_models
import shardprep_runtime
from frozen_models import FROZEN, MODELS
from shardprep.export import export
from shardprep.layout import ModelLayout, Placed, known_types
from shardprep.split import SplitOptions, split
from shardprep.verify import verify
from shardprep_runtime.errors import LayoutError, ManifestError
from shardprep_runtime.format import dtypes
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.cut import Layout, Segment
from shardprep_runtime.format.header import MAX_DIMS, MAX_HEADER_BYTES, PAGE, parse_header
from shardprep_runtime.format.read_manifest import parse_manifest
from shardprep_runtime.format.view import Place
from shardprep_runtime.format.write_manifest import dump_manifest
from shardprep_runtime.shard.shard_set import open_set

ROOT = Path(__file__).parents[2]
PAGE_OF_THE_FORMAT = ROOT / "docs/manifest-format.md"
EXAMPLES = sorted((ROOT / "manifests/v1").glob("*.json"))
DATA = ROOT / "tests/data/v1"
FIRST = ("llama-tied-kv2-tp4", "phi3-fused-tp2")
"""Frozen before manifests knew of engines and experts: their parts are the same, their manifests say it otherwise."""

SCHEMA = json.loads(resources.files("shardprep_runtime").joinpath("manifest.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

EDITS = (None, True, -1, 0, 1, 1.5, 2**63, "", "x", [], {}, [None], [0, "x"])
"""What stands in for each value of a manifest in turn."""


def example(title: str) -> str:
    """The JSON block under the comment `<!-- example: title -->` of the format's page."""
    page = PAGE_OF_THE_FORMAT.read_text("utf-8")
    found = re.search(rf"<!-- example: {title} -->\n+```json\n(.*?)```", page, re.DOTALL)
    assert found, title
    return found[1]


def parsed(fields: Any) -> manifests.Manifest:
    return parse_manifest(json.dumps(fields).encode())


def without_tool(raw: str) -> Any:
    fields = json.loads(raw)
    del fields["model"]["tool"]
    return fields


def split_again(name: str, folder: Path) -> Path:
    """The shard set that today's code makes of a small model."""
    model = MODELS[name]
    source = frozen_models.write_checkpoint(name, folder / "source")
    destination = folder / "shards" / name
    options = SplitOptions()
    if model.block_bytes is not None:
        options = SplitOptions(block_bytes=model.block_bytes)
    with pytest.MonkeyPatch.context() as patch:
        if model.layouts is not None:  # no model type has such rules: they show what the format can say
            patch.setattr("shardprep.model.describe.derive_layout", lambda *_, **__: layout_of(model))
        split(
            source,
            destination,
            tensor_parallel_size=model.tensor_parallel_size,
            pipeline_parallel_size=model.pipeline_parallel_size,
            options=options,
        )
    return destination


def layout_of(model: frozen_models.Model) -> ModelLayout:
    """The layouts that a small model brings along."""
    assert model.layouts is not None
    tensors = {}
    for name in model.shapes:
        words = name.split(".")
        stored, engines = next((model.layouts[word] for word in words if word in model.layouts), ({}, {}))
        numbers = [int(word) for word in words if word.isdigit()]
        placement = "first" if "embed_tokens" in words else "last"
        tensors[name] = Placed(
            numbers[0] if numbers else placement,
            as_layout(stored),
            tuple((engine, as_layout(asked)) for engine, asked in engines.items()),
            numbers[1] if numbers[1:] else None,
        )
    return ModelLayout(
        model.config["model_type"],
        model.config["num_hidden_layers"],
        tensors,
        {},
        experts=model.config["num_local_experts"],
        engines=frozen_models.ENGINES,
    )


def as_layout(fields: Any) -> Layout:
    segments = fields.get("segments", ())
    return Layout(
        fields.get("dim"),
        tuple(Segment(**each) if isinstance(each, dict) else Segment(*each) for each in segments),
        bool(fields.get("experts")),
    )


def probe_of(layers: int) -> dict[str, Any]:
    """The field `probe` of a manifest, as JSON."""
    row = [0.5, -0.25, 1e-05, 0, 1.5, -2, 3.0, 0.125, -1e30]
    response = {"noise": 0.004, "positions": [row] * 8}
    each = [copy.deepcopy(response) for _ in range(layers + 2)]
    return {"method": "signs-1", "embedding": each[0], "layers": each[1:-1], "head": each[-1]}


@pytest.fixture
def fields() -> dict[str, Any]:
    """The fields of the page's example, to be spoilt."""
    return json.loads(example("manifest"))


# ---------------------------------------------------------------------------------------------------- the schema


def test_the_schema_is_one_and_says_what_the_reader_says() -> None:
    VALIDATOR.check_schema(SCHEMA)
    keys, parts = SCHEMA["properties"], SCHEMA["properties"]["parts"]["items"]["properties"]
    assert keys["version"]["const"] == manifests.VERSION
    assert keys["grain"]["maximum"] == parts["ranks"]["items"]["maximum"] == manifests.MAX_GRAIN
    assert keys["digests"]["properties"]["block_bytes"]["maximum"] == manifests.MAX_BLOCK_BYTES
    assert parts["header_size"]["maximum"] == 8 + MAX_HEADER_BYTES
    assert SCHEMA["$defs"]["size"]["maximum"] == dtypes.MAX_ELEMENTS
    assert SCHEMA["$defs"]["placement"]["enum"] == list(manifests.PLACEMENTS)
    assert SCHEMA["$defs"]["form"]["properties"]["dtype"]["enum"] == list(dtypes.BITS)
    assert SCHEMA["$defs"]["form"]["properties"]["shape"]["maxItems"] == MAX_DIMS
    assert SCHEMA["$defs"]["layout"]["allOf"][1]["then"]["properties"]["dim"]["maximum"] == MAX_DIMS - 1
    assert list(parts) == list(manifests.Part.__slots__)
    assert list(keys["side_files"]["items"]["properties"]) == list(manifests.SideFile.__slots__)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_manifests_are_valid_and_written_back_as_they_are(path: Path) -> None:
    raw = path.read_bytes()
    VALIDATOR.validate(json.loads(raw))
    # the writer leaves no key out, but for the probe that was not asked for
    assert list(json.loads(raw)) == [key for key in SCHEMA["properties"] if key != "probe"]
    assert dump_manifest(parse_manifest(raw)) == raw


@pytest.mark.parametrize("path", sorted(DATA.glob("*/shardprep.json")), ids=lambda path: path.parent.name)
def test_frozen_manifests_are_valid_and_say_the_same_when_they_are_written_anew(path: Path) -> None:
    raw = path.read_bytes()
    VALIDATOR.validate(json.loads(raw))
    assert json.loads(raw).keys() <= SCHEMA["properties"].keys()
    found = parse_manifest(raw)
    assert parse_manifest(dump_manifest(found)) == found


def test_a_probe_is_written_back_as_it_is_and_one_of_another_method_is_left_alone(
    fields: dict[str, Any],
) -> None:
    fields["probe"] = probe_of(1)
    VALIDATOR.validate(fields)
    found = parsed(fields)
    assert found.probe is not None
    assert len(found.probe.layers) == 1
    raw = dump_manifest(found)
    assert json.loads(raw)["probe"] == probe_of(1)
    assert dump_manifest(parse_manifest(raw)) == raw
    without = copy.deepcopy(fields)
    del without["probe"]
    assert dump_manifest(parsed(without)) == raw[: raw.index(b',\n  "probe"')] + b"\n}\n"
    fields["probe"] = {"method": "noise-2", "layers": "whatever it holds"}
    VALIDATOR.validate(fields)
    assert parsed(fields).probe is None
    fields["probe"] = None
    VALIDATOR.validate(fields)
    assert parsed(fields).probe is None


def test_rows_in_chunks_are_what_version_1_wrote_first() -> None:
    """A manifest without experts, engines and needs of stages, whose vocabulary is cut in `chunks`."""
    fields = json.loads((DATA / "llama-tied-kv2-tp4/shardprep.json").read_text("utf-8"))
    assert fields.keys() == SCHEMA["properties"].keys() - {"experts", "engines", "stage_needs", "probe"}
    assert fields["forms"][0]["layout"] == {"cut": "chunks", "dim": 0}
    found = parsed(fields)
    assert (found.experts, found.engines, found.stage_needs) == (0, (), {})
    assert next(iter(found.tensors.values())).form.layout == Layout(0, (Segment(10, 10, uneven=True),))


def test_every_small_model_has_an_example_and_every_frozen_one_its_shards() -> None:
    assert {path.stem for path in EXAMPLES} == MODELS.keys() - {"smallest"}
    assert {path.name for path in DATA.iterdir()} == {
        f for name in FROZEN for f in (name, f"{name}.shards.json")
    }


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of the objects of a manifest whose keys the format names."""
    of_names = path[:1] in (("tensors",), ("aliases",), ("tied",), ("stage_needs",)) or path[2:] == (
        "engines",
    )
    if isinstance(value, dict) and not of_names:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            yield from objects(inner, (*path, key))


def at(fields: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        fields = fields[key]
    return fields


def test_unknown_keys_are_ignored_wherever_they_stand(fields: dict[str, Any]) -> None:
    expected = parsed(fields)
    paths = list(objects(fields))
    assert {path[0] for path in paths if path} == {"model", "digests", "forms", "parts", "side_files"}
    for path in paths:
        at(fields, path)["a key of tomorrow"] = {"any": ["thing"]}
    VALIDATOR.validate(fields)
    del fields["model"]["a key of tomorrow"], fields["model"]["source"]["a key of tomorrow"]
    del fields["model"]["source"]["files"][0][
        "a key of tomorrow"
    ]  # the model's keys are handed on as they are
    assert parsed(fields) == expected


def spoilt(fields: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Copies of the manifest, each with one value below `key` replaced, removed or doubled."""

    def paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield path
        if isinstance(value, dict | list):
            for inner in list(value) if isinstance(value, dict) else range(len(value)):
                yield from paths(value[inner], (*path, inner))

    for *parent, last in paths(fields[key], (key,)):
        for edit in (*EDITS, "remove", "double"):
            changed = copy.deepcopy(fields)
            holder = at(changed, tuple(parent))
            if edit == "remove":
                del holder[last]
            elif edit == "double" and isinstance(holder, list):
                holder.insert(last, holder[last])
            else:
                holder[last] = edit
            yield f"{[*parent, last]} = {edit!r}", changed


@pytest.mark.parametrize("key", list(SCHEMA["properties"]))
def test_what_the_schema_refuses_the_reader_refuses_by_name(fields: dict[str, Any], key: str) -> None:
    fields["stages"] = [[0, 1]]
    fields["probe"] = probe_of(1)
    quantized = json.loads((ROOT / "manifests/v1/llama-gptq-tp2.json").read_text("utf-8"))
    fields["quantization"] = quantized["quantization"]
    fields["side_files"] += [each for each in quantized["side_files"] if "quantization" in each["path"]]
    parsed(fields)
    for what, changed in spoilt(fields, key):
        if re.search(r"'positions', [1-7], [1-8]", what) or re.search(
            r"'(embedding|head)', 'positions', .", what
        ):
            continue  # hundreds of numbers that are as the others
        try:
            parsed(changed)
        except ManifestError as error:
            assert str(error).startswith("shardprep.json: "), what
        else:
            assert VALIDATOR.is_valid(changed), what


def set_at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(fields: dict[str, Any]) -> None:
        at(fields, path[:-1])[path[-1]] = value

    return edit


ROWS = {"positions": [[0.0] * 9] * 8}

REFUSED_BY_BOTH = [
    (set_at("version", value=2), "newer than 1"),
    (set_at("version", value=0), "does not exist"),
    (set_at("format", value="safetensors"), "not a shardprep manifest"),
    (set_at("grain", value=4097), "from 1 to 4096"),
    (set_at("digests", "blocks", value="sha256"), "this reader knows blake3"),
    (set_at("digests", "block_bytes", value=16 * 2**20 + 1), "from 1 to 16777216"),
    (set_at("forms", 0, "dtype", value="bfloat16"), "unknown dtype"),
    (set_at("forms", 0, "shape", value=[1] * 65), "at most 64 sizes"),
    (set_at("forms", 0, "layout", value={"cut": "diagonal"}), "this reader knows whole, units, chunks"),
    (set_at("forms", 0, "shape", value=[]), "without dims cannot be cut"),
    (set_at("forms", 2, "layout", "segments", value=[]), "must add up"),
    (set_at("forms", 5, "layout", "segments", 0, 1, value=0), "not a multiple of 0 units"),
    (set_at("forms", 5, "layout", "segments", 0, 2, value=1), "true or false"),
    (set_at("tensors", "model.norm.weight", 1, value="middle"), "nor a placement"),
    (set_at("parts", 0, "digest", value="sha256:" + "A" * 64), "64 hex digits"),
    (set_at("parts", 0, "header_size", value=7), "from 8 to"),
    (set_at("stages", value=[1]), "must be a list of"),
    (set_at("parts", 0, "placements", value=["middle"]), "unknown placement"),
    *(
        (set_at("parts", 0, "path", value=path), "leaves the folder or is not plain")
        for path in ("/a", "../a", "a/../b", "a//b", "./a", "a/", "", "..", ".", "a\\b", "a\0b", "b/..")
    ),
    (set_at("side_files", 0, "path", value="Shardprep.JSON"), "the same path"),
    (set_at("forms", 0, "layout", value={"cut": "chunks", "dim": 1}), "along dim 0, not 1"),
    (set_at("forms", 0, "layout", "segments", 0, "uneven", value=False), "must be uneven: true"),
    (set_at("forms", 0, "layout", "segments", 0, "multiple", value=0), "from 1 to"),
    (set_at("forms", 0, "layout", "experts", value=1), "true or false"),
    (set_at("forms", 0, "engines", value={"torch": {"cut": "whole"}}), "not among the engines"),
    (set_at("engines", value=["torch"]), "which asks as stored"),
    (set_at("engines", value=["vllm", "vllm"]), "one of them twice"),
    (set_at("engines", value=["vLLM"]), "not the name of an engine"),
    (set_at("experts", value=2**16 + 1), "from 0 to 65536"),
    (set_at("stage_needs", value={"vllm": []}), "some of the 1 layers"),
    (set_at("tensors", "model.norm.weight", value=[1, 0, [0, 0]]), "once, no digit beside it"),
    (set_at("tensors", "model.norm.weight", value=[1, 0, 1, 1]), "must be"),
    (set_at("probe", value=[]), "must be an object"),
    (set_at("probe", value={}), "lacks 'method'"),
    (set_at("probe", value={"method": "Signs"}), "is not a name"),
    (set_at("probe", value={**probe_of(1), "embedding": None}), "'embedding' must be an object"),
    (set_at("probe", value={**probe_of(1), "head": {"noise": -1e-3, **ROWS}}), "not negative"),
    (set_at("probe", value={**probe_of(1), "head": {"noise": 1e31, **ROWS}}), "none beyond 1e[+]30"),
    (set_at("probe", value={**probe_of(1), "head": {"noise": 0, "positions": []}}), "8 'positions' of 9"),
    (set_at("probe", value={**probe_of(1), "head": {"noise": 0, "positions": [[0.0] * 8] * 8}}), "of 9"),
    (set_at("probe", value={**probe_of(1), "head": {"noise": 0, "positions": [[-1.0] * 9] * 8}}), "not neg"),
    (set_at("probe", value={**probe_of(1), "head": {"noise": 0, "positions": [[True] * 9] * 8}}), "of 9"),
]

REFUSED_BY_THE_READER = [
    (set_at("forms", 2, "layout", "segments", 0, "size", value=12), "must add up to 6"),
    (set_at("forms", 2, "layout", "segments", 0, "units", value=4), "not a multiple of 4 units"),
    (set_at("forms", 2, "layout", "segments", 0, "units", value=0), "not a multiple of 0 units"),
    (set_at("forms", 6, "layout", "segments", 0, 1, value=1), "does not allow the grain 2"),
    (set_at("forms", 2, "layout", "dim", value=2), "from 0 to 1"),
    (set_at("forms", 0, "shape", value=[2**62, 4]), "larger than any file"),
    (
        set_at(
            "forms", 0, "engines", value={"vllm": {"cut": "units", "dim": 1, "segments": [[4, 4, False]]}}
        ),
        "dim",
    ),
    (set_at("forms", 0, "engines", value={"sglang": {"cut": "whole"}}), "not among the engines"),
    (set_at("forms", 0, "layout", "experts", value=True), "does not count the 0 experts"),
    (set_at("stage_needs", value={"vllm": [1]}), "some of the 1 layers"),
    (set_at("stage_needs", value={"sglang": [0]}), "not among the engines"),
    (set_at("tensors", "model.norm.weight", value=[1, 0, 0]), "one of the 0 experts"),
    (set_at("tensors", "n.{expert}.w", value=[1, 0, [0, 1]]), "one of the 0 experts"),
    (set_at("tensors", "model.norm.weight", 0, value=7), "a form that exists"),
    (set_at("tensors", "model.norm.weight", 1, value=1), "neither one of the 1 layers"),
    (set_at("aliases", "model.norm.weight", value="model.embed_tokens.weight"), "and not be one"),
    (set_at("tied", "lm_head.weight", value="lm_head.bias"), "must name a stored tensor"),
    (set_at("stages", value=[[0, 1.0]]), "must be a list of"),  # to JSON Schema 1.0 is an integer
    (set_at("layers", value=1.0), "wrong type"),
    (set_at("stages", value=[]), "end at layer 0"),
    (set_at("stages", value=[[0, 1], [1, 2]]), "the model has 1 layers"),
    (set_at("parts", 0, "header_size", value=4225), "from 8 to 4224"),
    (set_at("parts", 0, "ranks", value=[0, 3]), "within 2"),
    (set_at("parts", 0, "ranks", value=[1, 0]), "within 2"),
    (set_at("parts", 0, "layers", value=[0, 2]), "within 1"),
    (set_at("parts", 0, "path", value="CONFIG.json"), "the same path"),
    (set_at("probe", value=probe_of(2)), "of 2 layers, the model has 1"),
]


@pytest.mark.parametrize(("edit", "message"), REFUSED_BY_BOTH)
def test_schema_and_reader_refuse(
    fields: dict[str, Any], edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(fields)
    assert not VALIDATOR.is_valid(fields)
    with pytest.raises(ManifestError, match=message):
        parsed(fields)


@pytest.mark.parametrize(("edit", "message"), REFUSED_BY_THE_READER)
def test_the_reader_refuses_what_no_schema_can_see(
    fields: dict[str, Any], edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(fields)
    assert VALIDATOR.is_valid(fields)
    with pytest.raises(ManifestError, match=message):
        parsed(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.replace(b'"layers": 1', b'"layers": 1, "layers": 1'), "stands twice"),
        (lambda raw: raw.replace(b'"layers": 1', b'"layers": NaN'), "NaN is not JSON"),
        (lambda raw: raw.replace(b'"layers": 1', b'"layers": 1,'), "not JSON"),
        (lambda raw: raw.replace(b"smallest", b"\xff"), "not UTF-8 at byte"),
        (lambda raw: raw[:-3], "not JSON"),
        (lambda raw: b"[" * 100_000, "nested too deeply"),
        (lambda raw: b"[]", "must be an object"),
        (lambda raw: b"", "not JSON"),
    ],
)
def test_the_reader_refuses_what_is_no_strict_json(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        parse_manifest(change(example("manifest").encode()))


# ---------------------------------------------------------------------------------------------------- the page


def test_the_example_is_the_manifest_that_split_writes(tmp_path: Path) -> None:
    VALIDATOR.validate(json.loads(example("manifest")))
    written = (split_again("smallest", tmp_path) / "shardprep.json").read_text("utf-8")
    version = re.compile(r'"tool": "shardprep [^"]+"')
    assert version.sub("", example("manifest")) == version.sub("", written)


def test_the_example_header_is_that_of_the_second_part(tmp_path: Path) -> None:
    part = parse_manifest(example("manifest").encode()).parts[1]
    text = json.dumps(json.loads(example("header")), separators=(",", ":")).encode()
    padded = text.ljust(-(8 + len(text)) % PAGE + len(text))
    raw = len(padded).to_bytes(8, "little") + padded
    assert (len(raw), manifests.digest_of(raw)) == (part.header_size, part.digest)
    assert (split_again("smallest", tmp_path) / part.path).read_bytes()[: len(raw)] == raw
    metadata = parse_header(raw, part.size, where="the example").metadata
    assert json.loads(metadata["shardprep"]) == json.loads(example("shardprep"))
    assert json.loads(metadata["DCP_SHARDING_INFO"]) == json.loads(example("DCP_SHARDING_INFO"))


def test_the_page_names_every_key_dtype_and_placement() -> None:
    page = PAGE_OF_THE_FORMAT.read_text("utf-8")
    keys: set[str] = set()

    def collect(schema: Any) -> None:
        if isinstance(schema, dict):
            keys.update(schema.get("properties", {}))
            for inner in schema.values():
                collect(inner)
        elif isinstance(schema, list):
            for inner in schema:
                collect(inner)

    collect(SCHEMA)
    missing = [
        word for word in (*sorted(keys), *dtypes.BITS, *manifests.PLACEMENTS) if f"`{word}`" not in page
    ]
    assert not missing


def test_every_json_block_of_the_pages_is_json() -> None:
    for page in (PAGE_OF_THE_FORMAT, ROOT / "docs/layouts.md"):
        blocks = re.findall(r"```json\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        assert blocks
        for block in blocks:
            json.loads(block)


def test_the_page_on_model_types_has_a_row_for_each() -> None:
    page = (ROOT / "docs/architectures.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-zA-Z0-9_-]+)(?: \(small\))?` \|", page, re.MULTILINE)
    assert sorted(rows) == known_types()


# ---------------------------------------------------------------------------------------------------- for ever


def worker_holds(shard: shardprep_runtime.Shard) -> dict[str, str]:
    found = {}
    for name in shard:
        form, shape = shard.describe(name).form, shard.describe(name).shape
        digest = hashlib.sha256(shard.memory(name)).hexdigest()
        found[name] = f"{form.dtype} {'x'.join(map(str, shape))} {digest}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FROZEN)
def test_every_worker_of_a_frozen_shard_set_gets_its_bytes(name: str) -> None:
    recorded = json.loads((DATA / f"{name}.shards.json").read_text("utf-8"))
    workers = 0
    for grid in recorded["stages"]:
        for pp_rank, names in enumerate(grid["names"]):
            for own in recorded["ranks"]:
                shard = open_set(DATA / name).load(
                    Place(
                        rank=pp_rank * own["tensor_parallel_size"] + own["tp_rank"],
                        tensor_parallel_size=own["tensor_parallel_size"],
                        pipeline_parallel_size=grid["pipeline_parallel_size"],
                        expert_parallel_size=own["expert_parallel_size"],
                        stages=grid["stages"],
                        engine=own["engine"],
                    )
                )
                with shard:
                    found = worker_holds(shard)
                assert found == {n: text for n, text in own["tensors"].items() if n in names}
                workers += 1
    sizes = {own["tensor_parallel_size"] for own in recorded["ranks"]}
    assert sizes == {n for n in range(1, 5) if MODELS[name].tensor_parallel_size % n == 0}
    assert workers == sum(len(grid["names"]) for grid in recorded["stages"]) * len(recorded["ranks"])


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_recorded_of_a_frozen_set_is_what_engines_cut(name: str) -> None:
    recorded = json.loads((DATA / f"{name}.shards.json").read_text("utf-8"))
    assert recorded == json.loads(json.dumps(frozen_models.shards(name)))


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_shard_set_is_sound_and_gives_its_checkpoint_back(name: str, tmp_path: Path) -> None:
    verify(DATA / name)
    export(DATA / name, tmp_path / "back")
    raw = (tmp_path / "back/model.safetensors").read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    tensors = parse_header(raw[:length], len(raw), where="back").tensors
    model = MODELS[name]
    assert {n: span.shape for n, span in tensors.items()} == model.shapes
    for tensor, span in tensors.items():
        expected = frozen_models.tensor_bytes(tensor, model.dtype, span.shape)
        assert raw[span.start : span.stop] == expected, tensor


def test_a_set_that_knows_of_no_engines_and_experts_refuses_whoever_asks_for_them() -> None:
    with pytest.raises(LayoutError, match=r"how vllm cuts; it serves torch; split the checkpoint again"):
        open_set(DATA / "llama-tied-kv2-tp4").load(Place(engine="vllm"))
    with pytest.raises(LayoutError, match=r"knows of no experts; .* split it again"):
        open_set(DATA / "llama-tied-kv2-tp4").load(Place(tensor_parallel_size=2, expert_parallel_size=2))


def test_a_frozen_shard_set_refuses_what_its_grain_does_not_hold() -> None:
    with pytest.raises(LayoutError, match="cannot be viewed at tensor parallel size 8; it serves 1, 2, 4"):
        shardprep_runtime.load(DATA / "llama-tied-kv2-tp4", tensor_parallel_size=8)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_splitting_again_gives_the_example_and_the_very_parts(path: Path, tmp_path: Path) -> None:
    written = split_again(path.stem, tmp_path)
    assert without_tool((written / "shardprep.json").read_text("utf-8")) == without_tool(
        path.read_text("utf-8")
    )
    if path.stem in FROZEN:
        frozen = DATA / path.stem
        if path.stem not in FIRST:
            assert (frozen / "shardprep.json").read_bytes() == path.read_bytes()
        names = sorted(each.name for each in frozen.iterdir())
        assert names == sorted(each.name for each in written.iterdir())
        for name in names:
            if name != "shardprep.json":
                assert (written / name).read_bytes() == (frozen / name).read_bytes(), name
