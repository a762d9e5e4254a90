"""Child processes keep their limits and deadlines, and nothing of them is left."""

import asyncio
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from core.child import (
    SERVER_ID,
    AnswerTooLong,
    AsyncChild,
    Child,
    ChildEnded,
    ChildTookMemory,
    describe_exit,
    kept_environment,
)

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
FAMILY = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    # Their stdout is the parent's stderr, so that the pipe for answers is the parent's alone.
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=2) for _ in range(2)]
    print(*(child.pid for child in children), flush=True)
"""
Start = Callable[..., Child]


def command(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def start() -> Iterator[Start]:
    """Start children, and end them after the test."""
    children: list[Child] = []

    def begin(code: str, *, limit: int = 1000, keeps_stderr: bool = False) -> Child:
        children.append(
            Child(command(code), ENVIRONMENT, answer_limit_bytes=limit, keeps_stderr=keeps_stderr)
        )
        return children[-1]

    yield begin
    for child in children:
        child.close()


def assert_gone(*pids: int) -> None:
    """Wait until no process of these ids runs; a zombie that nobody reaps has ended too."""
    deadline = soon()
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


ECHO = "import sys\nfor line in sys.stdin: print(line.strip()[::-1], flush=True)"


def test_lines_and_bytes_are_exchanged(start: Start) -> None:
    child = start(ECHO)
    child.write(b"abc\nde\n", soon())
    assert child.read_line(soon()) == b"cba\n"
    assert child.read(3, soon()) == b"ed\n"
    child.close_input()
    child.close_input()
    assert child.wait(30) == 0
    assert (child.close(), child.close()) == (0, 0)


def test_the_child_leads_a_session_without_environment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "canary")
    monkeypatch.setenv("KEPT", "1")
    child = start("import os\nprint(os.getsid(0), os.getpgrp(), 'SECRET' in os.environ)")
    assert child.read_line(soon()).decode().split() == [str(child.pid)] * 2 + ["False"]
    assert kept_environment("KEPT", "NOT_SET") == {"KEPT": "1"}


def test_a_child_that_gives_way_does_so_within_its_session_and_as_a_session(start: Start) -> None:
    code = """
        from core.child import give_way
        from pathlib import Path
        import os
        before = os.nice(0)
        give_way()
        group = Path("/proc/self/autogroup")
        has_group = os.access(group, os.W_OK) and group.read_text()
        print(os.nice(0) - before, group.read_text().split()[-1] if has_group else 10)
    """
    gained, of_session = start(code).read_line(soon()).split()
    assert int(of_session) == 10
    # A process that is nice already cannot become nicer than 19.
    assert int(gained) == min(10, 19 - os.nice(0))


def test_a_child_that_hangs_meets_its_deadline_and_is_killed(start: Start) -> None:
    child = start("import time\nprint('up', flush=True)\ntime.sleep(600)")
    child.read_line(soon())
    with pytest.raises(TimeoutError):
        child.read_line(soon(0.05))
    with pytest.raises(TimeoutError):
        child.read(1, soon(-1))
    assert child.close() == -9
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(child.pid)


@pytest.mark.parametrize("end", ["time.sleep(600)", "os._exit(3)"])
def test_a_childs_descendants_are_killed_with_it(start: Start, end: str) -> None:
    child = start(textwrap.dedent(FAMILY) + end)
    grandchildren = [int(pid) for pid in child.read_line(soon()).split()]
    assert all(is_running(pid) for pid in grandchildren)
    assert child.close(grace_s=0.0 if "sleep" in end else 30.0) == (-9 if "sleep" in end else 3)
    assert_gone(child.pid, *grandchildren)


def test_kill_ends_a_read_of_another_thread(start: Start) -> None:
    child = start("import time\nprint('up', flush=True)\ntime.sleep(600)")
    child.read_line(soon())
    child.kill()
    with pytest.raises(ChildEnded):
        child.read_line(soon())
    assert child.close() == -9
    child.kill()


def test_an_answer_over_the_limit_is_refused(start: Start) -> None:
    child = start("import sys\nwhile True: sys.stdout.write('x' * 5000)")
    with pytest.raises(AnswerTooLong):
        child.read_line(soon())
    with pytest.raises(AnswerTooLong):
        child.read(1001, soon())
    assert len(child.read(1000, soon())) == 1000


def test_a_child_that_never_reads_meets_the_deadline_for_writing(start: Start) -> None:
    child = start("import time\ntime.sleep(600)")
    with pytest.raises(TimeoutError):
        child.write(b"x" * 10_000_000, soon(0.1))


def test_a_child_that_has_exited_takes_no_message(start: Start) -> None:
    child = start("raise SystemExit(4)")
    assert child.wait(30) == 4
    with pytest.raises(ChildEnded):
        child.write(b"x", soon())
    with pytest.raises(ChildEnded):
        child.read(1, soon())
    assert child.close() == 4


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import os; os.abort()", "was killed by SIGABRT"),
        ("import os; os._exit(3)", "ended with code 3"),
        (
            "import core.child\ncore.child.limit_cpu(0)\nwhile True: pass",
            "used too much processor time",
        ),
        (
            "import core.child\ncore.child.limit_process(address_space_bytes=2**30)\n"
            "try: bytearray(2**31)\nexcept MemoryError: raise SystemExit(7)",
            "ended with code 7",
        ),
        (
            "import core.child\ncore.child.limit_process(data_bytes=2**28)\n"
            "try: bytearray(2**30)\nexcept MemoryError: raise SystemExit(8)",
            "ended with code 8",
        ),
        (
            "import core.child, os, tempfile\nfile, path = tempfile.mkstemp()\nos.unlink(path)\n"
            "core.child.limit_process(file_bytes=0)\n"
            "try: os.write(file, b'x')\nexcept OSError: raise SystemExit(9)",
            "ended with code 9",
        ),
    ],
)
def test_the_cause_of_death_is_told(start: Start, code: str, cause: str) -> None:
    if "_bytes=2" in code and sys.platform != "linux":
        pytest.skip("macOS refuses limits on memory")
    child = start(code)
    with pytest.raises(ChildEnded):
        child.read_line(soon())
    assert describe_exit(child.close(grace_s=30)) == cause


def test_signals_without_a_name_are_described() -> None:
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-250) == "was killed by signal 250"


def test_the_end_of_stderr_is_kept_however_much_there_is(start: Start) -> None:
    child = start(
        "import sys\nfor i in range(50000): print('line', i, file=sys.stderr)\nprint('done')",
        keeps_stderr=True,
    )
    assert child.read_line(soon()) == b"done\n"
    child.wait(30)
    child.close()
    assert child.stderr_tail == "line 49997 / line 49998 / line 49999"


def test_a_child_that_floods_stderr_meets_its_deadline(start: Start) -> None:
    child = start("import sys\nwhile True: sys.stderr.write('x' * 100)", keeps_stderr=True)
    with pytest.raises(TimeoutError):
        child.read_line(soon(0.2))


def test_a_child_that_closes_stderr_can_still_answer(start: Start) -> None:
    child = start("import os\nos.close(2)\nprint('done')", keeps_stderr=True)
    assert child.read_line(soon()) == b"done\n"
    assert child.stderr_tail == ""


def test_descriptors_over_1023_work(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("this system allows too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        child = start(ECHO)
        child.write(b"abc\n", soon())
        assert child.read_line(soon()) == b"cba\n"
        child.close()
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_libraries_print_is_not_among_the_answers(start: Start) -> None:
    child = start(
        "import core.child, os\nout = core.child.take_stdout()\nprint('noise', flush=True)\n"
        "os.system('echo more noise')\nout.write('answer\\n')",
        keeps_stderr=True,
    )
    assert child.read_line(soon()) == b"answer\n"
    child.wait(30)
    child.close()
    assert child.stderr_tail == "noise / more noise"


PARENT = """
    import subprocess, sys, time
    code = (
        "import core.child, os, signal, sys, time\\n"
        "core.child.{function}({argument})\\n"
        "print(os.getpid(), flush=True)\\n"
        "{then}"
    )
    subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("function", "argument", "then"),
    [
        ("die_with_input", "sys.stdin", "time.sleep(600)"),
        pytest.param(
            "die_with_parent",
            "",
            "os.kill(os.getpid(), signal.SIGSTOP)",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="see prctl(2)"),
        ),
    ],
)
def test_a_child_dies_with_its_parent(function: str, argument: str, then: str) -> None:
    code = PARENT.format(function=function, argument=argument, then=then)
    with subprocess.Popen(command(code), env=ENVIRONMENT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    assert_gone(child)


async def test_async_child_exchanges_lines_and_tells_its_end(tmp_path: Path) -> None:
    code = "import os, sys\nprint(input(), os.getcwd())\nsys.stderr.write('bad\\n')\nsys.exit(5)"
    child = AsyncChild(command(code), ENVIRONMENT, tmp_path)
    await child.write(b"hello\n")
    assert [line async for line in child.lines()] == [f"hello {tmp_path}\n".encode()]
    assert await child.wait() == 5
    with pytest.raises(ChildEnded):
        await child.write(b"more\n")
    await child.close()
    await child.close()
    assert child.stderr_tail == "bad"


async def test_async_child_is_killed_with_its_descendants(tmp_path: Path) -> None:
    for end in ("time.sleep(600)", "sys.stdout.close(); os._exit(0)"):
        child = AsyncChild(command(textwrap.dedent(FAMILY) + end), ENVIRONMENT, tmp_path)
        grandchildren = [int(pid) for pid in (await anext(child.lines())).split()]
        if "exit" in end:
            assert await asyncio.wait_for(child.wait(), 30) == 0
        await child.close()
        assert_gone(child.pid, *grandchildren)


async def test_async_child_may_not_write_long_lines(tmp_path: Path) -> None:
    child = AsyncChild(command("print('x' * 10**6)"), ENVIRONMENT, tmp_path)
    with pytest.raises(AnswerTooLong):
        await anext(child.lines())
    await child.close()


async def test_async_child_that_never_reads_can_be_cancelled(tmp_path: Path) -> None:
    child = AsyncChild(command("import time; time.sleep(600)"), ENVIRONMENT, tmp_path)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(child.write(b"x" * 10_000_000), 0.1)
    await child.close()
    assert_gone(child.pid)


def test_a_child_carries_the_servers_id_and_nothing_else_of_the_environment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_ID, "1-ab")
    monkeypatch.setenv("SECRET", "sesame")
    child = start(f"import os; print(os.environ.get('{SERVER_ID}'), os.environ.get('SECRET'))")
    assert child.read_line(soon()) == b"1-ab None\n"


