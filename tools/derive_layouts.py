"""Infer the layout rules of every model type from golden plans, and write them as shardprep/layout/architectures.json.

    python tools/derive_layouts.py [--into FILE] [MODEL_TYPE...]

What transformers' and vLLM's own loaders read (tests/golden, made by trace_transformers.py and trace_vllm.py) says
along which dim, in which segments each tensor is cut. Which config keys count the units (heads, KV heads) is found by
building the model at several sizes, without memory, and comparing shapes. Where a tensor belongs (before the layers,
behind them) is seen in a forward pass of a small model. What none of this tells stands in overrides.json.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import golden
from shardprep.layout.expressions import evaluate
from shardprep.layout.rules import normalize
from shardprep.model import shrink, skeleton
from shardprep_runtime.errors import ShardprepError
from shardprep_runtime.format.cut import chunk

LAYOUT = Path(__file__).parents[1] / "shardprep" / "layout"
PLANS = ("tp2", "tp4")
"""What rules are inferred from; tp8, where transformers cuts KV heads in half, is left to the tests."""

VARIANTS = (
    shrink.Sizes(),
    shrink.Sizes(heads=16),
    shrink.Sizes(heads=16, head_dim=16),
    shrink.Sizes(kv_heads=2),
    shrink.Sizes(heads=16, kv_heads=8, head_dim=16),
    shrink.Sizes(head_dim=64),
    shrink.Sizes(intermediate=448, expert=192, experts=16),
)


APART = ("heads", "kv_heads", "head_dim", "intermediate", "expert")


@dataclass(frozen=True, slots=True)
class Run:
    """A run [start, stop) of a dim, and how many units it has at most by what the plans show (0: any number)."""

    start: int
    stop: int
    units: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """How one engine cuts a tensor: whole (`dim` None), or along `dim` in runs; `multiple` where it pads first."""

    dim: int | None = None
    runs: tuple[Run, ...] = ()
    multiple: int = 1


WHOLE = Cut()


class UnclearError(Exception):
    """A plan that no rule of ours describes."""


# ------------------------------------------------------------------------------------------------------------- plans


def infer(shape: tuple[int, ...], rows: Mapping[str, list[list[golden.Block]]]) -> Cut:
    """The cut that explains what the ranks read in each plan. Raises UnclearError."""
    whole = [[0, size] for size in shape]
    found: list[Cut] = []
    for ranks in rows.values():
        if all(blocks == [whole] for blocks in ranks):
            found.append(WHOLE)
            continue
        dims = {
            dim
            for blocks in ranks
            for block in blocks
            for dim, bounds in enumerate(block)
            if bounds != whole[dim]
        }
        if len(dims) != 1:
            raise UnclearError(f"cut along dims {sorted(dims)}")
        (dim,) = dims
        found.append(Cut(dim, *_runs(shape[dim], [[tuple(b[dim]) for b in blocks] for blocks in ranks])))
    first = found[0]
    for other in found[1:]:
        if other.dim != first.dim or other.multiple != first.multiple:
            raise UnclearError(f"tensor parallel sizes disagree: {found}")
        if [(r.start, r.stop) for r in other.runs] != [(r.start, r.stop) for r in first.runs]:
            raise UnclearError(f"tensor parallel sizes disagree: {found}")
    return Cut(
        first.dim,
        tuple(
            Run(each[0].start, each[0].stop, min((r.units for r in each if r.units), default=0))
            for each in zip(*(cut.runs for cut in found), strict=True)
        ),
        first.multiple,
    )


def _runs(size: int, ranks: Sequence[Sequence[tuple[int, ...]]]) -> tuple[tuple[Run, ...], int]:
    for multiple in (1, 64):
        chunks = [chunk(size, len(ranks), rank, multiple=multiple) for rank in range(len(ranks))]
        if [list(r) for r in ranks] == [[c] if c[0] < c[1] else [] for c in chunks]:
            even = size % len(ranks) == 0
            return (Run(0, size),), 1 if even else multiple
    edges = sorted({edge for rank in ranks for bounds in rank for edge in bounds})
    parts: list[tuple[int, int, tuple[int, ...]]] = []
    for start, stop in itertools.pairwise(edges):
        owners = tuple(i for i, rank in enumerate(ranks) if any(a <= start and stop <= b for a, b in rank))
        if parts and parts[-1][2] == owners:
            parts[-1] = (parts[-1][0], stop, owners)
        else:
            parts.append((start, stop, owners))
    if parts[0][0] != 0 or parts[-1][1] != size or any(not owners for *_, owners in parts):
        raise UnclearError("parts that no rank reads")
    groups: list[list[tuple[int, int, tuple[int, ...]]]] = []
    for part in parts:
        if groups and part[2][0] > groups[-1][-1][2][-1]:
            groups[-1].append(part)
        else:
            groups.append([part])
    runs = []
    for group in groups:
        readers = [rank for part in group for rank in part[2]]
        widths = {part[1] - part[0] for part in group}
        if (
            readers != list(range(len(ranks)))
            or len(widths) != 1
            or len({len(part[2]) for part in group}) != 1
        ):
            raise UnclearError(f"uneven shares {group}")
        runs.append(Run(group[0][0], group[-1][1], len(group) if len(group) < len(ranks) else 0))
    return tuple(runs), 1


# ------------------------------------------------------------------------------------------------------------- units


@dataclass(frozen=True, slots=True)
class Unit:
    """What counts the units of a run: an expression over the config, and the run's size."""

    indices: str
    units: str
    shared: bool


