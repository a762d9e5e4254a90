"""Copies and clones of models: what is taken, links, changes meanwhile, full disks."""

import ctypes
import errno
import os
import shutil
from pathlib import Path

import pytest

from catalog.uploads.copy import clone_file, copy_files, files_of, move_folder
from core.errors import InsufficientDisk, RequestError, Unavailable


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs" / "m"
    (folder / "onnx").mkdir(parents=True)
    (folder / "a.gguf").write_bytes(b"a" * 1000)
    (folder / "onnx" / "b.onnx").write_bytes(b"b" * 10)
    (folder / ".hidden").write_text("x")
    (folder / "c.gguf.part").write_text("x")
    os.mkfifo(folder / "pipe.gguf")
    (folder / "dangling.gguf").symlink_to(folder / "none")
    (folder / "loop").symlink_to(folder)
    return folder


def copied(source: Path, target: Path, *roots: Path, may_clone: bool = False) -> int:
    counts: list[int] = []
    copy_files(files_of(source, roots), target, may_clone=may_clone, add=counts.append)
    return sum(counts)


@pytest.mark.parametrize("may_clone", [True, False])
def test_regular_files_alone_are_copied(source: Path, tmp_path: Path, may_clone: bool) -> None:
    target = tmp_path / "copy"
    assert copied(source, target, may_clone=may_clone) == 1010
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert found == ["a.gguf", "onnx/b.onnx"]
    assert (target / "a.gguf").read_bytes() == b"a" * 1000


def test_file_is_taken_with_its_shards(tmp_path: Path) -> None:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other.gguf"):
        (tmp_path / name).write_text(name)
    found = files_of(tmp_path / "m-00001-of-00002.gguf", [])
    assert [file.path for file in found] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert [file.path for file in files_of(tmp_path / "other.gguf", [])] == ["other.gguf"]


def test_link_is_followed_below_the_roots_only_p4(tmp_path: Path) -> None:
    """P4: a link out of the roots is refused, and a cached snapshot is copied whole."""
    blob = tmp_path / "cache" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_text("weights")
    snapshot = tmp_path / "cache" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "a.gguf").symlink_to(blob)
    assert copied(snapshot, tmp_path / "copy", tmp_path / "cache") == 7
    assert not (tmp_path / "copy" / "a.gguf").is_symlink()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (snapshot / "b.gguf").symlink_to(secret)
    with pytest.raises(RequestError, match="is in none of the folders"):
        files_of(snapshot, [tmp_path / "cache"])


def test_second_run_copies_what_is_missing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    copied(source, target)
    inode = (target / "a.gguf").stat().st_ino
    (target / "onnx" / "b.onnx").write_bytes(b"half")
    assert copied(source, target) == 1010
    assert (target / "a.gguf").stat().st_ino == inode
    assert (target / "onnx" / "b.onnx").read_bytes() == b"b" * 10


def test_file_that_changes_meanwhile_is_refused(source: Path, tmp_path: Path) -> None:
    files = files_of(source, [])
    (source / "a.gguf").write_bytes(b"longer" * 1000)
    with pytest.raises(RequestError, match="changed while it was copied"):
        copy_files(files, tmp_path / "copy", may_clone=False, add=lambda _: None)
    assert not (tmp_path / "copy" / "a.gguf").exists()


def test_room_is_looked_at_before_a_byte_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(InsufficientDisk, match="The copy needs 1010"):
        copied(source, tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []


def test_clone_needs_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10))

    def share(one: Path, other: Path) -> bool:
        shutil.copyfile(one, other)
        return True

    monkeypatch.setattr("catalog.uploads.copy.clone_file", share)
    assert copied(source, tmp_path / "copy", may_clone=True) == 1010


def test_clone_that_is_impossible_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("catalog.uploads.copy.sys.platform", "darwin")
    monkeypatch.setattr("catalog.uploads.copy._clonefile", refuse)
    assert not clone_file(source / "a.gguf", tmp_path / "clone")
    assert not (tmp_path / "clone").exists()


def test_macos_clones_by_its_system_library(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        """What ctypes gives for macOS's library: errors come by errno."""

        def clonefile(self, one: bytes, other: bytes, flags: int) -> int:
            assert flags == 0
            if os.path.exists(other):
                ctypes.set_errno(errno.EEXIST)
                return -1
            shutil.copyfile(one, other)
            return 0

    monkeypatch.setattr("catalog.uploads.copy.sys.platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Library())
    target = tmp_path / "clone"
    assert clone_file(source / "a.gguf", target)
    assert target.read_bytes() == b"a" * 1000
    with pytest.raises(FileExistsError):
        clone_file(source / "a.gguf", target)


def test_disk_that_fails_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(source, [])

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("catalog.uploads.copy._copy_bytes", fail)
    with pytest.raises(Unavailable, match="the disk reported an error"):
        copy_files(files, tmp_path / "copy", may_clone=False, add=lambda _: None)


def test_folder_is_moved_to_another_disk_by_a_hidden_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "pipe.gguf").unlink()
    for name in ("dangling.gguf", "loop"):
        (source / name).unlink()
    real, seen = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        seen.append(self.name)
        if len(seen) == 1:
            raise OSError(errno.EXDEV, "another disk")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    target = tmp_path / "models" / "m"
    move_folder(source, target)
    assert seen == ["m", ".m.arriving"]
    assert (target / "a.gguf").stat().st_size == 1000
    assert not source.exists()


def test_empty_folder_and_lost_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no file to import"):
        files_of(tmp_path, [])
