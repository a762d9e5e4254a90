"""Converts models to other formats: what is possible, with a forecast, and doing it."""

import re
from collections.abc import Mapping
from typing import Any

from scripts.models_lib import words
from scripts.models_lib.context import Context
from scripts.models_lib.jobs import finish, tell_begun
from scripts.models_lib.problems import CommandFailed, WrongUsage
from scripts.models_lib.progress import follow
from scripts.models_lib.table import Column
from scripts.server_lib.client import path_of

_NUMBER = re.compile(r"\d+")


def convert(context: Context) -> None:
    """Convert a model and wait for it; without `--to` print what it can be converted to."""
    options = context.options
    if options.to is None:
        if options.bits or options.quantization or options.group_size or options.name:
            raise WrongUsage("Say with --to which format the result is to have.")
        _print_choices(context, _choices(context))
        return
    body = {"model": options.model, "format": options.to}
    quantization = options.quantization
    if options.bits:
        quantization = _of_bits(_choices(context), options.to, options.bits)
    optional = {
        "quantization": quantization,
        "group_size": options.group_size,
        "name": options.name,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    job = context.client.send("POST", path_of("convert"), body)
    if not options.wait:
        tell_begun(context, job)
        return
    finish(context, follow(context.client, context.screen, job))


def _choices(context: Context) -> Mapping[str, Any]:
    return context.client.get(path_of("convert", "choices"), model=context.options.model)


def _of_bits(choices: Mapping[str, Any], to: str, bits: int) -> str:
    """Return the first quantization of a format with so many bits.  Raises CommandFailed."""
    target = next((one for one in choices["targets"] if one["format"] == to), None)
    if target is None or target["reason"]:
        reason = target["reason"] if target else f"there is no format {to!r}"
        raise CommandFailed(f"{choices['model']} cannot be converted to {to}: {reason}")
    names = [str(choice["quantization"]) for choice in target["choices"]]
    for name in names:
        number = _NUMBER.search(name)
        if number and int(number[0]) == bits:
            return name
    raise CommandFailed(f"{to} has no quantization of {bits} bits; it has {', '.join(names)}.")


def _print_choices(context: Context, choices: Mapping[str, Any]) -> None:
    screen = context.screen
    if screen.is_json:
        screen.document(choices)
        return
    screen.say(choices["model"])
    rows = []
    for target in choices["targets"]:
        if target["reason"]:
            rows.append((target["format"], "", "", "", "", f"not possible: {target['reason']}"))
        for choice in target["choices"]:
            forecast = choice["forecast"]
            time = words.duration(forecast["seconds"])
            rows.append(
                (
                    target["format"],
                    choice["quantization"],
                    words.size(forecast["result_bytes"]),
                    words.size(forecast["memory_bytes"]),
                    time if forecast["is_measured"] else f"about {time}",
                    "" if target["runs_here"] else f"cannot run: {target['runs_here_reason']}",
                )
            )
    columns = [
        Column("TO"),
        Column("QUANT"),
        Column("SIZE", is_right=True),
        Column("MEMORY", is_right=True),
        Column("TIME", is_right=True),
        Column("HERE"),
    ]
    screen.table(columns, rows)
    screen.say(
        f"Converted models take {words.size(choices['used_bytes']) or '0 B'} of at most "
        f"{words.size(choices['limit_bytes'])}; {words.size(choices['free_bytes'])} are free."
    )
