"""Half surrogate pairs in bodies become U+FFFD, in every API, and nothing else changes."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RequestError
from core.text import well_formed
from router.requests import json_pieces
from router.requests.json_pieces import parse_json
from router.requests.surrogates import without_lone_surrogates

units = st.lists(
    st.sampled_from(["\ud83d", "\ude00", "\ud800", "\udfff", "a", "\\", "u", '"', "é", "😀", "\n"]),
    max_size=12,
).map("".join)


@given(units, st.booleans())
def test_lone_surrogates_become_the_replacement_character(text: str, in_pieces: bool) -> None:
    # The filler makes the body one that is parsed in pieces.
    filler = ["x" * 70_000] if in_pieces else []
    body = json.dumps({"messages": [*filler, text, "end"]}).encode("ascii")
    assert parse_json(body)["messages"][-2:] == [well_formed(text), "end"]


@given(units)
def test_surrogates_written_as_bytes_become_it_too(text: str) -> None:
    body = json.dumps({"a": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert len(without_lone_surrogates(body)) == len(body)
    assert parse_json(body)["a"] == re.sub("[\ud800-\udfff]", "\ufffd", text)


@given(st.binary(max_size=40))
def test_other_bytes_are_refused_as_before(data: bytes) -> None:
    if not data.startswith(b'"'):
        with pytest.raises(RequestError):
            parse_json(b'{"a":' + data + b",}")


@pytest.mark.parametrize("body", [rb'{"a":"\ud83"}', rb'{"a":"\ud83d}', b'{"a":"\x00\\ud83d"}'])
def test_half_an_escape_is_no_json(body: bytes) -> None:
    with pytest.raises(RequestError, match="not valid JSON"):
        parse_json(body)


def test_a_body_without_surrogates_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[bytes] = []
    monkeypatch.setattr(json_pieces, "without_lone_surrogates", searched.append)
    assert parse_json(b'{"a":"\\ud83d\\ude00"}') == {"a": "😀"}
    assert not searched
