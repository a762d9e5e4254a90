"""The inspection process: same answers as in process, and hostile files kill only the child."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.base import ModelInfo
from backends.registry import backends_for
from catalog.scan.identify import Refused, Uninspected, Unknown, examine
from catalog.scan.inspector import Inspector
from tests.gguf_files import llama_gguf

FORMATS = ["gguf"]


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    inspector = Inspector(FORMATS)
    yield inspector
    inspector.close()


def hostile(expression: str, *, limit_s: float = 30.0) -> Inspector:
    """An inspector whose child, under the real limits, evaluates `expression` for a file."""
    code = f"""
import ctypes, os, socket, sys, time
import catalog.scan.inspector_child as child
def answer(self, path, avoid):
    self._send_stage("its identification")
    result = "fine"
    if path.name != "good":
        try:
            result = str({expression})
        except BaseException as problem:
            result = repr(problem)
    self._send({{"unknown": [result]}})
sys.argv[1:] = ["gguf"]
child.InspectionServer.answer = answer
child.CPU_S = 1
child.main()
"""
    return Inspector(FORMATS, command=[sys.executable, "-c", code], file_limit_s=limit_s)


def test_the_child_finds_what_the_backend_finds(tmp_path: Path, inspector: Inspector) -> None:
    path = llama_gguf(tmp_path / "model.gguf")
    info = inspector.examine(path)
    assert isinstance(info, ModelInfo)
    assert info == examine(path, backends_for(FORMATS).values())


def test_a_damaged_file_is_refused_and_another_is_unknown(
    tmp_path: Path, inspector: Inspector
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(llama_gguf(tmp_path / "model.gguf").read_bytes()[:200])
    assert isinstance(inspector.examine(damaged), Refused)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    outcome = inspector.examine(text)
    assert isinstance(outcome, Unknown)
    assert outcome.reasons[0].startswith("gguf: ")


@pytest.mark.parametrize(
    ("expression", "cause"),
    [
        ("os.abort()", "SIGABRT"),
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os._exit(3)", "code 3"),
        ("all(iter(lambda: 1, 0))", "processor time"),
    ],
)
def test_a_child_that_dies_is_a_refusal_with_the_cause(expression: str, cause: str) -> None:
    inspector = hostile(expression)
    outcome = inspector.examine(Path("/bad"))
    assert isinstance(outcome, Refused)
    assert cause in outcome.reason
    assert "its identification" in outcome.reason
    assert inspector.examine(Path("/good")) == Unknown(("fine",))
    inspector.close()


def test_a_child_that_hangs_is_ended_and_says_nothing_about_the_file() -> None:
    inspector = hostile("time.sleep(1000)", limit_s=0.2)
    assert inspector.examine(Path("/good")) == Unknown(("fine",))
    hung = inspector.examine(Path("/bad"))
    assert isinstance(hung, Uninspected)
    assert "0.2 s" in hung.reason
    inspector.close()


def test_memory_is_bounded() -> None:
    inspector = hostile("len(bytearray(3 * 2**30))")
    assert inspector.examine(Path("/bad")) == Unknown(("MemoryError()",))
    inspector.close()


def test_nothing_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / "written"
    inspector = hostile(f"os.write(os.open({str(target)!r}, os.O_WRONLY | os.O_CREAT), b'x')")
    outcome = inspector.examine(Path("/bad"))
    inspector.close()
    assert isinstance(outcome, Unknown)
    assert "File too large" in outcome.reasons[0]
    assert target.stat().st_size == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may start processes whatever the limit says")
def test_no_process_can_be_started() -> None:
    inspector = hostile("os.fork()")
    outcome = inspector.examine(Path("/bad"))
    inspector.close()
    assert isinstance(outcome, Unknown)
    assert "BlockingIOError" in outcome.reasons[0]


@pytest.mark.skipif(sys.platform != "linux", reason="macOS cuts the network by sandbox-exec")
def test_the_network_is_cut_where_the_system_allows_it() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        inspector = hostile(f"socket.socket().connect_ex(('127.0.0.1', {port}))")
        outcome = inspector.examine(Path("/bad"))
        inspector.close()
    assert isinstance(outcome, Unknown)
    if outcome.reasons == ("0",):
        pytest.skip("this system forbids namespaces to its users")
    assert int(outcome.reasons[0]) > 0


def test_the_childs_environment_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    inspector = hostile("os.environ.get('HF_TOKEN')")
    assert inspector.examine(Path("/bad")) == Unknown(("None",))
    inspector.close()
