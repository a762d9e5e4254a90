"""What the launcher reads and prepares before anything starts."""

import os
import stat
from pathlib import Path

import pytest
import yaml
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from core.errors import ImpetusError
from core.settings import Settings
from deployments.app import build
from deployments.start.launcher import ROOT, Launcher, environment, main, read_settings, token_path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("IMPETUS_", "RAY_")):
            monkeypatch.delenv(name)


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
    monkeypatch.setattr("sys.argv", ["scripts/serve", str(config)])
    monkeypatch.setattr(Launcher, "run", lambda _: 0)
    code = main()
    error = capsys.readouterr().err
    assert code == (0 if "1.5e+10" in arguments else 1)
    assert error.count("\n") == code
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


def test_the_childs_environment_has_rays_settings_unless_the_user_set_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "1")
    values = environment(Settings(home=tmp_path))
    assert values["RAY_AUTH_MODE"] == "token"
    assert values["RAY_USAGE_STATS_ENABLED"] == "0"
    assert values["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "1"
    assert Path(values["RAY_AUTH_TOKEN_PATH"]).is_relative_to(tmp_path)


def test_rays_token_is_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    path = token_path(settings)
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert token_path(settings).read_text() == token


def test_a_listener_on_every_interface_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setattr("sys.argv", ["scripts/serve"])
    assert main() == 1
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
