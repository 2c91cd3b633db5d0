"""OpenAI's HTTP interface in front of a split model: what it answers, refuses and measures, and how it ends.

Most of it is asked of the application over real HTTP, in front of a real model that is split in this process; the rest of
`shardprep serve` with worker processes, of which some are killed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardprep.split import split
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.workers.http.app import MOST_BYTES, build_app
from shardprep_runtime.workers.local import open_local
from shardprep_runtime.workers.pipeline import Pipeline
from shardprep_runtime.workers.policy import Policy
from shardprep_runtime.workers.text.generate import Generator
from shardprep_runtime.workers.worker import Compute

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "prometheus_client", "uvicorn")),
    reason='needs the server: pip install "shardprep[serve]"',
)

TINY = Path(__file__).parents[1] / "data/tiny-llama"
STAGES = ((0, 2), (2, 6))
PROMPT = "def "
SECRET = "a secret of the tests"
KEY = "sk-tests"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}def {% endif %}"
)
LONG = {"prompt": PROMPT, "max_tokens": 250, "temperature": 0, "ignore_eos": True}


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert "Traceback" not in found["message"]
        message: str = found["message"]
        return message


@dataclass
class Client:
    port: int
    key: str | None = None

    def connect(self, path: str, body: object = None, **headers: str) -> http.client.HTTPConnection:
        """A connection over which a request was sent."""
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        if self.key is not None:
            sent.setdefault("Authorization", f"Bearer {self.key}")
        found = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        found.request("GET" if raw is None else "POST", path, raw, sent)
        return found

    def ask(self, path: str, body: object = None, **headers: str) -> Answered:
        with contextlib.closing(self.connect(path, body, **headers)) as connection:
            found = connection.getresponse()
            return Answered(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())

    def complete(self, **body: object) -> Any:
        found = self.ask("/v1/completions", {"prompt": PROMPT, "temperature": 0, **body})
        assert found.status == 200, found.body
        return found.json

    @contextlib.contextmanager
    def stream(self, path: str = "/v1/completions", **body: object) -> Iterator[Iterator[Any]]:
        """The events of a stream as they come; None for [DONE]. At the end the connection is cut."""
        with contextlib.closing(self.connect(path, {**body, "stream": True})) as connection:
            answer = connection.getresponse()
            with contextlib.closing(answer):
                assert answer.status == 200, answer.read()
                assert answer.headers["Content-Type"].startswith("text/event-stream")
                yield events(answer)


def events(answer: http.client.HTTPResponse) -> Iterator[Any]:
    while line := answer.readline():
        assert line.startswith(b"data: "), line
        assert answer.readline() == b"\n"
        yield None if line == b"data: [DONE]\n" else json.loads(line[6:])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("serve") / "tiny"
    split(TINY, found, tensor_parallel_size=2)
    return found


@pytest.fixture(scope="module")
def greedy() -> list[int]:
    """What transformers says of the original checkpoint."""
    import torch
    import transformers

    auto: Any = transformers
    model = auto.AutoModelForCausalLM.from_pretrained(TINY)
    given = auto.AutoTokenizer.from_pretrained(TINY)(PROMPT, return_tensors="pt")
    torch.set_num_threads(1)
    found = model.generate(**given, max_new_tokens=24, do_sample=False)
    tokens: list[int] = found[0, given.input_ids.shape[1] :].tolist()
    return tokens


@pytest.fixture(scope="module")
def generator(shards: Path) -> Iterator[Generator]:
    policy = Policy(probe_period=0)  # nobody probes but who is asked to
    with Pipeline(
        open_local(open_set(str(shards)), stages=STAGES, compute=Compute(threads=1)), STAGES, policy
    ) as pipeline:
        yield Generator.from_folder(pipeline, shards, max_in_flight=4)


@contextlib.contextmanager
def serving(app: Any) -> Iterator[int]:
    """The port at which uvicorn serves the application, in a thread."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def app(generator: Generator) -> Any:
    return build_app(generator, model="tiny", secret=SECRET)


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[Client]:
    with serving(app) as port:
        yield Client(port)


