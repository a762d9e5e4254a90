"""The figures of a conversion's quality, from logits and vectors of a few numbers."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from catalog.convert.quality.figure import (
    Difference,
    QualityFigure,
    difference,
    embedding_figure,
    language_figure,
    perplexity,
    position_of,
)
from catalog.convert.quality.kept import KeptText, read_texts, write_texts
from catalog.convert.quality.text import lines_of
from catalog.convert.quality.text import read_texts as packaged_texts


def random_logits(seed: int, count: int = 5000) -> NDArray[np.float32]:
    return 3 * np.random.default_rng(seed).standard_normal(count, np.float32)


def exact_divergence(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the divergence over all tokens, in the way of a textbook."""
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum()
            for x in (first, second))  # fmt: skip
    return float((p * np.log(p / q)).sum())


def test_a_model_does_not_differ_from_itself() -> None:
    logits = random_logits(1)
    found = difference(position_of(logits, 7), logits + 100, 7)
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.has_same_top
    assert found.next_logprob == pytest.approx(position_of(logits, 7).next_logprob, abs=1e-5)


def test_the_divergence_is_exact_over_all_tokens_and_a_lower_bound_over_some() -> None:
    first, second = random_logits(1), random_logits(1) + 0.3 * random_logits(2)
    exact = exact_divergence(first, second)
    assert difference(position_of(first, 0, 10_000), second, 0).divergence == pytest.approx(exact)
    bound = difference(position_of(first, 0), second, 0).divergence
    assert 0.9 * exact < bound < exact


def test_vocabularies_may_differ_in_padding() -> None:
    logits = random_logits(3)
    padded = np.concatenate([logits, np.full(64, -60, np.float32)])
    for top in (1024, 10_000):
        assert difference(position_of(padded, 5, top), logits, 5).divergence < 1e-6
        assert difference(position_of(logits, 5, top), padded, 5).divergence < 1e-6


def test_certain_and_impossible_tokens_give_numbers() -> None:
    certain, other = np.full(50, -3e38, np.float32), np.full(50, -3e38, np.float32)
    certain[3], other[4] = 3e38, 3e38
    found = difference(position_of(certain, 3), other, 3)
    assert math.isfinite(found.divergence)
    assert found.divergence > 100
    assert not found.has_same_top
    figure = language_figure([0.0], [found])
    assert QualityFigure.from_json(figure.to_json()) == figure


def test_a_figure_counts_only_what_was_compared() -> None:
    differences = [Difference(0.0, True, -1.0)] * 98 + [Difference(1.0, False, -1.0)] * 2
    figure = language_figure([-1.0] * 100 + [-50.0], differences, "why")
    assert figure.tokens == 100
    assert figure.kl_mean == pytest.approx(0.02)
    assert figure.kl_p99 == pytest.approx(1.0)
    assert figure.same_top_share == pytest.approx(0.98)
    assert figure.perplexity_source == figure.perplexity_result == pytest.approx(math.e)
    assert figure.is_measured
    assert not QualityFigure(reason="why").is_measured


def test_a_perplexity_is_finite() -> None:
    assert perplexity([math.log(0.25)] * 3) == pytest.approx(4)
    assert math.isfinite(perplexity([-1e6]))


def test_embeddings_are_compared_by_direction() -> None:
    vectors = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    same = embedding_figure(vectors, 3 * vectors)
    assert same.cosine_mean == pytest.approx(1)
    assert same.cosine_least == pytest.approx(1)
    turned = np.concatenate([vectors[:3], -vectors[3:]])
    found = embedding_figure(vectors, turned)
    assert found.cosine_mean == pytest.approx(0.5)
    assert found.cosine_least == pytest.approx(-1)
    assert embedding_figure(vectors, np.zeros_like(vectors)).cosine_mean == 0
    with pytest.raises(ValueError, match="dimensions"):
        embedding_figure(vectors, vectors[:, :4])


def test_unknown_fields_of_later_versions_are_left_out() -> None:
    text = replace(QualityFigure(), kl_mean=0.5).to_json().replace("}", ', "other": 1}')
    assert QualityFigure.from_json(text).kl_mean == 0.5


def test_distributions_come_back_from_their_file(tmp_path: Path) -> None:
    kept = [KeptText((1, 2, 3), [position_of(random_logits(n), n) for n in (1, 2)]),
            KeptText((9, 8)), KeptText((4, 5), [position_of(random_logits(3, 20), 3)])]  # fmt: skip
    write_texts(tmp_path / "kept.npz", kept)
    found = read_texts(tmp_path / "kept.npz")
    # What has no positions is left out.
    assert [each.token_ids for each in found] == [(1, 2, 3), (4, 5)]
    for expected, read in zip([kept[0], kept[2]], found, strict=True):
        for first, second in zip(expected.positions, read.positions, strict=True):
            assert np.array_equal(first.top_ids, second.top_ids)
            assert np.array_equal(first.top_logprobs, second.top_logprobs)
            assert (first.rest_logprob, first.next_logprob) == (
                second.rest_logprob, second.next_logprob)  # fmt: skip


def test_the_text_has_several_kinds_and_says_where_it_comes_from() -> None:
    texts = packaged_texts()
    assert [each.kind for each in texts] == ["prose", "code", "other scripts", "dialogue"]
    assert all(len(each.text) > 400 for each in texts)
    assert not any("CC0" in each.text or "===" in each.text for each in texts)
    lines = lines_of(texts, 16, 100)
    assert len(lines) == 16
    assert all(20 < len(line) <= 100 for line in lines)
