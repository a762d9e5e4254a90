"""Samples tokens with llama.cpp's sampler chains, plus grammar masks and log-probabilities."""

import ctypes
import secrets
from typing import Any

import numpy as np

from backends.engine.sampling import (
    DEFAULT_MIN_P,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_K,
    DEFAULT_TOP_P,
    check_finite,
    no_token_left,
    or_default,
    token_logprob,
)
from backends.gguf.model import GgufModel, library
from backends.stepper import SequenceSpec
from core.errors import RequestError
from core.types import SamplingParams, TokenLogprob

# llama.cpp divides by temperature and penalty in float32, where less may overflow to infinity.
_SMALLEST_DIVISOR = 1e-4


class SequenceSampler:
    """Samples one sequence's tokens; holds its penalties and random state.

    Not thread-safe: used on the stepper's thread only.
    """

    def __init__(self, model: GgufModel, spec: SequenceSpec, context_tokens: int) -> None:
        """Build the chain.  Raises RequestError for ids outside the vocabulary."""
        self._llama = library()
        self._model = model
        self._top_logprobs = spec.sampling.top_logprobs
        self._mask = spec.mask
        self._banned: list[int] = []
        self._chain = self._llama.llama_sampler_chain_init(
            self._llama.llama_sampler_chain_default_params()
        )
        try:
            self._fill(spec, context_tokens)
        except BaseException:
            self.close()
            raise

    def _fill(self, spec: SequenceSpec, context_tokens: int) -> None:
        llama, size = self._llama, self._model.vocabulary_size
        params, prompt = spec.sampling, spec.prompt
        if params.logit_bias:
            self._add_logit_bias(params)
        if params.repetition_penalty != 1.0:
            repeat = max(params.repetition_penalty, _SMALLEST_DIVISOR)
            penalty = llama.llama_sampler_init_penalties(size, context_tokens, repeat, 0.0, 0.0)
            self._add_penalty(penalty, prompt)
        if params.frequency_penalty or params.presence_penalty:
            penalty = llama.llama_sampler_init_penalties(
                size, context_tokens, 1.0, params.frequency_penalty, params.presence_penalty
            )
            self._add_penalty(penalty, prompt[len(prompt) - spec.generated :])
        temperature = or_default(params.temperature, DEFAULT_TEMPERATURE)
        if temperature == 0.0:
            self._add(llama.llama_sampler_init_greedy())
            return
        if (top_k := or_default(params.top_k, DEFAULT_TOP_K)) > 0:
            self._add(llama.llama_sampler_init_top_k(top_k))
        if (top_p := or_default(params.top_p, DEFAULT_TOP_P)) < 1.0:
            self._add(llama.llama_sampler_init_top_p(top_p, 1))
        if (min_p := or_default(params.min_p, DEFAULT_MIN_P)) > 0.0:
            self._add(llama.llama_sampler_init_min_p(min_p, 1))
        self._add(llama.llama_sampler_init_temp(max(temperature, _SMALLEST_DIVISOR)))
        random = llama.llama_sampler_init_dist(_seed(params.seed))
        # A resumed answer has drawn one number for each of its tokens.
        skip_draws(random, spec.generated)
        self._add(random)

    def _add(self, sampler: Any) -> None:
        self._llama.llama_sampler_chain_add(self._chain, sampler)

    def _add_penalty(self, penalty: Any, token_ids: tuple[int, ...]) -> None:
        """Add a penalty sampler that counts `token_ids` as sampled before."""
        for token_id in token_ids:
            self._llama.llama_sampler_accept(penalty, token_id)
        self._add(penalty)

    def _add_logit_bias(self, params: SamplingParams) -> None:
        size = self._model.vocabulary_size
        biases = (self._llama.llama_logit_bias * len(params.logit_bias))()
        for entry, (token_id, bias) in zip(biases, params.logit_bias.items(), strict=True):
            if not 0 <= token_id < size:
                raise RequestError(
                    f"logit_bias names token {token_id}, but the vocabulary has {size} tokens.",
                    param="logit_bias",
                )
            entry.token, entry.bias = token_id, bias
            # OpenAI documents -100 as a ban and 100 as exclusive selection.
            if bias <= -100:
                self._banned.append(token_id)
        self._add(self._llama.llama_sampler_init_logit_bias(size, len(biases), biases))

    def sample(self, context: Any, index: int) -> tuple[int, TokenLogprob | None]:
        """Sample the token after the batch's token `index`; with log-probability if requested.

        Raises NonFiniteOutput, NoTokenLeft if no token is allowed, and what the mask raises.
        """
        pointer = self._llama.llama_get_logits_ith(context, index)
        logits = np.ctypeslib.as_array(pointer, (self._model.vocabulary_size,))
        # llama.cpp's samplers take some token from NaN, and may sort it out of bounds.
        check_finite(logits)
        # Log-probabilities are those of the model: masking and sampling change the logits.
        original = logits.copy() if self._top_logprobs is not None else logits
        is_masked = self._mask is not None and self._mask.is_active
        if self._mask is not None and is_masked:
            self._mask.apply(logits)
        if self._banned:
            logits[self._banned] = -np.inf
        # llama.cpp would choose a token even when none is left.
        if (is_masked or self._banned) and logits.max() == -np.inf:
            raise no_token_left(self._mask)
        token_id = int(self._llama.llama_sampler_sample(self._chain, context, index))
        if self._mask is not None:
            self._mask.accept(token_id)
        if self._top_logprobs is None:
            return token_id, None
        return token_id, token_logprob(
            original,
            token_id,
            self._top_logprobs,
            lambda token: self._model.piece(token, special=True),
        )

    def close(self) -> None:
        """Free the chain; idempotent."""
        if self._chain:
            self._llama.llama_sampler_free(self._chain)
        self._chain = None


def skip_draws(random: Any, count: int) -> None:
    """Let a llama.cpp `dist` sampler draw `count` numbers; it draws one for each token."""
    llama = library()
    candidate = llama.llama_token_data(0, 0.0, 0.0)
    candidates = llama.llama_token_data_array(ctypes.pointer(candidate), 1, -1, False)
    for _ in range(count):
        llama.llama_sampler_apply(random, ctypes.byref(candidates))


def _seed(seed: int | None) -> int:
    """Fold any integer into llama.cpp's 32 bits, except 0xFFFFFFFF, which means random there."""
    if seed is None:
        return secrets.randbelow(0xFFFFFFFF)
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded if folded != 0xFFFFFFFF else 0xFFFFFFFE
