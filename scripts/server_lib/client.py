"""A client of the server's API: errors in the server's own words, patience while it starts."""

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from scripts.server_lib.address import ServerAddress

_CONNECT_LIMIT_S = 5.0
# What asks the hub may take three minutes.
_READ_LIMIT_S = 200.0
# How long a part of the server that is being started is asked again.
_PATIENCE_S = 30.0
_LONGEST_PAUSE_S = 5.0
_UNAVAILABLE = "unavailable"


class ServerUnreachable(Exception):
    """No server answers, or something else than one; the text says what to do."""


class ServerRefused(Exception):
    """The server refused; the text is its message, `code` the error's."""

    def __init__(self, status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__(str(error.get("message") or f"HTTP {status}"))
        self.status = status
        self.code = str(error.get("code") or "")
        self.headers = headers

    @property
    def retry_after_s(self) -> float:
        """Seconds after which to try again, 0 if the server does not tell."""
        try:
            return max(float(self.headers.get("retry-after", "0")), 0.0)
        except ValueError:
            return 0.0


class ServerClient:
    """Asks the server at `address`; every request blocks.

    `on_wait` is told, once for each request, why the server is asked again.  All requests raise
    ServerUnreachable and ServerRefused.
    """

    def __init__(
        self,
        address: ServerAddress,
        *,
        on_wait: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = address
        self._on_wait = on_wait
        self._sleep = sleep
        headers = {"x-impetus-token": address.token} if address.token else {}
        if address.key:
            headers["authorization"] = f"Bearer {address.key}"
        timeout = httpx.Timeout(_READ_LIMIT_S, connect=_CONNECT_LIMIT_S)
        self._http = httpx.Client(base_url=address.root, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def get(self, path: str, *, is_patient: bool = True, **query: Any) -> dict[str, Any]:
        """Return the answer; parameters that are None are not sent."""
        asked = {name: value for name, value in query.items() if value is not None}
        return self._ask("GET", path, is_patient=is_patient, params=asked)

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer to a request that changes something, empty for one without content."""
        return self._ask(method, path, is_patient=True, json=dict(body or {}))

    def put_bytes(self, path: str, content: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return the answer to a body of bytes."""
        return self._ask("PUT", path, is_patient=True, content=content, headers=dict(headers))

    def _ask(self, method: str, path: str, *, is_patient: bool, **options: Any) -> dict[str, Any]:
        waited = 0.0
        while True:
            try:
                return self._ask_once(method, path, options)
            except ServerRefused as refusal:
                pause = min(refusal.retry_after_s, _LONGEST_PAUSE_S)
                is_passing = refusal.code == _UNAVAILABLE and pause > 0
                if not is_patient or not is_passing or waited >= _PATIENCE_S:
                    raise
                if not waited:
                    self._on_wait(str(refusal))
                self._sleep(pause)
                waited += pause

    def _ask_once(self, method: str, path: str, options: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as problem:
            raise ServerUnreachable(self._unreachable(problem)) from problem
        if answer.is_success and not answer.content:
            return {}
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.is_success and isinstance(content, dict):
            return content
        if isinstance(content, dict) and isinstance(content.get("error"), dict):
            raise ServerRefused(answer.status_code, content["error"], answer.headers)
        raise ServerUnreachable(
            f"What answers at {self.address.root} (HTTP {answer.status_code}) is not this server; "
            "check the address and the port."
        )

    def _unreachable(self, problem: httpx.HTTPError) -> str:
        if isinstance(problem, httpx.ReadTimeout):
            return f"The server at {self.address.root} did not answer within {_READ_LIMIT_S:g} s."
        reason = str(problem) or type(problem).__name__
        advice = (
            "Start it with scripts/serve, or name another with --url."
            if self.address.is_own
            else "Check --url, and that scripts/serve runs there."
        )
        return f"No server answers at {self.address.root} ({reason}). {advice}"


def path_of(*parts: str | Iterable[str]) -> str:
    """Return a path below `/api` whose parts are quoted, slashes included."""
    return "/".join(["/api", *(quote(str(part), safe="") for part in parts)])
