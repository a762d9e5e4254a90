"""Methods and unknown paths: HEAD, OPTIONS, 404 and 405 with `Allow`, in each API's envelope."""

from dataclasses import replace

import pytest
from fastapi import FastAPI

from router.app import create_app
from tests.fakes import CHAT_MODEL, make_services
from tests.live_server import client_of, error_of, exchange, serving
from tests.unit.router.api.test_router_api import FakeManagement


def make_app() -> FastAPI:
    return create_app(replace(make_services(), management=FakeManagement()))


GETS = ["/", "/healthz", "/readyz", "/metrics", "/v1/models", f"/v1/models/{CHAT_MODEL}"]
GETS += ["/api/models", f"/api/models/{CHAT_MODEL}", "/api/decisions"]


@pytest.mark.parametrize("path", GETS)
async def test_head_is_answered_like_get_without_a_body(path: str) -> None:
    async with client_of(make_app()) as http:
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
        (f"/api/models/{CHAT_MODEL}", "GET, HEAD, OPTIONS, PATCH"),
        ("/api/drain", "OPTIONS, POST"),
    ],
)
async def test_options_and_wrong_methods_say_what_is_allowed(path: str, allow: str) -> None:
    async with client_of(make_app()) as http:
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
@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/", "/v1/nope", "/healthz/", "/%2e%2e/x"])
async def test_unknown_paths_are_404_in_the_envelope(method: str, path: str) -> None:
    async with client_of(make_app()) as http:
        answer = await http.request(
            method,
            path,
            content=b"{}" if method == "POST" else None,
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 404
        if method != "HEAD":
            assert error_of(answer)["code"] == "not_found"


async def test_errors_under_messages_have_anthropics_form() -> None:
    async with client_of(make_app()) as http:
        unknown = await http.get("/v1/messages/nope")
        wrong = await http.get("/v1/messages")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    assert wrong.headers["allow"] == "OPTIONS, POST"


async def test_unknown_paths_are_shown_escaped() -> None:
    path = "/%E2%80%AEevil%1b%5B31m%0d%0aset-cookie:x"
    async with client_of(make_app()) as http:
        message = error_of(await http.get(path))["message"]
    assert message == r"There is no endpoint at '/\u202eevil\x1b[31m\r\nset-cookie:x'."


async def test_options_of_the_whole_server_list_every_method() -> None:
    async with serving(make_app()) as port:
        head = b"Host: localhost\r\nConnection: close\r\n\r\n"
        status, answer = await exchange(port, b"OPTIONS * HTTP/1.1\r\n" + head)
        assert status == 204
        assert b"allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST\r\n" in answer
        assert (await exchange(port, b"GET * HTTP/1.1\r\n" + head))[0] == 404
