"""A model that runs one layer at a time is the model, and what is measured of a quantized one is what it lost."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazily import save_file, torch
from quantized_models import one_thread, quantized_tensors, read_tensors, write_quantized
from shardprep.index import Index
from shardprep.layout.pad import pad_to
from shardprep.layout.quantization import Scheme
from shardprep.model import skeleton
from shardprep.quantize.packing import dequantized
from shardprep.quantize.quality import Quality, measure
from shardprep.quantize.walk import Walk, check_kind, walk
from shardprep.source import open_source, read_checkpoint
from shardprep_runtime.errors import FormatError, InputError, IntegrityError, UnsupportedError
from small_models import llama_config, llama_shapes, random_tensors, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("transformers, too"),
]  # one process that has imported transformers

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
CONTEXT = 256

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 70, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHOUT_HEAD_DIM = {key: value for key, value in SMALL.items() if key != "head_dim"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "llama, tied": {**SMALL, "tie_word_embeddings": True},
    "qwen2": WITHOUT_HEAD_DIM,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**SMALL, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SMALL, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {**WITHOUT_HEAD_DIM, "sliding_window": 6},
    "gpt2": {"vocab_size": 70, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "deepseek_v3": {
        **WITHOUT_HEAD_DIM, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
}  # fmt: skip

WALKED = (
    "mistral", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma4_text", "gpt_neox", "gpt_oss", "glm4", "glm4_moe",
    "olmo2", "granite", "granitemoe", "starcoder2", "cohere", "falcon", "opt", "bloom", "mpt", "llama4_text",
    "qwen3_next", "exaone4", "minimax", "jamba", "nemotron", "deepseek_v2", "deepseek_v4", "hunyuan_v1_dense", "mamba2", "falcon_h1",
    "nemotron_h", "phimoe", "dbrx", "smollm3", "cohere2", "olmoe", "ernie4_5_moe", "bamba",
)  # fmt: skip
"""Model types, of their default configs made small."""

CHANGED: dict[str, dict[str, Any]] = {
    "nemotron": {"num_key_value_heads": 8},
    "deepseek_v2": {
        "head_dim": None, "num_experts_per_tok": 6, "n_routed_experts": 64, "n_shared_experts": 2, "n_group": 1,
        "topk_group": 1,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def index_of() -> Iterator[Callable[[Path | str], Index]]:
    with ExitStack() as stack:
        yield lambda place: read_checkpoint(stack.enter_context(open_source(place)))


@pytest.fixture(scope="module")
def heldout() -> list[list[int]]:
    """The held-out text in the contexts of which tiny-llama's README speaks."""
    from tokenizers import Tokenizer

    text = (TINY / "heldout.txt").read_text()
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
    return [ids[i : i + CONTEXT + 1] for i in range(0, len(ids) - 1, CONTEXT)]


def save(model_type: str, config: Mapping[str, Any], folder: Path) -> Any:
    """A small random model, saved as transformers saves it, and as transformers loads it."""
    from transformers import AutoModelForCausalLM

    skeleton.build({"model_type": model_type, **config}).save_pretrained(folder)
    return load(folder, AutoModelForCausalLM)


