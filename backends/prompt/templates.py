"""Renders chat templates in an isolated child process, because a model file may be hostile."""

import contextlib
import json
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from backends.cancellation import check_cancelled
from core.child import AnswerTooLong, Child, ChildEnded, ChildTookMemory
from core.errors import BrokenModel, EngineFailed, RequestError, TemplateRefused
from core.text import well_formed
from core.types import JsonValue
from core.units import GIB, KIB, MIB, format_bytes

RENDER_LIMIT_S = 2.0
START_LIMIT_S = 30.0
OUTPUT_LIMIT_BYTES = 8 * MIB
MEMORY_LIMIT_BYTES = GIB
MAX_WORKERS = 4
_POLL_S = 0.2
# A slow render of more than this says nothing about the template.
_LONG_PROMPT_BYTES = 256 * KIB

_CODE_FOLDER = Path(__file__).resolve().parents[2]
# -I ignores the user's site and PYTHONPATH, so the code's folder is passed as an argument.
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from backends.prompt.template_worker import main; main()"
)
_COMMAND = [sys.executable, "-I", "-c", _WORKER, str(_CODE_FOLDER)]
_LENGTH = struct.Struct(">I")
# JSON escapes a character with at most six bytes for each of its UTF-8 bytes.
_FRAME_LIMIT_BYTES = 6 * OUTPUT_LIMIT_BYTES + 1024
_NO_ANSWER = (ChildEnded, AnswerTooLong)


class TemplateFailed(BrokenModel):
    """The template raised an error of Python: it does not expect such messages, or is broken."""


class TemplateRenderer:
    """Renders one model's chat template; thread-safe, up to four renders at a time.

    A worker process starts with the first render, after one was killed, and while the others are
    busy: a slow render delays no other one.  Only one idle worker is kept.  The first render takes
    about a tenth of a second, later ones well under a millisecond.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_WORKERS)
        self._idle: list[Child] = []
        self._busy: set[Child] = set()
        self._broken = ""
        self._is_closed = False

    def render(self, variables: Mapping[str, JsonValue]) -> str:
        """Return the text of the template with `variables`; blocks up to about two seconds.

        Raises TemplateRefused if the template calls `raise_exception`, TemplateFailed if it fails
        otherwise, BrokenModel if it hangs or its output is too large, RequestError for variables
        that cannot be rendered or are too long, EngineFailed after `close`, and Cancelled while it
        waits for other renders.
        """
        try:
            payload = json.dumps(variables).encode("ascii")
        except RecursionError as error:
            raise RequestError("The messages or tools are nested too deeply.") from error
        with self._slot():
            answer = self._request(payload)
        kind = answer.get("error")
        if kind is None:
            return well_formed(answer["text"])
        if kind == "raised":
            words = answer["message"] or "The model's chat template refuses these messages."
            raise TemplateRefused(words, param="messages")
        if kind == "large" and 2 * len(payload) > OUTPUT_LIMIT_BYTES:
            raise RequestError(
                "The rendered prompt is over the limit of 8 MiB; send shorter messages.",
                param="messages",
            )
        if kind == "broken":
            raise TemplateFailed(_broken(answer["message"]).message)
        raise _broken(answer["message"] or "its output is over the limit of 8 MiB")

    def close(self) -> None:
        """Kill the workers, also during a render, and wait for it; may be called twice."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            worker.close()
        # The renders that were running close their workers.
        for _ in range(MAX_WORKERS):
            self._slots.acquire()
        for _ in range(MAX_WORKERS):
            self._slots.release()

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """Wait until few enough renders run.  Raises Cancelled."""
        while not self._slots.acquire(timeout=_POLL_S):
            check_cancelled()
        try:
            check_cancelled()
            yield
        finally:
            self._slots.release()

    def _request(self, payload: bytes) -> dict[str, str]:
        """Exchange one frame, with a new worker if the old one has died."""
        for is_last in (False, True):
            worker = self._take_worker()
            try:
                answer = _exchange(worker, payload, RENDER_LIMIT_S)
            except TimeoutError as error:
                self._drop(worker)
                raise _too_slow(len(payload)) from error
            except _NO_ANSWER as error:
                self._drop(worker)
                self._raise_if_closed()
                if is_last:
                    raise _broken("it crashed the process that rendered it") from error
            except BaseException:
                self._drop(worker)
                raise
            else:
                break
        if answer.get("error") == "memory":
            self._drop(worker)
        else:
            self._give_back(worker)
        return answer

    def _take_worker(self) -> Child:
        """Return a worker that has compiled the template; a compile error is remembered."""
        with self._lock:
            self._raise_if_closed()
            if self._broken:
                raise _broken(self._broken)
            is_new = not self._idle
            worker = _start_worker() if is_new else self._idle.pop()
            self._busy.add(worker)
        if is_new:
            try:
                self._compile(worker)
            except BaseException:
                self._drop(worker)
                raise
        return worker

    def _compile(self, worker: Child) -> None:
        try:
            _exchange(worker, None, START_LIMIT_S)
        except (TimeoutError, *_NO_ANSWER) as error:
            self._raise_if_closed()
            raise _not_started() from error
        start = {
            "template": self._template,
            "memory_bytes": MEMORY_LIMIT_BYTES,
            "output_bytes": OUTPUT_LIMIT_BYTES,
            "self_limit_s": 5 * int(RENDER_LIMIT_S),
        }
        try:
            answer = _exchange(worker, json.dumps(start).encode("ascii"), RENDER_LIMIT_S)
        except TimeoutError as error:
            raise _broken(f"it took longer than {RENDER_LIMIT_S:g} s") from error
        except _NO_ANSWER as error:
            self._raise_if_closed()
            raise _broken("it crashed the process that compiled it") from error
        self._broken = answer.get("message", "")
        if self._broken:
            raise _broken(self._broken)

    def _give_back(self, worker: Child) -> None:
        with self._lock:
            if not (self._is_closed or self._idle):
                self._busy.discard(worker)
                self._idle.append(worker)
                return
        self._drop(worker)

    def _drop(self, worker: Child) -> None:
        with self._lock:
            self._busy.discard(worker)
        worker.close()

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise EngineFailed("The model is being unloaded.")


