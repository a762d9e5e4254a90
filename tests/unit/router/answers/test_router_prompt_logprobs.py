"""Log-probabilities of the prompt: echo with logprobs, and vLLM's prompt_logprobs."""

import json
import math
from typing import Any

import pytest

from core.types import PrefillProgress, TextDelta, TokenLogprob
from deployments.transport.codec import LENGTH_BYTES, decode_body, encode_frame
from router.app import create_app
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import client_of, error_of

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tiny", "prompt": "hi you", "max_tokens": 1}


def scored(token_id: int, data: bytes, logprob: float) -> TokenLogprob:
    likely = TokenLogprob(9, b" the", -0.25), TokenLogprob(token_id, data, logprob)
    return TokenLogprob(token_id, data, logprob, likely)


PROMPT = (
    TokenLogprob(1, b"<s>", math.nan), scored(2, b" hi", -2.0), scored(3, b" you", -1.0),
)  # fmt: skip
ANSWER = TextDelta("!", (4,), (TokenLogprob(4, b"!", -0.5, (TokenLogprob(4, b"!", -0.5),)),))
SCRIPT = (PrefillProgress(3, 3, PROMPT), TextDelta("hi you"), ANSWER, finished("length"))
ECHOED = {
    "tokens": ["", "hi", " you", "!"],
    "token_logprobs": [None, -2.0, -1.0, -0.5],
    "top_logprobs": [
        None, {" the": -0.25, "hi": -2.0}, {" the": -0.25, " you": -1.0}, {"!": -0.5}
    ],
    "text_offset": [0, 0, 2, 6],
}  # fmt: skip


async def post(path: str, body: dict[str, Any], *script: Any) -> tuple[Any, FakeDispatcher]:
    dispatcher = FakeDispatcher(*script or SCRIPT)
    async with client_of(create_app(make_services(dispatcher))) as client:
        return await client.post(path, json=body), dispatcher


async def test_echo_lists_prompt_and_answer_in_openai_shape() -> None:
    response, dispatcher = await post(
        "/v1/completions", {**COMPLETION, "echo": True, "logprobs": 1}
    )
    (choice,) = response.json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("hi you!", ECHOED)
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    sampling = dispatcher.requests[0].sampling
    assert (sampling.prompt_logprobs, sampling.top_logprobs) == (1, 1)


async def test_streamed_echo_has_the_same_columns() -> None:
    body = {**COMPLETION, "echo": True, "logprobs": 1, "stream": True}
    response, _ = await post("/v1/completions", body)
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    assert "".join(choice["text"] for choice in choices) == "hi you!"
    for name, column in ECHOED.items():
        parts = [choice["logprobs"][name] for choice in choices if choice["logprobs"]]
        assert [value for part in parts for value in part] == column


async def test_an_engine_that_begins_again_does_not_list_the_prompt_twice() -> None:
    response, _ = await post(
        "/v1/completions", {**COMPLETION, "echo": True, "logprobs": 1}, SCRIPT[0], *SCRIPT
    )
    assert response.json()["choices"][0]["logprobs"] == ECHOED


async def test_only_the_prompt_is_scored_with_no_tokens() -> None:
    body = {**COMPLETION, "max_tokens": 0, "echo": True, "logprobs": 0}
    response, _ = await post("/v1/completions", body, *SCRIPT[:2], finished("length"))
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -2.0, -1.0]
    assert logprobs["top_logprobs"] == [None, {"hi": -2.0}, {" you": -1.0}]


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_prompt_logprobs_are_vllms(logprobs: int | None) -> None:
    body = {**COMPLETION, "prompt_logprobs": 2, "logprobs": logprobs}
    script = (SCRIPT[0], ANSWER, SCRIPT[-1])
    response, dispatcher = await post("/v1/completions", body, *script)
    (choice,) = response.json()["choices"]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second == {
        "2": {"logprob": -2.0, "rank": 2, "decoded_token": " hi"},
        "9": {"logprob": -0.25, "rank": 1, "decoded_token": " the"},
    }
    assert list(third) == ["3", "9"]
    assert choice["text"] == "!"
    assert (choice["logprobs"] or {}).get("tokens", ["!"]) == ["!"]
    assert dispatcher.requests[0].sampling.prompt_logprobs == 2
    chat, dispatcher = await post(
        "/v1/chat/completions", {**CHAT, "prompt_logprobs": 2, "n": 2}, *script
    )
    assert chat.json()["prompt_logprobs"] == choice["prompt_logprobs"]
    assert [each.sampling.prompt_logprobs for each in dispatcher.requests] == [2, None]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
)
async def test_prompt_logprobs_out_of_range_or_streamed_are_refused(
    path: str, body: dict[str, Any]
) -> None:
    for fields in ({"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": True},
                   {"prompt_logprobs": 1, "stream": True}):  # fmt: skip
        response, dispatcher = await post(path, {**body, **fields})
        assert (response.status_code, error_of(response)["param"]) == (400, "prompt_logprobs")
        assert not dispatcher.requests
    response, dispatcher = await post(path, {**body, "prompt_logprobs": False}, *SCRIPT[2:])
    assert response.status_code == 200
    assert "prompt_logprobs" not in response.text
    assert dispatcher.requests[0].sampling.prompt_logprobs is None


def test_scores_pass_from_the_engine_to_the_router() -> None:
    ((request_id, events),) = decode_body(encode_frame([("r", SCRIPT)])[LENGTH_BYTES:])
    assert request_id == "r"
    assert isinstance(events, list)
    assert repr(events) == repr(list(SCRIPT))
