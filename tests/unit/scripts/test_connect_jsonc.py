"""Tests of edits of JSON with comments: what is not changed stays byte for byte."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.clients.documents import changed_json, changed_jsonc
from router.clients.problems import ConnectError

ZED = """\
// Zed settings
{
  "theme": "One Dark", // mine
  /* models
     that I use */
  "language_models": {
    "openai_compatible": {
      "other": { "api_url": "https://x/v1", "available_models": [] } // kept
      // the end
    },
  },
  // "vim_mode": true,
}
"""


def add(data: Any) -> None:
    data["language_models"]["openai_compatible"]["mine"] = {"models": [{"name": "a"}]}


def set_theme(data: Any) -> None:
    data["theme"] = 'new "ö"'


def test_a_new_member_is_the_only_change_of_the_text() -> None:
    new = (
        '      "mine": {\n'
        '        "models": [\n          {\n            "name": "a"\n          }\n        ]\n'
        "      }\n"
    )
    assert changed_jsonc(ZED, add) == ZED.replace("} // kept\n", f"}}, // kept\n{new}")


def test_a_changed_value_keeps_its_comment() -> None:
    assert changed_jsonc(ZED, set_theme) == ZED.replace('"One Dark"', '"new \\"ö\\""')


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{}", '{\n  "theme": "x"\n}'),
        ('{"a": 1}', '{"a": 1, "theme": "x"}'),
        ('{"a": 1,}', '{"a": 1, "theme": "x",}'),
        ("{ // none\n}\n", '{ // none\n  "theme": "x"\n}\n'),
        ('{\n\t"a": [1, 2] // b\n}', '{\n\t"a": [1, 2], // b\n\t"theme": "x"\n}'),
        ('{\n    "a": 1,\n}', '{\n    "a": 1,\n    "theme": "x",\n}'),
        ('{"theme": "y" /* c */}', '{"theme": "x" /* c */}'),
        ('{"a": "// no comment, \\" }"}', '{"a": "// no comment, \\" }", "theme": "x"}'),
    ],
)
def test_each_layout_is_kept(before: str, after: str) -> None:
    assert changed_jsonc(before, lambda data: data.update(theme="x")) == after


def test_lists_are_extended_in_their_layout() -> None:
    def append(data: Any) -> None:
        data.append({"b": [1]})

    text = '[\n  { "a": 1 }, // first\n]\n'
    wanted = '[\n  { "a": 1 }, // first\n  {\n    "b": [\n      1\n    ]\n  },\n]\n'
    assert changed_jsonc(text, append, is_list=True) == wanted
    assert changed_jsonc("[1]", lambda data: data.append(2), is_list=True) == "[1, 2]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1\n "b": 2}', "a comma or } is missing, line 2"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ("{'a': 1}", "a key in double quotes"),
        ('{"a" 1}', "a colon is missing"),
        ('{"a": }', "no value"),
        ('{"a": 1.2.3}', "1.2.3 is not a valid value"),
        ('{"a": 1} {}', "more text"),
        ('{"a": [', "no value"),
        ("/* open", "no value"),
        ('{"a": ' * 200, "more than 100 levels"),
        ("[]", "not a JSON object"),
        ("// only a comment\n", "no value"),
        ('{"theme": [1]}', "unexpected form"),
        ('{"theme": {"a": 1}}', "unexpected form"),
    ],
)
def test_what_cannot_be_edited_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        changed_jsonc(text, lambda data: data.update(theme="x"))


def test_nothing_is_removed() -> None:
    with pytest.raises(ConnectError, match="'a' would have to be removed"):
        changed_jsonc('{"a": 1}', lambda data: data.pop("a"))
    with pytest.raises(ConnectError, match="of a list would have to be removed"):
        changed_jsonc("[1, 2]", lambda data: data.pop(), is_list=True)


def test_plain_json_keeps_the_layout_of_other_entries() -> None:
    text = '{\n  "env": {},\n  "allow": ["a", "b"],\n  "x": { "y": 1e3 }\n}\n'
    after = changed_json(text, lambda data: data["env"].update(A="1"))
    assert after == text.replace("{},", '{\n    "A": "1"\n  },')
    with pytest.raises(ConnectError, match="remove its comments"):
        changed_json(text + "// end\n", lambda data: data["env"].update(A="1"))


def test_true_and_one_are_different_values() -> None:
    assert changed_jsonc('{"a": 1}', lambda data: data.update(a=True)) == '{"a": true}'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(
    before=st.dictionaries(st.text(), VALUES),
    new=st.dictionaries(st.text(min_size=1), VALUES),
    indent=st.sampled_from([None, 2, "\t"]),
)
def test_any_object_gets_its_new_members(
    before: dict[str, Any], new: dict[str, Any], indent: Any
) -> None:
    added = {key: value for key, value in new.items() if key not in before}
    text = json.dumps(before, indent=indent, ensure_ascii=False)
    after = changed_jsonc(text, lambda data: data.update(added))
    assert json.loads(after) == before | added
    if before:
        # Everything but the closing brace begins the new text.
        assert after.startswith(text[:-1].rstrip())