def _start_worker() -> Child:
    try:
        # No environment: a template that escapes its sandbox finds no keys there.
        return Child(
            _COMMAND,
            {},
            answer_limit_bytes=_FRAME_LIMIT_BYTES,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
        )
    except OSError as error:
        raise _not_started() from error


def _not_started() -> EngineFailed:
    return EngineFailed(
        "The process that renders chat templates did not start. Check the server's log and free "
        "memory, then try again."
    )


def _exchange(worker: Child, payload: bytes | None, limit_s: float) -> dict[str, str]:
    """Send a frame, if there is one, and return the answer.

    Blocks up to `limit_s`, then raises TimeoutError; raises one of `_NO_ANSWER`.
    """
    deadline = time.monotonic() + limit_s
    try:
        if payload is not None:
            worker.write(_LENGTH.pack(len(payload)) + payload, deadline)
        (length,) = _LENGTH.unpack(worker.read(_LENGTH.size, deadline))
        answer: dict[str, str] = json.loads(worker.read(length, deadline))
    except ChildTookMemory:
        # As the worker itself says where the system limits its memory.
        return {"error": "memory", "message": "it needs more memory than the limit"}
    return answer


def _too_slow(payload_bytes: int) -> BrokenModel | RequestError:
    """Return the error of a render that hit its limit, which may be due to a long prompt."""
    if payload_bytes <= _LONG_PROMPT_BYTES:
        return _broken(f"it took longer than {RENDER_LIMIT_S:g} s")
    return RequestError(
        f"Rendering the prompt of {format_bytes(payload_bytes)} took longer than "
        f"{RENDER_LIMIT_S:g} s. Send shorter messages.",
        param="messages",
    )


def _broken(reason: str) -> BrokenModel:
    if reason.startswith("it took"):
        return BrokenModel(f"the model's chat template {reason.removeprefix('it ')}")
    return BrokenModel(f"the model's chat template failed: {reason}")
