"""The server's settings as the API shows them, and the Protocol that the routes need."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

from core.settings import SettingSource
from router.job_service import Answer

SettingValue: TypeAlias = bool | int | float | str | list[str] | None
SettingKind: TypeAlias = Literal[
    "boolean", "integer", "number", "bytes", "seconds", "text", "choice", "path", "list", "secret"
]


class SettingView(Answer):
    """One setting; `value` is that of the running server, `next_value` that of the next start.

    `source` says where `value` is from.  `minimum` and `maximum` are null where there is none;
    those of `exclusive_minimum` are not allowed themselves.  `fixed_by` names what keeps it from
    being changed here: a variable of the environment, or why it is stored nowhere.  Of a secret
    only `is_set` is shown.  `restart_required`: a change counts from the next start on.
    """

    name: str
    variable: str
    kind: SettingKind
    description: str
    value: SettingValue
    default: SettingValue
    next_value: SettingValue
    source: SettingSource
    is_stored: bool
    is_set: bool
    is_nullable: bool
    choices: tuple[str, ...]
    minimum: float | None
    exclusive_minimum: float | None
    maximum: float | None
    fixed_by: str
    restart_required: bool


class SettingList(Answer):
    """All settings; `restart_pending`: some have another value after the next start."""

    settings: tuple[SettingView, ...]
    restart_pending: bool


class ServerSettings(Protocol):
    """The settings of the server, and what is stored for its next start."""

    async def settings(self) -> SettingList:
        """Return all settings.  Raises RequestError if the stored ones are damaged."""
        ...

    async def change(self, values: Mapping[str, SettingValue], reset: Sequence[str]) -> SettingList:
        """Store values for the next start, and forget those of `reset`.

        Raises RequestError naming what is invalid, SettingFixed, Unavailable; nothing is stored
        then.
        """
        ...
