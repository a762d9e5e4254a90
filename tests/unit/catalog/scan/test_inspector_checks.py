"""What a tokenizer must withstand before it is used."""

import json
from pathlib import Path

import pytest

from catalog.scan.inspector_checks import check_tokenizer
from core.errors import BrokenModel

WORD_LEVEL: dict[str, object] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"the": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
}


def write_tokenizer(folder: Path, **changes: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**WORD_LEVEL, **changes}))
    return path


def test_a_sound_tokenizer_passes(tmp_path: Path) -> None:
    check_tokenizer(write_tokenizer(tmp_path))


def test_a_tokenizer_with_a_broken_pattern_is_refused(tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(?<unclosed"}, "behavior": "Isolated"}
    path = write_tokenizer(tmp_path, pre_tokenizer={**pattern, "invert": False})
    with pytest.raises(BrokenModel, match=r"tokenizer\.json"):
        check_tokenizer(path)


def test_a_tokenizer_with_a_huge_pattern_is_refused(tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "a?" * 5000}, "behavior": "Isolated"}
    path = write_tokenizer(tmp_path, pre_tokenizer={**pattern, "invert": False})
    with pytest.raises(BrokenModel, match="10000 characters"):
        check_tokenizer(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"model": 7}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(BrokenModel, match=r"tokenizer\.json"):
        check_tokenizer(path)
