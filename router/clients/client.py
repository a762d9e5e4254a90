"""Describes a client that can be set up for this server, and where clients keep their files."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from router.clients.files import FileChange
from router.clients.problems import ConnectError
from router.clients.target import Model, Target

# The name of this server among a client's providers.  Zed derives IMPETUS_API_KEY from it.
PROVIDER = "impetus"
# Answers may take this fraction (1/4) of the context; the prompt gets the rest.
_ANSWER_SHARE = 4

Wire: TypeAlias = Literal["openai", "responses", "anthropic"]


@dataclass(frozen=True, slots=True)
class Client:
    """A client: the files that configure it, or a text for the user to copy.

    `wire` is the API that it uses; `hint` is the remaining step for the user, `key_hint` the one
    if the server needs a key that the client does not read from its file.
    """

    title: str
    paths: Callable[[], Sequence[Path]]
    changes: Callable[[Target, Model], Sequence[FileChange]]
    text: Callable[[Target, Model], str] | None = None
    wire: Wire = "openai"
    hint: str = ""
    key_hint: str = ""


def folder(variable: str, *default: str) -> Path:
    """Return the folder that an environment variable names, else one below the home folder."""
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else Path.home().joinpath(*default)


def config_folder() -> Path:
    """Return the XDG base folder of configurations; a relative one does not count, as there."""
    value = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(value) if Path(value).is_absolute() else Path.home() / ".config"


def is_mac() -> bool:
    """Whether clients use macOS's folders."""
    return sys.platform == "darwin"


def answer_tokens(model: Model) -> int:
    """Return the longest answer to configure; 0 if the context is unknown."""
    return model.context_tokens // _ANSWER_SHARE


def require_chat(title: str, model: Model) -> None:
    """Raise ConnectError unless the model can chat."""
    if not model.chats:
        raise ConnectError(f"{title} needs a chat model and {model.id} is not one; choose another.")


def require_context(title: str, model: Model) -> None:
    """Raise ConnectError unless the model can chat and its context is known."""
    require_chat(title, model)
    if not model.context_tokens:
        raise ConnectError(
            f"{title} must be told the context of {model.id}, and the server does not give it "
            "(max_model_len in /v1/models); configure it by hand."
        )


def put(entries: list[dict[str, Any]], entry: dict[str, Any], names: Sequence[str]) -> None:
    """Update the entry that has the same values under `names`, or append this one."""
    for known in entries:
        if all(known.get(name) == entry[name] for name in names):
            known.update(entry)
            return
    entries.append(entry)
