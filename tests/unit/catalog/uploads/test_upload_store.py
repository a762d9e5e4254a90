"""Unfinished uploads on disk: chunks in order, lies, kills, quota, and what is swept (P1, P2)."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from catalog.uploads.store import HEADROOM_BYTES, KEPT_S, MAX_UPLOADS, UploadState, UploadStore
from catalog.uploads.upload import Announced
from core.errors import ChunkRejected, InsufficientDisk, NotFound, RequestError, UploadConflict

DATA = bytes(range(256)) * 4


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(tmp_path / "home")


def begin(store: UploadStore, name: str = "tiny") -> UploadState:
    return store.create([Announced("tiny.gguf", len(DATA)), Announced("notes.txt", 0)], name)


def put(store: UploadStore, upload_id: str, offset: int, data: bytes, number: int = 0) -> int:
    state = store.write_chunk(upload_id, number, offset, data, hashlib.sha256(data).digest())
    return state.offsets[0]


def test_chunks_in_order_become_the_file(store: UploadStore, tmp_path: Path) -> None:
    begun = begin(store)
    upload = begun.upload
    assert begun.offsets == (0, 0)
    assert put(store, upload.id, 0, DATA[:700]) == 700
    # Another process finds what is there.
    assert UploadStore(tmp_path / "home").get(upload.id).offsets == (700, 0)
    assert put(store, upload.id, 700, DATA[700:]) == len(DATA)
    assert store.finish(upload.id).is_finished
    assert store.finish(upload.id).is_finished
    file = store.model_folder(upload) / "tiny.gguf"
    assert file.read_bytes() == DATA
    assert file.is_relative_to(tmp_path / "home" / "incoming" / upload.id)
    assert (tmp_path / "home" / "incoming").stat().st_mode & 0o777 == 0o700
    with pytest.raises(UploadConflict, match="is finished"):
        put(store, upload.id, len(DATA), b"")


@pytest.mark.parametrize("offset", [0, 100, 699, 701, 1000, 1 << 60])
def test_gaps_overlaps_and_repeats_are_refused_with_what_there_is_p2(
    store: UploadStore, offset: int
) -> None:
    """P2: chunk overlap, gap, replay, out of order."""
    upload = begin(store).upload
    put(store, upload.id, 0, DATA[:700])
    with pytest.raises(UploadConflict, match="The server has 700 bytes") as caught:
        put(store, upload.id, offset, b"x")
    assert caught.value.offset == 700
    assert (store.model_folder(upload) / "tiny.gguf").read_bytes() == DATA[:700]


def test_lying_chunks_change_nothing_p2(store: UploadStore) -> None:
    """P2: a wrong hash, more bytes than announced, fewer at the end."""
    upload = begin(store).upload
    with pytest.raises(ChunkRejected, match="do not have the SHA-256"):
        store.write_chunk(upload.id, 0, 0, DATA[:10], hashlib.sha256(DATA[:9]).digest())
    with pytest.raises(ChunkRejected, match="was announced with 1024 bytes"):
        put(store, upload.id, 0, DATA + b"x")
    assert store.get(upload.id).offsets == (0, 0)
    with pytest.raises(UploadConflict, match=r"has 0 of 1024 bytes of .tiny\.gguf"):
        store.finish(upload.id)
    with pytest.raises(NotFound, match="has no file 7"):
        put(store, upload.id, 0, b"x", number=7)


def test_parallel_copies_of_a_chunk_are_written_once_p2(store: UploadStore) -> None:
    """P2: of chunks for one place one is written, the others are told so."""
    upload = begin(store).upload
    refused: list[int | None] = []

    def send() -> None:
        try:
            put(store, upload.id, 0, DATA[:512])
        except UploadConflict as problem:
            refused.append(problem.offset)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == [512] * 3
    assert store.get(upload.id).offsets == (512, 0)


def test_kill_in_the_middle_of_chunks_loses_only_what_was_not_answered_p2(
    store: UploadStore, tmp_path: Path
) -> None:
    """P2: a process that is killed while it writes leaves a start of the file that is right."""
    size = 64 * 1024 * 1024
    upload = store.create([Announced("big.gguf", size)], "big").upload
    code = f"""
