"""The exceptions behind every API error, with HTTP status, type and code of OpenAI's envelope.

ImpetusError                    500 server_error            internal_error
├ RequestError                  400 invalid_request_error   invalid_request
│ ├ UnsupportedParameter            unsupported_parameter (param)
│ ├ UnsupportedCapability           unsupported_capability
│ ├ ContextLengthExceeded           context_length_exceeded
│ ├ PreviousResponseNotFound        previous_response_not_found
│ ├ ThreadUnsupported               thread_unsupported_request
│ ├ TemplateRefused                 template_refused
│ ├ ConversionNeeded                conversion_needed
│ └ BodyTooLarge                413 request_too_large
├ AuthenticationError           401 authentication_error    invalid_api_key
├ PermissionDenied              403 permission_error        permission_denied
│ ├ HubAccessDenied                 hub_access_denied
│ └ HubTokenRejected                hub_token_rejected
├ NotFound                      404 invalid_request_error   not_found
│ ├ ThreadNotFound                  thread_not_found
│ ├ HubNotFound                     hub_not_found
│ ├ ModelNotFound                   model_not_found
│ └ ModelFileMissing                model_file_missing
├ ModelInUse                    409 invalid_request_error   model_in_use
├ SettingFixed                  409 invalid_request_error   setting_fixed
├ UploadConflict                409 invalid_request_error   upload_conflict
├ BrokenModel                   422 invalid_request_error   broken_model
├ IdempotencyKeyReused          422 invalid_request_error   idempotency_key_reused
├ ChunkRejected                 422 invalid_request_error   chunk_rejected
├ QueueFull                     429 rate_limit_error        queue_full
│ └ QueueTooShort                   queue_full
├ RateLimited                   429 rate_limit_error        rate_limit_exceeded
├ RequestFailed                 500 server_error            request_failed
│ ├ NonFiniteOutput                 non_finite_output
│ └ NoTokenLeft               400 invalid_request_error   no_token_left
├ CrashingRequest               500 server_error            request_crashed_engine
└ Unavailable                   503 server_error            unavailable
  ├ CatalogNotWritten               catalog_not_written
  ├ InsufficientMemory              insufficient_memory
  ├ Draining                        draining
  ├ ModelFailed                     model_failed
  ├ ModelQuarantined                model_quarantined
  ├ EngineFailed                    engine_failed
  │ └ TimedOut                  504 timed_out
  ├ HubUnavailable                  hub_unavailable
  │ ├ HubOffline                    hub_offline
  │ ├ HubRateLimited                hub_rate_limited
  │ ├ HubAnswerInvalid          502 hub_answer_invalid
  │ │ └ ChecksumFailed              checksum_failed
  │ └ HubTooSlow                504 hub_too_slow
  ├ InsufficientDisk                insufficient_disk
  ├ ModelFileChanged                model_file_changed
  ├ BackendUnavailable              backend_unavailable
  └ ModelNotResident                model_not_resident (internal: the router loads the model)

NotThisFormat is internal to format detection and not an ImpetusError.
Instances are pickled between processes, so their state is in `args` and `__dict__` only.
"""

from typing import ClassVar

# Of the text of an unexpected exception, which may quote a whole prompt.
_SHOWN_CHARACTERS = 200


class ImpetusError(Exception):
    """Base class of all API errors; `message` tells the user what is wrong and what to do next.

    `may_retry` False tells client libraries not to send the same request again by themselves.
    """

    may_retry: ClassVar[bool] = True
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """Return the error body in OpenAI's form: `{"error": {message, type, param, code}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class RequestError(ImpetusError):
    """The request is invalid; retrying it unchanged cannot succeed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class UnsupportedParameter(RequestError):
    """A known parameter that this model's backend does not support; `param` names it."""

    code = "unsupported_parameter"


class UnsupportedCapability(RequestError):
    """The model cannot do what the endpoint needs, such as chat or embeddings."""

    code = "unsupported_capability"


class ContextLengthExceeded(RequestError):
    """The prompt exceeds the granted context; both sizes are in tokens, 0 where unknown."""

    code = "context_length_exceeded"
    prompt_tokens = 0
    context_tokens = 0

    @classmethod
    def of(
        cls,
        prompt_tokens: int,
        context_tokens: int,
        max_tokens: int = 0,
        *,
        is_least: bool = False,
    ) -> "ContextLengthExceeded":
        """Build the error with both numbers, in OpenAI's wording, which clients match on.

        `is_least`: the prompt has at least `prompt_tokens`, and was not counted further.
        """
        if max_tokens:
            error = cls(
                f"This model's maximum context length is {context_tokens} tokens. However, you "
                f"requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the messages, "
                f"{max_tokens} in the completion). Please reduce the length of the messages or "
                "completion.",
                param="messages",
            )
        else:
            error = cls(
                f"This model's maximum context length is {context_tokens} tokens. However, your "
                f"messages resulted in {'at least ' if is_least else ''}{prompt_tokens} tokens. "
                "Please reduce the length of the "
                "messages.",
                param="messages",
            )
        error.prompt_tokens = prompt_tokens + max_tokens
        error.context_tokens = context_tokens
        return error

    @classmethod
    def of_input(
        cls, name: str, tokens: int, limit: int, *, is_least: bool = False
    ) -> "ContextLengthExceeded":
        """Build the error for one input of embeddings or reranking that may not be cut.

        `name` is the field with its index; the first word before "[" is the error's `param`.
        """
        error = cls(
            f"This model's maximum context length is {limit} tokens. However, {name} resulted in "
            f"{'at least ' if is_least else ''}{tokens} tokens. Shorten it, or send "
            "truncate: true to cut it.",
            param=name.partition("[")[0],
        )
        error.prompt_tokens = tokens
        error.context_tokens = limit
        return error


