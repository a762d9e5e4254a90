"""The table of routes about the server itself."""

from collections.abc import Iterator
from functools import partial

from router.api.monitor.charts import SeriesQuery, series_endpoint, thermal_endpoint
from router.api.monitor.logs import LogQuery, logs_endpoint
from router.api.monitor.settings import (
    SettingsChange,
    change_settings_endpoint,
    settings_endpoint,
)
from router.http.access import Access
from router.monitor.chart_service import SeriesAnswer, ThermalAnswer
from router.monitor.log_service import LogPage
from router.monitor.settings_service import SettingList
from router.route import Route
from router.services import Services

_read = partial(Route, Access.READ, "GET")


def monitor_routes(services: Services) -> Iterator[Route]:
    """Yield the routes of the services that there are."""
    if services.logs is not None:
        log = logs_endpoint(services.logs)
        yield Route(Access.MANAGE, "GET", "/api/logs", log, query=LogQuery, answer=LogPage)
    if services.monitor is not None:
        series, thermal = series_endpoint(services.monitor), thermal_endpoint(services.monitor)
        yield _read("/api/metrics/series", series, query=SeriesQuery, answer=SeriesAnswer)
        yield _read("/api/thermal", thermal, answer=ThermalAnswer)
    if services.stored_settings is not None:
        path, listed = "/api/settings", settings_endpoint(services.stored_settings)
        yield _read(path, listed, answer=SettingList)
        change = change_settings_endpoint(services.stored_settings)
        yield Route(
            Access.MANAGE,
            "PATCH",
            path,
            change,
            body=SettingsChange,
            answer=SettingList,
            name="changeServerSettings",
        )
