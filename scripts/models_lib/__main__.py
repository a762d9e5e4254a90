"""Runs the command line of models."""

import os
import sys
from collections.abc import Sequence

from core.proxies import bypass_proxies
from scripts.models_lib.context import Context
from scripts.models_lib.parser import build_parser
from scripts.models_lib.problems import CommandFailed, StillRunning, WrongUsage
from scripts.models_lib.screen import Screen
from scripts.server_lib.address import AddressProblem, find_server
from scripts.server_lib.client import ServerClient, ServerRefused, ServerUnreachable

_FAILED, _USAGE, _UNREACHABLE, _INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code that its help lists."""
    options = build_parser().parse_args(arguments)
    bypass_proxies(os.environ)
    screen = Screen(is_json=options.json)
    try:
        address = find_server(options.url, options.key, options.config)
        with ServerClient(address, on_wait=screen.note) as client:
            options.run(Context(client, screen, options))
    except ServerRefused as refusal:
        _tell(screen, _advised(refusal), refusal.code)
        return _FAILED
    except CommandFailed as problem:
        _tell(screen, str(problem), "failed", is_told=problem.is_told)
        return _FAILED
    except ServerUnreachable as problem:
        _tell(screen, str(problem), "unreachable")
        return _UNREACHABLE
    except BrokenPipeError:
        # What reads the output, such as `head`, has ended; nothing can be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (WrongUsage, AddressProblem) as problem:
        _tell(screen, str(problem), "usage")
        return _USAGE
    except StillRunning as told:
        _tell(screen, str(told), "interrupted")
        return _INTERRUPTED
    except KeyboardInterrupt:
        screen.note("Interrupted.")
        return _INTERRUPTED
    return 0


def _tell(screen: Screen, message: str, code: str, *, is_told: bool = False) -> None:
    if screen.is_json and not is_told:
        screen.document({"error": {"message": message, "code": code}})
    screen.note(message)


def _advised(refusal: ServerRefused) -> str:
    """Return the server's message, with what helps here against a missing key."""
    if refusal.status != 401:
        return str(refusal)
    return f"{refusal} Here: set IMPETUS_API_KEY, or pass --key."


if __name__ == "__main__":
    sys.exit(main())
