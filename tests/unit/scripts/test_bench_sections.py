"""Tests of the benchmark's sections: contests, bare loops, and memory."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import MemoryEstimate
from core.units import MIB
from scripts.bench_lib import memory, processes, sections
from scripts.bench_lib.__main__ import _sections
from scripts.bench_lib.contests import Contestant, ContestPlan, run_contest
from scripts.bench_lib.measure import StreamsResult, streams_result
from scripts.bench_lib.memory import MemoryResult, memory_rows, memory_verdicts
from scripts.bench_lib.peers.bare import record_run
from scripts.bench_lib.processes import ProcessMemory, process_memory
from scripts.bench_lib.rounds import rounds_within
from scripts.bench_lib.section import Choices, Section
from scripts.bench_lib.sections import run_section
from scripts.bench_lib.servers import BenchError, Load
from tests.starter import starter_path

ESTIMATE = MemoryEstimate(
    weights_bytes=500 * MIB,
    kv_bytes=100 * MIB,
    transient_bytes=300 * MIB,
    context_tokens=1024,
    kv_tokens=2048,
    prefix_bytes=100 * MIB,
)


def make_result(rate: float, failed: tuple[str, ...] = ()) -> StreamsResult:
    return StreamsResult(rate, rate, 0.1, 0.01, 0.02, None, None, 10, 5, failed)


def make_memory(pss_mib: int) -> MemoryResult:
    filled = ProcessMemory(pss_mib * MIB, 900 * MIB)
    return MemoryResult("onnx", ESTIMATE, filled, ProcessMemory(100 * MIB, 50 * MIB), 0, 2000)


def ticking(*moments: float) -> Callable[[], float]:
    left = iter(moments)
    return lambda: next(left)


def test_rounds_end_when_the_longest_would_not_fit() -> None:
    # Began at 0; round 0 lasts 40 s, round 1 30 s; at 70 s another 40 s exceed 100 s.
    assert list(rounds_within(9, 100, ticking(0, 0, 40, 40, 70, 70))) == [0, 1]
    assert list(rounds_within(2, 100, ticking(0, 0, 1, 1, 2))) == [0, 1]


def test_one_round_runs_whatever_it_takes() -> None:
    assert list(rounds_within(5, 10, ticking(0, 0, 99, 99))) == [0]


def test_contest_alternates_and_gives_both_the_same_requests() -> None:
    asked: list[tuple[str, list[str]]] = []

    def measuring(name: str) -> Callable[[Sequence[dict[str, Any]]], StreamsResult]:
        def measure(bodies: Sequence[dict[str, Any]]) -> StreamsResult:
            asked.append((name, [body["messages"][0]["content"] for body in bodies]))
            return make_result(1.0)

        return measure

    both = [Contestant("a", (1, 4), measuring("a")), Contestant("b", (1,), measuring("b"))]
    results = run_contest(ContestPlan("run", 2, 8, 1e9), both)
    warm, first, second = asked[:2], asked[2:5], asked[5:]
    assert [name for name, _ in warm] == ["a", "b"]
    assert [(name, len(texts)) for name, texts in first] == [("a", 1), ("b", 1), ("a", 4)]
    assert [(name, len(texts)) for name, texts in second] == [("b", 1), ("a", 1), ("a", 4)]
    assert first[0][1] == first[1][1] != second[0][1] == second[1][1]
    assert len(results["a"].rounds_of(4)) == 2
    assert results["b"].rounds_of(4) == []


def test_contest_stops_when_a_model_does_not_load_and_notes_later_failures() -> None:
    answers = iter([make_result(1.0), make_result(0.0, ("HTTP 503",))])
    late = Contestant("a", (1,), lambda _: next(answers))
    results = run_contest(ContestPlan("run", 1, 8, 1e9), [late])
    assert results["a"].problems == ["round 1, 1 streams: HTTP 503"]
    broken = Contestant("a", (1,), lambda _: make_result(0.0, ("HTTP 400: broken",)))
    with pytest.raises(BenchError, match="a: HTTP 400: broken"):
        run_contest(ContestPlan("run", 1, 8, 1e9), [broken])


def test_bare_loop_counts_what_it_was_given() -> None:
    class Loop:
        def run(self, ids: Sequence[int], count: int, take: Callable[[int], None]) -> None:
            for token in range(min(count, len(ids))):
                take(token)

    record = record_run(Loop(), [5, 6, 7], 8)
    assert (record.prompt_tokens, record.completion_tokens) == (3, 3)
    assert record.sent_at <= record.arrivals[0] <= record.arrivals[-1] <= record.ended_at
    result = streams_result([record], tree_s=0.003)
    assert (result.tokens, result.failed, result.gateway_us) == (3, (), None)
    assert result.tree_us == pytest.approx(1000)


def test_a_stream_without_text_is_a_failure() -> None:
    class Silent:
        def run(self, ids: Sequence[int], count: int, take: Callable[[int], None]) -> None:
            pass

    assert streams_result([record_run(Silent(), [1], 8)]).failed == ("no text",)


@pytest.mark.parametrize(
    ("pss_mib", "word"),
    [(899, "MISS"), (901, "PASS"), (1299, "PASS"), (1301, "MISS")],
)
def test_memory_must_be_near_its_estimate(pss_mib: int, word: str) -> None:
    # The estimate is 1000 MiB and an empty process 100 MiB.
    assert memory_verdicts([make_memory(pss_mib)], ["onnx"])[0].word == word


def test_memory_that_was_not_filled_does_not_pass() -> None:
    unfilled = replace(make_memory(1100), problems=("TimeoutError: ",))
    assert memory_verdicts([unfilled], ["onnx"])[0].word == "MISS"
    unread = MemoryResult("onnx", ESTIMATE)
    assert memory_verdicts([unread], ["onnx"])[0].word == "NOT MEASURED"


def test_memory_table_has_all_columns() -> None:
    rows = memory_rows([make_memory(1100), MemoryResult("onnx", ESTIMATE)])
    assert {len(row) for row in rows} == {len(memory.MEMORY_HEAD)}
    assert rows[0][-5:] == ("100.0 MiB", "1000.0 MiB", "850.0 MiB", "1000.0 MiB", "1.000")


def test_memory_is_filled_by_all_streams_and_again_for_prefixes() -> None:
    tokens = memory.prompt_tokens(ESTIMATE)
    per_stream = tokens + memory.ANSWER_TOKENS + memory.SPARE_TOKENS
    assert per_stream * memory.STREAMS == ESTIMATE.kv_tokens
    assert memory.waves(ESTIMATE) == 2
    assert memory.waves(replace(ESTIMATE, prefix_bytes=0)) == 1
    assert memory.waves(replace(ESTIMATE, kv_bytes=0)) == 1


def test_memory_estimate_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPETUS_CONTEXT_LENGTH", "256")
    found = memory.estimate_of(Load(starter_path(), 1, 512, 8))
    assert found.context_tokens == 512
    assert found.total_bytes < memory.BUDGET_BYTES
    with pytest.raises(BenchError, match="holds no onnx model"):
        memory.estimate_of(Load(starter_path(), 1, 512, 8, "onnx"))


def test_process_memory_reads_the_kernels_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "smaps_rollup").write_text(
        "00400000-7fff [rollup]\nRss: 90 kB\nPss: 70 kB\nPss_Anon: 1 kB\n"
        "Private_Clean: 8 kB\nPrivate_Dirty: 32 kB\n"
    )
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert process_memory(5) == ProcessMemory(70 * 1024, 40 * 1024)


def test_sections_are_chosen_by_name_in_the_page_order() -> None:
    assert _sections("memory,gguf") == ("gguf", "memory")
    with pytest.raises(argparse.ArgumentTypeError, match="no such section: ggml"):
        _sections("gguf,ggml")


def make_choices(golden: Path) -> Choices:
    return Choices(
        gguf=starter_path(),
        golden=golden,
        threads=1,
        context=1024,
        streams=(1,),
        rounds=1,
        gguf_tokens=8,
        tokens=8,
        agent_rounds=0,
        agent_tokens=100,
        idle_s=1.0,
        with_ours=True,
        with_peer=True,
    )


def test_a_section_that_cannot_run_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.bench_lib.sections.MLX_KINDS", ("mlx-f32", "mlx-4bit"))
    found: list[Section] = run_section("mlx", make_choices(tmp_path))
    assert [each.is_failed for each in found] == [True, True]
    assert f"there is no model {tmp_path / 'mlx-f32'}" in found[0].problems[0]


def test_memory_of_the_formats_without_a_model_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sections, "measure_memory", lambda load, _: replace(make_memory(1100), format=load.format)
    )
    (found,) = run_section("memory", make_choices(tmp_path))
    assert found.is_failed
    assert found.verdicts[0].name == "memory, gguf: measured / estimate"
    words = [verdict.word for verdict in found.verdicts]
    assert words == ["PASS"] + ["NOT MEASURED"] * len(sections.MEMORY_MODELS)
    assert len(found.problems) == len(sections.MEMORY_MODELS)
