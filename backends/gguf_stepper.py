"""Continuous batching over llama.cpp's low-level API: `backends.base.Stepper` for GGUF."""

import time
from array import array
from dataclasses import dataclass, field

from backends.base import EngineLoad, EngineOptions, SequenceSpec, StepOutput
from backends.gguf_batch import Batch
from backends.gguf_model import GgufModel, library, native_log, open_context
from backends.gguf_sampling import SequenceSampler
from backends.gguf_slots import KvSlots
from backends.prefill import PrefillPlanner
from backends.prefix_cache import common_prefix, token_array
from backends.prefix_store import SMALLEST_PREFIX, PrefixStore
from core.errors import EngineFailed

_NO_SLOT = 1


@dataclass(slots=True, eq=False)
class _Row:
    """One sequence: `tokens` is the prompt and all chosen tokens, `past` of them are in KV."""

    spec: SequenceSpec
    tokens: "array[int]"
    sampler: SequenceSampler
    slot: int = -1
    past: int = 0
    cached: int = 0
    is_counted: bool = False
    leader: "_Row | None" = None
    shared: int = 0
    output: int = -1
    run: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.past


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    preemptions: int = 0
    native_cpu_s: float = 0.0


@dataclass(slots=True)
class _Queues:
    """`is_crowded` from a preemption until a running row ends: nobody new is admitted."""

    waiting: list[_Row] = field(default_factory=list)
    running: list[_Row] = field(default_factory=list)
    by_id: dict[int, _Row] = field(default_factory=dict)
    is_crowded: bool = False


