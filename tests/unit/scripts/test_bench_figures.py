"""Tests of the benchmark's arithmetic and verdicts."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.units import GIB
from scripts.bench_lib import processes
from scripts.bench_lib.measure import AgentResult, IdleResult, StreamsResult
from scripts.bench_lib.processes import (
    GatewaySnapshot,
    engine_worker_cpu_s,
    gateway_cpu_s,
    main_thread_cpu_s,
)
from scripts.bench_lib.prompts import agent_system_text, stream_bodies
from scripts.bench_lib.report import machine
from scripts.bench_lib.report.figures import (
    rate_verdicts,
    ratios,
    scaling_verdict,
    spread,
    verdicts,
)
from scripts.bench_lib.report.page import gguf_parts, render, streams_parts
from scripts.bench_lib.rounds import Results


def make_streams(rate: float, gateway_us: float | None = 100.0) -> StreamsResult:
    return StreamsResult(
        total_rate=rate,
        window_rate=rate,
        first_token_s=0.1,
        gap_p50_s=0.01,
        gap_p99_s=0.02,
        gateway_us=gateway_us,
        tree_us=5000.0,
        tokens=100,
        prompt_tokens=50,
        failed=(),
        ray_us=None if gateway_us is None else gateway_us / 4,
    )


def make_results(
    *rates: float, gateway_us: float | None = 100.0, first_token_s: float = 0.1, cached: int = 980
) -> Results:
    agent = AgentResult((1.0, 0.1), (1000, 1020), (0, cached))
    results = Results(
        first_token_s=[[first_token_s] * 3 for _ in rates],
        agent=[agent],
        idle_before=IdleResult(1024**2, 0.05),
    )
    results.streams[8] = [make_streams(rate, gateway_us) for rate in rates]
    return results


def words(ours: Results, peer: Results) -> list[str]:
    return [verdict.word for verdict in verdicts(ours, peer)]


def test_verdicts_pass_when_all_targets_are_reached() -> None:
    assert words(make_results(100, 102), make_results(100, 100)) == ["PASS"] * 4


@pytest.mark.parametrize(
    ("ours", "missed"),
    [
        (make_results(90, 91), 0),
        (make_results(100, 100, first_token_s=0.106), 1),
        (make_results(100, 100, cached=900), 2),
        (make_results(100, 100, gateway_us=301.0), 3),
    ],
    ids=["rate", "first token", "agent", "gateway"],
)
def test_verdicts_show_a_loss(ours: Results, missed: int) -> None:
    expected = ["PASS"] * 4
    expected[missed] = "MISS"
    assert words(ours, make_results(100, 100)) == expected


def test_verdicts_do_not_claim_what_was_not_measured() -> None:
    ours = make_results(100)
    ours.streams[8] = [make_streams(100, gateway_us=None)]
    assert words(ours, make_results(100))[-1] == "NOT MEASURED"


def test_verdicts_miss_when_a_stream_failed() -> None:
    ours = make_results(100)
    failed = StreamsResult(120, 120, 0.1, 0.01, 0.02, 100, 1, 10, 10, failed=("HTTP 503",))
    ours.streams[8] = [failed]
    assert words(ours, make_results(100))[0] == "MISS"


def test_ratios_are_taken_pair_by_pair() -> None:
    ours = [make_streams(rate) for rate in (50, 200)]
    peer = [make_streams(rate) for rate in (100, 100)]
    found = ratios(ours, peer, lambda r: r.total_rate)
    assert found is not None
    assert (found.low, found.median, found.high) == (0.5, 1.25, 2.0)
    assert spread([None, None]) is None


def test_rounds_in_which_the_peer_failed_compare_nothing() -> None:
    ours = [make_streams(100), make_streams(100)]
    peer = [replace(make_streams(10), failed=("HTTP 500",)), make_streams(200)]
    found = ratios(ours, peer, lambda r: r.total_rate)
    assert found is not None
    assert (found.low, found.high) == (0.5, 0.5)
    results = Results(), Results()
    results[0].streams[1], results[1].streams[1] = ours[:1], peer[:1]
    assert rate_verdicts(*results, "")[0].word == "NOT MEASURED"


@pytest.mark.parametrize(("rate", "word"), [(301.0, "PASS"), (299.0, "MISS")])
def test_many_streams_are_compared_with_one_of_the_loop(rate: float, word: str) -> None:
    ours, loop = make_results(rate), Results()
    loop.streams[1] = [make_streams(100)]
    verdict = scaling_verdict(ours, loop, "ONNX: ")
    assert verdict.word == word
    assert verdict.name.startswith("ONNX: ")
    # Only numbers of streams that both ran are compared directly.
    assert rate_verdicts(ours, loop, "ONNX: ") == []


def test_gateway_cpu_leaves_out_only_the_runtime() -> None:
    before = GatewaySnapshot(1.0, 10.0, 5.0, {11: 3.0, 12: 3.0}, 0.5)
    after = GatewaySnapshot(1.5, 20.0, 9.0, {11: 5.0, 13: 1.0}, 0.75)
    # 10.5 s in all, less 2 s and 1 s of workers and 4 s native; thread 12 ended and stays ours.
    assert gateway_cpu_s(before, after, after) == pytest.approx(3.5)
    # A reading took 0.2 s, and 0.1 s of the runtime came between.
    again = GatewaySnapshot(1.7, 20.1, 9.1, {11: 5.0, 13: 1.0}, 0.75)
    assert gateway_cpu_s(before, after, again) == pytest.approx(3.3)


def test_engine_workers_are_all_but_the_oldest_engine_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {5: "python", 7: "grpc", 9: "impetus-engine", 10: "impetus-engine"}
    for thread, name in names.items():
        task = tmp_path / "5" / "task" / str(thread)
        task.mkdir(parents=True)
        (task / "comm").write_text(f"{name}\n")
        (task / "schedstat").write_text(f"{thread}000000000 5 6\n")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert engine_worker_cpu_s(5) == {10: 10.0}
    assert main_thread_cpu_s(5) == 5.0


def test_prompts_share_no_beginning_but_repeat_for_the_other_server() -> None:
    bodies = [body for run in ("a", "b") for body in stream_bodies(run, 16, 8)]
    starts = {body["messages"][0]["content"][:10] for body in bodies}
    assert len(starts) == 32
    assert stream_bodies("a", 16, 8) == bodies[:16]
    assert agent_system_text("a", 3000)[:10] != agent_system_text("b", 3000)[:10]
    assert len(agent_system_text("a", 3000)) == 3000


def test_report_shows_a_loss_and_its_failures() -> None:
    ours, peer = make_results(50, 60), make_results(100, 100)
    results = {"Impetus": ours, "llama.cpp": peer}
    page = render(
        [("GGUF", gguf_parts(results))],
        verdicts(ours, peer, "GGUF: "),
        ["GGUF: Impetus: round 1, 8 streams: HTTP 503"],
        [("model", "m|n.gguf")],
    )
    assert "| 0.550 (0.500–0.600) and 0.550 (0.500–0.600) | MISS |" in page
    assert "| of it Ray's own timers and threads, µs per token | 25 (25–25) | 25 (25–25) |" in page
    assert "- GGUF: Impetus: round 1, 8 streams: HTTP 503" in page
    assert "| model | m·n.gguf |" in page


def test_report_compares_only_what_both_ran() -> None:
    ours, loop = make_results(300, gateway_us=None), Results()
    ours.streams[1] = loop.streams[1] = [make_streams(100, gateway_us=None)]
    one, eight = "\n".join(streams_parts({"Impetus": ours, "bare": loop})).split("### 8 streams")
    assert "| what | Impetus | bare | ours / peer |" in one
    assert "| what | Impetus |\n" in eight
    # A figure that nobody has takes no row.
    assert "gateway" not in one + eight


def test_the_report_says_what_a_mac_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("host_statistics64(HOST_VM_INFO64) syscall failed")

    monkeypatch.setattr(machine, "_own_system_info", lambda: "Metal")
    monkeypatch.setattr(machine, "_processor", lambda: "Apple M3")
    assert "not measured" not in dict(machine.describe())
    # As psutil 7.2 on macOS 27.
    monkeypatch.setattr(machine, "machine_memory_bytes", lambda: 16 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", fails)
    monkeypatch.setattr(processes, "PROC", Path("/nowhere"))
    shown = dict(machine.describe())
    assert shown["memory"] == "16.0 GiB"
    assert shown["not measured"].startswith("CPU time and memory of the servers")
