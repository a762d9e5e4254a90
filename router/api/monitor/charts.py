"""`GET /api/metrics/series`: values of the last hours for a chart; `GET /api/thermal`."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.monitor.chart_service import RANGES_S, Monitor, RangeName
from router.monitor.history import SeriesName
from router.requests.query import Query, read_query

MAX_POINTS = 600


class SeriesQuery(Query):
    """Which chart, of which time until now, and its greatest number of time steps."""

    name: SeriesName
    range: RangeName = "1h"
    points: Annotated[int, Field(ge=1, le=MAX_POINTS)] = 300


def series_endpoint(monitor: Monitor) -> Endpoint:
    """Return the handler of the charts."""

    async def show_series(request: Request) -> Response:
        query = read_query(request, SeriesQuery)
        return answer(await monitor.series(query.name, RANGES_S[query.range], query.points))

    return show_series


def thermal_endpoint(monitor: Monitor) -> Endpoint:
    """Return the handler of the thermal state."""

    async def show_thermal(request: Request) -> Response:
        del request
        return answer(await monitor.thermal())

    return show_thermal