def settled(generator: Generator, seconds: float = 20) -> None:
    """Wait until nothing is in flight."""
    end = time.monotonic() + seconds
    while generator.pipeline.sequences:
        assert time.monotonic() < end, "a sequence goes on"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------- completions
def test_a_completion_is_that_of_transformers(
    client: Client, greedy: list[int], generator: Generator
) -> None:
    found = client.complete(max_tokens=24, return_token_ids=True)
    (choice,) = found["choices"]
    assert choice["token_ids"] == greedy
    assert choice["prompt_token_ids"] == generator.encode(PROMPT)
    assert choice["text"] == generator.tokenizer.decode(greedy, skip_special_tokens=True)  # type: ignore[union-attr]
    assert choice["finish_reason"] == "length"
    prompt = len(choice["prompt_token_ids"])
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 24, "total_tokens": prompt + 24}
    assert (found["object"], found["model"]) == ("text_completion", "tiny")
    again = client.complete(prompt=choice["prompt_token_ids"], max_tokens=24)
    assert again["choices"][0]["text"] == choice["text"]
    assert again["id"] != found["id"]


def test_several_prompts_come_back_in_their_order(client: Client) -> None:
    prompts = ["def ", "class ", "import ", "return ", "for ", "while "]
    alone = [client.complete(prompt=each, max_tokens=6)["choices"][0]["text"] for each in prompts]
    found = client.complete(prompt=prompts, max_tokens=6)["choices"]
    assert [each["index"] for each in found] == list(range(6))
    assert [each["text"] for each in found] == alone


def test_a_seed_gives_the_same_draw_again(client: Client) -> None:
    def drawn(**how: object) -> str:
        text: str = client.complete(max_tokens=20, temperature=1.5, **how)["choices"][0]["text"]
        return text

    assert drawn(seed=7) == drawn(seed=7)
    assert len({drawn() for _ in range(3)}) > 1
    assert drawn(top_k=1) == client.complete(max_tokens=20)["choices"][0]["text"]


