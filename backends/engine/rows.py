"""The rows of a stepper: one sequence's tokens, computed length, slot and prefix restore."""

import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from backends.engine.failures import RuntimeLost, request_error
from backends.engine.prefill import PrefillPlanner
from backends.engine.prompt_scores import PromptScores
from backends.engine.sampling import RowSampler
from backends.prefixes.pieces import PieceRule
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.reuse import Reuse
from backends.prefixes.store import State
from backends.prefixes.transfer import Applied, PrefixTransfer, Restore
from backends.stepper import SequenceSpec, StepOutput
from core.types import TokenLogprob

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Row:
    """One sequence: `tokens` are the prompt and all sampled tokens, `past` of them are computed.

    `slot` names its KV cache in the runtime, -1 while it waits.  While `incoming` restores
    a part of its prompt, nothing is computed for it.  It may also wait until `leader` has
    computed the first `shared` tokens of both.  `reuse` is final once a token was sampled.
    `scores` are the log-probabilities of its prompt, if it asks for them.
    """

    spec: SequenceSpec
    tokens: "array[int]"
    past: int = field(default=0, kw_only=True)
    slot: int = field(default=-1, kw_only=True)
    reuse: Reuse = field(default_factory=Reuse, kw_only=True)
    is_reuse_final: bool = field(default=False, kw_only=True)
    incoming: Restore | None = field(default=None, kw_only=True)
    leader: "Row | None" = field(default=None, kw_only=True)
    shared: int = field(default=0, kw_only=True)
    scores: PromptScores | None = field(default=None, kw_only=True)

    @property
    def needs_scores(self) -> bool:
        """Whether its next tokens are computed with the logits of each, and nothing is reused."""
        return self.scores is not None and not self.scores.is_complete

    @property
    def reusable(self) -> int:
        """Prompt tokens that are computed in the pieces of a step: not those that are scored."""
        return len(self.spec.prompt) if self.scores is None else 0

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.tokens) - self.past

    @property
    def capacity(self) -> int:
        """Tokens that it has at most when it ends."""
        return len(self.spec.prompt) + self.spec.max_tokens

    def release_slot(self) -> int:
        """Return the slot, which the row no longer has; the caller frees or keeps its cache."""
        slot, self.slot = self.slot, -1
        return slot

    def receive(self, load: Callable[[Self, State], Applied]) -> bool:
        """Hand restored blocks to `load`, which adds them to the row's cache.

        Return whether more of them are to come.
        """
        if self.incoming is None:
            return False
        reuse = Reuse() if self.is_reuse_final else self.reuse
        self.incoming.receive(reuse, lambda state: load(self, state))
        if self.incoming.is_over:
            self.incoming = None
        return self.incoming is not None

    def stop_restoring(self) -> None:
        """Cancel the restore, if there is one."""
        if self.incoming is not None:
            self.incoming.cancel()
            self.incoming = None

    def wait_for(self, leader: "Row", shared: int) -> None:
        """Wait for the shared prefix of a running row, unless that saves too few tokens."""
        if shared - self.past >= SMALLEST_PREFIX:
            self.leader, self.shared = leader, shared

    def follow(self, share: Callable[[Self, int, int], None], *, least_pending: int = 1) -> bool:
        """Return whether the row still waits for its leader.

        A leader with less than `least_pending` tokens to compute is not waited for.  When the
        wait ends, `share(row, slot, count)` may take the first `count` tokens of the leader's
        slot; it is not called when the leader has lost its cache.
        """
        leader = self.leader
        if leader is None:
            return False
        has_cache = leader.slot >= 0
        if has_cache and leader.pending >= least_pending and leader.past < self.shared:
            return True
        self.leader = None
        if has_cache:
            share(self, leader.slot, min(leader.past, self.shared))
        return False

    def progress(self) -> StepOutput:
        """Return how much of its prompt is computed.  Raises NonFiniteOutput."""
        return StepOutput(
            self.spec.id,
            None,
            prefilled=self.past,
            cached=self.reuse.total,
            reuse=self.reuse,
            prompt_logprobs=self._new_scores(),
        )

    def _new_scores(self) -> tuple[TokenLogprob, ...]:
        return () if self.scores is None else self.scores.take()

    def add_token(self, token_id: int, logprob: TokenLogprob | None, *, is_end: bool) -> StepOutput:
        """Append a sampled token and return it as a step's output.  Raises NonFiniteOutput."""
        scores = self._new_scores()
        self.tokens.append(token_id)
        self.is_reuse_final = True
        return StepOutput(
            self.spec.id,
            token_id,
            is_end=is_end,
            logprob=logprob,
            prefilled=len(self.spec.prompt),
            cached=self.reuse.total,
            reuse=self.reuse,
            prompt_logprobs=scores,
        )


@dataclass(slots=True, eq=False)
class ModelRow(Row):
    """One sequence of a `RowModel`; its slot is the model's row."""

    sampler: RowSampler


@dataclass(slots=True, eq=False)
class KeptRow:
    """A finished sequence; its slot is kept until its tokens or its slot are needed."""

    slot: int
    tokens: "array[int]"
    used_at_step: int


class BaseStepper(ABC):
    """Base of all steppers: limits prefill, copies blocks while idle, and ends rows that fail.

    `limitations` is what the trial of its model found; see `Engine`.
    """

    limitations: tuple[str, ...] = ()
    _rule = PieceRule()
    _planner: PrefillPlanner
    _transfer: PrefixTransfer[Any]

    @abstractmethod
    def _discard(self, row: Any) -> None:
        """Forget a row and free its KV cache, which is not kept for reuse."""

    def _failed(self, row: Row, problem: BaseException, activity: str) -> StepOutput:
        """Discard a row that failed; return the output that ends its request alone.

        Its cache is not kept: it may be what was wrong, such as NaN.  Raises RuntimeLost again.
        """
        if isinstance(problem, RuntimeLost):
            raise problem
        error = request_error(problem, activity, f"sequence {row.spec.id}")
        try:
            self._discard(row)
        except BaseException:
            logger.exception("the cache of a failed sequence cannot be freed")
        return StepOutput(row.spec.id, None, problem=error)

    def _copy_blocks(self) -> None:
        """Copy one block after a step, if that is due; no request depends on it."""
        try:
            self._transfer.copy_if_due()
        except Exception:
            logger.exception("a prefix block cannot be copied")

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        """Limit the prompt tokens of a step; see `backends.limits.PrefillLimited`.

        Fixed pieces are not limited: their size decides how they are rounded.
        """
        if not self._rule.is_fixed:
            self._planner.limit(chunk_tokens)

    @property
    def has_chores(self) -> bool:
        """See `backends.stepper.HasChores`."""
        return self._transfer.has_chores

    def do_chore(self) -> None:
        """Copy one block of a finished sequence to the prefix store."""
        self._transfer.do_chore()
