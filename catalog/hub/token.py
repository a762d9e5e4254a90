"""Keeps the user's token for the hub: where it comes from, storing it, and whose it is."""

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import OIDCError

from catalog.hub import facts
from catalog.hub.client import HubClient
from core.errors import HubAccessDenied, HubTokenRejected, ImpetusError, RequestError
from core.files import NotARegularFile, open_regular, why, write_atomically

logger = logging.getLogger(__name__)

TokenSource: TypeAlias = Literal["environment", "stored", "login", ""]

_FILE = "hub_token"
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKEN = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True, slots=True)
class HubToken:
    """A token and where it is from; both are empty without one."""

    value: str = field(default="", repr=False)
    source: TokenSource = ""


class TokenFile:
    """The token that was given to this server, in a file that only its owner can read.

    All methods block for a moment.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / "keys" / _FILE

    def read(self) -> str:
        """Return the token, empty without one or with a file that is not one."""
        try:
            with open_regular(self._path) as stream:
                if os.fstat(stream.fileno()).st_mode & 0o077:
                    os.fchmod(stream.fileno(), 0o600)
                text = stream.read(1024).decode("ascii").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except (OSError, NotARegularFile, UnicodeDecodeError) as problem:
            logger.warning("the stored token is not used: %s", type(problem).__name__)
            return ""
        return text if _TOKEN.fullmatch(text) else ""

    def save(self, token: str) -> None:
        """Store a token.  Raises RequestError for what is not one, ImpetusError for the disk."""
        token = token.strip()
        check_token(token)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._path, token.encode())
        except OSError as problem:
            raise ImpetusError(
                f"The token could not be stored in {self._path.parent} ({why(problem)}); make the "
                "folder writable."
            ) from problem

    def remove(self) -> None:
        """Forget the token."""
        self._path.unlink(missing_ok=True)


def check_token(token: str) -> None:
    """Raise RequestError for what is not a token, apart from blanks around it."""
    if not _TOKEN.fullmatch(token.strip()):
        raise RequestError(
            "The token has to be of 1 to 512 characters without spaces, as "
            "huggingface.co/settings/tokens shows it.",
            param="token",
        )


def current_token(file: TokenFile) -> HubToken:
    """Return the token to use: of the environment, else the stored one, else of `hf auth login`.

    Blocks; a login that has to be renewed asks the hub.
    """
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if _TOKEN.fullmatch(value):
            return HubToken(value, "environment")
    if stored := file.read():
        return HubToken(stored, "stored")
    try:
        value = get_token() or ""
    except (OSError, httpx2.HTTPError, OIDCError, ValueError) as problem:
        logger.warning("the login of `hf auth login` is not used: %s", type(problem).__name__)
        return HubToken()
    return HubToken(value, "login") if value else HubToken()


def owner_of(client: HubClient) -> str:
    """Return the name of the user whose token the client uses; blocks.

    Raises HubTokenRejected for a token that the hub does not know, or none; and the errors `Hub…`.
    """
    try:
        answer = client.get_json("/api/whoami-v2", "the account of the token")
    except HubAccessDenied:
        raise HubTokenRejected(
            f"{client.host} does not know the token; make a new one at "
            "huggingface.co/settings/tokens."
        ) from None
    name = facts.text(facts.mapping(answer.value).get("name"))
    if not name:
        raise HubTokenRejected(f"{client.host} does not say whose token it is; make a new one.")
    return name
