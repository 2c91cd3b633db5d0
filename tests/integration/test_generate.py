"""A split model says what transformers' own `generate` says of the whole one: greedy, drawn, stopped, with a draft model,
a few layers at a time, and after its workers were lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lazily import torch, transformers
from shardprep.model.shrink import shrink
from shardprep.model.skeleton import build, default_config
from shardprep.split import split
from shardprep_runtime.errors import CacheLostError, InputError, WorkerError, WorkerLostError
from shardprep_runtime.format.grid import Stages, even_stages
from shardprep_runtime.format.read_manifest import read_manifest
from shardprep_runtime.shard.shard_set import load, open_set
from shardprep_runtime.shard.tensors import is_mapped
from shardprep_runtime.workers.local import LayerByLayer, LocalTransport, open_fallback, open_local
from shardprep_runtime.workers.memory import choose_cuts, free_memory, memory_of_view
from shardprep_runtime.workers.pipeline import Pipeline
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.text.generate import Completion, Generator, Sampling, Token
from shardprep_runtime.workers.transport import Health, Output, Step, WorkerInfo
from shardprep_runtime.workers.worker import Compute

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason='needs transformers: pip install "shardprep[transformers]"'
)

TINY = Path(__file__).parents[1] / "data" / "tiny-llama"
LAYERS = 6
PROMPTS = ("The function returns", "def main(", "Once upon a time, there", "# größer\nfor i in", "x")
WHOLE: Stages = ((0, LAYERS),)
HALVES: Stages = ((0, 3), (3, 6))
UNEVEN: Stages = ((0, 1), (1, 5), (5, 6))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    split(TINY, folder / "set", tensor_parallel_size=2)
    return str(folder / "set")


@pytest.fixture(scope="module")
def model() -> Any:
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY)


@contextmanager
def opened(shards: str, stages: Stages = HALVES, *, dtype: str = "float32") -> Iterator[Pipeline]:
    with Pipeline(
        open_local(open_set(shards), stages=stages, compute=Compute(dtype=dtype)), stages
    ) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def pipeline(shards: str) -> Iterator[Pipeline]:
    with opened(shards) as found:
        yield found


@pytest.fixture(scope="module")
def generator(shards: str, pipeline: Pipeline) -> Generator:
    return Generator.from_folder(pipeline, Path(shards))


def generate(
    model: Any, ids: Sequence[int], count: int, *, seed: int | None = None, **more: Any
) -> tuple[int, ...]:
    """What transformers says of the whole model."""
    given = torch.tensor([ids])
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        found = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=seed is not None,
            **more,
        )
    return tuple(found[0, len(ids) :].tolist())


# ------------------------------------------------------------------------------------------------------- greedy, drawn
@pytest.mark.parametrize(
    "stages", [HALVES, *(pytest.param(each, marks=pytest.mark.slow) for each in (WHOLE, UNEVEN))]
)
def test_greedy_tokens_are_those_of_the_whole_model(
    shards: str, model: Any, tokenizer: Any, stages: Stages
) -> None:
    with opened(shards, stages) as pipeline:
        found = Generator.from_folder(pipeline, Path(shards)).generate(PROMPTS, Sampling(max_tokens=24))
    for prompt, each in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt).input_ids
        assert each.tokens == generate(model, ids, 24)
        assert each.text == tokenizer.decode(each.tokens, skip_special_tokens=True)
        assert each.prompt_tokens == len(ids)
        assert each.trips == len(each.breakdowns) == 24
        assert all(len(trip.compute) == len(stages) for trip in each.breakdowns)
        assert [trip.is_prefill for trip in each.breakdowns] == [True] + [False] * 23


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.5, 0.95, 40),  # all of them at once
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((1.0, 1.0, 0), (0.7, 0.9, 0), (0.3, 1.0, 5))
        ),
    ],
)
def test_drawn_tokens_are_those_of_the_whole_model_with_the_same_seed(
    generator: Generator, model: Any, tokenizer: Any, temperature: float, top_p: float, top_k: int
) -> None:
    chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    for seed in (0, 12345):
        sampling = Sampling(max_tokens=16, seed=seed, **chosen)  # type: ignore[arg-type]
        for prompt, each in zip(PROMPTS, generator.generate(PROMPTS, sampling), strict=True):
            ids = tokenizer(prompt).input_ids
            assert each.tokens == generate(model, ids, 16, seed=seed, **chosen)


def test_ids_may_be_given_instead_of_a_text_and_need_no_tokenizer(
    pipeline: Pipeline, generator: Generator, tokenizer: Any
) -> None:
    ids = tokenizer(PROMPTS[0]).input_ids
    bare = Generator(pipeline)
    found = bare.generate([ids], Sampling(max_tokens=8))[0]
    assert found.tokens == generator.generate([PROMPTS[0]], Sampling(max_tokens=8))[0].tokens
    assert found.text == ""
    with pytest.raises(InputError, match="without a tokenizer"):
        bare.stream("text")
    with pytest.raises(InputError, match="without a tokenizer; use stop_token_ids"):
        bare.stream(ids, Sampling(stop=("x",)))


def test_what_the_generation_config_says_of_scores_is_kept(
    pipeline: Pipeline, model: Any, tokenizer: Any
) -> None:
    config = transformers.GenerationConfig(
        repetition_penalty=1.3, no_repeat_ngram_size=3, suppress_tokens=[10]
    )
    found = Generator(pipeline, tokenizer, generation_config=config).generate(
        PROMPTS, Sampling(max_tokens=20)
    )
    for prompt, each in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt).input_ids
        wanted = generate(
            model, ids, 20, repetition_penalty=1.3, no_repeat_ngram_size=3, suppress_tokens=[10]
        )
        assert each.tokens == wanted


# ------------------------------------------------------------------------------------------------------------ the end
def test_a_text_ends_where_the_model_ends_it(
    pipeline: Pipeline, generator: Generator, model: Any, tokenizer: Any
) -> None:
    ids = tokenizer(PROMPTS[0]).input_ids
    plain = generate(model, ids, 24)
    end = plain[5]
    at = plain.index(end)
    config = transformers.GenerationConfig(eos_token_id=[end, 1])
    ended = Generator(pipeline, tokenizer, generation_config=config)
    found = ended.generate([ids], Sampling(max_tokens=24))[0]
    assert found.tokens == generate(model, ids, 24, eos_token_id=[end, 1], pad_token_id=2) == plain[: at + 1]
    assert found.finish_reason == "stop"
    assert found.text == tokenizer.decode(plain[:at], skip_special_tokens=True)
    found = ended.generate([ids], Sampling(max_tokens=24, ignore_eos=True))[0]
    assert (found.tokens, found.finish_reason) == (plain, "length")
    found = generator.generate([ids], Sampling(max_tokens=24, stop_token_ids=(end,)))[0]
    assert (found.tokens, found.finish_reason) == (plain[: at + 1], "stop")
    found = generator.generate([ids], Sampling(max_tokens=at + 1, stop_token_ids=(end,)))[0]
    assert found.finish_reason == "stop"


@pytest.mark.slow
def test_a_text_ends_before_a_stop_string_wherever_its_tokens_begin(
    generator: Generator, model: Any, tokenizer: Any
) -> None:
    checked = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        plain = generate(model, ids, 24)
        text = tokenizer.decode(plain, skip_special_tokens=True)
        for start in range(1, len(text) - 3, 5):
            stop = text[start : start + 3]
            found = generator.generate([ids], Sampling(max_tokens=24, stop=(stop, "never there")))[0]
            assert found.text == text[: text.index(stop)]
            assert found.finish_reason == "stop"
            if stop in prompt + text[: text.index(stop) + 2]:
                continue  # transformers looks into the prompt too
            wanted = generate(model, ids, 24, stop_strings=[stop], tokenizer=tokenizer)
            assert found.tokens == wanted
            checked += 1
    assert checked > 20


def test_a_stream_says_the_text_in_pieces_and_nothing_of_the_stop_string(
    generator: Generator, tokenizer: Any
) -> None:
    whole = generator.generate([PROMPTS[0]], Sampling(max_tokens=24))[0]
    stop = whole.text[10:14]
    tokens = list(generator.stream(PROMPTS[0], Sampling(max_tokens=24, stop=(stop,))))
    said = ""
    for token in tokens:
        said += token.text
        assert stop not in said
        assert whole.text.startswith(said)
    assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + ["stop"]
    assert said == whole.text[: whole.text.index(stop)]


def test_a_stream_that_is_closed_ends_its_sequence(shards: str) -> None:
    with opened(shards) as pipeline:
        generator = Generator.from_folder(pipeline, Path(shards), max_in_flight=1)
        stream = generator.stream(PROMPTS[0], Sampling(max_tokens=100))
        assert isinstance(next(stream), Token)
        assert pipeline.sequences == 1
        stream.close()  # type: ignore[attr-defined]
        assert pipeline.sequences == 0
        assert len(generator.generate(PROMPTS, Sampling(max_tokens=2))) == len(PROMPTS)
        assert wait_for(lambda: [each.sequences for each in pipeline.health(probe=False)] == [0, 0])


def test_what_the_model_cannot_take_is_refused_before_anything_is_computed(generator: Generator) -> None:
    before = generator.pipeline.counters
    for prompt, most, message in (
        ([], 1, "prompt: no tokens"),
        ([2048], 1, "a token id is not below 2048, the size of the vocabulary"),
        ([5] * 200, 57, "prompt of 200 tokens and max_tokens 57: together they exceed the 256"),
    ):
        with pytest.raises(InputError, match=message):
            generator.stream(prompt, Sampling(max_tokens=most))
        with pytest.raises(InputError, match=message):
            generator.generate([PROMPTS[0], prompt], Sampling(max_tokens=most))
    assert generator.pipeline.counters == before
    assert len(generator.generate([[5] * 200], Sampling(max_tokens=56))[0].tokens) == 56


def test_an_error_of_one_prompt_ends_the_others(shards: str) -> None:
    class Failing(LocalTransport):
        taken = 0

        def step(
            self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
        ) -> Future[Output]:
            self.taken += 1
            if self.taken >= 6:
                failed: Future[Output] = Future()
                failed.set_exception(WorkerError("out of memory"))
                return failed
            return super().step(route, step, inputs, timeout=timeout)

    transport = Failing(
        list(open_local(open_set(shards), stages=HALVES, compute=Compute(dtype="float32"))._workers.values())
    )
    with Pipeline(transport, HALVES) as pipeline:
        with pytest.raises(WorkerError, match="out of memory"):
            Generator.from_folder(pipeline, Path(shards)).generate(PROMPTS, Sampling(max_tokens=200))
        assert transport.taken < 50
        assert pipeline.sequences == 0


# ----------------------------------------------------------------------------------------------------- several at once
def test_while_one_sequence_is_in_the_second_stage_another_is_in_the_first(shards: str) -> None:
    spans: dict[str, list[tuple[float, float]]] = {"local-0": [], "local-1": []}
    transport = open_local(open_set(shards), stages=HALVES, compute=Compute(dtype="float32"))
    for name, worker in transport._workers.items():

        def timed(
            step: Step, inputs: torch.Tensor, name: str = name, run: Callable[..., Any] = worker.step
        ) -> Any:
            began = time.monotonic()
            found = run(step, inputs)
            spans[name].append((began, time.monotonic()))
            return found

        worker.step = timed  # type: ignore[method-assign]
    with Pipeline(transport, HALVES) as pipeline:
        generator = Generator.from_folder(pipeline, Path(shards))
        generator.generate([PROMPTS[0]], Sampling(max_tokens=8))
        assert not overlaps(spans)
        generator.generate(PROMPTS[:4], Sampling(max_tokens=16))
        assert overlaps(spans) > 5


def overlaps(spans: dict[str, list[tuple[float, float]]]) -> int:
    first, second = spans.values()
    return sum(begin < stop and start < end for begin, end in first for start, stop in second)


def test_no_more_sequences_are_in_flight_than_allowed(shards: str, pipeline: Pipeline) -> None:
    seen: list[int] = []
    generator = Generator.from_folder(pipeline, Path(shards), max_in_flight=2)

    def run() -> None:
        for _ in generator.stream(PROMPTS[0], Sampling(max_tokens=4)):
            seen.append(pipeline.sequences)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 24
    assert max(seen) <= 2


# ---------------------------------------------------------------------------------------------------------- a draft model
@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights with the same vocabulary: it mostly guesses wrong."""
    return made(tmp_path_factory.mktemp("other"), "llama", vocab_size=2048, num_hidden_layers=2)


