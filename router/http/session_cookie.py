"""Reads the cookie of a browser's session, from pages of this server only."""

from starlette.requests import cookie_parser
from starlette.types import Scope

from core.settings import Settings
from router.http.guards import header_values

_MAX_TOKEN = 200
_READING = frozenset({"GET", "HEAD"})


def cookie_name(settings: Settings) -> str:
    """Return the cookie's name: cookies do not tell the ports of a host apart."""
    return f"impetus_session_{settings.port}"


def session_token(scope: Scope, settings: Settings) -> str | None:
    """Return the token in the request's cookie; None for what another page may have sent.

    SameSite does not keep other ports of this host away, such as a development server.  Browsers
    without `Sec-Fetch-Site` send an `Origin` with all that changes anything.
    """
    cookies = header_values(scope, b"cookie")
    if not cookies or not _is_same_origin(scope):
        return None
    values = cookie_parser(cookies[0].decode("latin-1"))
    token = values.get(cookie_name(settings), "")
    return token if 0 < len(token) <= _MAX_TOKEN else None


def _is_same_origin(scope: Scope) -> bool:
    origins = header_values(scope, b"origin")
    sites = header_values(scope, b"sec-fetch-site")
    if any(site not in (b"same-origin", b"none") for site in sites):
        return False
    if origins:
        hosts = header_values(scope, b"host")
        own = [scheme + host.lower() for host in hosts for scheme in (b"http://", b"https://")]
        return len(origins) == 1 and origins[0].lower() in own
    return bool(sites) or scope["method"] in _READING
