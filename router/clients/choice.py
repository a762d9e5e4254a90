"""Selects the model for a client from entries of `/v1/models`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from router.clients.target import Model

_LEVELS = ("no", "limited", "ok")


def named_model(entries: Sequence[Mapping[str, Any]], client: str, wanted: str) -> Model | None:
    """Return the model with this id or alias, under that name; None if there is none.

    A name without a variant stands for any of them, so the shortest context counts.
    """
    for entry in entries:
        if wanted == entry["id"] or wanted in entry.get("aliases", ()):
            return replace(_model(entry, client), id=wanted)
    variants = [entry for entry in entries if wanted == str(entry["id"]).partition("@")[0]]
    if not variants:
        return None
    shortest = min(variants, key=lambda entry: int(entry.get("max_model_len") or 0))
    return replace(_model(shortest, client), id=wanted)


def best_model(entries: Sequence[Mapping[str, Any]], client: str) -> Model | None:
    """Return the best model for `client`; None if none suits it."""
    usable = [entry for entry in real_models(entries) if rank(entry, client)[0]]
    if not usable:
        return None
    return _model(max(usable, key=lambda entry: rank(entry, client)), client)


def real_models(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the models but echo, which is taken by name alone, to test a connection."""
    return [entry for entry in entries if entry.get("format") != "echo"]


def rank(entry: Mapping[str, Any], client: str) -> tuple[bool, bool, int, int, int]:
    """Return by what models are compared for a client; the largest is the best.

    The first part is whether the client can use it.  A model that chats comes before one that is
    only for embeddings, whatever is missing.
    """
    known = fit_of(entry, client)["level"]
    level = _LEVELS.index(known) if known in _LEVELS else 0
    return (
        level > 0,
        "chat" in entry.get("capabilities", ()),
        level,
        int(entry.get("parameters") or 0),
        int(entry.get("max_model_len") or 0),
    )


def fit_of(entry: Mapping[str, Any], client: str) -> Mapping[str, Any]:
    """Return `level` and `reasons` of how well the client can use the model."""
    fits = entry.get("compatibility", {})
    # Other servers have no `compatibility` field.
    fit: Mapping[str, Any] = fits.get(client, {"level": "ok", "reasons": []})
    return fit


def _model(entry: Mapping[str, Any], client: str) -> Model:
    fit = fit_of(entry, client)
    return Model(
        str(entry["id"]),
        int(entry.get("max_model_len") or entry.get("context_length") or 0),
        frozenset(entry.get("capabilities", ("chat",))),
        str(fit["level"]),
        tuple(fit["reasons"]),
    )
