"""Read requests as OpenAI's HTTP interface has them, strictly, and word what is answered.

A parameter that is not known here is refused. So is one that is known, would change the answer and cannot be done; it may
come with the value that changes nothing. Nothing is ignored in silence. Three parameters are vLLM's:
`top_k`, `ignore_eos` and `return_token_ids` (with `stop_token_ids`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ...errors import InputError, quote

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""

FinishReason = Literal["stop", "length"]

DEFAULT_MAX_TOKENS: Final = 16
"""Most tokens of a completion that names no limit: OpenAI's. A chat may go on to the end of the context."""

MOST_PROMPTS: Final = 128
"""Most prompts of one request."""

MOST_STOPS: Final = 16

DONE: Final = b"data: [DONE]\n\n"
"""After the last event of a stream that was not cut short."""

NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
}
"""What requests may ask for and nobody here can do; one that says no more than this, or null, may come."""

NEUTRAL_IN_COMPLETIONS: Final[Mapping[str, tuple[object, ...]]] = {
    **NEUTRAL,
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": (),
}

NEUTRAL_IN_CHATS: Final[Mapping[str, tuple[object, ...]]] = {
    **NEUTRAL,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # of the tools that there are not
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}

SAMPLING: Final = {
    "ignore_eos",
    "max_tokens",
    "model",
    "return_token_ids",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
}

BOOKKEEPING: Final = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"}
"""What says nothing about the answer."""

ROLES: Final = ("system", "developer", "user", "assistant")