def test_a_stop_string_ends_a_text_and_is_not_said(client: Client) -> None:
    whole = client.complete(max_tokens=24)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:4]
    (choice,) = client.complete(max_tokens=24, stop=[stop, "never said"])["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_stream_says_what_the_answer_in_one_piece_does(client: Client) -> None:
    body = {"prompt": ["def ", "class "], "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    whole = client.complete(**body)
    texts, tokens, reasons, prompts = ["", ""], [[], []], [None, None], [None, None]  # type: ignore[var-annotated]
    with client.stream(**body, stream_options={"include_usage": True}) as found:
        *chunks, last, done = list(found)
    assert done is None
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for chunk in chunks:
        assert (chunk["id"], chunk["created"]) == (last["id"], last["created"])
        assert (chunk["object"], chunk["usage"]) == ("text_completion", None)
        (choice,) = chunk["choices"]
        i = choice["index"]
        assert reasons[i] is None
        texts[i] += choice["text"]
        tokens[i] += choice["token_ids"]
        reasons[i] = choice["finish_reason"]
        prompts[i] = prompts[i] or choice.get("prompt_token_ids")
    assert texts == [each["text"] for each in whole["choices"]]
    assert tokens == [each["token_ids"] for each in whole["choices"]]
    assert prompts == [each["prompt_token_ids"] for each in whole["choices"]]
    assert reasons == ["length", "length"]


def test_a_stream_comes_while_it_is_made(client: Client, generator: Generator) -> None:
    with client.stream(**LONG) as found:
        first = next(found)
        assert generator.pipeline.sequences == 1
        assert first["choices"][0]["finish_reason"] is None
        assert "usage" not in first
    settled(generator)


# ---------------------------------------------------------------------------------------------------------------- chats
def test_a_chat_goes_through_the_models_template(
    client: Client, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator.tokenizer, "chat_template", TEMPLATE)
    body = {"messages": [{"role": "user", "content": "# a"}], "temperature": 0, "max_completion_tokens": 12}
    found = client.ask("/v1/chat/completions", {**body, "return_token_ids": True})
    assert found.status == 200, found.body
    whole = found.json
    (choice,) = whole["choices"]
    same = client.complete(prompt=whole["prompt_token_ids"], max_tokens=12)
    assert choice["message"] == {
        "role": "assistant",
        "content": same["choices"][0]["text"],
        "refusal": None,
    }
    assert whole["usage"] == same["usage"]
    assert whole["object"] == "chat.completion"
    assert generator.tokenizer.decode(whole["prompt_token_ids"]).endswith("# a\ndef ")  # type: ignore[union-attr]
    with client.stream("/v1/chat/completions", **body) as chunks:
        first, *rest, done = list(chunks)
    assert done is None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"
    assert (
        "".join(each["choices"][0]["delta"].get("content", "") for each in rest)
        == choice["message"]["content"]
    )
    assert rest[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_without_a_limit_ends_where_the_context_does(
    client: Client, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator.tokenizer, "chat_template", TEMPLATE)
    content = "x = 1\n" * 55
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "ignore_eos": True}
    found = client.ask("/v1/chat/completions", body).json
    assert found["usage"]["total_tokens"] == generator.max_positions == 256


def test_what_a_template_refuses_is_said(
    client: Client, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"messages": [{"role": "system", "content": "a"}]}
    found = client.ask("/v1/chat/completions", body)
    assert found.status == 400
    assert "this model has no chat template" in found.error
    monkeypatch.setattr(generator.tokenizer, "chat_template", TEMPLATE)
    found = client.ask("/v1/chat/completions", body)
    assert found.status == 400
    assert found.error == "the model's chat template refuses these messages: no system here"


def test_a_model_without_a_tokenizer_takes_and_gives_tokens(generator: Generator, greedy: list[int]) -> None:
    bare = Generator(generator.pipeline)
    with serving(build_app(bare, model="bare")) as port:
        client = Client(port)
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/completions", {"prompt": [[1], [2]], "stop": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            found = client.ask(path, body)
            assert found.status == 400
            assert "tokenizer" in found.error
        (choice,) = client.complete(
            prompt=generator.encode(PROMPT), max_tokens=8, return_token_ids=True, ignore_eos=True
        )["choices"]
        assert (choice["text"], choice["token_ids"]) == ("", greedy[:8])


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"prompt": PROMPT, "max_tokens": 1000}, 400, "together they exceed the 256"),
        ({"prompt": [1, 2048]}, 400, "not below 2048"),
        ({"prompt": [1, -1]}, 400, "not below 2048"),
        ({"prompt": PROMPT, "n": 2}, 400, "n: 2 was asked for"),
        ({"prompt": PROMPT, "model": "gpt"}, 404, "no model gpt; there is tiny"),
        ({"prompt": PROMPT, "stream": True, "max_tokens": 1000}, 400, "together they exceed the 256"),
        (b"{", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b'{"prompt": "\xff"}', 400, "the body is not JSON"),
        (b'{"prompt": "\\ud800"}', 400, "half of a character"),
        (b"[]", 400, "the body is not a JSON object"),
        (b"", 400, "the body is not JSON"),
        (b'"' + b"x" * MOST_BYTES + b'"', 413, "a body of more than 16,777,216 bytes"),
    ],
)
def test_requests_that_are_none_are_refused(client: Client, body: Any, status: int, reason: str) -> None:
    found = client.ask("/v1/completions", body)
    assert found.status == status
    assert reason in found.error


def test_other_kinds_of_content_other_paths_and_methods_are_refused(client: Client) -> None:
    body = {"prompt": PROMPT}
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert client.ask("/v1/completions", body, Content_Type=kind).status == 415
    assert client.ask("/v1/completions", body, Content_Type="application/json; charset=utf-8").status == 200
    for path, sent, status in (
        ("/v1/other", None, 404),
        ("/v1/completions", None, 405),
        ("/health", body, 405),
    ):
        found = client.ask(path, sent)
        assert found.status == status
        assert found.error


