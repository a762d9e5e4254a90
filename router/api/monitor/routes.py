"""The table of routes about the server itself."""

from collections.abc import Iterator

from router.api.monitor.logs import LogQuery, logs_endpoint
from router.http.access import Access
from router.monitor.log_service import LogPage
from router.route import Route
from router.services import Services


def monitor_routes(services: Services) -> Iterator[Route]:
    """Yield the routes of the services that there are."""
    if services.logs is not None:
        log = logs_endpoint(services.logs)
        yield Route(Access.MANAGE, "GET", "/api/logs", log, query=LogQuery, answer=LogPage)