def load(folder: Path, auto: Any) -> Any:
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def tokens(vocabulary: int, shape: tuple[int, int] = (2, 12)) -> torch.Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def write_llama(folder: Path, *, layers: int = 4, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Llama whose weights are of a size that real ones have, so that it computes with them."""
    config = llama_config(
        **{"layers": layers, "heads": 4, "head_dim": 16, "intermediate": 128, "vocab": 72, **sizes}
    )
    tensors = random_tensors(llama_shapes(config), dtype=torch.float32)
    scaled = {
        name: (1 + 0.1 * each if each.ndim == 1 else 0.1 * each).to(dtype) for name, each in tensors.items()
    }
    return write_checkpoint(folder, scaled, config, kind="safetensors")


def sequences_of(count: int = 3, length: int = 13) -> list[list[int]]:
    return tokens(70, (count, length)).tolist()


def change(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    tensors = read_tensors(source)
    edit(tensors)
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -------------------------------------------------------------------------------- one layer at a time is the model


@pytest.mark.parametrize("case", MODELS)
def test_a_walked_model_gives_the_logits_of_the_whole_bit_for_bit(
    case: str, tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    model_type = case.partition(",")[0]
    model = save(model_type, MODELS[case], tmp_path)
    ids = tokens(model.config.vocab_size)
    with torch.no_grad():
        assert torch.equal(walk(index_of(tmp_path), ids), model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WALKED)
def test_most_kinds_of_models_can_be_walked(
    model_type: str, tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    changed = CHANGED.get(model_type, {})
    config = {**skeleton.default_config(model_type), **changed}
    small = skeleton.shrink({key: config[key] for key in config if changed.get(key, "") is not None})
    model = save(model_type, small, tmp_path)
    ids = tokens(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        assert torch.equal(walk(index_of(tmp_path), ids), model(ids, use_cache=False).logits)


def test_layers_that_need_more_than_hidden_states_are_found_out() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"glm_moe_dsa: layer 1 needs more of the layers.*hidden states.*one layer at a time",
    ):
        check_kind(skeleton.default_config("glm_moe_dsa"))


def test_layers_that_leave_something_for_later_ones_are_found_out() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {**SMALL, "layer_types": kinds, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    config |= {"vocab_size_per_layer_input": 70, "global_head_dim": 8}
    with pytest.raises(
        UnsupportedError, match=r"gemma4_text: layers from \d on use keys and values of layers"
    ):
        check_shape("gemma4_text", config)


def check_shape(model_type: str, config: Mapping[str, Any]) -> None:
    """Walk a small model of exactly this config."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save(model_type, config, Path(folder))
        with open_source(Path(folder)) as source:
            walk(read_checkpoint(source), tokens(70))


def test_a_model_that_sees_later_tokens_predicts_none() -> None:
    with pytest.raises(UnsupportedError, match="bert: its logits depend on later tokens"):
        check_kind(skeleton.default_config("bert"))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("t5", "no causal language model of type t5"), ("albert", "no causal language model of type albert")],
)
def test_what_is_no_causal_language_model_is_refused(
    model_type: str, message: str, tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    folder = write_llama(tmp_path / "in")
    index = replace(index_of(folder), config=skeleton.default_config(model_type))
    with pytest.raises(UnsupportedError, match=message):
        measure(index, index, sequences_of())


# --------------------------------------------------------------------------------------------- what is measured


def test_a_model_beside_itself_has_lost_nothing(
    heldout: list[list[int]], index_of: Callable[[Path], Index]
) -> None:
    from transformers import AutoModelForCausalLM

    text = [heldout[3], heldout[-1][:60], heldout[9][:60]]
    found = measure(index_of(TINY), index_of(TINY), text)
    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert found.tokens == 256 + 59 + 59
    assert found.perplexity == found.perplexity_before
    assert [layer.layer for layer in found.layers] == list(range(6))
    assert all((layer.error, layer.drift) == (0.0, 0.0) for layer in found.layers)
    model = load(TINY, AutoModelForCausalLM)
    loss = 0.0
    for each in text:
        with torch.no_grad():
            logits = model(torch.tensor([each[:-1]])).logits[0].double()
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(each[1:]), reduction="sum"))
    assert found.perplexity == pytest.approx(math.exp(loss / found.tokens), rel=1e-6)


@pytest.mark.slow
def test_the_perplexity_of_the_trained_model_is_the_one_that_its_readme_tells(
    heldout: list[list[int]], index_of: Callable[[Path], Index], tmp_path: Path
) -> None:
    folder = write_quantized(TINY, tmp_path / "q", Scheme("gptq", 4, 32))
    found = measure(index_of(TINY), index_of(folder), heldout)
    assert found.tokens == 11_006
    assert round(found.perplexity_before, 2) == 57.72
    assert 57.72 < found.perplexity < 58.5
    assert 0.001 < found.kl < 0.005
    assert 0.93 < found.agreement < 0.97


