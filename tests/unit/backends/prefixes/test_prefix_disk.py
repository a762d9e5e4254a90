"""Tests of prefix blocks on disk: limits, eviction order, and damaged or foreign files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backends.prefixes.block_file import (
    BLOCK_TOKENS,
    ROOT,
    BlockHead,
    block_head,
    block_keys,
    file_bytes,
    read_state,
    scratch_path,
    write_block,
)
from backends.prefixes.disk import PrefixFolder
from core.units import GIB
from tests.prefixes import folder_at, prompt_of, state_of

FINGERPRINT = b"f" * 32
OTHER = b"o" * 32
SIZE = file_bytes(BlockHead(FINGERPRINT, ROOT, 0, prompt_of(1), 1000, 0))


def head(seed: int, fingerprint: bytes = FINGERPRINT) -> BlockHead:
    return block_head(fingerprint, ROOT, 0, prompt_of(1, seed), state_of(seed))


def put(folder: PrefixFolder, seed: int, fingerprint: bytes = FINGERPRINT) -> Path | None:
    """Write the one block of a prompt; None where it was not allowed."""
    block = head(seed, fingerprint)
    return folder.write("model", [(block, state_of(seed))]).paths.get(block.key)


def seeds_in(folder: PrefixFolder, among: int = 9) -> list[int]:
    """Return which prompts' blocks are there."""
    keys = {block.key for block in folder.scan("model", FINGERPRINT)[0].values()}
    return [seed for seed in range(among) if head(seed).key in keys]


def test_what_was_written_is_read_by_another_process(tmp_path: Path) -> None:
    path = put(folder_at(tmp_path), 1)
    assert path is not None
    again = folder_at(tmp_path)
    found, others = again.scan("model", FINGERPRINT)
    assert (list(found), others) == ([path], set())
    assert found[path].tokens == prompt_of(1, 1)
    state = again.read(path, found[path])
    assert not isinstance(state, str)
    np.testing.assert_array_equal(state, state_of(1))


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    home = tmp_path / "prefixes"
    home.mkdir(mode=0o755)
    path = put(folder_at(home), 1)
    assert path is not None
    assert home.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {each.stat().st_mode & 0o777 for each in home.rglob("*") if each.is_file()} == {0o600}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    moments = iter(range(1000, 2000))
    folder = folder_at(tmp_path, 3 * SIZE, now=lambda: float(next(moments)))
    paths = [put(folder, seed) for seed in (1, 2, 3)]
    for path in paths:
        folder.touch([path] if path else [])
    folder.touch([path for path in paths[:1] if path])
    put(folder, 4)
    assert seeds_in(folder) == [1, 3, 4]


def test_the_first_block_of_a_chain_goes_last(tmp_path: Path) -> None:
    folder = folder_at(tmp_path, 3 * SIZE)
    paths = [put(folder, seed) for seed in (1, 2, 3)]
    folder.touch([path for path in paths if path])
    put(folder, 4)
    assert seeds_in(folder) == [1, 2, 4]


def test_no_file_is_larger_than_all_may_be(tmp_path: Path) -> None:
    folder = folder_at(tmp_path, SIZE - 1)
    assert put(folder, 1) is None
    assert seeds_in(folder) == []


def test_one_day_writes_no_more_than_it_may(tmp_path: Path) -> None:
    now = [86_400.0 * 50]
    folder = folder_at(tmp_path, 9 * SIZE, daily_bytes=2 * SIZE, now=lambda: now[0])
    assert [put(folder, seed) is not None for seed in (1, 2, 3)] == [True, True, False]
    # Another process counts on.
    again = folder_at(tmp_path, 9 * SIZE, daily_bytes=2 * SIZE, now=lambda: now[0])
    assert put(again, 3) is None
    now[0] += 86_400
    assert put(again, 3) is not None


