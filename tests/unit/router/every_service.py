"""An application with every optional service, so that it has all routes."""

from dataclasses import replace
from typing import Any

from fastapi import FastAPI

from router.app import create_app
from router.events.hub import EventHub
from tests.fakes import FakeDispatcher, make_services
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.router.api.test_router_conversions import FakeConversions
from tests.unit.router.api.test_router_files import FakeFiles
from tests.unit.router.api.test_router_hub import FakeHub
from tests.unit.router.api.test_router_jobs import FakeJobs
from tests.unit.router.api.test_router_monitor import FakeLogs, FakeMonitor
from tests.unit.router.api.test_router_settings import FakeServerSettings
from tests.unit.router.api.test_router_uploads import FakeUploads
from tests.unit.router.events.sources import FakeSources


def make_whole_app(
    credentials: Any,
    dispatcher: FakeDispatcher | None = None,
    events: EventHub | None = None,
    **settings: Any,
) -> FastAPI:
    """Return the application over stand-ins and these credentials."""
    return create_app(
        replace(
            make_services(dispatcher, **settings),
            management=FakeManagement(),
            jobs=FakeJobs(),
            conversions=FakeConversions(),
            hub=FakeHub(),
            credentials=credentials,
            uploads=FakeUploads(),
            files=FakeFiles(),
            events=events or EventHub(FakeSources()),
            logs=FakeLogs(),
            monitor=FakeMonitor(),
            stored_settings=FakeServerSettings(),
        )
    )
