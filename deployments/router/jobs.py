"""The router's way to the process of long jobs."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.awake_time import AwakeTimeout
from core.errors import ImpetusError, Unavailable
from deployments.serve.handles import Handle, ReplicaDied, call, direct
from router.conversion_service import ConversionTargets, ConversionWish
from router.hub_service import (
    HubReadme,
    HubReferenceAnswer,
    HubRepositoryAnswer,
    HubResults,
    HubSearch,
    HubTokenAnswer,
)
from router.job_service import DownloadLimitsView, JobDetail, JobView, PartialView
from router.upload_service import FolderListing, ImportHow, ModelFolders

_LIMIT_S = 15.0
_EXPLAIN_LIMIT_S = 5.0
# For what asks the hub, each answer of which may take half a minute.
_HUB_LIMIT_S = 180.0


class JobsClient:
    """Implements `Jobs`, `Hub`, `Conversions` and `LocalFiles` of the router's services."""

    def __init__(self, jobs: Handle) -> None:
        self._jobs = direct(jobs)

    async def jobs(self) -> Sequence[JobView]:
        """Return all jobs in the order of the queue."""
        found: list[JobView] = await _answer(self._jobs.jobs.remote())
        return found

    async def job(self, job_id: str) -> JobDetail:
        """Return a job."""
        return await _detail(self._jobs.job.remote(job_id))

    async def pause(self, job_id: str) -> JobDetail:
        """Stop a job and keep what is done."""
        return await _detail(self._jobs.pause.remote(job_id))

    async def resume(self, job_id: str) -> JobDetail:
        """Put a paused or failed job back into the queue."""
        return await _detail(self._jobs.resume.remote(job_id))

    async def cancel(self, job_id: str) -> JobDetail:
        """Stop a job and remove what is done."""
        return await _detail(self._jobs.cancel.remote(job_id))

    async def move(self, job_id: str, before: str) -> JobDetail:
        """Put a job before another one, or at the end."""
        return await _detail(self._jobs.move.remote(job_id, before))

    async def download(self, model: str, revision: str, entry: str) -> JobDetail:
        """Return the job of a download."""
        return await _detail(self._jobs.download.remote(model, revision, entry), _HUB_LIMIT_S)

    async def conversion_targets(self, model: str) -> ConversionTargets:
        """Return what a model can be converted to."""
        found: ConversionTargets = await _answer(self._jobs.conversion_targets.remote(model))
        return found

    async def convert(self, wish: ConversionWish) -> JobDetail:
        """Return the job of a conversion."""
        return await _detail(self._jobs.convert.remote(wish))

    async def explain_unrunnable(self, model_id: str, problem: ImpetusError) -> ImpetusError:
        """Return what a request for a model gets that cannot run here because of `problem`.

        That is `problem` itself without an answer within 5 s.
        """
        try:
            async with AwakeTimeout(_EXPLAIN_LIMIT_S):
                await call(self._jobs.explain_unrunnable.remote(model_id, problem))
        except (ReplicaDied, TimeoutError):
            return problem
        except ImpetusError as answer:
            return answer
        return problem

    async def finish_upload(self, upload_id: str) -> JobDetail:
        """Return the job of a finished upload."""
        return await _detail(self._jobs.finish_upload.remote(upload_id))

    async def forget_upload(self, upload_id: str) -> None:
        """Cancel the job of an upload, and delete what has arrived."""
        await _answer(self._jobs.forget_upload.remote(upload_id))

    async def browse(self, path: str) -> FolderListing:
        """Return what is in a folder."""
        found: FolderListing = await _answer(self._jobs.browse.remote(path))
        return found

    async def import_model(self, path: str, how: ImportHow, name: str) -> JobDetail:
        """Return the job of an import."""
        return await _detail(self._jobs.import_model.remote(path, how, name))

    async def model_folders(self) -> ModelFolders:
        """Return the folders that are scanned."""
        found: ModelFolders = await _answer(self._jobs.model_folders.remote())
        return found

    async def remove_model_folder(self, path: str) -> ModelFolders:
        """Scan an added folder no more."""
        found: ModelFolders = await _answer(self._jobs.remove_model_folder.remote(path))
        return found

    async def partials(self) -> Sequence[PartialView]:
        """Return the unfinished downloads that no job goes on with."""
        found: list[PartialView] = await _answer(self._jobs.partials.remote())
        return found

    async def remove_partial(self, partial_id: str) -> None:
        """Remove one of them."""
        await _answer(self._jobs.remove_partial.remote(partial_id))

    async def limits(self) -> DownloadLimitsView:
        """Return the limits of downloads."""
        found: DownloadLimitsView = await _answer(self._jobs.limits.remote())
        return found

    async def change_limits(self, changes: Mapping[str, Any]) -> DownloadLimitsView:
        """Change limits of downloads."""
        found: DownloadLimitsView = await _answer(self._jobs.change_limits.remote(changes))
        return found

    async def search(self, search: HubSearch) -> HubResults:
        """Return results of a search."""
        found: HubResults = await _answer(self._jobs.search.remote(search), _HUB_LIMIT_S)
        return found

    async def repository(
        self, name: str, revision: str, context_tokens: int
    ) -> HubRepositoryAnswer:
        """Return a repository with what fits."""
        response = self._jobs.repository.remote(name, revision, context_tokens)
        found: HubRepositoryAnswer = await _answer(response, _HUB_LIMIT_S)
        return found

    async def readme(self, name: str, revision: str) -> HubReadme:
        """Return the README of a repository."""
        found: HubReadme = await _answer(self._jobs.readme.remote(name, revision), _HUB_LIMIT_S)
        return found

    async def resolve(self, text: str) -> HubReferenceAnswer:
        """Return what a pasted text refers to."""
        found: HubReferenceAnswer = await _answer(self._jobs.resolve.remote(text))
        return found

    async def token(self) -> HubTokenAnswer:
        """Return which token is in use."""
        found: HubTokenAnswer = await _answer(self._jobs.token.remote())
        return found

    async def store_token(self, token: str) -> HubTokenAnswer:
        """Store a token."""
        found: HubTokenAnswer = await _answer(self._jobs.store_token.remote(token), _HUB_LIMIT_S)
        return found

    async def remove_token(self) -> HubTokenAnswer:
        """Forget the stored token."""
        found: HubTokenAnswer = await _answer(self._jobs.remove_token.remote())
        return found


async def _detail(response: Any, limit_s: float | None = None) -> JobDetail:
    found: JobDetail = await _answer(response, limit_s)
    return found


async def _answer(response: Any, limit_s: float | None = None) -> Any:
    """Return the answer of the jobs' process.  Raises its errors, and Unavailable without one."""
    limit_s = limit_s or _LIMIT_S
    try:
        async with AwakeTimeout(limit_s):
            return await call(response)
    except ReplicaDied as problem:
        raise Unavailable(
            "The process of long jobs has ended and is started again; ask again. Its jobs go on.",
            retry_after_s=2,
        ) from problem
    except TimeoutError as problem:
        raise Unavailable(
            f"The process of long jobs did not answer within {limit_s:g} s; try again.",
            retry_after_s=5,
        ) from problem
