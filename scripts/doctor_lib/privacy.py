"""Replaces what names a person, a machine or a secret in what the doctor prints and writes."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType

_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$")
_SECRETS = re.compile(r"(?i)\b(bearer\s+|x-api-key:\s*|x-impetus-token:\s*)\S+|\bsk-[\w-]{8,}")
_USER_FOLDER = re.compile(r"(/(?:Users|home)/)(?!Shared\b)[^/\s:\"']+")
# Below these lie documents and disks of the user's; what programs keep there begins with a dot.
_OWN_PATH = re.compile(r"(~/|/Volumes/|/media/|/mnt/)(?!\.|Library/|<)[^\s:;,\"']+")
_FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "IMPETUS_HOME": "<data folder>",
        "IMPETUS_MODELS_PATH": "<models>",
        "RAY_TMPDIR": "<temporary>",
        "TMPDIR": "<temporary>",
    }
)
_LEAST_NAME = 3
# Names that stand for no person, and words of paths at the same time.
_NOBODY = frozenset({"root", "user", "admin", "runner", "ubuntu", "localhost"})


class Privacy:
    """Knows the user's folder, the names of user and machine, and the secrets of an environment."""

    def __init__(self, environment: Mapping[str, str], root: str = "") -> None:
        """`root` is the repository's folder."""
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

        named = {root: "<repository>"}
        for name, word in _FOLDERS.items():
            for folder in environment.get(name, "").split(os.pathsep):
                named.setdefault(folder.strip(), word)
                # As the rows have it.
                named.setdefault(_expanded(folder.strip(), environment), word)
        named = {folder.rstrip("/"): word for folder, word in named.items()}
        self._folders = [
            (re.compile(rf"{re.escape(folder)}(?![\w.-])"), named[folder])
            for folder in sorted(named, key=len, reverse=True)
            if len(folder) >= _LEAST_NAME
        ]

    def hide_paths(self, text: str) -> str:
        """Return `text` with that, and the paths of the user's own folders, replaced."""
        for pattern, word in self._folders:
            text = pattern.sub(word, text)
        return _OWN_PATH.sub(r"\1<path>", self.hide(text))

    def hide(self, text: str) -> str:
        """Return `text` with all of that replaced."""
        for pattern, word in self._replacements:
            text = pattern.sub(word, text)
        text = _USER_FOLDER.sub(r"\1<user>", text)
        return _SECRETS.sub(lambda match: f"{match[1] or ''}<secret>", text)


def _expanded(folder: str, environment: Mapping[str, str]) -> str:
    home = environment.get("HOME", "~")
    return home + folder[1:] if folder.startswith("~/") else folder


def _whole(text: str, word: str) -> str:
    """Return the pattern of `text`; names only as whole words."""
    escaped = re.escape(text)
    return escaped if word == "<secret>" else rf"(?<![\w]){escaped}(?![\w])"


def _user() -> str:
    with suppress(Exception):
        return getpass.getuser()
    return ""
