"""The sampler of runtimes without their own: distribution, penalties, masks, log-probabilities."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.engine.sampling import RowSampler
from backends.grammar.constraint import TokenMask
from backends.stepper import SequenceSpec
from core.errors import NonFiniteOutput, NoTokenLeft, RequestError
from core.types import SamplingParams

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))


def sampler(
    prompt: tuple[int, ...] = (), mask: TokenMask | None = None, size: int = 5, **params: Any
) -> RowSampler:
    spec = SequenceSpec(1, prompt, SamplingParams(**params), 100, mask)
    return RowSampler(spec, size, lambda token: bytes((97 + token,)))


def draw(chosen: RowSampler, count: int, logits: NDArray[np.float32] = LOGITS) -> Counter[int]:
    return Counter(chosen.sample(logits.copy())[0] for _ in range(count))


OPEN: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert sampler(temperature=0.0).sample(LOGITS.copy())[0] == 0
    equal = np.zeros(5, np.float32)
    assert sampler(temperature=0.0).sample(equal)[0] == 0


def test_draws_follow_the_distribution() -> None:
    counts = draw(sampler(temperature=1.0, seed=1, **OPEN), 8000)
    for token, share in enumerate((0.5, 0.25, 0.125, 0.0625, 0.0625)):
        assert counts[token] / 8000 == pytest.approx(share, abs=0.02)


def test_temperature_sharpens() -> None:
    counts = draw(sampler(temperature=0.5, seed=1, **OPEN), 4000)
    total = sum(share**2 for share in (0.5, 0.25, 0.125, 0.0625, 0.0625))
    assert counts[0] / 4000 == pytest.approx(0.25 / total, abs=0.03)


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0}, {0}),
    ],
)
def test_filters_leave_what_they_should(params: dict[str, Any], left: set[int]) -> None:
    chosen = sampler(temperature=1.0, seed=3, **{**OPEN, **params})
    assert set(draw(chosen, 600)) == left


@given(seed=st.integers(-(2**70), 2**70), top_p=st.floats(0.05, 0.999))
@settings(max_examples=25, deadline=None)
def test_nucleus_of_a_large_vocabulary_is_the_smallest(seed: int, top_p: float) -> None:
    logits = np.random.default_rng(7).normal(0, 2, 5000).astype(np.float32)
    chosen = sampler(size=5000, temperature=1.0, seed=seed, top_k=0, top_p=top_p, min_p=0.0)
    ids, _ = chosen._candidates(logits, logits.max())
    shares = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    shares /= shares.sum()
    expected = int((shares.cumsum() < top_p * (1 - 1e-9)).sum()) + 1
    assert abs(len(ids) - expected) <= 1
    assert list(ids) == list(np.argsort(-logits, kind="stable")[: len(ids)])


def test_the_same_seed_draws_the_same() -> None:
    first = [sampler(temperature=1.0, seed=-5, **OPEN).sample(LOGITS.copy())[0] for _ in range(1)]
    runs = [
        [chosen.sample(LOGITS.copy())[0] for _ in range(30)]
        for chosen in (sampler(temperature=1.0, seed=-5, **OPEN) for _ in range(2))
    ]
    assert runs[0] == runs[1]
    assert runs[0][0] == first[0]


def test_without_a_seed_draws_differ() -> None:
    runs = {
        tuple(chosen.sample(LOGITS.copy())[0] for _ in range(60))
        for chosen in (sampler(temperature=1.0, **OPEN) for _ in range(3))
    }
    assert len(runs) > 1


def test_bias_bans_and_forces() -> None:
    banned = sampler(temperature=0.0, logit_bias={0: -100.0})
    assert banned.sample(LOGITS.copy())[0] == 1
    forced = sampler(temperature=1.0, seed=1, logit_bias={4: 100.0}, **OPEN)
    assert set(draw(forced, 50)) == {4}


def test_repetition_penalty_counts_the_prompt() -> None:
    plain = np.array([2.0, 1.9, -1.0, -3.0, -3.0], np.float32)
    assert (
        sampler(prompt=(0,), temperature=0.0, repetition_penalty=1.5).sample(plain.copy())[0] == 1
    )
    assert (
        sampler(prompt=(3,), temperature=0.0, repetition_penalty=1.5).sample(plain.copy())[0] == 0
    )


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = np.array([2.0, 1.7, 0.0, 0.0, 0.0], np.float32)
    presence = sampler(prompt=(0, 0), temperature=0.0, presence_penalty=0.5)
    assert [presence.sample(logits.copy())[0] for _ in range(3)] == [0, 1, 0]
    frequency = sampler(prompt=(0, 0), temperature=0.0, frequency_penalty=0.2)
    assert [frequency.sample(logits.copy())[0] for _ in range(4)] == [0, 0, 1, 0]


class OnlyOdd:
    """Allows odd tokens only and remembers what was chosen."""

    is_active = True
    problem = ""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def apply(self, logits: NDArray[np.float32]) -> None:
        logits[::2] = -np.inf

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_mask_bounds_the_choice_and_hears_of_it() -> None:
    mask = OnlyOdd()
    chosen = sampler(temperature=1.0, seed=2, mask=mask, **OPEN)
    tokens = [chosen.sample(LOGITS.copy())[0] for _ in range(40)]
    assert set(tokens) == {1, 3}
    assert mask.accepted == tokens


def test_mask_that_is_not_active_is_only_told_of_the_choice() -> None:
    mask = OnlyOdd()
    mask.is_active = False
    chosen = sampler(temperature=0.0, mask=mask)
    assert [chosen.sample(LOGITS.copy())[0] for _ in range(3)] == [int(LOGITS.argmax())] * 3
    assert mask.accepted == [int(LOGITS.argmax())] * 3


def test_logprobs_are_those_of_the_model_itself() -> None:
    chosen = sampler(temperature=0.0, top_logprobs=2, logit_bias={0: -100.0})
    token, logprob = chosen.sample(LOGITS.copy())
    assert token == 1
    assert logprob is not None
    assert logprob.logprob == pytest.approx(math.log(0.25))
    assert [(top.token_id, top.data) for top in logprob.top] == [(0, b"a"), (1, b"b")]
    assert logprob.top[0].logprob == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("token_id", [-1, 5])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match="5 tokens"):
        sampler(logit_bias={token_id: 1.0})
    with pytest.raises(RequestError, match="vocabulary"):
        sampler(prompt=(token_id,))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(broken: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[3] = broken
    with pytest.raises(NonFiniteOutput, match="NaN or infinity"):
        sampler(temperature=temperature, **OPEN).sample(logits)


@pytest.mark.parametrize("params", [{"logprobs": 0}, {"bias": 3}, {"penalty": 3}])
def test_logits_that_are_no_numbers_are_an_error_whatever_changes_them(
    params: dict[str, int],
) -> None:
    logits = LOGITS.copy()
    logits[3] = math.nan
    shaped: dict[str, Any] = {
        "top_logprobs": params.get("logprobs"),
        "logit_bias": {params["bias"]: -100.0} if "bias" in params else {},
        "repetition_penalty": 2.0 if "penalty" in params else 1.0,
    }
    with pytest.raises(NonFiniteOutput):
        sampler((params.get("penalty", 0),), temperature=0.0, **shaped).sample(logits)


def test_a_mask_and_a_ban_that_leave_no_token_are_an_error() -> None:
    class OnlyThree:
        is_active = True
        problem = ""

        def apply(self, logits: NDArray[np.float32]) -> None:
            logits[:3] = logits[4:] = -np.inf

        def accept(self, token_id: int) -> None:
            del token_id

    chosen = sampler(mask=OnlyThree(), logit_bias={3: -100.0}, temperature=0.0)
    with pytest.raises(NoTokenLeft, match="No token may come next") as caught:
        chosen.sample(LOGITS.copy())
    assert (caught.value.status, caught.value.may_retry) == (400, False)


def test_a_tiny_penalty_and_temperature_overflow_nothing() -> None:
    chosen = sampler((0, 1), repetition_penalty=1e-44, temperature=1e-300, seed=1, **OPEN)
    assert chosen.sample(np.arange(1, 6, dtype=np.float32))[0] in (0, 1)
    chosen = sampler((0,), repetition_penalty=1e-44, temperature=0.0)
    assert chosen.sample(LOGITS.copy())[0] in range(5)
