"""Adds models that are on this machine: used where they are, cloned, copied or sent."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.models_lib import local_files, words
from scripts.models_lib.context import Context
from scripts.models_lib.jobs import finish, tell_begun
from scripts.models_lib.problems import WrongUsage
from scripts.models_lib.progress import follow
from scripts.models_lib.table import Column
from scripts.models_lib.upload import send
from scripts.server_lib.client import ServerRefused, path_of

_DENIED = "permission_denied"


def add(context: Context) -> None:
    """Add a model's file or folder, and wait for its inspection.

    The server of this machine is told the path; another one is sent the files.
    """
    options, client = context.options, context.client
    path = Path(options.path).expanduser().absolute()
    if not path.exists():
        raise WrongUsage(f"There is no {str(path)!r} on this machine.")
    how = options.how or _usual_way(path, is_own=client.address.is_own)
    if how == "upload":
        job = send(context, local_files.files_below(path), options.name)
    elif not client.address.is_own:
        raise WrongUsage(f"Only the server of this machine can {how} a path; use --upload.")
    else:
        job = _import(context, path, how)
    if not options.wait:
        tell_begun(context, job)
        return
    finish(context, follow(client, context.screen, job))


def _usual_way(path: Path, *, is_own: bool) -> str:
    """Return how a path is added: folders are used in place, files alone cannot be."""
    if not is_own:
        return "upload"
    return "in_place" if path.is_dir() else "clone"


def _import(context: Context, path: Path, how: str) -> Mapping[str, Any]:
    name = context.options.name
    if name and how == "in_place":
        raise WrongUsage("A folder that is used in place keeps its name; add --clone or --copy.")
    body = {"path": str(path), "how": how, **({"name": name} if name else {})}
    try:
        return context.client.send("POST", path_of("imports"), body)
    except ServerRefused as refusal:
        if refusal.code == _DENIED:
            context.screen.note("From any folder, --upload sends the server a copy.")
        raise


def list_uploads(context: Context) -> None:
    """Print the uploads that are not done."""
    answer = context.client.get(path_of("uploads"))
    if context.screen.is_json:
        context.screen.document(answer)
        return
    if not answer["uploads"]:
        context.screen.say("No upload is unfinished.")
        return
    columns = [Column("ID"), Column("SIZE", is_right=True), Column("ARRIVED"), Column("MODEL")]
    rows = [
        (
            one["id"],
            words.size(one["total_bytes"]),
            "all, being checked" if one["is_finished"] else f"{words.share(one):.0%}",
            one["name"],
        )
        for one in answer["uploads"]
    ]
    context.screen.table(columns, rows)


def remove_upload(context: Context) -> None:
    """Give an upload up and delete what has arrived."""
    upload_id = context.options.id
    context.client.send("DELETE", path_of("uploads", upload_id))
    if context.screen.is_json:
        context.screen.document({"deleted": upload_id})
        return
    context.screen.say(f"The upload {upload_id} is deleted.")
