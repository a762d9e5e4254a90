"""The server as clients see it: its models, and the one to use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from scripts.connect_lib.problems import ConnectError

NO_KEY = "none"
_LEVELS = ("no", "limited", "ok")
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is: `base_url` ends in `/v1`; `key` empty where none is asked for."""

    base_url: str
    key: str = ""

    @property
    def root(self) -> str:
        """The address without `/v1`, as Anthropic's clients take it."""
        return self.base_url.removesuffix("/v1")

    @property
    def shown_key(self) -> str:
        """A key for clients that insist on one."""
        return self.key or NO_KEY

    @property
    def headers(self) -> Mapping[str, str]:
        """How OpenAI's clients say the key."""
        return {"Authorization": f"Bearer {self.shown_key}"}


@dataclass(frozen=True, slots=True)
class Model:
    """What a client's configuration says of a model."""

    id: str
    context_tokens: int
    capabilities: frozenset[str]
    level: str = "ok"
    reasons: tuple[str, ...] = ()

    @property
    def chats(self) -> bool:
        """Whether it answers conversations."""
        return "chat" in self.capabilities


def normal_url(text: str) -> str:
    """Return the base URL with its `/v1`.  Raises ConnectError for what is no HTTP address."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as problem:
        raise ConnectError(f"{text!r} is no address: {problem}.") from problem
    if url.scheme not in ("http", "https") or not url.host:
        raise ConnectError(f"{text!r} is no address; one looks like http://127.0.0.1:8000/v1.")
    trimmed = text.rstrip("/")
    return trimmed if trimmed.endswith("/v1") else f"{trimmed}/v1"


def list_models(target: Target) -> Sequence[Mapping[str, Any]]:
    """Return the entries of `/v1/models`.  Raises ConnectError with what to do."""
    url = f"{target.base_url}/models"
    try:
        answer = httpx.get(url, headers=dict(target.headers), timeout=_TIMEOUT_S)
    except httpx.HTTPError as problem:
        raise ConnectError(
            f"{url} does not answer ({problem}). Start the server, or name another --base-url."
        ) from problem
    if answer.status_code == 401:
        raise ConnectError("The server wants a key: set IMPETUS_API_KEY or give --key.")
    try:
        entries = answer.raise_for_status().json()["data"]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as problem:
        raise ConnectError(f"{url} does not list models ({problem}).") from problem
    return [entry for entry in entries if isinstance(entry, dict) and "id" in entry]


def choose(entries: Sequence[Mapping[str, Any]], client: str, wanted: str | None) -> Model:
    """Return the model that `wanted` names, under that name, else the one that fits best.

    Raises ConnectError where there is none, with the reason.
    """
    if wanted is not None:
        for entry in entries:
            if wanted == entry["id"] or wanted in entry.get("aliases", ()):
                return replace(_model(entry, client), id=wanted)
        known = ", ".join(sorted(str(entry["id"]) for entry in entries))
        raise ConnectError(f"The server has no model {wanted!r}; it has: {known or 'none'}.")
    usable = [entry for entry in entries if _rank(entry, client)[0] > 0]
    if not usable:
        raise ConnectError(f"The server has no model that {client} can use; see /v1/models.")
    # Echo fits everything and answers nothing: it is taken where there is nothing else.
    best = max(usable, key=lambda entry: (entry.get("format") != "echo", _rank(entry, client)))
    return _model(best, client)


def _rank(entry: Mapping[str, Any], client: str) -> tuple[int, bool, int, int]:
    fit = _fit(entry, client)
    level = _LEVELS.index(fit["level"]) if fit["level"] in _LEVELS else 0
    chats = "chat" in entry.get("capabilities", ())
    return level, chats, int(entry.get("parameters", 0)), int(entry.get("max_model_len", 0))


def _fit(entry: Mapping[str, Any], client: str) -> Mapping[str, Any]:
    fits = entry.get("compatibility", {})
    # Another server says nothing of clients.
    fit: Mapping[str, Any] = fits.get(client, {"level": "ok", "reasons": []})
    return fit


def _model(entry: Mapping[str, Any], client: str) -> Model:
    fit = _fit(entry, client)
    return Model(
        str(entry["id"]),
        int(entry.get("max_model_len") or entry.get("context_length") or 0),
        frozenset(entry.get("capabilities", ("chat",))),
        str(fit["level"]),
        tuple(fit["reasons"]),
    )
