"""Serve a shard set with Ray Serve: a replica is a group of CPU workers, each of which starts from its own shard.

    serve run shardprep_runtime.workers.ray_serve:build source=s3://bucket/llama tensor_parallel_size=2

The model is transformers', cut by its own tensor parallelism over gloo. A replica answers OpenAI's /v1/completions, one
request at a time, and /health by asking the model. It is for small models and for trying things out; what serves many
users is an engine (ray.serve.llm, see ray_llm.py).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..engines.transformers_state import transformers_state
from ..errors import InputError, ProblemError, quote
from ..format.manifest import TRANSFORMERS
from ..format.view import Place, plan_view
from ..shard import options as words
from ..shard.prefetch import Prefetch
from ..shard.shard_set import ShardSet
from .http import openai as openai_api
from .http.openai import Answer, Choice, FinishReason, RequestError

if TYPE_CHECKING:
    import torch
    from ray.serve import Application

FORWARD_SECONDS: Final = 20
"""After which a model that was asked for one token counts as hung; below Serve's own limit for a health check."""

CANNOT: Final[Mapping[str, tuple[object, ...]]] = {
    "ignore_eos": (False,),
    "stop": ([],),
    "stop_token_ids": ([],),
    "stream": (False,),
    "stream_options": (),
    "top_k": (0, -1),
}
"""What the front end of split workers can and these cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `build` can be told, by `serve run` (name=value) or as `args` of a Serve config.

    shard_set               the shard set, the same on every node, by the words of shard/options.py
    model                   its name in requests; default: the last part of the source
    dtype                   of the model: float32, bfloat16, ...; default: that of its config
    num_replicas            groups, each of `tensor_parallel_size` workers of `cpus_per_worker` CPUs
    request_timeout_s       after which a request counts as hung, and its group is replaced
    health_check_period_s   between two questions to the model
    """

    shard_set: ShardSet
    model: str | None = None
    tensor_parallel_size: int = 1
    dtype: str | None = None
    num_replicas: int = 1
    cpus_per_worker: float = 1
    request_timeout_s: float = 600
    health_check_period_s: float = 5

    @property
    def name(self) -> str:
        return self.model or self.shard_set.source.rstrip("/").rpartition("/")[2]


def read_options(args: Mapping[str, object]) -> Options:
    """`args` as a Serve config or a command line gives them. Raises InputError for what is none, or no such value."""
    if not args.get("source"):
        raise InputError("source: give the folder or URI of a shard set (source=s3://bucket/prefix)")
    found = words.read_options(Options, args, from_text=True)
    for name, least in (("tensor_parallel_size", 1), ("num_replicas", 1), ("cpus_per_worker", 0)):
        if getattr(found, name) < least:
            raise InputError(f"{name} is {getattr(found, name)}, expected at least {least}")
    return found


def build(args: dict[str, Any]) -> Application:
    """The Serve application; `args` are `Options` by name."""
    from ray import serve

    options = read_options(args)
    deployment = serve.deployment(
        serve.ingress(build_api)(WorkerGroup),
        name=WorkerGroup.__name__,
        num_replicas=options.num_replicas,
        # the group itself only waits for its workers, whose places are set aside together
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[{"CPU": options.cpus_per_worker}] * options.tensor_parallel_size,
        placement_group_strategy="PACK",
        health_check_period_s=options.health_check_period_s,
    )
    found: Application = deployment.bind(options)
    return found


def build_api() -> Any:
    """The replica's HTTP, made within it."""
    from fastapi import FastAPI
    from ray import serve

    app = FastAPI(title="shardprep")

    def group() -> WorkerGroup:
        found: WorkerGroup = serve.get_replica_context().servable_object
        return found

    async def health() -> Any:
        return await group().health()

    async def models() -> Any:
        return group().models()

    async def completions(body: dict[str, Any]) -> Any:
        return await group().completions(body)

    app.get("/health")(health)
    app.get("/v1/models")(models)
    app.post("/v1/completions")(completions)
    return app