def test_models_are_listed(client: Client) -> None:
    found = client.ask("/v1/models").json
    assert [each["id"] for each in found["data"]] == ["tiny"]


# --------------------------------------------------------------------------------------------------------- who goes away
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_sequence(
    client: Client, generator: Generator, stream: bool
) -> None:
    def generated() -> float:
        return samples(client)["shardprep_generated_tokens_total"]

    before = generated()
    with contextlib.closing(client.connect("/v1/completions", {**LONG, "stream": stream})) as connection:
        if stream:
            with contextlib.closing(connection.getresponse()) as answer:
                assert answer.readline().startswith(b"data: ")
        else:
            while generated() < before + 3:
                time.sleep(0.005)
    settled(generator)
    assert 0 < generated() - before < LONG["max_tokens"]  # type: ignore[operator]


def test_more_than_may_wait_are_asked_to_come_again(generator: Generator) -> None:
    alone = Generator(generator.pipeline, generator.tokenizer, config=None, max_in_flight=1)
    with serving(build_app(alone, model="tiny", max_waiting=0)) as port:
        client = Client(port)
        with client.stream(**LONG) as found:
            next(found)
            refused = client.ask("/v1/completions", {"prompt": PROMPT})
            assert refused.status == 429
            assert "1 sequences are in flight and 0 wait" in refused.error
            assert int(refused.headers["retry-after"]) >= 1
        settled(generator)
        assert client.complete(max_tokens=2)["choices"]


def test_who_waits_has_his_turn(generator: Generator) -> None:
    alone = Generator(generator.pipeline, generator.tokenizer, max_in_flight=1)
    with serving(build_app(alone, model="tiny", max_waiting=8)) as port:
        client = Client(port)
        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            asked = [threads.submit(client.complete, max_tokens=5) for _ in range(6)]
            assert len({each.result()["choices"][0]["text"] for each in asked}) == 1


# ------------------------------------------------------------------------------------------------------- health, metrics
def samples(client: Client) -> dict[str, float]:
    """Of /metrics: name{labels} -> value."""
    from prometheus_client.parser import text_string_to_metric_families

    found = client.ask("/metrics")
    assert found.status == 200
    assert found.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(found.body.decode())
        for sample in family.samples
    }


def test_health_is_a_forward_of_every_stage(client: Client, generator: Generator, shards: Path) -> None:
    before = generator.pipeline.counters.get("probes", 0)
    found = client.ask("/health")
    assert found.status == 200
    said = found.json
    assert said["status"] == "ok"
    assert [tuple(each["layers"]) for each in said["stages"]] == list(STAGES)
    assert generator.pipeline.counters["probes"] == before + 2
    assert said["manifest_digest"] == generator.pipeline.manifest_digest


def test_who_asks_for_health_at_once_shares_a_probe(app: Any, generator: Generator) -> None:
    front = app.state.front

    async def ask() -> list[Any]:
        front.control._probe = None
        return await asyncio.gather(*(front.control.probed() for _ in range(5)))

    before = generator.pipeline.counters.get("probes", 0)
    found = asyncio.run(ask())
    front.control._probe = None
    assert all(each is found[0] for each in found)
    assert generator.pipeline.counters["probes"] == before + 2


