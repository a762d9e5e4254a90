"""Atomic writes under disk errors, and files that are not what their name says."""

import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.files import (
    NotARegularFile,
    allocate,
    is_shortage,
    open_regular,
    passing_cause,
    why,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[3]


def test_the_new_content_replaces_the_old_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", mode=0o644)
    write_atomically(path, b"ne", memoryview(b"w"), mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["write", "fchmod", "fsync", "replace"])
@pytest.mark.parametrize("has_scratch", [False, True])
def test_a_failure_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, has_scratch: bool
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    opened = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        if call == "replace":
            patch.setattr(Path, "replace", fail)
        else:
            patch.setattr(os, call, fail)
            patch.setattr("core.files.flush_to_disk", fail if call == "fsync" else lambda _: None)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new", scratch=tmp_path / "tmp" if has_scratch else None)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    assert len(os.listdir("/dev/fd")) == opened


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data[:7])))
    write_atomically(tmp_path / "file", bytes(range(256)))
    assert (tmp_path / "file").read_bytes() == bytes(range(256))


def test_a_left_temporary_file_or_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"of another program")
    scratch = tmp_path / "scratch"
    for is_link in (False, True):
        if is_link:
            scratch.symlink_to(tmp_path / "target")
        else:
            scratch.write_bytes(b"left over")
        write_atomically(tmp_path / "file", b"new", scratch=scratch)
        assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "target").read_bytes() == b"of another program"


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        _make_socket,
        lambda path: path.symlink_to("/etc/hosts"),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/dev/zero"),
    ],
    ids=["folder", "pipe", "socket", "link", "loop", "device"],
)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], object]) -> None:
    opened = len(os.listdir("/dev/fd"))
    make(tmp_path / "it")
    with pytest.raises(NotARegularFile):
        open_regular(tmp_path / "it")
    assert len(os.listdir("/dev/fd")) == opened
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def test_allocated_files_are_not_sparse_and_keep_their_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.truncate(path, 1 << 16)
    with path.open("rb+") as file:
        allocate(file.fileno(), 1 << 17)
    assert path.read_bytes() == b"abc" + bytes((1 << 17) - 3)
    if hasattr(os, "posix_fallocate"):
        assert path.stat().st_blocks * 512 >= 1 << 17


@pytest.mark.parametrize("is_there", [False, True])
def test_without_posix_fallocate_zeros_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "the file system does not support it")

    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    if is_there:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with (tmp_path / "file").open("wb+") as file:
        file.write(b"abc")
        file.flush()
        allocate(file.fileno(), 100_000)
    assert (tmp_path / "file").read_bytes() == b"abc" + bytes(99_997)


def test_no_room_for_an_allocation_is_an_error_and_no_signal(tmp_path: Path) -> None:
    code = (
        "import os, resource, signal, sys\nfrom core.files import allocate\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "try:\n    allocate(file, 1 << 16)\n"
        "except OSError as problem:\n    print(problem.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_the_systems_error_is_found_behind_others() -> None:
    def chained(cause: Exception) -> Exception:
        try:
            try:
                raise cause
            except Exception as problem:
                raise ValueError("cannot be parsed") from problem
        except ValueError as problem:
            return problem

    full = OSError(errno.ENOSPC, "No space left on device")
    assert passing_cause(chained(full)) is full
    assert passing_cause(chained(OSError(errno.ENOENT, ""))) is None
    assert passing_cause(chained(OSError("no number"))) is None
    assert passing_cause(ValueError()) is None
    full.__cause__ = full
    assert passing_cause(full) is full


def test_errors_are_told_in_words() -> None:
    assert why(OSError(errno.ENOSPC, "No space left on device")).startswith("the disk is full")
    assert why(OSError(errno.EROFS, "Read-only file system")).startswith("the file system is")
    assert why(OSError("odd")) == "odd"
    assert is_shortage(OSError(errno.EMFILE, ""))
    assert not is_shortage(OSError(errno.EIO, ""))
