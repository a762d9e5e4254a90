"""Bounded in-memory log of decisions and their reasons, one per process."""

import logging
import time
from collections import deque

from deployments.messages import Decision

logger = logging.getLogger(__name__)

KEPT_DECISIONS = 256


class DecisionLog:
    """The last 256 decisions of this process."""

    def __init__(self, kept: int = KEPT_DECISIONS) -> None:
        self._decisions: deque[Decision] = deque(maxlen=kept)

    def record(self, event: str, action: str, reason: str) -> None:
        """Record and log one decision: the event, the action and the reason."""
        self._decisions.append(Decision(time.time(), event, action, reason))
        logger.info("%s: %s", action, reason)

    def last(self) -> list[Decision]:
        """Return the decisions, oldest first."""
        return list(self._decisions)
