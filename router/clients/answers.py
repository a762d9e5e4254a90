"""The answers of `/api/connect`."""

from typing import Literal, TypeAlias

from router.clients.client import Wire
from router.job_service import Answer

Level: TypeAlias = Literal["ok", "limited", "no"]


class ClientModel(Answer):
    """How well a client can use a model; `reasons` say what is missing."""

    model: str
    level: Level
    reasons: list[str]


class ClientPath(Answer):
    """A file that configures a client."""

    path: str
    exists: bool


class ClientView(Answer):
    """A client; `is_installed` is null for libraries, `found` is where it was found.

    `api` is the API that it uses.  `models` are the best for it, best first, without echo.
    `recommended` is null if none suits it.
    """

    client: str
    title: str
    api: Wire
    is_installed: bool | None
    found: str
    files: list[ClientPath]
    recommended: str | None
    models: list[ClientModel]


class ClientList(Answer):
    """All clients, by name."""

    clients: list[ClientView]


class ClientFile(ClientPath):
    """A client's file: `text` is what this server's part is, without what else is there.

    `is_changed` and `diff` tell what writing it would change, with secrets hidden; null for those
    who may not manage the server, and where `problem` says why it cannot be written.
    """

    language: str
    text: str
    is_changed: bool | None
    diff: str | None
    problem: str


class ClientSetUp(Answer):
    """How a client is set up for a model; `text` is to be copied for a client without files.

    `url` is the base URL, `needs_key` tells that the server needs an API key; its place is held by
    `YOUR_API_KEY` or the variable IMPETUS_API_KEY.
    """

    client: str
    title: str
    model: str
    level: Level
    reasons: list[str]
    context_tokens: int
    url: str
    needs_key: bool
    files: list[ClientFile]
    text: str | None
    language: str
    steps: list[str]


class WrittenFile(Answer):
    """A file after writing; `backup` is null if nothing had to be changed."""

    path: str
    backup: str | None


class WrittenSetUp(Answer):
    """The files of a client that were written, and what is left to do."""

    client: str
    model: str
    url: str
    files: list[WrittenFile]
    steps: list[str]


class CheckStep(Answer):
    """A step of the check; `problem` is empty if it passed."""

    name: str
    ok: bool
    ms: int
    problem: str


class ClientCheck(Answer):
    """The result of all steps."""

    client: str
    model: str
    ok: bool
    steps: list[CheckStep]
