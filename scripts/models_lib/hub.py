"""The Hugging Face Hub: search it, show a repository, get a model, store a token."""

import os
from collections.abc import Mapping
from typing import Any

from catalog.hub.reference import HubReference, parse_reference
from core.errors import RequestError
from scripts.models_lib import words
from scripts.models_lib.context import Context
from scripts.models_lib.jobs import finish, tell_begun
from scripts.models_lib.library import find_model, show_model
from scripts.models_lib.problems import WrongUsage
from scripts.models_lib.progress import follow
from scripts.models_lib.table import Column
from scripts.server_lib.client import path_of

# Pages that are read for one that the size leaves anything of.
_MAX_PAGES = 5
_FILTERS = (
    *("author", "format", "capability", "licence", "min_parameters", "max_parameters"),
    *("updated_after", "sort", "limit", "cursor"),
)


def search(context: Context) -> None:
    """Print what the hub has, with an estimate of what fits."""
    options = context.options
    query = {name: getattr(options, name) for name in _FILTERS}
    if options.gated is not None:
        query["gated"] = str(options.gated).lower()
    found: list[Mapping[str, Any]] = []
    for _ in range(_MAX_PAGES):
        answer = context.client.get(path_of("hub", "search"), query=options.text, **query)
        found += [model for model in answer["models"] if _has_size(context, model)]
        query["cursor"] = answer["cursor"] or None
        if not query["cursor"] or len(found) >= (options.limit or 1):
            break
    cursor = query["cursor"] or ""
    if context.screen.is_json:
        context.screen.document({"models": found, "cursor": cursor})
        return
    if not found:
        context.screen.say("Nothing was found; search for less, or with fewer filters.")
        return
    columns = [
        Column("MODEL"),
        Column("PARAMETERS", is_right=True),
        Column("FORMATS"),
        Column("DOWNLOADS", is_right=True),
        Column("UPDATED"),
        Column("FIT"),
    ]
    rows = [
        (
            model["id"] + (" (gated)" if model["gated"] else ""),
            words.count(model["parameters"]),
            ",".join(model["formats"]),
            words.count(model["downloads"]),
            words.day(model["updated"]),
            words.fit(model["fit"]),
        )
        for model in found
    ]
    context.screen.table(columns, rows)
    if cursor:
        context.screen.note(f"There are more: repeat the command with\n  --cursor '{cursor}'")


def show(context: Context) -> None:
    """Print a model of this server, or else a repository of the hub."""
    wanted = context.options.model
    model = find_model(context, wanted)
    if model is None and "/" not in wanted:
        # The server's refusal names the nearest models.
        model = context.client.get(path_of("models", wanted))
    if model is not None:
        show_model(context, model)
        return
    reference = _parsed(wanted)
    owner, _, name = reference.repository.partition("/")
    place = path_of("hub", "models", owner, name)
    revision = context.options.revision or reference.revision or None
    if context.options.readme:
        answer = context.client.get(f"{place}/readme", revision=revision)
        if context.screen.is_json:
            context.screen.document(answer)
        else:
            context.screen.text(answer["markdown"] or "It has no README.")
        return
    answer = context.client.get(place, revision=revision, context=context.options.context)
    if context.screen.is_json:
        context.screen.document(answer)
        return
    _print_repository(context, answer, reference)


def get(context: Context) -> None:
    """Download a model, or join its download, and wait for its end."""
    options, screen = context.options, context.screen
    body = {"model": options.model}
    if options.revision:
        body["revision"] = options.revision
    if options.entry:
        body["entry"] = options.entry
    job: Mapping[str, Any] = context.client.send("POST", path_of("downloads"), body)
    if job["state"] == "paused":
        screen.note("This download was paused; it goes on.")
        job = context.client.send("POST", path_of("jobs", job["id"], "resume"))
    if not options.wait:
        tell_begun(context, job)
        return
    finish(context, follow(context.client, screen, job))


def show_token(context: Context) -> None:
    """Print which token for the hub the server uses, never the token itself."""
    _print_token(context, context.client.get(path_of("hub", "token")))


def store_token(context: Context) -> None:
    """Store a token for gated and private repositories."""
    token = context.screen.secret("Token of the Hugging Face Hub (hf_…): ")
    if not token:
        raise WrongUsage("Type the token, or write it to standard input.")
    _print_token(context, context.client.send("POST", path_of("hub", "token"), {"token": token}))


