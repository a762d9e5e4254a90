"""Reads the server's model list and selects the model for a client."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from catalog.compatibility import CONTEXT_NEEDS, ContextNeed
from scripts.connect_lib.problems import ConnectError
from scripts.server_lib.address import AddressProblem, normal_root

NO_KEY = "none"
_LEVELS = ("no", "limited", "ok")
_TIMEOUT_S = 10.0
# Models named with their reasons if none suits a client.
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Target:
    """The server's address and key: `base_url` ends in `/v1`; `key` is empty if none is needed."""

    base_url: str
    key: str = ""

    @property
    def root(self) -> str:
        """The address without `/v1`, which Anthropic's clients expect."""
        return self.base_url.removesuffix("/v1")

    @property
    def shown_key(self) -> str:
        """The key, or a placeholder for clients that require one."""
        return self.key or NO_KEY

    @property
    def headers(self) -> Mapping[str, str]:
        """The authorization header that OpenAI's clients send."""
        return {"Authorization": f"Bearer {self.shown_key}"}


@dataclass(frozen=True, slots=True)
class Model:
    """The properties of a model that a client's configuration needs."""

    id: str
    context_tokens: int
    capabilities: frozenset[str]
    level: str = "ok"
    reasons: tuple[str, ...] = ()

    @property
    def chats(self) -> bool:
        """Whether the model can chat."""
        return "chat" in self.capabilities


def normal_url(text: str) -> str:
    """Return the base URL ending in `/v1`.  Raises ConnectError unless it is an HTTP address."""
    try:
        return f"{normal_root(text)}/v1"
    except AddressProblem as problem:
        raise ConnectError(str(problem)) from problem


def list_models(target: Target) -> Sequence[Mapping[str, Any]]:
    """Return the entries of `/v1/models`.  Raises ConnectError."""
    url = f"{target.base_url}/models"
    try:
        answer = httpx.get(url, headers=dict(target.headers), timeout=_TIMEOUT_S)
    except httpx.HTTPError as problem:
        raise ConnectError(
            f"{url} does not respond ({problem}). Start the server with scripts/serve, or pass "
            "another --base-url."
        ) from problem
    if answer.status_code == 401:
        raise ConnectError("The server requires an API key: set IMPETUS_API_KEY or pass --key.")
    try:
        entries = answer.raise_for_status().json()["data"]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as problem:
        raise ConnectError(
            f"{url} did not return a model list ({problem}); check --base-url."
        ) from problem
    return [entry for entry in entries if isinstance(entry, dict) and "id" in entry]


def choose(entries: Sequence[Mapping[str, Any]], client: str, wanted: str | None) -> Model:
    """Return the model named `wanted`, under that name, or else the best one for `client`.

    A name without a variant stands for any of them, so the shortest context counts.  Raises
    ConnectError with the reason if there is none.
    """
    if wanted is not None:
        for entry in entries:
            if wanted == entry["id"] or wanted in entry.get("aliases", ()):
                return replace(_model(entry, client), id=wanted)
        variants = [entry for entry in entries if wanted == str(entry["id"]).partition("@")[0]]
        if variants:
            shortest = min(variants, key=lambda entry: int(entry.get("max_model_len") or 0))
            return replace(_model(shortest, client), id=wanted)
        known = ", ".join(sorted(str(entry["id"]) for entry in entries))
        raise ConnectError(
            f"The server has no model {wanted!r} that it can run; pass one of these to --model: "
            f"{known or 'none'}. Those that cannot run are in /api/models, with the reasons."
        )
    # Echo only repeats what it is sent: it is taken by name, to test a connection.
    real = [entry for entry in entries if entry.get("format") != "echo"]
    usable = [entry for entry in real if _rank(entry, client)[0] > 0]
    if not usable:
        raise ConnectError(_none_fits(real, client))
    return _model(max(usable, key=lambda entry: _rank(entry, client)), client)


def _none_fits(entries: Sequence[Mapping[str, Any]], client: str) -> str:
    """Return why no model suits a client, and what would."""
    closest = sorted(entries, key=lambda entry: _rank(entry, client), reverse=True)[:_MAX_SHOWN]
    reasons = [f"  {entry['id']}: {'; '.join(_fit(entry, client)['reasons'])}" for entry in closest]
    if len(entries) > len(closest):
        reasons.append(
            f"  and {len(entries) - len(closest)} more, in `compatibility` of /v1/models"
        )
    need = CONTEXT_NEEDS.get(client)
    kind = "a chat model"
    if need is not None:
        kind += (
            f" that has a context of at least {need.least:,} tokens on this machine "
            f"({need.comfortable:,} for more than small tasks)"
        )
    lines = [
        f"The server has no model that {client} can use{':' if reasons else '.'}",
        *reasons,
        f"Put {kind} into a folder of IMPETUS_MODELS_PATH, and run this again.",
    ]
    short = [entry for entry in closest if _could_have(entry, need)]
    if short and need is not None:
        lines.append(
            f"{short[0]['id']} was trained with {short[0]['context_length']:,} tokens and may get "
            "them with a larger IMPETUS_MEMORY_BUDGET, or a larger IMPETUS_CONTEXT_LENGTH or "
            "context_length in the model's settings where one of these is set."
        )
    return "\n".join(lines)


def _could_have(entry: Mapping[str, Any], need: ContextNeed | None) -> bool:
    """Whether a model of which this machine grants too little context was trained with enough."""
    if need is None or "chat" not in entry.get("capabilities", ()):
        return False
    granted, trained = (int(entry.get(key) or 0) for key in ("max_model_len", "context_length"))
    return granted < need.least <= trained


def _rank(entry: Mapping[str, Any], client: str) -> tuple[int, bool, int, int]:
    fit = _fit(entry, client)
    level = _LEVELS.index(fit["level"]) if fit["level"] in _LEVELS else 0
    chats = "chat" in entry.get("capabilities", ())
    return level, chats, int(entry.get("parameters") or 0), int(entry.get("max_model_len") or 0)


def _fit(entry: Mapping[str, Any], client: str) -> Mapping[str, Any]:
    fits = entry.get("compatibility", {})
    # Other servers have no `compatibility` field.
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
