"""Requests are read strictly, and answers have the shape that OpenAI's clients expect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardprep_runtime.workers.http.openai import (
    MOST_PROMPTS,
    Answer,
    Choice,
    Request,
    RequestError,
    check_model,
    error,
    event,
    models,
    read_chat,
    read_completion,
)

HELLO = {"role": "user", "content": "hello"}


def refused(reason: str, param: str | None, body: Any, *, chat: bool = False) -> None:
    with pytest.raises(RequestError, match=reason) as found:
        (read_chat if chat else read_completion)(body)
    assert found.value.param == param
    assert found.value.status == 400


# ---------------------------------------------------------------------------------------------------------- completions
@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_a_prompt_is_a_text_or_tokens_or_several(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert read_completion({"prompt": prompt}) == Request(prompts=prompts, max_tokens=16)


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], {}, 3, ["a", 1], [1, True], [1.5], [[1], "a"], [["a"]], [[1], []]]
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    refused("prompt: expected a text, a list of texts", "prompt", {"prompt": prompt})


def test_too_many_prompts_are_refused() -> None:
    refused("129 of them, expected at most 128", "prompt", {"prompt": ["a"] * (MOST_PROMPTS + 1)})
    assert len(read_completion({"prompt": ["a"] * MOST_PROMPTS}).prompts) == MOST_PROMPTS


def test_half_of_a_character_is_refused_wherever_text_goes() -> None:
    half = json.loads('"a\\ud800"')
    refused("half of a character", "prompt", {"prompt": half})
    refused("half of a character", "prompt", {"prompt": ["a", half]})
    refused("half of a character", "stop", {"prompt": "a", "stop": half})
    refused("half of a character", "messages", {"messages": [{**HELLO, "content": half}]}, chat=True)


def test_everything_that_is_supported_is_read() -> None:
    body = {
        "prompt": "a",
        "model": "tiny",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 3,
        "stop": ["x", "y"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "user": "me",
    }
    assert read_completion(body) == Request(
        prompts=("a",),
        model="tiny",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=3,
        stop=("x", "y"),
        stop_token_ids=(7,),
        ignore_eos=True,
        stream=True,
        include_usage=True,
        return_token_ids=True,
    )


def test_null_is_as_good_as_nothing() -> None:
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "model",
    )
    nothing = dict.fromkeys((*names, "logprobs", "echo", "n", "ignore_eos", "stop_token_ids"))
    assert read_completion({"prompt": "a", **nothing}) == read_completion({"prompt": "a"})


def test_minus_one_is_vllms_way_to_sample_from_all() -> None:
    assert read_completion({"prompt": "a", "top_k": -1}).top_k == 0


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1, "best_of": 1, "echo": False, "frequency_penalty": 0, "presence_penalty": 0.0},
        {"logit_bias": {}, "logprobs": None, "suffix": None, "min_p": 0, "repetition_penalty": 1.0},
    ],
)
def test_a_parameter_may_say_what_is_so_anyway(neutral: dict[str, Any]) -> None:
    assert read_completion({"prompt": "a", **neutral}) == read_completion({"prompt": "a"})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("n", 2, "n: 2 was asked for; these workers know only 1"),
        ("n", True, "n: True was asked for"),
        ("best_of", 3, "best_of: 3 was asked for"),
        ("echo", True, "echo: True was asked for; these workers know only False"),
        ("echo", 0, "echo: 0 was asked for"),
        ("logprobs", 5, "logprobs: 5 was asked for; these workers know only null"),
        ("suffix", "x", "suffix: x was asked for"),
        ("logit_bias", {"5": 1}, "logit_bias: "),
        ("frequency_penalty", 0.1, "frequency_penalty: 0.1 was asked for"),
        ("max_tokens", 0, "max_tokens is 0, expected a number from 1"),
        ("max_tokens", 1.0, "max_tokens is 1.0"),
        ("temperature", True, "temperature is True"),
        ("temperature", float("nan"), "temperature is nan, expected a number from 0 to 2"),
        ("temperature", 2.1, "temperature is 2.1"),
        ("top_p", "1", "top_p is 1, expected a number from 0 to 1"),
        ("top_k", -2, "top_k is -2"),
        ("seed", 2**63, "seed is 9223372036854775808"),
        ("seed", 1.5, "seed is 1.5"),
        ("stop", "", "none of them empty"),
        ("stop", ["x"] * 17, "a list of at most 16"),
        ("stop", 3, "stop is 3"),
        ("stop_token_ids", [-1], "expected a list of token ids"),
        ("stop_token_ids", [True], "expected a list of token ids"),
        ("stream", 1, "stream is 1, expected true or false"),
        ("ignore_eos", "yes", "ignore_eos is yes"),
        ("model", 5, "model is 5, expected a name"),
        ("stream_options", {"include_usage": True}, "only of a stream"),
        ("tools", [], "no parameter tools is known here"),
        ("max_token", 5, "no parameter max_token is known here"),
    ],
)
def test_what_cannot_be_done_is_refused(name: str, value: Any, reason: str) -> None:
    refused(reason, name, {"prompt": "a", name: value})


@pytest.mark.parametrize(
    "options", [{"include_usage": 1}, {"continuous_usage_stats": True}, [], {"include_obfuscation": True}]
)
def test_options_of_a_stream_that_are_unknown_are_refused(options: Any) -> None:
    refused(
        "stream_options is ", "stream_options", {"prompt": "a", "stream": True, "stream_options": options}
    )


@pytest.mark.parametrize("body", [None, [], "prompt", 3])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    refused("not a JSON object", None, body)
    refused("not a JSON object", None, body, chat=True)


def test_a_name_from_a_request_is_printed_escaped() -> None:
    refused(r"no parameter a\\nb is known here", "a\nb", {"prompt": "a", "a\nb": 1})


# ---------------------------------------------------------------------------------------------------------------- chats
def test_a_chat_is_its_messages() -> None:
    found = read_chat(
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
                {"role": "user", "content": "d", "name": "me"},
            ],
            "max_completion_tokens": 7,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "logprobs": False,
        }
    )
    assert found == Request(
        messages=(
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d", "name": "me"},
        ),
        max_tokens=7,
    )
    assert found.is_chat


def test_a_chat_without_a_limit_has_none() -> None:
    assert read_chat({"messages": [HELLO]}).max_tokens is None
    assert read_chat({"messages": [HELLO], "max_tokens": 3}).max_tokens == 3
    assert read_chat({"messages": [HELLO], "max_tokens": 3, "max_completion_tokens": 3}).max_tokens == 3


@pytest.mark.parametrize(
    ("more", "param", "reason"),
    [
        ({"messages": None}, "messages", "at least one message"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hello"}, "messages", "at least one message"),
        ({"messages": ["hello"]}, "messages", r"messages\[0\]: expected an object"),
        ({"messages": [{"content": "a"}]}, "messages", "role is None, expected one of system"),
        ({"messages": [HELLO, {"role": "tool", "content": "a"}]}, "messages", r"messages\[1\]: role is tool"),
        ({"messages": [{"role": "user"}]}, "messages", "content is neither a text"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "content is neither a text"),
        ({"messages": [{**HELLO, "tool_calls": [{}]}]}, "messages", "tool_calls is not known here"),
        ({"messages": [{**HELLO, "name": 5}]}, "messages", "name is 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "a part of its content is image_url",
        ),
        ({"prompt": "a"}, "prompt", "no parameter prompt is known here"),
        ({"tools": [{}]}, "tools", "tools: "),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format: "),
        ({"logprobs": True}, "logprobs", "logprobs: True was asked for"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one of them"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "expected a number from 1"),
    ],
)
def test_chats_that_cannot_be_answered_are_refused(more: dict[str, Any], param: str, reason: str) -> None:
    refused(reason, param, {"messages": [HELLO], **more}, chat=True)


def test_another_model_is_not_found() -> None:
    check_model(None, "tiny")
    check_model("tiny", "tiny")
    with pytest.raises(RequestError, match="no model gpt; there is tiny") as found:
        check_model("gpt", "tiny")
    assert (found.value.status, found.value.code, found.value.param) == (404, "model_not_found", "model")


# -------------------------------------------------------------------------------------------------------------- answers
DONE = Choice((1, 2), " a b", [5, 6, 7], "length")


def test_a_completion_in_one_piece() -> None:
    found = Answer(model="tiny", id="x", created=7).whole([DONE, Choice((3,), "", [2], "stop")])
    assert found == {
        "id": "cmpl-x",
        "object": "text_completion",
        "created": 7,
        "model": "tiny",
        "choices": [
            {"index": 0, "text": " a b", "logprobs": None, "finish_reason": "length"},
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def test_a_chat_in_one_piece() -> None:
    found = Answer(model="tiny", id="x", created=7, is_chat=True, with_token_ids=True).whole([DONE])
    assert found == {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "created": 7,
        "model": "tiny",
        "prompt_token_ids": [1, 2],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " a b", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "token_ids": [5, 6, 7],
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }


def test_the_events_of_a_completion() -> None:
    answer = Answer(model="tiny", id="x", created=7, with_usage=True)
    head = {"id": "cmpl-x", "object": "text_completion", "created": 7, "model": "tiny"}
    assert answer.first(0, DONE) is None
    assert answer.more(0, "", [5], None) is None  # half of a character, or what may become a stop
    assert answer.more(1, " a", [5], None) == {
        **head,
        "choices": [{"index": 1, "text": " a", "logprobs": None, "finish_reason": None}],
        "usage": None,
    }
    last = answer.more(0, "", [], "stop")
    assert last is not None
    assert last["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]
    assert answer.last([DONE]) == {
        **head,
        "choices": [],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }


def test_the_events_of_a_chat() -> None:
    answer = Answer(model="tiny", id="x", created=7, is_chat=True, with_usage=False)
    head = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 7, "model": "tiny"}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice]}

    assert answer.first(0, DONE) == chunk({"role": "assistant", "content": ""})
    assert answer.more(0, " a", [5], None) == chunk({"content": " a"})
    assert answer.more(0, " b", [6], "length") == chunk({"content": " b"}, "length")
    assert answer.more(0, "", [], "stop") == chunk({}, "stop")
    assert answer.last([DONE]) is None


def test_token_ids_come_in_pieces_too() -> None:
    for is_chat in (False, True):
        answer = Answer(model="tiny", is_chat=is_chat, with_token_ids=True, with_usage=False)
        first = answer.first(0, DONE)
        assert first is not None
        place = first if is_chat else first["choices"][0]
        assert place["prompt_token_ids"] == [1, 2]
        more = answer.more(0, "", [5], None)
        assert more is not None
        assert more["choices"][0]["token_ids"] == [5]


def test_every_answer_has_an_id_of_its_own() -> None:
    assert Answer(model="tiny").whole([])["id"] != Answer(model="tiny").whole([])["id"]


def test_an_event_is_one_line_whatever_the_text() -> None:
    sent = event({"text": "a\n\ndata: [DONE]\u2028\r"})
    assert sent.startswith(b"data: ")
    assert sent.endswith(b"\n\n")
    assert sent.count(b"\n") == 2
    assert b"\r" not in sent
    assert json.loads(sent[6:]) == {"text": "a\n\ndata: [DONE]\u2028\r"}


def test_errors_and_models_have_all_of_openais_fields() -> None:
    assert error("no", "invalid_request_error", param="n") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}
    }
    assert models("tiny", 7) == {
        "object": "list",
        "data": [{"id": "tiny", "object": "model", "created": 7, "owned_by": "shardprep"}],
    }
