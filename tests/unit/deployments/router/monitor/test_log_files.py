"""The log of all processes, read from the ends of their files."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest
from ray._common.formatters import JSONFormatter

from core.errors import RequestError, Unavailable
from core.types import TextDelta
from deployments.router.credentials import StoredCredentials
from deployments.router.monitor.backward_lines import ReadBudget, backward_lines
from deployments.router.monitor.log_files import LogFiles
from deployments.serve.logs import log_folder
from router.app import create_app
from router.monitor.log_service import LogFilter, LogPage
from tests.fakes import CHAT_MODEL, MANAGING, FakeDispatcher, make_services
from tests.live_server import client_of
from tests.unit.router.api.test_router_api import FakeManagement

SECOND = 10**9
START = 1_796_000_000 * SECOND
ALL = LogFilter()


def json_line(at_ns: int, message: str, **fields: Any) -> str:
    """Return a line as Ray writes it."""
    return json.dumps(
        {
            "asctime": "2026-11-30 18:05:23,322",
            "levelname": "INFO",
            "message": message,
            "filename": "replica.py",
            "lineno": 22,
            "process": 7870,
            "worker_id": "0a63",
            "deployment": "impetus_scheduler",
            "component_name": "replica",
            "timestamp_ns": at_ns,
            **fields,
        }
    )


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def many(count: int, *, step_ns: int = SECOND, first_ns: int = START) -> list[str]:
    return [json_line(first_ns + number * step_ns, f"line {number}") for number in range(count)]


def reader(folder: Path, **options: Any) -> LogFiles:
    return LogFiles(lambda: folder, **options)


async def pages(logs: LogFiles, wanted: LogFilter, limit: int) -> list[LogPage]:
    found = [await logs.last_lines(wanted, limit, "")]
    while (before := found[-1].before) is not None:
        found.append(await logs.last_lines(wanted, limit, before))
        assert len(found) < 1000
    return found


def messages(*found: LogPage) -> list[str]:
    """Return the messages of pages, of which the first is the newest, in order."""
    return [line.message for page in reversed(found) for line in page.lines]


async def test_files_are_merged_by_time(tmp_path: Path) -> None:
    write(
        tmp_path / "replica_impetus_router_a.log",
        json_line(START + 1, "one", deployment="impetus_router", request_id="req_1", field="x"),
        json_line(START + 4, "four", levelname="WARNING", exc_text="Traceback …"),
    )
    write(tmp_path / "replica_impetus_gguf_b.log", json_line(START + 3, "three"))
    write(tmp_path / "replica_impetus_gguf_c.log", json_line(START + 2, "two"))
    page = await reader(tmp_path).last_lines(ALL, 10, "")
    assert messages(page) == ["one", "two", "three", "four"]
    assert page.before is None
    first, last = page.lines[0], page.lines[-1]
    assert (first.component, first.request_id, first.fields) == ("router", "req_1", {"field": "x"})
    assert (first.level, first.place, first.process) == ("info", "replica.py:22", 7870)
    assert (last.component, last.level, last.exception) == ("scheduler", "warning", "Traceback …")
    assert last.at == pytest.approx((START + 4) / 1e9)
    assert messages(await reader(tmp_path).last_lines(LogFilter("warning"), 10, "")) == ["four"]


async def test_text_lines_of_the_controller_are_read(tmp_path: Path) -> None:
    write(
        tmp_path / "controller_7580.log",
        "INFO 2026-11-30 18:01:24,862 controller 7580 -- starting",
        "ERROR 2026-11-30 18:01:24,862 controller 7580 -- \x1b[31mfailed\x1b[0m:",
        "Traceback",
        "  at a place",
    )
    page = await reader(tmp_path).last_lines(ALL, 10, "")
    assert messages(page) == ["starting", "failed:\nTraceback\n  at a place"]
    assert [line.level for line in page.lines] == ["info", "error"]
    assert {line.component for line in page.lines} == {"controller"}
    assert len({line.id for line in page.lines}) == 2
    paged = await pages(reader(tmp_path), ALL, 1)
    assert messages(*paged) == messages(page)


async def test_pages_give_every_line_once_over_rotation(tmp_path: Path) -> None:
    lines = many(3000)
    path = tmp_path / "replica_impetus_router_a.log"
    write(path.with_name(f"{path.name}.2"), *lines[:500])
    write(path.with_name(f"{path.name}.1"), *lines[500:2400])
    write(path, *lines[2400:])
    write(tmp_path / "replica_impetus_jobs_b.log", *many(700, first_ns=START + 5))
    found = await pages(reader(tmp_path), ALL, 333)
    ids = [line.id for page in reversed(found) for line in page.lines]
    assert len(ids) == len(set(ids)) == 3700
    times = [line.at for page in reversed(found) for line in page.lines]
    assert times == sorted(times)


async def test_a_bounded_part_is_read_and_the_search_goes_on(tmp_path: Path) -> None:
    lines = many(4000)
    lines[100] = json_line(START + 100 * SECOND, "the needle")
    write(tmp_path / "replica_impetus_router_a.log", *lines)
    size = (tmp_path / "replica_impetus_router_a.log").stat().st_size
    logs = reader(tmp_path, most_bytes=200_000)
    first = await logs.last_lines(LogFilter(text="needle"), 10, "")
    assert (first.lines, first.is_partial) == ((), True)
    found = await pages(logs, LogFilter(text="needle"), 10)
    assert messages(*found) == ["the needle"]
    assert len(found) >= size // 250_000
    assert not found[-1].is_partial


async def test_earlier_lines_of_a_large_file_are_reached_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "replica_impetus_router_a.log"
    write(path, *many(20_000))
    logs = reader(tmp_path, most_bytes=300_000)
    page = await logs.last_lines(ALL, 3, f"{START + 50 * SECOND}-0")
    assert messages(page) == ["line 47", "line 48", "line 49"]


@pytest.mark.parametrize("tail", ['{"asctime": "20', "x" * 400_000])
async def test_unfinished_and_overlong_lines_are_left_out(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "replica_impetus_router_a.log"
    path.write_text("\n".join((json_line(START, "a"), json_line(START + 1, "b"), tail)))
    assert messages(await reader(tmp_path).last_lines(ALL, 10, "")) == ["a", "b"]
    path.write_text(
        "\n".join((json_line(START, "a"), "x" * 400_000, json_line(START + 1, "b"), ""))
    )
    assert messages(await reader(tmp_path).last_lines(ALL, 10, "")) == ["a", "b"]


@pytest.mark.parametrize("hostile", ["{", "[" * 50_000, '{"timestamp_ns": "x"}', "{}", "\0\xff"])
async def test_lines_of_another_form_belong_to_the_one_before(tmp_path: Path, hostile: str) -> None:
    write(tmp_path / "replica_impetus_router_a.log", json_line(START, "a"), hostile)
    (line,) = (await reader(tmp_path).last_lines(ALL, 10, "")).lines
    assert line.message.startswith("a\n")
    assert len(line.message) < 9000


async def test_nothing_is_there() -> None:
    with pytest.raises(Unavailable, match="no log file"):
        await LogFiles(lambda: None).last_lines(ALL, 10, "")
    missing = await reader(Path("/nowhere")).last_lines(ALL, 10, "")
    assert (missing.lines, missing.before) == ((), None)


@pytest.mark.parametrize("before", ["x", "1", "1-", "-1-2", f"{'9' * 30}-1"])
async def test_before_must_be_an_id(tmp_path: Path, before: str) -> None:
    with pytest.raises(RequestError, match=r"before: must be the id of a line"):
        await reader(tmp_path).last_lines(ALL, 10, before)


def test_lines_are_read_backwards_over_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    lines = [f"{number} {'x' * (number % 900)}" for number in range(400)]
    write(path, *lines)
    found = list(backward_lines(path, ReadBudget(10**9)))
    assert [text.decode() for _, text in found] == lines[::-1]
    content = path.read_bytes()
    assert all(content[at : at + len(text)] == text for at, text in found)


@pytest.fixture
def written_log(tmp_path: Path) -> Iterator[Path]:
    """The folder of a log that all our loggers write to, as they do in the server."""
    path = tmp_path / "logs" / "replica_impetus_router_a.log"
    path.parent.mkdir()
    handler = RotatingFileHandler(path)
    handler.setFormatter(JSONFormatter())
    loggers = [logging.getLogger(name) for name in ("ray.serve", "router", "core", "deployments")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.addHandler(handler)
        one.setLevel(logging.DEBUG)
    yield path.parent
    for one, level in zip(loggers, levels, strict=True):
        one.removeHandler(handler)
        one.setLevel(level)
    handler.close()


async def test_no_secret_is_in_the_log_that_is_shown(
    written_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarytoken1234567890")
    credentials = StoredCredentials(tmp_path / "keys.sqlite")
    _, text = await credentials.create_key("mine", ["inference", "manage"], None)
    dispatcher = FakeDispatcher(TextDelta("canary answer"), RuntimeError("a defect"))
    services = replace(
        make_services(dispatcher, api_key="canary-key-1234"),
        management=FakeManagement(),
        credentials=credentials,
        logs=LogFiles(log_folder),
    )
    chat = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "canary prompt"}]}
    async with client_of(create_app(services)) as http:
        for headers in (
            {"authorization": "Bearer canary-key-1234"},
            {"x-api-key": text},
            {"x-api-key": text + "x"},
        ):
            for given in (chat, {**chat, "stream": True}, {**chat, "canary field": 1}):
                await http.post(
                    "/v1/chat/completions?key=canary-key-1234", json=given, headers=headers
                )
            await http.get(f"/v1/models/{text}", headers=headers)
        assert log_folder() == written_log
        answer = await http.get("/api/logs", headers=MANAGING)
        defects = await http.get("/api/logs?level=error&text=a+defect", headers=MANAGING)
    credentials.close()
    shown = defects.json()["lines"]
    assert shown
    assert all(line["request_id"].startswith("req_") for line in shown)
    secrets = ("canary-key-1234", text, "hf_canarytoken1234567890", *MANAGING.values())
    for secret in (*secrets, "canary answer", "canary prompt"):
        assert secret not in answer.text, secret
