"""Whatever lies in a history, it is adapted to templates with rules of their own."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.prompt.call_ids import with_short_call_ids
from backends.prompt.call_results import with_paired_results, with_single_calls
from backends.prompt.chat_format import ChatFormat
from core.errors import BrokenModel, TemplateRefused
from core.types import ChatMessage, ChatPrompt, Tool, ToolCall

Make = Callable[[str], ChatFormat]

NAMED_ARGUMENTS = (
    "{% for t in tools or [] %}<{{ t.function.name }}"
    "{% for name, p in t.function.parameters.properties.items() %} {{ name + ':' + p.type }}"
    "{{ '#' + p.description }}{% endfor %}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}"
    "{% endfor %}>{% endfor %}{% endfor %}"
)
NINE = (
    "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have nine letters or digits') }}{% endif %}<{{ c.id }}>{% endfor %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids have nine letters or digits') }}{% endif %}<{{ m.tool_call_id }}>"
    "{% endif %}{% endfor %}"
)
ONE_CALL = (
    "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}<{{ m.tool_calls[0].function.name }}>"
    "{% endif %}{% endfor %}"
)
PAIRED = (
    "{{ tools | tojson }}{% set seen = namespace(calls=0) %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if seen.calls < 1 %}{{ raise_exception('no call') }}{% endif %}"
    "{% set seen.calls = seen.calls - 1 %}{% elif seen.calls %}{{ raise_exception('no result') }}"
    "{% endif %}{% if m.tool_calls %}{% set seen.calls = m.tool_calls | length %}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if seen.calls %}{{ raise_exception('no result') }}{% endif %}"
)
SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must be first') }}{% endif %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}{{ tools | tojson }}"
)
NEEDS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('no user query') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools | tojson }}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant, not ' + m.role) }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}{% set _ = tools %}"
)
SHOWN = (
    "{{% for m in messages %}}{{{{ m.content }}}}{{% if m.content == 'bad' %}}{}{{% endif %}}"
    "{{% endfor %}}"
)
STRICT = {
    "named": NAMED_ARGUMENTS,
    "nine": NINE,
    "one": ONE_CALL,
    "paired": PAIRED,
    "system": SYSTEM_FIRST,
    "user": NEEDS_USER,
    "alternating": ALTERNATING,
}


def said(role: str, text: str = "x", **more: object) -> ChatMessage:
    return ChatMessage(role, text, **more)  # type: ignore[arg-type]


def called(*ids: str, arguments: str = "{}") -> ChatMessage:
    return said("assistant", "", tool_calls=tuple(ToolCall(i, "f", arguments) for i in ids))


def result(call_id: str | None, text: str = "r") -> ChatMessage:
    return said("tool", text, tool_call_id=call_id)


HISTORIES = {
    "no user": (said("assistant"),),
    "system alone": (said("system"),),
    "two systems": (said("system"), said("system"), said("user")),
    "late system": (said("user"), said("assistant"), said("system", "late"), said("user")),
    "last system": (said("user"), said("system", "late")),
    "two users": (said("user"), said("user"), said("assistant"), said("assistant"), said("user")),
    "interrupted": (said("user"), said("assistant", ""), said("user")),
    "two calls": (said("user"), called("a", "b"), result("b"), result("a"), said("user")),
    "lone result": (said("user"), result("gone"), said("user")),
    "lone call": (said("user"), called("a"), said("user")),
    "last call": (said("user"), called("a", "b"), result("a")),
    "late result": (said("user"), called("a"), said("user"), result("a"), said("user")),
    "no id": (said("user"), called("", ""), result(None), result(""), said("user")),
    "broken": (said("user"), called("a", arguments='{"b'), result("a"), said("user")),
    "list": (said("user"), called("a", arguments="[1]"), result("a")),
    "text": (said("user"), called("a", arguments='"Rome"'), result("a")),
    "null": (said("user"), called("a", arguments="null"), result("a")),
}
TOOLS = (
    Tool("f", "", {"type": "object", "properties": {"a": True, "b": {"type": ["string", "null"]}}}),
    Tool("g"),
    Tool("h", "", {"type": "object"}),
    Tool("i", "", {"anyOf": [{"type": "object"}]}),
)


@pytest.fixture(scope="module")
def chat() -> Iterator[Make]:
    made: dict[str, ChatFormat] = {}

    def make(template: str) -> ChatFormat:
        return made.setdefault(template, ChatFormat(template, "<s>", "</s>"))

    yield make
    for form in made.values():
        form.close()


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("template", STRICT.values(), ids=STRICT)
def test_a_history_never_locks_a_session(
    chat: Make, template: str, history: tuple[ChatMessage, ...]
) -> None:
    """Every text of the history is in the prompt of every template."""
    text = chat(template).render(ChatPrompt(history, tools=TOOLS))
    for message in history:
        assert message.content in text


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Rome"}', "<f city=Rome>"),
        ("", "<f>"),
        ("  ", "<f>"),
        ("null", "<f>"),
        ('""', "<f>"),
        (json.dumps('{"city": "Rome"}'), "<f city=Rome>"),
        ('{"city": "Ro', '<f arguments={"city": "Ro>'),
        ('["Rome"]', '<f arguments=["Rome"]>'),
        ('"Rome"', '<f arguments="Rome">'),
        ("17", "<f arguments=17>"),
        ('{"city": "a\\ud800"}', "<f city=a\ufffd>"),
        (json.dumps('{"city": "a\\ud800"}'), "<f city=a\ufffd>"),
        ('{"city": "\\ud83d\\ude00"}', "<f city=\U0001f600>"),
        ("[" * 500 + "]" * 500, "<f arguments=" + "[" * 500),
        (json.dumps("[" * 500 + "]" * 500), "<f arguments=" + '"' + "[" * 500),
    ],
)
def test_arguments_are_an_object_for_a_template_that_walks_through_them(
    chat: Make, arguments: str, shown: str
) -> None:
    history = (said("user"), called("a", arguments=arguments), result("a"))
    assert shown in chat(NAMED_ARGUMENTS).render(ChatPrompt(history))


def test_what_a_template_accepts_is_not_changed(chat: Make) -> None:
    history = (said("user"), called("call_1", "call_2", arguments="[1]"), result("call_2"))
    form = chat("{% for m in messages %}{{ m | tojson }}{% endfor %}{% set _ = tools %}")
    text = form.render(ChatPrompt(history))
    assert '"id": "call_1"' in text
    assert '"arguments": [1]' in text


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_tools_of_any_schema_are_shown_by_a_template_that_reads_properties(
    chat: Make, tool: Tool
) -> None:
    prompt = ChatPrompt((said("user", "hi"),), tools=(tool,))
    assert f"<{tool.name}" in chat(NAMED_ARGUMENTS).render(prompt)


def test_only_the_step_that_helps_is_applied(chat: Make) -> None:
    """Two users in a row stay as they are where only the ids are refused."""
    history = (said("user", "a"), said("user", "b"), called("call_1"), result("call_1", "r"))
    text = chat(NINE).render(ChatPrompt(history))
    assert re.fullmatch(r"null\[user\]a\[user\]b\[assistant\]<([A-Za-z0-9]{9})>\[tool\]r<\1>", text)


def test_the_next_turn_begins_with_this_ones_prompt(chat: Make) -> None:
    """Prefix reuse depends on it, with every template that needs an adaptation."""
    turns = (
        said("system"), said("user"), called("call_1", "call_2"), result("call_1"),
        result("call_2"), said("assistant"), said("user"),
    )  # fmt: skip
    longer = (*turns, called("call_3"), result("call_3"), said("assistant"), said("user"))
    for name in ("nine", "one", "paired", "alternating"):
        form = chat(STRICT[name].replace("{{ tools | tojson }}", "{% set _ = tools %}"))
        assert form.render(ChatPrompt(longer)).startswith(form.render(ChatPrompt(turns))), name


def test_a_refusal_that_nothing_helps_has_the_templates_words(chat: Make) -> None:
    template = SHOWN.format("{{ raise_exception('not bad') }}")
    with pytest.raises(TemplateRefused, match=r"^not bad$") as caught:
        chat(template).render(ChatPrompt((said("user", "bad"),)))
    assert (caught.value.status, caught.value.code) == (400, "template_refused")


def test_an_error_that_only_some_messages_cause_is_the_requests_fault(chat: Make) -> None:
    template = SHOWN.format("{{ {}.a.b }}")
    with pytest.raises(TemplateRefused, match="has no attribute"):
        chat(template).render(ChatPrompt((said("user", "bad"),)))


def test_a_template_that_always_fails_is_a_broken_model(chat: Make) -> None:
    with pytest.raises(BrokenModel, match="has no attribute"):
        chat("{{ {}.a.b }}").render(ChatPrompt((said("user"),)))


@given(st.lists(st.one_of(st.text(max_size=12), st.just("A" * 9)), max_size=12))
def test_rewritten_ids_stay_distinct_and_consistent(ids: list[str]) -> None:
    history = tuple(m for i in ids for m in (called(i), result(i)))
    rewritten = with_short_call_ids(history)
    new = [m.tool_calls[0].id for m in rewritten[::2]]
    assert new == [m.tool_call_id for m in rewritten[1::2]]
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", each) for each in new)
    assert len(set(new)) == len(set(ids))
    assert with_short_call_ids(rewritten) == rewritten


def test_ids_that_collide_after_rewriting_are_told_apart() -> None:
    (taken,) = with_short_call_ids((called("call_1"),))
    history = (called(taken.tool_calls[0].id), called("call_1"))
    first, second = with_short_call_ids(history)
    assert first == history[0]
    assert first.tool_calls[0].id != second.tool_calls[0].id


MESSAGES = st.lists(
    st.one_of(
        st.sampled_from(["user", "assistant", "system"]).map(said),
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda ids: called(*ids)),
        st.sampled_from(["a", "b", "c", "", None]).map(result),
    ),
    max_size=10,
)


@given(MESSAGES)
def test_calls_and_results_are_paired_one_by_one(history: list[ChatMessage]) -> None:
    single = with_single_calls(with_paired_results(history))
    assert all(len(message.tool_calls) < 2 for message in single)
    for before, after in pairwise((*single, said("user"))):
        assert bool(before.tool_calls) == (after.role == "tool")
        if before.tool_calls:
            assert before.tool_calls[0].id == after.tool_call_id
    given_calls = [call for message in history for call in message.tool_calls]
    assert [call for message in single for call in message.tool_calls] == given_calls
    results = [message for message in history if message.role == "tool"]
    texts = [m for m in single if m.role == "tool" and "no result" not in m.content]
    assert len(texts) <= len(results)


def test_pairing_keeps_what_is_paired_already() -> None:
    history = (said("user"), called("a", "b"), result("a", "1"), result("b", "2"), said("user"))
    assert with_paired_results(history) == history
    swapped = (*history[:2], history[3], history[2], history[4])
    assert with_paired_results(swapped) == history
    (first,) = with_single_calls(history)[1].tool_calls
    assert first == history[1].tool_calls[0]
