"""`/api/jobs` and `/api/downloads`: what is asked of the jobs' process, answers, refusals."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from core.errors import HubUnavailable, ImpetusError, NotFound
from router.app import create_app
from router.job_service import DownloadLimitsView, JobDetail, JobFile, JobView, PartialView
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement

KEY = "canary-key-1234"
JOB = JobDetail(
    id="a1",
    kind="download",
    title="org/tiny: tiny.gguf",
    state="running",
    reason="",
    code="",
    created_at=1.0,
    started_at=2.0,
    ended_at=None,
    retry_at=None,
    done_bytes=5,
    total_bytes=10,
    bytes_per_s=2.5,
    remaining_s=2.0,
    repository="org/tiny",
    files=(JobFile(path="tiny.gguf", size_bytes=10, sha256=""),),
)
SHOWN = JobView(**JOB.model_dump(include=set(JobView.model_fields)))
SCAN = SHOWN.model_copy(update={"id": "b2", "kind": "scan"})
PARTIAL = PartialView(id="org/tiny", size_bytes=7, changed_at=1.0, removed_at=2.0)
LIMITS = DownloadLimitsView(parallel=2, bytes_per_s=0, hours="")
ACTIONS = [f"/api/jobs/a1/{name}" for name in ("pause", "resume", "cancel", "move")]


class FakeJobs:
    """Knows one job, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.problem: ImpetusError | None = None

    async def jobs(self) -> Sequence[JobView]:
        return [SCAN, SHOWN]

    async def job(self, job_id: str) -> JobDetail:
        return self._answer("job", job_id)

    async def pause(self, job_id: str) -> JobDetail:
        return self._answer("pause", job_id)

    async def resume(self, job_id: str) -> JobDetail:
        return self._answer("resume", job_id)

    async def cancel(self, job_id: str) -> JobDetail:
        return self._answer("cancel", job_id)

    async def move(self, job_id: str, before: str) -> JobDetail:
        return self._answer("move", job_id, before)

    async def download(self, model: str, revision: str, entry: str) -> JobDetail:
        return self._answer("download", "a1", model, revision, entry)

    async def partials(self) -> Sequence[PartialView]:
        return [PARTIAL, PARTIAL]

    async def remove_partial(self, partial_id: str) -> None:
        self.calls.append(("remove", partial_id))
        if partial_id != PARTIAL.id:
            raise NotFound("There is no such download.", param="id")

    async def limits(self) -> DownloadLimitsView:
        self.calls.append(("limits",))
        return LIMITS

    async def change_limits(self, changes: Mapping[str, Any]) -> DownloadLimitsView:
        self.calls.append(("change", repr(dict(changes))))
        return LIMITS

    def _answer(self, name: str, job_id: str, *more: str) -> JobDetail:
        self.calls.append((name, job_id, *more))
        if self.problem is not None:
            raise self.problem
        if job_id != JOB.id:
            raise NotFound(f"There is no job {job_id!r}.", param="id")
        return JOB


@pytest.fixture
def jobs() -> FakeJobs:
    return FakeJobs()


Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def ask(jobs: FakeJobs) -> Ask:
    async def send(method: str, path: str, **options: Any) -> httpx.Response:
        key = {"api_key": options.pop("key")} if "key" in options else {}
        services = replace(make_services(**key), management=FakeManagement(), jobs=jobs)
        credential = {} if key else MANAGING
        async with client_of(create_app(services), **credential) as client:
            return await client.request(method, path, **options)

    return send


async def test_lists_have_the_jobs_in_order(ask: Ask) -> None:
    everything = (await ask("GET", "/api/jobs")).json()["jobs"]
    assert [job["id"] for job in everything] == ["b2", "a1"]
    assert everything[1] == SHOWN.model_dump()
    downloads = (await ask("GET", "/api/downloads")).json()["jobs"]
    assert [job["id"] for job in downloads] == ["a1"]


async def test_one_job_is_shown_with_what_it_does(ask: Ask) -> None:
    answer = await ask("GET", "/api/jobs/a1")
    assert (answer.status_code, answer.json()) == (200, JOB.model_dump(mode="json"))


@pytest.mark.parametrize("name", ["pause", "resume", "cancel"])
async def test_job_is_acted_on(ask: Ask, jobs: FakeJobs, name: str) -> None:
    answer = await ask("POST", f"/api/jobs/a1/{name}", json={})
    assert (answer.json()["id"], jobs.calls) == ("a1", [(name, "a1")])


@pytest.mark.parametrize(
    ("body", "before"), [({}, ""), ({"before": None}, ""), ({"before": "b2"}, "b2")]
)
async def test_job_is_moved(ask: Ask, jobs: FakeJobs, body: dict[str, Any], before: str) -> None:
    assert (await ask("POST", "/api/jobs/a1/move", json=body)).status_code == 200
    assert jobs.calls == [("move", "a1", before)]


