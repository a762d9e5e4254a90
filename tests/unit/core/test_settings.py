"""Tests of settings: precedence of the environment, defaults and validation."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from core.settings import Settings
from core.units import GIB


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("IMPETUS_"):
            monkeypatch.delenv(name)


def test_environment_wins_over_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_PORT", "9000")
    monkeypatch.setenv("IMPETUS_MEMORY_BUDGET", "12GiB")
    monkeypatch.setenv("IMPETUS_MODELS_PATH", f"/a{os.pathsep}/b")
    settings = Settings(port=8000, memory_budget=1)
    assert settings.port == 9000
    assert settings.memory_budget == 12 * GIB
    assert settings.models_path == [Path("/a"), Path("/b")]


def test_defaults_listen_on_loopback_only() -> None:
    settings = Settings()
    assert settings.host == "127.0.0.1"
    assert not settings.is_public
    assert settings.base_url == "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "0"),
        ("port", "70000"),
        ("memory_budget", "-1"),
        ("memory_budget", "much"),
        ("max_sequences", "0"),
        ("api_key", ""),
        ("api_key", "schlüssel"),
        ("scan_interval_s", "0"),
        ("scan_interval_s", "inf"),
        ("memory_budget", "0"),
        ("keep_alive_s", "-1"),
        ("keep_alive_s", "nan"),
        ("request_timeout_s", "inf"),
        ("step_limit_s", "0"),
        ("drain_limit_s", "-1"),
    ],
)
def test_wrong_values_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"IMPETUS_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name):
        Settings()


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValidationError, match="prot"):
        Settings.model_validate({"prot": 8000})


def test_arguments_of_the_application_builder_are_validated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMPETUS_PORT", "9001")
    assert Settings.model_validate({"port": 8000, "formats": ["echo"]}).port == 9001


def test_the_key_is_not_shown() -> None:
    assert "sesame" not in repr(Settings(api_key="sesame"))
