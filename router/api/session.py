"""Sessions of browsers: `/session` is the one-time link, `/api/session` tells, opens and ends."""

from typing import Annotated

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from core.errors import PermissionDenied
from core.keys import Scope
from core.settings import Settings
from router.api.answer import Endpoint, answer
from router.http.access import allowed_scopes
from router.http.session_cookie import cookie_name, session_token
from router.job_service import Answer
from router.requests.strict_body import StrictBody, read_strict
from router.services import Credentials

_MAX_CODE = 200
_MAX_AGE_S = 7 * 24 * 3600


class SessionCode(StrictBody):
    """The code of a one-time link."""

    code: Annotated[str, Field(min_length=1, max_length=_MAX_CODE)]


class LinkQuery(BaseModel):
    """The query of a one-time link; a browser that is signed in needs no code."""

    code: Annotated[str, Field(max_length=_MAX_CODE)] = ""


class SessionAnswer(Answer):
    """What this client may do."""

    scopes: list[Scope]


def link_endpoint(settings: Settings, credentials: Credentials) -> Endpoint:
    """Return the handler of the one-time link: sets the cookie and goes to the start page."""

    async def follow_link(request: Request) -> Response:
        answer = RedirectResponse("/", 303, {"referrer-policy": "no-referrer"})
        token = await credentials.open_session(request.query_params.get("code", "")[:_MAX_CODE])
        if token is not None:
            _set_cookie(answer, settings, token)
        elif not await _is_signed_in(request, settings, credentials):
            raise _unusable()
        answer.headers["cache-control"] = "no-store"
        return answer

    return follow_link


def show_session_endpoint() -> Endpoint:
    """Return the handler that tells what this client may do."""

    async def show_session(request: Request) -> Response:
        scopes = sorted(allowed_scopes(request.scope))
        return answer(SessionAnswer(scopes=scopes), is_private=True)

    return show_session


def open_session_endpoint(settings: Settings, credentials: Credentials) -> Endpoint:
    """Return the handler that opens a session with the code of a link."""

    async def open_session(request: Request) -> Response:
        body = await read_strict(request, SessionCode)
        token = await credentials.open_session(body.code)
        if token is None:
            raise _unusable()
        answer = Response(status_code=204)
        _set_cookie(answer, settings, token)
        return answer

    return open_session


def close_session_endpoint(settings: Settings, credentials: Credentials) -> Endpoint:
    """Return the handler that ends the session of this client, if it has one."""

    async def close_session(request: Request) -> Response:
        token = session_token(request.scope, settings)
        if token is not None:
            await credentials.close_session(token)
        answer = Response(status_code=204)
        answer.delete_cookie(cookie_name(settings), httponly=True, samesite="strict")
        return answer

    return close_session


async def _is_signed_in(request: Request, settings: Settings, credentials: Credentials) -> bool:
    token = session_token(request.scope, settings)
    return token is not None and await credentials.has_session(token)


def _set_cookie(answer: Response, settings: Settings, token: str) -> None:
    answer.set_cookie(
        cookie_name(settings), token, max_age=_MAX_AGE_S, httponly=True, samesite="strict"
    )


def _unusable() -> PermissionDenied:
    return PermissionDenied(
        "This link was used already or has expired; `scripts/keys link` prints a new one."
    )