@pytest.mark.slow
def test_fewer_bits_lose_more(
    heldout: list[list[int]], index_of: Callable[[Path], Index], tmp_path: Path
) -> None:
    found: list[Quality] = []
    for bits in (8, 4, 2):
        folder = write_quantized(TINY, tmp_path / str(bits), Scheme("gptq", bits, 32))
        found.append(measure(index_of(TINY), index_of(folder), [heldout[5][:129]]))
    eight, four, two = found
    assert 0 < eight.kl < four.kl / 10 < two.kl / 100
    assert eight.agreement > four.agreement > two.agreement
    for a, b in ((eight, four), (four, two)):
        for less, more in zip(a.layers, b.layers, strict=True):
            assert less.error < more.error and less.drift < more.drift


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("gptq", 4, 32),
        Scheme("awq", 4, 32, symmetric=False),
        *(
            pytest.param(scheme, marks=pytest.mark.slow)
            for scheme in (
                Scheme("gptq", 4, 32, act_order=True),
                Scheme("gptq", 8, None, symmetric=False, format="gptq_v2"),
                Scheme("compressed-tensors", 4, 32, symmetric=False),
            )
        ),
    ],
    ids=lambda scheme: f"{scheme.method} {scheme.format} {scheme.bits}{' act-order' * scheme.act_order}",
)
def test_a_quantized_model_computes_what_its_fields_stand_for(
    scheme: Scheme, tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    folder = write_llama(tmp_path / "in")
    legacy = scheme.method == "awq"
    packed = write_quantized(folder, tmp_path / "q", scheme, legacy=legacy, head=scheme.bits == 8)

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        fields = quantized_tensors(tensors, scheme, head=scheme.bits == 8)
        tensors.clear()
        tensors.update(dequantized(fields, scheme))

    plain = change(folder, tmp_path / "plain", unpack)
    lost = measure(index_of(folder), index_of(packed), sequences_of())
    same = measure(index_of(plain), index_of(packed), sequences_of())
    assert lost.kl > 0 and all(layer.error > 0 for layer in lost.layers)
    assert same.kl == 0.0
    assert all((layer.error, layer.drift) == (0.0, 0.0) for layer in same.layers)


def test_the_error_of_a_layer_is_its_own_and_drifts_on(
    tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    folder = write_llama(tmp_path / "in")

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.2.{name}.weight"].zero_()

    found = measure(
        index_of(folder), index_of(change(folder, tmp_path / "out", silence)), sequences_of()
    ).layers
    assert [layer.error for layer in found[:2]] == [0.0, 0.0]
    assert [layer.drift for layer in found[:2]] == [0.0, 0.0]
    assert found[2].error == found[2].drift > 0.1
    assert found[3].error == 0.0 and found[3].drift > 0.05


def test_a_model_padded_with_zeros_has_lost_nothing(
    tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    folder = write_llama(tmp_path / "in")

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = torch.nn.functional.pad(tensor, (0, 0, 0, 32))
            elif "down_proj" in name:
                tensors[name] = torch.nn.functional.pad(tensor, (0, 32))

    wider = change(folder, tmp_path / "out", pad)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "intermediate_size": 160}))
    found = measure(index_of(folder), index_of(wider), sequences_of())
    assert found.kl < 1e-10 and found.agreement == 1.0
    assert all(layer.drift < 1e-6 for layer in found.layers)


