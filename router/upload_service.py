"""Uploads, imports and local folders as the API shows them, and the Protocols to reach them."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from router.job_service import Answer, JobDetail

ImportHow: TypeAlias = Literal["in_place", "clone", "copy"]


class UploadFileView(Answer):
    """A file of an upload: `offset` bytes of it have arrived; `sha256` is empty if not announced.

    `number` is its place among the announced files.
    """

    number: int
    path: str
    size_bytes: int
    sha256: str
    offset: int


class UploadView(Answer):
    """An upload that is not done; `ignored` are the announced paths that are not taken.

    A chunk has at most `chunk_bytes`.  `created_at` is in Unix seconds.  One that `is_finished`
    takes no more bytes: its job tells what becomes of it.
    """

    id: str
    name: str
    is_finished: bool
    created_at: float
    done_bytes: int
    total_bytes: int
    chunk_bytes: int
    files: tuple[UploadFileView, ...]
    ignored: tuple[str, ...]


class UploadList(Answer):
    """The uploads that are not done, oldest first."""

    uploads: tuple[UploadView, ...]


class FolderEntry(Answer):
    """A folder or a file; `modified_at` is in Unix seconds, `size_bytes` of a folder is 0."""

    name: str
    path: str
    is_folder: bool
    size_bytes: int
    modified_at: float


class FolderListing(Answer):
    """What is in a folder of this machine, folders first.

    Without `path` the entries are the folders that may be looked at.  `parent` is null where it
    may not be listed.  `is_truncated` if there is more.
    """

    path: str | None
    parent: str | None
    entries: tuple[FolderEntry, ...]
    is_truncated: bool


class ModelFolder(Answer):
    """A folder that is scanned for models; one that `is_added` was added by an import in place."""

    path: str
    is_added: bool


class ModelFolders(Answer):
    """All folders that are scanned for models."""

    folders: tuple[ModelFolder, ...]


class Uploads(Protocol):
    """The unfinished uploads.  All raise Unavailable while the disk does not answer."""

    async def create(self, files: Sequence[tuple[str, int, str]], name: str) -> UploadView:
        """Return a new upload of files, each with path, bytes and SHA-256 or nothing.

        Raises RequestError for names and numbers that are not taken, UploadConflict for a name
        that another model has, InsufficientDisk.
        """
        ...

    async def uploads(self) -> UploadList:
        """Return all uploads."""
        ...

    async def upload(self, upload_id: str) -> UploadView:
        """Return an upload.  Raises NotFound."""
        ...

    async def write_chunk(
        self, upload_id: str, number: int, offset: int, data: bytes, sha256: bytes
    ) -> UploadFileView:
        """Add bytes to a file, whose SHA-256 is given as 32 bytes.

        Raises NotFound, UploadConflict, ChunkRejected, InsufficientDisk.
        """
        ...

    async def finish(self, upload_id: str) -> JobDetail:
        """Return the job that inspects an upload.  Raises NotFound, UploadConflict."""
        ...

    async def delete(self, upload_id: str) -> None:
        """Delete an upload, and cancel its job.  Raises NotFound."""
        ...


class LocalFiles(Protocol):
    """Folders of this machine, below those that may be looked at.

    All raise Unavailable while their process, or the disk, does not answer.
    """

    async def browse(self, path: str) -> FolderListing:
        """Return what is in a folder; of an empty path those where one may begin.

        Raises RequestError, PermissionDenied, NotFound.
        """
        ...

    async def import_model(self, path: str, how: ImportHow, name: str) -> JobDetail:
        """Return the job that imports a model; an empty `name` means the folder's or file's.

        Raises RequestError, PermissionDenied, NotFound, UploadConflict for a name that is taken.
        """
        ...

    async def model_folders(self) -> ModelFolders:
        """Return the folders that are scanned."""
        ...

    async def remove_model_folder(self, path: str) -> ModelFolders:
        """Scan a folder no more that an import added; nothing in it changes.  Raises NotFound."""
        ...
