"""Bounded in-memory log of decisions and their reasons, one per process."""

import logging
import time
from collections import deque
from collections.abc import Callable

from deployments.messages import Decision

logger = logging.getLogger(__name__)

KEPT_DECISIONS = 256


class DecisionLog:
    """The last 256 decisions of this process, numbered without gaps.

    `on_record` is called with each new decision.
    """

    def __init__(
        self,
        kept: int = KEPT_DECISIONS,
        on_record: Callable[[Decision], None] = lambda _: None,
    ) -> None:
        self._decisions: deque[Decision] = deque(maxlen=kept)
        self.on_record = on_record
        # Based on the time, so that a restarted process repeats no number.
        self.last_number = time.time_ns()

    def record(self, event: str, action: str, reason: str) -> None:
        """Record and log one decision: the event, the action and the reason."""
        decision = Decision(time.time(), event, action, reason)
        self._decisions.append(decision)
        self.last_number += 1
        logger.info("%s: %s", action, reason)
        self.on_record(decision)

    def last(self) -> list[Decision]:
        """Return the decisions, oldest first."""
        return list(self._decisions)

    def since(self, number: int) -> list[Decision]:
        """Return the decisions after the one with this number, oldest first; of a gap the rest."""
        decisions = self.last()
        return decisions[max(len(decisions) - (self.last_number - number), 0) :]
