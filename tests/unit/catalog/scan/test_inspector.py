"""The inspector: crashes of a file are its verdict, troubles of the system are not."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from catalog.scan import inspector
from catalog.scan.identify import Refused, Uninspected, Unknown
from catalog.scan.inspector import Inspector
from core.units import GIB

ANSWER = """
import json, os, signal, sys, time
for line in sys.stdin:
    path = json.loads(line)["path"]
    if "early" in path:
        {bad}
    print(json.dumps({{"stage": "its identification"}}), flush=True)
    if "bad" in path:
        {bad}
    print('{{"unknown": ["fine"]}}', flush=True)
"""


def inspector_of(bad: str, limit_s: float = 30.0) -> Inspector:
    code = ANSWER.format(bad=bad)
    return Inspector([], command=[sys.executable, "-c", code], file_limit_s=limit_s)


def killed_by(name: str) -> str:
    return f"os.kill(os.getpid(), signal.{name})"


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ("time.sleep(600)", "took longer than 1.5 s"),
        ("print('no JSON', flush=True)", "could not be read"),
        ("print('[]', flush=True)", "could not be read"),
        ("print('x' * 40_000_000, flush=True)", "could not be read"),
        (killed_by("SIGKILL"), "SIGKILL"),
        (killed_by("SIGTERM"), "SIGTERM"),
        ("""print('{"uninspected": "no descriptors"}', flush=True)""", "no descriptors"),
    ],
)
def test_a_passing_trouble_says_nothing_about_the_file(bad: str, cause: str) -> None:
    checked = inspector_of(bad, 1.5 if "1.5" in cause else 30.0)
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    outcome = checked.examine(Path("/bad"))
    assert isinstance(outcome, Uninspected)
    assert cause in outcome.reason
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    checked.close()
    checked.close()


SIGNALS = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGBUS", "SIGFPE", "SIGXCPU")


@pytest.mark.parametrize("crash", [*map(killed_by, SIGNALS), "os._exit(3)"])
def test_a_file_that_crashes_a_child_of_its_own_is_refused(crash: str, tmp_path: Path) -> None:
    count = f"os.close(os.open({str(tmp_path / 'crashes')!r} + str(os.getpid()), os.O_CREAT))"
    checked = inspector_of(f"{count}; {crash}")
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    outcome = checked.examine(Path("/bad"))
    assert isinstance(outcome, Refused)
    assert "its identification" in outcome.reason
    # The first crash may have been caused by the files before it.
    assert len(list(tmp_path.glob("crashes*"))) == 2
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    checked.close()


def test_a_file_that_crashes_only_a_used_child_is_inspected(tmp_path: Path) -> None:
    mark = str(tmp_path / "crashed")
    once = f"os.path.exists({mark!r}) or (open({mark!r}, 'w'), {killed_by('SIGSEGV')})"
    checked = inspector_of(once)
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    assert checked.examine(Path("/bad")) == Unknown(("fine",))
    checked.close()


@pytest.mark.parametrize("crash", [*map(killed_by, SIGNALS), "os._exit(3)"])
def test_a_crash_before_the_file_was_opened_is_not_its_fault(crash: str) -> None:
    checked = inspector_of(crash)
    outcome = checked.examine(Path("/early"))
    checked.close()
    assert isinstance(outcome, Uninspected)
    assert "the start of the inspection" in outcome.reason


ANSWER_MEMORY = '{"format": "gguf", "refused": "too much memory", "memory": true}'
REFUSED = f"print({ANSWER_MEMORY!r}, flush=True); continue"


@pytest.mark.parametrize(("free_bytes", "kind"), [(3 * GIB, Refused), (GIB, Uninspected)])
def test_a_file_that_takes_too_much_memory_is_refused_unless_the_machine_has_none(
    free_bytes: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=free_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    checked = inspector_of(REFUSED)
    assert isinstance(checked.examine(Path("/bad")), kind)
    checked.close()


@pytest.mark.parametrize(("free_bytes", "kind"), [(3 * GIB, Refused), (GIB, Uninspected)])
def test_a_file_takes_too_much_memory_also_where_the_system_does_not_limit_it(
    free_bytes: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def footprint(pid: int) -> int:
        return 30 * int(psutil.Process(pid).memory_info().rss)

    checked = inspector_of("data = bytearray(100_000_000); time.sleep(600)")
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("core.process_memory.footprint_bytes", footprint)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_bytes))
    outcome = checked.examine(Path("/bad"))
    assert isinstance(outcome, kind)
    assert "memory" in getattr(outcome, "reason", "")
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    checked.close()


def test_memory_that_other_files_took_is_not_the_files_fault(tmp_path: Path) -> None:
    mark = str(tmp_path / "first")
    block = [
        f"if not os.path.exists({mark!r}):",
        f"    open({mark!r}, 'w').close()",
        f"    {REFUSED}",
    ]
    checked = inspector_of(("\n" + " " * 8).join(block))
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    assert checked.examine(Path("/bad")) == Unknown(("fine",))
    checked.close()


def no_memory(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def no_descriptors(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


def no_process(*_: Any, **__: Any) -> Any:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def no_thread(*_: Any, **__: Any) -> Any:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("failure", [no_memory, no_descriptors, no_process, no_thread])
def test_a_child_that_cannot_start_says_nothing_about_the_file(
    failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = inspector_of("pass")
    with monkeypatch.context() as context:
        context.setattr("core.child.subprocess.Popen", failure)
        outcome = checked.examine(Path("/good"))
    assert isinstance(outcome, Uninspected)
    assert "did not start" in outcome.reason
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    checked.close()


def test_a_program_that_is_gone_says_nothing_about_the_file() -> None:
    checked = Inspector([], command=["/nowhere/python"])
    assert isinstance(checked.examine(Path("/good")), Uninspected)


def test_descriptors_over_1023_are_used_like_others() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("the system allows too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        checked = inspector_of("pass")
        assert checked.examine(Path("/good")) == Unknown(("fine",))
        checked.close()
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_child_that_never_reads_meets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector, "START_LIMIT_S", 0.0)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    stuck = Inspector([], command=command, file_limit_s=0.3)
    outcome = stuck.examine(Path("x" * 1_000_000))
    stuck.close()
    assert isinstance(outcome, Uninspected)
    assert "took longer than 0.3 s" in outcome.reason


def test_the_childs_environment_holds_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import json, os\ninput()\nprint(json.dumps({'unknown': [*os.environ]}))"
    checked = Inspector([], command=[sys.executable, "-c", code])
    outcome = checked.examine(Path("/good"))
    checked.close()
    assert isinstance(outcome, Unknown)
    assert "HF_TOKEN" not in outcome.reasons
    assert ("PATH" in outcome.reasons) == ("PATH" in os.environ)


NESTED = "echo 'sandbox-exec: sandbox_apply: Operation not permitted' >&2; exit 71"


@pytest.fixture
def sandbox_exec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sandbox-exec on PATH, on a machine that says it is a Mac."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for once in (inspector._warn_of_no_sandbox, inspector._sandbox_problem):
        once.cache_clear()
    yield tmp_path / "sandbox-exec"
    inspector._sandbox_problem.cache_clear()


def write_script(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def test_the_child_runs_in_the_sandbox_of_macos(sandbox_exec: Path, tmp_path: Path) -> None:
    arguments = tmp_path / "arguments"
    write_script(sandbox_exec, f'echo "$1 $2" >>{arguments}; shift 2; exec "$@"')
    for _ in range(2):
        checked = inspector_of("pass")
        assert checked.examine(Path("/good")) == Unknown(("fine",))
        checked.close()
    # The self-test, once, and each child.
    assert arguments.read_text() == f"-p {inspector._MAC_SANDBOX}\n" * 3


@pytest.mark.parametrize(
    ("sandbox", "cause"),
    [
        (NESTED, "ended with code 71"),
        ("exit 1", "ended with code 1"),
        ("exec sleep 60", "longer than 0.5 s"),
        ("", "was not found"),
    ],
)
def test_a_sandbox_that_cannot_start_is_noticed_before_the_first_file(
    sandbox: str,
    cause: str,
    sandbox_exec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(inspector, "_SELF_TEST_S", 0.5)
    starts = tmp_path / "starts"
    if sandbox:
        write_script(sandbox_exec, f"echo start >>{starts}; {sandbox}")
    checked = [inspector_of("os._exit(71)") for _ in range(2)]
    # Asked once in this process, and said once, before any file.
    assert not sandbox or starts.read_text() == "start\n"
    (record,) = caplog.records
    assert "without sandbox-exec" in record.message
    assert cause in record.message
    for each in checked:
        assert each.examine(Path("/good")) == Unknown(("fine",))
        # The file's own exit code 71 is its fault, as any other one is.
        assert isinstance(each.examine(Path("/bad")), Refused)
        each.close()
    assert len(caplog.records) == 1
    assert not sandbox or starts.read_text() == "start\n"


@pytest.mark.parametrize("is_there", [True, False], ids=["exit 71", "missing"])
def test_a_sandbox_that_cannot_start_later_is_left_out(
    is_there: bool, sandbox_exec: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_script(sandbox_exec, 'shift 2; exec "$@"')
    checked = inspector_of("os._exit(71)")
    write_script(sandbox_exec, NESTED)
    if not is_there:
        sandbox_exec.unlink()
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    assert isinstance(checked.examine(Path("/bad")), Refused)
    checked.close()
    assert [record.message.count("without sandbox-exec") for record in caplog.records] == [1]


def test_a_self_test_that_is_killed_keeps_the_sandbox(sandbox_exec: Path, tmp_path: Path) -> None:
    mark = tmp_path / "killed"
    write_script(sandbox_exec, f'[ -e {mark} ] || {{ : >{mark}; kill -9 $$; }}; shift 2; exec "$@"')
    checked = inspector_of("pass")
    assert mark.exists()
    assert checked._sandbox
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    checked.close()


def test_code_71_of_the_child_itself_is_no_verdict() -> None:
    checked = Inspector([], command=["sh", "-c", NESTED])
    outcome = checked.examine(Path("/good"))
    assert isinstance(outcome, Uninspected)
    assert "the start of the inspection ended with code 71" in outcome.reason


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="sandbox-exec is on macOS only")
def test_a_sandbox_inside_another_one_ends_with_code_71() -> None:
    outer = ["sandbox-exec", "-p", "(version 1)(allow default)"]
    ended = subprocess.run([*outer, *inspector._sandbox(), "/usr/bin/true"], check=False)
    assert ended.returncode in (0, inspector._NOT_SANDBOXED)


RUNTIMES = """
import json, os, signal, sys
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({{"stage": "its identification"}}), flush=True)
    for name in ("pytorch", "mlx"):
        if name not in request["avoid"]:
            print(json.dumps({{"stage": "its check by " + name, "runtime": name}}), flush=True)
            if name in {bad!r} and "bad" in request["path"]:
                {crash}
    print(json.dumps({{"unknown": request["avoid"]}}), flush=True)
