"""Settings that are stored for the next start."""

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import ImpetusError, RequestError, SettingFixed, Unavailable
from core.settings import Settings
from core.units import GIB
from deployments.router.monitor.settings import StoredSettings
from deployments.stored_settings import load_with_stored
from router.monitor.settings_service import SettingValue, SettingView


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("IMPETUS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("IMPETUS_HOME", str(tmp_path))
    return tmp_path


def service(**arguments: Any) -> StoredSettings:
    """Return what a server has that was started now, as its process got the settings."""
    settings: Settings = pickle.loads(pickle.dumps(load_with_stored(arguments)))
    return StoredSettings(settings)


async def shown(one: StoredSettings) -> dict[str, SettingView]:
    return {view.name: view for view in (await one.settings()).settings}


async def test_every_setting_is_told_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_THREADS", "3")
    monkeypatch.setenv("IMPETUS_API_KEY", "canary-key-1234")
    views = await shown(service(port=8010))
    assert list(views) == list(Settings.model_fields)
    assert all(view.description for view in views.values())
    threads, port, host = views["threads"], views["port"], views["host"]
    assert (threads.value, threads.source, threads.fixed_by) == (
        3,
        "environment",
        "IMPETUS_THREADS",
    )
    assert (port.value, port.default, port.source) == (8010, 8000, "configuration")
    assert (host.value, host.source, host.fixed_by) == ("127.0.0.1", "default", "")
    key = views["api_key"]
    assert (key.kind, key.value, key.next_value, key.is_set) == ("secret", None, None, True)
    assert "canary" not in str(views)


async def test_kinds_and_limits_are_those_of_the_settings() -> None:
    views = await shown(service())
    kinds = {
        "memory_budget": "bytes",
        "prefix_ram": "bytes",
        "keep_alive_s": "seconds",
        "drain_limit_s": "seconds",
        "formats": "list",
        "browse_path": "list",
        "home": "path",
        "thermal_file": "path",
        "keep_awake": "choice",
        "starters": "boolean",
        "default_model": "text",
        "port": "integer",
    }
    assert {name: views[name].kind for name in kinds} == kinds
    assert views["keep_awake"].choices == ("auto", "never")
    assert (views["port"].minimum, views["port"].maximum) == (1, 65535)
    assert views["memory_budget"].exclusive_minimum == 0
    assert views["threads"].is_nullable
    assert not views["port"].is_nullable


async def test_change_counts_from_the_next_start_on(home: Path) -> None:
    running = service(port=8010)
    values: dict[str, SettingValue] = {
        "port": 8020,
        "memory_budget": "1GiB",
        "models_path": ["/m"],
        "threads": None,
    }
    changed = await running.change(values, [])
    assert changed.restart_pending
    port = {view.name: view for view in changed.settings}["port"]
    assert (port.value, port.next_value, port.is_stored) == (8010, 8020, True)
    assert port.restart_required
    assert stat.S_IMODE((home / "settings.json").stat().st_mode) == 0o600
    stored = json.loads((home / "settings.json").read_text())
    assert stored == {"port": 8020, "memory_budget": GIB, "models_path": ["/m"], "threads": None}

    next_one = load_with_stored({"port": 8010})
    assert (next_one.port, next_one.memory_budget) == (8020, GIB)
    assert next_one.models_path == [Path("/m")]
    restarted = service(port=8010)
    assert not (await restarted.settings()).restart_pending
    assert (await shown(restarted))["port"].source == "stored"

    back = await restarted.change({}, ["port"])
    port = {view.name: view for view in back.settings}["port"]
    assert (port.value, port.next_value, port.is_stored) == (8020, 8010, False)
    assert load_with_stored({"port": 8010}).port == 8010


async def test_environment_wins_and_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    await service().change({"port": 8020, "threads": 2}, [])
    monkeypatch.setenv("impetus_port", "9000")
    assert load_with_stored({}).port == 9000
    running = service()
    with pytest.raises(SettingFixed, match="environment variable impetus_port") as caught:
        await running.change({"port": 8030, "threads": 4}, [])
    assert caught.value.param == "port"
    assert load_with_stored({}).threads == 2
    # What is not used may still be forgotten.
    await running.change({}, ["port"])
    monkeypatch.delenv("impetus_port")
    assert load_with_stored({}).port == 8000


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"port": 70_000}, "port"),
        ({"port": None}, "port"),
        ({"memory_budget": "much"}, "memory_budget"),
        ({"memory_budget": "900TiB"}, "memory_budget"),
        ({"formats": ["nope"]}, "formats"),
        ({"models_path": ["a\0b"]}, "models_path"),
        ({"host": "0.0.0.0"}, "host"),
        ({"request_timeout_s": 1e300}, "request_timeout_s"),
        ({"unknown": 1}, "unknown"),
        ({"home": "/elsewhere"}, "home"),
        ({"api_key": "canary-key-1234"}, "api_key"),
    ],
)
async def test_nothing_is_stored_when_anything_is_invalid(
    home: Path, values: dict[str, Any], param: str
) -> None:
    running = service()
    await running.change({"max_waiting": 5}, [])
    before = (home / "settings.json").read_bytes()
    with pytest.raises(ImpetusError) as caught:
        await running.change({"max_sequences": 4, **values}, ["max_waiting"])
    assert caught.value.status in (400, 409)
    assert caught.value.param == param
    assert "canary" not in caught.value.message
    assert (home / "settings.json").read_bytes() == before


async def test_value_that_is_also_reset_is_refused() -> None:
    with pytest.raises(RequestError, match="choose one"):
        await service().change({"port": 8020}, ["port"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON object of settings"),
        ("[" * 100_000, "no JSON object of settings"),
        ("[]", "no JSON object of settings"),
        (" " * 300_000, "no JSON object of settings"),
        ('{"port": "x"}', r"port: .* It is stored in .*settings\.json"),
    ],
)
async def test_damaged_file_stops_the_start_with_its_name(
    home: Path, content: str, message: str
) -> None:
    running = service()
    (home / "settings.json").write_text(content)
    with pytest.raises(RequestError, match=message):
        load_with_stored({})
    with pytest.raises(RequestError):
        await running.settings()
    with pytest.raises(RequestError):
        await running.change({"threads": 2}, [])
    assert (home / "settings.json").read_text() == content


async def test_invalid_stored_value_can_be_mended(home: Path) -> None:
    running = service()
    (home / "settings.json").write_text('{"port": "x", "threads": 2}')
    await running.change({}, ["port"])
    assert load_with_stored({}).threads == 2


async def test_settings_of_a_later_version_are_kept_and_have_no_effect(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "settings.json").write_text('{"later": 1, "home": "/x", "api_key": "y"}')
    settings = load_with_stored({})
    assert (settings.home, settings.api_key) == (home, None)
    assert "'later' in" in caplog.text
    await service().change({"threads": 2}, [])
    assert json.loads((home / "settings.json").read_text())["later"] == 1


async def test_file_that_cannot_be_written_changes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        del arguments
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deployments.stored_settings.write_atomically", full)
    with pytest.raises(Unavailable, match="the disk is full"):
        await service().change({"threads": 2}, [])
    assert not (home / "settings.json").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipe_or_folder_in_its_place_does_not_hang_the_start(
    home: Path, make: Callable[[Path], None]
) -> None:
    make(home / "settings.json")
    with pytest.raises(RequestError, match="cannot be read"):
        load_with_stored({})
