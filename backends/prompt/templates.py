"""Chat templates, rendered in a process of their own because a model file may be hostile."""

import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from core.errors import BrokenModel, EngineFailed, RequestError
from core.types import JsonValue
from core.units import GIB, MIB

RENDER_LIMIT_S = 2.0
START_LIMIT_S = 30.0
OUTPUT_LIMIT_BYTES = 8 * MIB
MEMORY_LIMIT_BYTES = GIB

_WORKER = Path(__file__).with_name("template_worker.py")
_LENGTH = struct.Struct(">I")
# JSON writes a character as at most six bytes for each of its UTF-8 bytes.
_FRAME_LIMIT_BYTES = 6 * OUTPUT_LIMIT_BYTES + 1024
_READ_BYTES = 65536


class TemplateRefused(RequestError):
    """The template's own `raise_exception`: it does not take these messages."""


class _WorkerGone(Exception):
    """The worker died or broke the protocol."""


class _Worker:
    """One worker process and the frames to and from it; used by one thread at a time."""

    def __init__(self) -> None:
        # No environment: a template that escapes its sandbox finds no keys there.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin.fileno()
        self._stdout = self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)

    def exchange(self, payload: bytes | None, limit_s: float) -> dict[str, str]:
        """Send `payload`, if any, and return the answer.

        Blocks up to `limit_s`, then raises TimeoutError; raises _WorkerGone.
        """
        deadline = time.monotonic() + limit_s
        if payload is not None:
            self._write(_LENGTH.pack(len(payload)) + payload, deadline)
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if length > _FRAME_LIMIT_BYTES:
            raise _WorkerGone
        answer: dict[str, str] = json.loads(self._read(length, deadline))
        return answer

    def kill(self) -> None:
        """End the process at once; what waits for it then raises _WorkerGone."""
        self._process.kill()

    def close(self) -> None:
        """End the process and free its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                _wait(self._stdin, select.POLLOUT, deadline)
            except OSError as error:
                raise _WorkerGone from error

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            _wait(self._stdout, select.POLLIN, deadline)
            piece = os.read(self._stdout, min(count - len(data), _READ_BYTES))
            if not piece:
                raise _WorkerGone
            data += piece
        return bytes(data)


class TemplateRenderer:
    """Renders one model's chat template; thread-safe, one render at a time.

    The worker process starts with the first render, and anew after one that was killed; a
    warm render takes well under a millisecond, the first one a tenth of a second.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._broken = ""
        self._is_closed = False

    def render(self, variables: Mapping[str, JsonValue]) -> str:
        """Return the template's text with `variables`; blocks up to about two seconds.

        Raises TemplateRefused for the template's own refusal, BrokenModel for a template that
        fails, hangs or explodes, RequestError for variables that no prompt can hold, and
        EngineFailed once closed.
        """
        try:
            payload = json.dumps(variables).encode("ascii")
        except RecursionError as error:
            raise RequestError("The messages or tools are nested too deeply.") from error
        with self._lock:
            answer = self._answer(payload)
        kind = answer.get("error")
        if kind is None:
            return _checked(answer["text"])
        if kind == "raised":
            raise TemplateRefused(answer["message"], param="messages")
        if kind == "large" and 2 * len(payload) > OUTPUT_LIMIT_BYTES:
            raise RequestError("The rendered prompt is over 8 MiB.", param="messages")
        raise _broken(answer["message"] or "its output is over 8 MiB")

    def close(self) -> None:
        """End the worker, a render that runs in it included; twice is fine."""
        self._is_closed = True
        worker = self._worker
        if worker is not None:
            worker.kill()
        with self._lock:
            self._drop_worker()

    def _answer(self, payload: bytes) -> dict[str, str]:
        """Exchange one frame, with a new worker if the old one turns out to be dead."""
        for is_last in (False, True):
            try:
                answer = self._started().exchange(payload, RENDER_LIMIT_S)
            except TimeoutError as error:
                self._drop_worker()
                raise _broken(f"it took longer than {RENDER_LIMIT_S:g} s") from error
            except _WorkerGone as error:
                self._drop_worker()
                self._raise_if_closed()
                if is_last:
                    raise _broken("it ended the process that rendered it") from error
            else:
                break
        if answer.get("error") == "memory":
            self._drop_worker()
        return answer

    def _started(self) -> _Worker:
        """Return a worker that has compiled the template; a failure to compile is remembered."""
        self._raise_if_closed()
        if self._broken:
            raise _broken(self._broken)
        if self._worker is not None:
            return self._worker
        worker = self._worker = _Worker()
        try:
            worker.exchange(None, START_LIMIT_S)
        except (TimeoutError, _WorkerGone) as error:
            self._drop_worker()
            self._raise_if_closed()
            raise EngineFailed("The process for chat templates does not start.") from error
        start = {
            "template": self._template,
            "memory_bytes": MEMORY_LIMIT_BYTES,
            "output_bytes": OUTPUT_LIMIT_BYTES,
            "self_limit_s": 5 * int(RENDER_LIMIT_S),
        }
        answer = worker.exchange(json.dumps(start).encode("ascii"), RENDER_LIMIT_S)
        self._broken = answer.get("message", "")
        if self._broken:
            self._drop_worker()
            raise _broken(self._broken)
        return worker

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise EngineFailed("The model is being unloaded.")


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _broken(reason: str) -> BrokenModel:
    if reason.startswith("it took"):
        return BrokenModel(f"the model's chat template {reason.removeprefix('it ')}")
    return BrokenModel(f"the model's chat template failed: {reason}")


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "The messages hold text that is not valid Unicode (half a surrogate pair).",
            param="messages",
        ) from error
    return text