def test_a_disk_without_room_gets_room_back(tmp_path: Path) -> None:
    used = [0]

    def free(_: Path) -> int:
        kept = sum(path.stat().st_size for path in tmp_path.glob("*/*.block"))
        return 2 * GIB + 2 * SIZE - kept - used[0]

    folder = folder_at(tmp_path, free_bytes=free)
    assert [put(folder, seed) is not None for seed in (1, 2)] == [True, True]
    used[0] = SIZE
    assert put(folder, 3) is not None
    assert seeds_in(folder) == [3]
    used[0] = 5 * SIZE
    assert put(folder, 4) is None
    assert seeds_in(folder) == []


@pytest.mark.parametrize("place", [0, 20, 100, SIZE - 1])
def test_a_damaged_file_is_dropped(tmp_path: Path, place: int) -> None:
    folder = folder_at(tmp_path)
    path = put(folder, 1)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    assert folder.read(path, head(1)) == "damaged" or seeds_in(folder) == []
    assert not path.exists()


@pytest.mark.parametrize("length", [0, 10, SIZE // 2, SIZE - 1])
def test_a_truncated_file_is_dropped(tmp_path: Path, length: int) -> None:
    folder = folder_at(tmp_path)
    path = put(folder, 1)
    assert path is not None
    os.truncate(path, length)
    assert seeds_in(folder) == []
    assert not path.exists()


def test_a_file_that_went_meanwhile_is_no_error(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    path = put(folder, 1)
    assert path is not None
    path.unlink()
    folder.touch([path])
    assert folder.read(path, head(1)) == "evicted"


def test_blocks_of_another_version_are_dropped(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    path = put(folder, 1, OTHER)
    put(folder, 2)
    found, others = folder.scan("model", FINGERPRINT)
    assert (len(found), others) == (1, {head(1, OTHER).key})
    assert path is not None
    assert not path.exists()
    assert folder.scan("model", FINGERPRINT)[1] == set()


def test_a_writer_that_is_killed_leaves_nothing_broken(tmp_path: Path) -> None:
    """The child dies in the middle of the state, having written its beginning."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from tests.unit.backends.prefixes.test_prefix_disk import put, folder_at\n"
        "real = os.write\n"
        "def write(file, data):\n"
        "    if len(data) == 1000:\n"
        "        real(file, data[:500])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(file, data)\n"
        "os.write = write\n"
        "put(folder_at(Path(sys.argv[1])), 1)\n"
    )
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -9
    assert len(list(tmp_path.glob("model/*.tmp"))) == 1
    folder = folder_at(tmp_path)
    assert seeds_in(folder) == []
    assert list(tmp_path.glob("model/*")) == []
    assert put(folder, 1) is not None


def test_another_process_half_written_file_is_left_alone(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    path = put(folder, 1)
    assert path is not None
    theirs = path.with_suffix(f".{os.getppid()}.tmp")
    theirs.write_bytes(b"half")
    mine = scratch_path(path)
    mine.write_bytes(b"half")
    assert seeds_in(folder) == [1]
    assert theirs.exists()
    assert not mine.exists()


def test_the_ram_of_all_processes_is_shared(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    assert folder.claim_ram(80, 100) == 80
    state = tmp_path / "state.json"
    text = state.read_text()
    # A process that lives holds a part; one that is dead holds none.
    state.write_text(text.replace(f'"{os.getpid()}": 80', f'"{os.getppid()}": 70, "4194305": 30'))
    assert folder.claim_ram(80, 100) == 30
    assert folder.claim_ram(10, 100) == 10


def test_a_lost_state_is_begun_anew(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    put(folder, 1)
    (tmp_path / "state.json").write_text("{broken")
    assert put(folder, 2) is not None
    assert seeds_in(folder) == [1, 2]


def test_keys_depend_on_everything_before(tmp_path: Path) -> None:
    one, other = prompt_of(3), prompt_of(3)
    other[5] += 1
    assert all(a != b for a, b in zip(block_keys(one), block_keys(other), strict=True))
    assert block_keys(one)[:2] == block_keys(one[: 2 * BLOCK_TOKENS + 9])
    path = tmp_path / "one.block"
    block = head(1)
    write_block(path, block, state_of(1))
    np.testing.assert_array_equal(read_state(path, block), state_of(1))
