"""Workarounds that make apple-fm-sdk 0.2.1 safe in a server, and its errors translated."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from core.errors import (
    BackendUnavailable,
    EngineFailed,
    ImpetusError,
    QueueFull,
    RequestError,
    UnsupportedParameter,
)
from core.types import JsonValue

# A stream that is closed early frees its callback while Swift may still call it once more, so
# the most recent ones are kept alive.
_KEPT_CALLBACKS = 256
_recent_callbacks: deque[Any] = deque(maxlen=_KEPT_CALLBACKS)
_this_thread = threading.local()


def import_sdk() -> Any:
    """Import the SDK's package.  Raises BackendUnavailable."""
    try:
        import apple_fm_sdk
    except ImportError as error:
        raise BackendUnavailable(f"apple-fm-sdk cannot be imported: {error}") from error
    return apple_fm_sdk


@contextmanager
def capture_stream_callbacks(take: Callable[[Any], None]) -> Generator[None]:
    """Call `take` with the callback object of every stream that this thread opens meanwhile.

    The SDK waits for snapshots without yielding to its event loop, and forever if the system
    never ends the stream; the callback object is the only way to wake it (`end_stream`).
    """
    _patch_stream_callbacks()
    _this_thread.take = take
    try:
        yield
    finally:
        _this_thread.take = None


def end_stream(callback: Any) -> None:
    """End the SDK's stream of this callback now; the SDK then cancels the system's task."""
    if callback is not None:
        callback.completed.set()
        callback.queue.put(None)


def _patch_stream_callbacks() -> None:
    """Replace the SDK's stream callback by one that is kept alive and passed to `take`."""
    from apple_fm_sdk import c_helpers, session

    if session.StreamingCallback is not c_helpers.StreamingCallback:
        return

    class CapturedCallback(c_helpers.StreamingCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            _recent_callbacks.append(self)
            take = getattr(_this_thread, "take", None)
            if take is not None:
                take(self)

    session.StreamingCallback = CapturedCallback


async def open_transcript(transcript: Mapping[str, JsonValue], model: Any) -> tuple[Any, Any]:
    """Return a session that continues a transcript, and the transcript as the SDK's object."""
    sdk = import_sdk()
    from apple_fm_sdk import c_helpers

    history = await sdk.Transcript.from_dict(transcript)
    # The SDK forgets this pointer when the session replaces it, and never releases it.
    owner = c_helpers._ManagedObject(history.session_ptr)
    session = sdk.LanguageModelSession.from_transcript(history, model=model)
    del owner
    return session, history


def translate_error(problem: BaseException, param: str) -> ImpetusError:
    """Translate an error of the SDK; `param` is the field that requested guided generation.

    Guardrails and refusals are errors of the request: a retry would be refused again.
    """
    sdk = import_sdk()
    text = str(problem)[:300]
    match problem:
        case sdk.UnsupportedGuideError() | sdk.InvalidGenerationSchemaError():
            return UnsupportedParameter(
                f"Apple's guided generation does not support the JSON schema: {text}", param=param
            )
        case sdk.GuardrailViolationError():
            return RequestError(
                "Apple's safety guardrails refused the request; rephrase it.", param="messages"
            )
        case sdk.RefusalError():
            return RequestError(
                "Apple's model refused to answer; rephrase the request.", param="messages"
            )
        case sdk.UnsupportedLanguageOrLocaleError():
            return RequestError(
                "Apple's model does not support the language of the request.", param="messages"
            )
        case sdk.RateLimitedError():
            return QueueFull(
                "macOS limits the rate of requests to Apple's model; try again later.",
                retry_after_s=10,
            )
        case sdk.ConcurrentRequestsError():
            return QueueFull(
                "Apple's model is busy with other requests; try again later.", retry_after_s=1
            )
        case sdk.AssetsUnavailableError():
            return BackendUnavailable(
                "macOS has not downloaded Apple's model yet; try again later."
            )
    return EngineFailed(f"Apple's model failed: {text or type(problem).__name__}")