def test_zeros_that_are_in_no_file_are_measured_as_well(
    tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    index = index_of(write_llama(tmp_path / "in", intermediate=72))
    wider, _ = pad_to(index, tensor_parallel_size=4, group=16)
    assert wider.config["intermediate_size"] == 128
    found = measure(index, wider, sequences_of())
    assert found.kl < 1e-10 and found.agreement == 1.0


@pytest.mark.slow
def test_pickles_safetensors_and_stores_measure_the_same(
    tmp_path: Path, index_of: Callable[[Path | str], Index], heldout: list[list[int]]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copyfile(TINY / "config.json", copy / "config.json")
    save_file(read_tensors(TINY), copy / "model.safetensors", metadata={"format": "pt"})
    packed = write_quantized(TINY, tmp_path / "q", Scheme("gptq", 4, 32), files="bin")
    text = [heldout[1][:65]]
    found = [
        measure(index_of(original), index_of(quantized), text)
        for original, quantized in ((TINY, packed), (copy, packed), (f"file://{TINY}", f"file://{packed}"))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0].kl > 0


def test_progress_counts_layers_and_the_head(tmp_path: Path, index_of: Callable[[Path], Index]) -> None:
    told: list[tuple[int, int]] = []
    index = index_of(write_llama(tmp_path / "in"))
    measure(index, index, sequences_of(), progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 5) for done in range(6)]


@pytest.mark.slow
def test_the_order_and_the_lengths_of_sequences_change_nothing(
    tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    folder = write_llama(tmp_path / "in")
    packed = write_quantized(folder, tmp_path / "q", Scheme("gptq", 4, 32))
    text = [sequence[:length] for sequence, length in zip(sequences_of(4), (13, 9, 13, 5), strict=True)]
    found = measure(index_of(folder), index_of(packed), text)
    apart = [measure(index_of(folder), index_of(packed), [each]) for each in text]
    total = sum(each.tokens for each in apart)
    assert found.tokens == total == 12 + 8 + 12 + 4
    assert found.kl == pytest.approx(sum(each.kl * each.tokens for each in apart) / total, rel=1e-4)
    loss = sum(math.log(each.perplexity) * each.tokens for each in apart) / total
    assert math.log(found.perplexity) == pytest.approx(loss, rel=1e-6)


def test_logits_in_pieces_measure_the_same(
    tmp_path: Path, index_of: Callable[[Path], Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "in")
    packed = write_quantized(folder, tmp_path / "q", Scheme("gptq", 4, 32))
    whole = measure(index_of(folder), index_of(packed), sequences_of())
    monkeypatch.setattr("shardprep.quantize.quality.LOGITS", 3 * 4 * 72 * 5)  # five positions of three texts
    sizes: list[int] = []
    logits = Walk.logits

    def counting(self: Walk, *arguments: Any) -> torch.Tensor:
        found = logits(self, *arguments)
        sizes.append(found.shape[1])
        return found

    monkeypatch.setattr(Walk, "logits", counting)
    pieces = measure(index_of(folder), index_of(packed), sequences_of())
    assert sizes == [5, 5, 5, 5, 2, 2]
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-4)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.layers == whole.layers


def test_hidden_states_on_disk_measure_the_same(
    tmp_path: Path, index_of: Callable[[Path], Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "in")
    packed = write_quantized(folder, tmp_path / "q", Scheme("gptq", 4, 32))
    in_memory = measure(index_of(folder), index_of(packed), sequences_of())
    monkeypatch.setattr("shardprep.quantize.quality.IN_MEMORY", 0)
    assert measure(index_of(folder), index_of(packed), sequences_of()) == in_memory


# ------------------------------------------------------------------------------------------------------- memory


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Let the garbage collector know of nothing that is there already."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and not each.is_meta:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_one_layer_of_each_model_is_in_memory_and_of_the_embedding_the_rows_that_are_used(
    tmp_path: Path, index_of: Callable[[Path], Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "in", layers=7)
    packed = write_quantized(folder, tmp_path / "q", Scheme("gptq", 4, 32))
    tensors = index_of(folder).tensors
    a_layer = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.3."))
    check_kind(index_of(folder).config)  # its small model is not to be counted below
    sizes: dict[int, int] = {}
    run = Walk.run

    def counting(self: Walk, layer: int, ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        held = {
            number
            for number, module in enumerate(self._layers)
            for parameter in module.parameters()
            if not parameter.is_meta
        }
        assert held == {layer}
        embedding: Any = self.model.get_input_embeddings()
        assert len(embedding.weight) == len(self.vocabulary) < self.vocab_size
        head: Any = self.model.get_output_embeddings()
        assert head.weight.is_meta
        sizes[layer] = max(live_bytes(), sizes.get(layer, 0))
        return run(self, layer, ids, given)

    monkeypatch.setattr(Walk, "run", counting)
    with only_new_objects():
        measure(index_of(folder), index_of(packed), sequences_of(2, 9))
    assert list(sizes) == list(range(7))
    assert 2 * a_layer < max(sizes.values()) < 2.5 * a_layer, [size / a_layer for size in sizes.values()]


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_computes_no_numbers_is_named(
    value: float, tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    folder = write_llama(tmp_path / "in")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    spoiled = change(folder, tmp_path / "out", spoil)
    with pytest.raises(IntegrityError, match="out: layer 1 gives values that are infinite or not a number"):
        measure(index_of(folder), index_of(spoiled), sequences_of())


def test_a_head_that_computes_no_numbers_is_named(tmp_path: Path, index_of: Callable[[Path], Index]) -> None:
    folder = write_llama(tmp_path / "in")
    spoiled = change(
        folder, tmp_path / "out", lambda tensors: tensors["lm_head.weight"][5].fill_(float("nan"))
    )
    with pytest.raises(IntegrityError, match="out: the head gives values"):
        measure(index_of(folder), index_of(spoiled), sequences_of())


def test_a_checkpoint_that_is_not_whole_is_refused_before_it_is_read(
    tmp_path: Path, index_of: Callable[[Path], Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep.quantize.unquantized.open_reader", None)
    folder = write_llama(tmp_path / "in")
    short = change(folder, tmp_path / "out", lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(
        FormatError, match=r"out: .*the checkpoint lacks model\.layers\.3\.mlp\.up_proj\.weight"
    ):
        measure(index_of(folder), index_of(short), sequences_of())


def test_a_packed_weight_without_its_scales_is_refused_before_it_is_read(
    tmp_path: Path, index_of: Callable[[Path], Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep.quantize.unquantized.open_reader", None)
    folder = write_llama(tmp_path / "in")
    packed = write_quantized(folder, tmp_path / "q", Scheme("awq", 4, 32))
    name = "model.layers.3.mlp.up_proj"
    short = change(packed, tmp_path / "out", lambda tensors: tensors.pop(f"{name}.scales"))
    with pytest.raises(FormatError, match=rf"out: {name} has no scales, without which its packed weight"):
        measure(index_of(folder), index_of(short), sequences_of())


@pytest.mark.parametrize("quantized", [False, True])
def test_tensors_of_another_size_than_the_config_says_are_refused_before_they_are_read(
    quantized: bool, tmp_path: Path, index_of: Callable[[Path], Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep.quantize.unquantized.open_reader", None)
    folder = write_llama(tmp_path / "in")
    other = write_quantized(folder, tmp_path / "q", Scheme("gptq", 4, 32)) if quantized else folder
    index = index_of(other)
    wrong = replace(index, config={**index.config, "intermediate_size": 96})
    with pytest.raises(
        FormatError, match=r"mlp\.\w+\.weight \(shape \[.*128.*\], expected \[.*96.*\]\).*config.json"
    ):
        measure(index_of(folder), wrong, sequences_of())


def test_another_model_is_no_quantized_one_of_this(tmp_path: Path, index_of: Callable[[Path], Index]) -> None:
    folder, other = write_llama(tmp_path / "in"), write_llama(tmp_path / "other", layers=3)
    with pytest.raises(
        InputError, match=r"other: a model of another number of layers than .*in: 3, expected 4"
    ):
        measure(index_of(folder), index_of(other), sequences_of())


def test_text_of_another_tokenizer_is_refused(tmp_path: Path, index_of: Callable[[Path], Index]) -> None:
    index = index_of(write_llama(tmp_path / "in"))
    with pytest.raises(InputError, match=r"token 72: .*in knows 72; is the text of another tokenizer\?"):
        measure(index, index, [[1, 2, 72]])
    with pytest.raises(InputError, match="token -1"):
        measure(index, index, [[1, 2, -1]])


def test_contexts_longer_than_the_model_knows_are_refused(
    tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    index = index_of(write_llama(tmp_path / "in", max_position_embeddings=16))
    assert measure(index, index, [[3] * 17]).tokens == 16
    with pytest.raises(
        InputError, match=r"sequences of 18 tokens, of which 17 are read at once.*16 positions"
    ):
        measure(index, index, [[3] * 18])


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "fp8"}, {"quant_method": "compressed-tensors", "format": "int-quantized"}],
)
def test_quantizations_that_are_not_packed_are_refused(
    quantization: dict[str, Any], tmp_path: Path, index_of: Callable[[Path], Index]
) -> None:
    index = index_of(write_llama(tmp_path / "in"))
    other = replace(index, config={**index.config, "quantization_config": quantization})
    with pytest.raises(UnsupportedError, match="quality is measured of gptq, awq and compressed-tensors"):
        measure(index, other, sequences_of())


def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path, index_of: Callable[[Path], Index]) -> None:
    index = index_of(write_llama(tmp_path / "in"))
    with pytest.raises(InputError, match=r"no config\.json"):
        measure(replace(index, config={}), index, sequences_of())