class RequestError(InputError):
    """A request that cannot be answered, and how OpenAI words that: HTTP status, parameter, code."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of a model: to go on with prompts, or to answer messages."""

    prompts: tuple[Prompt, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    """Messages of a chat: role, content and perhaps name of each."""
    model: str | None = None
    max_tokens: int | None = None
    """None: to the end of the context."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    """In a stream; an answer in one piece always has it."""
    return_token_ids: bool = False

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


# ------------------------------------------------------------------------------------------------------------ requests
def read_completion(body: object) -> Request:
    """A request to /v1/completions. Raises RequestError."""
    neutral = NEUTRAL_IN_COMPLETIONS
    found = _checked(body, {"prompt"}, neutral)
    prompts = _prompts(found.get("prompt"))
    return Request(prompts=prompts, **{"max_tokens": DEFAULT_MAX_TOKENS, **_sampling(found, neutral)})


def read_chat(body: object) -> Request:
    """A request to /v1/chat/completions. Raises RequestError."""
    found = _checked(body, {"max_completion_tokens", "messages"}, NEUTRAL_IN_CHATS)
    messages = found.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list with at least one message", param="messages")
    read = tuple(_message(i, each) for i, each in enumerate(messages))
    given = _sampling(found, NEUTRAL_IN_CHATS)
    # the newer name of the same
    newer = _number(found, "max_completion_tokens", int, 1, 10**6)
    if newer is not None:
        if given.get("max_tokens", newer) != newer:
            raise RequestError(
                f"max_completion_tokens is {newer} and max_tokens {given['max_tokens']}; give one of them",
                param="max_tokens",
            )
        given["max_tokens"] = newer
    return Request(messages=read, **given)


def _checked(body: object, own: set[str], neutral: Mapping[str, tuple[object, ...]]) -> Mapping[str, Any]:
    """The parameters, of which none is unknown and none asks for what cannot be done."""
    if not isinstance(body, Mapping):
        raise RequestError("the body is not a JSON object; send one with the request's parameters")
    if unknown := sorted(set(body) - own - SAMPLING - BOOKKEEPING - set(neutral)):
        raise RequestError(
            f"no parameter {', '.join(map(quote, unknown))} is known here", param=str(unknown[0])
        )
    for name, values in neutral.items():
        given = body.get(name)
        if given is not None and not any(_is_same(given, each) for each in values):
            only = " or ".join(map(str, values)) or "null"
            raise RequestError(
                f"{name}: {quote(given)} was asked for; these workers know only {only}", param=name
            )
    return body


def _is_same(given: object, value: object) -> bool:
    """Equal, and not as True equals 1."""
    return given == value and isinstance(given, bool) == isinstance(value, bool)


def _prompts(given: object) -> tuple[Prompt, ...]:
    found: list[Prompt] = []
    if isinstance(given, str):
        found = [_text(given, "prompt")]
    elif isinstance(given, list) and given:
        if all(type(each) is int for each in given):
            found = [tuple(given)]
        elif all(isinstance(each, str) for each in given):
            found = [_text(each, "prompt") for each in given]
        elif all(
            isinstance(each, list) and each and all(type(token) is int for token in each) for each in given
        ):
            found = [tuple(each) for each in given]
    if not found:
        raise RequestError(
            "prompt: expected a text, a list of texts, a list of token ids, or a list of such lists",
            param="prompt",
        )
    if len(found) > MOST_PROMPTS:
        raise RequestError(
            f"prompt: {len(found)} of them, expected at most {MOST_PROMPTS}; send several requests",
            param="prompt",
        )
    return tuple(found)


def _message(i: int, given: object) -> Mapping[str, str]:
    """Role, content and perhaps name of a message; parts of text are joined by line breaks, as vLLM does."""
    where = f"messages[{i}]"
    if not isinstance(given, Mapping):
        raise RequestError(f"{where}: expected an object with role and content", param="messages")
    role = given.get("role")
    if role not in ROLES:
        raise RequestError(
            f"{where}: role is {quote(role)}, expected one of {', '.join(ROLES)}", param="messages"
        )
    for name, value in given.items():
        if name not in ("role", "content", "name") and value not in (None, []):
            raise RequestError(
                f"{where}: {quote(name)} is not known here; expected role, content and name", param="messages"
            )
    content = given.get("content")
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
                or set(part) != {"type", "text"}
            ):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise RequestError(
                    f'{where}: a part of its content is {quote(kind)}; these workers know only {{"type": "text", '
                    '"text": ...}',
                    param="messages",
                )
            texts.append(part["text"])
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise RequestError(f"{where}: content is neither a text nor a list of parts", param="messages")
    found = {"role": str(role), "content": _text(content, "messages")}
    name = given.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise RequestError(f"{where}: name is {quote(name)}, expected a text", param="messages")
        found["name"] = _text(name, "messages")
    return found


def _sampling(body: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> dict[str, Any]:
    """What is asked for of Request's other fields."""
    number = int | float
    numbers: tuple[tuple[str, Any, float, float], ...] = (
        ("max_tokens", int, 1, 10**6),
        ("temperature", number, 0, 2),
        ("top_p", number, 0, 1),
        ("top_k", int, -1, 10**6),  # -1: vLLM's other way to say all
        ("seed", int, 0, 2**63 - 1),
    )
    found = {name: value for name, *bounds in numbers if (value := _number(body, name, *bounds)) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    for name in ("stream", "ignore_eos", "return_token_ids"):
        value = body.get(name)
        if value is not None:
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {quote(value)}, expected true or false", param=name)
            found[name] = value
    model = body.get("model")
    if model is not None:
        if not isinstance(model, str):
            raise RequestError(f"model is {quote(model)}, expected a name", param="model")
        found["model"] = model
    if "stop" not in neutral and body.get("stop") is not None:
        found["stop"] = _stops(body["stop"])
    tokens = body.get("stop_token_ids")
    if "stop_token_ids" not in neutral and tokens is not None:
        if not isinstance(tokens, list) or not all(type(each) is int and each >= 0 for each in tokens):
            raise RequestError(
                f"stop_token_ids is {quote(tokens)}, expected a list of token ids", param="stop_token_ids"
            )
        found["stop_token_ids"] = tuple(tokens)
    options = body.get("stream_options")
    if options is not None:
        if not found.get("stream"):
            raise RequestError(
                "stream_options: only of a stream; add stream: true, or leave it out", param="stream_options"
            )
        known = {"include_usage", "include_obfuscation"}
        if (
            not isinstance(options, Mapping)
            or set(options) - known
            or options.get("include_obfuscation") not in (None, False)
            or not isinstance(options.get("include_usage", False), bool)
        ):
            raise RequestError(
                f'stream_options is {quote(options)}, expected {{"include_usage": true}} or false',
                param="stream_options",
            )
        found["include_usage"] = options.get("include_usage", False)
    return found


def _number(body: Mapping[str, Any], name: str, kinds: Any, low: float, high: float) -> Any:
    """The parameter, a number of one of the kinds from `low` to `high`; None where it was not given."""
    value = body.get(name)
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high
    ):
        raise RequestError(f"{name} is {quote(value)}, expected a number from {low} to {high}", param=name)
    return value


def _stops(given: object) -> tuple[str, ...]:
    found = [given] if isinstance(given, str) else given
    if (
        not isinstance(found, list)
        or len(found) > MOST_STOPS
        or not all(isinstance(each, str) and each for each in found)
    ):
        raise RequestError(
            f"stop is {quote(given)}, expected a text, or a list of at most {MOST_STOPS}, none of them empty",
            param="stop",
        )
    return tuple(_text(each, "stop") for each in found)


def _text(given: str, param: str) -> str:
    """`given` where it is Unicode; JSON can write halves of characters, which no tokenizer takes."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param}: holds half of a character (a lone surrogate)", param=param) from None
    return given


# ------------------------------------------------------------------------------------------------------------- answers
@dataclass(slots=True)
class Choice:
    """What became of one prompt, or has so far."""

    prompt: Sequence[int]
    """Its tokens."""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What all pieces of one answer say alike."""

    model: str
    is_chat: bool = False
    with_usage: bool = True
    with_token_ids: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one piece."""
        found = self._head("chat.completion" if self.is_chat else "text_completion")
        for i, each in enumerate(choices):
            choice: dict[str, Any] = {"index": i}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": each.text, "refusal": None}
            else:
                choice["text"] = each.text
            choice |= {"logprobs": None, "finish_reason": each.finish_reason}
            if self.with_token_ids:
                choice["token_ids"] = list(each.tokens)
                (found if self.is_chat else choice)["prompt_token_ids"] = list(each.prompt)
            found["choices"].append(choice)
        found["usage"] = usage(choices)
        return found

    def first(self, index: int, choice: Choice) -> dict[str, Any] | None:
        """The event before any text of a choice; None where there is nothing to say.

        Args:
            index: Number of the choice.
            choice: The choice, whose prompt may be told.
        """
        if self.is_chat:
            found = self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
            if self.with_token_ids:
                found["prompt_token_ids"] = list(choice.prompt)
            return found
        if self.with_token_ids:
            given = {"text": "", "token_ids": [], "prompt_token_ids": list(choice.prompt)}
            return self._chunk(index, given, None)
        return None

    def more(
        self, index: int, text: str, tokens: Sequence[int], finish_reason: FinishReason | None
    ) -> dict[str, Any] | None:
        """The event of what a choice has grown by; None where there is nothing to say.

        Args:
            index: Number of the choice.
            text: What has come since the last event.
            tokens: The tokens that it was made of.
            finish_reason: Why the choice has ended; None while it goes on.
        """
        if not text and finish_reason is None and not self.with_token_ids:
            return None
        if self.is_chat:
            given: dict[str, Any] = {"delta": {"content": text} if text or finish_reason is None else {}}
        else:
            given = {"text": text}
        if self.with_token_ids:
            given["token_ids"] = list(tokens)
        return self._chunk(index, given, finish_reason)

    def last(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        """The event after all choices: what was used, where that was asked for."""
        if not self.with_usage:
            return None
        return {
            **self._head("chat.completion.chunk" if self.is_chat else "text_completion"),
            "usage": usage(choices),
        }

    def _chunk(
        self, index: int, given: Mapping[str, Any], finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        found = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        found["choices"].append({"index": index, **given, "logprobs": None, "finish_reason": finish_reason})
        if self.with_usage:
            found["usage"] = None  # as OpenAI has it in every chunk but the last, where usage was asked for
        return found

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [],
        }


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens of the prompts and of what was made of them."""
    given, made = sum(len(each.prompt) for each in choices), sum(len(each.tokens) for each in choices)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def models(name: str, created: int) -> dict[str, Any]:
    """The answer to GET /v1/models.

    Args:
        name: What requests call the model.
        created: When it was started, in seconds since the epoch.
    """
    model = {"id": name, "object": "model", "created": created, "owned_by": "shardprep"}
    return {"object": "list", "data": [model]}


def check_model(asked: str | None, name: str) -> None:
    """Refuse a request for another model.

    Args:
        asked: The name in the request; None: whatever is served.
        name: The name of the model that is served.

    Raises:
        RequestError: Where they differ.
    """
    if asked not in (None, name):
        raise RequestError(
            f"no model {quote(asked)}; there is {quote(name)}",
            param="model",
            status=404,
            code="model_not_found",
        )


def error(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI words it.

    Args:
        message: For people.
        kind: `invalid_request_error`, `server_error` and the like.
        param: The parameter of the request that is wrong.
        code: A word for programs.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
