"""What llama.cpp logs: error lines are kept by thread, so engines do not read each other's."""

import threading
from pathlib import Path

import pytest

from backends.gguf.model import GgufModel, _NativeLog, tell_of_kernels
from core.errors import BrokenModel

ERROR = 4


def test_a_thread_takes_its_own_lines_only() -> None:
    log = _NativeLog()
    log._on_line(ERROR, b"mine\n", None)
    other = threading.Thread(target=log._on_line, args=(ERROR, b"another engine's\n", None))
    other.start()
    other.join()
    assert log.take_own_errors() == "mine"
    assert log.take_own_errors() == ""
    assert log.take_errors() == "another engine's"
    assert log.take_errors() == ""


def test_only_the_last_errors_are_kept() -> None:
    log = _NativeLog()
    for number in range(9):
        log._on_line(ERROR, f"line {number}\n".encode(), None)
    log._on_line(2, b"no error\n", None)
    assert log.take_own_errors() == "; ".join(f"line {number}" for number in range(4, 9))


@pytest.mark.parametrize(("system", "told"), [("darwin", 1), ("linux", 0)])
def test_a_mac_is_told_once_why_the_first_load_takes_longer(
    system: str,
    told: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tell_of_kernels.cache_clear()
    monkeypatch.setattr("sys.platform", system)
    caplog.set_level("INFO", logger="backends.gguf.model")
    for _ in range(2):
        # It is said before the file is opened.
        with pytest.raises(BrokenModel):
            GgufModel(tmp_path / "absent.gguf")
    assert sum("Metal kernels" in record.message for record in caplog.records) == told
    tell_of_kernels.cache_clear()
