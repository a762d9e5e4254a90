"""What bounds an answer beside its one grammar: calls once they began, and a reasoning budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.answer.reasoning import ReasoningTags
from backends.grammar.constraint import GrammarPlace, OpeningCall
from backends.stepper import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningPlan:
    """How an answer's reasoning is told apart; `is_open` where the prompt has begun it.

    After `budget` tokens of reasoning its end is forced; None leaves it free.
    """

    tags: ReasoningTags
    is_open: bool
    budget: int | None = None


class _Reasoning:
    """Where an answer stands: before, in or after its reasoning."""

    def __init__(self, plan: ReasoningPlan, forced: Sequence[int]) -> None:
        self._open, self._close = plan.tags.open.encode(), plan.tags.close.encode()
        self._budget = plan.budget
        self._forced = list(forced)
        self._forced_count = len(self._forced)
        self._text = b""
        self._count = 0
        self._is_inside = plan.is_open
        self.is_over = False

    def accept(self, data: bytes) -> bytes:
        """Take a token's bytes; return those that are after the reasoning."""
        if not self._is_inside:
            return self._begin(data)
        self._count += 1
        self._text = (self._text + data)[-len(self._close) - len(data) :]
        _, found, rest = self._text.partition(self._close)
        # A forced end is over with its last token, though it may hold more than the closing tag.
        is_forced = len(self._forced) < self._forced_count
        self.is_over = not self._forced if is_forced else bool(found)
        return rest if self.is_over else b""

    def _begin(self, data: bytes) -> bytes:
        self._text += data
        text = self._text.lstrip()
        if text.startswith(self._open):
            self._is_inside = True
            self._text = text[len(self._open) :]
        elif not self._open.startswith(text):
            self.is_over = True
            return self._text
        return b""

    @property
    def forced(self) -> list[int]:
        """The tokens that must come now, if the budget is used up."""
        is_due = self._budget is not None and self._is_inside and self._count >= self._budget
        return self._forced if is_due and not self.is_over else []

    def note(self, token_id: int) -> None:
        """Count a token of the forced end."""
        if self.forced and self._forced[0] == token_id:
            self._forced.pop(0)


class AnswerMask:
    """Combines a grammar of the whole answer, grammars of begun calls, and a reasoning budget.

    Implements `backends.base.TokenMask`.  `triggered` are the grammars of what follows a text:
    nothing is masked before it is there, nor after the grammar is satisfied.  Text that a token
    brings beside the trigger and that the grammar refuses leaves that call free.  `opening` is the
    grammar of an answer that begins as a call without such a text, and what tells that it does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        whole: GrammarPlace | None = None,
        triggered: Sequence[tuple[str, GrammarPlace]] = (),
        opening: tuple[OpeningCall, GrammarPlace] | None = None,
        reasoning: ReasoningPlan | None = None,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._whole = whole
        self._triggered = [(text.encode(), place) for text, place in triggered]
        self._longest = max((len(text) for text, _ in self._triggered), default=0)
        self._opening = opening
        self._head = b""
        self._reasoning: _Reasoning | None = None
        if reasoning is not None:
            end = reasoning.tags.forced or reasoning.tags.close
            forced = tokenizer.encode(end, add_bos=False, parse_special=True)
            self._reasoning = _Reasoning(reasoning, forced)
        self._current: GrammarPlace | None = None
        self._tail = b""

    @property
    def is_active(self) -> bool:
        """Whether `apply` would change anything now."""
        if self._whole is not None or self._current is not None:
            return True
        return bool(self._reasoning is not None and self._reasoning.forced)

    @property
    def problem(self) -> str:
        """Why the whole answer is not bounded as it was to be; empty while it is."""
        return self._whole.problem if self._whole is not None else ""

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of the tokens that may not come next to -inf, in place."""
        forced = self._reasoning.forced if self._reasoning is not None else []
        if forced:
            logits[: forced[0]] = -np.inf
            logits[forced[0] + 1 :] = -np.inf
        elif self._whole is not None:
            self._whole.apply(logits)
        elif self._current is not None:
            self._current.apply(logits)

    def accept(self, token_id: int) -> None:
        """Move on past the chosen token."""
        if self._whole is not None:
            self._whole.accept(token_id)
        data = self._token_bytes(token_id)
        if self._reasoning is not None and not self._reasoning.is_over:
            self._reasoning.note(token_id)
            data = self._reasoning.accept(data)
            if not self._reasoning.is_over:
                return
        if self._current is not None:
            self._current.accept(token_id)
            if self._current.is_finished:
                self._current, self._tail = None, b""
            return
        if self._opening is not None:
            self._watch_opening(*self._opening, data)
        if self._triggered and self._current is None:
            self._watch(data)

    def _watch_opening(self, opening: OpeningCall, place: GrammarPlace, data: bytes) -> None:
        self._head += data
        found = opening.begin.match(self._head)
        if found is not None and found.lastindex is not None:
            begun = self._head[found.start(found.lastindex) :]
            self._current = place if place.restart(begun) else None
        if found is not None or len(self._head) > opening.longest:
            self._opening = None

    def _watch(self, data: bytes) -> None:
        self._tail += data
        for text, place in self._triggered:
            _, found, rest = self._tail.partition(text)
            if found:
                self._current = place if place.restart(rest) else None
                self._opening, self._tail = None, b""
                return
        self._tail = self._tail[-self._longest :]
