"""Long jobs: list, follow, pause, resume, cancel, reorder, limits of downloads."""

from collections.abc import Mapping
from typing import Any

from scripts.models_lib import words
from scripts.models_lib.context import Context
from scripts.models_lib.problems import CommandFailed
from scripts.models_lib.progress import follow
from scripts.models_lib.table import Column
from scripts.server_lib.client import path_of

_HIDDEN = frozenset({"done", "cancelled"})


def list_jobs(context: Context) -> None:
    """Print the jobs in the order of their queue, with `--all` those that are over as well."""
    answer = context.client.get(path_of("jobs"))
    jobs = [job for job in answer["jobs"] if context.options.all or job["state"] not in _HIDDEN]
    if context.screen.is_json:
        context.screen.document({"jobs": jobs})
        return
    if not jobs:
        context.screen.say("No job runs or waits.")
        return
    columns = [
        Column("ID"),
        Column("KIND"),
        Column("SIZE", is_right=True),
        Column("WHAT"),
        Column("STATE"),
    ]
    rows = [
        (job["id"], job["kind"], words.size(job["total_bytes"]), job["title"], words.job_state(job))
        for job in jobs
    ]
    context.screen.table(columns, rows)


def follow_job(context: Context) -> None:
    """Show a job until it is over."""
    job = context.client.get(path_of("jobs", context.options.id))
    finish(context, follow(context.client, context.screen, job))


def act_on_job(context: Context) -> None:
    """Pause, resume, cancel or move a job."""
    options = context.options
    body = {"before": options.before} if options.action == "move" else {}
    _print_job(
        context, context.client.send("POST", path_of("jobs", options.id, options.action), body)
    )


def limits(context: Context) -> None:
    """Print the limits of downloads, after changing those that the options name."""
    options = context.options
    names = {"parallel": "parallel", "speed": "bytes_per_s", "hours": "hours"}
    given = {name: getattr(options, option) for option, name in names.items()}
    changes = {name: value for name, value in given.items() if value is not None}
    place = path_of("downloads", "limits")
    answer = context.client.send("PATCH", place, changes) if changes else context.client.get(place)
    if context.screen.is_json:
        context.screen.document(answer)
        return
    speed = f"{words.size(answer['bytes_per_s'])}/s" if answer["bytes_per_s"] else "unlimited"
    context.screen.say(f"At once: {answer['parallel']}")
    context.screen.say(f"Speed:   {speed}")
    context.screen.say(f"Hours:   {answer['hours'] or 'the whole day'}")


def list_partials(context: Context) -> None:
    """Print what is left of downloads that no job goes on with."""
    answer = context.client.get(path_of("downloads", "partials"))
    if context.screen.is_json:
        context.screen.document(answer)
        return
    if not answer["partials"]:
        context.screen.say("Nothing is left of downloads that ended.")
        return
    columns = [Column("ID"), Column("SIZE", is_right=True), Column("REMOVED")]
    rows = [
        (one["id"], words.size(one["size_bytes"]), words.moment(one["removed_at"]))
        for one in answer["partials"]
    ]
    context.screen.table(columns, rows)


def remove_partial(context: Context) -> None:
    """Remove what is left of a download."""
    partial_id = context.options.id
    context.client.send("DELETE", path_of("downloads", "partials", partial_id))
    if context.screen.is_json:
        context.screen.document({"deleted": partial_id})
        return
    context.screen.say(f"What was left of {partial_id} is removed.")


def tell_begun(context: Context, job: Mapping[str, Any]) -> None:
    """Print a job that goes on in the server."""
    if context.screen.is_json:
        context.screen.document(job)
        return
    context.screen.say(f"{job['title']}: {words.job_state(job)}")
    context.screen.say(
        f"The server goes on with it. This follows it:\n  scripts/models jobs follow {job['id']}"
    )


def finish(context: Context, job: Mapping[str, Any]) -> None:
    """Print the end of a job.  Raises CommandFailed if it is not done."""
    screen = context.screen
    if job["state"] == "done":
        if screen.is_json:
            screen.document(job)
            return
        names = ", ".join(job.get("model_ids", ()))
        size = words.size(job["total_bytes"])
        where = f"in {job['folder']}; a later scan lists it" if job.get("folder") else job["title"]
        text = f"Ready: {names}" if names else f"Done: {where}"
        # A conversion counts the bytes that it read.
        screen.say(text if not size or job.get("conversion") else f"{text} ({size})")
        if quality := words.quality(job.get("conversion")):
            screen.say(f"Compared with its source: {quality}")
        return
    if screen.is_json:
        screen.document(job)
    raise CommandFailed(_why_not_done(job), is_told=screen.is_json)


def _why_not_done(job: Mapping[str, Any]) -> str:
    if job["state"] == "failed":
        return f"{job['title']} failed: {job['reason']}"
    if job["state"] == "paused":
        return (
            f"{job['title']} was paused; what has arrived is kept. This goes on with it:\n"
            f"  scripts/models jobs resume {job['id']}"
        )
    return f"{job['title']} was cancelled."


def _print_job(context: Context, job: Mapping[str, Any]) -> None:
    if context.screen.is_json:
        context.screen.document(job)
        return
    context.screen.say(f"{job['title']}: {words.job_state(job)}")
