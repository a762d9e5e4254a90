"""Shared context of all routes, and the per-request record: request id and model."""

import logging
import re
import uuid
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Send

from core.errors import ModelNotFound, RequestError, UnsupportedCapability
from core.metrics import Metrics
from core.types import Capability
from router.services import ModelView, Services

_logger = logging.getLogger(__name__)
_RECORD_KEY = "impetus.record"
_SERVER_SEND_KEY = "impetus.send"
NAME_LIMIT = 512
# The states of models that can answer, in the order in which they are advised.
USABLE_STATES = ("resident", "loading", "available")
_UNSAFE = re.compile(r"[^][A-Za-z0-9_.-]")


@dataclass(frozen=True, slots=True)
class Pacing:
    """Timing of an event stream, in seconds.

    `header_wait_s`: how long the headers wait for a first event, which may change the HTTP status.
    A keep-alive is sent every `early_keep_alive_s` of silence until `calm_after_s`, then every
    `late_keep_alive_s`.  `write_timeout_s`: how long one write may block before the generation is
    cancelled.
    """

    header_wait_s: float = 1.0
    early_keep_alive_s: float = 1.0
    late_keep_alive_s: float = 5.0
    calm_after_s: float = 10.0
    write_timeout_s: float = 60.0


@dataclass(slots=True)
class RequestRecord:
    """A request's id and path, and the catalog id of its model once that is resolved."""

    request_id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    model_id: str = ""
    path: str = ""

    @property
    def suffix(self) -> str:
        """The id without its prefix, from which the ids of answers are built."""
        return self.request_id.removeprefix("req_")


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """Return the request's record; the first call creates it."""
    record = scope.get(_RECORD_KEY)
    if not isinstance(record, RequestRecord):
        record = RequestRecord()
        scope[_RECORD_KEY] = record
    return record


def keep_server_send(scope: MutableMapping[str, Any], send: Send) -> None:
    """Store the server's own `send` before middleware wraps it."""
    scope[_SERVER_SEND_KEY] = send


def server_send(scope: MutableMapping[str, Any], send: Send) -> Send:
    """Return the server's own `send`, for body messages only: middleware changes headers alone.

    Each wrapper would cost a coroutine per token.  Returns `send` where none was stored.
    """
    kept: Send = scope.get(_SERVER_SEND_KEY, send)
    return kept


class IgnoredNames:
    """Reports unknown request fields: in a response header, and once per name in the log."""

    def __init__(self, metrics: Metrics, *, max_logged: int = 1000, max_shown: int = 20) -> None:
        self._metrics = metrics
        self._logged: set[str] = set()
        self._max_logged = max_logged
        self._max_shown = max_shown

    def report(self, names: Iterable[str]) -> dict[str, str]:
        """Return the response header that names the fields; empty without any."""
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
    """What all route handlers share."""

    services: Services
    metrics: Metrics
    ignored: IgnoredNames
    pacing: Pacing

    async def model(self, name: str, capability: Capability, record: RequestRecord) -> ModelView:
        """Return the model that a request names, checked for the requested capability.

        Without a name it is the setting `default_model`, else the only loaded model that has the
        capability.  Raises RequestError without either, UnsupportedCapability and what
        `Catalog.resolve` raises.
        """
        if len(name) > NAME_LIMIT:
            raise ModelNotFound.of(name, [])
        name = name or self.services.settings.default_model or await self._loaded(capability)
        view = await self.services.catalog.resolve(name)
        record.model_id = view.id
        if capability not in view.capabilities:
            able = ", ".join(sorted(view.capabilities)) or "nothing"
            raise UnsupportedCapability(
                f"The model {view.id} cannot be used for {capability.value}; it supports: {able}. "
                f"{await self._advice(capability)}",
                param="model",
            )
        if self.services.events is not None:
            self.services.events.requests.start(record.request_id, record.path, view.id)
        return view

    async def _loaded(self, capability: Capability) -> str:
        """Return the only loaded model with the capability.  Raises RequestError."""
        views = await self.services.catalog.models()
        able = (view for view in views if capability in view.capabilities)
        loaded = [view.id for view in able if view.state == "resident"]
        if len(loaded) != 1:
            named = f": {', '.join(loaded[:10])}" if loaded else ""
            raise RequestError(
                f"model: required, as {len(loaded)} models that can be used for "
                f"{capability.value} are loaded{named}. Name one of /v1/models, or set "
                "IMPETUS_DEFAULT_MODEL.",
                param="model",
            )
        return loaded[0]

    async def _advice(self, capability: Capability) -> str:
        """Name a model that has the capability, one that is loaded if possible."""
        views = await self.services.catalog.models()
        able = [view for view in views if capability in view.capabilities]
        usable = [view for state in USABLE_STATES for view in able if view.state == state]
        if not usable:
            return f"No model on this server can be used for {capability.value}."
        return f"Use {usable[0].id} instead."