def remove_token(context: Context) -> None:
    """Forget the stored token."""
    _print_token(context, context.client.send("DELETE", path_of("hub", "token")))


def _print_token(context: Context, answer: Mapping[str, Any]) -> None:
    if context.screen.is_json:
        context.screen.document(answer)
        return
    sources = {
        "environment": "HF_TOKEN of the server's environment",
        "stored": "the token that was stored here",
        "login": "the token of `hf auth login`",
    }
    source = sources.get(answer["source"])
    owner = f" of {answer['owner']}" if answer["owner"] else ""
    context.screen.say(f"In use: {source}{owner}." if source else "No token is in use.")


def _parsed(wanted: str) -> HubReference:
    try:
        return parse_reference(wanted, os.environ.get("HF_ENDPOINT", ""))
    except RequestError as problem:
        raise WrongUsage(problem.message) from problem


def _has_size(context: Context, model: Mapping[str, Any]) -> bool:
    """Whether the estimated size of a result is within the bounds; an unknown one only of none."""
    least, most = context.options.min_size, context.options.max_size
    size = model["fit"]["weights_bytes"]
    if not size:
        return least is None and most is None
    return (least or 0) <= size and (most is None or size <= most)


def _print_repository(
    context: Context, repository: Mapping[str, Any], reference: HubReference
) -> None:
    screen = context.screen
    facts = (
        words.count(repository["parameters"]) and f"{words.count(repository['parameters'])} params",
        repository["licence"] and f"licence {repository['licence']}",
        f"{repository['downloads']:,} downloads",
        words.day(repository["updated"]) and f"updated {words.day(repository['updated'])}",
    )
    screen.say(repository["id"])
    screen.say("  " + ", ".join(fact for fact in facts if fact))
    for line in _warnings(repository):
        screen.say(f"  {line}")
    choice = repository["choice"]
    rows = [
        (
            f"{'*' if entry['name'] == choice['entry'] else ' '} {entry['name']}",
            entry["format"],
            entry["quantization"],
            words.size(entry["size_bytes"]),
            f"{entry['context_length']:,}" if entry["context_length"] else "",
            _entry_state(entry),
        )
        for entry in repository["entries"]
        if _is_meant(entry, reference)
    ]
    if not rows:
        screen.say("  It has no such model." if repository["entries"] else "  It has no model.")
        return
    columns = [
        Column("  ENTRY"),
        Column("FORMAT"),
        Column("QUANT"),
        Column("SIZE", is_right=True),
        Column("CONTEXT", is_right=True),
        Column("FIT"),
    ]
    screen.table(columns, rows)
    if choice["entry"]:
        screen.say(f"* Best here: {choice['entry']}. {choice['reason']}")
    else:
        screen.say(f"None is best here: {choice['reason']}")


def _warnings(repository: Mapping[str, Any]) -> list[str]:
    safety = repository["safety"]
    lines = []
    if repository["gated"]:
        lines.append(
            "Gated: ask for access on its page, then store your token with scripts/models token set"
        )
    if safety["pickles"]:
        lines.append(f"Could run code when loaded elsewhere: {', '.join(safety['pickles'])}")
    if safety["remote_code"]:
        lines.append(f"Has code of its own, not run here: {', '.join(safety['remote_code'])}")
    lines += [f"Reported by a scanner: {path} ({level})" for path, level in safety["findings"]]
    return lines


def _entry_state(entry: Mapping[str, Any]) -> str:
    if entry["is_downloaded"]:
        return "downloaded"
    if entry["problem"]:
        return f"refused: {entry['problem']}" if entry["is_refused"] else entry["problem"]
    fit = entry["fit"]
    text = words.fit(fit)
    return text if fit["verdict"] == "fits" else f"{text}: {fit['reason']}"


def _is_meant(entry: Mapping[str, Any], reference: HubReference) -> bool:
    """Whether a quantization or a file, if one was named, is that of the entry."""
    if reference.file:
        return reference.file == entry["name"] or reference.file in entry["files"]
    wanted = reference.quantization.lower()
    return entry["quantization"].lower() == wanted or wanted in entry["name"].lower()
