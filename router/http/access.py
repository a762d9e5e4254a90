"""Who may call a route: access classes, API keys with scopes, sessions, the management token."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping, MutableMapping
from enum import Enum
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import AuthenticationError, ImpetusError, PermissionDenied
from core.keys import SCOPES, ApiKey
from core.keys import Scope as KeyScope
from core.metrics import Metrics
from core.settings import Settings
from router.http.guards import CLOSE, PUBLIC_PATHS, Guard, header_values, is_key_required
from router.http.session_cookie import session_token
from router.services import Credentials

_CALLER = "impetus.caller"
_ALLOWED = "impetus.scopes"
# Of the keys in one request's headers so many are looked at.
_MAX_KEYS_GIVEN = 2
# A browser sends one of these with every request that can change anything.  `sec-fetch-mode` is
# not among them: the fetch of Node.js sends it as well.
_BROWSER_HEADERS = (b"origin", b"referer", b"sec-fetch-site", b"sec-fetch-dest")


class Access(Enum):
    """The access class of a route.

    `OPEN` needs nothing.  If a key is needed, `INFERENCE` needs one with that scope, `READ` one
    with `read` or `manage`, and `MANAGE` one with `manage`.  Otherwise `INFERENCE` needs nothing,
    `READ` a session or the management token from browsers below `/api`, and `MANAGE` always one.
    """

    OPEN = "open"
    INFERENCE = "inference"
    READ = "read"
    MANAGE = "manage"


_ACCEPTED: Mapping[Access, frozenset[KeyScope]] = {
    Access.INFERENCE: frozenset({"inference"}),
    Access.READ: frozenset({"read", "manage"}),
    Access.MANAGE: frozenset({"manage"}),
}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_SESSION = "/api/session"
# What is only read to manage the server: who may use it, what the user's folders hold, its log.
_PRIVATE = ("/api/keys", "/api/fs", "/api/logs")


def access_of(method: str, path: str) -> Access:
    """Return the class of a request; unknown paths count as inference."""
    if path in PUBLIC_PATHS or path == "/session":
        return Access.OPEN
    if path == "/metrics":
        return Access.READ
    if path != "/api" and not path.startswith("/api/"):
        return Access.INFERENCE
    if path == _SESSION and method not in _READING:
        return Access.OPEN
    is_private = any(path == one or path.startswith(f"{one}/") for one in _PRIVATE)
    return Access.READ if method in _READING and not is_private else Access.MANAGE


def is_from_browser(scope: Scope) -> bool:
    """Return whether a web page, an editor's web view or a browser's address bar sent it."""
    return any(name.lower() in _BROWSER_HEADERS for name, _ in scope["headers"])


def caller_of(scope: MutableMapping[str, Any]) -> str | None:
    """Return the id of the stored API key that a request was accepted for, if any."""
    caller: str | None = scope.get(_CALLER)
    return caller


def allowed_scopes(scope: MutableMapping[str, Any]) -> frozenset[KeyScope]:
    """Return what the client of an accepted request may do."""
    scopes: frozenset[KeyScope] = scope.get(_ALLOWED, frozenset())
    return scopes


class AccessGuard(Guard):
    """Requires an API key with the route's scope, a session, or the management token.

    It decides on the method and `scope["path"]` alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        management_token: str,
        credentials: Credentials | None,
    ) -> None:
        """An empty `management_token` is never accepted."""
        super().__init__(app, settings, metrics)
        key = settings.api_key
        self._key = None if key is None else _digest(key.get_secret_value().encode("ascii"))
        self._token = _digest(management_token.encode()) if management_token else None
        self._credentials = credentials

    async def guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403 or 429, or pass on."""
        access = access_of(scope["method"], scope["path"])
        error: ImpetusError | None = None
        if access is not Access.OPEN:
            try:
                error = await self._check(access, scope)
            except ImpetusError as problem:
                error = problem
        if error is None:
            await self._app(scope, receive, send)
        else:
            await self.refusal(error, headers=CLOSE)(scope, receive, send)

    async def _check(self, access: Access, scope: Scope) -> ImpetusError | None:
        is_key_needed = is_key_required(self._settings, self._credentials)
        if access is Access.INFERENCE and not is_key_needed:
            return None
        if self._is_trusted(access, scope) or await self._has_session(scope):
            scope[_ALLOWED] = SCOPES
            return None
        if is_key_needed:
            return await self._check_stored_key(access, scope)
        is_page = is_from_browser(scope) and scope["path"].startswith("/api")
        if access is Access.READ and not is_page:
            scope[_ALLOWED] = SCOPES - {"manage"}
            return None
        if not is_page:
            return AuthenticationError(
                "Managing the server needs the management token that scripts/serve prints, or an "
                "API key with the scope manage; send one as `Authorization: Bearer …`."
            )
        return PermissionDenied(
            "Managing models from a web page needs a session or the management token, which "
            "scripts/serve prints; open its sign-in link, or send the token as "
            "`Authorization: Bearer TOKEN` or `X-Impetus-Token: TOKEN`."
        )

    async def _has_session(self, scope: Scope) -> bool:
        token = session_token(scope, self._settings)
        if token is None or self._credentials is None:
            return False
        return await self._credentials.has_session(token)

    def _is_trusted(self, access: Access, scope: Scope) -> bool:
        """Whether it has the key of the settings, or the management token where that counts."""
        if self._key is not None and _matches(_key_values(scope), self._key):
            return True
        if self._token is None or access is Access.INFERENCE:
            return False
        given = [*header_values(scope, b"x-impetus-token"), *_bearer_values(scope)]
        return _matches(given, self._token)

    async def _check_stored_key(self, access: Access, scope: Scope) -> ImpetusError | None:
        key = await self._stored_key(scope)
        if key is None:
            return AuthenticationError(
                "The API key is missing, wrong, expired or revoked; send it as "
                "`Authorization: Bearer KEY`."
                if access is Access.INFERENCE
                else "This needs an API key with the scope it requires, or the management token "
                "that scripts/serve prints; send one as `Authorization: Bearer …`."
            )
        accepted = _ACCEPTED[access]
        if not key.scopes & accepted:
            return PermissionDenied(
                f"The API key {key.name!r} has the scopes {_listed(key.scopes)}, but this needs "
                f"{_listed(accepted, ' or ')}; create another with scripts/keys."
            )
        scope[_CALLER], scope[_ALLOWED] = key.id, key.scopes
        return None

    async def _stored_key(self, scope: Scope) -> ApiKey | None:
        if self._credentials is None:
            return None
        for text in _key_values(scope)[:_MAX_KEYS_GIVEN]:
            key = self._credentials.known_key(text) or await self._credentials.verify_key(text)
            if key is not None:
                return key
        return None


def _listed(scopes: Iterable[str], separator: str = ", ") -> str:
    return separator.join(sorted(scopes))


def _key_values(scope: Scope) -> list[bytes]:
    return [*header_values(scope, b"x-api-key"), *_bearer_values(scope)]


def _bearer_values(scope: Scope) -> list[bytes]:
    pairs = (value.partition(b" ") for value in header_values(scope, b"authorization"))
    return [value.strip() for scheme, _, value in pairs if scheme.lower() == b"bearer"]


def _matches(given: list[bytes], expected: bytes) -> bool:
    """Compare in constant time; digests also hide the length."""
    return any(hmac.compare_digest(_digest(value), expected) for value in given)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
