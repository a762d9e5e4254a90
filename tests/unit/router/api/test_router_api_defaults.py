"""A model's own defaults for requests, its template, labels, and drafts of settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catalog.store import CatalogStore
from core.types import ChatMessage, ChatPrompt, GenerationRequest
from tests.live_server import error_of
from tests.unit.catalog.builders import make_found, write
from tests.unit.router.api.test_router_api_catalog import DETAILS, TINY, Server, filled_server

ONE = f"/api/models/{TINY}"
OTHER = "other@gguf-q4_0"
DEFAULTS: dict[str, Any] = {
    "sampling": {"temperature": 0.3, "top_k": 7, "repetition_penalty": 1.2},
    "system_prompt": "Be brief.",
    "template_kwargs": {"enable_thinking": False, "style": "dry"},
}
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield from filled_server(tmp_path)


async def _sent(server: Server, path: str, body: dict[str, Any]) -> GenerationRequest:
    answer = await server.ask("POST", path, {"model": TINY, **body})
    assert answer.status_code == 200, answer.text
    return server.dispatcher.requests[-1]


async def test_defaults_fill_what_requests_leave_out(server: Server) -> None:
    assert (await server.ask("PATCH", ONE, DEFAULTS)).status_code == 200
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [USER]},
        "/v1/responses": {"input": "Hi"},
        "/v1/messages": {"messages": [USER], "max_tokens": 5},
    }
    for path, body in bodies.items():
        sent = await _sent(server, path, body)
        assert isinstance(sent.prompt, ChatPrompt)
        assert sent.prompt.messages[0] == ChatMessage(role="system", content="Be brief.")
        assert sent.prompt.messages[1].content == "Hi"
        assert sent.prompt.template_kwargs == DEFAULTS["template_kwargs"]
        sampling = sent.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.3, 7, None)
        assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.2, 0.0)
    sent = await _sent(server, "/v1/completions", {"prompt": "Once"})
    assert sent.sampling.temperature == 0.3


async def test_what_a_request_says_comes_first(server: Server) -> None:
    await server.ask("PATCH", ONE, DEFAULTS)
    body = {
        "messages": [{"role": "system", "content": "Be long."}, USER],
        "temperature": 0,
        "repetition_penalty": 1.0,
        "chat_template_kwargs": {"style": "wet"},
    }
    sent = await _sent(server, "/v1/chat/completions", body)
    assert isinstance(sent.prompt, ChatPrompt)
    assert [message.content for message in sent.prompt.messages] == ["Be long.", "Hi"]
    assert (sent.sampling.temperature, sent.sampling.repetition_penalty) == (0.0, 1.0)
    assert sent.sampling.top_k == 7
    assert sent.prompt.template_kwargs == {"enable_thinking": False, "style": "wet"}


async def test_null_and_empty_values_restore_the_defaults(server: Server) -> None:
    await server.ask("PATCH", ONE, DEFAULTS)
    empty: dict[str, Any] = {
        "sampling": {},
        "system_prompt": "",
        "template_kwargs": None,
        "tags": [],
        "notes": "",
    }
    answer = await server.ask("PATCH", ONE, empty)
    assert {answer.json()["settings"][name] for name in empty} == {None}
    sent = await _sent(server, "/v1/chat/completions", {"messages": [USER]})
    assert isinstance(sent.prompt, ChatPrompt)
    assert len(sent.prompt.messages) == 1
    assert sent.sampling.temperature is None


async def test_labels_survive_a_restart_and_filter_the_list(server: Server, tmp_path: Path) -> None:
    labels = {"tags": ["work", "code", "work"], "favourite": True, "notes": "Good at Rust."}
    answer = await server.ask("PATCH", ONE, labels)
    assert answer.json()["settings"]["tags"] == ["code", "work"]
    store = CatalogStore(tmp_path / "catalog.sqlite")
    record = store.get(TINY)
    store.close()
    assert record is not None
    assert record.settings.tags == ["code", "work"]
    assert record.settings.notes == "Good at Rust."

    async def listed(query: str) -> list[str]:
        answer = await server.ask("GET", f"/api/models?{query}")
        return [model["id"] for model in answer.json()["models"]]

    assert await listed("tag=work&tag=code") == [TINY]
    assert await listed("tag=work&tag=none") == []
    assert await listed("favourite=true") == [TINY]
    assert await listed("favourite=false") == [OTHER]
    for query in ("favourite=maybe", "sort=1", "tag="):
        bad = await server.ask("GET", f"/api/models?{query}")
        assert (bad.status_code, error_of(bad)["param"]) == (400, query.partition("=")[0])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sampling": {"temperature": 3}}, "sampling.temperature"),
        ({"sampling": {"heat": 1}}, "sampling.heat"),
        ({"template_kwargs": {"messages": []}}, "template_kwargs"),
        ({"chat_template": "{% for x in %}"}, "chat_template"),
        ({"chat_template": "{{ messages[7].content.upper() }}"}, "chat_template"),
        ({"tags": [""]}, "tags.0"),
        ({"tags": ["x"] * 33}, "tags"),
        ({"tool_parser": "nobody's"}, "tool_parser"),
        ({"context_length": 10**6}, "context_length"),
    ],
)
@pytest.mark.parametrize("is_draft", [True, False])
async def test_draft_is_checked_as_the_change_is(
    server: Server, changes: dict[str, Any], param: str, is_draft: bool
) -> None:
    method, path = ("POST", f"{ONE}/check") if is_draft else ("PATCH", ONE)
    answer = await server.ask(method, path, changes)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param
    shown = (await server.ask("GET", ONE)).json()["settings"]
    assert set(shown.values()) == {None}


async def test_draft_that_is_sound_is_shown_and_not_stored(server: Server) -> None:
    await server.ask("PATCH", ONE, {"pin": True})
    answer = await server.ask("POST", f"{ONE}/check", {"context_length": 512, "pin": None})
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == TINY
    memory = answer.json()["memory"]
    assert (memory["fit"], memory["context_tokens"], memory["evicts"]) == ("now", 512, ["a"])
    assert (memory["weights_bytes"], memory["needed_bytes"]) == (50, 50)
    # A scheduler that does not answer keeps nobody from checking a draft.
    unknown = await server.ask("POST", f"{ONE}/check", {"notes": "x"})
    assert (unknown.status_code, unknown.json()["memory"]) == (200, None)
    draft = answer.json()["settings"]
    assert (draft["context_length"], draft["pin"]) == (512, None)
    stored = (await server.ask("GET", ONE)).json()["settings"]
    assert (stored["context_length"], stored["pin"]) == (None, True)
    assert server.handle.settings_changed.calls == [(TINY,)]


async def test_template_in_place_of_the_model_s_decides_what_it_can_do(server: Server) -> None:
    template = "{% if tools %}{{ tools }}{% endif %}{{ messages[0].content }}"
    answer = await server.ask("PATCH", ONE, {"chat_template": template})
    assert answer.status_code == 200, answer.text
    assert "tools" in answer.json()["capabilities"]
    back = await server.ask("PATCH", ONE, {"chat_template": None})
    assert "tools" not in back.json()["capabilities"]


async def test_stop_strings_that_a_model_came_with_end_answers_unless_a_request_has_others(
    server: Server, tmp_path: Path
) -> None:
    store = CatalogStore(tmp_path / "catalog.sqlite")
    details = {**DETAILS, "stop_strings": '["User:", "###"]'}
    write(store, make_found("/m/d.gguf", name="stopped", details=details))
    store.close()
    body = {"model": "stopped", "messages": [USER]}
    own = await _sent(server, "/v1/chat/completions", {**body, "stop": ["END"]})
    assert own.stop == ("END",)
    for path, other in (
        ("/v1/chat/completions", body),
        ("/v1/completions", {"model": "stopped", "prompt": "a"}),
        ("/v1/messages", {**body, "max_tokens": 5}),
        ("/v1/responses", {"model": "stopped", "input": "a"}),
    ):
        assert (await _sent(server, path, other)).stop == ("User:", "###")


async def test_system_prompt_that_a_model_came_with_is_used_unless_the_user_has_another(
    server: Server, tmp_path: Path
) -> None:
    store = CatalogStore(tmp_path / "catalog.sqlite")
    details = {**DETAILS, "system_prompt": "You are tiny."}
    write(store, make_found("/m/c.gguf", name="prompted", details=details))
    store.close()
    body = {"model": "prompted", "messages": [USER]}
    first = await _sent(server, "/v1/chat/completions", body)
    await server.ask("PATCH", "/api/models/prompted", {"system_prompt": "Be large."})
    second = await _sent(server, "/v1/chat/completions", body)
    for sent, expected in ((first, "You are tiny."), (second, "Be large.")):
        assert isinstance(sent.prompt, ChatPrompt)
        assert sent.prompt.messages[0].content == expected