@dataclass
class Model:
    """One model type: its config and shapes at several sizes."""

    model_type: str
    configs: list[dict[str, Any]]
    shapes: list[skeleton.Shapes]
    values: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def candidates(self) -> Iterator[Unit]:
        """Ways to count heads, the likeliest first."""
        keys = self.values[0]
        heads = [k for k in keys if shrink.name_of(k) == "heads"]
        kv = [k for k in keys if shrink.name_of(k) == "kv_heads"]
        hidden = [k for k in keys if shrink.name_of(k) == "hidden"]
        dims = [k for k in keys if shrink.is_head_dim(k)]
        equal = [f"{h} / {n}" for h in hidden for n in heads]

        def width(key: str) -> str:
            return (
                f"({key} | {equal[0]})"
                if key == "head_dim" and equal and self.default_of(key) is None
                else key
            )

        sums = [f"({a} + {b})" for a, b in itertools.combinations(dims, 2)]
        widths = [width(d) for d in dims] + ([] if "head_dim" in dims else equal) + sums
        for unit, shared in [(k, False) for k in heads] + [(k, True) for k in kv]:
            counts = f"({unit} | {heads[0]})" if shared and heads and self.default_of(unit) is None else unit
            for each, times in itertools.product(widths, ("", "2 * ", "3 * ")):
                all_of_it = each.removesuffix(f" / {unit}") if each in equal else None
                yield Unit(
                    f"{times}{all_of_it if all_of_it in hidden else f'{counts} * {each}'}", counts, shared
                )
        for unit in heads:  # as wide as the model, whatever the heads are
            yield from (Unit(each, unit, False) for each in hidden)
        for unit in heads:  # a value per head
            yield Unit(unit, unit, False)
        for unit in kv:
            yield Unit(unit, unit, True)

    def default_of(self, key: str) -> Any:
        """What the config class takes for a key that a config.json lacks, where it is a plain number."""
        kind = transformers.CONFIG_MAPPING[self.model_type]
        found = getattr(kind, key, None)
        return found if type(found) is int else None

    def sizes(self, unit: Unit) -> list[int] | None:
        try:
            return [evaluate(unit.indices, values) for values in self.values]
        except (ShardprepError, ZeroDivisionError):
            return None