async def test_download_answers_with_its_job(ask: Ask, jobs: FakeJobs) -> None:
    answer = await ask("POST", "/api/downloads", json={"model": "org/tiny:Q8_0"})
    assert (answer.status_code, answer.json()["id"]) == (202, "a1")
    body = {"model": "org/tiny", "revision": "v1", "entry": "tiny.gguf"}
    await ask("POST", "/api/downloads", json=body)
    assert jobs.calls == [
        ("download", "a1", "org/tiny:Q8_0", "", ""),
        ("download", "a1", "org/tiny", "v1", "tiny.gguf"),
    ]


async def test_unfinished_downloads_are_listed_and_removed_d14(ask: Ask, jobs: FakeJobs) -> None:
    found = (await ask("GET", "/api/downloads/partials")).json()
    assert found == {"partials": [PARTIAL.model_dump()] * 2, "size_bytes": 14}
    assert (await ask("DELETE", "/api/downloads/partials/org/tiny")).status_code == 204
    assert (await ask("DELETE", "/api/downloads/partials/org/none")).status_code == 404
    assert jobs.calls == [("remove", "org/tiny"), ("remove", "org/none")]


async def test_limits_are_shown_and_changed(ask: Ask, jobs: FakeJobs) -> None:
    assert (await ask("GET", "/api/downloads/limits")).json() == LIMITS.model_dump()
    body = {"hours": "22:30-06:00", "bytes_per_s": None}
    answer = await ask("PATCH", "/api/downloads/limits", json=body)
    assert answer.json() == LIMITS.model_dump()
    assert jobs.calls == [("limits",), ("change", "{'bytes_per_s': None, 'hours': '22:30-06:00'}")]
    for wrong in ({"parallel": 0}, {"parallel": 9}, {"bytes_per_s": -1}, {"hours": 5}, {"x": 1}):
        answer = await ask("PATCH", "/api/downloads/limits", json=wrong)
        assert (answer.status_code, error_of(answer)["param"]) == (400, next(iter(wrong)))
    assert len(jobs.calls) == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", f"/api/jobs/none/{name}") for name in ("pause", "resume", "cancel", "move")),
        ("GET", "/api/jobs/none"),
        ("GET", f"/api/jobs/{'x' * 600}"),
        ("GET", "/api/jobs/%2E%2E%2Fx"),
        ("POST", f"/api/jobs/{'x' * 65}/cancel"),
    ],
)
async def test_unknown_job_is_not_found(ask: Ask, method: str, path: str) -> None:
    answer = await ask(method, path, **({"json": {}} if method == "POST" else {}))
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api/downloads", {}, "model"),
        ("/api/downloads", {"model": ""}, "model"),
        ("/api/downloads", {"model": 5}, "model"),
        ("/api/downloads", {"model": "x" * 2049}, "model"),
        ("/api/downloads", {"model": "a/b", "token": "secret"}, "token"),
        ("/api/downloads", {"model": "a/b", "revision": "x" * 201}, "revision"),
        ("/api/downloads", {"model": "a/b", "entry": ["x"]}, "entry"),
        ("/api/jobs/a1/move", {"before": 5}, "before"),
        ("/api/jobs/a1/pause", {"before": "x"}, "before"),
    ],
)
async def test_wrong_body_is_refused_by_its_field(
    ask: Ask, jobs: FakeJobs, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await ask("POST", path, json=body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert jobs.calls == []


async def test_state_of_the_hub_reaches_the_client(ask: Ask, jobs: FakeJobs) -> None:
    jobs.problem = HubUnavailable("The hub cannot be reached.", retry_after_s=30)
    answer = await ask("POST", "/api/downloads", json={"model": "org/tiny"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert error_of(answer)["code"] == "hub_unavailable"


async def test_jobs_are_guarded_as_management(ask: Ask, jobs: FakeJobs) -> None:
    page = {
        "origin": "http://localhost:8000",
        "sec-fetch-site": "same-origin",
        "x-impetus-token": "",
    }
    for path in (*ACTIONS, "/api/downloads"):
        body: dict[str, Any] = {"model": "a/b"} if "downloads" in path else {}
        assert (await ask("POST", path, json=body, headers=page)).status_code == 403
        assert (await ask("POST", path, json=body, key=KEY)).status_code == 401
    for path in ("/api/jobs", "/api/jobs/a1", "/api/downloads", "/api/downloads/limits"):
        assert (await ask("GET", path, headers=page)).status_code == 403
        assert (await ask("GET", path, key=KEY)).status_code == 401
    assert jobs.calls == []
