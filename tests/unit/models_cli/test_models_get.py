"""`scripts/models get` and `jobs`: joining, following, leaving and changing long jobs."""

from typing import Any

import pytest

from core.errors import HubNotFound, Unavailable
from router.job_service import JobDetail, PartialView
from scripts.models_lib import progress
from tests.unit.models_cli.conftest import DONE, JOB, Run, Stand


def job(**changes: Any) -> JobDetail:
    return JOB.model_copy(update=changes)


async def test_get_follows_the_download_to_its_model(stand: Stand, run: Run) -> None:
    stalled = job(stalled_s=12.0, bytes_per_s=0.0, remaining_s=None)
    waiting = job(state="waiting", reason="The hub does not answer.", retry_at=86_400.0)
    stand.jobs.script = [stalled, waiting, job(done_bytes=4096), DONE]
    shown = await run("get", "hf.co/org/tiny:Q8_0")
    assert (shown.code, shown.out) == (0, "Ready: tiny@gguf-q8_0 (4.0 KiB)\n")
    assert stand.jobs.calls[0] == ("download", "hf.co/org/tiny:Q8_0", "", "")
    assert "org/tiny: tiny.gguf: 1.0 KiB of 4.0 KiB, 2.0 KiB/s, 2 s left" in shown.err
    assert "waiting: The hub does not answer., again at 1970-01-0" in shown.err
    assert "\x1b" not in shown.err


async def test_get_as_json_prints_the_job_alone(stand: Stand, run: Run) -> None:
    shown = await run("get", "org/tiny", "--revision", "v1", "--entry", "tiny.gguf", "--json")
    assert (shown.code, shown.err) == (0, "")
    assert shown.document == DONE.model_dump(mode="json")
    assert stand.jobs.calls[0] == ("download", "org/tiny", "v1", "tiny.gguf")


async def test_get_without_waiting_tells_how_to_follow(stand: Stand, run: Run) -> None:
    shown = await run("get", "org/tiny", "--no-wait")
    assert shown.code == 0
    assert "scripts/models jobs follow a1" in shown.out
    assert [call[0] for call in stand.jobs.calls] == ["download"]


async def test_get_goes_on_with_a_paused_download(stand: Stand, run: Run) -> None:
    stand.jobs.begun = job(state="paused")
    shown = await run("get", "org/tiny")
    assert (shown.code, "was paused; it goes on" in shown.err) == (0, True)
    assert [call[0] for call in stand.jobs.calls] == ["download", "resume", "job"]


@pytest.mark.parametrize(
    ("state", "reason", "told"),
    [
        ("failed", "The SHA-256 differs.", "failed: The SHA-256 differs."),
        ("cancelled", "", "was cancelled"),
        ("paused", "", "jobs resume a1"),
    ],
)
async def test_get_fails_with_its_job(
    stand: Stand, run: Run, state: str, reason: str, told: str
) -> None:
    stand.jobs.script = [job(state=state, reason=reason)]
    shown = await run("get", "org/tiny")
    assert (shown.code, shown.out) == (1, "")
    assert told in shown.err
    assert (await run("get", "org/tiny", "--json")).document["state"] == state


async def test_ctrl_c_leaves_the_download_and_says_so(
    stand: Stand, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "_pause", interrupt)
    shown = await run("get", "org/tiny")
    assert (shown.code, shown.out) == (130, "")
    assert "goes on in the server" in shown.err
    assert "jobs cancel a1" in shown.err
    assert [call[0] for call in stand.jobs.calls] == ["download"]


async def test_short_silence_of_the_server_is_waited_for(stand: Stand, run: Run) -> None:
    silent = Unavailable("The process of long jobs has ended.", retry_after_s=2)
    stand.jobs.script = [silent, silent, DONE]
    shown = await run("get", "org/tiny")
    assert (shown.code, shown.out) == (0, "Ready: tiny@gguf-q8_0 (4.0 KiB)\n")
    assert "waiting for the server to answer" in shown.err


