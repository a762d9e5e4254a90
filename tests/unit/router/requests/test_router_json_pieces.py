"""Large bodies are scanned and parsed in pieces, with the same result as parsed whole."""

import json
from typing import Any

import jiter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import RequestError
from router.requests import json_pieces, json_scan
from router.requests.json_pieces import parse_json
from router.requests.json_scan import CLOSE, COLON, COMMA, OPEN_ARRAY, OPEN_OBJECT, scan
from router.requests.limits import MAX_DEPTH, MAX_NUMBER_CHARACTERS

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.text(
    '\\"[]{},:\n1', max_size=8
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=8,
)
bodies = st.dictionaries(texts, values | st.lists(values, max_size=20), max_size=6)
fragments = st.lists(
    st.sampled_from(
        [b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"1", b" ", b'"a"', b"[1]", b'{"b":2}']
    ),
    max_size=30,
).map(b"".join)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every body as large, and make chunks and pieces a few bytes long."""
    monkeypatch.setattr(json_pieces, "is_small", lambda body: not body)
    monkeypatch.setattr(json_pieces, "_PIECE_BYTES", 16)
    monkeypatch.setattr(json_pieces, "_PIECE_MARKS", 4)
    monkeypatch.setattr(json_scan, "_CHUNK_BYTES", 5)
    monkeypatch.setattr(json_scan, "has_long_digits", lambda body: bool(body))


def structure(body: bytes) -> list[tuple[int, int]]:
    """Return offset and code of each structural character, found one byte at a time."""
    codes = {b"[": OPEN_ARRAY, b"{": OPEN_OBJECT, b"]": CLOSE, b"}": CLOSE, b",": COMMA}
    codes[b":"] = COLON
    found = []
    is_inside = False
    position = 0
    while position < len(body):
        one = body[position : position + 1]
        if one == b"\\":
            position += 2 if body[position + 1 : position + 2] in (b'"', b"\\") else 1
            continue
        if one == b'"':
            is_inside = not is_inside
        elif not is_inside and one in codes:
            found.append((position, codes[one]))
        position += 1
    return found


@pytest.mark.usefixtures("tiny")
@settings(max_examples=50)
@given(bodies, st.booleans(), st.booleans())
def test_pieces_give_what_the_whole_gives(body: Any, ascii_only: bool, indented: bool) -> None:
    text = json.dumps(body, ensure_ascii=ascii_only, indent=2 if indented else None).encode()
    assert parse_json(text) == jiter.from_json(text)


@pytest.mark.usefixtures("tiny")
@given(fragments)
def test_what_is_no_json_in_one_piece_is_none_in_several(inner: bytes) -> None:
    for body in (b'{"a":[' + inner + b"]}", b'{"a":' + inner + b"}", inner):
        try:
            whole = jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
        except ValueError:
            whole = None
        if isinstance(whole, dict):
            assert parse_json(body) == whole
        else:
            with pytest.raises(RequestError):
                parse_json(body)


@pytest.mark.usefixtures("tiny")
@given(fragments | st.binary())
def test_the_scan_finds_the_structure_of_any_bytes(body: bytes) -> None:
    marks = scan(body)
    assert list(zip(marks.positions.tolist(), marks.codes.tolist(), strict=True)) == structure(body)


@pytest.mark.parametrize("sign", [b"", b"-"])
def test_long_numbers_are_found_in_bodies_of_any_size(sign: bytes) -> None:
    digits = b"1" * (MAX_NUMBER_CHARACTERS - len(sign) - 2)
    for padding in (b"", b'"b":"%s",' % (b"x" * 70_000), b'"b":[%s1],' % (b"1," * 40_000)):
        good = b"{" + padding + b'"a":' + sign + b"0." + digits + b"}"
        assert parse_json(good)["a"] != 0
        with pytest.raises(RequestError, match=r"1,025 characters in one number"):
            parse_json(good.replace(b"0.1", b"0.11"))
    # Text may hold as many digits as it likes.
    assert len(parse_json(b'{"a":"' + b"1" * 100_000 + b'"}')["a"]) == 100_000


def test_depth_is_counted_alike_in_small_and_large_bodies() -> None:
    for padding in ("", "x" * 70_000):
        inner = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
        assert parse_json(f'{{"b":"{padding}","a":{inner}}}'.encode())
        deeper = inner.replace("[]", "[" * 5 + "]" * 5)
        with pytest.raises(RequestError, match=r"nesting|recursion"):
            parse_json(f'{{"b":"{padding}","a":{deeper}}}'.encode())


def test_an_error_in_a_piece_names_the_place_and_stays_short() -> None:
    body = b'{"a\xe2\x80\xae":[' + b"1," * 50_000 + b"nope,1]}"
    with pytest.raises(RequestError) as raised:
        parse_json(body)
    assert r"a\u202e[" in raised.value.message
    assert len(raised.value.message) < 300


@pytest.mark.parametrize("name", ["messages", "input", "tools", "output"])
def test_a_list_that_is_too_long_is_refused_before_it_is_parsed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []

    def parse(text: bytes, where: str = "") -> Any:
        del where
        parsed.append(len(text))
        return jiter.from_json(text)

    monkeypatch.setattr(json_pieces, "_parse", parse)
    body = json.dumps({"model": "m", name: [{"role": "user"}] * 60_000}).encode()
    with pytest.raises(RequestError, match=f"{name}: has 60,000 items; at most") as caught:
        parse_json(body)
    assert caught.value.param == name
    assert sum(parsed) < 100


@pytest.mark.parametrize("name", ["input", "prompt", "others"])
def test_token_ids_and_unknown_lists_may_be_longer(name: str) -> None:
    body = json.dumps({name: list(range(60_000))}).encode()
    assert len(parse_json(body)[name]) == 60_000


def test_what_was_parsed_before_an_error_is_freed_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed: list[list[Any]] = []
    original = json_pieces.free

    def free(values: Any) -> None:
        kept = [value for value in values if isinstance(value, list)]
        freed.extend(kept)
        assert any(kept)
        original(kept)

    monkeypatch.setattr(json_pieces, "free", free)
    good = b",".join([b'{"a":1}'] * 20_000)
    with pytest.raises(RequestError, match="not valid JSON"):
        parse_json(b'{"first":[' + good + b'],"second":[' + good + b",{]]}")
    assert len(freed) >= 2
    assert not any(freed)
