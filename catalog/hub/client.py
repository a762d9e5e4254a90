"""Asks the Hugging Face Hub, with limits on time and size, and tells its failures apart.

The connection, `HF_ENDPOINT`, `HF_TOKEN` and offline mode are those of huggingface_hub.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session

from catalog.hub.problems import failure, is_stale_token, refusal
from catalog.hub.public_address import Resolve, is_public, resolve
from core.errors import HubAnswerInvalid, HubTooSlow
from core.units import MIB, format_bytes

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LIBRARY = "impetus"

Parameters: TypeAlias = Mapping[str, str | int | bool | Sequence[str]]


@dataclass(frozen=True, slots=True)
class HubLimits:
    """Limits of one answer: seconds to connect, without a byte, and in all; bytes of its body."""

    connect_s: float = 5.0
    silence_s: float = 10.0
    total_s: float = 30.0
    answer_bytes: int = 16 * MIB


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """A JSON answer; `cursor` names the next page, empty on the last one."""

    value: Any
    cursor: str = ""


class HubClient:
    """Reads from one hub; usable from several threads.  All methods block."""

    def __init__(
        self,
        endpoint: str = "",
        token: str | None = None,
        limits: HubLimits | None = None,
        look_up: Resolve = resolve,
    ) -> None:
        """Use the hub at `endpoint`, by default that of `HF_ENDPOINT`.

        `token` None means the user's own (`HF_TOKEN`, or the file of `hf auth login`), empty none.
        It is sent to the hub's own origin only.
        """
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.limits = limits or HubLimits()
        self._look_up = look_up
        self._token = (get_token() or "") if token is None else token

    @property
    def host(self) -> str:
        """The hub's host name and port, without credentials, for messages."""
        return urlsplit(self.endpoint).netloc.rpartition("@")[2] or self.endpoint

    def get_json(self, path: str, what: str, parameters: Parameters | None = None) -> JsonAnswer:
        """Return the answer of a route below `/api/`, to which `what` refers in messages.

        `path` is quoted already.
        A token that the hub does not know is left out at a second try.  Raises the errors `Hub…`.
        """
        with self.opened(f"{self.endpoint}{path}", what, parameters=parameters) as response:
            body = self.read(response, self.limits.answer_bytes)
            following = response.links.get("next", {}).get("url", "")
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise HubAnswerInvalid(
                f"{self.host} did not answer as the Hugging Face Hub does. If this network has a "
                "sign-in page, open it in a browser; else check HF_ENDPOINT and the proxy."
            ) from None
        return JsonAnswer(value, _cursor(following))

    def file_address(self, repository: str, revision: str, path: str) -> str:
        """Return the address of a file's content."""
        return f"{self.endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"

    @contextmanager
    def opened(
        self,
        address: str,
        what: str,
        headers: Mapping[str, str] | None = None,
        parameters: Parameters | None = None,
    ) -> Iterator[httpx2.Response]:
        """Open a GET request and yield its response, whose body is to be read.

        Follows up to five redirects, none from https to http.  Raises the errors `Hub…`, also for
        what happens to the connection while the body is read.  `what` is asked for, in messages.
        """
        try:
            with ExitStack() as stack:
                response = self._follow(stack, address, headers or {}, parameters, self._token)
                if self._token and is_stale_token(response.status_code, response.headers):
                    logger.warning("%s does not know the token in use; trying without", self.host)
                    without = self._follow(stack, address, headers or {}, parameters, "")
                    response = without if without.is_success else response
                if not response.is_success:
                    raise refusal(response.status_code, response.headers, self.host, what)
                yield response
        except (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled) as problem:
            raise failure(problem, self.host) from problem

    def _follow(
        self,
        stack: ExitStack,
        address: str,
        headers: Mapping[str, str],
        parameters: Parameters | None,
        token: str,
    ) -> httpx2.Response:
        """Return the first response that is not a redirect; `stack` closes them all."""
        timeout = httpx2.Timeout(self.limits.silence_s, connect=self.limits.connect_s)
        home = _origin(address)
        for _ in range(MAX_REDIRECTS + 1):
            own = build_hf_headers(
                token=(token or False) if _origin(address) == home else False,
                library_name=_LIBRARY,
            )
            response: httpx2.Response = stack.enter_context(
                get_session().stream(
                    "GET",
                    address,
                    headers={**own, "accept-encoding": "identity", **headers},
                    params=parameters,
                    timeout=timeout,
                    follow_redirects=False,
                )
            )
            if response.status_code not in REDIRECTS:
                return response
            address, parameters = self._target(address, response), None
        raise HubAnswerInvalid(f"{self.host} redirected more than {MAX_REDIRECTS} times.")

    def _target(self, address: str, response: httpx2.Response) -> str:
        """Return where a redirect leads.  Raises HubAnswerInvalid if it must not be followed.

        A hub of the internet may not lead into this network; one inside of it may.
        """
        try:
            target = urljoin(address, response.headers.get("location", ""))
        except ValueError:
            target = ""
        scheme, host, _ = _origin(target)
        is_downgrade = scheme == "http" and _origin(address)[0] == "https"
        if scheme not in ("http", "https") or not host or is_downgrade:
            raise HubAnswerInvalid(
                f"{self.host} redirected to an address that is not followed ({scheme or 'no'} "
                "scheme)."
            )
        own = _origin(self.endpoint)[1]
        if host != own and self._is_private(host) and not self._is_private(own):
            raise HubAnswerInvalid(
                f"{self.host} redirected to this machine or a private network, which is not "
                "followed."
            )
        return target

    def _is_private(self, host: str) -> bool:
        """Whether a host is in this network; not where only a proxy can resolve its name."""
        try:
            found = self._look_up(host, 0)
        except (OSError, UnicodeError):
            return False
        return not all(map(is_public, found))

    def read(self, response: httpx2.Response, limit: int, *, is_cut: bool = False) -> bytes:
        """Return the body; with `is_cut` its first `limit` bytes.  Raises `Hub…` errors."""
        deadline = time.monotonic() + self.limits.total_s
        body = bytearray()
        # As it arrives: pieces of a given size would be waited for, however slow they come.
        for piece in response.iter_raw():
            body += piece
            if len(body) > limit and not is_cut:
                raise HubAnswerInvalid(
                    f"{self.host} answered more than {format_bytes(limit)}, the limit."
                )
            if len(body) >= limit and is_cut:
                return bytes(body[:limit])
            if time.monotonic() > deadline:
                raise HubTooSlow(
                    f"{self.host} sent {format_bytes(len(body))} in {self.limits.total_s:g} s and "
                    "was not finished; try again later."
                )
        return bytes(body)


def _origin(address: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port; empty for what is not an address."""
    try:
        parts = urlsplit(address)
        return parts.scheme, (parts.hostname or "").lower(), parts.port
    except ValueError:
        return "", "", None


def _cursor(following: str) -> str:
    """Return the cursor in the address of the next page."""
    return next(iter(parse_qs(urlsplit(following).query).get("cursor", ())), "")
