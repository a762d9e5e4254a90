"""Parts of an answer: the same however its text is cut, and nothing but white space lost."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.types import GenerationEvent, ReasoningDelta, TextDelta, ToolCallDelta
from router.answers.parts import Closed, Extended, Opened, PartAssembler
from tests.fakes import finished

ANSWERS = st.lists(
    st.one_of(
        st.builds(TextDelta, st.text("a \n", max_size=3)),
        st.builds(ReasoningDelta, st.text("b \n", max_size=3)),
        st.builds(
            lambda index, text: ToolCallDelta(index, f"call_{index}", "read", text),
            st.integers(0, 2),
            st.text("{}", max_size=2),
        ),
    ),
    max_size=12,
)


def shape(events: Sequence[GenerationEvent], *, keeps_empty: bool = False) -> list[tuple[str, str]]:
    parts = PartAssembler(keeps_empty=keeps_empty).push_all([*events, finished()])
    return [(part.kind, part.text) for part in parts]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([TextDelta("\n"), TextDelta("\nx "), TextDelta("\n")], [("text", "\n\nx \n")]),
        ([ReasoningDelta("\n\n"), TextDelta("x")], [("text", "x")]),
        (
            [TextDelta("x"), ToolCallDelta(0, "c", "f", "{"), TextDelta(" "),
             ToolCallDelta(0, arguments="}")],
            [("text", "x"), ("call", "{}")],
        ),
        (
            [ToolCallDelta(0, "c", "f"), ToolCallDelta(1, "d", "g", "{}")],
            [("call", ""), ("call", "{}")],
        ),
        ([TextDelta(" ")], []),
    ],
)  # fmt: skip
def test_parts_are_those_that_say_something(
    events: list[GenerationEvent], expected: list[tuple[str, str]]
) -> None:
    assert shape(events) == expected


def test_empty_answer_is_a_text_where_one_is_wanted() -> None:
    assert shape([], keeps_empty=True) == [("text", "")]
    assert shape([TextDelta(" ")], keeps_empty=True) == [("text", " ")]


@given(ANSWERS)
def test_steps_tell_each_part_once_and_in_turn(events: list[GenerationEvent]) -> None:
    assembler = PartAssembler(keeps_empty=True)
    texts: dict[int, str] = {}
    open_index: int | None = None
    for event in [*events, finished()]:
        for step in assembler.push(event):
            index = step.part.index
            match step:
                case Opened():
                    assert open_index is None
                    assert index == len(texts)
                    texts[index], open_index = "", index
                case Extended(text=text):
                    assert open_index == index
                    texts[index] += text
                case Closed():
                    assert open_index == index
                    open_index = None
    assert open_index is None
    assert list(texts.values()) == [part.text for part in assembler.parts]
    said = "".join(texts.values())
    for kind in (TextDelta, ReasoningDelta):
        whole = "".join(event.text for event in events if isinstance(event, kind))
        letter = "a" if kind is TextDelta else "b"
        assert said.count(letter) == whole.count(letter)