# ------------------------------------------------------------------------------------------------------- the replica
@dataclass(frozen=True, slots=True)
class Wanted:
    """A completion that is asked for; greedy where the temperature is 0."""

    prompt: str | tuple[int, ...]
    max_tokens: int = openai_api.DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    model: str | None = None
    return_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class Completed:
    """A completion."""

    text: str
    tokens: tuple[int, ...]
    prompt: tuple[int, ...]
    """Its tokens."""
    is_stopped: bool
    """The model has ended it, not `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker that can answer."""

    rank: int
    pid: int
    node: str
    nbytes: int
    """Bytes of its shard."""
    bytes_fetched: int
    """Of them, those that it brought itself; the others were in the host's cache, or on its disk."""
    seconds: Mapping[str, float]
    """By stage, in order."""

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        return (
            f"rank {self.rank} ready in {sum(self.seconds.values()):.2f} s: {stages}; "
            f"{self.nbytes:,} bytes, {self.bytes_fetched:,} of them fetched"
        )


class GroupError(ProblemError):
    """A worker of the group has ended or hangs; the replica has to be replaced."""


class WorkerGroup:
    """A replica: one worker for each tensor rank, which all do every request together."""

    def __init__(self, options: Options) -> None:
        """Raises what makes a start hopeless (manifest, layout) before any worker is started."""
        import ray

        # whatever the revision is moved to meanwhile, all ranks start from this manifest
        shard_set, manifest = options.shard_set.pinned()
        plan_view(manifest, Place(0, options.tensor_parallel_size, engine=TRANSFORMERS))
        self._options = replace(options, shard_set=shard_set)
        self._created = int(time.time())
        self._lost: str | None = None
        self._turn = asyncio.Lock()
        self._asked: asyncio.Future[Any] | None = None
        actor = ray.remote(num_cpus=options.cpus_per_worker)(Worker)
        self._workers = [
            actor.remote(self._options, rank, time.time()) for rank in range(options.tensor_parallel_size)
        ]
        meeting = _first_failure_or_all([each.prepare.remote() for each in self._workers])[0]
        self.ready: list[Ready] = _first_failure_or_all(
            [each.start.remote(meeting) for each in self._workers]
        )
        for each in self.ready:
            print(f"shardprep: {each}", flush=True)

    async def check_health(self) -> None:
        """Serve's question, which replaces the replica where this raises."""
        await self._check()

    async def _check(self) -> None:
        """Have the model compute one token, unless it is busy with a request, which has a time limit of its own."""
        if self._lost is not None or not self._turn.locked():
            await self._ask("forward", seconds=FORWARD_SECONDS)

    async def _ask(self, method: str, *args: object, seconds: float) -> Any:
        """What rank 0 answers once all ranks have done it, one request after the other. Raises GroupError."""
        await self._turn.acquire()
        self._asked = asyncio.ensure_future(self._answer(method, *args, seconds=seconds))
        self._asked.add_done_callback(lambda _: self._turn.release())
        # whoever asked may go away, but the workers go on: the next has its turn when they are done
        return await asyncio.shield(self._asked)

    async def _answer(self, method: str, *args: object, seconds: float) -> Any:
        if self._lost is not None:
            raise GroupError(self._lost)
        from ray.exceptions import RayActorError

        try:
            asked = asyncio.gather(*(getattr(each, method).remote(*args) for each in self._workers))
            return (await asyncio.wait_for(asked, seconds))[0]
        except InputError as error:
            raise getattr(error, "cause", error) from None  # of Ray's, which prints a traceback of the worker
        except RayActorError as error:
            self._lost = f"a worker has ended: {str(error).splitlines()[0]}"
        except TimeoutError:
            self._lost = f"a worker gave no answer in {seconds:g} seconds"
        except Exception as error:  # noqa: BLE001 - whatever one rank raises leaves the others waiting for it
            self._lost = f"a worker has failed: {getattr(error, 'cause', error)}"
        raise GroupError(self._lost)

    # ---------------------------------------------------------------------------------------------------------- HTTP
    async def health(self) -> Any:
        try:
            await self._check()
        except GroupError as error:
            return _refusal(503, str(error), "unhealthy")
        return {
            "status": "ok",
            "model": self._options.name,
            "manifest_digest": self._options.shard_set.digest,
            "pid": os.getpid(),
            "workers": [asdict(each) for each in self.ready],
        }

    def models(self) -> Any:
        return openai_api.models(self._options.name, self._created)

    async def completions(self, body: dict[str, Any]) -> Any:
        try:
            wanted = read_request(body)
            openai_api.check_model(wanted.model, self._options.name)
            found: Completed = await self._ask("complete", wanted, seconds=self._options.request_timeout_s)
        except RequestError as error:
            return _refusal(error.status, str(error), param=error.param, code=error.code)
        except InputError as error:
            return _refusal(400, str(error))
        except GroupError as error:
            return _refusal(503, f"{error}; the replica is being replaced, try again", "unavailable")
        reason: FinishReason = "stop" if found.is_stopped else "length"
        answer = Answer(model=self._options.name, with_token_ids=wanted.return_token_ids)
        return answer.whole([Choice(found.prompt, found.text, list(found.tokens), reason)])


