"""Tests of the doctor's run of the server, against a stand-in that goes wrong in each way."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.doctor_lib import server
from scripts.doctor_lib.client import AnswerProblem, Client
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.processes import Processes
from scripts.doctor_lib.row import FAIL, OK, WARN, Row
from scripts.doctor_lib.server import Limits, ServerTrial, first_of_each_format
from scripts.doctor_lib.sleep import SleepWatch, sleep_during_streams
from tests.unit.scripts.doctor.conftest import Plant, find

STAND_IN = Path(__file__).with_name("stand_in_server.py")
LIMITS = Limits(start_s=15.0, answer_s=10.0, stop_s=10.0)


def trial(mode: str, limits: Limits = LIMITS) -> tuple[list[Row], Path]:
    """Return the rows of a run, and its folder."""
    machine = Machine(system="linux")
    run = ServerTrial(machine, [sys.executable, "-B", str(STAND_IN), mode], limits)
    return list(run.rows()), run._folder


def running() -> str:
    done = subprocess.run(
        ["ps", "-axwwo", "state=,command="], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Z")]
    # Those of this process: others may run the same tests.
    names = (f"{STAND_IN} ", f"ray::ServeReplica:impetus:gguf 60.{os.getpid()}")
    return "\n".join(line for line in lines if any(name in line for name in names))


def test_a_healthy_server_passes_and_is_gone() -> None:
    rows, folder = trial("healthy")
    assert [row.lines() for row in rows if row.state in (FAIL, WARN)] == []
    assert [row.what for row in rows] == [
        "server start",
        "chat, gguf",
        "embedding, onnx",
        "cancelled stream",
        "kept awake",
        "killed process",
        "unload",
        "stop by Ctrl-C",
        "left behind",
        "crash reports",
    ]
    assert find(rows, "killed process").value.startswith("replaced")
    assert "MiB after 0.1, 0.5 and 2 s" in find(rows, "unload").value
    assert folder.name.startswith("impetus-doctor-")
    assert not folder.exists()
    assert list(Path(tempfile.gettempdir()).glob(f"stand-in-{os.getpid()}-*")) == []
    assert running() == ""


@pytest.mark.parametrize(
    ("mode", "what", "state", "says"),
    [
        ("dies", "server start", FAIL, "The port cannot be used."),
        ("hangs", "server start", FAIL, "It was not ready within 3 s. Starting"),
        ("never_ready", "server start", FAIL, "It was not ready within 3 s."),
        ("empty_answer", "chat, gguf", FAIL, "The answer is empty."),
        ("zero_embedding", "embedding, onnx", FAIL, "The embedding is zero."),
        ("not_replaced", "killed process", FAIL, "HTTP 503: The process ended."),
        ("does_not_stop", "stop by Ctrl-C", WARN, "Ctrl-C did not stop it within 1 s."),
        ("ends_with_code", "stop by Ctrl-C", WARN, "It ended with code 3."),
        ("leaves_a_process", "left behind", WARN, "1 processes go on: ray::ServeReplica"),
    ],
)
def test_what_goes_wrong_is_a_row_and_nothing_is_left(
    mode: str, what: str, state: str, says: str
) -> None:
    start_s = 3.0 if what == "server start" else LIMITS.start_s
    stop_s = 1.0 if mode == "does_not_stop" else LIMITS.stop_s
    rows, folder = trial(mode, Limits(start_s, LIMITS.answer_s, stop_s))
    row = find(rows, what)
    assert (row.state, says in row.problem) == (state, True), row.lines()
    assert not folder.exists()
    assert running() == ""


def test_a_port_that_stays_open_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(8)
        port = int(other.getsockname()[1])
        monkeypatch.setattr(server, "_free_port", lambda: port)
        rows, _ = trial("dies")
    assert find(rows, "left behind").problem == f"Something still listens on port {port}."


def test_the_users_own_settings_do_not_reach_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_API_KEY", "of-the-user")
    rows, _ = trial("dies")
    assert "IMPETUS_API_KEY set: False" in find(rows, "server start").problem


def test_a_narrow_terminal_hides_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ps` cuts its lines where COLUMNS is set."""
    monkeypatch.setenv("COLUMNS", "60")
    rows, _ = trial("healthy")
    assert find(rows, "killed process").value.startswith("replaced")


LINE = "{} {} S Mon Nov 30 10:14:22 2026 {}"
# Each as long as Ray's own.
OTHERS = [LINE.format(5000 + index, 1, "x" * 300) for index in range(1000)]


@pytest.mark.parametrize("others", [OTHERS, ["12 --not=a --process a b c d e f", "[...]"]])
def test_no_process_is_lost_among_many_or_odd_ones(plant: Plant, others: list[str]) -> None:
    """The middle of a long list was cut out, and the line that this made ended the step."""
    own = LINE.format(70, 7, "ray::ServeReplica:impetus:gguf")
    middle = len(others) // 2
    lines = [LINE.format(7, 1, "python"), *others[:middle], own, *others[middle:]]
    (plant.folder / "list").write_text("\n".join(lines))
    plant.program("ps", f"cat '{plant.folder}/list'")
    processes = Processes(plant.machine())
    processes.remember(7)
    assert processes.find("ray::ServeReplica:impetus:") == 70


