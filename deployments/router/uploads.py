"""Writes the chunks of uploads to disk: in the process that receives them, on threads of their own.

No byte goes through Ray, and the event loop waits for no disk.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from catalog.uploads.store import UploadState, UploadStore
from catalog.uploads.upload import CHUNK_BYTES, Announced, UploadFile
from core.errors import Unavailable
from core.settings import Settings
from core.supervision import call_in_thread
from deployments.router.jobs import JobsClient
from router.job_service import JobDetail
from router.upload_service import UploadFileView, UploadList, UploadView

Result = TypeVar("Result")

# A disk that hangs, such as one of the network, must not keep a request for ever.
_LIMIT_S = 60.0


class RouterUploads:
    """Implements `router.upload_service.Uploads`; for one event loop."""

    def __init__(self, settings: Settings, jobs: JobsClient) -> None:
        self._store = UploadStore(settings.home)
        self._jobs = jobs
        # The room on the disk is looked at for one new upload after the other.
        self._creating = asyncio.Lock()

    async def create(self, files: Sequence[tuple[str, int, str]], name: str) -> UploadView:
        """Return a new upload."""
        announced = [Announced(*file) for file in files]
        async with self._creating:
            return _view(await _on_disk(lambda: self._store.create(announced, name)))

    async def uploads(self) -> UploadList:
        """Return all uploads."""
        found = await _on_disk(self._store.uploads)
        return UploadList(uploads=tuple(map(_view, found)))

    async def upload(self, upload_id: str) -> UploadView:
        """Return an upload."""
        return _view(await _on_disk(lambda: self._store.get(upload_id)))

    async def write_chunk(
        self, upload_id: str, number: int, offset: int, data: bytes, sha256: bytes
    ) -> UploadFileView:
        """Add bytes to a file."""
        state = await _on_disk(
            lambda: self._store.write_chunk(upload_id, number, offset, data, sha256)
        )
        pairs = zip(state.upload.files, state.offsets, strict=True)
        return next(_file(file, offset) for file, offset in pairs if file.number == number)

    async def finish(self, upload_id: str) -> JobDetail:
        """Return the job that inspects an upload."""
        await _on_disk(lambda: self._store.finish(upload_id))
        return await self._jobs.finish_upload(upload_id)

    async def delete(self, upload_id: str) -> None:
        """Delete an upload, and cancel its job."""
        state = await _on_disk(lambda: self._store.get(upload_id))
        if state.upload.is_finished:
            await self._jobs.forget_upload(upload_id)
        else:
            await _on_disk(lambda: self._store.remove(upload_id))


async def _on_disk(function: Callable[[], Result]) -> Result:
    """Call a function that uses the disk.  Raises Unavailable if that does not answer."""
    try:
        async with asyncio.timeout(_LIMIT_S):
            return await call_in_thread("impetus-upload", function)
    except TimeoutError:
        raise Unavailable(
            f"The disk of the data folder did not answer within {_LIMIT_S:g} s; ask for the "
            "upload's offset, and go on from there.",
            retry_after_s=5,
        ) from None


def _view(state: UploadState) -> UploadView:
    upload = state.upload
    return UploadView(
        id=upload.id,
        name=upload.name,
        is_finished=upload.is_finished,
        created_at=upload.created,
        done_bytes=state.done_bytes,
        total_bytes=upload.size_bytes,
        chunk_bytes=CHUNK_BYTES,
        files=tuple(map(_file, upload.files, state.offsets)),
        ignored=upload.ignored,
    )


def _file(file: UploadFile, offset: int) -> UploadFileView:
    return UploadFileView(
        number=file.number,
        path=file.path,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        offset=offset,
    )
