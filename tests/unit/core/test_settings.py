"""Tests of settings: precedence of the environment, defaults and validation."""

import math
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from core.errors import RequestError
from core.settings import Settings, load_settings, unknown_variables
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


def test_a_leading_tilde_is_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/ada")
    monkeypatch.setenv("IMPETUS_MODELS_PATH", f"~/a{os.pathsep}/b")
    settings = load_settings({"home": "~/data", "thermal_file": "~/heat"})
    assert settings.home == Path("/users/ada/data")
    assert settings.thermal_file == Path("/users/ada/heat")
    assert settings.models_path == [Path("/users/ada/a"), Path("/b")]


def test_a_relative_path_does_not_depend_on_a_later_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"home": "data", "models_path": ["."]})
    assert (settings.home, settings.models_path) == (tmp_path / "data", [tmp_path])


# A value of every type that YAML can give, and of every size.
WRONG_VALUES: tuple[object, ...] = (
    *(1.5, float("nan"), float("inf"), -1e300, 10**30, -(10**30), True, [], [1], [[]], {"a": 1}),
    *("", " ", "x", "nan", "1e400", "9" * 5000, "a\0b", b"\xff", "~nosuchuser/x", None),
)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_any_value_is_taken_or_refused_by_name(name: str) -> None:
    taken: list[object] = []
    refusals: list[RequestError] = []
    for value in WRONG_VALUES:
        try:
            taken.append(getattr(load_settings({name: value}), name))
        except RequestError as problem:
            refusals.append(problem)
    assert len(refusals) > 5
    assert {refusal.param for refusal in refusals} == {name}
    for refusal in refusals:
        assert refusal.message.startswith(f"Invalid settings: {name}")
        assert "\n" not in refusal.message
    assert all(not isinstance(one, float) or math.isfinite(one) for one in taken)


REFUSED: dict[str, tuple[object, ...]] = {
    "memory_budget": (1.5, float("nan"), True, [1], 0, -1, 10**30),
    "port": (True, None, 1.5, float("inf"), "x", "9" * 5000, [8000]),
    "request_timeout_s": (True, 1e300, float("nan"), "1e300", -1),
    "home": ("", 3, [], "a\0b", "~nosuchuser/x"),
    "formats": ([], "", ",", 3, [3]),
    "host": ("", " ", None, 1),
    "format_idle_s": (float("inf"), float("nan")),
    "max_waiting": (10**12, 0),
    "context_length": (2**31,),
    "starters": ("maybe",),
    "models_path": (3,),
    "discover": (["jan"], "ollama,jan", 3),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_a_wrong_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"Invalid settings: {name}"):
        load_settings({name: value})


@pytest.mark.parametrize("arguments", [[1], "x", 3, {1: 2}, {None: 1}])
def test_arguments_that_are_not_names_and_values_are_refused(arguments: object) -> None:
    with pytest.raises(RequestError, match="args"):
        load_settings(arguments)


def test_the_refusal_names_the_variable_and_the_nearest_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMPETUS_THREADS", "two")
    with pytest.raises(RequestError) as caught:
        load_settings({"prot": 8000})
    assert "threads (IMPETUS_THREADS): Input should be a valid integer" in caught.value.message
    assert "prot is not a setting; did you mean port?" in caught.value.message


def test_a_key_is_not_repeated_in_a_refusal() -> None:
    with pytest.raises(RequestError) as caught:
        load_settings({"api_key": "schlüssel"})
    assert "schlüssel" not in caught.value.message


def test_variables_that_are_not_settings_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_PROT", "8001")
    monkeypatch.setenv("IMPETUS_PORT", "8001")
    (line,) = unknown_variables()
    assert line == "IMPETUS_PROT is not a setting and has no effect; did you mean IMPETUS_PORT?"
