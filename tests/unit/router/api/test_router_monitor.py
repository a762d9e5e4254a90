"""The routes about the server itself."""

from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from router.app import create_app
from router.monitor.chart_service import SeriesAnswer, SeriesLine, ThermalAnswer, ThrottleView
from router.monitor.history import SeriesName
from router.monitor.log_service import LogFilter, LogLine, LogPage
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of

LINE = LogLine(
    id="5-0",
    at=5e-9,
    level="warning",
    component="router",
    message="refused: too long",
    process=7,
    place="protocol.py:264",
    request_id="req_1",
    exception="",
    fields={"field": "stopp"},
)


class FakeLogs:
    """Gives one line, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[LogFilter, int, str]] = []

    async def last_lines(self, wanted: LogFilter, limit: int, before: str) -> LogPage:
        self.asked.append((wanted, limit, before))
        return LogPage(lines=(LINE,), before="5-0", is_partial=False)


class FakeMonitor:
    """Gives one line, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, int]] = []

    async def series(self, name: SeriesName, range_s: float, points: int) -> SeriesAnswer:
        self.asked.append((name, range_s, points))
        line = SeriesLine(label="model", model="m", min=(1.0,), mean=(2.0,), max=(None,))
        return SeriesAnswer(
            name=name, unit="bytes", start=0, step_s=60, sample_s=10, begun_at=5, lines=(line,)
        )

    async def thermal(self) -> ThermalAnswer:
        throttle = ThrottleView(
            is_throttled=True,
            admits_requests=True,
            max_sequences=8,
            usual_max_sequences=16,
            prefill_chunk_tokens=64,
            usual_prefill_chunk_tokens=512,
            decode_pause_s=0.02,
            jobs_pause=True,
            prefers_small=True,
            unloads_idle=False,
        )
        return ThermalAnswer(
            state="serious",
            reason="the machine is hot (serious)",
            heat="serious",
            memory_pressure="nominal",
            is_low_power=None,
            battery=0.5,
            throttle=throttle,
            changes=1,
            throttled_s=12.5,
            sensor_problems=(),
        )


def app_with(**services: Any) -> FastAPI:
    return create_app(replace(make_services(), **services))


async def test_log_is_shown_as_asked_for() -> None:
    logs = FakeLogs()
    query = "level=warning&component=router&request_id=req_1&text=long&limit=5&before=9-1"
    async with client_of(app_with(logs=logs), **MANAGING) as http:
        shown = await http.get(f"/api/logs?{query}")
        await http.get("/api/logs")
    assert shown.headers["cache-control"] == "no-store"
    assert shown.json() == {
        "lines": [LINE.model_dump()],
        "before": "5-0",
        "is_partial": False,
    }
    assert logs.asked == [
        (LogFilter("warning", "router", "req_1", "long"), 5, "9-1"),
        (LogFilter(), 200, ""),
    ]


@pytest.mark.parametrize(
    "query", ["level=loud", "limit=0", "limit=1001", f"text={'x' * 201}", "colour=red"]
)
async def test_query_of_the_log_is_checked(query: str) -> None:
    async with client_of(app_with(logs=FakeLogs()), **MANAGING) as http:
        answer = await http.get(f"/api/logs?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


async def test_log_needs_the_right_to_manage() -> None:
    async with client_of(app_with(logs=FakeLogs())) as http:
        assert (await http.get("/api/logs")).status_code == 401
        assert (await http.get("/api/logs", headers={"sec-fetch-dest": "empty"})).status_code == 403


@pytest.mark.parametrize(
    ("wanted", "is_accepted"),
    [
        (LogFilter("warning"), True),
        (LogFilter("error"), False),
        (LogFilter(component="router"), True),
        (LogFilter(component="rout"), False),
        (LogFilter(request_id="req_1"), True),
        (LogFilter(request_id="req_2"), False),
        (LogFilter(text="TOO LONG"), True),
        (LogFilter(text="stopp"), True),
        (LogFilter(text="short"), False),
    ],
)
def test_lines_are_filtered(wanted: LogFilter, is_accepted: bool) -> None:
    assert wanted.accepts(LINE) is is_accepted


def test_lines_that_name_a_request_belong_to_it() -> None:
    line = LINE.model_copy(update={"request_id": "", "message": "events of req_7 are lost"})
    assert LogFilter(request_id="req_7").accepts(line)


async def test_charts_are_shown_as_asked_for() -> None:
    monitor = FakeMonitor()
    async with client_of(app_with(monitor=monitor)) as http:
        shown = await http.get("/api/metrics/series?name=memory&range=24h&points=600")
        await http.get("/api/metrics/series?name=cpu")
    assert shown.json()["lines"] == [
        {"label": "model", "model": "m", "min": [1.0], "mean": [2.0], "max": [None]}
    ]
    assert monitor.asked == [("memory", 86_400.0, 600), ("cpu", 3600.0, 300)]


@pytest.mark.parametrize("query", ["name=x", "", "name=cpu&range=2d", "name=cpu&points=601"])
async def test_query_of_charts_is_checked(query: str) -> None:
    async with client_of(app_with(monitor=FakeMonitor())) as http:
        answer = await http.get(f"/api/metrics/series?{query}")
    assert answer.status_code == 400
    wrong = query.rpartition("&")[2].partition("=")[0] or "name"
    assert answer.json()["error"]["param"] == wrong


async def test_thermal_state_tells_what_it_throttles() -> None:
    async with client_of(app_with(monitor=FakeMonitor())) as http:
        shown = (await http.get("/api/thermal")).json()
    assert (shown["state"], shown["throttle"]["max_sequences"]) == ("serious", 8)
