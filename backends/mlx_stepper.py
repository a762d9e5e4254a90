"""Continuous batching over mlx-lm: `backends.base.Stepper` for MLX."""

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from backends.base import EngineLoad, EngineOptions, SequenceSpec, StepOutput
from backends.mlx_batch import MlxBatch, RowChoice
from backends.mlx_model import MlxModel
from backends.mlx_prefixes import MlxPrefixes, cut
from backends.prefill import PrefillPlanner
from backends.prefix_cache import common_prefix, token_array
from backends.prefix_store import SMALLEST_PREFIX
from backends.row_model import Pieces
from backends.sampling import RowSampler


@dataclass(slots=True, eq=False)
class _Row:
    """One sequence: `tokens` is the prompt and all tokens handed out; `choice` None is greedy."""

    spec: SequenceSpec
    tokens: "array[int]"
    choice: RowChoice | None
    uid: int = -1
    known: int = 0
    prefilled: int = 0
    cached: int = 0
    is_decoding: bool = False
    is_counted: bool = False

    @property
    def computed(self) -> int:
        return len(self.tokens) if self.is_decoding else self.prefilled

    @property
    def left(self) -> int:
        return len(self.spec.prompt) + self.spec.max_tokens - len(self.tokens)


@dataclass(slots=True)
class _Rows:
    """`is_crowded` from a preemption until a running row ends: nobody new is admitted."""

    waiting: list[_Row] = field(default_factory=list)
    running: list[_Row] = field(default_factory=list)
    by_id: dict[int, _Row] = field(default_factory=dict)
    by_uid: dict[int, _Row] = field(default_factory=dict)
    is_crowded: bool = False


