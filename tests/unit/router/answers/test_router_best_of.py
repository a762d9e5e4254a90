"""`best_of` of completions: the likeliest of several answers."""

from typing import Any

import pytest

from core.types import TextDelta, TokenLogprob
from router.app import create_app
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import client_of

LOGPROBS = {"0": -2.0, "1": -0.1, "2": -0.5, "3": -0.4, "4": -3.0, "5": -0.2}


def scripted() -> FakeDispatcher:
    """Answers each sequence with its number, in two tokens whose mean is its likelihood."""
    dispatcher = FakeDispatcher()
    for name, mean in LOGPROBS.items():
        tokens = (TokenLogprob(1, b"a", mean - 0.05), TokenLogprob(2, b"b", mean + 0.05))
        dispatcher.scripts[name] = (TextDelta(name, (1, 2), tokens), finished())
    return dispatcher


async def complete(dispatcher: FakeDispatcher, **fields: Any) -> dict[str, Any]:
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/completions", json={"model": "tiny", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"prompt": "x", "best_of": 3}, ["1"]),
        ({"prompt": "x", "best_of": 6, "n": 3}, ["1", "5", "3"]),
        ({"prompt": ["x", "y"], "best_of": 3}, ["1", "5"]),
        ({"prompt": ["x", "y"], "best_of": 3, "n": 2}, ["1", "2", "5", "3"]),
        ({"prompt": ["x", "y"], "best_of": 3, "n": 3}, ["0", "1", "2", "3", "4", "5"]),
    ],
)
async def test_likeliest_answers_of_each_prompt_are_returned(
    fields: dict[str, Any], chosen: list[str]
) -> None:
    dispatcher = scripted()
    answer = await complete(dispatcher, **fields)
    assert [choice["text"] for choice in answer["choices"]] == chosen
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(chosen)))
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    prompts = len(fields["prompt"]) if isinstance(fields["prompt"], list) else 1
    assert len(dispatcher.requests) == prompts * fields["best_of"]
    # Every candidate's tokens were computed; each prompt counts once.
    assert answer["usage"]["completion_tokens"] == 2 * len(dispatcher.requests)
    assert answer["usage"]["prompt_tokens"] == 7 * prompts


async def test_candidates_differ_by_their_seeds_and_have_logprobs() -> None:
    dispatcher = scripted()
    answer = await complete(dispatcher, prompt="x", best_of=2, seed=5, logprobs=1)
    assert [request.sampling.seed for request in dispatcher.requests] == [5, 6]
    assert [request.sampling.top_logprobs for request in dispatcher.requests] == [1, 1]
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b"]

    dispatcher = scripted()
    await complete(dispatcher, prompt="x", best_of=2)
    assert [request.sampling.top_logprobs for request in dispatcher.requests] == [0, 0]
    await complete(dispatcher, prompt="x", best_of=1)
    assert dispatcher.requests[-1].sampling.top_logprobs is None