def test_metrics_count_what_was_done(client: Client, generator: Generator) -> None:
    before = samples(client)
    found = client.complete(max_tokens=5)
    client.ask("/v1/completions", {"prompt": PROMPT, "n": 2})
    after = samples(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("shardprep_requests_total{path=/v1/completions}{status=200}") == 1
    assert grown("shardprep_requests_total{path=/v1/completions}{status=400}") == 1
    assert grown("shardprep_generated_tokens_total") == 5
    assert grown("shardprep_prompt_tokens_total") == found["usage"]["prompt_tokens"]
    assert grown("shardprep_time_to_first_token_seconds_count") == 1
    assert grown("shardprep_time_per_token_seconds_count") == 4
    assert grown("shardprep_steps_total") == 5
    assert after["shardprep_workers{stage=0}"] == after["shardprep_workers{stage=1}"] == 1
    assert after["shardprep_workers{stage=spare}"] == 0
    assert after["shardprep_events_total{kind=promoted}"] == 0
    assert after["shardprep_sequences_in_flight"] == after["shardprep_sequences_waiting"] == 0
    with client.stream(**LONG) as events:
        next(events)
        assert samples(client)["shardprep_sequences_in_flight"] == 1
    settled(generator)


# -------------------------------------------------------------------------------------------------------------- control
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Basic YTpi"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer another secret"}, 403),
        ({"Authorization": "Bearer s\xe9cret"}, 403),
        ({"Authorization": f"Bearer {SECRET}"}, 200),
        ({"Authorization": f"bearer {SECRET}"}, 200),
    ],
)
def test_control_needs_the_secret(client: Client, headers: dict[str, str], status: int) -> None:
    found = client.ask("/control/workers", **headers)
    assert found.status == status
    assert ("www-authenticate" in found.headers) == (status == 401)
    assert SECRET.encode() not in found.body


def test_control_shows_and_probes_workers(generator: Generator, client: Client) -> None:
    said = client.ask("/control/workers", Authorization=f"Bearer {SECRET}").json
    assert said["route"] == [each["name"] for each in said["workers"]]
    assert [each["pid"] for each in said["workers"]] == [os.getpid()] * 2
    probed = client.ask("/control/probe", b"", Authorization=f"Bearer {SECRET}")
    assert probed.status == 200
    assert [each["info"]["pp_rank"] for each in probed.json["stages"]] == [0, 1]


def test_without_a_secret_nobody_may_use_control(generator: Generator) -> None:
    with serving(build_app(generator, model="tiny")) as port:
        for secret in ("", "None", SECRET):
            found = Client(port).ask("/control/drain", b"", Authorization=f"Bearer {secret}")
            assert found.status == 403
            assert "SHARDPREP_SECRET" in found.error
        assert Client(port).complete(max_tokens=1)


def test_an_api_key_is_asked_of_v1_alone(generator: Generator) -> None:
    with serving(build_app(generator, model="tiny", api_key=KEY)) as port:
        for client in (Client(port), Client(port, "another")):
            for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": PROMPT})):
                found = client.ask(path, body)
                assert found.status == 401
                assert found.error
        assert Client(port).ask("/health").status == 200
        assert Client(port, KEY).complete(max_tokens=1)
        assert Client(port, KEY).ask("/v1/models").status == 200


def test_a_drain_finishes_what_runs_and_takes_no_more(generator: Generator) -> None:
    with serving(build_app(generator, model="tiny", secret=SECRET)) as port:
        client = Client(port)
        with client.stream(**{**LONG, "max_tokens": 60}) as found:
            next(found)
            said = client.ask("/control/drain", b"", Authorization=f"Bearer {SECRET}").json
            assert (said["status"], said["running"]) == ("draining", 1)
            refused = client.ask("/v1/completions", {"prompt": PROMPT})
            assert refused.status == 503
            assert "being drained" in refused.error
            assert "retry-after" in refused.headers
            health = client.ask("/health")
            assert (health.status, health.json["status"]) == (503, "draining")
            *_, last, done = list(found)
        assert done is None
        assert last["choices"][0]["finish_reason"] == "length"


def test_the_end_of_the_server_ends_what_runs(generator: Generator) -> None:
    with contextlib.ExitStack() as stack:
        with serving(build_app(generator, model="tiny")) as port:
            events = stack.enter_context(Client(port).stream(**{**LONG, "max_tokens": 40}))
            next(events)
        assert list(events)[-1] is None  # within its grace
    settled(generator)


