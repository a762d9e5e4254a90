"""`/api/jobs`: the long jobs, their queue, and what may be done with each."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from core.errors import NotFound
from router.api.answer import Endpoint, answer
from router.job_service import JobDetail, JobList, Jobs
from router.requests.strict_body import EmptyBody, StrictBody, read_strict

_LONGEST_ID = 64


class JobMove(StrictBody):
    """Where a job goes in the queue: before the job `before`, or to the end with null."""

    before: Annotated[str, Field(min_length=1, max_length=_LONGEST_ID)] | None = None


def jobs_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler of the list."""

    async def list_jobs(request: Request) -> Response:
        del request
        return answer(JobList(jobs=tuple(await jobs.jobs())))

    return list_jobs


def job_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler of one job."""

    async def show_job(request: Request) -> Response:
        return answer(await jobs.job(_id(request)))

    return show_job


def job_action_endpoint(act: Callable[[str], Awaitable[JobDetail]]) -> Endpoint:
    """Return the handler that pauses, resumes or cancels a job."""

    async def act_on_job(request: Request) -> Response:
        await read_strict(request, EmptyBody)
        return answer(await act(_id(request)))

    return act_on_job


def job_move_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler that gives a job another place in the queue."""

    async def move_job(request: Request) -> Response:
        body = await read_strict(request, JobMove)
        return answer(await jobs.move(_id(request), body.before or ""))

    return move_job


def _id(request: Request) -> str:
    """Return the id in the path.  Raises NotFound for one that is too long."""
    job_id = str(request.path_params["job_id"])
    if len(job_id) > _LONGEST_ID:
        raise NotFound("There is no job of such a long id.", param="id")
    return job_id
