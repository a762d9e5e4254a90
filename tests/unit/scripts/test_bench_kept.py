"""Tests of stored benchmark sections that are measured separately."""

from dataclasses import replace
from pathlib import Path

from scripts.bench_lib.__main__ import _write
from scripts.bench_lib.report.figures import Verdict
from scripts.bench_lib.report.kept import Kept, kept_text, merged, read_kept
from scripts.bench_lib.section import Section

ORDER = ("turns", "mlx", "gguf")


def kept(name: str, title: str, date: str = "monday", *, is_failed: bool = False) -> Kept:
    section = Section(
        title,
        ["a table\n"],
        [Verdict(f"{title}: speed", "≥ 1", "2", True)],
        ["HTTP 503"],
        [("model", "m")],
        is_failed,
    )
    return Kept(name, date, 5, "0.1", section)


def titles(sections: list[Kept]) -> list[str]:
    return [f"{one.section.title} {one.measured_at}" for one in sections]


def test_what_was_measured_again_takes_the_place_of_the_former() -> None:
    known = [kept("mlx", "f32"), kept("mlx", "4bit"), kept("gguf", "GGUF")]
    new = [kept("mlx", "f32", "tuesday")]
    assert titles(merged(known, new, ORDER)) == ["f32 tuesday", "GGUF monday"]


def test_a_new_section_comes_where_it_belongs() -> None:
    known = [kept("gguf", "GGUF")]
    new = [kept("turns", "Turns", "tuesday")]
    assert titles(merged(known, new, ORDER)) == ["Turns tuesday", "GGUF monday"]


def test_a_failure_takes_nobodys_place() -> None:
    failed = kept("gguf", "GGUF", "tuesday", is_failed=True)
    assert titles(merged([kept("gguf", "GGUF")], [failed], ORDER)) == ["GGUF monday"]
    assert titles(merged([], [failed], ORDER)) == ["GGUF tuesday"]


def test_sections_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "page.json"
    assert read_kept(path, ORDER) == []
    known = [kept("mlx", "f32"), kept("gguf", "GGUF")]
    _write(path, kept_text(known))
    assert read_kept(path, ORDER) == known
    assert read_kept(path, ("gguf",)) == known[1:]
    assert [file.name for file in tmp_path.iterdir()] == ["page.json"]


def test_the_chapter_says_when_it_was_measured() -> None:
    first, second = kept("gguf", "GGUF").parts
    assert first == "Measured monday; at most 5 rounds; load average before: 0.1.\n"
    assert second == "a table\n"
    named = replace(kept("gguf", "GGUF"), python="3.12.1").parts[0]
    assert named == first.replace(".\n", "; Python 3.12.1.\n")
