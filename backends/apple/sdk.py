"""What apple-fm-sdk 0.2.1 needs from the outside to be safe in a server."""

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

# A stream that is closed early frees its callback while Swift may call it once more, so that
# many are kept; by then the call of the oldest has long been made.
_KEPT_CALLBACKS = 256
_recent_callbacks: deque[Any] = deque(maxlen=_KEPT_CALLBACKS)
_this_thread = threading.local()


def import_sdk() -> Any:
    """Return the SDK's package.  Raises BackendUnavailable."""
    try:
        import apple_fm_sdk
    except ImportError as error:
        raise BackendUnavailable(f"apple-fm-sdk cannot be imported: {error}") from error
    return apple_fm_sdk


@contextmanager
def capture_stream_callbacks(take: Callable[[Any], None]) -> Generator[None]:
    """Give `take` the callback of every stream that this thread opens meanwhile.

    The SDK waits for snapshots without giving way to its event loop, and for ever if the
    system never ends the stream; its callback is the only way to wake it (`end_stream`).
    """
    _patch_stream_callbacks()
    _this_thread.take = take
    try:
        yield
    finally:
        _this_thread.take = None


def end_stream(callback: Any) -> None:
    """Let the SDK's stream of this callback end now; it then cancels the system's task."""
    if callback is not None:
        callback.completed.set()
        callback.queue.put(None)


def _patch_stream_callbacks() -> None:
    """Make the SDK's streams use a callback that reports itself and is kept."""
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
    """Return a session that goes on from a transcript, and the transcript as the SDK's object."""
    sdk = import_sdk()
    from apple_fm_sdk import c_helpers

    history = await sdk.Transcript.from_dict(transcript)
    # The SDK forgets this pointer when the session replaces it, and never releases it.
    owner = c_helpers._ManagedObject(history.session_ptr)
    session = sdk.LanguageModelSession.from_transcript(history, model=model)
    del owner
    return session, history


def translate_error(problem: Exception, param: str) -> ImpetusError:
    """Return the SDK's error as ours; `param` is what asked for guided generation.

    A guardrail or a refusal is the request's fault: sent again, it is refused again.
    """
    sdk = import_sdk()
    text = str(problem)[:300]
    match problem:
        case sdk.UnsupportedGuideError() | sdk.InvalidGenerationSchemaError():
            return UnsupportedParameter(
                f"Apple's guided generation cannot honour the JSON schema: {text}", param=param
            )
        case sdk.GuardrailViolationError():
            return RequestError("Apple's safety guardrails do not allow this.", param="messages")
        case sdk.RefusalError():
            return RequestError("Apple's model refuses to answer this.", param="messages")
        case sdk.UnsupportedLanguageOrLocaleError():
            return RequestError(
                "Apple's model does not support the language of the request.", param="messages"
            )
        case sdk.RateLimitedError():
            return QueueFull("The system limits requests to Apple's model.", retry_after_s=10)
        case sdk.ConcurrentRequestsError():
            return QueueFull("Apple's model is busy with other requests.", retry_after_s=1)
        case sdk.AssetsUnavailableError():
            return BackendUnavailable("The system has not got the files of Apple's model ready.")
    return EngineFailed(f"Apple's model failed: {text or type(problem).__name__}")
