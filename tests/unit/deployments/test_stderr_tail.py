"""What is left of a process that died."""

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.stderr_tail import read_stderr_tail, stderr_path

ROOT = Path(__file__).resolve().parents[3]


def test_the_last_lines_are_shown_without_what_a_terminal_acts_on(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    lines = [f"line {number}" for number in range(20)]
    path.write_text("\n".join([*lines, "", "\x1b[31mfatal\x1b[0m\x07", "x" * 500]) + "\n")
    words = read_stderr_tail(str(path)).split(" / ")
    assert words[:4] == lines[-4:]
    assert words[4] == "fatal"
    assert words[5] == "x" * 200


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_log_without_words_is_no_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stderr"
    path.write_bytes(content)
    assert read_stderr_tail(str(path)) in ("", "\ufffd\ufffd")


def test_a_log_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert read_stderr_tail("") == ""
    assert read_stderr_tail(str(tmp_path / "gone")) == ""


def test_only_the_end_of_a_large_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    path.write_bytes(b"a" * 200_000 + b"\nthe end\n")
    assert read_stderr_tail(str(path)).endswith("the end")


def test_a_process_knows_where_its_stderr_goes(tmp_path: Path) -> None:
    target = tmp_path / "stderr"
    code = "from deployments.stderr_tail import stderr_path; print(stderr_path())"
    with target.open("wb") as stderr:
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            check=True,
        )
    assert found.stdout.decode().strip() == str(target)
    assert isinstance(stderr_path(), str)
