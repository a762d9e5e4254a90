"""What was decided and why: a bounded log in each process that decides."""

import logging
import time
from collections import deque

from deployments.messages import Decision

logger = logging.getLogger(__name__)

KEPT_DECISIONS = 256


class DecisionLog:
    """The last 256 decisions of this process; whoever decides something notes it here."""

    def __init__(self, kept: int = KEPT_DECISIONS) -> None:
        self._decisions: deque[Decision] = deque(maxlen=kept)

    def record(self, event: str, action: str, reason: str) -> None:
        """Keep and log one decision: what happened, what is done about it, and why."""
        self._decisions.append(Decision(time.time(), event, action, reason))
        logger.info("%s: %s", action, reason)

    def last(self) -> list[Decision]:
        """Return the decisions, the oldest first."""
        return list(self._decisions)
