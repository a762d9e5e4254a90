"""What the server's processes inherit, whatever the user's environment says."""

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import ImpetusError
from core.settings import Settings
from deployments.start.checks import read_settings
from deployments.start.environment import (
    ROOT,
    check_ray_environment,
    environment,
    ray_settings,
    token_path,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("IMPETUS_", "RAY_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def test_the_childs_environment_has_rays_settings_unless_the_user_set_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "1")
    values = environment(Settings(home=tmp_path))
    assert values["RAY_USAGE_STATS_ENABLED"] == "0"
    assert values["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "1"
    assert set(ray_settings()) <= set(values)


MACOS = {
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",
    "KMP_BLOCKTIME": "1",
}
PRINTED = "import json, os; print(json.dumps(dict(os.environ)))"


def test_processes_get_what_the_runtimes_of_macos_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MACOS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KMP_BLOCKTIME", "50")
    values = environment(Settings(home=tmp_path))
    assert {name: values[name] for name in MACOS} == {**MACOS, "KMP_BLOCKTIME": "50"}


def test_a_shell_reads_the_same_settings_from_the_file() -> None:
    """As for `serve run` by hand."""
    script = f"set -a; . '{ROOT / 'scripts' / 'env'}'; exec '{sys.executable}' -c '{PRINTED}'"
    shell = subprocess.run(["/bin/sh", "-c", script], env={}, capture_output=True, check=True)
    found = json.loads(shell.stdout)
    assert {name: found.get(name) for name in ray_settings()} == ray_settings()
    assert set(MACOS) <= set(ray_settings())


def test_what_keeps_others_out_does_not_depend_on_the_users_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN": "guessed",
        "RAY_AUTH_TOKEN_PATH": "/tmp/shared",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }.items():
        monkeypatch.setenv(name, value)
    values = environment(Settings(home=tmp_path))
    assert values["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in values
    assert Path(values["RAY_AUTH_TOKEN_PATH"]).is_relative_to(tmp_path)
    assert values["RAY_ADDRESS"] == "local"
    assert values["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_a_relative_data_folder_is_the_same_for_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMPETUS_HOME", "data")
    assert environment(Settings())["IMPETUS_HOME"] == str(tmp_path / "data")


def test_rays_cpus_are_those_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.start.environment.usable_cpus", lambda: 3)
    resources = json.loads(environment(Settings(home=tmp_path))["RAY_OVERRIDE_RESOURCES"])
    assert resources["CPU"] == 3
    assert resources["unified_memory"] > 0


def test_this_machine_is_never_asked_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    values = environment(Settings(home=tmp_path, host="192.168.1.5"))
    assert values["http_proxy"] == "http://127.0.0.1:9"
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        assert {"127.0.0.1", "localhost", "192.168.1.5"} <= set(values[name].split(","))


@pytest.mark.parametrize("name", ["RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS"])
def test_a_listener_on_every_interface_is_refused(name: str) -> None:
    with pytest.raises(ImpetusError, match=name):
        check_ray_environment({name: "1"})
    for value in ("", "0", "false"):
        check_ray_environment({name: value})


@pytest.mark.parametrize("text", ["CPU=4", "[4]", "4", "{"])
def test_resources_that_ray_could_not_read_are_refused(text: str) -> None:
    with pytest.raises(ImpetusError, match="RAY_OVERRIDE_RESOURCES"):
        check_ray_environment({"RAY_OVERRIDE_RESOURCES": text})
    check_ray_environment({"RAY_OVERRIDE_RESOURCES": '{"CPU": 4}'})


def test_rays_token_is_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    path = token_path(settings)
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert token_path(settings) == path
    assert path.read_text() == token
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_or_open_token_file_is_mended(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    path = token_path(settings)
    path.write_text("")
    path.chmod(0o644)
    assert len(token_path(settings).read_text()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("system", "most"), [("darwin", 35), ("linux", 39)])
def test_a_folder_with_too_long_a_path_for_sockets_is_refused(
    monkeypatch: pytest.MonkeyPatch, system: str, most: int
) -> None:
    monkeypatch.setattr("sys.platform", system)
    folder = "/" + "a" * (most - 1)
    check_ray_environment({"RAY_TMPDIR": folder})
    with pytest.raises(
        ImpetusError, match=f"{most + 1} bytes, but Ray's sockets there leave {most}"
    ):
        check_ray_environment({"RAY_TMPDIR": folder + "a"})


@pytest.mark.parametrize(
    ("system", "others", "most"),
    [("darwin", {}, 71), ("linux", {"RAY_TMPDIR": "/tmp"}, 75), ("linux", {}, 39)],
)
def test_a_temporary_folder_with_too_long_a_path_for_sockets_is_refused(
    monkeypatch: pytest.MonkeyPatch, system: str, others: dict[str, str], most: int
) -> None:
    monkeypatch.setattr("sys.platform", system)
    folder = "/" + "a" * (most - 1)
    check_ray_environment({**others, "TMPDIR": f"{folder}/"})
    with pytest.raises(ImpetusError, match=f"TMPDIR has a path of {most + 1} bytes, .* {most}"):
        check_ray_environment({**others, "TMPDIR": folder + "a"})


def test_macos_own_temporary_folder_is_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    check_ray_environment({"TMPDIR": "/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T/"})


def test_a_runtime_env_is_refused_where_rays_python_has_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("applications:\n- args: {port: 8001}\n  runtime_env: {env_vars: {A: b}}\n")
    monkeypatch.setattr("sys.executable", "/opt/impetus/python")
    assert read_settings(config).port == 8001
    monkeypatch.setattr("sys.executable", "/opt/my impetus/python")
    with pytest.raises(ImpetusError, match=r"has a space\. Remove runtime_env"):
        read_settings(config)
    config.write_text("applications:\n- args: {port: 8001}\n")
    assert read_settings(config).port == 8001


def test_the_import_of_onnx_runtime_leaves_nothing_in_the_users_folders(tmp_path: Path) -> None:
    """It wrote an identifier and a database for telemetry, before anything could turn it off."""
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    home = tmp_path / "home"
    home.mkdir()
    values = {**os.environ, **ray_settings(), "HOME": str(home)}
    values.pop("XDG_CACHE_HOME", None)
    command = [sys.executable, "-B", "-c", "import onnxruntime"]
    subprocess.run(command, env=values, check=True, timeout=60)
    assert list(home.rglob("*")) == []