# ----------------------------------------------------------------------------------------------------- OpenAI's own client
def test_openais_client_understands_it(
    client: Client, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai: Any = pytest.importorskip("openai")
    monkeypatch.setattr(generator.tokenizer, "chat_template", TEMPLATE)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0) as api:
        assert [each.id for each in api.models.list()] == ["tiny"]
        whole = api.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12)
        assert whole.usage.completion_tokens == 12
        parts = api.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12, stream=True)
        assert "".join(each.choices[0].text for each in parts) == whole.choices[0].text
        messages = [{"role": "user", "content": "# a"}]
        chat = api.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
        options = {"include_usage": True}
        chunks = list(
            api.chat.completions.create(
                model="tiny",
                messages=messages,
                temperature=0,
                max_tokens=12,
                stream=True,
                stream_options=options,
            )
        )
        said = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
        assert said == chat.choices[0].message.content
        assert chunks[-1].usage == chat.usage
        with pytest.raises(openai.BadRequestError, match="n: 2 was asked for") as error:
            api.completions.create(model="tiny", prompt=PROMPT, n=2)
        assert error.value.param == "n"
        with pytest.raises(openai.NotFoundError):
            api.completions.create(model="gpt", prompt=PROMPT)


# ---------------------------------------------------------------------------------------------------------- the command
class Served:
    """`shardprep serve` in a process of its own, with workers in theirs."""

    def __init__(self, shards: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from shardprep.cli import main; main()"),
                *("serve", str(shards), "--port", "0", *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        self.lines: list[str] = []
        self.port = 0
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if " is served at http://" in line:
                self.port = int(line.rpartition(":")[2])
                self._ready.set()
        self._ready.set()

    def client(self, key: str | None = None) -> Client:
        assert self._ready.wait(120)
        assert self.port, self.lines
        return Client(self.port, key)

    def wait_for(self, words: str, seconds: float = 60) -> str:
        """The line on stderr that has these words."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.lines:
                if words in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{words!r} was not said:\n" + "\n".join(self.lines))

    def pids(self, client: Client) -> dict[str, int]:
        """Of the workers, by name."""
        said = client.ask("/control/workers", Authorization=f"Bearer {SECRET}").json
        return {each["name"]: each["pid"] for each in said["workers"]}

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def has_ended(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return True
    return False


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_stream_is_replaced_by_the_spare(
    shards: Path, greedy: list[int]
) -> None:
    with Served(shards, "--stages", "2", "--spares", "1", environment={"SHARDPREP_SECRET": SECRET}) as served:
        client = served.client()
        undisturbed = client.complete(**{**LONG, "return_token_ids": True})["choices"][0]
        assert undisturbed["token_ids"][:24] == greedy
        served.wait_for("spare: worker spare")
        pids = served.pids(client)
        with client.stream(**LONG) as found:
            text = "".join(next(found)["choices"][0]["text"] for _ in range(5))
            os.kill(pids["stage-1"], signal.SIGKILL)
            for chunk in found:
                if chunk is None:
                    break
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["text"]
            else:
                raise AssertionError("the stream was cut short")
        assert text == undisturbed["text"]
        served.wait_for("worker stage-1 (stage 1) was lost")
        served.wait_for("spare spare took stage 1")
        served.wait_for("positions again")
        counted = samples(client)
        assert counted["shardprep_events_total{kind=lost}"] == 1
        assert counted["shardprep_events_total{kind=promoted}"] == 1
        assert client.ask("/health").status == 200
        # a signal in the middle of a stream: what was begun is finished
        with client.stream(**{**LONG, "max_tokens": 40}) as found:
            next(found)
            alive = served.pids(client)
            served.process.send_signal(signal.SIGTERM)
            assert list(found)[-1] is None
        assert served.process.wait(30) == 0, served.lines
        assert all(has_ended(pid) for pid in alive.values())
        assert not [line for line in served.lines if "Traceback" in line], served.lines


@pytest.mark.slow
def test_where_nobody_can_take_over_a_stream_is_cut_and_says_why(shards: Path) -> None:
    options = ("--stages", "2", "--no-replace", "--no-fallback", "--grace", "1s", "--api-key", KEY)
    with Served(shards, *options, environment={"SHARDPREP_SECRET": SECRET}) as served:
        client = served.client(KEY)
        pids = served.pids(client)
        with client.stream(**LONG) as found:
            next(found)
            os.kill(pids["stage-0"], signal.SIGKILL)
            *_, last = list(found)
        assert last is not None
        assert set(last) == {"error"}
        assert last["error"]["type"] == "server_error"
        assert "no worker for stage 0" in last["error"]["message"]
        served.wait_for("worker stage-0 (stage 0) was lost")
        for path, body in (("/v1/completions", {"prompt": PROMPT}), ("/health", None)):
            refused = client.ask(path, body)
            assert refused.status == 503
            assert b"stage 0" in refused.body
            assert "retry-after" in refused.headers
        assert samples(client)["shardprep_streams_cut_total"] == 1
        assert served.end(signal.SIGINT) == 0, served.lines
        assert all(has_ended(pid) for pid in pids.values())


@pytest.mark.slow
def test_workers_from_elsewhere_join_by_the_secret(shards: Path, greedy: list[int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        master = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--stages", "0-1,2-5", "--workers", "elsewhere", "--master", master)
    environment = {"SHARDPREP_SECRET": SECRET}
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(Served(shards, *options, environment=environment))
        for number, secret in (("0", SECRET), ("1", SECRET[::-1]), ("1", SECRET)):
            worker = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from shardprep.cli import main; main()"),
                    *(
                        "worker",
                        "--manifest",
                        str(shards),
                        "--pp-rank",
                        number,
                        "--master",
                        master,
                        "--no-reconnect",
                    ),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "SHARDPREP_SECRET": secret},
            )
            stack.callback(worker.communicate)
            stack.callback(worker.kill)
            if secret != SECRET:
                assert worker.wait(60) == 1
                assert worker.stdout is not None
                assert b"the secret is another one" in worker.stdout.read()
                assert not served.port
        client = served.client()
        served.wait_for(
            f"waiting for stage 1 (layers 2 to 5): shardprep worker --manifest {shards} --pp-rank 1"
        )
        tokens = client.complete(max_tokens=24, return_token_ids=True)["choices"][0]["token_ids"]
        assert tokens == greedy
        pids = served.pids(client)
        assert served.end() == 0, served.lines
        assert all(has_ended(pid) for pid in pids.values())


@pytest.mark.slow
def test_a_signal_ends_it_while_it_waits_for_workers(shards: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with socket.create_server(("127.0.0.1", 0)) as free:
            master = f"127.0.0.1:{free.getsockname()[1]}"
        options = ("--stages", "2", "--workers", "elsewhere", "--master", master)
        with Served(shards, *options, environment={"SHARDPREP_SECRET": SECRET}) as served:
            served.wait_for("waiting for stage 1")
            assert served.end(number) == 0
            assert not [line for line in served.lines if "Traceback" in line], served.lines


def serve(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from shardprep.cli import main; main()", "serve", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def test_an_address_that_cannot_be_had_is_refused_before_anything_is_started(shards: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, reason in (
            (("--port", port), "Address already in use; use an address of this machine"),
            (("--host", "0.0.0.0"), "all addresses of this machine"),
            (("--host", "no.such.host.invalid"), "no such host"),
        ):
            done = serve(str(shards), *options)
            assert done.returncode == 2, done.stderr
            assert reason in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "secret", "reason"),
    [
        (("--master", "10.0.0.1:1"), "", "add --workers elsewhere"),
        (("--workers", "elsewhere", "--master", "here"), SECRET, "here is not an address; write host:port"),
        (("--workers", "elsewhere"), "", "SHARDPREP_SECRET is not set"),
        (("--port", "0"), "short", "the secret has 5 characters, expected at least 16"),
        (("--stages", "7"), "", "6 layers cannot fill 7 pipeline stages"),
    ],
)
def test_what_cannot_be_served_is_refused(
    shards: Path, options: tuple[str, ...], secret: str, reason: str
) -> None:
    done = serve(str(shards), "--port", "0", *options, SHARDPREP_SECRET=secret)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
