"""What a client's configuration must name: the server's address and key, and a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from router.clients.problems import ConnectError

# The variable that clients and scripts read the server's key from.
KEY_VARIABLE = "IMPETUS_API_KEY"
NO_KEY = "none"
_EXAMPLE = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Target:
    """The server's address and key: `base_url` ends in `/v1`; `key` is empty if none is needed."""

    base_url: str
    key: str = field(default="", repr=False)

    @property
    def root(self) -> str:
        """The address without `/v1`, which Anthropic's clients expect."""
        return self.base_url.removesuffix("/v1")

    @property
    def shown_key(self) -> str:
        """The key, or a placeholder for clients that require one."""
        return self.key or NO_KEY

    @property
    def headers(self) -> Mapping[str, str]:
        """The authorization header that OpenAI's clients send."""
        return {"Authorization": f"Bearer {self.shown_key}"}


@dataclass(frozen=True, slots=True)
class Model:
    """The properties of a model that a client's configuration needs."""

    id: str
    context_tokens: int
    capabilities: frozenset[str]
    level: str = "ok"
    reasons: tuple[str, ...] = ()

    @property
    def chats(self) -> bool:
        """Whether the model can chat."""
        return "chat" in self.capabilities


def normal_url(text: str) -> str:
    """Return the base URL ending in `/v1`.  Raises ConnectError unless it is an HTTP address."""
    return f"{normal_root(text)}/v1"


def normal_root(text: str) -> str:
    """Return a URL without `/v1` at its end.  Raises ConnectError unless it is one of HTTP."""
    try:
        url = httpx.URL(text)
        if url.scheme in ("http", "https") and url.host:
            return text.rstrip("/").removesuffix("/v1").rstrip("/")
        reason = ""
    except httpx.InvalidURL as problem:
        reason = f" ({problem})"
    raise ConnectError(f"{text!r} is not a valid address{reason}; use one like {_EXAMPLE}.")