"""


@pytest.mark.parametrize("crash", [killed_by("SIGSEGV"), killed_by("SIGXCPU"), "os._exit(1)"])
@pytest.mark.parametrize("bad", [("mlx",), ("pytorch",), ("pytorch", "mlx")])
def test_a_runtime_that_ends_the_child_is_avoided(bad: tuple[str, ...], crash: str) -> None:
    code = RUNTIMES.format(bad=bad, crash=crash)
    checked = Inspector([], command=[sys.executable, "-c", code])
    assert checked.examine(Path("/good")) == Unknown(())
    assert checked.examine(Path("/bad")) == Unknown(bad)
    assert checked.examine(Path("/good")) == Unknown(())
    checked.close()


STARTS = """
import json, os, signal, sys
if "--without=mlx" not in sys.argv:
    stage = {"stage": "its check by mlx", "runtime": "mlx", "start": True}
    print(json.dumps(stage), flush=True)
    os.kill(os.getpid(), signal.SIGILL)
for line in sys.stdin:
    print(json.dumps({"unknown": sys.argv[1:]}), flush=True)
"""


def test_a_runtime_that_cannot_start_leaves_the_other_checks() -> None:
    checked = Inspector([], command=[sys.executable, "-c", STARTS])
    for _ in range(2):
        assert checked.examine(Path("/good")) == Unknown(("--without=mlx",))
        checked.close()


SLOW = """
import json, sys, time
for line in sys.stdin:
    print(json.dumps({"stage": "its check by mlx", "runtime": "mlx"}), flush=True)
    if "slow" in line:
        time.sleep(600)
    print(json.dumps({"unknown": []}), flush=True)
"""


def test_a_check_by_a_runtime_has_more_time() -> None:
    checked = Inspector([], command=[sys.executable, "-c", SLOW], file_limit_s=0.3)
    assert checked.examine(Path("/first")) == Unknown(())
    outcome = checked.examine(Path("/slow"))
    checked.close()
    assert isinstance(outcome, Uninspected)
    assert "its check by mlx took longer than 1.2 s" in outcome.reason
