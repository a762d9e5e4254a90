"""What happened to a model's files since they were read."""

import os
from pathlib import Path

import pytest

from catalog.changes import content_digest, describe_changes, file_signature, size_of


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


def test_copies_have_the_same_content_and_others_not(tmp_path: Path) -> None:
    size = 3 * 2**20
    content = bytes(range(256)) * (size // 256)
    one, copy, longer, other = (tmp_path / name for name in ("one", "copy", "longer", "other"))
    one.write_bytes(content)
    copy.write_bytes(content)
    longer.write_bytes(content + b"x")
    other.write_bytes(content[:-1] + b"x")
    digests = [content_digest([path]) for path in (one, copy, longer, other)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    (tmp_path / "link").symlink_to(one)
    assert content_digest([tmp_path / "link"]) == digests[0]
    assert content_digest([one, other]) != content_digest([other, one])


@pytest.mark.parametrize("size", [1, 5000, 16 * 1024, 2**20])
def test_a_small_file_counts_as_a_whole(tmp_path: Path, size: int) -> None:
    file = tmp_path / "a"
    seen = set()
    for place in {0, size // 3, size // 2, size - 1}:
        content = bytearray(size)
        content[place] = 1
        file.write_bytes(content)
        seen.add(content_digest([file]))
    assert len(seen) == len({0, size // 3, size // 2, size - 1})


def test_large_files_are_read_in_samples(tmp_path: Path) -> None:
    files = []
    for number in range(3):
        path = tmp_path / f"{number}"
        with path.open("wb") as file:
            file.truncate(2**40)
        files.append(path)
    assert content_digest(files[:1]) == content_digest(files[1:2])
    assert content_digest(files[:2]) != content_digest(files)
    with pytest.raises(OSError, match="No such file"):
        content_digest([tmp_path / "none"])
