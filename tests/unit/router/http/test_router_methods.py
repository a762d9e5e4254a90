"""Methods and unknown paths: HEAD, OPTIONS, 404 and 405 with `Allow`, in each API's envelope."""

from dataclasses import replace

import pytest
from fastapi import FastAPI

from router.app import create_app
from tests.fakes import CHAT_MODEL, MANAGING, make_services
from tests.live_server import client_of, error_of, exchange, serving
from tests.unit.router.api.test_router_api import FakeManagement


def make_app() -> FastAPI:
    return create_app(replace(make_services(), management=FakeManagement()))


GETS = ["/", "/healthz", "/readyz", "/health", "/v1/health", "/metrics"]
GETS += ["/v1/models", f"/v1/models/{CHAT_MODEL}", "/api/models"]
GETS += [f"/api/models/{CHAT_MODEL}", "/api/decisions"]

UNKNOWN = ["/nope", "/v1", "/v1/", "/v1/nope", "/healthz/", "/%2e%2e/x", "/v1/health/x"]
UNKNOWN += ["/v1/chat", "/v1/chat/completions/x", "/v1/completions/x", "/v1/embeddings/x"]
UNKNOWN += ["/v1/responses/resp_1/nope", "/v1/responses/input_tokens/x"]
UNKNOWN += ["/api/decisions/x", "/api/drain/x", "/api/nope"]


@pytest.mark.parametrize("path", GETS)
async def test_head_is_answered_like_get_without_a_body(path: str) -> None:
    async with client_of(make_app(), **MANAGING) as http:
        got = await http.get(path)
    request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    async with serving(make_app()) as port:
        status, answer = await exchange(port, request.encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status == got.status_code == 200
    assert body == b""
    assert b"content-type: " + got.headers["content-type"].encode() in head


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/", "GET, HEAD, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/v1/messages", "OPTIONS, POST"),
        ("/v1/responses/resp_1", "DELETE, GET, HEAD, OPTIONS"),
        (f"/api/models/{CHAT_MODEL}", "DELETE, GET, HEAD, OPTIONS, PATCH"),
        ("/api/drain", "OPTIONS, POST"),
    ],
)
async def test_options_and_wrong_methods_say_what_is_allowed(path: str, allow: str) -> None:
    async with client_of(make_app(), **MANAGING) as http:
        options = await http.options(path)
        assert (options.status_code, options.content) == (204, b"")
        assert options.headers["allow"] == allow
        for method in ("PUT", "TRACE", "BREW"):
            body = b"{}" if method == "PUT" else b""
            headers = {"content-type": "application/json"}
            wrong = await http.request(method, path, content=body, headers=headers)
            assert wrong.status_code == 405
            assert wrong.headers["allow"] == allow
            if not path.startswith("/v1/messages"):
                assert allow in error_of(wrong)["message"]
        wrong_head = await http.head("/v1/chat/completions")
        assert wrong_head.status_code == 405


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", UNKNOWN)
async def test_unknown_paths_are_404_in_the_envelope(method: str, path: str) -> None:
    async with client_of(make_app(), **MANAGING) as http:
        answer = await http.request(
            method,
            path,
            content=b"{}" if method == "POST" else None,
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 404
        if method != "HEAD":
            assert error_of(answer)["code"] == "not_found"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path", [f"/v1/models/{CHAT_MODEL}/nope", f"/api/models/{CHAT_MODEL}/nope", "/v1/models/a/b/c"]
)
async def test_what_no_model_has_is_404_for_every_method(method: str, path: str) -> None:
    async with client_of(make_app(), **MANAGING) as http:
        headers = {"content-type": "application/json"}
        answer = await http.request(method, path, content=b"{}", headers=headers)
        if path.startswith("/api/") and method in ("PATCH", "DELETE"):
            assert error_of(answer)["code"] == "model_not_found"
        else:
            assert error_of(answer)["code"] == "not_found"
    assert answer.status_code == 404


async def test_method_that_no_action_has_is_told_the_actions_own() -> None:
    path = f"/api/models/{CHAT_MODEL}/load"
    async with client_of(make_app(), **MANAGING) as http:
        wrong = await http.request("PUT", path, json={})
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "OPTIONS, POST")


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_health_needs_no_key_and_says_when_the_server_is_not_ready(path: str) -> None:
    async with client_of(create_app(make_services(api_key="secret"))) as http:
        well = await http.get(path)
    async with client_of(create_app(make_services(not_ready="The scheduler is gone."))) as http:
        ill = await http.get(path)
    assert (well.status_code, well.json()) == (200, {"status": "ok"})
    assert (ill.status_code, error_of(ill)["message"]) == (503, "The scheduler is gone.")


async def test_errors_under_messages_have_anthropics_form() -> None:
    async with client_of(make_app(), **MANAGING) as http:
        unknown = await http.get("/v1/messages/nope")
        wrong = await http.get("/v1/messages")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    assert wrong.headers["allow"] == "OPTIONS, POST"


async def test_unknown_paths_are_shown_escaped() -> None:
    path = "/%E2%80%AEevil%1b%5B31m%0d%0aset-cookie:x"
    async with client_of(make_app(), **MANAGING) as http:
        message = error_of(await http.get(path))["message"]
    assert message == r"There is no endpoint at '/\u202eevil\x1b[31m\r\nset-cookie:x'."


async def test_options_of_the_whole_server_list_every_method() -> None:
    async with serving(make_app()) as port:
        head = b"Host: localhost\r\nConnection: close\r\n\r\n"
        status, answer = await exchange(port, b"OPTIONS * HTTP/1.1\r\n" + head)
        assert status == 204
        assert b"allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\n" in answer
        assert (await exchange(port, b"GET * HTTP/1.1\r\n" + head))[0] == 404
