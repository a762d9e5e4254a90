"""Reads the server's model list and selects the model for a client."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from catalog.compatibility import CONTEXT_NEEDS, ContextNeed
from router.clients.choice import best_model, fit_of, named_model, rank, real_models
from router.clients.problems import ConnectError
from router.clients.target import Model, Target

_TIMEOUT_S = 10.0
# Models named with their reasons if none suits a client.
_MAX_SHOWN = 5


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

    Raises ConnectError with the reason if there is none.
    """
    if wanted is not None:
        if (model := named_model(entries, client, wanted)) is not None:
            return model
        known = ", ".join(sorted(str(entry["id"]) for entry in entries))
        raise ConnectError(
            f"The server has no model {wanted!r} that it can run; pass one of these to --model: "
            f"{known or 'none'}. Those that cannot run are in /api/models, with the reasons."
        )
    if (model := best_model(entries, client)) is None:
        raise ConnectError(_none_fits(real_models(entries), client))
    return model


def _none_fits(entries: Sequence[Mapping[str, Any]], client: str) -> str:
    """Return why no model suits a client, and what would."""
    closest = sorted(entries, key=lambda entry: rank(entry, client), reverse=True)[:_MAX_SHOWN]
    reasons = [
        f"  {entry['id']}: {'; '.join(fit_of(entry, client)['reasons'])}" for entry in closest
    ]
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
