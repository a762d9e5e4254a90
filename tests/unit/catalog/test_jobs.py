"""The state machine of long jobs, and which of them begins next."""

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import jobs
from catalog.jobs import (
    ENDED,
    MAX_INTERRUPTIONS,
    STARTABLE,
    Hours,
    Job,
    JobLimits,
    JobState,
    next_jobs,
    parse_hours,
    why_not,
)
from core.errors import RequestError

NOON = datetime(2026, 5, 1, 12, 0)
NONE = JobLimits()
STATES: tuple[JobState, ...] = (
    *("queued", "running", "paused", "waiting", "interrupted", "done", "failed", "cancelled"),
)


def job(name: str = "a", kind: str = "download", **changes: Any) -> Job:
    return Job(name, kind, name, "{}", created=1.0, rank=float(ord(name[0])), **changes)


def names(found: tuple[Job, ...]) -> str:
    return "".join(one.id for one in found)


def test_job_runs_and_is_done() -> None:
    running = jobs.start(job(), 5.0)
    assert (running.state, running.started) == ("running", 5.0)
    half = jobs.progress(running, 50, 100)
    done = jobs.finish(half, 9.0)
    assert (done.state, done.done, done.total, done.ended) == ("done", 100, 100, 9.0)
    assert jobs.progress(done, 1, 2) == done


def test_job_says_why_a_step_is_refused() -> None:
    for step in (jobs.pause, jobs.resume, lambda one: jobs.cancel(one, 2.0)):
        with pytest.raises(RequestError, match="The job a is done and cannot be"):
            step(job(state="done"))


def test_job_that_waits_begins_again_at_its_time() -> None:
    waiting = jobs.wait(jobs.start(job(), 5.0), "The hub refuses", "hub_rate_limited", 65.0)
    assert next_jobs([waiting], NONE, 64.0, NOON) == ()
    assert "in 1 s" in why_not(waiting, NONE, 64.0, NOON)
    assert names(next_jobs([waiting], NONE, 65.0, NOON)) == "a"
    # A clock that was set back since then makes no job wait for days.
    assert why_not(waiting, NONE, 64.0 - 24 * 3600, NOON) == ""
    assert jobs.next_change([waiting, job("b")], 60.0) == 5.0
    assert jobs.next_change([job("b")], 60.0) is None
    again = jobs.start(waiting, 70.0)
    assert (again.started, again.reason, again.code, again.not_before) == (5.0, "", "", None)


def test_job_whose_process_dies_goes_on_but_not_for_ever() -> None:
    one = job()
    for count in range(1, MAX_INTERRUPTIONS):
        one = jobs.interrupt(jobs.start(one, 1.0), "killed", 2.0)
        assert (one.state, one.interruptions) == ("interrupted", count)
        assert names(next_jobs([one], NONE, 3.0, NOON)) == "a"
    ended = jobs.interrupt(jobs.start(one, 1.0), "killed", 2.0)
    assert (ended.state, ended.ended) == ("failed", 2.0)
    assert "5 times in a row" in ended.reason
    # One that got on in between, and one that a user starts again, begin to count anew.
    assert jobs.interrupt(jobs.start(jobs.advance(one), 1.0), "killed", 2.0).interruptions == 1
    assert jobs.resume(ended).interruptions == 0
    # What a user paused meanwhile stays paused.
    assert jobs.interrupt(jobs.pause(one), "killed", 2.0).state == "paused"


def test_jobs_after_a_restart_go_on_by_themselves() -> None:
    before = [jobs.start(job("a"), 1.0), jobs.pause(job("b")), job("c")]
    after = jobs.after_restart(before)
    assert [one.state for one in after] == ["interrupted", "paused", "queued"]
    assert after[0].interruptions == 0
    assert names(next_jobs(after, JobLimits({"download": 9}), 1.0, NOON)) == "ac"


