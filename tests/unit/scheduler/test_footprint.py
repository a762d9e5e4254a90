"""What a process holds, and which of its models holds it."""

import ctypes
import sys
from pathlib import Path

import pytest

from core.process_memory import count_model_process, forget_model_process, model_processes
from core.units import MIB
from scheduler.footprint import ALLOWANCE_BYTES, FootprintBook, Returned
from scheduler.sensors.process_memory import LinuxMeter, MacMeter, NoMeter, open_meter, trim_heap

STATUS = """Name:\tpython
VmRSS:\t  999999 kB
RssAnon:\t    2048 kB
RssFile:\t    1024 kB
RssShmem:\t   65536 kB
VmSwap:\t     512 kB
"""


def test_linux_counts_anonymous_file_and_swapped_pages_but_no_shared_memory(
    tmp_path: Path,
) -> None:
    (tmp_path / "status").write_text(STATUS)
    assert LinuxMeter(tmp_path / "status").read() == (2048 + 1024 + 512) * 1024


@pytest.mark.parametrize("text", [None, "", "Name: x\n", "RssAnon: 1 kB\n"])
def test_what_linux_does_not_say_is_unknown(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "status").write_text(text)
    assert LinuxMeter(tmp_path / "status").read() is None


def test_macos_footprint_is_read_from_its_place_in_the_answer() -> None:
    numbers = list(range(100, 118))
    record = bytes(16) + b"".join(one.to_bytes(8, sys.byteorder) for one in numbers)
    assert MacMeter(lambda: record).read() == numbers[7]


def test_macos_answers_that_fail_or_are_short_are_unknown() -> None:
    def fail() -> bytes:
        raise OSError("no such process")

    assert MacMeter(fail).read() is None
    assert MacMeter(lambda: b"short").read() is None
    assert NoMeter().read() is None


def test_a_model_in_a_child_counts_with_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    record = bytes(16) + bytes(8 * 7) + (1000).to_bytes(8, sys.byteorder)
    meter = MacMeter(lambda: record)
    held: dict[int, int | None] = {4711: 70, 4712: None}
    monkeypatch.setattr("scheduler.sensors.process_memory.footprint_bytes", held.get)
    count_model_process(4711)
    count_model_process(4712)
    try:
        assert meter.read() == 1070
        forget_model_process(4711)
        forget_model_process(4711)
        assert meter.read() == 1000
    finally:
        forget_model_process(4712)
    assert model_processes() == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_sees_memory_come_and_go() -> None:
    meter = open_meter()
    before = meter.read()
    held = ctypes.create_string_buffer(64 * MIB)
    ctypes.memset(held, 1, 64 * MIB)
    during = meter.read()
    del held
    trim_heap()
    after = meter.read()
    assert before is not None
    assert during is not None
    assert after is not None
    assert during - before > 60 * MIB
    assert during - after > 60 * MIB


def book(own: int = 1000) -> FootprintBook:
    return FootprintBook(own)


def opened(
    one: FootprintBook, name: str, before: int, after: int, *, later: int = 0, estimate: int = 10**6
) -> None:
    one.opened(name, before, after, floor_bytes=100, later_bytes=later, estimated_bytes=estimate)


def test_a_model_holds_what_its_opening_took_and_what_is_still_to_come() -> None:
    one = book()
    opened(one, "a", 1000, 1500, later=50)
    assert one.measured_bytes("a") == 550


def test_mapped_weights_that_the_system_does_not_count_are_held_all_the_same() -> None:
    one = book()
    opened(one, "a", 1000, 1001)
    assert one.measured_bytes("a") == 100


def test_only_what_is_really_held_is_more_than_the_estimate() -> None:
    one = book()
    opened(one, "a", 1000, 1500, later=400, estimate=600)
    assert one.measured_bytes("a") == 600
    one.sample(1900, {"a"})
    assert one.measured_bytes("a") == 900


def test_growth_belongs_to_the_models_that_ran() -> None:
    one = book()
    opened(one, "a", 1000, 1500)
    opened(one, "b", 1500, 2000)
    one.sample(2200, {"b"})
    assert (one.measured_bytes("a"), one.measured_bytes("b")) == (500, 700)
    one.sample(2400, {"a", "b"})
    assert (one.measured_bytes("a"), one.measured_bytes("b")) == (600, 800)


def test_an_unload_that_gives_all_back_leaves_nothing() -> None:
    one = book()
    opened(one, "a", 1000, 1500)
    assert one.closed("a", 1500, 1000) == Returned(500, 500)
    assert (one.measured_bytes("a"), one.kept_bytes) == (0, 0)


def test_what_does_not_come_back_is_kept_by_the_process_beyond_the_allowance() -> None:
    one, size = book(0), ALLOWANCE_BYTES + 300
    opened(one, "a", 0, size)
    assert one.closed("a", size, size - 100) == Returned(size, 100)
    assert one.kept_bytes == 200
    one.sample(50, set())
    assert one.kept_bytes == 0


def test_an_unknown_model_is_no_error() -> None:
    one = book()
    assert one.measured_bytes("a") == 0
    assert one.closed("a", 5, 5) == Returned()
