"""What the launcher reads and prepares before anything starts."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from core.errors import ImpetusError
from core.keys import MANAGEMENT_TOKEN, read_key
from core.settings import Settings
from deployments.app import build
from deployments.options import check_home
from deployments.start.checks import prepare_start, read_settings
from deployments.start.environment import ROOT
from deployments.start.launcher import Launcher, main, say
from tests.live_server import free_port


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("IMPETUS_", "RAY_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.start.checks.end_former_servers", lambda **_: None)
    monkeypatch.setattr("deployments.start.checks.remove_former_folders", lambda: None)


def write_config(path: Path, args: str) -> Path:
    path.write_text(f"applications:\n  - name: impetus\n    args: {args}\n")
    return path


def test_the_shipped_configuration_listens_on_loopback_only() -> None:
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    assert schema.http_options.host == "127.0.0.1"
    assert schema.proxy_location == "Disabled"
    assert schema.applications[0].import_path == "deployments.app:build"
    assert read_settings(ROOT / "serve_config.yaml") == Settings()


def test_wrong_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImpetusError, match="prot"):
        read_settings(write_config(tmp_path / "a.yaml", "{prot: 1}"))
    monkeypatch.setenv("IMPETUS_MEMORY_BUDGET", "much")
    with pytest.raises(ImpetusError, match="memory_budget"):
        read_settings(write_config(tmp_path / "b.yaml", "{}"))


@pytest.mark.parametrize(
    "text", ["", "applications: []", "[]", "a: [", "applications: 3", "[" * 5000, "a: \0", "- *b"]
)
def test_f13_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ImpetusError, match=r"broken\.yaml"):
        read_settings(path)


@pytest.mark.parametrize(
    "arguments",
    [
        *("{memory_budget: 1.5e+10}", "{memory_budget: .nan}", "{memory_budget: yes}"),
        *("{port: [8000]}", "{prot: 1}", "[1]", "text", "{1: 2}", "{format_idle_s: .inf}"),
    ],
)
def test_any_arguments_give_settings_or_one_sentence(
    tmp_path: Path,
    arguments: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path / "a.yaml", arguments)
    monkeypatch.setenv("IMPETUS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("deployments.start.checks.check_port", lambda _: None)
    monkeypatch.setattr("sys.argv", ["scripts/serve", str(config)])
    monkeypatch.setattr(Launcher, "run", lambda _: 0)
    code = main()
    error = capsys.readouterr().err
    assert code == (0 if "1.5e+10" in arguments else 2)
    assert error.count("\n") == bool(code)
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", ["missing", "folder", "latin-1"])
def test_an_unreadable_configuration_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "latin-1":
        path.write_bytes("applications: [{name: für}]".encode("latin-1"))
    with pytest.raises(ImpetusError, match=r"config\.yaml"):
        read_settings(path)


def test_the_builder_shows_a_sentence_and_no_traceback_of_wrong_arguments() -> None:
    # Ray Serve shows only the message of this class.
    for arguments in ({"memory_budget": float("nan")}, {"prot": 1}, {"formats": ["ggml"]}):
        with pytest.raises(RayServeException, match=r"memory_budget|prot|ggml") as caught:
            build(arguments)
        assert caught.value.__cause__ is None


def test_a_listener_on_every_interface_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setattr("sys.argv", ["scripts/serve"])
    assert main() == 2
    assert "RAY_SERVE_ENABLE_HA_PROXY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ("{memory_budget: 0}", "memory_budget"),
        ("{memory_budget: 4096TiB}", "memory_budget"),
        ("{keep_alive_s: -1}", "keep_alive_s"),
        ("{formats: [gguf, ggml]}", "ggml"),
    ],
)
def test_f13_what_cannot_be_is_refused_at_the_start_with_its_name(
    tmp_path: Path, arguments: str, field: str
) -> None:
    with pytest.raises(ImpetusError, match=field):
        read_settings(write_config(tmp_path / "a.yaml", arguments))


@pytest.mark.parametrize("kind", ["home is a file", "part of home is a file", "logs is a file"])
def test_a_data_folder_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "file" if "home" in kind else tmp_path
    (tmp_path / ("file" if "home" in kind else "logs")).write_text("x")
    monkeypatch.setenv("IMPETUS_HOME", str(home / "below" if "part" in kind else home))
    monkeypatch.setenv("IMPETUS_PORT", str(free_port()))
    monkeypatch.setattr("sys.argv", ["scripts/serve"])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"impetus: The data folder {home}")
    assert "a part of the path is a file" in error
    assert "IMPETUS_HOME" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_data_folder_without_write_access_is_refused(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("deployments.options.tempfile.TemporaryFile", refuse)
    with pytest.raises(ImpetusError, match=os.strerror(number)):
        check_home(Settings(home=tmp_path))


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = write_config(tmp_path / "a.yaml", f"{{port: {port}, home: {tmp_path}}}")
        with pytest.raises(ImpetusError, match=f"Port {port}"):
            prepare_start(config)


@pytest.fixture
def restored_signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_nohup_is_respected(
    tmp_path: Path, handler: signal.Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, handler)

    def fail(_: Launcher) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Launcher, "_start", fail)
    monkeypatch.setattr("deployments.start.launcher._silence", lambda: None)
    assert Launcher(tmp_path / "config.yaml", Settings(home=tmp_path)).run() == 1
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert ignored == (handler is signal.SIG_IGN)


SIGNALS = """
import signal, sys, time
from pathlib import Path
from core.settings import Settings
from deployments.start.launcher import Launcher

launcher = Launcher(Path("config.yaml"), Settings(home=Path(sys.argv[1])))
signal.signal(signal.SIGALRM, launcher._on_signal)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
end = time.monotonic() + 2
while time.monotonic() < end:
    launcher._pause(0.001)
signal.setitimer(signal.ITIMER_REAL, 0)
print(launcher._signals)
"""


def test_signals_that_interrupt_the_wait_for_them_block_nothing(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALS, str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert int(ended.stdout) > 10


def test_output_that_nobody_reads_is_reported_and_none_is_no_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        with pytest.raises(BrokenPipeError):
            say("hello")
        monkeypatch.setattr("sys.stdout", None)
        say("hello")
        with suppress(BrokenPipeError):
            broken.close()


def test_the_banner_shows_the_management_token_and_its_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(home=tmp_path)
    Launcher(ROOT / "serve_config.yaml", settings)._show_banner()
    shown = capsys.readouterr().out
    assert f"X-Impetus-Token: {read_key(tmp_path, MANAGEMENT_TOKEN)}" in shown
    assert "/api/" in shown
    assert f"{settings.base_url.removesuffix('/v1')}/session?code=" in shown


def test_the_start_names_failures_of_a_macs_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Started(Exception):
        pass

    def start(launcher: Launcher) -> None:
        del launcher
        raise Started

    monkeypatch.setattr("deployments.start.launcher.gpu_failures", lambda: ["The GPU failed."])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(Launcher, "_start", start)
    with pytest.raises(Started):
        Launcher(ROOT / "serve_config.yaml", Settings(home=tmp_path)).run()
    assert capsys.readouterr().out.splitlines()[1:] == ["The GPU failed."]
