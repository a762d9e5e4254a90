"""`GET /api/settings`: all settings with their sources; `PATCH` stores others."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.monitor.settings_service import ServerSettings, SettingValue
from router.requests.strict_body import StrictBody, read_strict

_MOST = 100
SettingName = Annotated[str, Field(max_length=100)]


class SettingsChange(StrictBody):
    """Values to store by the names of their settings, and names whose stored values to forget."""

    values: Annotated[dict[SettingName, SettingValue], Field(max_length=_MOST)] = Field(
        default_factory=dict
    )
    reset: Annotated[list[SettingName], Field(max_length=_MOST)] = Field(default_factory=list)


def settings_endpoint(service: ServerSettings) -> Endpoint:
    """Return the handler that lists the settings."""

    async def list_settings(request: Request) -> Response:
        del request
        return answer(await service.settings())

    return list_settings


def change_settings_endpoint(service: ServerSettings) -> Endpoint:
    """Return the handler that changes the stored settings."""

    async def change_settings(request: Request) -> Response:
        change = await read_strict(request, SettingsChange)
        return answer(await service.change(change.values, change.reset))

    return change_settings
