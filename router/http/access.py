"""Who may call a route: access classes of paths, the API key, and the management token."""

import hashlib
import hmac
from enum import Enum

from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import AuthenticationError, ImpetusError, PermissionDenied
from core.metrics import Metrics
from core.settings import Settings
from router.http.guards import CLOSE, PUBLIC_PATHS, Guard, header_values

# A browser sends one of these with every request that can change anything.  `sec-fetch-mode` is
# not among them: the fetch of Node.js sends it as well.
_BROWSER_HEADERS = (b"origin", b"referer", b"sec-fetch-site", b"sec-fetch-dest")


class Access(Enum):
    """The access class of a route.

    `PUBLIC` needs nothing; `INFERENCE` the API key if one is set; `MANAGEMENT` the API key or the
    management token if a key is set, else the token from a browser and nothing from other clients.
    """

    PUBLIC = "public"
    INFERENCE = "inference"
    MANAGEMENT = "management"


def access_of(path: str) -> Access:
    """Return the class of a request's path; unknown paths count as inference."""
    if path in PUBLIC_PATHS:
        return Access.PUBLIC
    if path == "/api" or path.startswith("/api/"):
        return Access.MANAGEMENT
    return Access.INFERENCE


def is_from_browser(scope: Scope) -> bool:
    """Return whether a web page, an editor's web view or a browser's address bar sent it."""
    return any(name.lower() in _BROWSER_HEADERS for name, _ in scope["headers"])


class AccessGuard(Guard):
    """Requires the API key or the management token; decides on `scope["path"]` alone."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, management_token: str
    ) -> None:
        """An empty `management_token` is never accepted."""
        super().__init__(app, settings, metrics)
        key = settings.api_key
        self._key = None if key is None else _digest(key.get_secret_value().encode("ascii"))
        self._token = _digest(management_token.encode()) if management_token else None

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass on."""
        access = access_of(scope["path"])
        error: ImpetusError | None = None
        if access is Access.MANAGEMENT:
            error = self._check_management(scope)
        elif access is Access.INFERENCE and not self._has_key(scope):
            error = AuthenticationError(
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`."
            )
        if error is None:
            await self._app(scope, receive, send)
        else:
            await self.refusal(error, headers=CLOSE)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = [*header_values(scope, b"x-api-key"), *_bearer_values(scope)]
        return _matches(given, self._key)

    def _check_management(self, scope: Scope) -> ImpetusError | None:
        given = [*header_values(scope, b"x-impetus-token"), *_bearer_values(scope)]
        if self._token is not None and _matches(given, self._token):
            return None
        if self._key is not None:
            if self._has_key(scope):
                return None
            return AuthenticationError(
                "Managing models needs the API key, or the management token that scripts/serve "
                "prints; send one as `Authorization: Bearer …`."
            )
        if not is_from_browser(scope):
            return None
        return PermissionDenied(
            "Managing models from a web page needs the management token that scripts/serve "
            "prints; send it as `Authorization: Bearer TOKEN` or `X-Impetus-Token: TOKEN`."
        )


def _bearer_values(scope: Scope) -> list[bytes]:
    pairs = (value.partition(b" ") for value in header_values(scope, b"authorization"))
    return [value.strip() for scheme, _, value in pairs if scheme.lower() == b"bearer"]


def _matches(given: list[bytes], expected: bytes) -> bool:
    """Compare in constant time; digests also hide the length."""
    return any(hmac.compare_digest(_digest(value), expected) for value in given)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
