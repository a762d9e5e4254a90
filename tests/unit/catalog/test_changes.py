"""What happened to a model's files since they were read."""

import os
from pathlib import Path

import pytest

from catalog.changes import describe_changes, file_signature, size_of


def test_files_that_did_not_change_need_no_words(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(10))
    signatures = [file_signature(path) for path in paths]
    assert describe_changes(paths, signatures) == ""
    # A built-in model has no files; an old catalog may know less than all.
    assert describe_changes((), ()) == ""
    assert describe_changes(paths, ()) == ""
    assert [size_of(each) for each in (*signatures, "", "x-1", "-5")] == [10, 10, 0, 0, 0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (bytes(5), "it was truncated from 10 B (10 bytes) to 5 B (5 bytes)"),
        (b"", "it was truncated from 10 B (10 bytes) to 0 B (0 bytes)"),
        (bytes(2048), "it grew from 10 B (10 bytes) to 2.0 KiB (2,048 bytes)"),
        (b"y" * 10, "its size is the same, 10 B (10 bytes)"),
        (None, "cannot be read any more (No such file or directory)"),
    ],
)
def test_the_first_changed_file_is_named_with_its_sizes(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    same, changed = tmp_path / "same", tmp_path / "changed"
    for path in (same, changed):
        path.write_bytes(bytes(10))
    signatures = [file_signature(path) for path in (same, changed)]
    changed.unlink()
    if content is not None:
        changed.write_bytes(content)
        os.utime(changed, (1, 1))
    change = describe_changes([same, changed], signatures)
    assert str(changed) in change
    assert told in change