class GgufStepper:
    """Runs up to `max_sequences` rows in one unified KV cache, one llama.cpp sequence id each.

    Every step decodes one token of each running row and a bounded chunk of waiting prompts.
    A new row gets the longest computed prefix of any running or finished row.  When the cells
    run out, finished rows move to RAM first, then the youngest running row gives its cells back
    and is computed again later: it waits, nothing fails.
    """

    def __init__(self, model: GgufModel, options: EngineOptions) -> None:
        """Create the context of `options.kv_tokens` cells.  Raises InsufficientMemory."""
        assert options.kv_tokens is not None
        assert options.context_tokens is not None
        self._llama = library()
        self._model = model
        self.max_sequences = options.max_sequences
        self._context_tokens = options.context_tokens
        self._slot_count = self._count_slots(options)
        self._context = open_context(model, options, self._slot_count)
        self._store = PrefixStore(options.prefix_bytes)
        self._slots = KvSlots(self._context, self._slot_count, self._store, model)
        self._warm_tokens = options.warm_tokens
        self._batch = Batch(options.prefill_chunk_tokens + options.max_sequences)
        self._planner = PrefillPlanner(options.prefill_chunk_tokens)
        self._kv_tokens = options.kv_tokens
        self._queues = _Queues()
        self._counters = _Counters()

    def _count_slots(self, options: EngineOptions) -> int:
        # Each id of a recurrent model owns a whole state; elsewhere an id costs nothing.
        spare = 2 if self._model.keeps_recurrent_state else options.max_sequences + 16
        limit = int(self._llama.llama_max_parallel_sequences())
        return min(options.max_sequences + spare, limit)

    def add(self, spec: SequenceSpec) -> None:
        """Accept a sequence; it starts as soon as a slot is free.  Raises RequestError."""
        sampler = SequenceSampler(self._model, spec, self._context_tokens)
        row = _Row(spec, token_array(spec.prompt), sampler)
        self._queues.by_id[spec.id] = row
        self._queues.waiting.append(row)

    def remove(self, sequence_id: int) -> None:
        """Drop a sequence; its cells stay as a prefix for later ones.  Idempotent."""
        row = self._queues.by_id.pop(sequence_id, None)
        if row is None:
            return
        row.sampler.close()
        if row.slot < 0:
            self._queues.waiting.remove(row)
            return
        self._queues.running.remove(row)
        self._queues.is_crowded = False
        self._slots.keep(row.slot, row.tokens[: row.past], self._counters.steps)
        row.slot = -1

    def step(self) -> list[StepOutput]:
        """Do one forward pass.  Raises EngineFailed when llama.cpp fails for good."""
        self._admit()
        self._fill_batch()
        while self._batch.count:
            started, wall = time.thread_time(), time.monotonic()
            code = self._llama.llama_decode(self._context, self._batch.native)
            self._counters.native_cpu_s += time.thread_time() - started
            if code == 0:
                break
            if code != _NO_SLOT:
                raise EngineFailed(f"llama_decode failed with {code}: {native_log.take_errors()}")
            self._make_room()
            self._fill_batch()
        if not self._batch.count:
            return []
        self._counters.steps += 1
        outputs = self._collect()
        self._slots.cool_down(self._warm_tokens)
        self._planner.observe(self._batch.count, time.monotonic() - wall)
        return outputs

    def _admit(self) -> None:
        queues = self._queues
        if queues.is_crowded and queues.running:
            return
        while queues.waiting and len(queues.running) < self.max_sequences:
            row = queues.waiting[0]
            if not self._place(row):
                return
            queues.waiting.pop(0)
            queues.running.append(row)

    def _place(self, row: _Row) -> bool:
        """Give `row` a slot holding the longest known prefix; False when no slot is free.

        1. A finished row's cells, all shared: take its slot over.
        2. A finished or running row's cells: share them.
        3. A snapshot in RAM, where that is longer: copy it into cells.
        """
        limit = len(row.tokens) - 1
        prompt = row.tokens[:limit]
        entry, kept = self._slots.longest(prompt)
        leader, computed, potential = self._best_leader(row, limit)
        snapshot, stored = self._slots.longest_stored(prompt)
        use_snapshot = stored >= max(kept, computed) + SMALLEST_PREFIX
        if entry is not None and kept == len(entry.tokens) >= computed and not use_snapshot:  # (1)
            row.slot, row.past = self._slots.take_over(entry), kept
        else:
            slot = self._slots.take(but=entry)
            if slot is None:
                return False
            row.slot = slot
            step = self._counters.steps
            if use_snapshot and snapshot is not None:  # (3)
                row.past = stored if self._slots.restore(snapshot, slot, stored, step) else 0
            elif entry is not None and kept >= computed and self._slots.is_retained(entry):  # (2)
                entry.used_at_step = step
                self._share(row, entry.slot, kept)
            elif leader is not None and computed:
                self._share(row, leader.slot, computed)
        if leader is not None and potential - row.past >= SMALLEST_PREFIX:
            row.leader, row.shared = leader, potential
        if not row.is_counted:
            row.cached = row.past
        return True

    def _best_leader(self, row: _Row, limit: int) -> tuple[_Row | None, int, int]:
        """Return the running row that shares most, what of it is computed and what will be."""
        best: tuple[_Row | None, int, int] = (None, 0, 0)
        if self._model.whole_beyond <= self._context_tokens:
            # A running row has moved on from where it could be shared.
            return best
        for other in self._queues.running:
            potential = min(common_prefix(other.tokens, row.tokens), limit)
            if potential > best[2]:
                best = (other, min(potential, other.past), potential)
        return best

    def _share(self, row: _Row, source_slot: int, count: int) -> None:
        self._slots.share(source_slot, row.slot, count)
        row.past = count

    def _follow(self, row: _Row) -> bool:
        """Return whether `row` still waits for its leader; take the shared prefix when ready."""
        leader = row.leader
        if leader is None:
            return False
        is_alive = leader.slot >= 0 and leader.past < len(leader.tokens)
        if is_alive and leader.past < row.shared:
            return True
        ready = min(leader.past, row.shared) if leader.slot >= 0 else 0
        if ready > row.past:
            self._share(row, leader.slot, ready)
            if not row.is_counted:
                row.cached = row.past
        row.leader = None
        return False

    def _fill_batch(self) -> None:
        """Put every decoding row's token and the planned prompt chunks into the batch."""
        self._batch.clear()
        prefilling = []
        for row in self._queues.running:
            row.output, row.run = -1, 0
            if row.pending == 1:
                row.run = 1
                row.output = self._batch.add(row.slot, row.past, row.tokens[-1:], logits=True)
            elif not self._follow(row):
                prefilling.append(row)
        chunks = self._planner.plan([row.pending for row in prefilling], self._batch.count)
        for row, chunk in zip(prefilling, chunks, strict=True):
            if chunk:
                self._add_chunk(row, chunk)

    def _add_chunk(self, row: _Row, chunk: int) -> None:
        is_last = chunk == row.pending
        tokens = row.tokens[row.past : row.past + chunk]
        index = self._batch.add(row.slot, row.past, tokens, logits=is_last)
        row.run, row.output = chunk, index if is_last else -1

    def _make_room(self) -> None:
        """Free KV cells: the least recently used finished row, else the youngest running one."""
        if self._slots.drop_oldest():
            return
        running = self._queues.running
        if len(running) < 2:
            raise EngineFailed(
                f"One sequence does not fit the KV cache of {self._kv_tokens} tokens."
            )
        row = running.pop()
        self._slots.release(row.slot)
        row.slot, row.past, row.leader = -1, 0, None
        self._queues.waiting.insert(0, row)
        self._queues.is_crowded = True
        self._counters.preemptions += 1

    def _collect(self) -> list[StepOutput]:
        outputs = []
        for row in self._queues.running:
            if not row.run:
                continue
            row.past += row.run
            if row.output < 0:
                outputs.append(StepOutput(row.spec.id, None, prefilled=row.past, cached=row.cached))
                continue
            started = time.thread_time()
            token_id, logprob = row.sampler.sample(self._context, row.output)
            self._counters.native_cpu_s += time.thread_time() - started
            row.tokens.append(token_id)
            row.is_counted = True
            outputs.append(
                StepOutput(
                    row.spec.id,
                    token_id,
                    is_end=self._model.is_end(token_id),
                    logprob=logprob,
                    prefilled=len(row.spec.prompt),
                    cached=row.cached,
                )
            )
        return outputs

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        """Bound the prompt tokens of a step; see `backends.limits.PrefillLimited`."""
        self._planner.limit(chunk_tokens)

    def counters(self) -> EngineLoad:
        """Return the stepper's own counts."""
        used = sum(row.past for row in self._queues.running) + self._slots.retained_tokens
        return EngineLoad(
            kv_used_tokens=min(used, self._kv_tokens),
            kv_tokens=self._kv_tokens,
            steps=self._counters.steps,
            preemptions=self._counters.preemptions,
            native_cpu_s=self._counters.native_cpu_s + self._slots.native_cpu_s,
        )

    def close(self) -> None:
        """Free the context and the weights; twice is fine."""
        for row in self._queues.by_id.values():
            row.sampler.close()
        self._queues = _Queues()
        self._store.clear()
        if self._context:
            self._llama.llama_free(self._context)
            self._context = None
        self._model.close()
