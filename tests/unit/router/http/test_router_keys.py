"""API keys with scopes: what each opens, how it is created, revoked and limited, and its cost."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from catalog.key_store import KeyStore
from core.errors import RateLimited
from core.keys import hash_api_key, new_api_key
from deployments.router import credentials as credentials_module
from deployments.router.credentials import StoredCredentials
from router.app import create_app
from tests.clock import Clock
from tests.fakes import CHAT_MODEL, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement

TOKEN = "canary-token-5678"
OWN_KEY = "canary-key-1234"
CHAT = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.sqlite"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def credentials(path: Path, clock: Clock) -> AsyncIterator[StoredCredentials]:
    stored = StoredCredentials(path, clock=clock, now=clock)
    yield stored
    stored.close()


@pytest.fixture
def make_app(credentials: StoredCredentials) -> Callable[..., FastAPI]:
    def make(**settings: Any) -> FastAPI:
        services = make_services(**settings)
        return create_app(
            replace(
                services,
                management=FakeManagement(),
                management_token=TOKEN,
                credentials=credentials,
            )
        )

    return make


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The texts that were hashed slowly."""
    seen: list[bytes] = []

    def count(text: bytes, salt: bytes) -> bytes:
        seen.append(text)
        return hash_api_key(text, salt)

    monkeypatch.setattr(credentials_module, "hash_api_key", count)
    return seen


@pytest.mark.parametrize(
    ("scopes", "statuses"),
    [
        (["inference"], (200, 403, 403, 403, 403)),
        (["read"], (403, 200, 200, 403, 403)),
        (["manage"], (403, 200, 200, 200, 200)),
        (["inference", "read"], (200, 200, 200, 403, 403)),
    ],
    ids=str,
)
async def test_a_key_opens_what_its_scopes_say_n9(
    credentials: StoredCredentials,
    make_app: Callable[..., FastAPI],
    scopes: list[str],
    statuses: tuple[int, ...],
) -> None:
    _, text = await credentials.create_key("mine", scopes, None)
    calls: list[tuple[str, str, Any]] = [
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
        ("GET", "/api/models", None),
        ("POST", f"/api/models/{CHAT_MODEL}/load", {}),
        ("GET", "/api/keys", None),
    ]
    async with client_of(make_app(), authorization=f"Bearer {text}") as http:
        answers = [await http.request(method, url, json=body) for method, url, body in calls]
        assert tuple(answer.status_code for answer in answers) == statuses
        for answer in answers:
            if answer.status_code == 403:
                assert "'mine' has the scopes" in error_of(answer)["message"]
        assert (await http.get("/healthz")).status_code == 200


async def test_inference_is_open_until_a_key_exists(
    credentials: StoredCredentials, make_app: Callable[..., FastAPI]
) -> None:
    async with client_of(make_app()) as http:
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        key, text = await credentials.create_key("a", ["inference"], None)
        refused = await http.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        for headers in ({"x-api-key": text}, {"authorization": f"bearer {text}"}):
            answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200
        await credentials.revoke_key(key.id)
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_other_machines_need_a_key_also_after_the_last_one_was_revoked(
    credentials: StoredCredentials, make_app: Callable[..., FastAPI]
) -> None:
    key, text = await credentials.create_key("a", ["inference"], None)
    async with client_of(make_app(host="0.0.0.0"), authorization=f"Bearer {text}") as http:
        assert (await http.get("/v1/models")).status_code == 200
        await credentials.revoke_key(key.id)
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/metrics")).status_code == 401


async def test_the_key_of_the_settings_has_all_scopes_beside_stored_ones(
    credentials: StoredCredentials, make_app: Callable[..., FastAPI]
) -> None:
    _, text = await credentials.create_key("a", ["inference"], None)
    async with client_of(make_app(api_key=OWN_KEY)) as http:
        for key, statuses in ((OWN_KEY, (200, 200, 200)), (text, (200, 403, 403))):
            headers = {"authorization": f"Bearer {key}"}
            found = [
                (await http.get(url, headers=headers)).status_code
                for url in ("/v1/models", "/metrics", "/api/keys")
            ]
            assert tuple(found) == statuses


async def test_keys_are_created_listed_and_revoked_by_the_api(
    make_app: Callable[..., FastAPI], clock: Clock
) -> None:
    async with client_of(make_app(), authorization=f"Bearer {TOKEN}") as http:
        body = {"name": "laptop", "scopes": ["read", "manage"], "expires_in_days": 1}
        made = await http.post("/api/keys", json=body)
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        key = made.json()
        mine = {"authorization": f"Bearer {key['key']}"}
        assert (await http.get("/metrics", headers=mine)).status_code == 200
        listed = (await http.get("/api/keys")).json()["keys"]
        assert [(one["id"], one["name"], one["scopes"]) for one in listed] == [
            (key["id"], "laptop", ["manage", "read"])
        ]
        assert listed[0]["last_used_at"] == clock.now
        assert "key" not in listed[0]
        assert (await http.delete(f"/api/keys/{key['id']}")).status_code == 204
        assert (await http.delete(f"/api/keys/{key['id']}")).status_code == 404
        assert (await http.get("/api/keys")).json() == {"keys": []}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": "a"}, "scopes"),
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "scopes": ["root"]}, "scopes"),
        ({"name": " ", "scopes": ["read"]}, "name"),
        ({"name": "a", "scopes": ["read"], "expires_in_days": 0}, "expires_in_days"),
        ({"name": "a", "scopes": ["read"], "expires_in_days": 1e9}, "expires_in_days"),
        ({"name": "a", "scopes": ["read"], "extra": 1}, "extra"),
    ],
    ids=str,
)
async def test_an_invalid_key_is_refused_with_the_field(
    make_app: Callable[..., FastAPI], body: dict[str, Any], param: str
) -> None:
    async with client_of(make_app(), authorization=f"Bearer {TOKEN}") as http:
        answer = await http.post("/api/keys", json=body)
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)
        assert (await http.get("/api/keys")).json() == {"keys": []}


