"""`/api/downloads`: downloads of models, each of which is a job."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.job_service import JobList, Jobs, PartialList
from router.requests.strict_body import StrictBody, read_strict

_KIND = "download"
_LONGEST_ID = 1024


class DownloadRequest(StrictBody):
    """What to download: `model` as a user pastes it, such as org/name:Q4_K_M or an address.

    `entry` names one of the repository's models; without it and without a quantization or a file
    in `model` the best for this machine is chosen.
    """

    model: Annotated[str, Field(min_length=1, max_length=2048)]
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    entry: Annotated[str, Field(min_length=1, max_length=1024)] | None = None


class DownloadLimitsPatch(StrictBody):
    """Changes of limits: an omitted field stays, null resets it; hours such as 22:30-06:00."""

    parallel: Annotated[int, Field(ge=1, le=8)] | None = None
    bytes_per_s: Annotated[int, Field(ge=0, le=2**53)] | None = None
    hours: Annotated[str, Field(max_length=20)] | None = None


def downloads_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler of the list."""

    async def list_downloads(request: Request) -> Response:
        del request
        found = await jobs.jobs()
        return answer(JobList(jobs=tuple(job for job in found if job.kind == _KIND)))

    return list_downloads


def download_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler that begins a download; it answers 202 with the job."""

    async def begin_download(request: Request) -> Response:
        body = await read_strict(request, DownloadRequest)
        job = await jobs.download(body.model, body.revision or "", body.entry or "")
        return answer(job, 202)

    return begin_download


def partials_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler that lists the unfinished downloads that no job goes on with."""

    async def list_partials(request: Request) -> Response:
        del request
        found = tuple(await jobs.partials())
        size_bytes = sum(one.size_bytes for one in found)
        return answer(PartialList(partials=found, size_bytes=size_bytes))

    return list_partials


def remove_partial_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler that removes one of them."""

    async def remove_partial(request: Request) -> Response:
        await jobs.remove_partial(str(request.path_params["partial_id"])[:_LONGEST_ID])
        return Response(status_code=204)

    return remove_partial


def limits_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler that shows the limits of downloads."""

    async def show_limits(request: Request) -> Response:
        del request
        return answer(await jobs.limits())

    return show_limits


def change_limits_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler that changes the limits of downloads."""

    async def change_limits(request: Request) -> Response:
        patch = await read_strict(request, DownloadLimitsPatch)
        return answer(await jobs.change_limits(patch.model_dump(exclude_unset=True)))

    return change_limits
