"""What is shown of a client's setup, and writing it: in files below the home folder alone."""

import os
from collections.abc import Sequence
from pathlib import Path

from router.clients.answers import (
    CheckStep,
    ClientCheck,
    ClientFile,
    ClientPath,
    Level,
    WrittenFile,
)
from router.clients.check import Outcome
from router.clients.client import Client
from router.clients.files import FileChange, apply_all, hidden, preview, require_below
from router.clients.problems import ConnectError
from router.clients.target import Model, Target

# Stands for the server's key, whose text is stored nowhere.
PLACEHOLDER_KEY = "YOUR_API_KEY"
_LANGUAGES = {".json": "json", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def client_paths(client: Client) -> list[ClientPath]:
    """Return the client's files; one that cannot be looked at does not exist."""
    return [ClientPath(path=str(path), exists=os.path.exists(path)) for path in client.paths()]


def shown_files(changes: Sequence[FileChange], *, is_manager: bool) -> list[ClientFile]:
    """Return what each change would write; the files are read for managers of the server alone."""
    return [_shown(change, is_manager=is_manager) for change in changes]


def write_files(changes: Sequence[FileChange]) -> list[WrittenFile]:
    """Write all files, or none, and return them with their backups; blocks.

    Raises ConnectError for a file that is not below the home folder or cannot be changed, and if
    the server's key is missing.
    """
    if any(PLACEHOLDER_KEY in change.alone() for change in changes):
        raise ConnectError(
            "This server needs an API key, which the client's file must hold: create one with the "
            "scope inference, and send its text in `key`."
        )
    for change in changes:
        require_below(Path.home(), change.path)
    edits = [change.planned() for change in changes]
    changed = [edit for edit in edits if edit.changes_something]
    backups = dict(zip([edit.path for edit in changed], apply_all(changed), strict=True))
    return [
        WrittenFile(
            path=str(edit.path),
            backup=str(backups[edit.path]) if edit.path in backups else None,
        )
        for edit in edits
    ]


def check_answer(client: str, model: Model, outcomes: Sequence[Outcome], key: str) -> ClientCheck:
    """Return the outcomes of all steps, without the key."""
    steps = [
        CheckStep(
            name=outcome.name,
            ok=not outcome.problem,
            ms=outcome.ms,
            problem=hidden(outcome.problem, [key] if key else []),
        )
        for outcome in outcomes
    ]
    return ClientCheck(
        client=client, model=model.id, ok=all(step.ok for step in steps), steps=steps
    )


def steps_of(client: Client, target: Target) -> list[str]:
    """Return what is left to do for the user."""
    return [hint for hint in (client.key_hint if target.key else "", client.hint) if hint]


def language_of(text: str | None) -> str:
    """Return the language of a text to copy; empty without one."""
    if text is None:
        return ""
    return "python" if "import " in text else "sh"


def level_of(text: str) -> Level:
    """Return a level of `compatibility`, `no` for an unknown one."""
    return "ok" if text == "ok" else "limited" if text == "limited" else "no"


def _shown(change: FileChange, *, is_manager: bool) -> ClientFile:
    is_changed, diff, problem = None, None, ""
    if is_manager:
        try:
            require_below(Path.home(), change.path)
            edit = change.planned()
            is_changed, diff = edit.changes_something, preview(edit, [])
        except ConnectError as error:
            problem = str(error)
    return ClientFile(
        path=str(change.path),
        exists=os.path.exists(change.path),
        language=_LANGUAGES.get(change.path.suffix, ""),
        text=change.alone(),
        is_changed=is_changed,
        diff=diff,
        problem=problem,
    )
