"""Tests of grammars that users send, in GBNF and Lark."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from backends.grammar.compiler import output_constraint
from backends.prompt.chat_format import ChatFormat
from core.errors import RequestError
from core.types import ChatMessage, ChatPrompt, GrammarOutput, Tool

TOKENIZER = LLTokenizer("byte")
ARITHMETIC = 'root ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" root ")"'
JSON = r"""
# JSON objects
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [0-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
PATCH = r"""
start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: "+" /(.*)/ LF

%import common.LF
"""


def matcher(lark: str) -> LLMatcher:
    made = LLMatcher(TOKENIZER, LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def allows(grammar: str, text: str) -> bool:
    made = matcher(output_constraint(GrammarOutput(grammar, "grammar")).grammar)
    count = made.try_consume_tokens(TOKENIZER.tokenize_bytes(text.encode()))
    return count == len(text.encode()) and made.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "yes" | "no"', "no", "nope"),
        (ARITHMETIC, "1+(22*3)-4", "1+"),
        (JSON, '{"a": [1, {"b":"\\u00e9\\/"}], "c": true}', '{"a": [1, ]}'),
        ('root ::= [0-9]{2,3} "-" [^x\\n]+ "x"', "12-abx", "1-abx"),
        ("root ::= .{3}", "a\né", "ab"),
        ("root ::= [a]{,2} [b]{2,} [c]{2}", "abbbcc", "aaabbcc"),
        (r'root ::= [\u4e00-\u9fff]+ "\u00e9\x41\U0001F600\n\""', '世éA😀\n"', "aé"),
        (r'root ::= "]" [\]/^-]+', "]]/^-", "]a"),
        ('root ::= a? "x"\na ::= "(" a ")" | "y"', "((y))x", "(y"),
        ('root ::= "a"\n  | "b"\n\n# end', "b", "c"),
        ('root ::= [a-z]* "end"', "abend", "aben"),
        ('root ::= ""', "", "a"),
        ('Root-1 ::= "a"\nroot ::= Root-1 Root-1', "aa", "a"),
        ('root ::= item+\r\nitem ::= "- " [^\\r\\n]+ "\\n"', "- a\n- b\n", "a\n"),
        ('start: "a" | "b"', "b", "c"),
        ('start: NUMBER ("," NUMBER)*\n%import common.NUMBER\n', "1,22", "1,"),
        (PATCH, "*** Begin Patch\n+abc\n*** End Patch", "+abc"),
        ('start: answer rule1\nanswer: "start"\nrule1: /start/', "startstart", "start"),
        ('// start: x\nstart: "//" A\nA: /[^\\/"]+/ // end', "//ab", "/ab"),
        ('%llguidance {}\n?start: %json {"type": "boolean"}', "true", "1"),
    ],
)
def test_an_answer_matches_the_grammar(grammar: str, good: str, bad: str) -> None:
    assert allows(grammar, good)
    assert not allows(grammar, bad)


TEXT = st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=5)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(0, 999) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_the_json_grammar_of_llama_cpp_allows_what_is_json(value: Any) -> None:
    assert allows(JSON, json.dumps({"a": value}))


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\\b", "\\x08").replace("\\f", "\\x0c")


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4)
)
def test_every_text_may_be_a_literal(texts: list[str]) -> None:
    grammar = "root ::= " + " | ".join(literal(each) for each in texts)
    for text in texts:
        assert allows(grammar, text)


@given(st.characters(exclude_categories=["Cs"]), st.characters(exclude_categories=["Cs"]))
def test_every_character_may_stand_in_a_class(one: str, other: str) -> None:
    escaped = f"\\U{ord(one):08x}"
    assert allows(f"root ::= [{escaped}x]", one)
    assert allows(f"root ::= [^{escaped}]", other) == (one != other)


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        ("root ::= missing", "'missing' is not defined"),
        ('a ::= "b"', "'root' is not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2: the rule 'root' is defined twice"),
        ('root ::= "a', "not closed"),
        ("root ::= [a", "not closed"),
        ("root ::= []", "empty"),
        ("root ::= [b-a]", "must go up"),
        ('root ::= ("a"', "not closed"),
        ('root ::= "a")', "not opened"),
        ('root ::= "\\q"', "\\q is not an escape"),
        (r'root ::= "\ud83d"', "not a character"),
        ('root ::= "a"{3,2}', "must go up"),
        ('root ::= "a"{99999}', "at most 10000"),
        ('root ::= "a"{}', "must be {m}"),
        ("root ::= <[12]>", "'<' is not supported"),
        ("root ::= " + "(" * 100_0 + '"a"' + ")" * 100_0, "deeper than 50"),
        ('x\nroot ::= "a"', "line 1"),
        ("hello", "no rule named root"),
        ("answer: /a/", "no rule named root"),
    ],
)
def test_what_is_no_grammar_is_refused(grammar: str, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        output_constraint(GrammarOutput(grammar, "guided_grammar"))
    assert caught.value.param == "guided_grammar"
    assert re.search(re.escape(problem), caught.value.message), caught.value.message
    assert len(caught.value.message) < 300


@given(st.text(st.sampled_from('root ::=ab|"[]()*+?{}1,.\\^-#\n'), max_size=40))
def test_no_text_makes_the_reader_fail(text: str) -> None:
    try:
        constraint = output_constraint(GrammarOutput("root ::= " + text, "grammar"))
    except RequestError:
        return
    assert constraint.grammar


def test_a_long_grammar_is_read_in_linear_time() -> None:
    rules = [f'r{i} ::= "a" r{i + 1} | "b"' for i in range(3000)]
    grammar = "\n".join(["root ::= r0", *rules, 'r3000 ::= "c"'])
    assert output_constraint(GrammarOutput(grammar, "grammar")).grammar


@pytest.mark.parametrize("grammar", [ARITHMETIC, 'start: "1" | "2" start'])
def test_a_grammar_stands_beside_reasoning_and_tools(grammar: str) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {}, "additionalProperties": False})
    form = ChatFormat("{{ tools }}<tool_call><think>", "", "")
    prompt = ChatPrompt((ChatMessage("user", "hi"),), tools=(tool,))
    constraint = form.constraint(prompt, GrammarOutput(grammar, "grammar"), "<think>")
    assert constraint is not None
    assert not constraint.is_cheap
    lines = [
        f"marker{i}: {json.dumps(text)}\nuntil{i}[suffix={json.dumps(text)}]: /(.|\\n)*/"
        for i, text in enumerate(constraint.markers)
    ]
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for answer, is_good in (("1", True), (call, True), ("x", False)):
        made = matcher("\n".join([constraint.grammar, *lines, ""]))
        data = f"hm</think>{answer}".encode()
        count = made.try_consume_tokens(TOKENIZER.tokenize_bytes(data))
        assert (count == len(data) and made.is_accepting()) == is_good
