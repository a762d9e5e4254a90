"""Templates of Ollama's models, as chat templates that render what Ollama sends to the model."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.prompt.chat_format import ChatFormat
from backends.prompt.go_templates import to_jinja
from backends.prompt.named_templates import reads_tools
from backends.prompt.template_worker import compile_template
from core.types import ChatMessage, ChatPrompt, JsonValue, Tool, ToolCall

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
WITH_MESSAGES = """{{- if or .System .Tools }}<|system|>
{{- if .System }}
{{ .System }}
{{- end }}
{{- range .Tools }}
{{ . }}
{{- end }}<|end|>
{{- end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<|user|>
{{ .Content }}
{{- else if eq .Role "assistant" }}<|assistant|>
{{- if .Content }}{{ .Content }}{{ end }}
{{- range .ToolCalls }}<tool_call>{"name": "{{ .Function.Name }}", "arguments": {{
  .Function.Arguments }}}</tool_call>
{{- end }}
{{- else if eq .Role "tool" }}<|tool|>{{ .Content }}
{{- end }}
{{- if and (ne .Role "assistant") $last }}<|assistant|>
{{ end }}
{{- end }}"""


def rendered(template: str, *messages: tuple[str, str], **variables: JsonValue) -> str:
    made = to_jinja(template)
    assert made is not None
    said: list[JsonValue] = [{"role": role, "content": text} for role, text in messages]
    return compile_template(made).render(messages=said, **variables)


def test_a_template_of_one_turn_is_repeated_and_ends_before_the_answer() -> None:
    one = rendered(CHATML, ("user", "Hi"))
    assert one == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    several = rendered(
        CHATML, ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "a"),
        ("user", "b"),
    )  # fmt: skip
    assert several == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\na\n\nb<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # An answer that has begun is continued.
    begun = rendered(CHATML, ("user", "Hi"), ("assistant", "He"))
    assert begun.endswith("<|im_start|>assistant\nHe")


def test_an_answer_is_appended_where_the_template_has_none() -> None:
    template = "[INST] {{ .System }} {{ .Prompt }} [/INST]"
    text = rendered(template, ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert text == "[INST]  a [/INST]b[INST]  c [/INST]"


def test_what_follows_the_answer_is_cut_inside_branches_too() -> None:
    template = "{{ if .Prompt }}U{{ .Prompt }}A{{ .Response }}X{{ else }}Y{{ end }}Z"
    assert rendered(template, ("user", "q")) == "UqA"
    assert rendered(template, ("user", "q"), ("assistant", "r"), ("user", "s")) == "UqArXZUsA"


def test_a_template_of_whole_conversations_is_rendered_once() -> None:
    tool: JsonValue = {"type": "function", "function": {"name": "f"}}
    text = rendered(WITH_MESSAGES, ("system", "Be kind."), ("user", "Hi"), tools=[tool])
    assert text == (
        '<|system|>\nBe kind.\n{"type": "function", "function": {"name": "f"}}<|end|>'
        "<|user|>\nHi<|assistant|>\n"
    )
    assert rendered(WITH_MESSAGES, ("user", "a"), ("assistant", "b"), ("user", "c")) == (
        "<|user|>\na<|assistant|>b<|user|>\nc<|assistant|>\n"
    )


@pytest.fixture
def chat() -> Iterator[ChatFormat]:
    made = ChatFormat(to_jinja(WITH_MESSAGES), "<s>", "</s>")
    yield made
    made.close()


def test_tools_calls_and_results_reach_the_template(chat: ChatFormat) -> None:
    call = ToolCall("1", "get", '{"city": "Bern"}')
    prompt = ChatPrompt(
        (
            ChatMessage("user", "Weather?"),
            ChatMessage("assistant", "", tool_calls=(call,)),
            ChatMessage("tool", "rain", tool_call_id="1"),
        ),
        tools=(Tool("get", "Weather of a city."),),
    )
    assert reads_tools(to_jinja(WITH_MESSAGES) or "")
    text = chat.render(prompt)
    assert '"name": "get", "description": "Weather of a city."' in text
    assert '<tool_call>{"name": "get", "arguments": {"city": "Bern"}}</tool_call>' in text
    assert text.endswith("<|tool|>rain<|assistant|>\n")


def test_conversations_of_all_kinds_reach_a_template_of_one_turn() -> None:
    chat = ChatFormat(to_jinja(CHATML), "<s>", "</s>")
    call = ToolCall("1", "get", '{"city": "Bern"}')
    try:
        plain = (ChatMessage("system", "Be kind."), ChatMessage("user", "Hi <|im_end|>"))
        assert chat.render(ChatPrompt(plain)) == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        with_tools = (
            ChatMessage("user", "Weather?"),
            ChatMessage("assistant", "", tool_calls=(call,)),
            ChatMessage("tool", "rain", tool_call_id="1"),
        )
        text = chat.render(ChatPrompt(with_tools, tools=(Tool("get", "Weather of a city."),)))
        for part in ("Weather of a city.", "Weather?", '"city": "Bern"', "rain"):
            assert part in text
        begun = (ChatMessage("user", "Hi"), ChatMessage("assistant", "He"))
        continued = chat.render(ChatPrompt(begun, continues_answer=True))
        assert continued.endswith("<|im_start|>assistant\nHe")
    finally:
        chat.close()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ .Prompt }} {{- /* a note */ -}} x", "qx"),
        ("a  {{- .Prompt -}}  b", "aqb"),
        ("a {{.Prompt}}-b", "a q-b"),
        ('{{ if eq .Prompt "q" "r" }}1{{ else if .System }}2{{ else }}3{{ end }}', "1"),
        ('{{ if and .Prompt (not .System) }}1{{ end }}{{ if ne .Prompt "q" }}2{{ end }}', "1"),
        ('{{ if gt (len .Prompt) 0 }}1{{ end }}{{ .Prompt | json }}{{ "a\\"\\n" }}', '1"q"a"\n'),
        ("{{ `{% raw %}` }}{{ .Prompt }}", "{% raw %}q"),
        ("{% set x = 1 %}{# no #}{{ .Prompt }}\\ '\" é🎈", "{% set x = 1 %}{# no #}q\\ '\" é🎈"),
        ("{{ $x := .Prompt }}{{ with .Prompt }}{{ . }}{{ end }}{{ $x }}", "qq"),
        ("{{ with .System }}{{ . }}{{ else }}{{ .Prompt }}{{ end }}", "q"),
        ("{{ if .Think }}t{{ end }}{{ if .IsThinkSet }}s{{ end }}{{ .Prompt }}", "tq"),
    ],
)
def test_syntax(template: str, expected: str) -> None:
    assert rendered(template + "{{ .Response }}", ("user", "q")) == expected


def test_variables_of_loops_keep_what_was_assigned_in_them() -> None:
    template = (
        '{{ $seen := "no" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $seen = .Content }}'
        "{{ end }}{{ end }}{{ $seen }}"
    )
    assert rendered(template, ("user", "a"), ("assistant", "b"), ("user", "c")) == "c"


@pytest.mark.parametrize(
    "template",
    [
        "", "no variable", "{{ .Response }}", "{{ .Prompt", "{{ .Prompt }}{{ end }}",
        "{{ if .Prompt }}", "{{ else }}{{ .Prompt }}", "{{ .Prompt }}{{ .Unheard }}",
        "{{ .Prompt }}{{ printf \"%d\" 1 }}", "{{ template \"x\" }}{{ .Prompt }}",
        "{{ range $k, $v := .Prompt }}{{ end }}", "{{ .Prompt }}{{ $none }}",
        "{{ .Prompt }}{{ $none = 1 }}", "{{ .Prompt | }}", "{{ (.Prompt }}", "{{ .Prompt.x }}",
        "{{ .Messages.__class__ }}", "{{ range .Messages }}{{ ._x }}{{ end }}",
        "{{ .Prompt }}{{ \"\\q\" \"x\" }}", "{{ if .Prompt }}a{{ else }}b{{ else }}c{{ end }}",
        "{{ .Prompt }}{{ break }}", "{{ if .Prompt }}" * 60 + "{{ end }}" * 60,
        "{{ .Prompt }}" + "x" * 70_000,
        "{{ " + "(" * 5000 + ".Prompt" + ")" * 5000 + " }}",
    ],
)  # fmt: skip
def test_what_has_no_equivalent_is_not_translated(template: str) -> None:
    assert to_jinja(template) is None


_PARTS = ("{{", "}}", "{%", "%}", "{#", "- ", " -", " ", "\n", "'", '"', "`", "\\", ".Prompt",
          ".Messages", ".Tools", ".System", ".Response", ".", "$", "$x", ":=", "=", "if", "else",
          "end", "range", "with", "eq", "and", "not", "len", "slice", "json", "(", ")", "|", "1",
          ".Role", "{{ break }}", "{{ end }}", "{{ if .Prompt }}",
          "{{ range .Messages }}")  # fmt: skip


@given(st.lists(st.sampled_from(_PARTS), max_size=25))
def test_any_text_gives_a_template_that_compiles_or_none(parts: Sequence[str]) -> None:
    made = to_jinja("{{ .Prompt }}" + "".join(parts))
    if made is not None:
        compile_template(made)
