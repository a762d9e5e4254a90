"""Calls about models that are uploaded or lie on this machine."""

from catalog.jobs import Job
from catalog.uploads.arrival import arrival_of
from catalog.uploads.store import UploadStore
from core.errors import UploadConflict
from core.supervision import call_in_thread
from deployments.jobs.arrivals import (
    IMPORT,
    UPLOAD,
    active_arrivals,
    add_arrival,
    sweep_uploads,
)
from deployments.jobs.calls.jobs import JobCalls
from deployments.jobs.local_files import LocalFiles
from deployments.serve.handles import returning_errors
from router.job_service import JobDetail
from router.upload_service import FolderListing, ImportHow, ModelFolders


class ArrivalCalls(JobCalls):
    """The part of the deployment that takes uploads and imports."""

    _files: LocalFiles
    _uploads: UploadStore

    @returning_errors
    async def finish_upload(self, upload_id: str) -> JobDetail:
        """Return the job of a finished upload.  Raises NotFound, UploadConflict."""
        await self._loaded()
        state = await call_in_thread("impetus-upload", lambda: self._uploads.get(upload_id))
        if not state.upload.is_finished:
            raise UploadConflict("The upload is not finished.")
        arrival = arrival_of(state.upload)
        return await self._changed(lambda runner: add_arrival(runner, UPLOAD, arrival))

    @returning_errors
    async def forget_upload(self, upload_id: str) -> None:
        """Cancel the job of an upload, and delete what has arrived.  Raises NotFound."""
        runner = await self._loaded()
        job = active_arrivals(runner.jobs()).get(upload_id)
        if job is not None:
            runner.cancel(job.id)
            await runner.save()
        else:
            await call_in_thread("impetus-upload", lambda: self._uploads.remove(upload_id))

    @returning_errors
    async def browse(self, path: str) -> FolderListing:
        """Return what is in a folder; see `router.upload_service.LocalFiles`."""
        return await self._files.browse(path)

    @returning_errors
    async def import_model(self, path: str, how: ImportHow, name: str) -> JobDetail:
        """Return the job of an import; see `router.upload_service.LocalFiles`."""
        await self._loaded()
        arrival = await self._files.plan(path, how, name)
        return await self._changed(lambda runner: add_arrival(runner, IMPORT, arrival))

    @returning_errors
    async def model_folders(self) -> ModelFolders:
        """Return the folders that are scanned."""
        return await self._files.model_folders()

    @returning_errors
    async def remove_model_folder(self, path: str) -> ModelFolders:
        """Scan an added folder no more.  Raises NotFound."""
        return await self._files.remove_model_folder(path)

    async def _sweep(self) -> None:
        async def known() -> list[Job]:
            return (await self._loaded()).jobs()

        await sweep_uploads(self._uploads, known)
