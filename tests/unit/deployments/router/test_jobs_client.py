"""The router's calls to the process of long jobs, and what clients get while it is away."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from core.errors import ConversionNeeded, InsufficientMemory, NotFound, Unavailable
from deployments.router.jobs import JobsClient
from router.conversion_service import ConversionWish
from router.hub_service import HubSearch
from tests.unit.deployments.handles import FakeHandle, answering

WISH = ConversionWish("m", "mlx")
TOO_LARGE = InsufficientMemory("It needs 9 GiB.")


def died() -> RayActorError:
    return RayActorError("it died")


async def test_each_method_asks_for_its_own() -> None:
    names = ["job", "pause", "resume", "cancel", "move", "download", "jobs"]
    names += ["limits", "change_limits", "search", "repository", "readme"]
    names += ["token", "store_token", "remove_token", "conversion_targets", "convert"]
    names += ["finish_upload", "browse", "import_model"]
    names += ["model_folders", "remove_model_folder", "forget_upload"]
    handle: Any = FakeHandle(**{name: answering(name) for name in names})
    client = JobsClient(handle)
    answers: list[Any] = [
        await client.job("a"),
        await client.pause("a"),
        await client.resume("a"),
        await client.cancel("a"),
        await client.move("a", "b"),
        await client.download("m", "r", "e"),
        await client.jobs(),
        await client.limits(),
        await client.change_limits({"parallel": 2}),
        await client.search(HubSearch(text="x")),
        await client.repository("org/m", "main", 16),
        await client.readme("org/m", "main"),
        await client.token(),
        await client.store_token("t"),
        await client.remove_token(),
        await client.conversion_targets("m"),
        await client.convert(WISH),
        await client.finish_upload("u"),
        await client.browse("/m"),
        await client.import_model("/m", "copy", "n"),
        await client.model_folders(),
        await client.remove_model_folder("/m"),
    ]
    await client.forget_upload("u")
    assert answers == names[:-1]
    assert handle.import_model.calls == [("/m", "copy", "n")]
    assert handle.forget_upload.calls == [("u",)]
    assert handle.move.calls == [("a", "b")]
    assert handle.conversion_targets.calls == [("m",)]
    assert handle.convert.calls == [(WISH,)]
    assert handle.download.calls == [("m", "r", "e")]
    assert handle.search.calls == [(HubSearch(text="x"),)]
    assert handle.repository.calls == [("org/m", "main", 16)]


async def test_refusals_are_raised_as_they_are() -> None:
    handle: Any = FakeHandle(job=answering(NotFound("There is no job 'a'.")))
    with pytest.raises(NotFound, match="no job 'a'"):
        await JobsClient(handle).job("a")


async def test_process_that_died_is_told() -> None:
    handle: Any = FakeHandle(jobs=answering(died()))
    with pytest.raises(Unavailable, match="is started again; ask again") as caught:
        await JobsClient(handle).jobs()
    assert caught.value.retry_after_s == 2


async def test_process_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.router.jobs._LIMIT_S", 0.02)

    async def hang() -> None:
        await asyncio.sleep(60)

    handle: Any = FakeHandle(jobs=hang)
    with pytest.raises(Unavailable, match="did not answer"):
        await JobsClient(handle).jobs()
    (response,) = handle.jobs.responses
    assert response.is_cancelled


async def test_the_problem_itself_is_told_while_nobody_knows_of_a_conversion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.router.jobs._EXPLAIN_LIMIT_S", 0.02)

    async def hang(*arguments: object) -> None:
        del arguments
        await asyncio.sleep(60)

    needed = ConversionNeeded("It can be converted.")
    for answer, told in (
        (answering(needed), needed),
        (answering(None), TOO_LARGE),
        (answering(died()), TOO_LARGE),
        (hang, TOO_LARGE),
    ):
        handle: Any = FakeHandle(explain_unrunnable=answer)
        assert await JobsClient(handle).explain_unrunnable("m", TOO_LARGE) is told
        assert handle.explain_unrunnable.calls == [("m", TOO_LARGE)]
