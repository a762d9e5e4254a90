"""Lark grammars of custom tools as regexes."""

import re

import pytest

from router.requests.lark_regex import lark_regex

LIMIT = 16_384
CODEX = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
PATCH = (
    "*** Begin Patch\n*** Add File: a.py\n+x\n+\n*** Update File: b.py\n@@ def f\n-a\n+b\n"
    "*** End of File\n*** End Patch"
)


def test_grammar_of_codex_accepts_patches_and_nothing_else() -> None:
    regex = lark_regex(CODEX, LIMIT)
    assert regex is not None
    assert re.fullmatch(regex, PATCH)
    assert not re.fullmatch(regex, PATCH.replace("*** Add File: a.py\n", ""))
    assert not re.fullmatch(regex, "*** Begin Patch\n*** End Patch")
    assert not re.fullmatch(regex, f"Here it is:\n{PATCH}")


@pytest.mark.parametrize(
    ("grammar", "matching", "other"),
    [
        ('start: "a" | "b" "c"', ["a", "bc"], ["ac", "b", ""]),
        ('start: "a"\n     | "b"', ["a", "b"], ["ab"]),
        ('start: "a"\n| "b"', ["a", "b"], ["ab"]),
        ('start: ["x"] A~2..3\nA: "a"i', ["xaa", "AaA"], ["a", "aaaa"]),
        ('start: A~2\nA: "a"', ["aa"], ["a", "aaa"]),
        ('start: "1.5" /[a-c]+/i', ["1.5B"], ["1x5b"]),
        (
            '// words\nstart: WORD " " INT\n%import common.WORD\n%import common.INT',
            ["ab 12"],
            ["a"],
        ),
        ("start: N\n%import common.INT -> N", ["7"], ["x"]),
        ("start: WORD INT\n%import common (WORD, INT)", ["a7"], ["7a"]),
        ('start: "a\\n\\"" /\\//', ['a\n"/'], ["a"]),
        ('?start.2: (inner "-")* inner\n!inner: "x" ("y" | "z")?', ["x", "xy-xz"], ["xy-", "-"]),
    ],
)
def test_forms_of_rules(grammar: str, matching: list[str], other: list[str]) -> None:
    regex = lark_regex(grammar, LIMIT)
    assert regex is not None
    assert [text for text in matching if not re.fullmatch(regex, text)] == []
    assert [text for text in other if re.fullmatch(regex, text)] == []


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "(" start ")" | "x"',
        'start: a\na: b\nb: a "x"',
        'start: "a"\n%ignore " "',
        "start: missing",
        'other: "a"',
        "start: /(?=a)b/",
        "start: /(a)\\1/",
        'start: ("a"',
        'start: "a")',
        "start: *",
        'start: "a',
        'start: {"a"}',
        "%import python.NAME\nstart: NAME",
        "",
        'start: "b".."a"',
        "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
        'start: "a"' + "?*" * 20_000,
        "start: a" + " a" * 20_000 + '\na: "' + "x" * 10_000 + '"',
        "start: r0\n" + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(40)) + 'r40: "xx"',
        "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(200)) + 'r200: "x"',
    ],
)
def test_what_has_no_regex_is_told(grammar: str) -> None:
    assert lark_regex(grammar, LIMIT) is None