def read_request(body: Mapping[str, Any]) -> Wanted:
    """A request to /v1/completions. Raises RequestError for what is none, and for what these workers cannot do."""
    asked = openai_api.read_completion(body, cannot=CANNOT, one_prompt=True)
    assert asked.max_tokens is not None
    return Wanted(
        asked.prompts[0],
        asked.max_tokens,
        asked.temperature,
        asked.top_p,
        # every rank has to draw the same
        int.from_bytes(os.urandom(7), "big") if asked.seed is None else asked.seed,
        asked.model,
        asked.return_token_ids,
    )


def _refusal(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    *,
    param: str | None = None,
    code: str | None = None,
) -> Any:
    """An error as OpenAI words it."""
    from fastapi.responses import JSONResponse

    return JSONResponse(openai_api.error(message, kind, param=param, code=code), status_code=status)


def _first_failure_or_all(asked: Sequence[Any]) -> list[Any]:
    """The answers of all; what one of them raises is raised at once, whoever still waits for it."""
    import ray

    left = list(asked)
    while left:
        done, left = ray.wait(left)
        ray.get(done)
    found: list[Any] = ray.get(list(asked))
    return found


# -------------------------------------------------------------------------------------------------------- the workers
class Worker:
    """One tensor rank of a model, in a process of its own. Each is asked the same things in the same order."""

    def __init__(self, options: Options, rank: int, asked: float) -> None:
        """`asked`: when the group asked Ray for this worker, in seconds since the epoch."""
        self._options = options
        self._rank = rank
        self._seconds = {"interpreter": max(0.0, time.time() - asked)}
        self._mark = time.monotonic()
        self._store: Any = None  # where the ranks meet; rank 0 serves it as long as it lives
        self._model: Any = None
        self._tokenizer: Any = None

    def _end(self, stage: str) -> None:
        now = time.monotonic()
        self._seconds[stage] = now - self._mark
        self._mark = now

    def prepare(self) -> tuple[str, int] | None:
        """Begin to fetch, and import what the model needs meanwhile; rank 0 says where the ranks meet."""
        options = self._options
        self._fetch: Prefetch | None = None
        if options.shard_set.is_remote and options.shard_set.cache is not None:
            self._fetch = options.shard_set.prefetch(
                Place(self._rank, options.tensor_parallel_size, engine=TRANSFORMERS)
            )
        import torch
        import torch.distributed
        import transformers
        import transformers.distributed.configuration_utils as sizes
        from ray.util import get_node_ip_address

        auto: Any = transformers.AutoConfig, transformers.AutoTokenizer, transformers.GenerationConfig
        logging: Any = transformers.logging
        logging.disable_progress_bar()
        torch.set_num_threads(max(1, int(options.cpus_per_worker)))
        self._distributed: dict[str, Any] = {}
        meeting = None
        if options.tensor_parallel_size > 1:
            self._distributed["distributed_config"] = sizes.DistributedConfig(
                tp_size=options.tensor_parallel_size
            )
            if self._rank == 0:
                self._store = _store_at(get_node_ip_address(), 0, options.tensor_parallel_size)
                meeting = self._store.host, self._store.port
        self._end("imports")
        with ExitStack() as stack:
            folder = stack.enter_context(options.shard_set.side_files())
            self._config = auto[0].from_pretrained(folder)
            self._tokenizer = auto[1].from_pretrained(folder)
            self._generation = None
            if (folder / "generation_config.json").is_file():
                self._generation = auto[2].from_pretrained(folder)
            self._class = _model_class(self._config)
        self._end("config and tokenizer")
        return meeting

    def start(self, meeting: tuple[str, int] | None) -> Ready:
        """Make the model and ask it once. Raises what fetching, verifying or loading does."""
        from ray import get_runtime_context

        options = self._options
        if meeting is not None:
            self._meet(*meeting)
            self._end("meet")
        with ExitStack() as stack:
            if self._fetch is not None:
                stack.callback(self._fetch.close)
                self._fetch.wait()
            state = stack.enter_context(
                transformers_state(self._fetch)  # nothing is opened or verified a second time
                if self._fetch is not None
                else transformers_state(
                    options.shard_set,
                    rank=self._rank,
                    tensor_parallel_size=options.tensor_parallel_size,
                )
            )
            state.shard.wait()
            fetched = state.shard.bytes_fetched
            self._end("fetch and verify")
            self._model = state.from_pretrained(
                self._class, config=self._config, dtype=_dtype(options.dtype), **self._distributed
            ).eval()
            if self._generation is not None:
                self._model.generation_config = self._generation
            self._end("model")
        self.forward()
        self._end("first forward")
        node = get_runtime_context().get_node_id()
        return Ready(self._rank, os.getpid(), node, state.shard.nbytes, fetched, dict(self._seconds))

    def _meet(self, host: str, port: int) -> None:
        import datetime

        import torch.distributed as dist

        size = self._options.tensor_parallel_size
        if self._store is None:
            self._store = _store_at(host, port, size)
        timeout = datetime.timedelta(seconds=self._options.request_timeout_s)
        dist.init_process_group("gloo", store=self._store, rank=self._rank, world_size=size, timeout=timeout)

    def forward(self) -> None:
        """Compute one token. Raises ProblemError where what comes out is no number."""
        import torch

        with torch.no_grad():
            logits = self._model(torch.zeros(1, 1, dtype=torch.long)).logits
        if bool(torch.isnan(logits).any()):
            raise ProblemError(
                f"rank {self._rank}: the model computes no numbers (NaN); its weights, or its dtype, are not right"
            )

    def complete(self, wanted: Wanted) -> Completed:
        """Raises InputError, on every rank alike, for what the model cannot take."""
        import torch

        tokens = wanted.prompt
        if isinstance(tokens, str):
            tokens = tuple(self._tokenizer(tokens).input_ids)
        config = self._model.config.get_text_config()
        _check_prompt(tokens, wanted.max_tokens, config)
        sampling: dict[str, Any] = {"do_sample": False}
        if wanted.temperature > 0:
            sampling = {"do_sample": True, "temperature": wanted.temperature}
            if wanted.top_p < 1:
                sampling["top_p"] = wanted.top_p
        torch.manual_seed(wanted.seed)
        given = torch.tensor([tokens])
        found = self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=wanted.max_tokens,
            logits_processor=[_as_rank_0] if self._options.tensor_parallel_size > 1 else [],
            **sampling,
        )
        new: list[int] = found[0, len(tokens) :].tolist()
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return Completed(
            text=self._tokenizer.decode(new, skip_special_tokens=True),
            tokens=tuple(new),
            prompt=tuple(tokens),
            is_stopped=bool(new) and new[-1] in ends,
        )