@pytest.mark.parametrize(("second", "is_same"), [(14, True), (15, True), (13, True), (22, False)])
def test_a_process_is_known_by_its_start_though_ps_rounds_it(
    second: int, is_same: bool, plant: Plant
) -> None:
    row = "70 7 S Mon Nov 30 10:14:{} 2026 ray::ServeReplica"
    plant.program("ps", f"echo '{row.format(14)}'")
    processes = Processes(plant.machine())
    processes.remember(7)
    plant.program("ps", f"echo '{row.format(second)}'")
    assert processes.is_alive(70) is is_same


def test_the_folder_is_removed_although_the_processes_cannot_be_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = ServerTrial(Machine(system="linux"), [sys.executable, "-c", ""], LIMITS)
    rows = run.rows()
    next(rows)

    def fail(_: Processes) -> None:
        raise ValueError("ps")

    monkeypatch.setattr(Processes, "kill", fail)
    with pytest.raises(ValueError, match="ps"):
        rows.close()
    assert not run._folder.exists()


def test_an_interrupted_trial_leaves_nothing() -> None:
    run = ServerTrial(
        Machine(system="linux"), [sys.executable, "-B", str(STAND_IN), "healthy"], LIMITS
    )
    rows = run.rows()
    assert next(rows).state == OK
    folder = run._folder
    rows.close()
    assert not folder.exists()
    assert running() == ""


ASSERTIONS = """\
Assertion status system-wide:
   PreventUserIdleSystemSleep     1
Listed by owning process:
   pid 812(caffeinate): [0x0001] 00:00:07 PreventUserIdleSystemSleep named: "caffeinate"
"""


@pytest.mark.parametrize(
    ("text", "state"), [(ASSERTIONS, OK), ("Assertion status system-wide:\n", WARN)]
)
def test_a_mac_that_is_not_kept_awake_is_found(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, text: str, state: str
) -> None:
    monkeypatch.setattr(server, "_AWAKE_S", 0.5)
    (plant.folder / "assertions").write_text(text)
    plant.program("pmset", f"cat '{plant.folder}/assertions'")
    row = ServerTrial(plant.machine(), [])._kept_awake()
    assert row.state == state
    assert row.value.startswith("pid 812(caffeinate)") is (state == OK)


class Streams(Client):
    """A server whose streams last a minute awake each; the machine sleeps during some."""

    def __init__(self, sleeps_s: list[float], problem: str = "") -> None:
        super().__init__("http://127.0.0.1:1", 1.0)
        self.sleeps_s = sleeps_s
        self.problem = problem
        self.wall_s = self.awake_s = 0.0
        self.asked: list[str] = []
        self.watch = SleepWatch(lambda: self.wall_s, lambda: self.awake_s)

    def stream(self, model: str, on_event: Callable[[], None]) -> None:
        del model
        slept_s = self.sleeps_s.pop(0) if self.sleeps_s else 0.0
        for pause_s in (30.0, slept_s, 30.0):
            self.wall_s += pause_s
            self.awake_s += 0.0 if pause_s == slept_s else pause_s
            on_event()
        if slept_s and self.problem:
            raise AnswerProblem(self.problem)

    def chat(self, model: str) -> str:
        return model

    def run(self, limit_s: float = 60.0) -> str:
        return sleep_during_streams(self, "chat", self.asked.append, self.watch, limit_s)


def test_a_stream_that_goes_on_after_sleep_passes() -> None:
    streams = Streams([0.0, 0.0, 121.0])
    assert streams.run() == "slept 121 s, the stream went on to its end"
    assert "close the lid" in streams.asked[0]


def test_a_stream_that_ends_with_the_sleep_is_found() -> None:
    with pytest.raises(AnswerProblem, match=r"After 121 s of sleep: HTTP 504: timed out"):
        Streams([121.0], "HTTP 504: timed out").run()


def test_a_machine_that_does_not_sleep_is_found() -> None:
    with pytest.raises(AnswerProblem, match="did not sleep within 0 s"):
        Streams([]).run(limit_s=0.0)


def test_before_set_up_the_server_is_skipped(plant: Plant) -> None:
    plant.unset()
    rows = list(server.rows(plant.machine()))
    assert [row.value for row in rows] == ["scripts/setup has not run yet"]


def test_the_smallest_model_of_each_format_is_asked() -> None:
    models: list[Mapping[str, Any]] = [
        {"id": "b", "format": "gguf", "capabilities": ["chat"], "parameters": 9},
        {"id": "a", "format": "gguf", "capabilities": ["chat"], "parameters": 7},
        {"id": "c", "format": "mlx", "capabilities": ["chat"], "parameters": None},
        {"id": "d", "format": "onnx", "capabilities": ["embedding"]},
    ]
    assert first_of_each_format(models, "chat") == {"gguf": "a", "mlx": "c"}
    assert first_of_each_format(models, "embedding") == {"onnx": "d"}
