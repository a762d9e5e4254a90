"""Continuous batching over any runtime that computes rows of tokens: a `Stepper`."""

import time
from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backends.base import EngineLoad, EngineOptions, SequenceSpec, StepOutput
from backends.prefill import PrefillPlanner
from backends.prefix_cache import common_prefix, longest_prefix, token_array
from backends.prefix_store import SMALLEST_PREFIX
from backends.row_model import Pieces, RowInput, RowModel
from backends.sampling import RowSampler
from core.errors import EngineFailed


@dataclass(slots=True, eq=False)
class _Row:
    """One sequence: `tokens` is the prompt and all chosen tokens, `past` of them are computed."""

    spec: SequenceSpec
    tokens: "array[int]"
    sampler: RowSampler
    row: int = -1
    past: int = 0
    cached: int = 0
    is_counted: bool = False
    leader: "_Row | None" = None
    shared: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.past

    @property
    def capacity(self) -> int:
        return len(self.spec.prompt) + self.spec.max_tokens


@dataclass(slots=True, eq=False)
class _Kept:
    """A finished sequence whose row stays until somebody needs the room."""

    row: int
    tokens: "array[int]"
    used_at_step: int


@dataclass(slots=True)
class _Rows:
    """`is_crowded` from a preemption until a running row ends: nobody new is admitted."""

    waiting: list[_Row] = field(default_factory=list)
    running: list[_Row] = field(default_factory=list)
    kept: list[_Kept] = field(default_factory=list)
    by_id: dict[int, _Row] = field(default_factory=dict)
    is_crowded: bool = False

    @property
    def open_count(self) -> int:
        return len(self.running) + len(self.kept)


