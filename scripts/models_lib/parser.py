"""The command line's words: commands, options, and what each of them runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, get_args

from core.types import Capability
from core.units import parse_bytes
from router.hub_service import HubSort
from router.library import SortKey
from scripts.models_lib import additions, conversions, hub, jobs, library
from scripts.models_lib.context import Command
from scripts.server_lib.address import CONFIG

_ABOUT = """Finds, gets, shows and deletes models of the server that runs, and gives them aliases.

  scripts/models search qwen --format gguf --max-size 4GB
  scripts/models show OWNER/NAME
  scripts/models get OWNER/NAME:Q4_K_M
  scripts/models list

A download goes on in the server when this command ends; the same command joins it again."""
_EXITS = (
    """exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no server answers, 130 Ctrl-C"""
)
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its result has the command as `run`."""
    parser = argparse.ArgumentParser(
        prog="scripts/models",
        description=_ABOUT,
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser, is_default=True)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_library(commands)
    _add_hub(commands)
    _add_additions(commands)
    _add_conversions(commands)
    _add_bin(commands)
    _add_aliases(commands)
    _add_jobs(commands)
    _add_token(commands)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, is_default: bool) -> None:
    """Add what stands before or after the command; only the first sets defaults."""

    def default(value: Any) -> Any:
        return value if is_default else argparse.SUPPRESS

    parser.add_argument(
        "--json", action="store_true", default=default(False), help="print one JSON document"
    )
    parser.add_argument(
        "--url", default=default(None), help="the server's address (default: from the settings)"
    )
    parser.add_argument(
        "--key",
        default=default(None),
        help="API key with the scope manage (default: IMPETUS_API_KEY, or this machine's token)",
    )
    parser.add_argument(
        "--config", type=Path, default=default(CONFIG), help="the server's configuration file"
    )


