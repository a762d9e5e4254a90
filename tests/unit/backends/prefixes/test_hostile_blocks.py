"""Block files that are damaged, foreign or no files: each is a miss, and none stays."""

import errno
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.prefixes import block_file
from backends.prefixes.block_file import (
    BLOCK_TOKENS,
    ROOT,
    SUFFIX,
    BlockHead,
    DamagedBlock,
    block_head,
    file_bytes,
    read_head,
    read_state,
    scratch_path,
    write_block,
)
from backends.prefixes.disk import RETRY_S, DiskLimits, PrefixFolder, drop_file
from backends.prefixes.reuse import Reuse
from backends.prefixes.transfer import Applied, Restore
from tests.prefixes import folder_at, place_in, prompt_of, state_of, store_at

FINGERPRINT = b"f" * 32
SIZE = file_bytes(BlockHead(FINGERPRINT, ROOT, 0, prompt_of(1), 1000, 0))


def head(seed: int = 1) -> BlockHead:
    return block_head(FINGERPRINT, ROOT, 0, prompt_of(1, seed), state_of(seed))


def name_of(seed: int = 1) -> str:
    return f"{head(seed).key.hex()}{SUFFIX}"


def put(folder: PrefixFolder, seed: int = 1) -> Path:
    """Write the one block of a prompt."""
    block = head(seed)
    return folder.write("model", [(block, state_of(seed))]).paths[block.key]


def forged(path: Path, state_bytes: int, *, count: int = BLOCK_TOKENS, sparse: int = 0) -> None:
    """Write a head with a valid checksum that says something else, and a file of that length."""
    tokens = prompt_of(1, 1)
    fixed = block_file._HEAD.pack(
        block_file._MAGIC, FINGERPRINT, ROOT, 0, count, state_bytes, zlib.crc32(b"")
    )
    front = fixed + tokens.tobytes()
    path.write_bytes(front + struct.pack("<I", zlib.crc32(front)))
    if sparse:
        os.truncate(path, sparse)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "inner").write_bytes(b"x")


HOSTILE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "folder": Path.mkdir,
    "full folder": _full_folder,
    "pipe": os.mkfifo,
    "socket": _socket,
    "link to a file": lambda path: path.symlink_to("/etc/hosts"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a folder": lambda path: path.symlink_to("/tmp"),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(SIZE)),
    "zeros": lambda path: path.write_bytes(bytes(SIZE)),
    "huge state": lambda path: forged(path, 1 << 40, sparse=SIZE - 1000 + (1 << 40)),
    "huge length": lambda path: forged(path, (1 << 64) - 1),
    "no state": lambda path: forged(path, 0, count=0),
    "many tokens": lambda path: forged(path, 1000, count=(1 << 32) - 1),
    "another block": lambda path: write_block(path, head(2), state_of(2)),
}


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return HOSTILE[str(request.param)]


def test_a_scan_drops_it_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: Callable[[Path], object]
) -> None:
    folder = folder_at(tmp_path)
    kept = put(folder, 3)
    monkeypatch.chdir(kept.parent)
    place = kept.parent / name_of()
    hostile(place)
    assert list(folder.scan("model", FINGERPRINT)[0]) == [kept]
    assert os.listdir(kept.parent) == [kept.name]
    assert put(folder) == place
    assert len(folder.scan("model", FINGERPRINT)[0]) == 2


def test_a_block_that_was_replaced_by_it_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: Callable[[Path], object]
) -> None:
    folder = folder_at(tmp_path)
    place = put(folder)
    known = folder.scan("model", FINGERPRINT)[0][place]
    place.unlink()
    monkeypatch.chdir(place.parent)
    hostile(place)
    assert folder.read(place, known) == "damaged"
    assert not os.path.lexists(place)
    folder.touch([place])


def test_writing_over_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: Callable[[Path], object]
) -> None:
    folder = folder_at(tmp_path)
    place = put(folder, 3).with_name(name_of())
    monkeypatch.chdir(place.parent)
    hostile(place)
    assert put(folder) == place
    assert not isinstance(folder.read(place, head()), str)
    assert folder.is_writable


