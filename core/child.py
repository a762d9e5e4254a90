"""Runs limited child processes: messages with deadlines, resource limits, killing the whole group.

A parent uses `Child`, or `AsyncChild` on an event loop; the child itself uses the functions from
`limit_process` on.  Every child imports this module, so it imports asyncio only where needed.
"""

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

_READ_BYTES = 65536
_LINE_BYTES = 65536
# How often the memory of a child is read where the system does not limit it, in seconds.
_MEMORY_INTERVAL_S = 0.05
_STDERR_BYTES = 8192
_STDERR_LINES = 3
_STDERR_SHOWN = 500
_PR_SET_PDEATHSIG = 1
_NICE = 10

# Every process of a server has this variable; its value names the server, so that whoever ends the
# server finds them all.  `deployments.serve.processes` sets and reads it.
SERVER_ID = "IMPETUS_SERVER_ID"


class ChildEnded(Exception):
    """The child exited, or closed the pipe in use."""


class ChildTookMemory(ChildEnded):
    """The child held more memory than its limit, and was killed for that by its parent."""


class AnswerTooLong(Exception):
    """The child's answer is longer than the limit."""


class Child:
    """A child process in its own session, with bounded reads and with deadlines.

    For one thread at a time, except `kill`.  Deadlines are values of `time.monotonic()`.  A
    descendant that starts its own session escapes `kill` and `close`.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path | None = None,
        *,
        answer_limit_bytes: int,
        keeps_stderr: bool = False,
        memory_limit_bytes: int | None = None,
    ) -> None:
        """Start the child; blocks for a few milliseconds.  Raises OSError.

        `memory_limit_bytes`: a child that holds more is killed while its parent waits for it,
        where the limits that it sets for itself do not hold: on macOS.
        """
        self._memory_limit_bytes = memory_limit_bytes if sys.platform == "darwin" else None
        self._process = subprocess.Popen(
            list(command),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if keeps_stderr else subprocess.DEVNULL,
            env={**environment, **kept_environment(SERVER_ID)},
            cwd=folder,
            start_new_session=True,
        )
        self._stdin = _nonblocking(self._process.stdin)
        self._stdout = _nonblocking(self._process.stdout)
        self._stderr = _nonblocking(self._process.stderr) if keeps_stderr else None
        self._answer_limit_bytes = answer_limit_bytes
        self._pending = bytearray()
        self._searched = 0
        self._tail = _Tail()
        self._lock = threading.Lock()
        self._is_reaped = False

    @property
    def pid(self) -> int:
        """The child's process id, which is also that of its group."""
        return self._process.pid

    @property
    def stderr_tail(self) -> str:
        """The last lines of stderr, joined by ` / `; complete after `close`."""
        return self._tail.text()

    def write(self, data: bytes | memoryview, deadline: float) -> None:
        """Send `data`; blocks until it is in the pipe.  Raises TimeoutError, ChildEnded."""
        if self.write_until(memoryview(data), deadline):
            raise TimeoutError

    def write_until(self, data: memoryview, deadline: float) -> memoryview:
        """Send what the child takes until the deadline; return the rest.  Raises ChildEnded."""
        with contextlib.suppress(TimeoutError):
            while data := self.write_some(data):
                self._wait(self._stdin, select.POLLOUT, deadline)
        return data

    def read(self, count: int, deadline: float) -> bytes:
        """Return the next `count` bytes.  Raises TimeoutError, ChildEnded, AnswerTooLong."""
        if count > self._answer_limit_bytes:
            raise AnswerTooLong
        while len(self._pending) < count:
            self._wait(self._stdout, select.POLLIN, deadline)
            self.read_some()
        return self._take(count)

    def read_line(self, deadline: float) -> bytes:
        """Return the next line, with its end.  Raises TimeoutError, ChildEnded, AnswerTooLong."""
        while not (line := self.take_line()):
            self._wait(self._stdout, select.POLLIN, deadline)
            self.read_some()
        return line

    def write_some(self, data: memoryview) -> memoryview:
        """Send what fits into the pipe without blocking; return the rest.  Raises ChildEnded."""
        try:
            while data:
                data = data[os.write(self._stdin, data) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChildEnded from error
        return data

    def read_some(self) -> None:
        """Receive what is in the pipe without blocking.  Raises ChildEnded."""
        try:
            data = os.read(self._stdout, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ChildEnded
        self._pending += data

    def take_line(self) -> bytes:
        """Return the next received line with its newline; empty if none.  Raises AnswerTooLong."""
        end = self._pending.find(b"\n", self._searched) + 1
        if not end:
            self._searched = len(self._pending)
            if self._searched > self._answer_limit_bytes:
                raise AnswerTooLong
        return self._take(end)

    def close_input(self) -> None:
        """Close the child's stdin, so that it exits by itself; may be called twice."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, limit_s: float | None = None) -> int:
        """Return the exit code, negative for a signal.  Raises subprocess.TimeoutExpired."""
        return self._process.wait(limit_s)

    def kill(self) -> None:
        """Kill the group from any thread; a blocked read or write then raises ChildEnded."""
        with self._lock:
            if not self._is_reaped:
                kill_group(self._process.pid)

    def close(self, grace_s: float = 0.0) -> int:
        """Kill the group, reap the child and close the pipes; return its exit code.

        A child that is exiting gets `grace_s` first, so that its exit code shows its own cause.
        May be called twice.
        """
        if grace_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        with self._lock:
            if not self._is_reaped:
                # Even after the child's exit: its descendants keep the group and the group's id.
                kill_group(self._process.pid)
            code = self._process.wait()
            self._is_reaped = True
        self.read_stderr()
        self._stderr = None
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        return code

    def read_stderr(self) -> bool:
        """Read stderr without blocking, keeping the end; return whether it is still open."""
        if self._stderr is None:
            return False
        # Bounded, because a child may write without end.
        for _ in range(16):
            try:
                data = os.read(self._stderr, _READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._tail.add(data)
        return True

    def descriptors(self) -> tuple[int, int, int | None]:
        """Return the parent's descriptors of stdin, stdout and, if kept, stderr."""
        return self._stdin, self._stdout, self._stderr

    def _take(self, count: int) -> bytes:
        with memoryview(self._pending) as pending:
            taken = bytes(pending[:count])
        del self._pending[:count]
        if count:
            self._searched = 0
        return taken

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        """Wait for the event; also reads stderr, because a full pipe would block the child."""
        poll = select.poll()
        poll.register(descriptor, event)
        if self._stderr is not None:
            poll.register(self._stderr, select.POLLIN)
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            if self._memory_limit_bytes is not None:
                self._check_memory(self._memory_limit_bytes)
                ready = poll.poll(min(left_s, _MEMORY_INTERVAL_S) * 1000)
                if not ready and left_s > _MEMORY_INTERVAL_S:
                    continue
            else:
                ready = poll.poll(left_s * 1000)
            if not ready:
                break
            found = {each for each, _ in ready}
            if self._stderr in found and not self.read_stderr():
                poll.unregister(self._stderr)
                self._stderr = None
            if descriptor in found:
                return
            if time.monotonic() >= deadline:
                break
        raise TimeoutError

    def _check_memory(self, limit_bytes: int) -> None:
        """Kill a child that holds too much.  Raises ChildTookMemory."""
        from core.process_memory import footprint_bytes

        held_bytes = footprint_bytes(self._process.pid)
        if held_bytes is not None and held_bytes > limit_bytes:
            self.kill()
            raise ChildTookMemory


class AsyncChild:
    """A `Child` for an event loop; callers cancel instead of passing deadlines.

    The constructor starts it, which blocks for a few milliseconds.  Lines are at most 64 KiB.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        import asyncio

        self._child = Child(
            command, environment, folder, answer_limit_bytes=_LINE_BYTES, keeps_stderr=True
        )
        self._stdin, self._stdout, self._stderr = self._child.descriptors()
        self._loop = asyncio.get_running_loop()
        assert self._stderr is not None
        self._loop.add_reader(self._stderr, self._read_stderr)

    @property
    def pid(self) -> int:
        """The child's process id, which is also that of its group."""
        return self._child.pid

    @property
    def stderr_tail(self) -> str:
        """The last lines of stderr, joined by ` / `; complete after `close`."""
        return self._child.stderr_tail

    async def write(self, data: bytes) -> None:
        """Send `data`.  Raises ChildEnded."""
        rest = memoryview(data)
        while rest := self._child.write_some(rest):
            await self._ready(self._stdin, self._loop.add_writer, self._loop.remove_writer)

    def send(self, line: bytes) -> bool:
        """Send a short line if the child takes it now; return whether it did.

        Raises ChildEnded.
        """
        return not self._child.write_some(memoryview(line))

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield lines until the child closes its stdout.  Raises AnswerTooLong."""
        while True:
            while line := self._child.take_line():
                yield line
            await self._ready(self._stdout, self._loop.add_reader, self._loop.remove_reader)
            try:
                self._child.read_some()
            except ChildEnded:
                return

    async def wait(self) -> int:
        """Wait for the child's own exit; return its code, negative for a signal."""
        import asyncio

        return await asyncio.to_thread(self._child.wait)

    async def close(self) -> None:
        """Kill the group and reap the child; must be shielded from cancellation."""
        import asyncio

        self._stop_reading_stderr()
        await asyncio.to_thread(self._child.close)

    def _read_stderr(self) -> None:
        if not self._child.read_stderr():
            self._stop_reading_stderr()

    def _stop_reading_stderr(self) -> None:
        if self._stderr is not None:
            self._loop.remove_reader(self._stderr)
            self._stderr = None

    async def _ready(
        self, descriptor: int, add: Callable[..., None], remove: Callable[[int], object]
    ) -> None:
        event = self._loop.create_future()
        add(descriptor, _set, event)
        try:
            await event
        finally:
            remove(descriptor)


def _set(event: "asyncio.Future[None]") -> None:
    if not event.done():
        event.set_result(None)


class _Tail:
    """Keeps the end of a byte stream as text for messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        self._data += data
        del self._data[:-_STDERR_BYTES]

    def text(self) -> str:
        lines = self._data.decode("utf-8", "replace").strip().splitlines()
        return " / ".join(lines[-_STDERR_LINES:])[-_STDERR_SHOWN:]


def kill_group(group: int) -> None:
    """Send SIGKILL to a process group; does nothing if it has ended."""
    # macOS raises EPERM if only a zombie is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def describe_exit(code: int) -> str:
    """Return how a process exited, as the predicate of a sentence about it."""
    if code == -signal.SIGXCPU:
        return "used too much processor time"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def kept_environment(*names: str) -> dict[str, str]:
    """Return only these variables of this process' environment, if they are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def _nonblocking(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe.fileno()


def limit_process(
    *,
    address_space_bytes: int | None = None,
    data_bytes: int | None = None,
    file_bytes: int | None = None,
    processes: int | None = None,
) -> None:
    """Set the given limits for the calling process, permanently; also disables core dumps.

    `data_bytes` limits only private memory, so that files of any size can be mapped.
    """
    limits = (
        (resource.RLIMIT_AS, address_space_bytes),
        (resource.RLIMIT_DATA, data_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    )
    for kind, limit in limits:
        if limit is not None:
            # macOS refuses limits on memory; there the parent watches it, see `Child`.
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (limit, limit))


def limit_cpu(seconds: int) -> None:
    """Limit the calling process to `seconds` more of CPU time; SIGXCPU then kills it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def take_stdout() -> IO[str]:
    """Return the stream to the parent; output of libraries to stdout now goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def give_way() -> None:
    """Let processes that compute answers go first, from now on."""
    os.nice(_NICE)
    # Linux weighs whole sessions against each other, and niceness only within one (sched(7)).
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICE), "ascii")


def die_with_parent() -> None:
    """On Linux, let the kernel kill the calling process when its parent dies.

    Works for stopped processes too.  The kernel also kills it when the thread that started it
    exits, so start it in a long-lived one.  Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_with_input(source: IO[str], on_line: Callable[[str], None] = lambda _: None) -> None:
    """Kill the calling process' group when `source`, the pipe from its parent, ends.

    `on_line` is called on a thread with each line until then, and must not raise.
    """

    def watch() -> None:
        for line in source:
            on_line(line)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
