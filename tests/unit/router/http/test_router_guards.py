"""The guards: addresses, origins, sizes, keys and content types."""

import logging
from collections.abc import AsyncGenerator

import pytest
from fastapi.routing import APIRoute

from router.app import create_app
from router.http.guards import PUBLIC_PATHS, normalize_origin
from tests.fakes import CHAT_MODEL, FakeDispatcher, make_services
from tests.live_server import client_of, error_of, exchange, serving

CHAT = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}
KEY = "canary-key-1234"


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:8000",
        "127.0.0.1.nip.io",
        "localhost.",
        "xn--lcalhost-54a",
        "[::2]:8000",
        "192.168.0.7:8000",
    ],
)
@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/nope"])
async def test_host_of_another_name_is_refused_everywhere_n3(host: str, path: str) -> None:
    async with client_of(create_app(make_services())) as client:
        response = await client.get(path, headers={"host": host})
    assert response.status_code == 403
    assert error_of(response)["code"] == "permission_denied"


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "mac.local:8000"]
)
async def test_host_of_this_server_is_answered(host: str) -> None:
    app = create_app(make_services(allowed_hosts=["mac.local"]))
    async with client_of(app) as client:
        response = await client.get("/healthz", headers={"host": host})
    assert response.status_code == 200


async def test_host_that_is_malformed_missing_or_double_is_refused_n4() -> None:
    host_lists = [
        [],
        [b"localhost", b"localhost"],
        [b"a/?x="],
        [b"localhost#"],
        [b"evil.com:80@127.0.0.1"],
        [b"[::1"],
        [b"localhost:123456"],
        [b""],
        ["lócalhost".encode()],
    ]
    async with serving(create_app(make_services(api_key=KEY))) as port:
        for hosts in host_lists:
            for path in (b"/healthz", b"/v1/models"):
                lines = b"".join(b"Host: " + host + b"\r\n" for host in hosts)
                request = b"GET " + path + b" HTTP/1.1\r\n" + lines + b"\r\n"
                status, answer = await exchange(port, request)
                assert status == 400, hosts
                assert b'"code":"invalid_request"' in answer


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://localhost/healthz", 200),
        (b"HTTP://LOCALHOST:8000/healthz", 200),
        (b"http://[::1]:8000/healthz", 200),
        (b"http://localhost:8000/v1/models", 401),
        (b"http://localhost/healthz/../v1/models", 401),
        (b"http://localhost?x=/healthz", 400),
        (b"http://evil.com/healthz", 403),
        (b"http://evil.com/healthz/../v1/models", 403),
        (b"https://127.0.0.1.nip.io:8000/healthz", 403),
        (b"http://evil.com:80@127.0.0.1/healthz", 400),
        (b"http://localhost@evil.com/healthz", 400),
        (b"http://localhost:99999999/healthz", 400),
        (b"http:///healthz", 400),
        (b"ftp://evil.com/v1/models", 401),
    ],
)
async def test_the_host_of_an_absolute_target_counts_n4(target: bytes, status: int) -> None:
    async with serving(create_app(make_services(api_key=KEY))) as port:
        request = b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert (await exchange(port, request))[0] == status
        # The Host header must still be there, and only once.
        for hosts in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
            request = b"GET " + target + b" HTTP/1.1\r\n" + hosts + b"\r\n"
            assert (await exchange(port, request))[0] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.com"},
        {"origin": "null"},
        {"origin": "http://localhost.evil.com"},
        {"origin": "http://127.0.0.1@evil.com"},
        {"origin": "chrome-extension://abc"},
        {"origin": "not an origin"},
        {"origin": "http://localhost:99999"},
        {"sec-fetch-site": "cross-site"},
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "multipart/form-data"])
async def test_foreign_page_is_refused_before_the_handler_n5(
    headers: dict[str, str], content_type: str
) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post(
            "/v1/chat/completions", json=CHAT, headers={**headers, "content-type": content_type}
        )
    assert response.status_code == 403
    assert error_of(response)["code"] == "permission_denied"
    assert "access-control-allow-origin" not in response.headers
    assert dispatcher.requests == []


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:8000",
        "http://localhost:5173",
        "http://127.0.0.1:3000",
        "http://[::1]:3000",
        "vscode-webview://1a2b3c",
        "vscode-file://vscode-app",
        "app://obsidian.md",
        "file://",
        "https://chat.example.org",
    ],
)
async def test_allowed_page_gets_its_origin_echoed_n6(origin: str) -> None:
    app = create_app(make_services(allowed_origins=["https://Chat.example.org/"]))
    async with client_of(app, origin=origin) as client:
        response = await client.post(
            "/v1/chat/completions", json=CHAT, headers={"sec-fetch-site": "cross-site"}
        )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert response.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in response.headers


async def test_preflight_is_answered_for_allowed_origins_only_n6() -> None:
    app = create_app(make_services(api_key=KEY))
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "x-a, b"}
    async with client_of(app) as client:
        good = await client.options(
            "/v1/models",
            headers={
                **ask,
                "origin": "http://localhost:1",
                "access-control-request-private-network": "true",
            },
        )
        bad = await client.options("/v1/models", headers={**ask, "origin": "https://evil.com"})
    assert good.status_code == 204
    assert good.headers["access-control-allow-origin"] == "http://localhost:1"
    assert good.headers["access-control-allow-headers"] == "x-a, b"
    assert good.headers["access-control-allow-private-network"] == "true"
    assert bad.status_code == 403
    assert "access-control-allow-origin" not in bad.headers


