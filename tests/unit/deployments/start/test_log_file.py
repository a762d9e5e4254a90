"""The log of one run: what is kept of the last one, and how large it may become."""

from pathlib import Path

import pytest

from deployments.start import log_file
from deployments.start.log_file import LogFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "serve.log"


def run(path: Path, text: str, *, ends_in_order: bool) -> None:
    log = LogFile(path)
    with log.open() as file:
        file.write(text.encode())
    if ends_in_order:
        log.close_in_order()


def test_the_log_of_the_last_crash_is_kept_until_the_next(path: Path) -> None:
    old = path.with_name("serve.log.1")
    run(path, "first\n", ends_in_order=True)
    assert not old.exists()
    run(path, "second\n", ends_in_order=False)
    assert not old.exists()
    run(path, "third\n", ends_in_order=True)
    assert old.read_text() == "second\n"
    run(path, "fourth\n", ends_in_order=True)
    assert old.read_text() == "second\n"
    assert path.read_text().startswith("fourth\n")


def test_a_large_log_is_cut_in_place_while_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "_LIMIT_BYTES", 1000)
    monkeypatch.setattr(log_file, "_KEPT_BYTES", 300)
    log = LogFile(path)
    with log.open() as file:
        for number in range(200):
            file.write(f"line {number}\n".encode())
            file.flush()
            log.bound()
            assert path.stat().st_size <= 1100
    lines = path.read_text().splitlines()
    assert lines[0] == "impetus: earlier lines were removed"
    assert lines[-1] == "line 199"
    assert all(line.startswith(("line ", "impetus: ")) for line in lines)


def test_the_last_lines_are_shown_even_of_a_log_that_is_not_text(path: Path) -> None:
    log = LogFile(path)
    assert log.last_lines() == []
    with log.open() as file:
        file.write(b"\xff\xfe\n" * 100 + b"last\n")
    assert log.last_lines()[-1] == "last"
    assert len(log.last_lines()) == 15


def test_a_log_that_has_been_removed_is_no_problem(path: Path) -> None:
    log = LogFile(path)
    log.open().close()
    path.unlink()
    log.bound()
    assert log.text() == ""
    path.parent.rmdir()
    log.close_in_order()
