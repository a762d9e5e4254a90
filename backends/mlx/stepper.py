"""Continuous batching over mlx-lm: the Stepper of MLX models."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from backends.base import EngineLoad, EngineOptions
from backends.engine.prefill import PrefillPlanner
from backends.engine.prompt_scores import PromptScores, piece_tokens
from backends.engine.row_book import RowBook
from backends.engine.row_model import Pieces
from backends.engine.rows import BaseStepper
from backends.engine.sampling import RowSampler
from backends.mlx.batch import ENDLESS, NOT_FINITE, MlxBatch, RowChoice
from backends.mlx.blocks import LayerBlocks
from backends.mlx.metal import computing, gpu_advice
from backends.mlx.model import MlxModel
from backends.mlx.prefixes import KeptLayers, MlxPrefixes, cut
from backends.mlx.rows import MlxRow
from backends.mlx.scored_prompt import ScoredPrompt
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.prefixes.match import token_array
from backends.prefixes.pieces import PieceRule
from backends.prefixes.ram import SMALLEST_PREFIX
from backends.prefixes.store import State
from backends.prefixes.transfer import (
    Applied,
    PrefixTransfer,
    is_worth_restoring,
    wait_for_first_block,
)
from backends.stepper import SequenceSpec, StepOutput
from backends.trials import TrialResult
from core.errors import EngineFailed, NonFiniteOutput

_RIGHT = TrialResult()


class MlxStepper(BaseStepper):
    """Runs up to `max_sequences` rows in mlx-lm's batch, which pads all rows to the longest.

    Every step decodes one token of each running row and prefills a bounded chunk of prompts.
    A new row reuses the longest computed prefix of any running or finished row.  When the padded
    rows would exceed `options.kv_tokens`, the youngest running row is preempted: it loses its
    cache, waits, and is computed again.
    """

    def __init__(
        self,
        model: MlxModel,
        pieces: Pieces,
        options: EngineOptions,
        result: TrialResult = _RIGHT,
    ) -> None:
        """Take ownership of `model`; `options` must have `kv_tokens` set.

        What `result` found wrong is not done: rows together, prompts in pieces, reuse of caches.
        """
        assert options.kv_tokens is not None
        self._model = model
        self._pieces = pieces
        self._rule = PieceRule(options.deterministic, options.prefill_chunk_tokens)
        is_alone = self._rule.is_fixed or not result.has_batches
        self.max_sequences = 1 if is_alone else options.max_sequences
        self._is_whole = not result.has_chunks
        self._can_reuse = result.has_reuse and result.has_chunks
        self._batch = MlxBatch(model.model, self.max_sequences, options.prefill_chunk_tokens)
        self._prefixes = MlxPrefixes(
            options.prefix_bytes if self._can_reuse else 0, self._rule.whole
        )
        self._blocks = LayerBlocks(model)
        self._transfer = PrefixTransfer[KeptLayers](
            options.prefix_store,
            self._rule.layout(self._blocks.layout) if self._can_reuse else None,
            lambda kept, number: self._blocks.copy(kept.layers, number),
        )
        self._planner = PrefillPlanner(options.prefill_chunk_tokens, is_fixed=self._rule.is_fixed)
        self._book = RowBook[MlxRow](self.max_sequences, options.kv_tokens)
        self._by_uid: dict[int, MlxRow] = {}

    def add(self, spec: SequenceSpec) -> None:
        """Queue a sequence; it starts as soon as there is room.  Raises RequestError."""
        sampler = RowSampler(spec, self._model.vocabulary_size, self._piece)
        choice = None if sampler.is_greedy else RowChoice(sampler, self._pieces.is_end)
        scores = PromptScores.of(spec, self._piece)
        self._book.add(MlxRow(spec, token_array(spec.prompt), choice, scores=scores))

    def _piece(self, token_id: int) -> bytes:
        return self._pieces.piece(token_id, special=True)

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; its computed tokens stay as a prefix for later ones.  Idempotent."""
        row = self._book.remove(sequence_id)
        if row is None or row.slot < 0:
            return
        with computing():
            self._remove_slot(row)

    def _remove_slot(self, row: MlxRow) -> None:
        try:
            if self._prefixes.is_on and row.computed >= SMALLEST_PREFIX:
                self._keep(row)
        finally:
            # Otherwise the batch would compute it for ever.
            self._close_slot(row)

    def _keep(self, row: MlxRow) -> None:
        layers, tokens = self._batch.layers(row.slot)
        # The prompt's last token is computed apart, as those of the answer.
        length = self._rule.kept(len(tokens), max(row.reusable - 1, 0))
        if length < len(tokens):
            if length < SMALLEST_PREFIX or not self._model.can_cut:
                return
            layers = cut(layers, len(tokens), length)
        kept = self._prefixes.put(token_array(tokens[:length]), layers)
        if kept is not None:
            self._transfer.queue(kept, kept.tokens)

    def _discard(self, row: MlxRow) -> None:
        self._book.remove(row.spec.id)
        if row.slot >= 0:
            self._close_slot(row)

    def _close_slot(self, row: MlxRow) -> None:
        uid = row.release_slot()
        self._batch.remove(uid)
        del self._by_uid[uid]
        row.is_decoding = False

    def step(self) -> list[StepOutput]:
        """Do one forward pass, or two if the first one completes a prompt without a token.

        Raises EngineFailed with advice if macOS ended the work on its GPU, and what MLX raises.
        """
        try:
            with computing():
                return self._step()
        except RuntimeError as problem:
            if advice := gpu_advice(problem):
                raise EngineFailed(advice) from problem
            raise

    def _step(self) -> list[StepOutput]:
        started = self._model.clock.seconds()
        outputs = self._make_room()
        self._admit(outputs)
        while self._batch.has_work:
            outputs += self._compute()
            if outputs:
                break
        self._book.native_cpu_s += self._model.clock.seconds() - started
        if not (self._batch.has_work or outputs):
            wait_for_first_block([row.incoming for row in self._book.waiting])
        self._copy_blocks()
        return outputs

    def _compute(self) -> list[StepOutput]:
        prefilling = [row for row in self._book.running if not row.is_decoding]
        decoding = len(self._book.running) - len(prefilling)
        context = max((row.past for row in prefilling), default=0)
        budget = self._planner.budget(decoding, len(prefilling), context)
        chunk = budget // max(len(prefilling), 1)
        wall = time.monotonic()
        progress, tokens = self._batch.next(ENDLESS if self._is_whole else max(chunk, 1))
        self._book.steps += 1
        outputs = [self._token(self._by_uid[uid], token_id) for uid, token_id in tokens]
        computed = 0
        for uid, done in progress:
            row = self._by_uid[uid]
            before, row.past = row.past, row.known + done
            computed += row.past - before
            if not row.is_reuse_final:
                outputs.append(row.progress())
        self._planner.observe(computed, time.monotonic() - wall)
        return outputs

    def _token(self, row: MlxRow, token_id: int) -> StepOutput:
        row.is_decoding = True
        try:
            logprob = row.choice.take() if row.choice else None
            if token_id == NOT_FINITE:
                raise NonFiniteOutput.of("logits")
            return row.add_token(token_id, logprob, is_end=self._pieces.is_end(token_id))
        except BaseException as problem:
            return self._failed(row, problem, "the sampling of its next token")

    def _padded(self, rows: list[MlxRow]) -> int:
        """Return the KV tokens of these rows after one more step: all padded to the longest."""
        return len(rows) * max((len(row.tokens) + 1 for row in rows), default=0)

    def _make_room(self) -> list[StepOutput]:
        """Preempt the youngest rows until the others fit; return tokens they had computed ahead."""
        book, outputs = self._book, list[StepOutput]()
        while len(book.running) > 1 and self._padded(book.running) > book.kv_tokens:
            row = book.preempt()
            self._close_slot(row)
            try:
                ahead = row.choice.take_waiting() if row.choice else None
                if ahead is not None:
                    token_id, logprob = ahead
                    is_end = self._pieces.is_end(token_id)
                    outputs.append(row.add_token(token_id, logprob, is_end=is_end))
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "the sampling of its next token"))
        return outputs

    def _admit(self, outputs: list[StepOutput]) -> None:
        book = self._book
        is_scoring = False
        for row in book.admissible():
            if book.running and self._padded([*book.running, row]) > book.kv_tokens:
                return
            if row.needs_scores and is_scoring:
                # Its caches are held beside the batch: one at a time.
                continue
            is_scoring = is_scoring or row.needs_scores
            try:
                if row.needs_scores:
                    self._score(row)
                    outputs.append(row.progress())
                elif self._place(row):
                    book.start(row)
            except BaseException as problem:
                outputs.append(self._failed(row, problem, "its start"))

    def _score(self, row: MlxRow) -> None:
        """Compute the next piece of a waiting row's prompt, up to the last token's logits."""
        assert row.scores is not None
        scored = row.scored = row.scored or ScoredPrompt(self._model.model)
        start, end = scored.length, len(row.tokens) - 1
        chunk = self._planner.budget(len(self._book.running), 1, start)
        # Where several tokens after others are wrong, they are computed one by one.
        chunk = 1 if self._is_whole else min(chunk, piece_tokens(self._model.vocabulary_size))
        tokens = row.tokens[start : min(start + chunk, end)]
        wall = time.monotonic()
        row.scores.add_piece(start, scored.extend(tokens))
        row.past = scored.length
        self._planner.observe(len(tokens), time.monotonic() - wall)

    def _place(self, row: MlxRow) -> bool:
        """Give `row` a slot with the longest cached prefix; False while that is not ready yet.

        Stored blocks of a former engine are used if they are longer than what is in memory.
        """
        if row.scored is not None:
            scored, row.scored = row.scored, None
            self._insert(row, scored.length, scored.layers)
            return True
        if not row.spec.reads_cache:
            self._insert(row, 0, None)
            return True
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
        if self._rule.blocks(row.blocks) != row.blocks:
            row.blocks.clear()
        is_restored = len(row.blocks) * BLOCK_TOKENS > known
        if is_restored:
            known = len(row.blocks) * BLOCK_TOKENS
            make = partial(self._blocks.join, row.blocks)
        self._note_reuse(row, known, is_restored=is_restored)
        layers = make() if known else None
        row.blocks.clear()
        self._insert(row, known, layers)
        return True

    def _insert(self, row: MlxRow, known: int, layers: list[Any] | None) -> None:
        """Let the batch compute `row` after its first `known` tokens, whose caches are `layers`."""
        left = row.capacity - len(row.tokens)
        row.slot = self._batch.insert(
            row.tokens[known:], left, row.choice, row.tokens[:known], layers
        )
        row.known = row.past = known
        self._by_uid[row.slot] = row

    def _awaits_blocks(self, row: MlxRow, others: int) -> bool:
        """Return whether a restore of the row's prompt still runs; start it the first time."""
        if not row.was_restored:
            row.was_restored = True
            blocks = self._rule.blocks(self._transfer.find(row.tokens[:-1]))
            if is_worth_restoring(blocks, others):
                row.incoming = self._transfer.restore(row.tokens[:-1], blocks)
        return row.receive(self._take_block)

    def _take_block(self, row: MlxRow, state: State) -> Applied:
        if not self._blocks.fits(state):
            return "refused"
        row.blocks.append(state)
        return "applied"

    def _note_reuse(self, row: MlxRow, known: int, *, is_restored: bool) -> None:
        if row.is_reuse_final:
            return
        others = [*self._prefixes.tokens(), *self._book.running_tokens()]
        reuse = self._transfer.explain_reuse(known, row.tokens, others)
        if is_restored:
            reuse.ram, reuse.disk = row.reuse.ram, row.reuse.disk
        else:
            reuse.only_cells(known)
        row.reuse = reuse

    def _leader(self, row: MlxRow) -> tuple[MlxRow | None, int]:
        """Return the running row that shares the longest prefix, if caches can be cut."""
        can_share = self._can_reuse and self._model.can_cut
        leader, shared = self._book.best_leader(row) if can_share else (None, 0)
        return (leader, shared) if shared >= SMALLEST_PREFIX else (None, 0)

    def _shared(self, leader: MlxRow, length: int) -> Callable[[], list[Any]]:
        def make() -> list[Any]:
            layers, tokens = self._batch.layers(leader.slot)
            return cut(layers, len(tokens), length)

        return make

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts."""
        return self._book.load(self._padded(self._book.running))

    def close(self) -> None:
        """Free the caches and the weights; idempotent."""
        self._transfer.finish()
        self._batch.close()
        self._prefixes.clear()
        self._book.clear()
        self._by_uid.clear()
        self._model.close()