class RowStepper:
    """Runs up to `max_sequences` rows; each step appends to all that are ready in one call.

    Every step decodes one token of each running row and a bounded chunk of waiting prompts.
    A new row gets the longest computed prefix of any running or finished row.  When the tokens
    of all rows exceed `options.kv_tokens`, finished rows go first, then the youngest running row
    gives its cache back and is computed again later: it waits, nothing fails.
    """

    def __init__(self, model: RowModel, pieces: Pieces, options: EngineOptions) -> None:
        """Take the model over; `options` must have its context and KV tokens decided."""
        assert options.kv_tokens is not None
        self._model = model
        self._pieces = pieces
        self._kv_tokens = options.kv_tokens
        self.max_sequences = min(options.max_sequences, model.max_rows)
        self._planner = PrefillPlanner(options.prefill_chunk_tokens)
        self._rows = _Rows()
        self._steps = 0
        self._preemptions = 0

    def add(self, spec: SequenceSpec) -> None:
        """Accept a sequence; it starts as soon as there is room.  Raises RequestError."""
        sampler = RowSampler(
            spec, self._model.vocabulary_size, lambda token: self._pieces.piece(token, special=True)
        )
        row = _Row(spec, token_array(spec.prompt), sampler)
        self._rows.by_id[spec.id] = row
        self._rows.waiting.append(row)

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; what it computed stays as a prefix for later ones.  Idempotent."""
        row = self._rows.by_id.pop(sequence_id, None)
        if row is None:
            return
        if row.row < 0:
            self._rows.waiting.remove(row)
            return
        self._rows.running.remove(row)
        self._rows.is_crowded = False
        if row.past >= SMALLEST_PREFIX:
            self._rows.kept.append(_Kept(row.row, row.tokens[: row.past], self._steps))
        else:
            self._model.close_row(row.row)
        row.row = -1

    def step(self) -> list[StepOutput]:
        """Do one forward pass.  Raises EngineFailed when the runtime fails."""
        self._admit()
        chunks = self._chunks()
        while self._used_after(chunks) > self._kv_tokens:
            self._make_room()
            chunks = self._chunks()
        if not chunks:
            return []
        inputs = [RowInput(row.row, row.tokens[row.past : row.past + n]) for row, n in chunks]
        started = time.monotonic()
        logits = self._model.extend(inputs)
        self._steps += 1
        outputs = [self._collect(row, n, logits[i]) for i, (row, n) in enumerate(chunks)]
        self._planner.observe(sum(n for _, n in chunks), time.monotonic() - started)
        return outputs

    def _used_after(self, chunks: list[tuple[_Row, int]]) -> int:
        return self._used() + sum(count for _, count in chunks)

    def _used(self) -> int:
        rows = self._rows
        return sum(row.past for row in rows.running) + sum(len(kept.tokens) for kept in rows.kept)

    def _admit(self) -> None:
        rows = self._rows
        if rows.is_crowded and rows.running:
            return
        while rows.waiting and len(rows.running) < self.max_sequences:
            row = rows.waiting.pop(0)
            self._place(row)
            rows.running.append(row)

    def _place(self, row: _Row) -> None:
        """Give `row` a row of the model that holds the longest known prefix.

        1. A finished row, all of it shared, or none may stay beside it: take it over.
        2. A finished or running row: copy the shared part.
        3. Nothing to share: an empty row.
        """
        limit = len(row.tokens) - 1
        kept, length = longest_prefix(self._rows.kept, row.tokens[:limit], 1 << 30)
        leader, computed, potential = self._best_leader(row, limit)
        if length < SMALLEST_PREFIX:
            kept, length = None, 0
        if kept is not None and length >= computed:
            is_whole = length == len(kept.tokens)
            if is_whole or not self._copy(row, kept.row, length):
                self._take_over(row, kept, length)  # (1)
            else:
                kept.used_at_step = self._steps
        elif leader is not None and computed >= SMALLEST_PREFIX:
            self._copy(row, leader.row, computed)  # (2)
        if row.row < 0:
            self._free_a_row()
            row.row, row.past = self._model.open_row(row.capacity), 0  # (3)
        if leader is not None and potential - row.past >= SMALLEST_PREFIX:
            row.leader, row.shared = leader, potential
        if not row.is_counted:
            row.cached = row.past

    def _best_leader(self, row: _Row, limit: int) -> tuple[_Row | None, int, int]:
        """Return the running row that shares most, what of it is computed and what will be."""
        best: tuple[_Row | None, int, int] = (None, 0, 0)
        for other in self._rows.running:
            potential = min(common_prefix(other.tokens, row.tokens), limit)
            if potential > best[2]:
                best = (other, min(potential, other.past), potential)
        return best

    def _take_over(self, row: _Row, kept: _Kept, length: int) -> None:
        self._rows.kept.remove(kept)
        if length == len(kept.tokens) or self._model.truncate(kept.row, length):
            row.row, row.past = kept.row, length
        else:
            self._model.close_row(kept.row)

    def _copy(self, row: _Row, source: int, length: int) -> bool:
        if self._rows.open_count >= self._model.max_rows:
            spare = [kept for kept in self._rows.kept if kept.row != source]
            if not spare:
                return False
            self._drop(min(spare, key=lambda kept: kept.used_at_step))
        if self._used() + length > self._kv_tokens:
            return False
        copied = self._model.copy_row(source, length, row.capacity)
        if copied is None:
            return False
        row.row, row.past = copied, length
        return True

    def _free_a_row(self) -> None:
        while self._rows.kept and self._rows.open_count >= self._model.max_rows:
            self._drop(min(self._rows.kept, key=lambda kept: kept.used_at_step))

    def _drop(self, kept: _Kept) -> None:
        self._rows.kept.remove(kept)
        self._model.close_row(kept.row)

    def _follow(self, row: _Row) -> bool:
        """Return whether `row` still waits for its leader; copy the shared prefix when ready."""
        leader = row.leader
        if leader is None:
            return False
        if leader.row >= 0 and leader.pending > 1 and leader.past < row.shared:
            return True
        row.leader = None
        ready = min(leader.past, row.shared) if leader.row >= 0 else 0
        if ready - row.past < SMALLEST_PREFIX:
            return False
        before, known = row.row, row.past
        # The row it has is given back only once the copy stands.
        if self._copy(row, leader.row, ready):
            self._model.close_row(before)
        else:
            row.row, row.past = before, known
        if not row.is_counted:
            row.cached = row.past
        return False

    def _chunks(self) -> list[tuple[_Row, int]]:
        """Return how many tokens each row gets in this step, decoding rows first."""
        decoding = [row for row in self._rows.running if row.pending == 1]
        waiting = [row for row in self._rows.running if row.pending > 1]
        prefilling = [row for row in waiting if not self._follow(row)]
        counts = self._planner.plan([row.pending for row in prefilling], len(decoding))
        chunks = [(row, 1) for row in decoding]
        return chunks + [(row, n) for row, n in zip(prefilling, counts, strict=True) if n]

    def _make_room(self) -> None:
        """Free cached tokens: the least recently used finished row, else the youngest running."""
        rows = self._rows
        if rows.kept:
            self._drop(min(rows.kept, key=lambda kept: kept.used_at_step))
            return
        if len(rows.running) < 2:
            raise EngineFailed(
                f"One sequence does not fit the KV cache of {self._kv_tokens} tokens."
            )
        row = rows.running.pop()
        self._model.close_row(row.row)
        row.row, row.past, row.leader = -1, 0, None
        rows.waiting.insert(0, row)
        rows.is_crowded = True
        self._preemptions += 1

    def _collect(self, row: _Row, count: int, logits: NDArray[np.float32]) -> StepOutput:
        row.past += count
        if row.pending:
            return StepOutput(row.spec.id, None, prefilled=row.past, cached=row.cached)
        token_id, logprob = row.sampler.sample(logits)
        row.tokens.append(token_id)
        row.is_counted = True
        return StepOutput(
            row.spec.id,
            token_id,
            is_end=self._pieces.is_end(token_id),
            logprob=logprob,
            prefilled=len(row.spec.prompt),
            cached=row.cached,
        )

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        """Bound the prompt tokens of a step; see `backends.limits.PrefillLimited`."""
        self._planner.limit(chunk_tokens)

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts."""
        return EngineLoad(
            kv_used_tokens=min(self._used(), self._kv_tokens),
            kv_tokens=self._kv_tokens,
            steps=self._steps,
            preemptions=self._preemptions,
            native_cpu_s=self._model.native_cpu_s,
        )

    def close(self) -> None:
        """Free everything; twice is fine."""
        self._model.close()