def made(folder: Path, model_type: str, **more: Any) -> str:
    """A shard set of a small random model."""
    config = {**shrink(default_config(model_type)), **more}
    build(config, dtype=config.get("dtype") or "float32").save_pretrained(folder / "in")
    split(folder / "in", folder / "set", tensor_parallel_size=1)
    return str(folder / "set")


@pytest.mark.parametrize("guesses", [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 7))])
def test_a_draft_model_gives_the_same_tokens_in_fewer_trips(
    shards: str, pipeline: Pipeline, generator: Generator, guesses: int
) -> None:
    with opened(shards, WHOLE, dtype="bfloat16") as draft:
        drafted = Generator.from_folder(pipeline, Path(shards), draft=draft, draft_tokens=guesses)
        plain = generator.generate(PROMPTS, Sampling(max_tokens=33))
        found = drafted.generate(PROMPTS, Sampling(max_tokens=33))
        assert [each.tokens for each in found] == [each.tokens for each in plain]
        assert [each.text for each in found] == [each.text for each in plain]
        assert sum(each.trips for each in found) < 0.75 * sum(each.trips for each in plain)
        for each in found:
            assert sum(trip.tokens for trip in each.breakdowns) == 33
            assert all(trip.drafting > 0 for trip in each.breakdowns[1:-1])