def expand(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that expressions may name."""
    return {k: v for k, v in config.items() if v is not None}


def find_unit(model: Model, totals: list[int], known: dict[str, Unit]) -> Unit | None:
    """What counts the units of a dim that has these sizes in the variants."""
    for unit in itertools.chain(known.values(), model.candidates()):
        if model.sizes(unit) == totals:
            return unit
    return None


def find_segments(
    model: Model, runs: Sequence[Run], totals: list[int], known: dict[str, Unit]
) -> list[Unit] | None:
    """Units for each of several runs, whose sizes add up to the dim in every variant."""
    pool = [*known.values(), *model.candidates()]
    sized = {unit: sizes for unit in pool if (sizes := model.sizes(unit)) is not None}
    options = [
        [
            (unit, sizes)
            for unit, sizes in sized.items()
            if sizes[0] == run.stop - run.start and all(a <= b for a, b in zip(sizes, totals, strict=True))
        ]
        for run in runs
    ]
    for choice in itertools.islice(itertools.product(*options), 400_000):
        if all(sum(column) == total for *column, total in zip(*(s for _, s in choice), totals, strict=True)):
            return [unit for unit, _ in choice]
    return None


# --------------------------------------------------------------------------------------------------------- placement


def find_places(config: Mapping[str, Any], shapes: skeleton.Shapes) -> dict[str, str]:
    """Tensor outside the layers -> "first" or "last", as a forward pass of a small model meets its module."""
    outside = [name for name in shapes if normalize(name)[1] is None]
    found: dict[str, str] = {}
    try:
        model = skeleton.build(config)
        order: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        with torch.no_grad():
            model(input_ids=torch.arange(4, 12)[None], use_cache=False)
    except Exception as error:  # noqa: BLE001 - whatever a model of theirs may raise
        print(
            f"  {config['model_type']}: no forward pass: {type(error).__name__}: {error}"[:200],
            file=sys.stderr,
        )
        for name in outside:
            if re.search(r"embed|wte|wpe", name):
                found[name] = "first"
            elif re.search(r"lm_head|ln_f|(^|\.)(final_)?(layer_?)?norm(_f)?\.", name):
                found[name] = "last"
        return found
    inside = [i for i, name in enumerate(order) if normalize(f"{name}.weight")[1] is not None]
    for name in outside:
        module = name.rpartition(".")[0]
        at = [i for i, each in enumerate(order) if each == module or (module.endswith(f".{each}") and each)]
        if at and inside:
            first, last = at[0] < inside[0], at[-1] > inside[-1]
            if first != last:
                found[name] = "first" if first else "last"
    return found


# ------------------------------------------------------------------------------------------------------------- rules


def derive(model_type: str, plans: Mapping[str, golden.Golden], say: Any) -> dict[str, Any]:
    """The rules of one model type."""
    grouped = next(iter(plans.values())).config
    configs, shapes = [dict(grouped)], [skeleton.shapes_of(grouped)]
    for sizes in VARIANTS[1:]:
        first, *_ = golden.small_configs(model_type, sizes)
        with contextlib.suppress(ShardprepError):
            shapes.append(skeleton.shapes_of(first))
            configs.append(first)
    # one size at a time, so that two that happen to be equal are told apart
    for key, value in grouped.items():
        if type(value) is int and value > 1 and (shrink.name_of(key) in APART or shrink.is_head_dim(key)):
            with contextlib.suppress(ShardprepError):
                doubled = {**grouped, key: 2 * value}
                shapes.append(skeleton.shapes_of(doubled))
                configs.append(doubled)
    names = set(shapes[0])
    usable = [
        i
        for i, each in enumerate(shapes)
        if {normalize(n)[0] for n in each} == {normalize(n)[0] for n in names}
    ]
    model = Model(model_type, [configs[i] for i in usable], [shapes[i] for i in usable])
    model.values = [expand(config) for config in model.configs]
    model.places = find_places(model.configs[0], model.shapes[0])
    layers = 1 + max((layer for name in names if (layer := normalize(name)[1]) is not None), default=-1)
    rules: dict[str, Any] = {
        "layers": find_layers(model, layers),
        "tied": bool(model.configs[0].get("tie_word_embeddings", False)),
        "sizes": {},
        "tensors": {},
        "engines": {engine: {} for engine in plans},
    }
    experts = next((k for k in model.values[0] if shrink.name_of(k) == "experts"), None)
    known: dict[str, Unit] = {}
    patterns: dict[str, list[str]] = {}
    for name in sorted(names):
        patterns.setdefault(normalize(name)[0], []).append(name)
    for pattern, members in patterns.items():
        place = "" if normalize(members[0])[1] is not None else model.places.get(members[0], "every") + " "
        cuts = {}
        for engine, plan in plans.items():
            try:
                cuts[engine] = one_cut(plan, members, say)
            except UnclearError as error:
                say(f"{engine}: {pattern}: {error}; whole")
                cuts[engine] = WHOLE
        stored = next(
            (cuts[e] for e in ("vllm", "transformers") if e in cuts and cuts[e].dim is not None), WHOLE
        )
        texts = {}
        for engine, cut in {"": stored, **cuts}.items():
            texts[engine] = describe(model, pattern, members, cut, known, say)
        if texts[""].startswith("?"):
            say(f"{pattern}: {texts['']}; whole")
            texts = dict.fromkeys(texts, "whole")
        fused = experts is not None and "{expert}" not in pattern and is_fused(model, members, experts, plans)
        rules["tensors"][pattern] = place + ("experts " if fused else "") + texts[""]
        for engine in plans:
            if texts[engine] != texts[""] and texts[engine] != "vocabulary":
                if cuts[engine].dim not in (None, stored.dim):
                    say(f"{engine}: {pattern}: cut along dim {cuts[engine].dim}, stored along {stored.dim}")
                    texts[engine] = "whole"
                if texts[engine].startswith("?"):
                    along = texts[""].split()[0]
                    texts[engine] = f"{along} any" if len(cuts[engine].runs) == 1 else "whole"
                    if len(cuts[engine].runs) > 1:
                        say(f"{engine}: {pattern}: asks for {cuts[engine]}, gets all")
                rules["engines"][engine][pattern] = texts[engine]
    pair = tied_pair(model)
    if pair and pair[0] not in rules["tensors"] and pair[1] in rules["tensors"]:
        rules["tensors"][pair[0]] = "last " + rules["tensors"][pair[1]].removeprefix("first ").removeprefix(
            "every "
        )
    for pattern, (rule, like) in switch_rules(model, rules["tensors"]).items():
        rules["tensors"][pattern] = rule
        for asked in rules["engines"].values():
            if like in asked:
                asked[pattern] = asked[like]
    if experts and any("expert" in rule or "{expert}" in p for p, rule in rules["tensors"].items()):
        rules["experts"] = experts
    used = {
        word
        for rule in [*rules["tensors"].values(), *(r for e in rules["engines"].values() for r in e.values())]
        for word in rule.replace("|", " ").split()
    }
    rules["sizes"] = {
        n: [u.indices, u.units, *(["shared"] if u.shared else [])] for n, u in known.items() if n in used
    }
    if reads_head_dim(model_type) and not any("head_dim" in size[0] for size in rules["sizes"].values()):
        rules["sizes"] = {
            n: [with_head_dim(indices), *more] for n, (indices, *more) in rules["sizes"].items()
        }
    defaults = {}
    for text in itertools.chain.from_iterable(each[:2] for each in rules["sizes"].values()):
        for word in text.replace("(", " ").replace(")", " ").split():
            if word.isidentifier() and model.default_of(word) is not None:
                defaults[word] = model.default_of(word)
    for counted in (rules["layers"], rules.get("experts")):
        if counted and model.default_of(counted) is not None:
            defaults[counted] = model.default_of(counted)
    rules["defaults"] = defaults
    rules["also"] = other_names(model_type, rules)
    rules["engines"] = {engine: each for engine, each in rules["engines"].items() if each}
    rules["known_by"] = sorted(plans)
    rules["base"] = base_prefix(model_type)
    rules["tied_pair"] = pair
    return rules


def other_names(model_type: str, rules: Mapping[str, Any]) -> dict[str, str]:
    """Config keys that the rules use -> the name by which a config.json may say them too (attribute_map)."""
    used = " ".join(
        [
            rules["layers"],
            rules.get("experts", ""),
            *(t for size in rules["sizes"].values() for t in size[:2]),
        ]
    )
    words = set(re.findall(r"\w+", used))
    names = getattr(transformers.CONFIG_MAPPING[model_type], "attribute_map", None) or {}
    return {own: other for other, own in names.items() if own in words}


def reads_head_dim(model_type: str) -> bool:
    """Whether a model looks for a head_dim in its config though its config class has none (GLM-4.5 has one)."""
    source = inspect.getsource(sys.modules[skeleton.class_of(model_type).__module__])
    return re.search(r"""getattr\(\s*config,\s*["']head_dim["']|config\.head_dim""", source) is not None


def with_head_dim(indices: str) -> str:
    """An expression of heads as wide as the model allows, for configs that may say how wide they are."""
    width = "(head_dim | hidden_size / num_attention_heads)"
    if indices.endswith(" * hidden_size / num_attention_heads"):
        return indices.removesuffix("hidden_size / num_attention_heads") + width
    return re.sub(r"^(3 \* )?hidden_size$", rf"\g<1>num_attention_heads * {width}", indices)


def base_prefix(model_type: str) -> str:
    kind = skeleton.class_of(model_type)
    prefix = getattr(kind, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


def tied_pair(model: Model) -> list[str] | None:
    """(head, embedding) that tie_word_embeddings makes one tensor."""
    kind = skeleton.class_of(model.model_type)
    keys = getattr(kind, "_tied_weights_keys", None)
    if isinstance(keys, Mapping):
        for head, embedding in keys.items():
            if head.endswith(".weight"):
                return [head, embedding]
    return None


def find_layers(model: Model, layers: int) -> str:
    for key, value in model.values[0].items():
        if shrink.name_of(key) == "layers" and value == layers:
            return key
    for key in shrink.KINDS:
        if isinstance(model.values[0].get(key), list) and len(model.values[0][key]) == layers:
            return f"len({key})"
    raise ShardprepError(f"no config key says that there are {layers} layers")


def switched(base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The config with each of its switches thrown: other models of the type have biases, dense layers, no low rank."""
    for key, value in base.items():
        if type(value) is bool:
            yield dict(base) | {key: not value}
        for other in SWITCHES.get(key, ()):
            yield dict(base) | {key: other}
    kinds = base.get("mlp_layer_types")
    if isinstance(kinds, list):
        yield dict(base) | {"mlp_layer_types": ["dense", *kinds[1:]]}
        yield dict(base) | {"mlp_layer_types": ["sparse"] * len(kinds)}


SWITCHES: Mapping[str, Sequence[Any]] = {
    "q_lora_rank": (None,),
    "first_k_dense_replace": (0, 1),
    "num_dense_layers": (0, 1),
    "mlp_only_layers": ([], [0]),
    "n_shared_experts": (1,),
    "num_shared_experts": (1,),
    "moe_num_shared_experts": (1,),
    "shared_expert_intermediate_size": (64,),
    "shared_intermediate_size": (64,),
    "interleave_moe_layer_step": (2,),
    "moe_layer_start_index": (0, 1),
}
"""Keys whose other values give a model of the same type other tensors."""


def switch_rules(model: Model, tensors: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Pattern -> (rule, the pattern it is like) of tensors that the default config lacks and another choice has.

    A bias is cut as the rows of its weight are, an MLP as the MLPs that are known, an undivided query projection as
    the second half of a divided one. Anything else that is new is kept whole, which is always right.
    """
    found: dict[str, tuple[str, str]] = {}
    for config in switched(model.configs[0]):
        try:
            more = skeleton.shapes_of(config)
        except ShardprepError:
            continue
        for name, (_, shape) in more.items():
            pattern, layer, _ = normalize(name)
            if pattern in tensors or pattern in found:
                continue
            known = {**tensors, **{each: rule for each, (rule, _) in found.items()}}
            stem, _, kind = pattern.rpartition(".")
            weight = f"{stem}.weight"
            of = more.get(name.removesuffix(".bias") + ".weight")
            siblings = {
                other: bare(rule)
                for other, rule in known.items()
                if other.split(".")[-2:] == pattern.split(".")[-2:] and "{layer}" in other
            }
            like = ""
            if kind == "bias" and bare(known.get(weight, "")).startswith(("rows", "vocab")) and of:
                like = weight if of[1][0] == shape[0] else ""
            elif (
                kind == "weight"
                and len(shape) == 2
                and set(siblings.values()) in ({"rows any"}, {"columns any"})
            ):
                like = min(siblings)
            elif stem.endswith(".q_proj") and kind == "weight":
                like = f"{stem.removesuffix('q_proj')}q_b_proj.weight"
            place = "" if layer is not None else "last " if pattern.startswith("lm_head") else "every "
            found[pattern] = place + bare(known.get(like, "whole")), like
    return found


def bare(rule: str) -> str:
    """A rule without its placement."""
    return rule.removeprefix("first ").removeprefix("last ").removeprefix("every ")


def one_cut(plan: golden.Golden, members: Sequence[str], say: Any) -> Cut:
    """The cut of a pattern's tensors, which all layers and experts must agree on."""
    found: dict[Cut, str] = {}
    for name in members:
        if name in plan.shapes:
            rows = {tp: plan.reads[tp][name] for tp in PLANS if tp in plan.reads}
            found.setdefault(infer(plan.shapes[name][1], rows), name)
    if len({(c.dim, len(c.runs)) for c in found}) > 1:
        raise UnclearError(f"layers disagree: {found}")
    return next(iter(found), WHOLE)


def describe(
    model: Model, pattern: str, members: Sequence[str], cut: Cut, known: dict[str, Unit], say: Any
) -> str:
    """The rule of a cut as architectures.json says it; it begins with ? where the units of heads were not found."""
    if cut.dim is None:
        return "whole"
    kinds = {model.shapes[0][name][1]: name for name in reversed(members) if name in model.shapes[0]}
    texts = list(dict.fromkeys(describe_one(model, pattern, name, cut, known) for name in kinds.values()))
    if len(texts) == 1:
        return texts[0]
    bad = next((text for text in texts if text.startswith("?")), None)
    words = [text.split() for text in texts]
    if bad or len({len(each) for each in words}) > 1:
        return bad or f"?layers disagree: {texts}"
    return " ".join("|".join(dict.fromkeys(column)) for column in zip(*words, strict=True))


def describe_one(model: Model, pattern: str, name: str, cut: Cut, known: dict[str, Unit]) -> str:
    """The same, of the tensors that have the shape of `name`."""
    assert cut.dim is not None
    shape = model.shapes[0][name][1]
    dim = cut.dim
    along = "rows" if dim == 0 else "columns" if dim == len(shape) - 1 else f"dim{dim}"
    if cut.multiple > 1 or (len(cut.runs) == 1 and shape[dim] == shrink.VOCABULARY):
        return "vocabulary" if dim == 0 else "?vocabulary along another dim"
    if not attends(pattern):
        if any(run.units for run in cut.runs):
            return f"?shared units outside attention: {cut}"
        widths = {run.stop - run.start for run in cut.runs}
        if len(widths) > 1:
            return f"?unequal segments {cut}"
        return f"{along} " + " + ".join(["any"] * len(cut.runs))
    totals = [s[name][1][dim] if name in s else -1 for s in model.shapes]
    if len(cut.runs) == 1:
        unit = find_unit(model, totals, known)
        units = None if unit is None else [unit]
    else:
        units = find_segments(model, cut.runs, totals, known)
    if units is None and not any(shrink.name_of(key) == "heads" for key in model.values[0]):
        return f"{along} " + " + ".join(["any"] * len(cut.runs))  # channels, not heads
    if units is None:
        return f"?no unit for {shape} {cut}: sizes {totals}"
    return f"{along} " + " + ".join(name_unit(unit, pattern, known) for unit in units)


def attends(pattern: str) -> bool:
    """Whether heads matter to a tensor, by its name."""
    words = pattern.lower()
    return any(
        w in words
        for w in ("attn", "attention", "mixer", "mamba", "query_key_value", "qkv", "temporal_block", "delta")
    ) and not (".mlp." in words or "experts" in words or "shared_expert" in words)


def name_unit(unit: Unit, pattern: str, known: dict[str, Unit]) -> str:
    """The name of a unit among the sizes of its type: heads, kv_heads, or whose heads."""
    for name, other in known.items():
        if other == unit:
            return name
    base = "kv_heads" if unit.shared else "heads"
    module = pattern.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    name = next(
        t
        for t in (base, f"{module}_{base}", *(f"{module}_{base}_{n}" for n in range(2, 9)))
        if t not in known
    )
    known[name] = unit
    return name


def is_fused(model: Model, members: Sequence[str], experts: str, plans: Mapping[str, golden.Golden]) -> bool:
    """Whether dim 0 of these tensors counts experts: it does so in every variant, and the ranks share it."""
    name = members[0]
    if not re.search("expert|moe", name.lower()) or any(
        name not in s or not s[name][1] for s in model.shapes
    ):
        return False
    if [s[name][1][0] for s in model.shapes] != [v[experts] for v in model.values]:
        return False
    for plan in plans.values():
        row = plan.reads.get("tp4ep4", {}).get(name)
        if row is not None and all(blocks and blocks[0][0] != [0, plan.shapes[name][1][0]] for blocks in row):
            return True
    return False


# ------------------------------------------------------------------------------------------------------------- files


def lines(types: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The JSON of all rules, one tensor a line."""
    texts = []
    for name, rules in types.items():
        own = []
        for key, value in rules.items():
            if key in ("tensors", "sizes") and value:
                inner = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                own.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}")
            elif key == "engines" and value:
                blocks = []
                for engine, asked in value.items():
                    inner = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in asked.items())
                    blocks.append(f"   {json.dumps(engine)}: {{\n{inner}\n   }}")
                own.append('  "engines": {\n' + ",\n".join(blocks) + "\n  }")
            else:
                own.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        texts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(own) + "\n }")
    yield "{\n" + ",\n".join(texts) + "\n}"


@skeleton.quiet()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=LAYOUT / "architectures.json")
    parser.add_argument("model_types", nargs="*", help="derive these anew and keep the others")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    plans: dict[str, dict[str, golden.Golden]] = {}
    for engine in ("transformers", "vllm"):
        for path in sorted((golden.FOLDER / engine).glob("*.json")):
            if not given.model_types or path.stem in given.model_types:
                plans.setdefault(path.stem, {})[engine] = golden.read_all(path)
    types = json.loads(given.into.read_text("utf-8")) if given.model_types and given.into.exists() else {}
    for model_type, own in sorted(plans.items()):
        if model_type in golden.LEFT_OUT:
            continue

        def say(text: str, model_type: str = model_type) -> None:
            print(f"  {model_type}: {text}"[:400], file=sys.stderr)

        try:
            types[model_type] = derive(model_type, own, say)
        except (ShardprepError, UnclearError) as error:
            print(f"{model_type}: left out: {error}"[:300], file=sys.stderr)
    given.into.write_text("\n".join(lines(dict(sorted(types.items())))) + "\n")
    print(f"{len(types)} model types")
    return 0


if __name__ == "__main__":
    sys.exit(main())
