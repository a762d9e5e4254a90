"""mlx-lm's BatchGenerator with a faster decoding step, and sampling of a row on the CPU."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np

from backends.engine.sampling import RowSampler
from backends.mlx.metal import computing
from core.types import TokenLogprob

# The stepper ends sequences; the generator never does.
ENDLESS = 1 << 60
# Stands for the token of a greedy row whose logits are not all finite; no vocabulary has it.
NOT_FINITE = 0xFFFF_FFFF


class Chooses(Protocol):
    """Chooses a row's tokens from its logits, as mlx-lm calls it."""

    def process(self, tokens: Any, logits: Any, /) -> Any:
        """Choose from logits of shape (1, vocabulary); an mlx-lm logits processor."""
        ...

    def sample(self, logprobs: Any, /) -> Any:
        """Return the token that `process` chose; an mlx-lm sampler."""
        ...

    def choose(self, logits: Any) -> int:
        """Return a token for logits of shape (vocabulary,)."""
        ...


class RowChoice:
    """Samples one row's tokens on the CPU, from the model's logits.

    mlx-lm computes one token ahead, so a sampled token waits here until it is output, and so does
    what its sampling raised.
    """

    def __init__(self, sampler: RowSampler, is_end: Callable[[int], bool]) -> None:
        self._sampler = sampler
        self._is_end = is_end
        self._chosen: deque[tuple[int, TokenLogprob | None] | BaseException] = deque()
        self._last = -1
        self._has_failed = False

    def process(self, _: Any, logits: Any) -> Any:
        """Sample from logits of shape (1, vocabulary); an mlx-lm logits processor."""
        import mlx.core as mx

        self.choose(np.array(logits[0].astype(mx.float32)))
        return logits

    def sample(self, _: Any) -> Any:
        """Return the token that `process` sampled; an mlx-lm sampler."""
        import mlx.core as mx

        return mx.array([max(self._last, 0)], mx.uint32)

    def choose(self, logits: Any) -> int:
        """Sample a token; after an end token or a failure, return some token of the vocabulary.

        Raises nothing: the other rows of the batch are computed with this one.
        """
        if not self._has_failed and (self._last < 0 or not self._is_end(self._last)):
            try:
                self._last, logprob = self._sampler.sample(logits)
                self._chosen.append((self._last, logprob))
            except BaseException as problem:
                self._has_failed = True
                self._chosen.append(problem)
        return max(self._last, 0)

    def take(self) -> TokenLogprob | None:
        """Return the log-probability of the next token to output; raises what its sampling did."""
        return self._next()[1]

    def take_waiting(self) -> tuple[int, TokenLogprob | None] | None:
        """Return the token that was sampled but not output yet, if there is one.

        Raises what its sampling did.
        """
        return self._next() if self._chosen else None

    def _next(self) -> tuple[int, TokenLogprob | None]:
        found = self._chosen.popleft()
        if isinstance(found, BaseException):
            raise found
        return found


def _greedy(logits: Any) -> Any:
    """Return the likeliest token of each row, or NOT_FINITE; of log-probabilities the same."""
    import mlx.core as mx

    tokens = mx.argmax(logits, axis=-1)
    return mx.where(mx.isfinite(logits).all(axis=-1), tokens, mx.array(NOT_FINITE, mx.uint32))


