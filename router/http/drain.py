"""Graceful shutdown: the state shared by the drain endpoint and the guard that counts requests."""

from core.errors import Draining

_RETRY_AFTER_S = 10


class Drain:
    """Whether the server is stopping, and how many requests still run."""

    def __init__(self) -> None:
        self.is_on = False
        self.in_flight = 0

    @staticmethod
    def refusal() -> Draining:
        """Return the error for a request that arrives while the server is stopping."""
        return Draining(
            "The server is stopping and takes no new requests.", retry_after_s=_RETRY_AFTER_S
        )