async def test_no_page_lists_or_creates_keys_without_a_credential_n5(
    make_app: Callable[..., FastAPI],
) -> None:
    async with client_of(make_app(), origin="http://localhost:5173") as http:
        body = {"name": "a", "scopes": ["manage"]}
        assert (await http.post("/api/keys", json=body)).status_code == 403
        assert (await http.get("/api/keys")).status_code == 403


async def test_an_expired_key_is_refused_and_does_not_open_the_server(
    credentials: StoredCredentials, make_app: Callable[..., FastAPI], clock: Clock
) -> None:
    _, text = await credentials.create_key("a", ["inference"], clock.now + 10)
    async with client_of(make_app(), authorization=f"Bearer {text}") as http:
        assert (await http.get("/v1/models")).status_code == 200
        clock.now += 10
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers={"authorization": ""})).status_code == 401


async def test_keys_of_the_command_line_count_within_a_second(
    path: Path, credentials: StoredCredentials, clock: Clock
) -> None:
    other = KeyStore(path)
    key, text = other.create("a", ["read"], now=clock.now)
    clock.now += 1
    assert credentials.has_keys
    assert await credentials.verify_key(text.encode()) == key
    other.revoke(key.id)
    clock.now += 1
    assert credentials.known_key(text.encode()) is None
    assert not credentials.has_keys
    other.close()


async def test_a_key_is_hashed_once_however_often_it_is_sent(
    credentials: StoredCredentials, hashes: list[bytes], clock: Clock
) -> None:
    key, text = await credentials.create_key("a", ["read"], None)
    found = await asyncio.gather(*(credentials.verify_key(text.encode()) for _ in range(40)))
    assert {one and one.id for one in found} == {key.id}
    clock.now += 5
    known = credentials.known_key(text.encode())
    assert known is not None
    assert len(hashes) == 1


async def test_wrong_keys_cost_little(credentials: StoredCredentials, hashes: list[bytes]) -> None:
    _, text = await credentials.create_key("a", ["read"], None)
    for _ in range(3):
        wrong = [text[:-1] + ("a" if text[-1] != "a" else "b"), new_api_key()[1], "x", "imp-", ""]
        for one in wrong:
            assert await credentials.verify_key(one.encode()) is None
    # The same wrong text is hashed once; a key with an unknown id, or no key at all, never.
    assert len(hashes) == 1


async def test_a_flood_of_wrong_keys_is_refused_and_known_keys_go_on(
    credentials: StoredCredentials, make_app: Callable[..., FastAPI], monkeypatch: Any
) -> None:
    key, text = await credentials.create_key("a", ["inference"], None)
    assert await credentials.verify_key(text.encode()) is not None
    gate = threading.Event()
    at_once: list[int] = []
    running = 0

    def slow(given: bytes, salt: bytes) -> bytes:
        nonlocal running
        running += 1
        at_once.append(running)
        gate.wait(20)
        running -= 1
        return hash_api_key(given, salt)

    monkeypatch.setattr(credentials_module, "hash_api_key", slow)
    wrong = [f"imp-{key.id}-{number:043}".encode() for number in range(30)]
    async with client_of(make_app(), authorization=f"Bearer {text}") as http:
        flood = [asyncio.ensure_future(credentials.verify_key(one)) for one in wrong]
        while sum(task.done() for task in flood) < 14:
            await asyncio.sleep(0)
        # A client whose key is known waits for none of them.
        assert (await http.get("/v1/models")).status_code == 200
        refused = await http.get(
            "/v1/models", headers={"authorization": f"Bearer imp-{key.id}-{'z' * 43}"}
        )
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert error_of(refused)["type"] == "rate_limit_error"
        gate.set()
        results = await asyncio.gather(*flood, return_exceptions=True)
    assert sum(isinstance(one, RateLimited) for one in results) == 14
    assert [one for one in results if not isinstance(one, RateLimited)] == [None] * 16
    assert max(at_once) == 1


async def test_the_last_use_survives_a_restart(path: Path, clock: Clock) -> None:
    first = StoredCredentials(path, clock=clock, now=clock)
    _, text = await first.create_key("a", ["read"], None)
    clock.now = 2000.0
    await first.verify_key(text.encode())
    first.close()
    second = StoredCredentials(path, clock=clock, now=clock)
    assert [key.last_used_at for key in await second.keys()] == [2000.0]
    second.close()


async def test_a_database_that_cannot_be_read_any_more_keeps_what_is_known(
    path: Path, credentials: StoredCredentials, clock: Clock
) -> None:
    _, text = await credentials.create_key("a", ["read"], None)
    assert await credentials.verify_key(text.encode()) is not None
    path.write_bytes(b"damaged" * 1000)
    for file in path.parent.glob("*-wal"):
        file.write_bytes(b"")
    clock.now += 2
    assert credentials.has_keys
    assert credentials.known_key(text.encode()) is not None
