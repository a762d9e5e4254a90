"""The models of the server: list, show, delete, restore, aliases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.models_lib import words
from scripts.models_lib.context import Context
from scripts.models_lib.problems import CommandFailed, WrongUsage
from scripts.models_lib.table import Column
from scripts.server_lib.client import ServerRefused, path_of

_DETAILS = ("architecture", "license", "runtime", "converted_from")


def list_models(context: Context) -> None:
    """Print the models, and the downloads that will become some."""
    options = context.options
    asked = {
        "text": options.text,
        "tag": options.tag,
        "format": options.format,
        "favourite": "true" if options.favourite else None,
        "sort": options.sort,
    }
    models = context.client.get(path_of("models"), **asked)["models"]
    is_of_models = bool(options.tag or options.format or options.favourite)
    arriving = [] if is_of_models else _arriving(context, options.text)
    if context.screen.is_json:
        context.screen.document({"models": models, "arriving": arriving})
        return
    if not models and not arriving:
        context.screen.say(
            "No model is like this."
            if options.text or is_of_models
            else "There are no models yet. Find one "
            "with scripts/models search, and get it with scripts/models get OWNER/NAME."
        )
        return
    rows = [
        (
            model["id"],
            words.size(model["size_bytes"]),
            model["format"],
            f"{model['max_model_len']:,}" if model["max_model_len"] else "",
            words.model_state(model),
        )
        for model in models
    ]
    rows += [
        (job["title"], words.size(job["total_bytes"]), "", "", f"arriving: {words.job_state(job)}")
        for job in arriving
    ]
    columns = [
        Column("MODEL"),
        Column("SIZE", is_right=True),
        Column("FORMAT"),
        Column("CONTEXT", is_right=True),
        Column("STATE"),
    ]
    context.screen.table(columns, rows)


def find_model(context: Context, name: str) -> Mapping[str, Any] | None:
    """Return the model with an id or alias, None if the server has none."""
    for model in context.client.get(path_of("models"))["models"]:
        if name == model["id"] or name in model["aliases"]:
            found: Mapping[str, Any] = model
            return found
    return None


def show_model(context: Context, model: Mapping[str, Any]) -> None:
    """Print one model of the server."""
    screen = context.screen
    if screen.is_json:
        screen.document(model)
        return
    screen.say(model["id"])
    context_length, granted = model["context_length"], model["max_model_len"]
    rows = [
        ("state", words.model_state(model)),
        ("size", words.size(model["size_bytes"])),
        ("format", " ".join(part for part in (model["format"], model["quantization"]) if part)),
        ("parameters", words.count(model["parameters"])),
        ("context", f"{granted:,} tokens here, trained with {context_length:,}"),
        ("abilities", ", ".join(model["capabilities"])),
        ("names", ", ".join(model["aliases"])),
        *((name.replace("_", " "), model[name]) for name in _DETAILS),
        ("quality", words.quality(model.get("conversion"))),
        ("same files", ", ".join(model.get("duplicates", ()))),
        *(("limitation", text) for text in model.get("limitations", ())),
        *(
            (name.replace("_", " "), str(value))
            for name, value in model["settings"].items()
            if value is not None
        ),
    ]
    for name, text in rows:
        if text:
            screen.say(f"  {name + ':':<16} {text}")


def remove(context: Context) -> None:
    """Move a model into the bin, once a person has said yes."""
    options, screen = context.options, context.screen
    model = context.client.get(path_of("models", options.model))
    if not options.yes:
        size = words.size(model["size_bytes"])
        _confirm(context, f"Delete {model['id']} ({size})?" if size else f"Delete {model['id']}?")
    gone = context.client.send("DELETE", path_of("models", model["id"]))
    if screen.is_json:
        screen.document(gone)
        return
    if not gone["paths"]:
        screen.say(f"{gone['model']} is removed; its files were gone already.")
        return
    freed = words.size(gone["freed_bytes"]) or "no bytes, as other files share them"
    screen.say(f"{gone['model']} is in the bin. The disk gets back {freed}.")
    screen.say(
        f"Until {words.moment(gone['purge_at'])} this restores it:\n"
        f"  scripts/models restore {gone['id']}"
    )


def locate(context: Context) -> None:
    """Tell the server where a missing model's files are now."""
    options = context.options
    # Another machine has paths of its own.
    is_here = context.client.address.is_own
    path = str(Path(options.path).expanduser().absolute()) if is_here else options.path
    place = path_of("models", options.model, "locate")
    model = context.client.send("POST", place, {"path": path})
    if context.screen.is_json:
        context.screen.document(model)
        return
    context.screen.say(f"{model['id']}: {words.model_state(model)}")


