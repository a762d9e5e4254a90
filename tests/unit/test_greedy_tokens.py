"""What the tests' own comparison of greedy tokens accepts on Linux and on macOS."""

import sys

import pytest

from tests.requests import METAL_TIE, GreedyTokens, rounding

# The second token is nearly as likely at place 1, and unlikely elsewhere.
WANTED = GreedyTokens([5, 6, 7, 8], [15, 16, 17, 18], [2.0, METAL_TIE / 2, 3.0, METAL_TIE])
OTHER_TIE, CUT = [5, 16, 99], [5, 6, 7]


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize(
    "found",
    # A token far behind, the second one at a tie's limit, one that is neither, a part, one more.
    [[15, 6, 7, 8], [5, 6, 7, 18], [5, 99, 7, 8], CUT, [5, 6, 7, 8, 9], []],
)
def test_other_tokens_are_wrong_on_every_system(
    system: str, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert WANTED == [5, 6, 7, 8]
    assert found != WANTED
    assert [found] != [WANTED]


@pytest.mark.parametrize(("system", "is_equal"), [("linux", False), ("darwin", True)])
def test_a_near_tie_may_come_in_another_order_on_metal_only(
    system: str, is_equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert (OTHER_TIE == WANTED) is is_equal
    assert (OTHER_TIE != WANTED) is not is_equal
    assert ([OTHER_TIE] == [WANTED]) is is_equal
    assert rounding(1e-3, metal=0.25) == (0.25 if is_equal else 1e-3)


def test_the_first_tokens_are_compared_alone() -> None:
    assert WANTED.first(3) == CUT
    assert WANTED.first(2) != CUT
