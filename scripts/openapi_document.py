"""Generates ui/openapi.json, the description of all routes, which no user's settings change."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any, cast

from core.settings import Settings
from router.app import create_app
from router.services import Services

_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def openapi_text() -> str:
    """Return the description as JSON with sorted names; the same routes give the same text."""
    document = create_app(_services()).openapi()
    document["info"]["version"] = tomllib.loads(_PROJECT.read_text())["project"]["version"]
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


class _NoService:
    """Stands for any service: routes are made, and none is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _services() -> Services:
    """Return services with every optional one, so that all routes exist."""
    names = [field.name for field in dataclasses.fields(Services)]
    given: dict[str, Any] = dict.fromkeys(names, cast("Any", _NoService()))
    # Defaults alone: the environment is not read.
    return Services(**{**given, "settings": Settings.model_construct(), "management_token": ""})