import hashlib, sys
from pathlib import Path
from catalog.uploads.store import UploadStore
store, part = UploadStore(Path({str(tmp_path / "home")!r})), 1 << 16
for number in range({size} // part):
    data = number.to_bytes(4, "big") * (part // 4)
    store.write_chunk({upload.id!r}, 0, number * part, data, hashlib.sha256(data).digest())
    print((number + 1) * part, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    rest, _ = writer.communicate()
    answered = [*acknowledged, *map(int, rest.split())][-1]
    (there,) = UploadStore(tmp_path / "home").get(upload.id).offsets
    assert answered <= there <= answered + (1 << 16)
    content = (store.model_folder(upload) / "big.gguf").read_bytes()
    numbers = b"".join((at >> 16).to_bytes(4, "big") for at in range(0, there, 4))
    assert content == numbers


def test_disk_is_looked_at_before_a_byte_is_written_p2(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """P2: an upload of 20 GB that the disk cannot hold is refused with the numbers."""
    first = begin(store)
    usage = shutil.disk_usage(tmp_path)
    free = HEADROOM_BYTES + 20_000_000_000 + len(DATA) - 1
    monkeypatch.setattr(
        "catalog.uploads.store.shutil.disk_usage", lambda _: usage._replace(free=free)
    )
    wanted = [Announced("big.gguf", 20_000_000_000)]
    with pytest.raises(InsufficientDisk, match=r"needs 18\.6 GiB, .* for other uploads"):
        store.create(wanted, "")
    assert [one.upload.id for one in store.uploads()] == [first.upload.id]
    assert len(list((tmp_path / "home" / "incoming").iterdir())) == 1
    store.remove(first.upload.id)
    assert store.create(wanted, "").offsets == (0,)


def test_full_disk_keeps_what_was_there(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin(store).upload
    put(store, upload.id, 0, DATA[:500])
    real = os.pwrite

    def half(descriptor: int, data: memoryview, offset: int) -> int:
        if offset > 500:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:100], offset)

    monkeypatch.setattr("catalog.uploads.store.os.pwrite", half)
    with pytest.raises(InsufficientDisk, match="What has arrived is kept"):
        put(store, upload.id, 500, DATA[500:])
    assert store.get(upload.id).offsets == (500, 0)


def test_name_that_is_taken_is_refused(store: UploadStore, tmp_path: Path) -> None:
    begun = begin(store)
    with pytest.raises(UploadConflict, match=begun.upload.id):
        begin(store, "Tiny")
    (tmp_path / "home" / "models" / "uploads" / "Old").mkdir(parents=True)
    with pytest.raises(UploadConflict, match="'Old' was uploaded or imported before"):
        begin(store, "old")
    store.remove(begun.upload.id)
    begin(store, "Tiny")


@pytest.mark.parametrize("upload_id", ["..", "../..", "0" * 31, "A" * 32, "", "0" * 32])
def test_ids_are_those_of_the_server_alone_p1(store: UploadStore, upload_id: str) -> None:
    """P1: traversal in the id."""
    for call in (store.get, store.finish, store.remove):
        with pytest.raises(NotFound):
            call(upload_id)


def test_number_of_uploads_is_bounded(store: UploadStore) -> None:
    for number in range(MAX_UPLOADS):
        begin(store, f"m{number}")
    with pytest.raises(RequestError, match="32 unfinished uploads"):
        begin(store, "more")


def test_abandoned_uploads_are_swept_and_used_ones_stay(store: UploadStore, tmp_path: Path) -> None:
    old, used, new = (begin(store, name).upload for name in ("old", "used", "new"))
    (tmp_path / "home" / "incoming" / "not-an-upload").mkdir()
    now = time.time() + KEPT_S + 10
    put(store, new.id, 0, DATA[:100])
    path = store.model_folder(new) / "tiny.gguf"
    os.utime(path, (now - 100, now - 100))
    assert store.sweep([used.id], time.time()) == []
    assert store.sweep([used.id], now) == [old.id]
    assert {one.upload.id for one in store.uploads()} == {used.id, new.id}
