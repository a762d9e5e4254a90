"""What runs inside `serve run` before Ray starts."""

import inspect
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.child import SERVER_ID
from core.errors import ImpetusError
from deployments.serve.processes import owner_of
from deployments.start import driver
from deployments.start.driver import prepare_driver
from deployments.start.environment import ROOT, ray_settings


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    saved = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("IMPETUS_", "RAY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("IMPETUS_HOME", str(tmp_path))
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process ids for which a guard was started."""
    started: list[int] = []
    monkeypatch.setattr(driver, "start_guard", lambda root, _: started.append(root))
    monkeypatch.setattr(driver, "check_authentication", lambda: None)
    monkeypatch.setattr("deployments.start.checks.end_former_servers", lambda **_: None)
    monkeypatch.setattr("deployments.start.checks.remove_former_folders", lambda: None)
    monkeypatch.setattr("deployments.start.checks.check_port", lambda _: None)
    return started


def command_line(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["/venv/bin/serve", "run", *words])


def test_the_hook_is_the_one_that_ray_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.worker import _maybe_modify_runtime_env

    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", ray_settings()["RAY_RUNTIME_ENV_HOOK"])
    command_line(monkeypatch, "serve_config.yaml")
    monkeypatch.setattr(driver, "_start_by_hand", lambda config: seen.append(config))
    seen: list[Path] = []
    monkeypatch.chdir(ROOT)
    assert _maybe_modify_runtime_env({"a": 1}, False) == {"a": 1}
    assert seen == [Path("serve_config.yaml")]


def test_rays_dashboard_reaches_nothing_but_this_machine_o6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The function that is replaced starts it, and it asks with a library that takes a proxy."""
    from ray._common.usage import usage_lib
    from ray._private import services

    started: list[tuple[str, dict[str, str] | None]] = []

    def start(command: list[str], kind: str, **options: Any) -> None:
        del command
        started.append((kind, options.get("env_updates")))

    monkeypatch.setattr(services, "start_ray_process", start)
    driver.keep_dashboard_on_this_machine()
    services.start_ray_process([], "dashboard", fate_share=True)
    services.start_ray_process([], "raylet", fate_share=True)
    (_, dashboard), other = started
    assert other == ("raylet", None)
    assert dashboard is not None
    assert dashboard["http_proxy"] == dashboard["HTTPS_PROXY"] == "http://127.0.0.1:9"
    assert "= start_ray_process(" in inspect.getsource(services.start_api_server)
    assert "PROCESS_TYPE_DASHBOARD" in inspect.getsource(services.start_api_server)
    asks = inspect.getsource(usage_lib.get_cloud_from_metadata_requests)
    assert "requests.get(url, headers=headers, timeout=1)" in asks


def test_a_start_by_hand_is_completed_and_guarded(
    guards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line(monkeypatch, "--address", "local", str(ROOT / "serve_config.yaml"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_driver({})
    assert guards == [os.getpid()]
    assert owner_of(os.environ[SERVER_ID]) == os.getpid()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "127.0.0.1" in os.environ["no_proxy"]
    # A background job of a shell inherits an ignored SIGINT.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_wrong_start_by_hand_ends_with_one_sentence(
    guards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("applications:\n- import_path: deployments.app:build\n  args: {port: .nan}\n")
    command_line(monkeypatch, str(config))
    with pytest.raises(SystemExit) as caught:
        prepare_driver({})
    assert str(caught.value.code).startswith("impetus: Invalid settings: port: ")
    assert guards == []


def test_a_start_by_hand_without_tokens_is_refused(
    guards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ImpetusError("no token")

    command_line(monkeypatch, str(ROOT / "serve_config.yaml"))
    monkeypatch.setattr(driver, "check_authentication", refuse)
    with pytest.raises(SystemExit, match="impetus: no token"):
        prepare_driver({})
    assert guards == []


@pytest.mark.parametrize("words", [["other:app"], ["other.yaml"], ["missing.yaml"], []])
def test_other_applications_are_left_alone(
    guards: list[int], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("applications: [{import_path: other:app}]")
    command_line(monkeypatch, *words)
    before = dict(os.environ)
    assert prepare_driver(None) is None
    assert dict(os.environ) == before
    assert guards == []


@pytest.mark.parametrize("words", [["--address", "auto"], ["--address=10.0.0.1:6379"], ["-a", ""]])
def test_a_cluster_of_the_users_own_is_joined_as_asked(
    guards: list[int], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line(monkeypatch, *words, str(ROOT / "serve_config.yaml"))
    before = dict(os.environ)
    prepare_driver({})
    assert dict(os.environ) == before
    assert guards == []


def test_a_first_process_of_a_container_is_a_start_by_hand(
    guards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line(monkeypatch, str(ROOT / "serve_config.yaml"))
    monkeypatch.setattr(os, "getppid", lambda: 0)
    deaths: list[int] = []
    monkeypatch.setattr(driver, "die_with_parent", lambda: deaths.append(1))
    prepare_driver({})
    assert deaths == []
    assert guards == [os.getpid()]


def test_under_the_launcher_the_process_dies_with_it(
    guards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line(monkeypatch, str(ROOT / "serve_config.yaml"))
    deaths: list[int] = []
    monkeypatch.setattr(driver, "die_with_parent", lambda: deaths.append(1))
    monkeypatch.setenv(SERVER_ID, f"{os.getppid()}-ab")
    prepare_driver({})
    assert deaths == [1]
    assert guards == []
