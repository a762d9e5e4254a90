"""`/api/convert`: what is asked of the jobs' process, its answers, and bad input."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from core.errors import ImpetusError, ModelNotFound, UnsupportedCapability
from router.app import create_app
from router.conversion_service import (
    ConversionChoice,
    ConversionTarget,
    ConversionTargets,
    ConversionWish,
    ForecastView,
)
from router.job_service import ConversionView, JobDetail
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement

FORECAST = ForecastView(
    seconds=12.5, is_measured=True, result_bytes=45, disk_bytes=100, memory_bytes=300
)
TARGETS = ConversionTargets(
    model="m@gguf-f16",
    targets=(
        ConversionTarget(
            format="mlx",
            reason="",
            runs_here=True,
            runs_here_reason="",
            choices=(ConversionChoice(quantization="4bit", forecast=FORECAST),),
            group_sizes=(32, 64, 128),
        ),
    ),
    used_bytes=1,
    limit_bytes=2,
    free_bytes=3,
)
JOB = JobDetail(
    id="a1",
    kind="conversion",
    title="m@gguf-f16 to mlx-4bit",
    state="queued",
    reason="",
    code="",
    created_at=1.0,
    started_at=None,
    ended_at=None,
    retry_at=None,
    done_bytes=0,
    total_bytes=0,
    conversion=ConversionView(
        source="m@gguf-f16", format="mlx", quantization="4bit", group_size=64
    ),
)


class FakeConversions:
    """Notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.problem: ImpetusError | None = None

    async def conversion_targets(self, model: str) -> ConversionTargets:
        self._note(model)
        return TARGETS

    async def convert(self, wish: ConversionWish) -> JobDetail:
        self._note(wish)
        return JOB

    def _note(self, asked: object) -> None:
        self.calls.append(asked)
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def conversions() -> FakeConversions:
    return FakeConversions()


Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def ask(conversions: FakeConversions) -> Ask:
    async def send(method: str, path: str, **options: Any) -> httpx.Response:
        services = make_services()
        services = replace(services, management=FakeManagement(), conversions=conversions)
        credential = options.pop("credential", MANAGING)
        async with client_of(create_app(services), **credential) as client:
            return await client.request(method, path, **options)

    return send


async def test_choices_are_shown_with_their_forecasts(
    ask: Ask, conversions: FakeConversions
) -> None:
    answer = await ask("GET", "/api/convert/choices?model=m@gguf-f16", credential={})
    assert (answer.status_code, answer.json()) == (200, TARGETS.model_dump(mode="json"))
    assert conversions.calls == ["m@gguf-f16"]
    conversions.problem = ModelNotFound.of("m", [])
    unknown = await ask("GET", "/api/convert/choices?model=m")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "model_not_found")


async def test_a_conversion_begins_with_what_was_chosen(
    ask: Ask, conversions: FakeConversions
) -> None:
    begun = await ask("POST", "/api/convert", json={"model": "m", "format": "mlx"})
    assert (begun.status_code, begun.json()) == (202, JOB.model_dump(mode="json"))
    chosen = {"model": "m", "format": "mlx", "quantization": "8bit", "group_size": 32, "name": "n"}
    await ask("POST", "/api/convert", json=chosen)
    assert conversions.calls == [
        ConversionWish("m", "mlx"),
        ConversionWish("m", "mlx", "8bit", 32, "n"),
    ]


async def test_what_is_not_possible_gets_400_with_the_reason(
    ask: Ask, conversions: FakeConversions
) -> None:
    conversions.problem = UnsupportedCapability("m cannot be converted to onnx: it is too odd.")
    answer = await ask("POST", "/api/convert", json={"model": "m", "format": "onnx"})
    assert answer.status_code == 400
    assert "it is too odd" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "m"},
        {"format": "mlx"},
        {"model": "", "format": "mlx"},
        {"model": "m", "format": "mlx", "group_size": "64"},
        {"model": "m", "format": "mlx", "group_size": 0},
        {"model": "m", "format": "mlx", "name": "n" * 201},
        {"model": "m" * 401, "format": "mlx"},
        {"model": "m", "format": "mlx", "threads": 4},
    ],
)
async def test_bad_bodies_are_refused(
    ask: Ask, conversions: FakeConversions, body: dict[str, Any]
) -> None:
    answer = await ask("POST", "/api/convert", json=body)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"
    assert conversions.calls == []


@pytest.mark.parametrize("query", ["", "?model=", "?model=m&model=n", "?model=m&x=1"])
async def test_bad_queries_are_refused(ask: Ask, conversions: FakeConversions, query: str) -> None:
    answer = await ask("GET", f"/api/convert/choices{query}")
    assert answer.status_code == 400
    assert conversions.calls == []


async def test_converting_needs_a_credential(ask: Ask, conversions: FakeConversions) -> None:
    body = {"model": "m", "format": "mlx"}
    answer = await ask("POST", "/api/convert", json=body, credential={})
    assert answer.status_code in (401, 403)
    assert conversions.calls == []