def resident_bytes(pid: int) -> int:
    """Return what `footprint_bytes` of macOS returns, as Linux tells it."""
    return int(psutil.Process(pid).memory_info().rss)


HOLDS = """
    import sys, time
    print("begun", flush=True)
    data = bytearray({mebibytes} << 20)
    print("held", flush=True)
    time.sleep(600)
"""


def read_lines(child: Child) -> None:
    while child.read_line(soon()):
        pass


@pytest.fixture
def without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("core.process_memory.footprint_bytes", resident_bytes)


@pytest.mark.usefixtures("without_limits")
@pytest.mark.parametrize("keeps_stderr", [False, True])
def test_a_child_that_holds_too_much_is_killed_where_the_system_has_no_limit(
    keeps_stderr: bool,
) -> None:
    child = Child(
        command(HOLDS.format(mebibytes=200)),
        ENVIRONMENT,
        answer_limit_bytes=1000,
        keeps_stderr=keeps_stderr,
        memory_limit_bytes=100 << 20,
    )
    with pytest.raises(ChildTookMemory):
        read_lines(child)
    assert child.close() == -9


@pytest.mark.usefixtures("without_limits")
def test_a_child_below_its_limit_is_read_and_meets_its_deadline() -> None:
    child = Child(
        command(HOLDS.format(mebibytes=1)),
        ENVIRONMENT,
        answer_limit_bytes=1000,
        memory_limit_bytes=100 << 20,
    )
    assert [child.read_line(soon()), child.read_line(soon())] == [b"begun\n", b"held\n"]
    with pytest.raises(TimeoutError):
        child.read_line(soon(0.12))
    child.close()


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="proc_pid_rusage is on macOS only")
def test_this_mac_tells_the_memory_of_a_child() -> None:
    child = Child(
        command(HOLDS.format(mebibytes=200)),
        ENVIRONMENT,
        answer_limit_bytes=1000,
        memory_limit_bytes=100 << 20,
    )
    with pytest.raises(ChildTookMemory):
        read_lines(child)
    child.close()
