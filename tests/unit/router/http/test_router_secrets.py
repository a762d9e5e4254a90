"""What logs, metrics and errors hold: no secret, no prompt, labels of closed sets (N18, O8)."""

import logging
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from core.metrics import Metrics
from core.settings import Settings
from core.types import TextDelta
from deployments.router.credentials import StoredCredentials
from router.app import create_app
from tests.fakes import CHAT_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import client_of
from tests.unit.router.api.test_router_api import FakeManagement

KEY = "canary-key-1234"
HUB_TOKEN = "hf_canarytoken1234567890"
PROMPT = "canary prompt of a user"
ANSWER = "canary answer of a model"
CHAT = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": PROMPT}]}
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# What a label of this server's metrics may be: names in code, routes, catalog ids, numbers.
WORD = re.compile(r"[\w/{}:.@+ -]{0,80}")


def series(text: str) -> set[str]:
    """The series of a page of metrics, without their values."""
    return {match[0].strip() for match in SAMPLE.finditer(text)}


def label_values(text: str, name: str) -> set[str]:
    """The values of a label, over all series."""
    found = (LABEL.findall(match[2] or "") for match in SAMPLE.finditer(text))
    return {value for pairs in found for label, value in pairs if label == name}


@pytest.fixture
async def stored(tmp_path: Path) -> AsyncIterator[tuple[StoredCredentials, str]]:
    """Stored credentials, and the text of a key that may do everything."""
    credentials = StoredCredentials(tmp_path / "keys.sqlite")
    _, text = await credentials.create_key("mine", ["inference", "manage"], None)
    yield credentials, text
    credentials.close()


async def test_no_secret_and_no_prompt_is_in_logs_metrics_or_errors_n18(
    stored: tuple[StoredCredentials, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    credentials, text = stored
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    services = make_services(
        FakeDispatcher(TextDelta(ANSWER), RuntimeError("a defect")), api_key=KEY
    )
    services = replace(services, management=FakeManagement(), credentials=credentials)
    secrets = (KEY, text, HUB_TOKEN, "test-management-token")
    said: list[str] = []
    async with client_of(create_app(services)) as http:

        async def ask(method: str, url: str, **options: object) -> httpx.Response:
            answer = await http.request(method, url, **options)  # type: ignore[arg-type]
            said.append(answer.text)
            return answer

        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": text}):
            await ask("POST", "/v1/chat/completions", json=CHAT, headers=headers)
            streamed = {**CHAT, "stream": True}
            await ask("POST", "/v1/chat/completions", json=streamed, headers=headers)
            broken = b'{"model": "x", "messages": [{"content": "' + PROMPT.encode()
            typed = {**headers, "content-type": "application/json"}
            await ask("POST", "/v1/chat/completions", content=broken, headers=typed)
            wrong = {**CHAT, "temperature": PROMPT, "tools": PROMPT}
            await ask("POST", "/v1/chat/completions", json=wrong, headers=headers)
            await ask("POST", "/v1/messages", json={**CHAT, "max_tokens": 5}, headers=headers)
            await ask("GET", f"/v1/models/unknown?key={KEY}&api_key={text}", headers=headers)
            await ask("PATCH", f"/api/models/{CHAT_MODEL}", json={"notes": 1}, headers=headers)
            await ask("GET", "/api/decisions", headers=headers)
            await ask("GET", "/api/keys", headers=headers)
        for wrong_key in (KEY + "x", text + "x", HUB_TOKEN):
            refused = await ask("GET", "/v1/models", headers={"x-api-key": wrong_key})
            assert refused.status_code == 401
        metrics = await ask("GET", "/metrics", headers={"x-api-key": KEY})
        assert "impetus_requests_total" in metrics.text
    lines = [
        record.getMessage() + str(record.exc_text or "") + str(record.args)
        for record in caplog.records
        if not record.name.startswith(("httpx", "httpcore"))
    ]
    assert lines
    for secret in secrets:
        assert all(secret not in page for page in said), secret
        assert all(secret not in line for line in lines), secret
    for private in (PROMPT, ANSWER):
        assert all(private not in line for line in lines), private
        assert private not in metrics.text


async def test_labels_of_metrics_come_from_closed_sets_o8() -> None:
    """However many names, paths and methods clients invent, they add no series."""
    services = make_services(FakeDispatcher(TextDelta("x"), finished()))
    metrics = Metrics()
    async with client_of(create_app(services, metrics=metrics)) as http:

        async def attack(number: int) -> None:
            name = f'evil-{number}"}}\n# '
            await http.get(f"/evil/{number}")
            await http.get(f"/v1/models/evil-{number}")
            await http.request(f"EVIL{number}", "/v1/models")
            for path in ("chat/completions", "completions", "embeddings", "messages", "responses"):
                body = {**CHAT, "model": name, name: number, "max_tokens": 5, "input": "x"}
                await http.post(f"/v1/{path}", json=body, headers={"x-request-id": name})

        await http.post("/v1/chat/completions", json=CHAT)
        await attack(0)
        first = (await http.get("/metrics")).text
        before = series((await http.get("/metrics")).text)
        for number in range(1, 60):
            await attack(number)
        page = (await http.get("/metrics")).text
    assert series(page) == before
    assert "evil" not in page.lower()
    assert "evil" not in first.lower()
    assert label_values(page, "model") <= {"", CHAT_MODEL}
    assert all(value.isdecimal() and len(value) == 3 for value in label_values(page, "status"))
    for name in ("endpoint", "code", "kind", "source"):
        assert all(WORD.fullmatch(value) for value in label_values(page, name)), name
    assert len(label_values(page, "endpoint")) < 60
    assert CHAT_MODEL in label_values(page, "model")


async def test_metrics_need_the_key_where_there_is_one_o8() -> None:
    async with client_of(create_app(make_services(api_key=KEY))) as http:
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/metrics", headers={"x-api-key": KEY})).status_code == 200
    # Without one the server listens on loopback only, and answers no other name.
    assert Settings().host == "127.0.0.1"
    async with client_of(create_app(make_services()), host="evil.com") as http:
        assert (await http.get("/metrics")).status_code == 403
