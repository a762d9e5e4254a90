"""What every route is built over, and what one request remembers of itself."""

import logging
import re
import uuid
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Send

from core.errors import ModelNotFound, UnsupportedCapability
from core.metrics import Metrics
from core.types import Capability
from router.services import ModelView, Services

_logger = logging.getLogger(__name__)
_RECORD_KEY = "impetus.record"
_SERVER_SEND_KEY = "impetus.send"
NAME_LIMIT = 512
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True, slots=True)
class Pacing:
    """Seconds that rule an event stream.

    `header_wait_s`: how long the first event may decide on the HTTP status.  Until `calm_after_s`
    silence is broken every `early_keep_alive_s`, then every `late_keep_alive_s`.
    `write_timeout_s`: how long one write may block before the generation is cancelled.
    """

    header_wait_s: float = 1.0
    early_keep_alive_s: float = 1.0
    late_keep_alive_s: float = 5.0
    calm_after_s: float = 10.0
    write_timeout_s: float = 60.0


@dataclass(slots=True)
class RequestRecord:
    """A request's id, and the catalog id of its model as soon as that is known."""

    request_id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    model_id: str = ""

    @property
    def suffix(self) -> str:
        """The id without its prefix, for ids derived from it."""
        return self.request_id.removeprefix("req_")


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """Return the request's record, made at the first call."""
    record = scope.get(_RECORD_KEY)
    if not isinstance(record, RequestRecord):
        record = RequestRecord()
        scope[_RECORD_KEY] = record
    return record


def keep_server_send(scope: MutableMapping[str, Any], send: Send) -> None:
    """Remember the server's own `send`, before any middleware wraps it."""
    scope[_SERVER_SEND_KEY] = send


def server_send(scope: MutableMapping[str, Any], send: Send) -> Send:
    """Return the server's own `send`, for body messages only: middleware changes the start alone.

    Each wrapper costs a coroutine for every token.  Without a boundary it is `send` itself.
    """
    kept: Send = scope.get(_SERVER_SEND_KEY, send)
    return kept


class IgnoredNames:
    """Reports request fields that nobody here knows, each name once in the log."""

    def __init__(self, metrics: Metrics, *, max_logged: int = 1000, max_shown: int = 20) -> None:
        self._metrics = metrics
        self._logged: set[str] = set()
        self._max_logged = max_logged
        self._max_shown = max_shown

    def report(self, names: Iterable[str]) -> dict[str, str]:
        """Return the response header that names the fields, or no header for none."""
        shown: dict[str, None] = {}
        for count, name in enumerate(names):
            self._metrics.ignored_parameters.inc()
            if count < self._max_shown:
                shown[_UNSAFE.sub("_", name[:64]) or "_"] = None
        for name in shown:
            if name not in self._logged and len(self._logged) < self._max_logged:
                self._logged.add(name)
                _logger.info("ignored an unknown request field", extra={"field": name})
        return {"x-impetus-ignored": ", ".join(shown)} if shown else {}


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What the handlers share."""

    services: Services
    metrics: Metrics
    ignored: IgnoredNames
    pacing: Pacing

    async def model(self, name: str, capability: Capability, record: RequestRecord) -> ModelView:
        """Return the model a request names, having checked that it can do what is asked.

        Raises UnsupportedCapability and what `Catalog.resolve` raises.
        """
        if len(name) > NAME_LIMIT:
            raise ModelNotFound.of(name, [])
        view = await self.services.catalog.resolve(name)
        record.model_id = view.id
        if capability not in view.capabilities:
            able = ", ".join(sorted(view.capabilities)) or "nothing"
            raise UnsupportedCapability(
                f"The model {view.id} cannot be used for {capability.value}; it supports: {able}.",
                param="model",
            )
        return view