@cache
def _lean_batch() -> Any:
    """Return mlx-lm's batch class without its unused log-probabilities of the vocabulary."""
    import mlx.core as mx
    from mlx_lm.generate import GenerationBatch

    class LeanBatch(GenerationBatch):  # type: ignore[misc]
        # Maximum number of tokens of each sequence, by uid; shared with `MlxBatch`.
        wanted: dict[int, int]
        _next_tokens: Any

        def _step(self) -> tuple[list[int], list[None]]:
            inputs = self._next_tokens
            none = [None] * len(self.uids)
            self._current_tokens, self._current_logprobs = inputs, none
            if self._is_last():
                return inputs.tolist(), none
            # NOT_FINITE has no embedding: its row is computed from any token, until it is removed.
            known = mx.where(inputs == NOT_FINITE, mx.array(0, inputs.dtype), inputs)
            logits = self.model(known[:, None], cache=self.prompt_cache)[:, -1, :]
            self._next_tokens = self._chosen(logits)
            self._next_logprobs = list(none)
            mx.async_eval(self._next_tokens)  # type: ignore[no-untyped-call]
            ids: list[int] = inputs.tolist()
            for tokens, token_id in zip(self.tokens, ids, strict=True):
                tokens.append(token_id)
            return ids, none

        def _is_last(self) -> bool:
            """Whether all sequences end with the tokens that are already computed."""
            return all(
                count + 1 >= self.wanted.get(uid, ENDLESS)
                for uid, count in zip(self.uids, self._num_tokens, strict=True)
            )

        def _chosen(self, logits: Any) -> Any:
            own = [index for index, each in enumerate(self.logits_processors) if each]
            if not own:
                return _greedy(logits)
            rows = np.array(logits[mx.array(own)].astype(mx.float32))
            ids = [
                self.logits_processors[index][0].__self__.choose(row)
                for index, row in zip(own, rows, strict=True)
            ]
            if len(own) == len(self.uids):
                return mx.array(ids, mx.uint32)
            tokens = _greedy(logits)
            tokens[mx.array(own)] = mx.array(ids, tokens.dtype)
            return tokens

    return LeanBatch


class MlxBatch:
    """A BatchGenerator for one model; a sequence ends only by `remove`."""

    def __init__(self, model: Any, rows: int, chunk_tokens: int) -> None:
        from mlx_lm.generate import BatchGenerator

        self._wanted: dict[int, int] = {}
        self._generator: Any = BatchGenerator(
            model,
            sampler=_greedy,
            completion_batch_size=rows,
            # All prompts together: a short one does not wait for long ones.
            prefill_batch_size=rows,
            prefill_step_size=chunk_tokens,
        )
        lean = _lean_batch().empty(model, _greedy)
        lean.wanted = self._wanted
        self._generator._generation_batch = lean

    def insert(
        self,
        tokens: Sequence[int],
        wanted: int,
        choice: Chooses | None,
        prefix: Sequence[int] = (),
        layers: list[Any] | None = None,
    ) -> int:
        """Add `tokens` after `prefix`, whose caches are `layers`; return the sequence's uid."""
        (uid,) = self._generator.insert(
            [list(tokens)],
            max_tokens=[ENDLESS],
            caches=[layers or None],
            all_tokens=[list(prefix)],
            samplers=[choice.sample if choice else None],
            logits_processors=[[choice.process] if choice else []],
        )
        self._wanted[uid] = wanted
        return int(uid)

    def next(self, chunk_tokens: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Compute one token of each sequence, and up to `chunk_tokens` of each prompt.

        Returns (uid, prompt tokens computed) and (uid, token id) pairs.
        """
        self._generator.prefill_step_size = chunk_tokens
        with computing():
            prompts, tokens = self._generator.next()
        return (
            [(each.uid, each.progress[0]) for each in prompts if not each.end_of_prompt],
            [(each.uid, each.token) for each in tokens],
        )

    @property
    def has_work(self) -> bool:
        """Whether there is any sequence."""
        return bool(self._wanted)

    def remove(self, uid: int) -> None:
        """Remove a sequence and its caches."""
        self._generator.remove([uid])
        del self._wanted[uid]

    def layers(self, uid: int) -> tuple[list[Any], list[int]]:
        """Return copies of a sequence's caches, and the tokens that they hold."""
        layers, tokens = self._generator.extract_cache([uid])[uid]
        return layers, tokens

    def close(self) -> None:
        """Free all caches; idempotent."""
        self._wanted.clear()
        if self._generator is not None:
            self._generator.close()
            self._generator = None
