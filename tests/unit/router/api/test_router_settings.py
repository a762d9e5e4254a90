"""The routes of the server's settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from core.errors import SettingFixed
from router.app import create_app
from router.monitor.settings_service import SettingList, SettingValue, SettingView
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of

THREADS = SettingView(
    name="threads",
    variable="IMPETUS_THREADS",
    kind="integer",
    description="CPU threads per engine.",
    value=None,
    default=None,
    next_value=2,
    source="default",
    is_stored=True,
    is_set=False,
    is_nullable=True,
    choices=(),
    minimum=1,
    exclusive_minimum=None,
    maximum=512,
    fixed_by="",
    restart_required=True,
)


class FakeServerSettings:
    """Has one setting, and notes what was changed."""

    def __init__(self) -> None:
        self.changes: list[tuple[Mapping[str, SettingValue], Sequence[str]]] = []
        self.error: Exception | None = None

    async def settings(self) -> SettingList:
        return SettingList(settings=(THREADS,), restart_pending=True)

    async def change(self, values: Mapping[str, SettingValue], reset: Sequence[str]) -> SettingList:
        if self.error is not None:
            raise self.error
        self.changes.append((values, reset))
        return await self.settings()


def app_with(service: FakeServerSettings) -> FastAPI:
    return create_app(replace(make_services(), stored_settings=service))


async def test_settings_are_listed_and_changed() -> None:
    service = FakeServerSettings()
    values = {"threads": 2, "formats": ["gguf"], "drain_limit_s": 0.5, "keep_alive_s": None}
    async with client_of(app_with(service), **MANAGING) as http:
        listed = (await http.get("/api/settings")).json()
        changed = await http.patch("/api/settings", json={"values": values, "reset": ["port"]})
        await http.patch("/api/settings", json={})
    assert listed == changed.json()
    assert listed["settings"][0] == {**THREADS.model_dump(), "choices": []}
    assert service.changes == [(values, ["port"]), ({}, [])]


@pytest.mark.parametrize(
    "body",
    [
        {"threads": 2},
        {"values": []},
        {"values": {"threads": {"a": 1}}},
        {"values": {"formats": [1]}},
        {"values": {f"n{number}": 1 for number in range(101)}},
        {"reset": ["x" * 101]},
    ],
)
async def test_body_is_checked(body: Any) -> None:
    service = FakeServerSettings()
    async with client_of(app_with(service), **MANAGING) as http:
        assert (await http.patch("/api/settings", json=body)).status_code == 400
    assert service.changes == []


async def test_fixed_setting_is_a_conflict_that_names_the_variable() -> None:
    service = FakeServerSettings()
    service.error = SettingFixed("threads is set by IMPETUS_THREADS.", param="threads")
    async with client_of(app_with(service), **MANAGING) as http:
        answer = await http.patch("/api/settings", json={"values": {"threads": 2}})
    assert answer.status_code == 409
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("setting_fixed", "threads")
    assert "IMPETUS_THREADS" in error["message"]


async def test_changes_need_the_right_to_manage() -> None:
    async with client_of(app_with(FakeServerSettings())) as http:
        assert (await http.get("/api/settings")).status_code == 200
        assert (await http.patch("/api/settings", json={})).status_code == 401