def test_an_engine_computes_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: Callable[[Path], object]
) -> None:
    """The restore goes up to the hostile file and no further; nothing is raised."""
    store = store_at(tmp_path)
    model, tokens = place_in(store).open("layout"), prompt_of(3)
    for number in range(3):
        model.put(tokens, number, state_of(number))
    assert store.flush(10)
    path = model.chain(tokens)[1].path
    assert path is not None
    path.unlink()
    monkeypatch.chdir(path.parent)
    hostile(path)
    taken: list[int] = []

    def take(_: object) -> Applied:
        taken.append(1)
        return "applied"

    reuse = Reuse()
    restore = Restore(model, model.chain(tokens))
    while not restore.is_over:
        restore.wait(5)
        restore.receive(reuse, take)
    assert (len(taken), reuse.miss) == (1, "damaged")
    assert not os.path.lexists(path)
    store.close()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_change_of_a_file_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    """Flips, cuts, insertions and repeats of any part."""
    path = tmp_path / "block"
    write_block(path, head(), state_of(1))
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 64, len(content))))
    content[start:end] = data.draw(
        st.one_of(
            st.binary(max_size=80),
            st.just(bytes(content[start:end]) * 2),
            st.just(bytes(end - start)),
            st.just(bytes(byte ^ 0xFF for byte in content[start:end])),
        )
    )
    is_same = bytes(content) == path.read_bytes()
    path.write_bytes(content)
    try:
        found = read_head(path)
        state = read_state(path, found)
    except DamagedBlock:
        assert not is_same
    else:
        assert is_same
        assert state.tobytes() == state_of(1).tobytes()


@given(content=st.binary(max_size=SIZE + 100), has_magic=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_are_read_without_another_error(
    tmp_path: Path, content: bytes, has_magic: bool
) -> None:
    path = tmp_path / "block"
    path.write_bytes(block_file._MAGIC * has_magic + content)
    with pytest.raises(DamagedBlock):
        read_head(path)
    with pytest.raises(DamagedBlock):
        read_state(path, head())


@given(
    fields=st.tuples(
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=16, max_size=16),
        st.integers(0, (1 << 32) - 1),
        st.sampled_from([0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, (1 << 32) - 1]),
        st.one_of(st.integers(0, 2000), st.integers(0, (1 << 64) - 1)),
        st.integers(0, (1 << 32) - 1),
    ),
    length=st.integers(0, 3000),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_heads_with_a_valid_checksum_may_say_anything(
    tmp_path: Path, fields: tuple[bytes, bytes, int, int, int, int], length: int
) -> None:
    path = tmp_path / "block"
    front = block_file._HEAD.pack(block_file._MAGIC, *fields) + prompt_of(1).tobytes()
    path.write_bytes(front + struct.pack("<I", zlib.crc32(front)) + bytes(length))
    try:
        found = read_head(path, 1 << 20)
    except DamagedBlock:
        return
    assert found.state_bytes == length
    assert len(found.tokens) == BLOCK_TOKENS
    checksum = zlib.crc32(bytes(length))
    if found.state_checksum == checksum:
        assert read_state(path, found).nbytes == length
    else:
        with pytest.raises(DamagedBlock):
            read_state(path, found)


def test_a_file_of_another_model_or_prompt_is_not_taken(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    one, other = place_in(store).open("one"), place_in(store).open("other")
    tokens = prompt_of(1)
    for model, seed in ((one, 1), (other, 2)):
        model.put(tokens, 0, state_of(seed))
    assert store.flush(10)
    first, second = (model.chain(tokens)[0].path for model in (one, other))
    assert first is not None
    assert second is not None
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    for model in (one, other):
        assert store.read(model, model.chain(tokens)[0]) == "damaged"
        assert model.chain(tokens) == []
    store.close()


def test_a_block_that_another_process_wrote_again_is_read(tmp_path: Path) -> None:
    """Its bytes may differ by rounding; it is the same block, and it is not written twice."""
    folder, again = folder_at(tmp_path), folder_at(tmp_path)
    path = put(folder)
    rounded = state_of(1)
    rounded[0] ^= 1
    block = block_head(FINGERPRINT, ROOT, 0, prompt_of(1, 1), rounded)
    inode = path.stat().st_ino
    assert again.write("model", [(block, rounded)]).paths == {block.key: path}
    assert path.stat().st_ino == inode
    write_block(path, block, rounded)
    state = folder.read(path, head())
    assert not isinstance(state, str)
    assert state.tobytes() == rounded.tobytes()


def test_a_shortage_of_descriptors_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_at(tmp_path)
    path = put(folder)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert folder.read(path, head()) == "no_room"
        assert folder.scan("model", FINGERPRINT) == ({}, set())
    assert list(folder.scan("model", FINGERPRINT)[0]) == [path]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = folder_at(tmp_path)
    path = put(folder)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert folder.read(path, head()) == "damaged"
    assert not path.exists()


def test_a_time_in_the_future_does_not_keep_a_block_for_ever(tmp_path: Path) -> None:
    folder = folder_at(tmp_path, 2 * SIZE)
    immortal, other = put(folder, 1), put(folder, 2)
    os.utime(immortal, (1 << 33, 1 << 33))
    put(folder, 3)
    assert not immortal.exists()
    assert other.exists()


def test_leftovers_of_killed_writers_count_and_go(tmp_path: Path) -> None:
    """In the folders of all models, not only of those that are opened again."""
    folder = folder_at(tmp_path, 3 * SIZE)
    path = put(folder, 1)
    stale = path.parent.with_name("of another model") / f"{'0' * 32}.4194305.tmp"
    stale.parent.mkdir()
    stale.write_bytes(bytes(10 * SIZE))
    put(folder, 2)
    assert not stale.exists()
    living = path.with_suffix(f".{os.getppid()}.tmp")
    living.write_bytes(bytes(SIZE))
    put(folder, 3)
    assert living.exists()
    assert sum(each.stat().st_size for each in tmp_path.glob("*/*")) <= 3 * SIZE


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc")])
def test_a_temporary_name_that_is_taken_is_freed(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    folder = folder_at(tmp_path)
    path = put(folder, 3).with_name(name_of())
    make(scratch_path(path))
    assert put(folder) == path


@pytest.mark.parametrize("name", ["state.json", "lock", "state.json.tmp", "model"])
@pytest.mark.parametrize(
    "make",
    [Path.mkdir, os.mkfifo, Path.touch, lambda path: path.symlink_to("/dev/zero")],
    ids=["folder", "pipe", "file", "link"],
)
def test_names_that_the_folder_itself_needs_are_freed(
    tmp_path: Path, name: str, make: Callable[[Path], object]
) -> None:
    folder = folder_at(tmp_path)
    put(folder)
    drop_file(tmp_path / name)
    make(tmp_path / name)
    assert put(folder, 2).exists()
    assert folder.claim_ram(100, 1000) == 100
    assert folder.is_writable


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE])
def test_a_disk_that_refuses_writes_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    now, tries = [0.0], [0]
    folder = folder_at(tmp_path, clock=lambda: now[0])
    path = put(folder)

    def refuse(*_: object, **__: object) -> None:
        tries[0] += 1
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("backends.prefixes.disk.write_block", refuse)
        for _ in range(5):
            assert (
                folder.write("model", [(head(2), state_of(2)), (head(3), state_of(3))]).paths == {}
            )
        assert tries == [1]
        assert not folder.is_writable
        assert not isinstance(folder.read(path, head()), str)
        now[0] += RETRY_S
        folder.write("model", [(head(2), state_of(2))])
        assert tries == [2]
    now[0] += RETRY_S
    assert put(folder, 2).exists()
    assert caplog.text.count("are not written") == 1
    assert caplog.text.count("are written to") == 1


def test_blocks_that_were_written_before_the_disk_was_full_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_at(tmp_path)
    real, count = write_block, [0]

    def second_fails(*values: object) -> None:
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*values)  # type: ignore[arg-type]

    monkeypatch.setattr("backends.prefixes.disk.write_block", second_fails)
    result = folder.write("model", [(head(seed), state_of(seed)) for seed in (1, 2, 3)])
    assert list(result.paths) == [head(1).key]