class PreviousResponseNotFound(RequestError):
    """`previous_response_id` names a response that is not stored."""

    code = "previous_response_not_found"


class ThreadUnsupported(RequestError):
    """`thread` asks to keep a conversation, but none are kept; named as Anthropic names it."""

    code = "thread_unsupported_request"


class TemplateRefused(RequestError):
    """The model's chat template does not accept these messages or tools."""

    code = "template_refused"


class ConversionNeeded(RequestError):
    """The model cannot run here, but a conversion of it can; the message says how to start it."""

    code = "conversion_needed"


class BodyTooLarge(RequestError):
    """The request's body or headers exceed the size limit."""

    status = 413
    code = "request_too_large"


class AuthenticationError(ImpetusError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(ImpetusError):
    """The Host or Origin header is not an allowed one, or the caller lacks permission."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class HubAccessDenied(PermissionDenied):
    """The repository is gated, disabled or private, and the hub gives this user no access to it."""

    code = "hub_access_denied"


class HubTokenRejected(PermissionDenied):
    """The hub does not know the token, and the repository cannot be read without one."""

    code = "hub_token_rejected"


class NotFound(ImpetusError):
    """Nothing exists at this path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ThreadNotFound(NotFound):
    """`thread.previous_message_id` names no kept conversation; named as Anthropic names it."""

    code = "thread_not_found"


class HubNotFound(NotFound):
    """The hub has no such repository, revision or file, or shows it to members only."""

    code = "hub_not_found"


class ModelNotFound(NotFound):
    """No catalog entry or alias has this name."""

    code = "model_not_found"

    @classmethod
    def of(cls, name: str, nearest: list[str]) -> "ModelNotFound":
        """Build the error with the nearest names; a `name` over 100 characters is shortened."""
        shown = name if len(name) <= 100 else name[:100] + "…"
        hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
        return cls(
            f"The model {shown!r} does not exist.{hint} GET /v1/models lists those that can be "
            "used.",
            param="model",
        )


class ModelFileMissing(NotFound):
    """The model is in the catalog, but its files were deleted or replaced."""

    code = "model_file_missing"


class BrokenModel(ImpetusError):
    """The model's files are damaged or unsafe to load."""

    status = 422
    type = "invalid_request_error"
    code = "broken_model"


class ModelInUse(ImpetusError):
    """The model cannot be changed while requests use it."""

    status = 409
    type = "invalid_request_error"
    code = "model_in_use"


class SettingFixed(ImpetusError):
    """A setting cannot be changed through the API, as the environment determines it."""

    status = 409
    type = "invalid_request_error"
    code = "setting_fixed"


class UploadConflict(ImpetusError):
    """An upload is in another state than the request supposes; `offset` is the file's, in bytes."""

    status = 409
    type = "invalid_request_error"
    code = "upload_conflict"
    offset: int | None = None

    @classmethod
    def at(cls, message: str, offset: int) -> "UploadConflict":
        """Build the error of a chunk that does not begin at `offset`, where the next one must."""
        error = cls(message, param="upload-offset")
        error.offset = offset
        return error


class IdempotencyKeyReused(ImpetusError):
    """The key of a request came before, with another body."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class ChunkRejected(ImpetusError):
    """A chunk of an upload is not what its headers say, or more than was announced."""

    status = 422
    type = "invalid_request_error"
    code = "chunk_rejected"


class QueueFull(ImpetusError):
    """The model's queue of waiting requests is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class QueueTooShort(QueueFull):
    """The request has more sequences than may ever run and wait at once."""

    may_retry = False


class RateLimited(ImpetusError):
    """The caller sent more requests or tokens than it may at the moment."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class RequestFailed(ImpetusError):
    """The engine could not complete this request; the model and its other requests go on."""

    code = "request_failed"

    @classmethod
    def during(cls, activity: str, problem: BaseException) -> "RequestFailed":
        """Build the error of a request during whose `activity` something unexpected was raised."""
        lines = str(problem).strip().splitlines()
        reason = f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__
        return cls(
            f"The request failed during {activity} ({reason[:_SHOWN_CHARACTERS]}). Other requests "
            "are not affected. Send it again; if it fails again, the server's log has the details."
        )


class NonFiniteOutput(RequestFailed):
    """The model computed NaN or infinity: its file is damaged, or its precision overflows."""

    code = "non_finite_output"
    may_retry = False

    @classmethod
    def of(cls, what: str, name: str = "") -> "NonFiniteOutput":
        """Build the error; `what` was not finite, such as "logits", in the model `name`."""
        model = f"The model {name}" if name else "The model"
        return cls(
            f"{model} computed {what} that are not numbers (NaN or infinity): its file is damaged, "
            "or the input overflows its precision. Download or convert the model again; if that "
            "does not help, use another quantization, such as bf16 instead of f16.",
            param="model",
        )


class NoTokenLeft(RequestFailed):
    """The request's grammar, logit_bias and bad_words exclude every token that could come next."""

    status = 400
    type = "invalid_request_error"
    code = "no_token_left"
    may_retry = False


class CrashingRequest(ImpetusError):
    """The model's process died twice while it prepared or prefilled this request."""

    code = "request_crashed_engine"
    may_retry = False


class Unavailable(ImpetusError):
    """Temporarily unavailable; the same request may succeed later."""

    status = 503
    code = "unavailable"


class CatalogNotWritten(Unavailable):
    """The catalog cannot be written at the moment; what it holds can still be read."""

    code = "catalog_not_written"


class InsufficientMemory(Unavailable):
    """The model does not fit into the memory budget."""

    code = "insufficient_memory"


class EngineFailed(Unavailable):
    """The engine or its process failed while this request ran."""

    code = "engine_failed"


class TimedOut(EngineFailed):
    """The request hit its deadline before the answer was complete."""

    status = 504
    code = "timed_out"

    @classmethod
    def after(cls, limit_s: float | None, what: str = "tokens") -> "TimedOut":
        """Build the error of a request for `what` whose deadline was `limit_s` seconds."""
        return cls(
            f"The request took longer than its limit of {limit_s or 0:g} s. Ask for fewer "
            f"{what}, or raise IMPETUS_REQUEST_TIMEOUT_S and restart the server."
        )


class Draining(Unavailable):
    """The server is shutting down: running requests finish, new ones are rejected."""

    code = "draining"


class ModelFailed(Unavailable):
    """The model's last load failed recently, so it is not retried for every request."""

    code = "model_failed"


class ModelQuarantined(Unavailable):
    """The model's processes crashed repeatedly; it stays blocked until loaded explicitly."""

    code = "model_quarantined"


class HubUnavailable(Unavailable):
    """The hub cannot be reached, or it answers that it fails."""

    code = "hub_unavailable"


class HubOffline(HubUnavailable):
    """Offline mode is on: the hub is not asked."""

    code = "hub_offline"


class HubRateLimited(HubUnavailable):
    """The hub refuses further requests for a while."""

    code = "hub_rate_limited"


class HubAnswerInvalid(HubUnavailable):
    """What answered is not a hub, or its answer contradicts what it stated."""

    status = 502
    code = "hub_answer_invalid"


class ChecksumFailed(HubAnswerInvalid):
    """A downloaded file has another size or hash than the hub stated; it was removed."""

    code = "checksum_failed"


class HubTooSlow(HubUnavailable):
    """The hub did not answer in time."""

    status = 504
    code = "hub_too_slow"


class InsufficientDisk(Unavailable):
    """The disk has no room for what is to be written; the message has the numbers."""

    code = "insufficient_disk"


class ModelFileChanged(Unavailable):
    """The model's file is not the one that was inspected; it is being inspected again."""

    code = "model_file_changed"


class BackendUnavailable(Unavailable):
    """The runtime of this format cannot run on this machine; the message says why."""

    code = "backend_unavailable"


class ModelNotResident(Unavailable):
    """The replica does not have the model in memory; the router then has it loaded."""

    code = "model_not_resident"


def error_of(code: str, message: str, retry_after_s: int | None = None) -> ImpetusError:
    """Return the error with this code, such as one that a child process reports as text."""
    kinds: list[type[ImpetusError]] = [ImpetusError]
    while kinds:
        kind = kinds.pop(0)
        if kind.code == code and kind.__module__ == __name__:
            return kind(message, retry_after_s=retry_after_s)
        kinds += kind.__subclasses__()
    return ImpetusError(message, retry_after_s=retry_after_s)


def is_panic(problem: BaseException) -> bool:
    """Return whether a native library panicked: pyo3's PanicException is no Exception."""
    return not isinstance(problem, Exception | KeyboardInterrupt | SystemExit | GeneratorExit)


class NotThisFormat(Exception):
    """Raised by a backend for files of another format; never leaves format detection."""
