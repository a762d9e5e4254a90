"""llama.cpp's error lines are kept by thread, so that one engine does not read another's."""

import threading

from backends.gguf.model import _NativeLog

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