async def test_two_origins_are_refused_n5() -> None:
    origins = [("origin", "http://localhost:1"), ("origin", "https://evil.com")]
    async with client_of(create_app(make_services())) as client:
        assert (await client.get("/v1/models", headers=origins)).status_code == 403


@pytest.mark.parametrize("origin", ["*", "https://*.example.org", "example.org", "https://", ""])
def test_allowed_origins_that_are_no_origins_are_refused_n6(origin: str) -> None:
    with pytest.raises(ValueError, match="not an origin"):
        create_app(make_services(allowed_origins=[origin]))


def test_origin_keeps_an_empty_authority() -> None:
    assert normalize_origin("file://") == "file://"


async def test_every_route_but_the_public_ones_asks_for_the_key_n7() -> None:
    app = create_app(make_services(api_key=KEY))
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert {"/v1/chat/completions", "/metrics", *PUBLIC_PATHS} <= {route.path for route in routes}
    async with client_of(app) as client:
        for route in routes:
            for method in route.methods or ():
                response = await client.request(method, route.path.replace(":path", ""))
                expected = 200 if route.path in PUBLIC_PATHS else 401
                assert response.status_code == expected, route.path
        assert (await client.get("/openapi.json")).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer " + "x" * 20_000},
        {"authorization": b"Bearer sch\xfcssel"},
        {"x-api-key": KEY.upper()},
    ],
)
async def test_wrong_key_is_refused_and_stays_out_of_the_log_n8(
    headers: dict[str, str | bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    raw = [
        (name.encode(), value.encode() if isinstance(value, str) else value)
        for name, value in headers.items()
    ]
    async with client_of(create_app(make_services(api_key=KEY))) as client:
        response = await client.get(f"/v1/models?api_key={KEY}&key={KEY}", headers=raw)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (401, "authentication_error")
    assert KEY not in response.text
    assert KEY not in "".join(
        record.getMessage() for record in caplog.records if record.name != "httpx"
    )


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}],
)
async def test_right_key_opens_n8(headers: dict[str, str]) -> None:
    async with client_of(create_app(make_services(api_key=KEY))) as client:
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == 200


async def test_path_tricks_stay_behind_the_key_n10() -> None:
    paths = ["//healthz", "/healthz/", "/healthz/../v1/models", "/HEALTHZ", "/healthz;", "/%2e"]
    async with serving(create_app(make_services(api_key=KEY))) as port:
        for path in paths:
            status, _ = await exchange(
                port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            )
            assert status == 401, path


async def test_forwarded_headers_change_nothing_n11() -> None:
    spoof = {
        "x-forwarded-host": "localhost",
        "x-forwarded-prefix": "/healthz",
        "x-forwarded-for": "127.0.0.1",
        "host": "evil.com",
    }
    async with client_of(create_app(make_services())) as client:
        assert (await client.get("/healthz", headers=spoof)).status_code == 403


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/healthz", [(b"x-long", b"a" * 70_000)]),
        ("/healthz", [(b"x-%d" % index, b"a") for index in range(20_000)]),
        ("/healthz?" + "&".join(f"a{index}=1" for index in range(10_000)), []),
    ],
)
async def test_too_much_header_is_refused_n13(
    path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    async with serving(create_app(make_services())) as port:
        status, _ = await exchange(
            port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + lines + b"\r\n"
        )
    assert status == (414 if "?" in path else 431)


async def test_declared_length_over_the_limit_is_refused_unread_i2() -> None:
    async with serving(create_app(make_services(max_body=1000))) as port:
        status, answer = await exchange(
            port,
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 50000000\r\n\r\n",
        )
    assert status == 413
    assert b"connection: close" in answer
    assert b'"code":"request_too_large"' in answer


async def test_body_is_counted_while_it_streams_i2() -> None:
    dispatcher = FakeDispatcher()
    taken = 0

    async def body() -> AsyncGenerator[bytes, None]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield b" " * 100

    app = create_app(make_services(dispatcher, max_body=1000))
    async with client_of(app) as client:
        response = await client.post(
            "/v1/chat/completions", content=body(), headers={"content-type": "application/json"}
        )
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert error_of(response)["code"] == "request_too_large"
    assert taken == 11
    assert dispatcher.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "zstd"},
        {},
    ],
)
async def test_body_that_is_not_plain_json_is_refused_i2(headers: dict[str, str]) -> None:
    async with client_of(create_app(make_services())) as client:
        response = await client.post("/v1/chat/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert error_of(response)["type"] == "invalid_request_error"


async def test_content_type_may_carry_a_charset() -> None:
    async with client_of(create_app(make_services())) as client:
        response = await client.post(
            "/v1/chat/completions",
            json=CHAT,
            headers={"content-type": "Application/JSON; charset=utf-8"},
        )
    assert response.status_code == 200
