"""Token mask of an answer: combines its grammar, tool-call grammars and a reasoning budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.answer.reasoning import ReasoningTags
from backends.grammar.constraint import BareCallGrammar, RestartableMask
from backends.stepper import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningPlan:
    """How reasoning is delimited; `is_open` if the prompt already opened it.

    After `budget` reasoning tokens the closing tag is forced; None means no limit.
    """

    tags: ReasoningTags
    is_open: bool
    budget: int | None = None


class _ReasoningTracker:
    """Tracks whether an answer is before, in or after its reasoning."""

    def __init__(self, plan: ReasoningPlan, forced: Sequence[int]) -> None:
        self._open, self._close = plan.tags.open.encode(), plan.tags.close.encode()
        self._budget = plan.budget
        self._forced = list(forced)
        self._forced_count = len(self._forced)
        self._before: list[bytes] = []
        self._text = b""
        self._count = 0
        self._is_inside = plan.is_open
        self.is_over = False

    def accept(self, data: bytes) -> bytes:
        """Process a token's bytes; return those after the reasoning."""
        if not self._is_inside:
            return self._begin(data)
        self._count += 1
        self._text = (self._text + data)[-len(self._close) - len(data) :]
        _, found, rest = self._text.partition(self._close)
        # A forced end is complete at its last token; it may contain more than the closing tag.
        is_forced = len(self._forced) < self._forced_count
        self.is_over = not self._forced if is_forced else bool(found)
        return rest if self.is_over else b""

    def _begin(self, data: bytes) -> bytes:
        self._text += data
        text = self._text.lstrip()
        self._before.append(self._text[: len(self._text) - len(text)])
        self._text = text
        if text.startswith(self._open):
            self._is_inside = True
            self._text = text[len(self._open) :]
        elif not self._open.startswith(text):
            self.is_over = True
            return b"".join(self._before) + text
        return b""

    @property
    def forced(self) -> list[int]:
        """The tokens that must come next once the budget is used up."""
        is_due = self._budget is not None and self._is_inside and self._count >= self._budget
        return self._forced if is_due and not self.is_over else []

    def advance_forced(self, token_id: int) -> None:
        """Advance the forced end if `token_id` is its next token."""
        if self.forced and self._forced[0] == token_id:
            self._forced.pop(0)


class AnswerMask:
    """Combines a grammar of the whole answer, tool-call grammars and a reasoning budget.

    Implements `backends.grammar.constraint.TokenMask`.  `triggered` are grammars that apply after
    a text: nothing is masked before that text or after the grammar is satisfied.  If the rest of
    the token that completes the text violates the grammar, that call is unconstrained.
    `bare_call` applies if the answer starts as a call without such a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        whole: RestartableMask | None = None,
        triggered: Sequence[tuple[str, RestartableMask]] = (),
        bare_call: tuple[BareCallGrammar, RestartableMask] | None = None,
        reasoning: ReasoningPlan | None = None,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._whole = whole
        self._triggered = [(text.encode(), mask) for text, mask in triggered]
        self._longest = max((len(text) for text, _ in self._triggered), default=0)
        self._bare_call = bare_call
        self._head = b""
        self._reasoning: _ReasoningTracker | None = None
        if reasoning is not None:
            end = reasoning.tags.forced or reasoning.tags.close
            forced = tokenizer.encode(end, add_bos=False, parse_special=True)
            self._reasoning = _ReasoningTracker(reasoning, forced)
        self._current: RestartableMask | None = None
        self._tail = b""

    @property
    def is_active(self) -> bool:
        """Whether `apply` would change anything now."""
        if self._whole is not None or self._current is not None:
            return True
        return bool(self._reasoning is not None and self._reasoning.forced)

    @property
    def problem(self) -> str:
        """Why the answer's grammar could not be enforced; empty if it was."""
        return self._whole.problem if self._whole is not None else ""

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of disallowed tokens to -inf, in place."""
        forced = self._reasoning.forced if self._reasoning is not None else []
        if forced:
            logits[: forced[0]] = -np.inf
            logits[forced[0] + 1 :] = -np.inf
        elif self._whole is not None:
            self._whole.apply(logits)
        elif self._current is not None:
            self._current.apply(logits)

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""
        if self._whole is not None:
            self._whole.accept(token_id)
        data = self._token_bytes(token_id)
        if self._reasoning is not None and not self._reasoning.is_over:
            self._reasoning.advance_forced(token_id)
            data = self._reasoning.accept(data)
            if not self._reasoning.is_over:
                return
        if self._current is not None:
            self._current.accept(token_id)
            if self._current.is_finished:
                self._current, self._tail = None, b""
            return
        if self._bare_call is not None:
            self._match_bare_call(*self._bare_call, data)
        if self._triggered and self._current is None:
            self._match_trigger(data)

    def _match_bare_call(
        self, grammar: BareCallGrammar, mask: RestartableMask, data: bytes
    ) -> None:
        self._head += data
        found = grammar.pattern.match(self._head)
        if found is not None and found.lastindex is not None:
            call = self._head[found.start(found.lastindex) :]
            self._current = mask if mask.restart(call) else None
        if found is not None or len(self._head) > grammar.max_bytes:
            self._bare_call = None

    def _match_trigger(self, data: bytes) -> None:
        self._tail += data
        for text, mask in self._triggered:
            _, found, rest = self._tail.partition(text)
            if found:
                self._current = mask if mask.restart(rest) else None
                self._bare_call, self._tail = None, b""
                return
        self._tail = self._tail[-self._longest :]
