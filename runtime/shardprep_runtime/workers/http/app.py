"""Put OpenAI's HTTP interface in front of a split model: completions, chats, health, metrics, control.

Every sequence runs in a thread of its own, since a step waits for workers; HTTP is asynchronous and waits for none of
them. Needs FastAPI, uvicorn and prometheus-client (the extra `serve`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ...errors import InputError, ShardprepError
from ..text.generate import Generator, Sampling, Token
from . import openai as openai_api
from .control import LATER, Control, bearer, nobody
from .metrics import Metrics
from .openai import Answer, Choice, Request, RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI

Found = TypeVar("Found")

MOST_BYTES: Final = 16 * 2**20
"""Most bytes of a request's body."""

MAX_WAITING: Final = 64
"""Sequences that may wait for their turn; who comes then is asked to come again."""

OPEN_END: Final = 1024
"""Tokens of a chat that names no limit, of a model that has none either."""

log = logging.getLogger(__name__)


def build_app(
    generator: Generator,
    *,
    model: str,
    secret: str | None = None,
    api_key: str | None = None,
    max_waiting: int = MAX_WAITING,
) -> FastAPI:
    """The application, for uvicorn. The generator and its pipeline stay the caller's, to be closed after it.

    Args:
        model: Its name in requests.
        secret: Who sends it may use /control; None: nobody may.
        api_key: Who sends it may use /v1; None: everybody may.
        max_waiting: Sequences that may wait while others run; more are refused with 429.

    Raises:
        InputError: Where what it needs is not installed.
    """
    check_installed()
    import fastapi

    front = Front(generator, model, max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        front.close()

    app = fastapi.FastAPI(
        title="shardprep", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.front = front
    key, anybody = bearer("the API key", api_key), bearer("", None)
    guard_of_control = bearer("SHARDPREP_SECRET", secret)
    if secret is None:
        guard_of_control = nobody(
            "this server was started without SHARDPREP_SECRET, so nobody may use /control; set it to a random text"
        )
    for path, method, guard, handler in (
        ("/v1/models", "GET", key, front.models),
        ("/v1/completions", "POST", key, front.completions),
        ("/v1/chat/completions", "POST", key, front.chats),
        ("/health", "GET", anybody, front.control.health),
        ("/metrics", "GET", anybody, front.control.metrics_text),
        ("/control/workers", "GET", guard_of_control, front.control.workers),
        ("/control/probe", "POST", guard_of_control, front.control.probe),
        ("/control/drain", "POST", guard_of_control, front.control.drain),
    ):
        # by Starlette's routes: bodies are read by openai_api, not by pydantic, which would coerce what it can
        app.add_route(path, front.endpoint(path, guard, handler), methods=[method])

    async def refuse(_: Any, error: Any) -> Any:
        return _refusal(RequestError(str(error.detail), status=error.status_code))

    app.add_exception_handler(404, refuse)
    app.add_exception_handler(405, refuse)
    return app


def check_installed() -> None:
    """Raises InputError where what serving needs is not installed."""
    for name in ("fastapi", "jinja2", "prometheus_client", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f'{name} is not installed; pip install "shardprep[serve]"')


# -------------------------------------------------------------------------------------------------- what runs meanwhile
class Front:
    """What the requests share: the generator, the threads, who waits."""

    def __init__(self, generator: Generator, model: str, max_waiting: int) -> None:
        self.generator = generator
        self.model = model
        self.max_waiting = max_waiting
        self.metrics = Metrics(generator.pipeline, self)
        self.control = Control(self)
        self.is_draining = False
        self._created = int(time.time())
        self._threads = ThreadPoolExecutor(generator.max_in_flight, thread_name_prefix="shardprep-sequence")
        self._lock = threading.Lock()
        self._waiting = self._running = 0
        self._works: set[Work] = set()
        self._tokenizing = threading.Lock()  # a fast tokenizer may be changed by a call while another uses it

    @property
    def waiting(self) -> int:
        """Sequences whose turn has not come."""
        with self._lock:
            return self._waiting

    @property
    def running(self) -> int:
        """Sequences in flight."""
        with self._lock:
            return self._running

    def count(self, *, waiting: int = 0, running: int = 0) -> None:
        with self._lock:
            self._waiting += waiting
            self._running += running

    def close(self) -> None:
        """Begin nothing more; what runs ends with its next token."""
        self.is_draining = True
        for work in list(self._works):
            work.end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def endpoint(
        self, path: str, guard: Callable[[Any], None], handler: Callable[[Any], Awaitable[Any]]
    ) -> Callable[[Any], Awaitable[Any]]:
        """Make what answers requests to a path; errors are worded as OpenAI does.

        Args:
            path: What metrics call it.
            guard: Raises RequestError for who may not ask.
            handler: Answers the others.
        """
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        async def answer(request: Any) -> Any:
            try:
                guard(request)
                found = await handler(request)
            except (ClientDisconnect, _GoneError):
                self.metrics.gone.inc()
                found = Response(status_code=499)  # nobody reads it
            except ShardprepError as error:
                found = _refusal(error)
            except Exception:
                log.exception("%s failed", path)
                found = _refusal(None)
            self.metrics.requests.labels(path, str(found.status_code)).inc()
            return found

        return answer

    # ------------------------------------------------------------------------------------------------------ OpenAI's
    async def models(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse(openai_api.models(self.model, self._created))

    async def completions(self, request: Any) -> Any:
        return await self._answer(request, openai_api.read_completion(await _json(request)))

    async def chats(self, request: Any) -> Any:
        return await self._answer(request, openai_api.read_chat(await _json(request)))

    async def _answer(self, request: Any, asked: Request) -> Any:
        from starlette.responses import JSONResponse

        openai_api.check_model(asked.model, self.model)
        self._admit()
        began = time.perf_counter()
        prompts = await asyncio.to_thread(self._tokens, asked)
        self._admit()  # others came meanwhile
        work = Work(self, prompts, [self._sampling(asked, len(each)) for each in prompts], began)
        answer = Answer(
            model=self.model,
            is_chat=asked.is_chat,
            with_usage=asked.include_usage,
            with_token_ids=asked.return_token_ids,
        )
        choices = [Choice(each) for each in prompts]
        if not asked.stream:
            try:
                await _unless_gone(request, _collect(work, choices))
            finally:
                work.end()
            return JSONResponse(answer.whole(choices))
        try:
            # what goes wrong before the first token still has a status of its own
            first = await _unless_gone(request, work.next())
        except BaseException:
            work.end()
            raise
        return _event_stream(self._events(work, answer, choices, first), work.end)

    async def _events(
        self, work: Work, answer: Answer, choices: Sequence[Choice], first: tuple[int, Token] | None
    ) -> AsyncIterator[bytes]:
        """What a stream says; one that ends without [DONE] was cut short, and its last event says why."""
        try:
            for i, choice in enumerate(choices):
                if (begun := answer.first(i, choice)) is not None:
                    yield openai_api.event(begun)
            found = first
            while found is not None:
                index, token = found
                _add(choices[index], token)
                more = answer.more(index, token.text, [token.id], token.finish_reason)
                if more is not None:
                    yield openai_api.event(more)
                found = await work.next()
            if (last := answer.last(choices)) is not None:
                yield openai_api.event(last)
            yield openai_api.DONE
        except ShardprepError as error:
            self.metrics.cut.inc()
            yield openai_api.event(_worded(error)[0])
        except Exception:
            log.exception("a stream failed")
            self.metrics.cut.inc()
            yield openai_api.event(_worded(None)[0])
        finally:
            work.end()

    def _admit(self) -> None:
        """Raises RequestError where nothing new is taken."""
        if self.is_draining:
            raise RequestError(
                "this server is being drained: it finishes what it has begun and takes no more",
                status=503,
                code="draining",
            )
        if self.waiting + self.running >= self.generator.max_in_flight + self.max_waiting:
            raise RequestError(
                f"{self.running} sequences are in flight and {self.waiting} wait for their turn; try again later",
                status=429,
                code="too_many_waiting",
            )

    def _tokens(self, asked: Request) -> list[list[int]]:
        """Tokens of each prompt, or of the chat. Raises RequestError where the model has no way to make them."""
        tokenizer: Any = self.generator.tokenizer
        if tokenizer is None and not all(isinstance(each, tuple) for each in asked.prompts or ("",)):
            raise RequestError(
                "this shard set has no tokenizer; send the ids of tokens to /v1/completions",
                param="messages" if asked.is_chat else "prompt",
            )
        with self._tokenizing:
            if asked.is_chat:
                return [chat_tokens(tokenizer, asked.messages)]
            return [self.generator.encode(each) for each in asked.prompts]

    def _sampling(self, asked: Request, prompt_tokens: int) -> Sampling:
        most = asked.max_tokens
        if most is None:
            limit = self.generator.max_positions
            most = OPEN_END if limit is None else max(1, limit - prompt_tokens)
        return Sampling(
            max_tokens=most,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=asked.seed,
            stop=asked.stop,
            stop_token_ids=asked.stop_token_ids,
            ignore_eos=asked.ignore_eos,
        )


class Work:
    """The sequences of one request, each in a thread of its own, and what they say."""

    def __init__(
        self,
        front: Front,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        began: float,
    ) -> None:
        self._front = front
        self._began = began
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[tuple[int, Token] | BaseException | None] = asyncio.Queue()
        self._left = len(prompts)
        self._is_over = threading.Event()
        front.count(waiting=len(prompts))
        front._works.add(self)
        self._asked: list[Future[None]] = [
            front._threads.submit(self._run, index, prompt, sampling)
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]

    async def next(self) -> tuple[int, Token] | None:
        """The next token of any of the sequences, and of which; None once all have ended. Raises what one of them does."""
        while self._left:
            found = await self._said.get()
            if isinstance(found, BaseException):
                raise found
            if found is not None:
                return found
            self._left -= 1
        return None

    def end(self) -> None:
        """Nobody listens any more: what has not begun never will, and what runs ends with its next token."""
        self._is_over.set()
        for each in self._asked:
            if each.cancel():
                self._front.count(waiting=-1)
        self._asked.clear()
        self._front._works.discard(self)

    def _run(self, index: int, prompt: Sequence[int], sampling: Sampling) -> None:
        self._front.count(waiting=-1, running=1)
        try:
            if not self._is_over.is_set():
                self._generate(index, prompt, sampling)
            self._say(None)
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits for it is to raise it
            self._say(error)
        finally:
            self._front.count(running=-1)

    def _generate(self, index: int, prompt: Sequence[int], sampling: Sampling) -> None:
        metrics = self._front.metrics
        last = self._began
        count = 0
        stream: Any = self._front.generator.stream(prompt, sampling)
        with closing(stream):
            for token in stream:
                now = time.perf_counter()
                (metrics.time_per_token if count else metrics.first_token).observe(now - last)
                if not count:
                    metrics.prompt_tokens.inc(len(prompt))
                metrics.tokens.inc()
                last = now
                count += 1
                self._say((index, token))
                if self._is_over.is_set():
                    return

    def _say(self, what: tuple[int, Token] | BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._said.put_nowait, what)


# --------------------------------------------------------------------------------------------------------------- answers
class _GoneError(Exception):
    """The client does not wait any more."""


def chat_tokens(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """Tokens of a chat up to where the model answers, by the model's own template.

    Args:
        tokenizer: The model's.
        messages: With role and content, as OpenAI has them.

    Raises:
        RequestError: Where there is not a template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise RequestError(
            "this model has no chat template, so it cannot chat; use /v1/completions, or put a "
            "chat_template into its tokenizer_config.json",
            param="messages",
        )
    from jinja2 import TemplateError

    try:
        found = tokenizer.apply_chat_template(
            [dict(each) for each in messages], add_generation_prompt=True, return_dict=True
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise RequestError(
            f"the model's chat template refuses these messages: {error}", param="messages"
        ) from None
    return list(found["input_ids"])


def _add(choice: Choice, token: Token) -> None:
    choice.text += token.text
    choice.tokens.append(token.id)
    choice.finish_reason = token.finish_reason or choice.finish_reason


async def _collect(work: Work, choices: Sequence[Choice]) -> None:
    while (found := await work.next()) is not None:
        _add(choices[found[0]], found[1])


async def _unless_gone(request: Any, answer: Coroutine[Any, Any, Found]) -> Found:
    """The answer, unless the client goes away first: raises _GoneError then."""
    found = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(
        request.receive()
    )  # the body was read: what comes now is that the client has gone
    try:
        await asyncio.wait((found, gone), return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise _GoneError
        return await found
    finally:
        for each in (found, gone):
            each.cancel()
        await asyncio.wait((found, gone))


async def _json(request: Any) -> object:
    """The body. Raises RequestError for one that is not JSON, or too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page in a browser may send other kinds to any address, without asking
        raise RequestError("expected JSON; send the header Content-Type: application/json", status=415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise RequestError(f"a body of more than {MOST_BYTES:,} bytes", status=413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def _event_stream(events: AsyncIterator[bytes], at_end: Callable[[], None]) -> Any:
    from starlette.responses import StreamingResponse

    class EventStream(StreamingResponse):
        async def __call__(self, *asgi: Any) -> None:
            try:
                await super().__call__(*asgi)
            finally:
                at_end()  # also where the client went away while it was written to

    return EventStream(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _worded(error: ShardprepError | None) -> tuple[dict[str, Any], int]:
    """What to say of an error, and its status. None: the error is not the client's business."""
    if isinstance(error, RequestError):
        kind = {429: "rate_limit_error", 503: "server_error"}.get(error.status, "invalid_request_error")
        return openai_api.error(str(error), kind, param=error.param, code=error.code), error.status
    if isinstance(error, InputError):
        return openai_api.error(str(error), "invalid_request_error"), 400
    if error is not None:
        return openai_api.error(str(error), "server_error", code="worker_failed"), 503
    return openai_api.error("an error of this server; its log says more", "server_error"), 500


def _refusal(error: ShardprepError | None) -> Any:
    from starlette.responses import JSONResponse

    said, status = _worded(error)
    headers = dict(LATER) if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(said, status_code=status, headers=headers)
