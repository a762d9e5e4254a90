"""`GET /api/logs`: the last lines of the server's log."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.monitor.log_service import Level, LogFilter, Logs
from router.requests.query import Query, read_query

MAX_LINES = 1000
_LONGEST = 200


class LogQuery(Query):
    """Which lines; `level` is the lowest one, `before` the id of a line that comes after them."""

    level: Level = "debug"
    component: Annotated[str, Field(max_length=_LONGEST)] = ""
    request_id: Annotated[str, Field(max_length=_LONGEST)] = ""
    text: Annotated[str, Field(max_length=_LONGEST)] = ""
    limit: Annotated[int, Field(ge=1, le=MAX_LINES)] = 200
    before: Annotated[str, Field(max_length=64)] = ""


def logs_endpoint(logs: Logs) -> Endpoint:
    """Return the handler of the log."""

    async def list_log_lines(request: Request) -> Response:
        query = read_query(request, LogQuery)
        wanted = LogFilter(query.level, query.component, query.request_id, query.text)
        page = await logs.last_lines(wanted, query.limit, query.before)
        return answer(page, is_private=True)

    return list_log_lines
