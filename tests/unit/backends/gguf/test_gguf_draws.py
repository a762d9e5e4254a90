"""The random numbers of llama.cpp's sampler, which a resumed answer goes on with."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from backends.gguf.model import library
from backends.gguf.sampling import skip_draws

CANDIDATES = 1000


def draw(sampler: Any, candidates: int = CANDIDATES) -> int:
    """Draw one of equally likely candidates."""
    llama = library()
    entries = (llama.llama_token_data * candidates)(
        *(llama.llama_token_data(index, 0.0, 0.0) for index in range(candidates))
    )
    array = llama.llama_token_data_array(entries, candidates, -1, False)
    llama.llama_sampler_apply(sampler, ctypes.byref(array))
    return int(array.selected)


@pytest.fixture
def samplers() -> Iterator[list[Any]]:
    llama = library()
    opened = [llama.llama_sampler_init_dist(seed) for seed in (5, 5, 6)]
    yield opened
    for each in opened:
        llama.llama_sampler_free(each)


@pytest.mark.parametrize("skipped", [0, 1, 2, 7, 300])
def test_skipped_draws_are_those_that_tokens_would_have_drawn(
    samplers: list[Any], skipped: int
) -> None:
    one, other, another = samplers
    # One number for each token, whatever the number of candidates.
    for index in range(skipped):
        draw(one, candidates=1 + 13 * index % 50)
    skip_draws(other, skipped)
    skip_draws(another, skipped)
    drawn = [draw(one) for _ in range(5)]
    assert [draw(other) for _ in range(5)] == drawn
    assert [draw(another) for _ in range(5)] != drawn
