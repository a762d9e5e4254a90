"""Tests of the installation: choice of Python, compile flags, and error messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install


def make_python(folder: Path, name: str, version: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)


def find_python(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(install.ROOT / "scripts" / "find_python")],
        env={"PATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_find_python_skips_one_outside_the_range(tmp_path: Path) -> None:
    make_python(tmp_path, "python3", "3.14")
    make_python(tmp_path, "python3.12", "3.12")
    assert find_python(tmp_path).stdout == "python3.12\n"


def test_find_python_says_what_was_found(tmp_path: Path) -> None:
    make_python(tmp_path, "python3", "3.9")
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "3.11, 3.12 or 3.13" in done.stderr
    assert "python3 is 3.9" in done.stderr


def test_find_python_takes_the_named_one(tmp_path: Path) -> None:
    make_python(tmp_path, "python3", "3.12")
    make_python(tmp_path, "mine", "3.13")
    assert find_python(tmp_path, PYTHON="mine").stdout == "mine\n"


def test_setup_refuses_an_unknown_extra() -> None:
    done = subprocess.run(
        ["/bin/sh", str(install.ROOT / "scripts" / "setup"), "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "usage: scripts/setup" in done.stderr


def test_build_flags_keep_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    monkeypatch.setattr(sys, "platform", "linux")
    assert install.build_flags() == "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DGGML_CUDA=ON"


def test_cache_folder_falls_back_to_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert install.cache_folder() == tmp_path / ".cache" / "wheels"


def test_require_compiler_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match="apt-get install build-essential"):
        install.require_compiler()


def test_build_steps_are_shown_and_the_log_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "for n in range(1, 101): print(f'[{n}/100] Building CXX object')\nprint('end')\nexit(3)"
    log = tmp_path / "build.log"
    assert install.run_showing_steps([sys.executable, "-c", code], {}, log) == 3
    shown = capsys.readouterr().out.split("\n")
    assert "  compiled 100 %" in shown
    assert len(shown) < 30
    assert log.read_text().count("\n") == 101
