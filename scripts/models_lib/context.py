"""What every command gets: the server, the screen and the options."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from scripts.models_lib.screen import Screen
from scripts.server_lib.client import ServerClient


@dataclass(frozen=True, slots=True)
class Context:
    """One run of the command line."""

    client: ServerClient
    screen: Screen
    options: argparse.Namespace


# Raises what `problems` has, and the errors of the client.
Command: TypeAlias = Callable[[Context], None]
