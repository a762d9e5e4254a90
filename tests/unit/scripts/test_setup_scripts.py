"""Tests of the installation: compile flags, what a Mac needs, and error messages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core import machine
from scripts import install


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


def test_build_flags_of_a_mac_have_metal_and_no_second_openmp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert install.build_flags() == "-DGGML_METAL=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"


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


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mac with command line tools: programs in the folder are the only ones on PATH."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    make_program(tmp_path / "xcode-select", f"echo '{tmp_path}'")
    make_program(tmp_path / "c++", "exit 0")
    return tmp_path


def make_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("mac")
def test_require_compiler_accepts_one_that_compiles() -> None:
    install.require_compiler()


@pytest.mark.parametrize(
    ("answer", "cure"),
    [
        ("exit 2", "xcode-select --install"),
        ("echo /no/such/Xcode.app/Contents/Developer", "sudo xcode-select --reset"),
    ],
)
def test_require_compiler_never_opens_apples_dialogue(mac: Path, answer: str, cure: str) -> None:
    make_program(mac / "xcode-select", answer)
    make_program(mac / "c++", f"echo opened >'{mac}/opened'")
    with pytest.raises(SystemExit, match=cure):
        install.require_compiler()
    assert not (mac / "opened").exists()


def test_require_compiler_explains_the_licence(mac: Path) -> None:
    said = "You have not agreed to the Xcode license agreements. Please run 'sudo xcodebuild'"
    make_program(mac / "c++", f'echo "{said}" >&2; exit 69')
    with pytest.raises(SystemExit, match="Run: sudo xcodebuild -license accept"):
        install.require_compiler()


def test_require_compiler_says_what_a_broken_one_says(mac: Path) -> None:
    make_program(mac / "c++", "echo 'first' >&2; echo 'no space left' >&2; exit 4")
    with pytest.raises(SystemExit, match=r"code 4 on an empty file: no space left\. Install"):
        install.require_compiler()


def test_set_up_can_tell_macos_before_anything_is_installed(tmp_path: Path) -> None:
    shutil.copytree(install.ROOT / "core", tmp_path / "core")
    (tmp_path / "scripts").mkdir()
    shutil.copy(install.ROOT / "scripts" / "install.py", tmp_path / "scripts")
    code = (
        "import os, sys; sys.platform = 'darwin'\n"
        "os.uname = lambda: os.uname_result(('Darwin', '', '25.1.0', '', 'arm64'))\n"
        "import install; print(install.machine().macos_release())\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    # As set-up starts it: the script's own folder on the path, and no package.
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, 'scripts')\n{code}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    release, others = done.stdout.splitlines()
    assert release == "26"
    assert others == "['__main__', 'core', 'install']"


def test_metal_library_is_installed_again_after_an_update_of_macos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(install, "pip", lambda *arguments: commands.append(arguments))
    for system in (15, 15, 26, 26):
        monkeypatch.setattr(machine, "macos_release", lambda system=system: system)
        install.refresh_metal({"mlx-metal": "0.32.4"})
    assert [command[-2:] for command in commands] == [("--force-reinstall", "mlx-metal==0.32.4")]


def test_pip_sees_the_true_version_of_macos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SYSTEM_VERSION_COMPAT", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(install, "ENVIRONMENT", tmp_path)
    seen: list[str | None] = []
    monkeypatch.setattr(
        install, "install_apple_sdk", lambda: seen.append(os.environ.get("SYSTEM_VERSION_COMPAT"))
    )
    install.main(["--apple-sdk"])
    assert seen == ["0"]
    monkeypatch.delenv("SYSTEM_VERSION_COMPAT")


def test_apples_sdk_that_cannot_be_built_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed: subprocess.CompletedProcess[bytes] = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    install.install_apple_sdk()
    assert "scripts/setup apple" in capsys.readouterr().out


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