async def test_long_silence_ends_the_command_and_not_the_download(
    stand: Stand, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SILENCE_LIMIT_S", 0.0)
    stand.jobs.script = [Unavailable("The process of long jobs has ended.")]
    shown = await run("get", "org/tiny")
    assert shown.code == 3
    assert "run the same command again" in shown.err


async def test_job_that_is_gone_ends_the_command(stand: Stand, run: Run) -> None:
    stand.jobs.begun = job(id="gone")
    shown = await run("get", "org/tiny")
    assert (shown.code, shown.err.splitlines()[-1]) == (1, "There is no job 'gone'.")


async def test_get_tells_what_the_hub_refuses(stand: Stand, run: Run) -> None:
    async def refuse(*_: str) -> JobDetail:
        raise HubNotFound("The hub has no repository org/nothing.")

    stand.jobs.download = refuse  # type: ignore[method-assign,assignment]
    shown = await run("get", "org/nothing", "--json")
    assert (shown.code, shown.document["error"]["code"]) == (1, "hub_not_found")
    assert shown.err == "The hub has no repository org/nothing.\n"


@pytest.mark.usefixtures("stand")
async def test_jobs_are_listed_without_those_that_are_over(run: Run) -> None:
    shown = await run("jobs")
    assert [line[0] for line in shown.lines] == ["ID", "a1"]
    assert shown.out.splitlines()[1].endswith("25%, 2.0 KiB/s, 2 s left")
    for arguments in (["jobs", "--all"], ["jobs", "list", "--all"]):
        assert [line[0] for line in (await run(*arguments)).lines] == ["ID", "a1", "b2"]
    assert [one["id"] for one in (await run("jobs", "--json")).document["jobs"]] == ["a1"]


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (("pause", "a1"), ("pause", "a1")),
        (("resume", "a1"), ("resume", "a1")),
        (("cancel", "a1"), ("cancel", "a1")),
        (("move", "a1"), ("move", "a1", "")),
        (("move", "a1", "--before", "b2"), ("move", "a1", "b2")),
    ],
)
async def test_job_is_changed(
    stand: Stand, run: Run, arguments: tuple[str, ...], call: tuple[str, ...]
) -> None:
    shown = await run("jobs", *arguments)
    assert (shown.code, shown.lines[0][0]) == (0, "org/tiny:")
    assert stand.jobs.calls == [call]


@pytest.mark.usefixtures("stand")
async def test_job_is_followed_by_its_id(run: Run) -> None:
    assert (await run("jobs", "follow", "a1")).out == "Ready: tiny@gguf-q8_0 (4.0 KiB)\n"
    unknown = await run("jobs", "follow", "zz")
    assert (unknown.code, unknown.err) == (1, "There is no job 'zz'.\n")


async def test_limits_are_shown_and_changed(stand: Stand, run: Run) -> None:
    assert "unlimited" in (await run("jobs", "limits")).out
    shown = await run("jobs", "limits", "--speed", "5MB", "--hours", "22:30-06:00")
    assert stand.jobs.calls == [("limits", {"bytes_per_s": 5_000_000, "hours": "22:30-06:00"})]
    assert "4.8 MiB/s" in shown.out
    assert (await run("jobs", "limits", "--speed", "fast")).code == 2


async def test_rests_of_downloads_are_listed_and_removed(stand: Stand, run: Run) -> None:
    rest = PartialView(id="org/tiny", size_bytes=2048, changed_at=1.0, removed_at=86_400.0)
    stand.jobs.left = [rest]
    assert (await run("jobs", "partials")).lines[1][:3] == ["org/tiny", "2.0", "KiB"]
    assert (await run("jobs", "partials", "--json")).document["size_bytes"] == 2048
    unknown = await run("jobs", "partials", "rm", "org/none")
    assert (unknown.code, "org/none" in unknown.err) == (1, True)
    assert (await run("jobs", "partials", "rm", "org/tiny")).code == 0
    assert (await run("jobs", "partials")).out == "Nothing is left of downloads that ended.\n"