class MlxStepper:
    """Runs up to `max_sequences` rows in mlx-lm's batch, which pads all rows to the longest.

    Every step decodes one token of each running row and a bounded chunk of waiting prompts.
    A new row gets the longest computed prefix of any running or finished row.  When the padded
    rows exceed `options.kv_tokens`, the youngest gives its cache back and is computed again
    later: it waits, nothing fails.
    """

    def __init__(self, model: MlxModel, pieces: Pieces, options: EngineOptions) -> None:
        """Take the model over; `options` must have its KV tokens decided."""
        assert options.kv_tokens is not None
        self._model = model
        self._pieces = pieces
        self.max_sequences = options.max_sequences
        self._kv_tokens = options.kv_tokens
        self._batch = MlxBatch(model.model, options.max_sequences, options.prefill_chunk_tokens)
        self._prefixes = MlxPrefixes(options.prefix_bytes)
        self._planner = PrefillPlanner(options.prefill_chunk_tokens)
        self._rows = _Rows()
        self._steps = 0
        self._preemptions = 0
        self._native_cpu_s = 0.0

    def add(self, spec: SequenceSpec) -> None:
        """Accept a sequence; it starts as soon as there is room.  Raises RequestError."""
        sampler = RowSampler(
            spec, self._model.vocabulary_size, lambda token: self._pieces.piece(token, special=True)
        )
        choice = None if sampler.is_greedy else RowChoice(sampler, self._pieces.is_end)
        row = _Row(spec, token_array(spec.prompt), choice)
        self._rows.by_id[spec.id] = row
        self._rows.waiting.append(row)

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; what it computed stays as a prefix for later ones.  Idempotent."""
        row = self._rows.by_id.pop(sequence_id, None)
        if row is None:
            return
        if row.uid < 0:
            self._rows.waiting.remove(row)
            return
        if self._prefixes.is_on and row.computed >= SMALLEST_PREFIX:
            layers, tokens = self._batch.layers(row.uid)
            self._prefixes.put(token_array(tokens), layers)
        self._take_out(row)
        self._rows.is_crowded = False

    def _take_out(self, row: _Row) -> None:
        self._batch.remove(row.uid)
        self._rows.running.remove(row)
        del self._rows.by_uid[row.uid]
        row.uid, row.is_decoding = -1, False

    def step(self) -> list[StepOutput]:
        """Do one forward pass, two where a prompt is done with the first."""
        started = self._model.clock.seconds()
        outputs = self._make_room()
        self._admit()
        while self._batch.has_work:
            outputs += self._compute()
            if outputs:
                break
        self._native_cpu_s += self._model.clock.seconds() - started
        return outputs

    def _compute(self) -> list[StepOutput]:
        prefilling = [row for row in self._rows.running if not row.is_decoding]
        decoding = len(self._rows.running) - len(prefilling)
        chunk = self._planner.budget(decoding) // max(len(prefilling), 1)
        wall = time.monotonic()
        progress, tokens = self._batch.next(max(chunk, 1))
        self._steps += 1
        outputs = [self._token(self._rows.by_uid[uid], token_id) for uid, token_id in tokens]
        computed = 0
        for uid, done in progress:
            row = self._rows.by_uid[uid]
            before, row.prefilled = row.prefilled, row.known + done
            computed += row.prefilled - before
            if not row.is_counted:
                outputs.append(
                    StepOutput(row.spec.id, None, prefilled=row.prefilled, cached=row.cached)
                )
        self._planner.observe(computed, time.monotonic() - wall)
        return outputs

    def _token(self, row: _Row, token_id: int) -> StepOutput:
        row.is_decoding = row.is_counted = True
        row.tokens.append(token_id)
        return StepOutput(
            row.spec.id,
            token_id,
            is_end=self._pieces.is_end(token_id),
            logprob=row.choice.take() if row.choice else None,
            prefilled=len(row.spec.prompt),
            cached=row.cached,
        )

    def _padded(self, rows: list[_Row]) -> int:
        """Return the KV tokens that these rows take together after one more step."""
        return len(rows) * max((len(row.tokens) + 1 for row in rows), default=0)

    def _make_room(self) -> list[StepOutput]:
        """Take out the youngest rows until the others fit; return tokens they had ahead."""
        rows, outputs = self._rows, list[StepOutput]()
        while len(rows.running) > 1 and self._padded(rows.running) > self._kv_tokens:
            row = rows.running[-1]
            self._take_out(row)
            ahead = row.choice.take_waiting() if row.choice else None
            if ahead is not None:
                outputs.append(self._ahead(row, *ahead))
            rows.waiting.insert(0, row)
            rows.is_crowded = True
            self._preemptions += 1
        return outputs

    def _ahead(self, row: _Row, token_id: int, logprob: Any) -> StepOutput:
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

    def _admit(self) -> None:
        rows = self._rows
        if rows.is_crowded and rows.running:
            return
        for row in list(rows.waiting):
            if len(rows.running) >= self.max_sequences:
                return
            if rows.running and self._padded([*rows.running, row]) > self._kv_tokens:
                return
            if self._start(row):
                rows.waiting.remove(row)

    def _start(self, row: _Row) -> bool:
        """Insert a row with what is known of it; False while another computes half of the rest."""
        known, make = self._prefixes.longest(row.tokens)
        leader, shared = self._leader(row)
        if leader is not None:
            ready = min(shared, leader.computed)
            if ready < shared and 2 * shared >= len(row.tokens) + known:
                return False
            if ready >= known + SMALLEST_PREFIX:
                known, make = ready, self._shared(leader, ready)
        layers = make() if known else None
        row.uid = self._batch.insert(
            row.tokens[known:], row.left, row.choice, row.tokens[:known], layers
        )
        row.known = row.prefilled = known
        if not row.is_counted:
            row.cached = known
        self._rows.by_uid[row.uid] = row
        self._rows.running.append(row)
        return True

    def _leader(self, row: _Row) -> tuple[_Row | None, int]:
        """Return the running row whose prompt shares most, where caches can be cut."""
        best, best_length = None, SMALLEST_PREFIX - 1
        if not self._model.can_cut:
            return None, 0
        for other in self._rows.running:
            length = min(common_prefix(other.tokens, row.tokens), len(row.tokens) - 1)
            if length > best_length:
                best, best_length = other, length
        return best, best_length

    def _shared(self, leader: _Row, length: int) -> Callable[[], list[Any]]:
        def make() -> list[Any]:
            layers, tokens = self._batch.layers(leader.uid)
            return cut(layers, len(tokens), length)

        return make

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        """Bound the prompt tokens of a step; see `backends.limits.PrefillLimited`."""
        self._planner.limit(chunk_tokens)

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts."""
        return EngineLoad(
            kv_used_tokens=min(self._padded(self._rows.running), self._kv_tokens),
            kv_tokens=self._kv_tokens,
            steps=self._steps,
            preemptions=self._preemptions,
            native_cpu_s=self._native_cpu_s,
        )

    def close(self) -> None:
        """Free the caches and the weights; twice is fine."""
        self._batch.close()
        self._prefixes.clear()
        self._rows = _Rows()
        self._model.close()