def list_bin(context: Context) -> None:
    """Print what is in the bin."""
    answer = context.client.get(path_of("bin"))
    if context.screen.is_json:
        context.screen.document(answer)
        return
    if not answer["models"]:
        context.screen.say("The bin is empty.")
        return
    columns = [Column("ID"), Column("MODEL"), Column("SIZE", is_right=True), Column("UNTIL")]
    rows = [
        (one["id"], one["model"], words.size(one["freed_bytes"]), words.moment(one["purge_at"]))
        for one in answer["models"]
    ]
    context.screen.table(columns, rows)


def restore(context: Context) -> None:
    """Move a model back from the bin."""
    one = context.client.send("POST", path_of("bin", _bin_id(context), "restore"))
    if context.screen.is_json:
        context.screen.document(one)
        return
    context.screen.say(f"{one['model']} is restored.")


def purge(context: Context) -> None:
    """Delete what is in the bin for good, once a person has said yes."""
    bin_id = _bin_id(context)
    if not context.options.yes:
        _confirm(context, f"Delete {context.options.model} for good? Nothing brings it back.")
    one = context.client.send("DELETE", path_of("bin", bin_id))
    if context.screen.is_json:
        context.screen.document(one)
        return
    freed = words.size(one["freed_bytes"]) or "no bytes"
    context.screen.say(f"{one['model']} is deleted; the disk got back {freed}.")


def list_aliases(context: Context) -> None:
    """Print the aliases."""
    answer = context.client.get(path_of("aliases"))
    if context.screen.is_json:
        context.screen.document(answer)
        return
    if not answer["aliases"]:
        context.screen.say("There are no aliases. Make one:\n  scripts/models alias set NAME MODEL")
        return
    rows = [(one["alias"], one["model"]) for one in answer["aliases"]]
    context.screen.table([Column("ALIAS"), Column("MODEL")], rows)


def set_alias(context: Context) -> None:
    """Make an alias, or point it to another model."""
    options = context.options
    one = context.client.send("PUT", path_of("aliases", options.alias), {"model": options.model})
    if context.screen.is_json:
        context.screen.document(one)
        return
    context.screen.say(f"{one['alias']} is now {one['model']}.")


def remove_alias(context: Context) -> None:
    """Delete an alias; its model stays."""
    alias = context.options.alias
    context.client.send("DELETE", path_of("aliases", alias))
    if context.screen.is_json:
        context.screen.document({"deleted": alias})
        return
    context.screen.say(f"The alias {alias} is deleted; its model stays.")


def _arriving(context: Context, text: str | None) -> Sequence[Mapping[str, Any]]:
    """Return the downloads that are not over; none while their process does not answer."""
    try:
        jobs = context.client.get(path_of("downloads"), is_patient=False)["jobs"]
    except ServerRefused as refusal:
        context.screen.note(f"The downloads are not shown: {refusal}")
        return []
    return [
        job
        for job in jobs
        if job["state"] not in words.ENDED and (not text or text.lower() in job["title"].lower())
    ]


def _bin_id(context: Context) -> str:
    """Return the id in the bin that is meant: as it is, or of the model deleted last."""
    wanted: str = context.options.model
    found = context.client.get(path_of("bin"))["models"]
    if any(one["id"] == wanted for one in found):
        return wanted
    ids = [str(one["id"]) for one in found if one["model"] == wanted]
    if not ids:
        raise CommandFailed(
            f"The bin has no model {wanted!r}; scripts/models bin lists what it has."
        )
    return ids[-1]


def _confirm(context: Context, question: str) -> None:
    """Ask a person.  Raises CommandFailed for a no, WrongUsage if there is nobody to ask."""
    if context.screen.is_json or not context.screen.can_ask():
        raise WrongUsage("There is no terminal to ask at; pass --yes.")
    if not context.screen.confirms(question):
        raise CommandFailed("Nothing was deleted.")
