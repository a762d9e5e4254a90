"""Recorded requests of agents, replayed: accepted as they are, and answered as a stream."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from httpx import Response

from core.types import ChatPrompt, TextDelta, ToolCallDelta
from router.app import create_app
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services, make_view
from tests.live_server import client_of, sse_data

REPLAY = Path(__file__).resolve().parents[3] / "replay"
# Fields that the server may pass over, by client; it tells their names.
IGNORED: Mapping[str, frozenset[str]] = {
    "cline": frozenset(),
    "continue": frozenset(),
    "roo": frozenset(),
    "claude_code": frozenset({"context_management", "output_config.effort", "tools.defer_loading"}),
}
OPENAI_CLIENTS = ("cline", "continue", "roo")
CALL = (
    TextDelta("I look. "),
    ToolCallDelta(0, "call_1", "first_tool"),
    ToolCallDelta(0, arguments='{"a": "世界"}'),
    finished("tool_calls"),
)


def recorded(client: str) -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = json.loads((REPLAY / f"{client}.json").read_text())["requests"]
    return requests


def has_messages_route() -> bool:
    routes = create_app(make_services()).routes
    return any(getattr(route, "path", "") == "/v1/messages" for route in routes)


async def replayed(request: Mapping[str, Any], dispatcher: FakeDispatcher) -> Response:
    view = make_view(aliases=("tiny", request["body"]["model"]))
    app = create_app(make_services(dispatcher, views=[view]))
    async with client_of(app) as client:
        return await client.request(
            request["method"],
            request["path"],
            headers=request["headers"],
            content=json.dumps(request["body"]),
        )


@pytest.mark.parametrize(
    ("client", "index"),
    [(client, index) for client in OPENAI_CLIENTS for index in range(len(recorded(client)))],
)
async def test_openai_clients_requests_are_taken_as_they_are(client: str, index: int) -> None:
    request = recorded(client)[index]
    dispatcher = FakeDispatcher(*CALL)
    answer = await replayed(request, dispatcher)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = sse_data(answer.text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(call["function"].get("arguments", "") for call in calls) == '{"a": "世界"}'
    assert chunks[-1]["usage"]["total_tokens"] > 0
    assert _ignored(answer) == IGNORED[client]
    (generation,) = dispatcher.requests
    assert isinstance(generation.prompt, ChatPrompt)
    asked = request["body"]
    assert len(generation.prompt.messages) == len(asked["messages"])
    assert [tool.name for tool in generation.prompt.tools] == [
        tool["function"]["name"] for tool in asked["tools"]
    ]
    assert generation.model_id == CHAT_MODEL


@pytest.mark.parametrize("index", range(len(recorded("claude_code"))))
async def test_claude_codes_requests_are_taken_as_they_are(index: int) -> None:
    if not has_messages_route():
        pytest.skip("this server has no /v1/messages")
    request = recorded("claude_code")[index]
    dispatcher = FakeDispatcher(*CALL)
    answer = await replayed(request, dispatcher)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.splitlines() if line.startswith("data:")]
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    pieces = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    arguments = "".join(piece.get("partial_json", "") for piece in pieces)
    assert json.loads(arguments) == {"a": "世界"}
    assert _ignored(answer) == IGNORED["claude_code"]


def _ignored(answer: Response) -> frozenset[str]:
    header = answer.headers.get("x-impetus-ignored", "")
    return frozenset(name for name in header.split(", ") if name)
