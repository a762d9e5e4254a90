"""Continuous batching over mlx-lm: `backends.base.Stepper` for MLX."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from backends.base import EngineLoad, EngineOptions
from backends.engine.prefill import PrefillPlanner
from backends.engine.row_model import Pieces
from backends.engine.rows import PlannedStepper
from backends.engine.sampling import RowSampler
from backends.mlx.batch import MlxBatch, RowChoice
from backends.mlx.blocks import LayerBlocks
from backends.mlx.model import MlxModel
from backends.mlx.prefixes import KeptLayers, MlxPrefixes, cut
from backends.mlx.rows import Row, Rows
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.match import common_prefix, token_array
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.store import State
from backends.prefixes.transfer import SnapshotFlow, await_first, is_worth_it
from backends.stepper import SequenceSpec, StepOutput


class MlxStepper(PlannedStepper):
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
        self._blocks = LayerBlocks(model)
        self._flow = SnapshotFlow[KeptLayers](
            options.snapshots,
            self._blocks.layout,
            lambda kept, number: self._blocks.copy(kept.layers, number),
        )
        self._planner = PrefillPlanner(options.prefill_chunk_tokens)
        self._rows = Rows()
        self._steps = 0
        self._preemptions = 0
        self._native_cpu_s = 0.0

    def add(self, spec: SequenceSpec) -> None:
        """Accept a sequence; it starts as soon as there is room.  Raises RequestError."""
        sampler = RowSampler(
            spec, self._model.vocabulary_size, lambda token: self._pieces.piece(token, special=True)
        )
        choice = None if sampler.is_greedy else RowChoice(sampler, self._pieces.is_end)
        row = Row(spec, token_array(spec.prompt), choice)
        self._rows.by_id[spec.id] = row
        self._rows.waiting.append(row)

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; what it computed stays as a prefix for later ones.  Idempotent."""
        row = self._rows.by_id.pop(sequence_id, None)
        if row is None:
            return
        if row.uid < 0:
            self._rows.waiting.remove(row)
            if row.incoming is not None:
                row.incoming.cancel()
            return
        if self._prefixes.is_on and row.computed >= SMALLEST_PREFIX:
            layers, tokens = self._batch.layers(row.uid)
            kept = self._prefixes.put(token_array(tokens), layers)
            if kept is not None:
                self._flow.keep(kept, kept.tokens)
        self._take_out(row)
        self._rows.is_crowded = False

    def _take_out(self, row: Row) -> None:
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
        if not self._batch.has_work:
            await_first([row.incoming for row in self._rows.waiting])
        self._flow.tend()
        return outputs

    def _compute(self) -> list[StepOutput]:
        prefilling = [row for row in self._rows.running if not row.is_decoding]
        decoding = len(self._rows.running) - len(prefilling)
        chunk = self._planner.budget(decoding, len(prefilling)) // max(len(prefilling), 1)
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
                outputs.append(row.progress())
        self._planner.observe(computed, time.monotonic() - wall)
        return outputs

    def _token(self, row: Row, token_id: int) -> StepOutput:
        row.is_decoding = True
        return self._ahead(row, token_id, row.choice.take() if row.choice else None)

    def _padded(self, rows: list[Row]) -> int:
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

    def _ahead(self, row: Row, token_id: int, logprob: Any) -> StepOutput:
        row.tokens.append(token_id)
        row.is_counted = True
        return StepOutput(
            row.spec.id,
            token_id,
            is_end=self._pieces.is_end(token_id),
            logprob=logprob,
            prefilled=len(row.spec.prompt),
            cached=row.reuse.total,
            reuse=row.reuse,
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

    def _start(self, row: Row) -> bool:
        """Insert a row with what is known of it; False while that is still being read or computed.

        Blocks that outlived an engine are taken where they are longer than what is in memory.
        """
        known, make = self._prefixes.longest(row.tokens)
        leader, shared = self._leader(row)
        if self._awaits_blocks(row, max(known, shared)):
            return False
        if leader is not None:
            ready = min(shared, leader.computed)
            if ready < shared and 2 * shared >= len(row.tokens) + known:
                return False
            if ready >= known + SMALLEST_PREFIX:
                known, make = ready, self._shared(leader, ready)
        is_restored = len(row.blocks) * BLOCK_TOKENS > known
        if is_restored:
            known = len(row.blocks) * BLOCK_TOKENS
            make = partial(self._blocks.join, row.blocks)
        self._note_reuse(row, known, is_restored=is_restored)
        layers = make() if known else None
        row.blocks.clear()
        row.uid = self._batch.insert(
            row.tokens[known:], row.left, row.choice, row.tokens[:known], layers
        )
        row.known = row.prefilled = known
        self._rows.by_uid[row.uid] = row
        self._rows.running.append(row)
        return True

    def _awaits_blocks(self, row: Row, others: int) -> bool:
        """Return whether blocks of the row's prompt are still to come; ask for them once."""
        if not row.was_restored:
            row.was_restored = True
            blocks = self._flow.known(row.tokens[:-1])
            if is_worth_it(blocks, others):
                row.incoming = self._flow.restore(row.tokens[:-1], blocks)
        if row.incoming is None:
            return False

        def take(state: State) -> bool:
            if self._blocks.fits(state):
                row.blocks.append(state)
            return self._blocks.fits(state)

        row.incoming.receive(row.reuse, take)
        if row.incoming.is_over:
            row.incoming = None
        return row.incoming is not None

    def _note_reuse(self, row: Row, known: int, *, is_restored: bool) -> None:
        if row.is_counted:
            return
        running = (other.tokens for other in self._rows.running)
        reuse = self._flow.explained(known, row.tokens, [*self._prefixes.tokens(), *running])
        if is_restored:
            reuse.ram, reuse.disk = row.reuse.ram, row.reuse.disk
        else:
            reuse.only_cells(known)
        row.reuse = reuse

    def _leader(self, row: Row) -> tuple[Row | None, int]:
        """Return the running row whose prompt shares most, where caches can be cut."""
        best, best_length = None, SMALLEST_PREFIX - 1
        if not self._model.can_cut:
            return None, 0
        for other in self._rows.running:
            length = min(common_prefix(other.tokens, row.tokens), len(row.tokens) - 1)
            if length > best_length:
                best, best_length = other, length
        return best, best_length

    def _shared(self, leader: Row, length: int) -> Callable[[], list[Any]]:
        def make() -> list[Any]:
            layers, tokens = self._batch.layers(leader.uid)
            return cut(layers, len(tokens), length)

        return make

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
        self._flow.finish()
        self._batch.close()
        self._prefixes.clear()
        self._rows = Rows()
        self._model.close()