def _command(
    commands: Commands, name: str, run: Command, text: str, *positionals: tuple[str, str]
) -> argparse.ArgumentParser:
    """Add a command with its positional arguments, each with its help."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    _add_common(parser, is_default=False)
    for positional, about in positionals:
        parser.add_argument(positional, metavar=positional.upper(), help=about)
    parser.set_defaults(run=run)
    return parser


def _group(commands: Commands, name: str, run: Command, text: str) -> Commands:
    """Add a command that has commands of its own, and without one runs `run`."""
    parser = _command(commands, name, run, text)
    return parser.add_subparsers(metavar="COMMAND")


def _add_library(commands: Commands) -> None:
    listing = _command(
        commands, "list", library.list_models, "list the models, and those that are arriving"
    )
    listing.add_argument("text", nargs="?", metavar="TEXT", help="words of names, tags or notes")
    listing.add_argument("--tag", action="append", help="only models with this tag; repeatable")
    listing.add_argument("--format", action="append", help="only of this format; repeatable")
    listing.add_argument("--favourite", action="store_true", help="only favourites")
    listing.add_argument(
        "--sort",
        metavar="KEY",
        choices=[f"{sign}{key}" for sign in ("", "-") for key in get_args(SortKey)],
        help=f"{', '.join(get_args(SortKey))}; with a hyphen, as --sort=-size, descending",
    )
    removal = _command(
        commands,
        "rm",
        library.remove,
        "move a model into the bin, where it stays for 24 hours",
        ("model", "its id or alias"),
    )
    _add_yes(removal)
    _add_restore(commands, "restore")
    _command(
        commands,
        "locate",
        library.locate,
        "tell where the files of a missing model are now",
        ("model", "its id or alias"),
        ("path", "its file or folder, in a model folder of the server"),
    )


def _add_hub(commands: Commands) -> None:
    searching = _command(commands, "search", hub.search, "search the Hugging Face Hub")
    searching.add_argument("text", nargs="?", default="", metavar="TEXT", help="words to find")
    searching.add_argument("--format", help="such as gguf, mlx or safetensors")
    searching.add_argument("--author", help="an organization or a user")
    searching.add_argument("--capability", choices=[*Capability])
    searching.add_argument("--licence", "--license", help="such as apache-2.0")
    searching.add_argument("--min-size", type=_bytes, metavar="SIZE", help="of weights: 500MB")
    searching.add_argument("--max-size", type=_bytes, metavar="SIZE", help="of weights: 4GB")
    searching.add_argument("--min-parameters", type=_count, metavar="COUNT", help="such as 1B")
    searching.add_argument("--max-parameters", type=_count, metavar="COUNT", help="such as 8B")
    searching.add_argument(
        "--gated", action=argparse.BooleanOptionalAction, help="only gated ones, or only others"
    )
    searching.add_argument("--updated-after", metavar="DATE", help="such as 2026-01-31")
    searching.add_argument("--sort", choices=get_args(HubSort), help="default: trending")
    searching.add_argument("--limit", type=int, help="at most so many (1 to 100, default 20)")
    searching.add_argument("--cursor", help="continues the search that printed it")
    showing = _command(
        commands,
        "show",
        hub.show,
        "show a model, or a repository of the hub with what fits this machine",
        ("model", "an id, an alias, OWNER/NAME or an address of the hub"),
    )
    showing.add_argument("--revision", help="a branch, a tag or a commit of the repository")
    showing.add_argument("--context", type=int, help="tokens that it is to fit at (default: 8192)")
    showing.add_argument("--readme", action="store_true", help="the repository's README")
    getting = _command(
        commands,
        "get",
        hub.get,
        "download a model",
        ("model", "OWNER/NAME, OWNER/NAME:QUANTIZATION, or an address of the hub or of a file"),
    )
    getting.add_argument("--revision", help="a branch, a tag or a commit")
    getting.add_argument("--entry", help="one of the entries that `show` lists")
    _add_wait(getting)


def _add_additions(commands: Commands) -> None:
    adding = _command(
        commands,
        "add",
        additions.add,
        "add a model that is on this machine",
        ("path", "its file or folder"),
    )
    how = adding.add_mutually_exclusive_group()
    for option, text in (
        ("in-place", "use a folder where it is, with all models in it; the default for folders"),
        ("clone", "a copy without room of its own, where the disk can; the default for files"),
        ("copy", "copy it into the server's data folder"),
        ("upload", "send it in chunks; the default for the server of another machine"),
    ):
        const = option.replace("-", "_")
        how.add_argument(f"--{option}", dest="how", action="store_const", const=const, help=text)
    adding.add_argument("--name", help="the name of its folder (default: its own)")
    _add_wait(adding)
    text = "list the uploads that are not done"
    inside = _group(commands, "uploads", additions.list_uploads, text)
    _command(inside, "list", additions.list_uploads, text)
    one = ("id", "the id that `uploads` lists")
    _command(inside, "rm", additions.remove_upload, "give an upload up", one)


def _add_conversions(commands: Commands) -> None:
    converting = _command(
        commands,
        "convert",
        conversions.convert,
        "convert a model to another format, or show what is possible",
        ("model", "an id or alias"),
    )
    converting.add_argument("--to", metavar="FORMAT", help="such as mlx; without it: what there is")
    quantization = converting.add_mutually_exclusive_group()
    quantization.add_argument("--quantization", "--quant", help="as listed without --to")
    quantization.add_argument("--bits", type=int, help="the quantization with so many bits")
    converting.add_argument("--group-size", type=int, help="of MLX: 32, 64 or 128")
    converting.add_argument("--name", help="the name of the result")
    _add_wait(converting)


def _add_bin(commands: Commands) -> None:
    inside = _group(commands, "bin", library.list_bin, "list what is in the bin")
    _command(inside, "list", library.list_bin, "list what is in the bin")
    _add_restore(inside, "restore")
    purging = _command(
        inside,
        "purge",
        library.purge,
        "delete a model in the bin for good",
        ("model", "its id in the bin, or the model's"),
    )
    _add_yes(purging)


def _add_aliases(commands: Commands) -> None:
    inside = _group(commands, "alias", library.list_aliases, "list the aliases of models")
    _command(inside, "list", library.list_aliases, "list the aliases of models")
    _command(
        inside,
        "set",
        library.set_alias,
        "make an alias, or point it to another model",
        ("alias", "the name"),
        ("model", "an id or another alias"),
    )
    _command(inside, "rm", library.remove_alias, "delete an alias", ("alias", "the name"))


def _add_jobs(commands: Commands) -> None:
    group = _group(commands, "jobs", jobs.list_jobs, "list downloads and other long jobs")
    commands.choices["jobs"].add_argument(
        "--all", action="store_true", help="also those that are over"
    )
    listing = _command(group, "list", jobs.list_jobs, "list downloads and other long jobs")
    listing.add_argument(
        "--all", action="store_true", default=argparse.SUPPRESS, help="also those that are over"
    )
    one = ("id", "the id that `jobs` lists")
    _command(group, "follow", jobs.follow_job, "show the progress of a job until its end", one)
    for action, text in (
        ("pause", "stop a job and keep what is done"),
        ("resume", "go on with a paused or failed job"),
        ("cancel", "give a job up and remove what is done"),
        ("move", "put a job elsewhere in the queue"),
    ):
        acting = _command(group, action, jobs.act_on_job, text, one)
        acting.set_defaults(action=action)
        if action == "move":
            acting.add_argument("--before", metavar="ID", help="a job; without it, to the end")
    _add_partials(group)
    limiting = _command(group, "limits", jobs.limits, "show or change the limits of downloads")
    limiting.add_argument("--parallel", type=int, help="how many at once (1 to 8)")
    limiting.add_argument(
        "--speed", type=_bytes, metavar="SIZE", help="bytes per second of all, such as 5MB; 0: any"
    )
    limiting.add_argument("--hours", help="such as 22:30-06:00; '' for the whole day")


def _add_partials(commands: Commands) -> None:
    text = "list what is left of downloads that no job goes on with"
    inside = _group(commands, "partials", jobs.list_partials, text)
    one = ("id", "the id that `jobs partials` lists")
    _command(inside, "rm", jobs.remove_partial, "remove what is left of a download", one)


def _add_token(commands: Commands) -> None:
    text = "tell which token for the hub is in use"
    inside = _group(commands, "token", hub.show_token, text)
    _command(
        inside, "set", hub.store_token, "store a token, read from the terminal or standard input"
    )
    _command(inside, "rm", hub.remove_token, "forget the stored token")


def _add_restore(commands: Commands, name: str) -> None:
    _command(
        commands,
        name,
        library.restore,
        "move a model back from the bin",
        ("model", "its id in the bin, or the model's"),
    )


def _add_yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the progress until the end (default), or return at once",
    )


def _checked(parse: Callable[[str], int]) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        try:
            return parse(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from problem

    return parsed


def _parse_count(text: str) -> int:
    unit = _UNITS.get(text[-1:].lower())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1)
        return int(number)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a count; write 500M, 7B or a plain number") from None


_bytes = _checked(parse_bytes)
_count = _checked(_parse_count)
