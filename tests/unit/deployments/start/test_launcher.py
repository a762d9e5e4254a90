"""What the launcher reads and prepares before anything starts."""

import os
import stat
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from core.errors import ImpetusError
from core.settings import Settings
from deployments.start.launcher import ROOT, environment, main, read_settings, token_path


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


@pytest.mark.parametrize("text", ["", "applications: []", "[]", "a: [", "applications: 3"])
def test_f13_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ImpetusError, match=r"broken\.yaml"):
        read_settings(path)


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