def test_a_process_that_hangs_with_the_lock_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.prefixes.disk._LOCK_WAIT_S", 0.1)
    folder = folder_at(tmp_path)
    path = put(folder)
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert folder.write("model", [(head(2), state_of(2))]).paths == {}
        assert folder.claim_ram(10, 100) == 0
        assert not isinstance(folder.read(path, head()), str)
        process.kill()


WRITER = """
import sys
from pathlib import Path
from tests.prefixes import place_in, prompt_of, state_of, store_at

store = store_at(Path(sys.argv[1]), size_bytes=int(sys.argv[2]), ram_bytes=5000)
model = place_in(store).open("layout")
for step in range(60):
    tokens = prompt_of(3, (step * 7 + int(sys.argv[3])) % 12)
    for number in model.missing(tokens):
        model.put(tokens, number, state_of(number))
    for block in model.chain(tokens):
        found = store.read(model, block)
        assert isinstance(found, str) or found[0].tobytes() == state_of(block.number).tobytes()
    store.flush(10)
store.close()
"""


def test_processes_share_the_folder_and_its_limit(tmp_path: Path) -> None:
    limit = 14 * SIZE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(limit), str(number)],
            cwd=Path(__file__).parents[4],
        )
        for number in range(3)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= limit
    folder = PrefixFolder(tmp_path, DiskLimits(limit))
    (model,) = {path.parent.name for path in tmp_path.glob("*/*")}
    for path in tmp_path.glob("*/*"):
        block = read_head(path)
        assert not isinstance(folder.read(path, block), str)
        assert path.parent.name == model
