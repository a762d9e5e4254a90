"""Replaces what names a person, a machine or a secret in what the doctor prints and writes."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Mapping
from contextlib import suppress

_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$")
_SECRETS = re.compile(r"(?i)\b(bearer\s+|x-api-key:\s*|x-impetus-token:\s*)\S+|\bsk-[\w-]{8,}")
_USER_FOLDER = re.compile(r"(/(?:Users|home)/)(?!Shared\b)[^/\s:\"']+")
_LEAST_NAME = 3
# Names that stand for no person, and words of paths at the same time.
_NOBODY = frozenset({"root", "user", "admin", "runner", "ubuntu", "localhost"})


class Privacy:
    """Knows the user's folder, the names of user and machine, and the secrets of an environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        words = {"~": [environment.get("HOME", "")]}
        words["<secret>"] = [
            value for name, value in environment.items() if _SECRET_NAME.search(name.upper())
        ]
        words["<user>"] = [_user(), environment.get("USER", ""), environment.get("LOGNAME", "")]
        host = socket.gethostname()
        words["<host>"] = [host, host.partition(".")[0]]
        self._replacements = [
            (re.compile(_whole(text, word)), word)
            for word, texts in words.items()
            for text in sorted(set(texts), key=len, reverse=True)
            if len(text) >= _LEAST_NAME and text.lower() not in _NOBODY and text != "/"
        ]

    def hide(self, text: str) -> str:
        """Return `text` with all of that replaced."""
        for pattern, word in self._replacements:
            text = pattern.sub(word, text)
        text = _USER_FOLDER.sub(r"\1<user>", text)
        return _SECRETS.sub(lambda match: f"{match[1] or ''}<secret>", text)


def _whole(text: str, word: str) -> str:
    """Return the pattern of `text`; names only as whole words."""
    escaped = re.escape(text)
    return escaped if word == "<secret>" else rf"(?<![\w]){escaped}(?![\w])"


def _user() -> str:
    with suppress(Exception):
        return getpass.getuser()
    return ""
