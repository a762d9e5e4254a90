"""`/api/fs/browse`, `/api/imports`, `/api/folders`: models that are on this machine already."""

from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.api.answer import Endpoint, answer
from router.job_service import JobList, Jobs
from router.requests.query import Query, read_query
from router.requests.strict_body import StrictBody, read_strict
from router.upload_service import ImportHow, LocalFiles

_KIND = "import"
_LONGEST_PATH = 4096


class BrowseQuery(Query):
    """Which folder; without one those where one may begin."""

    path: Annotated[str, Field(max_length=_LONGEST_PATH)] = ""


class FolderQuery(Query):
    """Which folder."""

    path: Annotated[str, Field(min_length=1, max_length=_LONGEST_PATH)]


class ImportRequest(StrictBody):
    """A model's folder or file, and how it is taken; `name` is that of the new folder."""

    path: Annotated[str, Field(min_length=1, max_length=_LONGEST_PATH)]
    how: ImportHow
    name: Annotated[str, Field(min_length=1, max_length=255)] | None = None


def browse_endpoint(files: LocalFiles) -> Endpoint:
    """Return the handler that lists a folder."""

    async def browse_folder(request: Request) -> Response:
        return answer(await files.browse(read_query(request, BrowseQuery).path))

    return browse_folder


def imports_endpoint(jobs: Jobs) -> Endpoint:
    """Return the handler of the list of imports."""

    async def list_imports(request: Request) -> Response:
        del request
        found = await jobs.jobs()
        return answer(JobList(jobs=tuple(job for job in found if job.kind == _KIND)))

    return list_imports


def import_endpoint(files: LocalFiles) -> Endpoint:
    """Return the handler that begins an import; it answers 202 with the job."""

    async def import_model(request: Request) -> Response:
        body = await read_strict(request, ImportRequest)
        return answer(await files.import_model(body.path, body.how, body.name or ""), 202)

    return import_model


def folders_endpoint(files: LocalFiles) -> Endpoint:
    """Return the handler that lists the scanned folders."""

    async def list_model_folders(request: Request) -> Response:
        del request
        return answer(await files.model_folders())

    return list_model_folders


def remove_folder_endpoint(files: LocalFiles) -> Endpoint:
    """Return the handler that has a folder scanned no more."""

    async def remove_model_folder(request: Request) -> Response:
        path = read_query(request, FolderQuery).path
        return answer(await files.remove_model_folder(path))

    return remove_model_folder
