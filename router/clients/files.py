"""Writes configuration files with backups, and restores them."""

import difflib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from core.files import open_regular, write_atomically
from core.units import MIB, format_bytes
from router.clients.problems import ConnectError

MAX_FILE_BYTES = 4 * MIB
_MARK = ".impetus-"
# Suffix of the backup of a file that did not exist: restoring it deletes the file.
_ABSENT = "absent"
_KEPT = "bak"
_BYTE_ORDER_MARK = "\ufeff"
_SECRET = re.compile(
    r"((?:key|token|secret|password|authorization|credentials?)[\"']?\s*[:=,]\s*)[^\s,].*",
    re.IGNORECASE,
)
# Keys whose form shows what they are, as in a program's arguments, and passwords in addresses.
_SECRET_FORM = re.compile(
    r"((?:--[\w-]*(?:key|token|secret|password)[=\s]|bearer\s|://[^/\s:@\"]*:(?=[^/\s\"]*@))\s*"
    r"|\b(?=(?:sk|pk|gsk|ghp|gho|ghs|hf|glpat|xai|xox[abp]|github_pat)[-_]))[^\s\"'@,]{6,}",
    re.IGNORECASE,
)
_VALUE = re.compile(r"(:\s*).+")


@dataclass(frozen=True, slots=True)
class Edit:
    """A file's text before and after a change; `before` is None if the file does not exist.

    With `holds_secrets`, every value in the file is treated as a secret.
    """

    path: Path
    before: str | None
    after: str
    holds_secrets: bool = False

    @property
    def changes_something(self) -> bool:
        """Whether the file has to be written."""
        return self.before != self.after


@dataclass(frozen=True, slots=True)
class FileChange:
    """A change of a client's file: `change` makes the new text of the old one, None without one.

    With `holds_secrets`, every value in the file is treated as a secret.
    """

    path: Path
    change: Callable[[str | None], str]
    holds_secrets: bool = False

    def planned(self) -> Edit:
        """Return the edit of the file as it is.  Raises ConnectError naming the file."""
        before = read_text(self.path)
        try:
            return Edit(self.path, before, _changed(before, self.change), self.holds_secrets)
        except ConnectError as problem:
            raise ConnectError(f"{self.path} was not changed: {problem}.") from problem

    def alone(self) -> str:
        """Return what the file would hold if nothing else were in it."""
        return self.change(None)


def read_text(path: Path) -> str | None:
    """Return a file's text, or None if it does not exist; at most `MAX_FILE_BYTES`.

    Raises ConnectError.
    """
    try:
        # Not read_text, which changes line ends: a backup is restored byte for byte.
        with open_regular(Path(os.path.realpath(path))) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConnectError(f"{path} is larger than {format_bytes(MAX_FILE_BYTES)}.")
        return data.decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConnectError(
            f"{path} cannot be read ({problem}); check its permissions."
        ) from problem


def require_below(home: Path, path: Path) -> None:
    """Raise ConnectError if the file, or what it links to, is not below the home folder."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(home)):
        raise ConnectError(
            f"{path} is {real}, which is not below the home folder {home}; use scripts/connect."
        )


def _changed(before: str | None, change: Callable[[str | None], str]) -> str:
    """Return the text after `change`, with Windows' line ends and byte order mark kept."""
    if before is None:
        return change(before)
    text = before.removeprefix(_BYTE_ORDER_MARK)
    mark = before[: len(before) - len(text)]
    if 0 < text.count("\r\n") == text.count("\n"):
        return mark + change(text.replace("\r\n", "\n")).replace("\n", "\r\n")
    return mark + change(text)


def preview(edit: Edit, secrets: Iterable[str]) -> str:
    """Return the change as a unified diff, with every secret replaced by `***`."""
    before, after = (edit.before or "").splitlines(), edit.after.splitlines()
    origin = str(edit.path) if edit.before is not None else "/dev/null"
    lines = difflib.unified_diff(before, after, origin, str(edit.path), n=2, lineterm="")
    # The file may also hold other secrets: values after names such as `token` are hidden.
    pattern = _VALUE if edit.holds_secrets else _SECRET
    shown = (pattern.sub(r"\1***", hidden(line, secrets)) for line in lines)
    return "\n".join(_SECRET_FORM.sub(r"\1***", line) for line in shown)


def hidden(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with every secret replaced by `***`."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def apply(edit: Edit) -> Path:
    """Write the file atomically and return its backup.

    Raises ConnectError; the file is then unchanged.
    """
    target = Path(os.path.realpath(edit.path))
    kind = _ABSENT if edit.before is None else _KEPT
    stamp = time.strftime("%Y%m%d-%H%M%S")
    backup = target.with_name(f"{target.name}{_MARK}{stamp}-{_digest(edit.after)}.{kind}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if edit.before is not None else 0o600
        _replace(backup, edit.before or "", 0o600)
        _replace(target, edit.after, mode)
    except OSError as problem:
        raise ConnectError(
            f"{target} cannot be written ({problem.strerror}); check its permissions."
        ) from problem
    return backup


def apply_all(edits: Iterable[Edit]) -> list[Path]:
    """Write all files and return their backups, or restore those already written if one fails.

    Raises ConnectError.
    """
    written: list[Edit] = []
    backups: list[Path] = []
    try:
        for edit in edits:
            backups.append(apply(edit))
            written.append(edit)
    except ConnectError:
        for edit in written:
            undo(edit.path)
        raise
    return backups


def undo(path: Path, *, is_forced: bool = False) -> Path | None:
    """Restore the newest backup and return it; None if there is none.

    Raises ConnectError if the file was changed after the backup; with `is_forced` its current
    text is kept beside it as `NAME.undone` instead.
    """
    target = Path(os.path.realpath(path))
    # Names sort by their time stamp; the digest comes after it.
    backups = sorted(target.parent.glob(f"{target.name}{_MARK}*"))
    if not backups:
        return None
    backup = backups[-1]
    current = read_text(target)
    is_changed = current is None or backup.stem.rpartition("-")[2] != _digest(current)
    if is_changed and not is_forced:
        raise ConnectError(
            f"{target} was changed since the backup {backup}. Run again with --undo --force to "
            f"restore it; the current text is then kept as {target.name}.undone."
        )
    try:
        if current is not None and is_changed:
            _replace(target.with_name(f"{target.name}.undone"), current, 0o600)
        if backup.suffix == f".{_ABSENT}":
            target.unlink(missing_ok=True)
        else:
            mode = target.stat().st_mode & 0o777 if current is not None else 0o600
            _replace(target, backup.read_bytes().decode(), mode)
        backup.unlink()
    except OSError as problem:
        raise ConnectError(
            f"{target} cannot be written ({problem.strerror}); check its permissions."
        ) from problem
    return backup


def _replace(path: Path, text: str, mode: int) -> None:
    write_atomically(path, text.encode(), mode=mode)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