def test_jobs_begin_in_order_and_as_many_as_may_run() -> None:
    running = jobs.start(job("z"), 1.0)
    queue = [job("c"), job("a"), job("b", kind="scan"), running]
    assert names(next_jobs(queue, NONE, 1.0, NOON)) == "b"
    assert names(next_jobs(queue, JobLimits({"download": 2}), 1.0, NOON)) == "ab"
    assert names(next_jobs(queue, JobLimits({"download": 9}), 1.0, NOON)) == "abc"
    assert names(next_jobs(queue, JobLimits({"download": 0}), 1.0, NOON)) == "b"


def test_jobs_that_are_held_back_stop_and_do_not_begin() -> None:
    running, queued = jobs.start(job("a"), 1.0), job("b")
    hot = JobLimits(held={"download": "the machine is hot"})
    assert names(jobs.to_stop([running, queued], hot, NOON)) == "a"
    assert why_not(queued, hot, 1.0, NOON) == "the machine is hot"
    night = JobLimits({"download": 2}, hours={"download": parse_hours("22:30-06:00")})
    assert names(jobs.to_stop([running, queued], night, NOON)) == "a"
    assert "hours" in why_not(queued, night, 1.0, NOON)
    late = NOON.replace(hour=23)
    assert jobs.to_stop([running, queued], night, late) == ()
    assert names(next_jobs([running, queued], night, 1.0, late)) == "b"


def test_jobs_are_moved_in_the_queue() -> None:
    queue = [job("a"), job("b"), job("c"), replace(job("d"), state="done")]

    def order(moved: Job) -> str:
        others = [one for one in queue if one.id not in (moved.id, "d")]
        return names(tuple(sorted([*others, moved], key=lambda one: one.rank)))

    assert order(jobs.move(queue, "c", "a")) == "cab"
    assert order(jobs.move(queue, "c", "b")) == "acb"
    assert order(jobs.move(queue, "a", "")) == "bca"
    assert order(jobs.move(queue, "b", "c")) == "abc"
    assert jobs.move([job("a")], "a", "").rank == 0.0
    for moved, before in (("x", "a"), ("a", "x"), ("d", "a"), ("a", "d"), ("a", "a")):
        with pytest.raises(RequestError):
            jobs.move(queue, moved, before)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:30-06:00", ["22:30", "23:59", "00:00", "05:59"], ["06:00", "22:29", "12:00"]),
        ("01:00-05:00", ["01:00", "04:59"], ["00:59", "05:00"]),
        ("00:00-00:00", ["00:00", "12:00", "23:59"], []),
    ],
)
def test_hours_of_a_day(text: str, inside: list[str], outside: list[str]) -> None:
    hours = parse_hours(text)
    for clock in (*inside, *outside):
        hour, minute = map(int, clock.split(":"))
        assert hours.has(NOON.replace(hour=hour, minute=minute)) == (clock in inside)


@pytest.mark.parametrize("text", ["", "22:30", "22-06", "24:00-01:00", "1:60-2:00", "a:b-c:d", "-"])
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="22:30-06:00"):
        parse_hours(text)
    with pytest.raises(RequestError):
        Hours(-1, 5)


STEPS: dict[str, Any] = {
    "start": lambda one: jobs.start(one, 2.0),
    "finish": lambda one: jobs.finish(one, 3.0),
    "fail": lambda one: jobs.fail(one, "r", "c", 3.0),
    "wait": lambda one: jobs.wait(one, "r", "c", None),
    "interrupt": lambda one: jobs.interrupt(one, "r", 3.0),
    "pause": jobs.pause,
    "resume": jobs.resume,
    "cancel": lambda one: jobs.cancel(one, 3.0),
    "restart": lambda one: jobs.after_restart([one])[0],
    "progress": lambda one: jobs.progress(one, 1, 2),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=40))
def test_job_of_any_history_is_consistent(steps: list[str]) -> None:
    one = job()
    for name in steps:
        before = one
        try:
            one = STEPS[name](one)
        except RequestError:
            one = before
        assert one.state in STATES
        assert (one.ended is not None) == (one.state in ENDED)
        assert one.not_before is None or one.state == "waiting"
        # What is done or cancelled stays so.
        assert before.state not in ("done", "cancelled") or one == before
        starts = bool(next_jobs([one], NONE, 9.0, NOON))
        assert starts == (one.state in STARTABLE)