def _store_at(host: str, port: int, size: int) -> Any:
    """Where `size` processes meet; port 0: it is made here, at a port that is free."""
    import torch.distributed

    distributed: Any = torch.distributed
    return distributed.TCPStore(host, port, size, is_master=port == 0, wait_for_workers=False)


def _as_rank_0(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """All ranks go on with the same scores: one that chose another token would leave the others waiting."""
    import torch.distributed as dist

    scores = scores.contiguous()
    dist.broadcast(scores, 0)
    return scores


def _check_prompt(tokens: Sequence[int], max_tokens: int, config: Any) -> None:
    if not tokens:
        raise InputError("prompt: no tokens")
    if not all(0 <= each < config.vocab_size for each in tokens):
        raise InputError(f"prompt: a token id is not below {config.vocab_size}, the size of the vocabulary")
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and len(tokens) + max_tokens > most:
        raise InputError(
            f"prompt of {len(tokens)} tokens and max_tokens {max_tokens}: together they exceed the {most} that the "
            "model was made for"
        )


def _model_class(config: Any) -> Any:
    """The class that the config names. Raises InputError where this transformers has none of that name."""
    import transformers

    names: Sequence[str] = config.architectures or []
    found: Callable[..., Any] | None = getattr(transformers, names[0], None) if names else None
    if found is None or not hasattr(found, "generate"):
        raise InputError(
            f"config.json: architectures is {quote(names)}; transformers {transformers.__version__} has no such class "
            "that generates text"
        )
    return found


def _dtype(name: str | None) -> Any:
    """torch's dtype of that name; "auto", the config's, without. Raises InputError."""
    import torch

    if name is None:
        return "auto"
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype is {quote(name)}; write float32, bfloat16 or float16")
    return found