@pytest.mark.slow
def test_a_draft_model_that_guesses_wrong_costs_trips_but_no_tokens(
    shards: str, other: str, pipeline: Pipeline, generator: Generator
) -> None:
    with opened(other, ((0, 2),)) as draft:
        drafted = Generator.from_folder(pipeline, Path(shards), draft=draft)
        plain = generator.generate(PROMPTS, Sampling(max_tokens=20))
        found = drafted.generate(PROMPTS, Sampling(max_tokens=20))
        assert [each.tokens for each in found] == [each.tokens for each in plain]
        assert sum(each.trips for each in found) > 0.9 * sum(each.trips for each in plain)


@pytest.mark.slow
def test_with_a_draft_model_a_text_ends_within_a_run_of_guesses_as_it_does_without(
    shards: str, pipeline: Pipeline, generator: Generator, tokenizer: Any
) -> None:
    plain = generator.generate([PROMPTS[0]], Sampling(max_tokens=24))[0]
    with opened(shards, WHOLE, dtype="bfloat16") as draft:
        drafted = Generator.from_folder(pipeline, Path(shards), draft=draft, draft_tokens=6)

        def same(sampling: Sampling) -> Completion:
            with_draft = drafted.generate([PROMPTS[0]], sampling)[0]
            without = generator.generate([PROMPTS[0]], sampling)[0]
            assert (with_draft.tokens, with_draft.text, with_draft.finish_reason) == (
                without.tokens,
                without.text,
                without.finish_reason,
            )
            return with_draft

        for most in range(1, 12):
            assert len(same(Sampling(max_tokens=most)).tokens) == most
        for token in dict.fromkeys(plain.tokens[:10]):
            assert same(Sampling(max_tokens=24, stop_token_ids=(token,))).finish_reason == "stop"
        for start in range(0, 12, 3):
            same(Sampling(max_tokens=24, stop=(plain.text[start : start + 3],)))


