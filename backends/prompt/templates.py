"""Renders chat templates in an isolated child process, because a model file may be hostile."""

import json
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from core.child import AnswerTooLong, Child, ChildEnded
from core.errors import BrokenModel, EngineFailed, RequestError
from core.types import JsonValue
from core.units import GIB, MIB

RENDER_LIMIT_S = 2.0
START_LIMIT_S = 30.0
OUTPUT_LIMIT_BYTES = 8 * MIB
MEMORY_LIMIT_BYTES = GIB

_CODE_FOLDER = Path(__file__).resolve().parents[2]
# -I ignores the user's site and PYTHONPATH, so the code's folder is passed as an argument.
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from backends.prompt.template_worker import main; main()"
)
_LENGTH = struct.Struct(">I")
# JSON escapes a character with at most six bytes for each of its UTF-8 bytes.
_FRAME_LIMIT_BYTES = 6 * OUTPUT_LIMIT_BYTES + 1024
_NO_ANSWER = (ChildEnded, AnswerTooLong)


class TemplateRefused(RequestError):
    """The template called `raise_exception`: it does not accept these messages."""


class TemplateRenderer:
    """Renders one model's chat template; thread-safe, one render at a time.

    The worker process starts with the first render, and again after it was killed.  The first
    render takes about a tenth of a second, later ones well under a millisecond.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._worker: Child | None = None
        self._broken = ""
        self._is_closed = False

    def render(self, variables: Mapping[str, JsonValue]) -> str:
        """Return the text of the template with `variables`; blocks up to about two seconds.

        Raises TemplateRefused if the template calls `raise_exception`, BrokenModel if it fails,
        hangs or its output is too large, RequestError for variables that cannot be rendered,
        and EngineFailed after `close`.
        """
        try:
            payload = json.dumps(variables).encode("ascii")
        except RecursionError as error:
            raise RequestError("The messages or tools are nested too deeply.") from error
        with self._lock:
            answer = self._request(payload)
        kind = answer.get("error")
        if kind is None:
            return _require_unicode(answer["text"])
        if kind == "raised":
            raise TemplateRefused(answer["message"], param="messages")
        if kind == "large" and 2 * len(payload) > OUTPUT_LIMIT_BYTES:
            raise RequestError(
                "The rendered prompt is over the limit of 8 MiB; send shorter messages.",
                param="messages",
            )
        raise _broken(answer["message"] or "its output is over the limit of 8 MiB")

    def close(self) -> None:
        """Kill the worker, also during a render; may be called twice."""
        self._is_closed = True
        worker = self._worker
        if worker is not None:
            worker.kill()
        with self._lock:
            self._drop_worker()

    def _request(self, payload: bytes) -> dict[str, str]:
        """Exchange one frame, with a new worker if the old one has died."""
        for is_last in (False, True):
            try:
                answer = _exchange(self._running_worker(), payload, RENDER_LIMIT_S)
            except TimeoutError as error:
                self._drop_worker()
                raise _broken(f"it took longer than {RENDER_LIMIT_S:g} s") from error
            except _NO_ANSWER as error:
                self._drop_worker()
                self._raise_if_closed()
                if is_last:
                    raise _broken("it crashed the process that rendered it") from error
            else:
                break
        if answer.get("error") == "memory":
            self._drop_worker()
        return answer

    def _running_worker(self) -> Child:
        """Return a worker that has compiled the template; a compile error is remembered."""
        self._raise_if_closed()
        if self._broken:
            raise _broken(self._broken)
        if self._worker is not None:
            return self._worker
        # No environment: a template that escapes its sandbox finds no keys there.
        worker = self._worker = Child(
            [sys.executable, "-I", "-c", _WORKER, str(_CODE_FOLDER)],
            {},
            answer_limit_bytes=_FRAME_LIMIT_BYTES,
        )
        try:
            _exchange(worker, None, START_LIMIT_S)
        except (TimeoutError, *_NO_ANSWER) as error:
            self._drop_worker()
            self._raise_if_closed()
            raise EngineFailed(
                "The process that renders chat templates did not start. Check the server's log and "
                "free memory, then try again."
            ) from error
        start = {
            "template": self._template,
            "memory_bytes": MEMORY_LIMIT_BYTES,
            "output_bytes": OUTPUT_LIMIT_BYTES,
            "self_limit_s": 5 * int(RENDER_LIMIT_S),
        }
        answer = _exchange(worker, json.dumps(start).encode("ascii"), RENDER_LIMIT_S)
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


def _exchange(worker: Child, payload: bytes | None, limit_s: float) -> dict[str, str]:
    """Send a frame, if there is one, and return the answer.

    Blocks up to `limit_s`, then raises TimeoutError; raises one of `_NO_ANSWER`.
    """
    deadline = time.monotonic() + limit_s
    if payload is not None:
        worker.write(_LENGTH.pack(len(payload)) + payload, deadline)
    (length,) = _LENGTH.unpack(worker.read(_LENGTH.size, deadline))
    answer: dict[str, str] = json.loads(worker.read(length, deadline))
    return answer


def _broken(reason: str) -> BrokenModel:
    if reason.startswith("it took"):
        return BrokenModel(f"the model's chat template {reason.removeprefix('it ')}")
    return BrokenModel(f"the model's chat template failed: {reason}")


def _require_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "The messages contain text that is not valid Unicode (half of a surrogate pair).",
            param="messages",
        ) from error
    return text
