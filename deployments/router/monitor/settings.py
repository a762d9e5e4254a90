"""Tells the running server's settings, and stores others for its next start."""

import asyncio
import logging
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from core.errors import ImpetusError, RequestError, SettingFixed
from core.settings import NOT_STORED, ByteCount, Settings, variable_of
from deployments.options import check_settings
from deployments.router.listener import check_exposure
from deployments.stored_settings import change_stored, known_stored
from router.monitor.settings_service import (
    SettingKind,
    SettingList,
    SettingValue,
    SettingView,
)

logger = logging.getLogger(__name__)

_REASONS: Mapping[str, str] = {
    "home": "IMPETUS_HOME; the stored settings are in this folder",
    "api_key": "IMPETUS_API_KEY; secrets are not stored with the settings, see /api/keys",
}
_SIMPLE: Mapping[object, SettingKind] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "text",
    SecretStr: "secret",
}


class StoredSettings:
    """Implements `router.monitor.settings_service.ServerSettings`."""

    def __init__(self, settings: Settings) -> None:
        """`settings` are those of the running server."""
        self._settings = settings

    async def settings(self) -> SettingList:
        """Return all settings; the file of stored ones is read on a thread."""
        return await asyncio.to_thread(self._settings_now)

    def _settings_now(self) -> SettingList:
        stored = known_stored(self._settings.home)
        views = tuple(_views(self._settings, self._settings.next_with(stored), stored))
        return SettingList(
            settings=views, restart_pending=any(one.value != one.next_value for one in views)
        )

    async def change(self, values: Mapping[str, SettingValue], reset: Sequence[str]) -> SettingList:
        """Store the values on a thread, unless the server would not start with them."""
        self._check_names(values, reset)
        await asyncio.to_thread(
            change_stored, self._settings.home, partial(self._changed, values, reset)
        )
        logger.info("settings for the next start: %s", ", ".join((*values, *reset)) or "no change")
        return await self.settings()

    @staticmethod
    def _check_names(values: Mapping[str, SettingValue], reset: Sequence[str]) -> None:
        for name in (*values, *reset):
            if name not in Settings.model_fields:
                raise RequestError(f"{name[:50]!r} is not a setting.", param=name[:50])
            if name in NOT_STORED:
                raise SettingFixed(f"{name} is set by {_REASONS[name]}.", param=name)
            if name in values and name in reset:
                raise RequestError(f"{name}: in values and in reset; choose one.", param=name)
        for name in values:
            if (variable := variable_of(name)) is not None:
                raise SettingFixed(
                    f"{name} is set by the environment variable {variable}, which counts more "
                    "than a stored value. Unset it and restart the server first.",
                    param=name,
                )

    def _changed(
        self, values: Mapping[str, SettingValue], reset: Sequence[str], stored: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what to store.  Raises RequestError if the server would not start with it."""
        kept = {name: value for name, value in stored.items() if name not in reset}
        known = {name: value for name, value in kept.items() if name in Settings.model_fields}
        found = self._settings.next_with({**known, **values})
        try:
            check_settings(found)
            check_exposure(found)
        except RequestError:
            raise
        except ImpetusError as problem:
            raise RequestError(problem.message, param="host") from problem
        valid = found.model_dump(mode="json", include=set(values))
        return {**kept, **valid}


def _views(now: Settings, after: Settings, stored: Mapping[str, Any]) -> Iterator[SettingView]:
    values, next_values = now.model_dump(mode="json"), after.model_dump(mode="json")
    for name, field in Settings.model_fields.items():
        kind, default = _kind(field), field.get_default(call_default_factory=True)
        is_secret = kind == "secret"
        least = next((one.ge for one in field.metadata if isinstance(one, Ge)), None)
        above = next((one.gt for one in field.metadata if isinstance(one, Gt)), None)
        most = next((one.le for one in field.metadata if isinstance(one, Le)), None)
        variable = f"IMPETUS_{name.upper()}"
        yield SettingView(
            name=name,
            variable=variable,
            kind=kind,
            description=field.description or "",
            value=None if is_secret else values[name],
            default=None if is_secret else to_jsonable_python(default),
            next_value=None if is_secret else next_values[name],
            source=now.source_of(name),
            is_stored=name in stored,
            is_set=values[name] is not None,
            is_nullable=type(None) in typing.get_args(field.annotation),
            choices=_choices(field),
            minimum=_number(least),
            exclusive_minimum=_number(above),
            maximum=_number(most),
            fixed_by=_REASONS.get(name) or variable_of(name) or "",
            restart_required=True,
        )


def _number(limit: Any) -> float | None:
    return None if limit is None else float(limit)


def _plain(field: FieldInfo) -> object:
    """Return the annotation without None."""
    annotation: object = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(annotation) if one is not type(None))
    return annotation


def _kind(field: FieldInfo) -> SettingKind:
    annotation = _plain(field)
    if typing.get_origin(annotation) is typing.Literal:
        return "choice"
    if typing.get_origin(annotation) is list:
        return "list"
    (parser,) = typing.get_args(ByteCount)[1:]
    parts = (*field.metadata, *typing.get_args(annotation))
    if parser in parts:
        return "bytes"
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    # Of all numbers only times are not whole.
    if annotation is float:
        return "seconds"
    return _SIMPLE.get(annotation, "path")


def _choices(field: FieldInfo) -> tuple[str, ...]:
    annotation = _plain(field)
    is_choice = typing.get_origin(annotation) is typing.Literal
    return tuple(map(str, typing.get_args(annotation))) if is_choice else ()