def test_a_draft_model_that_was_made_for_shorter_texts_guesses_as_far_as_it_goes(
    pipeline: Pipeline, generator: Generator, shards: str, tmp_path: Path
) -> None:
    short = made(tmp_path, "llama", vocab_size=2048, num_hidden_layers=2, max_position_embeddings=16)
    with opened(short, ((0, 2),)) as draft:
        drafted = Generator.from_folder(pipeline, Path(shards), draft=draft)
        found, plain = (each.generate(PROMPTS[:2], Sampling(max_tokens=30)) for each in (drafted, generator))
        assert [each.tokens for each in found] == [each.tokens for each in plain]


def test_a_draft_model_needs_the_likeliest_token(shards: str, pipeline: Pipeline) -> None:
    with opened(shards, WHOLE) as draft:
        generator = Generator.from_folder(pipeline, Path(shards), draft=draft)
        with pytest.raises(InputError, match=r"temperature is 0\.7, and a draft model was given"):
            generator.stream(PROMPTS[0], Sampling(temperature=0.7))
        with pytest.raises(InputError, match="draft_tokens is 0, expected 1 to 64"):
            Generator(pipeline, draft=draft, draft_tokens=0)


def test_a_draft_model_with_another_vocabulary_is_refused(
    shards: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    with opened(made(tmp_path, "llama", num_hidden_layers=2), ((0, 2),)) as draft:
        generator = Generator.from_folder(pipeline, Path(shards), draft=draft)
        with pytest.raises(InputError, match="a vocabulary of 259 tokens, the split model one of 2048"):
            generator.generate([PROMPTS[0]])


def test_a_model_that_cannot_take_positions_back_is_refused_with_a_draft_model(tmp_path: Path) -> None:
    folder = made(tmp_path, "qwen3_next", tie_word_embeddings=True)
    layers = read_manifest(folder).layers
    with opened(folder, ((0, layers),)) as pipeline, opened(folder, ((0, layers),)) as draft:
        assert Generator(pipeline).generate([[1, 2, 3]], Sampling(max_tokens=2))[0].trips == 2
        with pytest.raises(InputError, match="the split model cannot take back"):
            Generator(pipeline, draft=draft).generate([[1, 2, 3]])


@pytest.mark.slow
# ------------------------------------------------------------------------------------------- a few layers, lost workers
def test_a_few_layers_at_a_time_give_the_same_tokens(shards: str, generator: Generator) -> None:
    plain = generator.generate(PROMPTS[:2], Sampling(max_tokens=5))
    with Pipeline(
        LayerByLayer(open_set(shards), even_stages(LAYERS, 4), compute=Compute(dtype="float32")), 1
    ) as pipeline:
        found = Generator.from_folder(pipeline, Path(shards)).generate(PROMPTS[:2], Sampling(max_tokens=5))
        assert [each.tokens for each in found] == [each.tokens for each in plain]
        assert wait_for(lambda: pipeline.health()[0].sequences == 0)
        with pipeline.sequence() as sequence:
            first = sequence.feed(torch.tensor([[5, 6, 7]]), keep="all")
            sequence.feed(torch.tensor([[8, 9]]))
            sequence.rewind(3)
            again = sequence.feed(torch.tensor([[10]]))
        with pipeline.sequence() as sequence:
            whole = sequence.feed(torch.tensor([[5, 6, 7, 10]]), keep="all")
        assert torch.allclose(whole[:, :3], first, atol=1e-5)
        assert torch.allclose(whole[:, 3:], again, atol=1e-5)


def test_a_few_layers_at_a_time_say_where_a_cache_is_lost(shards: str) -> None:
    with LayerByLayer(
        open_set(shards), HALVES, compute=Compute(dtype="float32", max_sequences=1)
    ) as transport:
        route = list(transport.workers())
        ids = torch.tensor([[5, 6]])

        def run(sequence: str, past: int) -> Output:
            return transport.step(route, Step(sequence, past), ids, timeout=0).result()

        run("a", 0)
        run("b", 0)
        with pytest.raises(CacheLostError):
            run("a", 2)
        run("b", 2)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_takes_memory_is_what_is_not_mapped_as_it_lies(shards: str, dtype: str | None) -> None:
    manifest = read_manifest(shards)
    with load(shards) as shard:
        joined = {
            name for name, tensor in shard.view.tensors.items() if not is_mapped(tensor, shard._located[name])
        }
        expected = sum(
            tensor.nbytes * (2 if dtype else 1)
            for name, tensor in shard.view.tensors.items()
            if dtype or name in joined
        )
        assert joined
        assert memory_of_view(shard.view, manifest, dtype=dtype) == expected


def test_a_model_is_opened_whole_where_memory_suffices_and_layer_by_layer_where_not(
    shards: str, generator: Generator
) -> None:
    manifest = read_manifest(shards)
    with load(shards) as shard:
        whole = memory_of_view(shard.view, manifest, dtype="float32")
    assert choose_cuts(manifest, whole, dtype="float32") == WHOLE
    cuts = choose_cuts(manifest, whole - 1, dtype="float32")
    assert len(cuts) == 2
    plain = generator.generate(PROMPTS[:1], Sampling(max_tokens=4))[0].tokens
    for memory, kind in ((whole, LocalTransport), (whole // 3, LayerByLayer), (None, LocalTransport)):
        transport = open_fallback(open_set(shards), memory=memory, compute=Compute(dtype="float32"))
        assert isinstance(transport, kind)
        with Pipeline(transport, 1) as pipeline:
            found = Generator.from_folder(pipeline, Path(shards)).generate(
                PROMPTS[:1], Sampling(max_tokens=4)
            )
            assert found[0].tokens == plain
    with pytest.raises(
        WorkerError, match="even with 6 runs of layers, one after the other, the largest takes"
    ):
        open_fallback(open_set(shards), memory=1000, compute=Compute(dtype="float32"))
    with pytest.raises(InputError, match="dtype is float33; write float32"):
        open_fallback(open_set(shards), compute=Compute(dtype="float33"))
    assert free_memory() > 2**20


ANONYMOUS = """
import sys, threading
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.worker import Compute
from shardprep_runtime.workers.text.generate import Generator, Sampling
from shardprep_runtime.workers.local import open_fallback
from shardprep_runtime.workers.pipeline import Pipeline
import torch, transformers
from transformers.models.llama import modeling_llama

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

torch.set_num_threads(1)
before, peak, is_over = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not is_over.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
found = open_fallback(open_set(sys.argv[1]), memory=int(sys.argv[2]), compute=Compute(dtype="float32"))
with Pipeline(found, 1) as pipeline:
    print(*Generator(pipeline).generate([[1, 2, 3]], Sampling(max_tokens=3))[0].tokens)
is_over.set()
watcher.join()
print(1024 * (peak - before))
"""


@pytest.mark.slow
def test_where_memory_is_short_no_more_is_taken_than_a_run_of_layers_needs(tmp_path: Path) -> None:
    folder = made(
        tmp_path,
        "llama",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        head_dim=64,
        dtype="bfloat16",
    )
    manifest = read_manifest(folder)
    with load(folder) as shard:
        whole = memory_of_view(shard.view, manifest, dtype="float32")
    assert whole > 150 * 2**20

    def run(memory: int) -> tuple[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", ANONYMOUS, folder, str(memory)], capture_output=True, text=True, check=True
        )
        tokens, peak = done.stdout.splitlines()
        return tokens, int(peak)

    tokens, peak = run(whole)
    assert peak > 0.9 * whole
    for parts in (3, 6):
        less, peak = run(whole // parts)
        assert less == tokens
        assert peak < whole / parts + 40 * 2**20


class Losing(LocalTransport):
    """Real stages, whose workers are lost at steps that are given beforehand; spares as `LocalTransport` has them."""

    name = "losing"

    def __init__(self, workers: Sequence[Any], losses: dict[int, str]) -> None:
        super().__init__(workers)
        self.losses = losses
        self.lost: set[str] = set()
        self.taken = 0

    def workers(self) -> dict[str, WorkerInfo]:
        return {name: info for name, info in super().workers().items() if name not in self.lost}

    def step(
        self, route: Sequence[str], step: Step, inputs: torch.Tensor, *, timeout: float
    ) -> Future[Output]:
        self.taken += 1
        name = self.losses.get(self.taken)
        if name is not None:
            self.lost.add(name)
        for each in route:
            if each in self.lost:
                failed: Future[Output] = Future()
                failed.set_exception(WorkerLostError(f"{each} has ended", worker=each, is_certain=True))
                return failed
        return super().step(route, step, inputs, timeout=timeout)

    def health(self, worker: str, *, probe: bool, timeout: float) -> Health:
        if worker in self.lost:
            raise WorkerLostError(f"{worker} has ended", worker=worker, is_certain=True)
        return super().health(worker, probe=probe, timeout=timeout)


def test_tokens_are_the_same_after_spares_and_then_this_process_have_taken_over(
    shards: str, generator: Generator
) -> None:
    from shardprep_runtime.workers.worker import Worker, WorkerOptions

    sampled = Sampling(max_tokens=24, temperature=0.8, seed=3)
    plain = generator.generate(PROMPTS, sampled)
    with ExitStack() as stack:
        workers = []
        for name, pp_rank in (("first", 0), ("second", 1), ("spare", None)):
            options = WorkerOptions(
                shard_set=open_set(shards), stages=HALVES, pp_rank=pp_rank, compute=Compute(dtype="float32")
            )
            workers.append(Worker(name, options))
            stack.callback(workers[-1].close)
            workers[-1].prepare()
        stack.pop_all()
    losses = {7: "second", 31: "spare", 45: "first"}
    fallbacks: list[int] = []

    def fall_back() -> Any:
        fallbacks.append(1)
        return open_fallback(open_set(shards), compute=Compute(dtype="float32"))

    policy = Policy(probe_period=0)
    with Pipeline(Losing(workers, losses), HALVES, policy, fallback=fall_back) as pipeline:
        found = Generator.from_folder(pipeline, Path(shards)).generate(PROMPTS, sampled)
        kinds = [event.kind for event in pipeline.events if event.kind != "prefilled"]
    assert kinds == ["lost", "promoted", "lost", "fallback"]
    assert fallbacks == [1]
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert [each.text for each in found] == [each.text for each in plain]


def test_a_lost_worker_and_a_draft_model_go_together(shards: str, generator: Generator) -> None:
    plain = generator.generate(PROMPTS[:2], Sampling(max_tokens=30))
    transport = Losing(
        list(open_local(open_set(shards), stages=HALVES, compute=Compute(dtype="float32"))._workers.values()),
        {6: "local-1"},
    )
    with (
        opened(shards, WHOLE, dtype="bfloat16") as draft,
        Pipeline(
            transport,
            HALVES,
            Policy(probe_period=0),
            fallback=lambda: open_fallback(open_set(shards), compute=Compute(dtype="float32")),
        ) as pipeline,
    ):
        found = Generator.from_folder(pipeline, Path(shards), draft=draft).generate(
            PROMPTS[:2], Sampling(max_tokens=30)
        )
        assert pipeline.is_fallback
    assert [each.tokens for each in found] == [each.tokens for each in plain]


def test_a_folder_without_a_tokenizer_or_a_generation_config_will_do(other: str, tmp_path: Path) -> None:
    assert json.loads((Path(other) / "config.json").read_text())["vocab_size"] == 2048
    with opened(other, ((0, 2),)) as pipeline:
        generator = Generator.from_folder(pipeline, Path(other))
        assert generator.tokenizer is None
        assert len(generator.generate([[1, 2]], Sampling(max_tokens=3))[0].tokens) == 3


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
