"""A stage computes what its layers compute in the whole model, from its own bytes alone; and never from wrong ones."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shardprep_runtime
from lazily import torch
from quantized_models import one_thread, write_quantized
from shardprep.layout.quantization import Scheme
from shardprep.split import split
from shardprep_runtime.errors import (
    CacheLostError,
    InputError,
    IntegrityError,
    LayoutError,
    UnsupportedError,
)
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.stage.stage import Stage, build_stage, stage_of
from stages_models import (
    cuts,
    generated,
    greedy,
    layers_of,
    make_set,
    prompt,
    run,
    stages_of,
    whole,
)
from stages_ranks import StageRanks
from stores import make_store

# one process that has imported transformers
pytestmark = pytest.mark.xdist_group("transformers, too")

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-llama"

TOKENS = 8


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a shard set once."""
    known: dict[str, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        key = json.dumps([model_type, changes], sort_keys=True)
        if key not in known:
            known[key] = make_set(model_type, tmp_path_factory.mktemp(model_type), **changes)
        return known[key]

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of the trained checkpoint, cut at grain 2."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(CHECKPOINT, folder / "in")
    split(folder / "in", folder / "set", tensor_parallel_size=2, pipeline_parallel_size=2)
    return folder / "set"


def mapped_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor where its memory is that of a part's mapping, and was not written to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return tensor.nbytes if line.endswith(".safetensors") else 0
    return 0


# ------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_of_a_trained_model_say_what_it_says(dtype: str, trained: Path) -> None:
    model = whole(trained, getattr(torch, dtype))
    expected = generated(model, prompt(), TOKENS)
    with torch.no_grad():
        logits = model(prompt()).logits
    layers = layers_of(trained)
    for cut in [[[0, layers]], *cuts(layers)]:
        stages = stages_of(trained, cut, dtype=dtype)
        assert torch.equal(greedy(stages, prompt(), TOKENS), expected)
        assert torch.equal(run(stages, prompt(), name="b"), logits)
        given = prompt()
        for stage in stages:
            given = stage.forward(given)
        torch.testing.assert_close(given, logits, rtol=0, atol=0)


def test_a_stage_says_what_it_is(made: Callable[..., Path]) -> None:
    shards = made("llama", rope_parameters=None)
    first, last = stages_of(shards, [[0, 1], [1, 4]])
    raw = (shards / "shardprep.json").read_bytes()
    for stage in (first, last):
        assert stage.pipeline_parallel_size == 2
        assert (stage.hidden_size, stage.vocab_size, stage.dtype) == (64, 259, torch.float32)
        assert stage.manifest_digest == shardprep_runtime.format.manifest.digest_of(raw)
        assert stage.config.num_hidden_layers == 4
        assert stage.can_crop
        assert stage.max_positions == stage.config.max_position_embeddings
    assert (first.pp_rank, first.layers, first.is_first, first.is_last) == (0, (0, 1), True, False)
    assert (last.pp_rank, last.layers, last.is_first, last.is_last) == (1, (1, 4), False, True)
    assert [each.self_attn.layer_idx for each in last.layer_modules] == [1, 2, 3]


@pytest.mark.parametrize(
    ("cut", "rank"), [([[0, 2], [2, 4]], 0), ([[0, 2], [2, 4]], 1), ([[0, 1], [1, 3], [3, 4]], 1)]
)
def test_a_stage_maps_its_tensors_and_gives_no_memory_to_others(
    cut: list[list[int]], rank: int, made: Callable[..., Path]
) -> None:
    shards = made("llama")
    stage = build_stage(shards, pp_rank=rank, stages=cut)
    with open_set(shards).load(Place(rank=rank, stages=cut)) as shard:
        parameters = list(stage.module.parameters())
        assert sum(each.nbytes for each in parameters) == shard.nbytes
        assert all(mapped_bytes(each) == each.nbytes for each in parameters)
    assert not any(each.is_meta for each in (*parameters, *stage.module.buffers()))


def test_a_tied_head_is_one_tensor_where_a_stage_has_both(made: Callable[..., Path]) -> None:
    shards = made("qwen2", tie_word_embeddings=True)
    (alone,) = stages_of(shards, [[0, 4]])
    first, last = stages_of(shards, [[0, 2], [2, 4]])
    module: Any = alone.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    embedding = module.lm_head.weight.nbytes
    assert first.nbytes + last.nbytes >= alone.nbytes + embedding
    assert torch.equal(greedy([first, last], prompt(), TOKENS), greedy([alone], prompt(), TOKENS))


def test_weights_are_cast_as_they_load(made: Callable[..., Path]) -> None:
    shards = made("llama")
    stages = stages_of(shards, [[0, 2], [2, 4]], dtype="bfloat16")
    assert {each.dtype for stage in stages for each in stage.module.parameters()} == {torch.bfloat16}
    assert [stage.dtype for stage in stages] == [torch.bfloat16] * 2
    assert torch.equal(
        greedy(stages, prompt(), TOKENS), generated(whole(shards, torch.bfloat16), prompt(), TOKENS)
    )


def test_hidden_states_that_a_model_keeps_in_float32_stay_so(made: Callable[..., Path]) -> None:
    shards = made("mamba2", residual_in_fp32=True)
    stages = stages_of(shards, [[0, 1], [1, layers_of(shards)]], dtype="bfloat16")
    assert stages[0].step("a", prompt(), 0).dtype == torch.float32
    assert torch.equal(
        greedy(stages, prompt(), TOKENS), generated(whole(shards, torch.bfloat16), prompt(), TOKENS)
    )


# ------------------------------------------------------------------------------------------------- caches


def test_a_step_that_is_sent_again_gives_the_same(made: Callable[..., Path]) -> None:
    stages = stages_of(made("llama"), [[0, 2], [2, 4]])
    run(stages, prompt())
    more = prompt()[:, :2]
    expected = run(stages, more, 5)
    for _ in range(2):
        assert torch.equal(run(stages, more, 5), expected)
    assert [dict(stage.sequences) for stage in stages] == [{"a": 7}] * 2


def test_positions_can_be_taken_back(made: Callable[..., Path]) -> None:
    stages = stages_of(made("llama"), [[0, 2], [2, 4]])
    run(stages, prompt())
    run(stages, prompt(), 5)
    again = run(stages, prompt()[:, 3:], 3)
    run(stages, prompt(), name="b")
    assert torch.equal(again, run(stages, prompt()[:, 3:], 3, name="b"))


def test_the_first_stage_may_be_ahead_of_the_next(made: Callable[..., Path]) -> None:
    """A step that was lost between two stages is sent again from the beginning."""
    first, last = stages_of(made("llama"), [[0, 2], [2, 4]])
    run([first, last], prompt())
    first.step("a", prompt()[:, :1], 5)
    assert torch.equal(run([first, last], prompt()[:, :1], 5), run([first, last], prompt()[:, :1], 5))


def test_position_0_always_begins_anew(made: Callable[..., Path]) -> None:
    stages = stages_of(made("llama"), [[0, 2], [2, 4]])
    expected = run(stages, prompt())
    run(stages, prompt(), 5)
    assert torch.equal(run(stages, prompt()), expected)
    assert dict(stages[0].sequences) == {"a": 5}


def test_what_is_not_cached_is_said_to_be_lost(made: Callable[..., Path]) -> None:
    (stage,) = stages_of(made("llama"), [[0, 4]])
    with pytest.raises(CacheLostError, match="a: no such sequence"):
        stage.step("a", prompt(), 3)
    stage.step("a", prompt(), 0)
    with pytest.raises(CacheLostError, match="a: 5 positions are cached, the step begins after 6"):
        stage.step("a", prompt(), 6)
    stage.reset("a")
    stage.reset("never")
    with pytest.raises(CacheLostError, match="no such sequence"):
        stage.step("a", prompt(), 5)


def test_the_least_recently_used_sequence_is_forgotten(made: Callable[..., Path]) -> None:
    (stage,) = stages_of(made("llama"), [[0, 4]], max_sequences=2)
    for name, past in (("a", 0), ("b", 0), ("a", 5), ("c", 0)):
        stage.step(name, prompt(), past)
    assert dict(stage.sequences) == {"a": 10, "c": 5}
    with pytest.raises(CacheLostError):
        stage.step("b", prompt(), 5)


def test_sequences_do_not_touch_each_other(made: Callable[..., Path]) -> None:
    stages = stages_of(made("llama"), [[0, 2], [2, 4]])
    expected = [greedy(stages, ids, 6, name="alone") for ids in (prompt(), prompt().flip(1))]
    found: dict[str, torch.Tensor] = {}

    def go(name: str, ids: torch.Tensor) -> None:
        found[name] = greedy(stages, ids, 6, name=name)

    threads = [
        threading.Thread(target=go, args=(str(number), ids))
        for number, ids in enumerate((prompt(), prompt().flip(1)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["0"], expected[0])
    assert torch.equal(found["1"], expected[1])


def test_a_window_takes_back_its_last_step_and_no_more(made: Callable[..., Path]) -> None:
    shards = made("mistral", sliding_window=4)
    stages = stages_of(shards, [[0, 2], [2, 4]])
    assert all(stage.can_crop for stage in stages)
    assert torch.equal(greedy(stages, prompt(), TOKENS), generated(whole(shards), prompt(), TOKENS))
    run(stages, prompt())
    run(stages, prompt(), 5)
    expected = run(stages, prompt()[:, 2:4], 7)  # three of the last five are taken back
    run(stages, prompt(), name="b")
    run(stages, prompt()[:, :2], 5, name="b")
    torch.testing.assert_close(run(stages, prompt()[:, 2:4], 7, name="b"), expected, rtol=0, atol=1e-5)
    with pytest.raises(CacheLostError, match="a window of 4 positions has moved on"):
        run(stages, prompt(), 5)
    assert dict(stages[0].sequences)["a"] == 9  # and goes on from there
    run(stages, prompt(), 9)
    cache: Any = stages[0]._caches["a"]
    assert all(layer.keys.shape[-2] <= 3 + 5 for layer in cache.own)


@pytest.mark.parametrize("model_type", ["mamba2", "qwen3_next"])
def test_linear_attention_takes_nothing_back(model_type: str, made: Callable[..., Path]) -> None:
    shards = made(model_type)
    stages = stages_of(shards, [[0, 2], [2, layers_of(shards)]])
    assert not stages[0].can_crop
    run(stages, prompt())
    run(stages, prompt(), 5)
    with pytest.raises(
        CacheLostError, match="cannot forget its last 5 positions; send the whole sequence again"
    ):
        run(stages, prompt(), 5)


def test_a_step_that_fails_midway_is_forgotten_with_its_sequence(made: Callable[..., Path]) -> None:
    (stage,) = stages_of(made("llama"), [[0, 4]])
    stage.step("a", prompt(), 0)
    stage.step("b", prompt(), 0)

    def fail(*_: object) -> None:
        raise MemoryError

    hook = stage.layer_modules[2].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        stage.step("a", prompt(), 5)
    hook.remove()
    assert dict(stage.sequences) == {"b": 5}
    with pytest.raises(CacheLostError):
        stage.step("a", prompt(), 5)


@pytest.mark.parametrize(
    ("rank", "inputs", "past", "words"),
    [
        (0, prompt().int(), 0, "stage 0 takes ids of tokens, 2 dims of torch.int64"),
        (0, prompt()[0], 0, r"shape \[5\]"),
        (0, prompt()[:, :0], 0, "none empty"),
        (0, prompt() + 250, 0, "token 271: this model knows 259"),
        (0, prompt() - 5, 0, "token -2"),
        (0, prompt(), -1, "-1 positions before"),
        (0, prompt(), 30, "35 positions; this model has at most 32"),
        (1, prompt(), 0, "stage 1 takes hidden states, 3 dims of torch.float32"),
        (1, torch.zeros(2, 5, 64, dtype=torch.float16), 0, "torch.float16"),
        (1, torch.zeros(2, 5, 63), 0, "hidden states of 63; this model's are 64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    rank: int, inputs: torch.Tensor, past: int, words: str, made: Callable[..., Path]
) -> None:
    stage = build_stage(made("llama", max_position_embeddings=32), pp_rank=rank, stages=[[0, 2], [2, 4]])
    with pytest.raises(InputError, match=words):
        stage.step("a", inputs, past)
    assert not stage.sequences


def test_a_sequence_keeps_its_batch(made: Callable[..., Path]) -> None:
    (stage,) = stages_of(made("llama"), [[0, 4]])
    stage.step("a", prompt(), 0)
    with pytest.raises(InputError, match="a: a batch of 1, but the sequence began with one of 2"):
        stage.step("a", prompt()[:1], 5)
    stage.step("a", prompt(), 5)


def test_a_closed_stage_computes_nothing(made: Callable[..., Path]) -> None:
    with build_stage(made("llama")) as stage:
        stage.step("a", prompt(), 0)
    assert not stage.sequences
    with pytest.raises(InputError, match="closed"):
        stage.step("a", prompt(), 0)


# ------------------------------------------------------------------------------------------------- never wrong ones


def stage_with(shards: Path, folder: Path, pp_rank: int, cut: Any, *, tensor_parallel_size: int = 1) -> Stage:
    """A stage of `shards`, with the config.json that lies in `folder`."""
    place = Place.of_stage(pp_rank, stages=cut, tensor_parallel_size=tensor_parallel_size)
    with open_set(shards).load(place) as shard:
        return stage_of(shard, folder)


def with_config(shards: Path, folder: Path, **changes: Any) -> Path:
    """A folder with another config.json."""
    folder.mkdir()
    config = json.loads((shards / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "the checkpoint lacks model.layers.2.self_attn.k_proj.bias"),
        ({"intermediate_size": 96}, "shapes differ in model.layers.2.mlp.down_proj.weight"),
        ({"vocab_size": 300}, "shapes differ in lm_head.weight"),
        ({"num_hidden_layers": 5}, "not build it of one list of 4 layers"),
        ({"model_type": "gpt2"}, "none of the checkpoint's layers|not build it of one list"),
        ({"model_type": "never"}, "does not take its config.json"),
        ({"model_type": "vit"}, "no causal language model"),
    ],
)
def test_weights_that_are_not_the_models_do_not_load(
    changes: dict[str, Any], words: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    shards = made("llama")
    with pytest.raises(InputError, match=words):
        stage_with(shards, with_config(shards, tmp_path / "other", **changes), 1, [[0, 2], [2, 4]])


def test_a_tensor_that_the_model_lacks_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    shards = made("qwen2", tie_word_embeddings=False)
    with_bias = with_config(
        shards, tmp_path / "llama", model_type="llama", architectures=["LlamaForCausalLM"]
    )
    with pytest.raises(LayoutError, match=r"the model lacks model.layers.0.self_attn.k_proj.bias"):
        stage_with(shards, with_bias, 0, [[0, 2], [2, 4]])


REFUSED = {
    "gemma4_text": "layer 2 needs more of the layers before it",  # an embedding for each layer
    "glm_moe_dsa": "layer 2 needs more of the layers before it",  # what an earlier layer attended to
    "zaya": "layer 2 needs more of the layers before it|belongs to another stage",  # what the router before chose
    "deepseek_v4": "not one hidden state for each",  # several residual streams
}


@pytest.mark.parametrize(
    "model_type",
    [name if name == "gemma4_text" else pytest.param(name, marks=pytest.mark.slow) for name in REFUSED],
)
def test_layers_that_need_more_than_hidden_states_are_refused(
    model_type: str, made: Callable[..., Path]
) -> None:
    shards = made(model_type)
    for rank in range(2):
        with pytest.raises(UnsupportedError, match=REFUSED[model_type]):
            build_stage(shards, pp_rank=rank, stages=[[0, 2], [2, layers_of(shards)]])
    (alone,) = stages_of(shards, [[0, layers_of(shards)]])  # which needs no cut
    assert torch.equal(greedy([alone], prompt(), 4), generated(whole(shards), prompt(), 4))


def test_keys_that_layers_share_are_not_cut_apart(made: Callable[..., Path]) -> None:
    shards = made(
        "gemma4_text",
        hidden_size_per_layer_input=0,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        per_layer_config={"01": {"head_dim": 32}, "03": {"head_dim": 32}, "05": {"head_dim": 32}},
    )
    for rank in range(2):
        with pytest.raises(
            UnsupportedError, match="layers from 4 on use keys and values of layers before it"
        ):
            build_stage(shards, pp_rank=rank, stages=[[0, 4], [4, 6]])


# ------------------------------------------------------------------------------------------------- where it comes from


def test_a_stage_is_built_from_a_store(made: Callable[..., Path], tmp_path: Path) -> None:
    shards = made("llama")
    source = f"file://{make_store(shards, tmp_path / 'store')}"
    shard_set, cut = open_set(source, cache=tmp_path / "cache"), [[0, 2], [2, 4]]
    stages = [build_stage(shard_set, pp_rank=rank, stages=cut) for rank in range(2)]
    expected = greedy(stages_of(shards, [[0, 2], [2, 4]]), prompt(), TOKENS)
    assert torch.equal(greedy(stages, prompt(), TOKENS), expected)
    with open_set(shards).load(Place(rank=1, stages=[[0, 2], [2, 4]])) as shard:
        assert stages[1].bytes_fetched > 0
        assert stages[1].manifest_digest == build_stage(shards).manifest_digest
        assert shard.bytes_fetched == 0
    again = build_stage(shard_set, pp_rank=1, stages=cut)
    assert again.bytes_fetched == 0


def test_a_stage_is_built_from_what_was_begun_before(made: Callable[..., Path]) -> None:
    shards, cut = made("llama"), [[0, 2], [2, 4]]
    expected = greedy(stages_of(shards, cut), prompt(), TOKENS)
    with open_set(shards).load(Place(rank=1, stages=cut)) as shard:
        fetch = open_set(shards).prefetch(Place(rank=0, stages=cut))
        first = stage_of(fetch, shards)
        for _ in range(2):  # a shard can be built from again
            assert torch.equal(greedy([first, stage_of(shard, shards)], prompt(), TOKENS), expected)


def test_a_config_that_is_not_the_manifests_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("llama"), tmp_path / "set")
    config = tmp_path / "set" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    with pytest.raises(IntegrityError, match=r"config\.json: does not match its digest"):
        build_stage(tmp_path / "set")
    with pytest.raises(IntegrityError), open_set(tmp_path / "set").side_files():
        pass


def test_several_tensor_ranks_need_a_mesh(trained: Path) -> None:
    with pytest.raises(LayoutError, match="2 tensor ranks need a mesh"):
        stage_with(trained, trained, 0, None, tensor_parallel_size=2)
    with (
        shardprep_runtime.load(trained, tensor_parallel_size=2) as shard,
        pytest.raises(LayoutError, match="cut as torch asks; pass engine='transformers'"),
    ):
        stage_of(shard, trained)


# ------------------------------------------------------------------------------------------------- training


def test_gradients_are_those_of_the_whole_model(made: Callable[..., Path]) -> None:
    shards = made("llama")
    model = whole(shards)
    expected = model(prompt(), use_cache=False).logits
    expected.square().mean().backward()
    before = {path: path.read_bytes() for path in shards.glob("*.safetensors")}
    first, last = stages_of(shards, [[0, 2], [2, 4]], trainable=True)
    hidden = first.forward(prompt())
    given = hidden.detach().requires_grad_()
    last.forward(given).square().mean().backward()
    hidden.backward(given.grad)
    theirs = dict(model.named_parameters())
    seen = 0
    for stage in (first, last):
        for name, parameter in stage.module.named_parameters():
            assert parameter.grad is not None and theirs[name].grad is not None
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-7)
            assert mapped_bytes(parameter) == 0
            seen += 1
            with torch.no_grad():
                parameter.add_(1)
    assert seen == len(theirs)
    assert {path: path.read_bytes() for path in before} == before


def test_a_stage_that_is_not_trained_keeps_no_gradients_of_its_own(made: Callable[..., Path]) -> None:
    _, last = stages_of(made("llama"), [[0, 2], [2, 4]])
    given = torch.randn(1, 3, 64, requires_grad=True)
    last.forward(given).sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0
    assert not any(each.requires_grad for each in last.module.parameters())


# ------------------------------------------------------------------------------------------------- several tensor ranks

SPLIT = ("llama", "gemma2", "mixtral", "qwen2_moe", "glm4", "phi3", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageRanks]:
    with StageRanks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.mark.parametrize("model_type", SPLIT)
@pytest.mark.slow
def test_two_stages_of_two_tensor_ranks_say_what_the_whole_says(
    model_type: str, ranks: StageRanks, made: Callable[..., Path]
) -> None:
    shards = made(model_type, grain=2)
    model, layers = whole(shards), layers_of(shards)
    job = {"source": str(shards), "tp": 2, "ids": prompt().tolist(), "tokens": TOKENS}
    answers = ranks.run("greedy", 4, stages=[[0, 1], [1, layers]], **job)
    assert not any(each["error"] for each in answers), answers
    expected = generated(model, prompt(), TOKENS).tolist()
    assert [each["tokens"] for each in answers] == [expected] * 4
    with torch.no_grad():
        logits = model(prompt()).logits[:, -1:]
    for answer in answers[2:]:
        found = torch.load(answer["logits"])
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    entire = build_stage(shards).nbytes
    assert all(each["nbytes"] < 0.7 * entire for each in answers)


# ------------------------------------------------------------------------------------------------- quantized sets


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("gptqmodel"), reason="transformers runs GPTQ and AWQ by it")
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("gptq", group=32),
        Scheme("gptq", group=32, act_order=True),
        Scheme("awq", group=32, symmetric=False),
    ],
    ids=["gptq", "gptq act-order", "awq"],
)
def test_stages_of_four_bits_say_what_the_whole_says(
    scheme: Scheme, ranks: StageRanks, tmp_path: Path
) -> None:
    """And so does one that is built from the same shard again, for what a quantizer changes is not the shard's."""
    write_quantized(CHECKPOINT, tmp_path / "in", scheme)
    split(tmp_path / "in", tmp_path / "set", tensor_parallel_size=1)
    layers = layers_of(tmp_path / "set")
    cut = [[0, layers // 2], [layers // 2, layers]]
    (answer,) = ranks.run(
        "quantized", source=str(tmp_path / "set"), stages=cut, ids=prompt().tolist(), tokens=TOKENS
    )
    assert not answer["error"], answer
    expected, *found = answer["tokens"]
    assert found == [expected] * 2
    assert any(scheme.method in each.lower() or "Torch" in each for each in answer["kinds"])


def test_four_bits_on_several_tensor_ranks_are_refused(tmp_path: Path) -> None:
    write_quantized(CHECKPOINT, tmp_path / "in", Scheme("gptq", group=32))
    split(tmp_path / "in", tmp_path / "set", tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match="gptq at tensor parallel size 2"):
        stage_with(tmp_path / "set", tmp_path / "set", 0, None, tensor_parallel_size=2)


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is not None, reason="then transformers runs it"
)
def test_what_transformers_cannot_run_here_is_refused(tmp_path: Path) -> None:
    write_quantized(CHECKPOINT, tmp_path / "in", Scheme("compressed-tensors", group=32))
    split(tmp_path / "in", tmp_path / "set", tensor_parallel_size=1)
    with pytest.raises(UnsupportedError, match="transformers cannot run this quantized model here"):
        build_stage(tmp_path / "set")
