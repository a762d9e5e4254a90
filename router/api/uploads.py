"""`/api/uploads`: models that are sent in chunks, each of which can be sent again."""

import base64
import re
from typing import Annotated

from pydantic import Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from core.errors import NotFound, RequestError, Unavailable, UploadConflict
from core.units import MIB
from router.api.answer import Endpoint, answer
from router.http.errors import error_response
from router.requests.strict_body import EmptyBody, StrictBody, read_strict
from router.upload_service import UploadFileView, Uploads

_MOST_FILES = 1000
_MOST_BYTES = 1 << 43
_BODY_BYTES = MIB
_LONGEST_ID = 64
# Of chunks whose bytes are in memory, by all uploads together.
_MOST_CHUNKS = 8
_OFFSET = re.compile(r"[0-9]{1,15}")
# Source: RFC 9530, "Digest Fields".
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:,|$)")


class NewUploadFile(StrictBody):
    """A file of a model, with its path below the model's folder or, beginning with that, beside it.

    `sha256` is hexadecimal; with it the whole file is checked.
    """

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    size_bytes: Annotated[int, Field(ge=0, le=_MOST_BYTES)]
    sha256: Annotated[str, Field(min_length=64, max_length=64)] | None = None


class NewUpload(StrictBody):
    """All files of one model; `name` is that of its folder, by default taken from the paths."""

    files: Annotated[list[NewUploadFile], Field(min_length=1, max_length=_MOST_FILES)]
    name: Annotated[str, Field(min_length=1, max_length=255)] | None = None


def uploads_endpoint(uploads: Uploads) -> Endpoint:
    """Return the handler of the list."""

    async def list_uploads(request: Request) -> Response:
        del request
        return answer(await uploads.uploads())

    return list_uploads


def create_upload_endpoint(uploads: Uploads) -> Endpoint:
    """Return the handler that begins an upload; it answers 201."""

    async def create_upload(request: Request) -> Response:
        body = await read_strict(request, NewUpload, _BODY_BYTES)
        files = [(file.path, file.size_bytes, file.sha256 or "") for file in body.files]
        return answer(await uploads.create(files, body.name or ""), 201)

    return create_upload


def upload_endpoint(uploads: Uploads) -> Endpoint:
    """Return the handler that shows an upload with how far each of its files is."""

    async def show_upload(request: Request) -> Response:
        return answer(await uploads.upload(_id(request)))

    return show_upload


def upload_file_endpoint(uploads: Uploads) -> Endpoint:
    """Return the handler that tells how far a file is, also to HEAD in the header Upload-Offset."""

    async def show_upload_file(request: Request) -> Response:
        upload = await uploads.upload(_id(request))
        number = _number(request)
        file = next((file for file in upload.files if file.number == number), None)
        if file is None:
            raise NotFound(f"The upload {upload.id} has no file {number}.", param="file")
        return _file_answer(file)

    return show_upload_file


def chunk_endpoint(uploads: Uploads) -> Endpoint:
    """Return the handler that takes a chunk; a conflict tells the offset to go on from."""
    running = 0

    async def write_upload_chunk(request: Request) -> Response:
        nonlocal running
        if running >= _MOST_CHUNKS:
            raise Unavailable(
                f"{_MOST_CHUNKS} chunks are being received; send it again.", retry_after_s=1
            )
        running += 1
        try:
            data = await _bytes_of(request)
            offset, digest = _offset(request), _digest(request)
            file = await uploads.write_chunk(_id(request), _number(request), offset, data, digest)
        except UploadConflict as conflict:
            if conflict.offset is None:
                raise
            return error_response(conflict, headers={"upload-offset": str(conflict.offset)})
        finally:
            running -= 1
        return _file_answer(file)

    return write_upload_chunk


def finish_upload_endpoint(uploads: Uploads) -> Endpoint:
    """Return the handler that has an upload inspected; it answers 202 with the job."""

    async def finish_upload(request: Request) -> Response:
        await read_strict(request, EmptyBody)
        return answer(await uploads.finish(_id(request)), 202)

    return finish_upload


def delete_upload_endpoint(uploads: Uploads) -> Endpoint:
    """Return the handler that gives an upload up."""

    async def delete_upload(request: Request) -> Response:
        await uploads.delete(_id(request))
        return Response(status_code=204)

    return delete_upload


async def _bytes_of(request: Request) -> bytes:
    """Return the body, whose length `BodyLimit` bounds; read first, so that an error arrives."""
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise RequestError("The client disconnected before its chunk was complete.") from error


def _offset(request: Request) -> int:
    text = request.headers.get("upload-offset", "")
    if not _OFFSET.fullmatch(text):
        raise RequestError(
            "Send where the chunk begins in its file, in bytes, as `Upload-Offset: 0`.",
            param="upload-offset",
        )
    return int(text)


def _digest(request: Request) -> bytes:
    found = _DIGEST.search(request.headers.get("content-digest", ""))
    if found is None:
        raise RequestError(
            "Send the SHA-256 of the chunk's bytes, in base64, as `Content-Digest: sha-256=:…:`.",
            param="content-digest",
        )
    return base64.b64decode(found[1])


def _file_answer(file: UploadFileView) -> Response:
    response = answer(file)
    response.headers["upload-offset"] = str(file.offset)
    response.headers["upload-length"] = str(file.size_bytes)
    response.headers["cache-control"] = "no-store"
    return response


def _id(request: Request) -> str:
    return str(request.path_params["upload_id"])[:_LONGEST_ID]


def _number(request: Request) -> int:
    text = str(request.path_params["file"])
    if not (text.isascii() and text.isdecimal() and len(text) <= 4):
        raise NotFound("Files of an upload are named by their numbers.", param="file")
    return int(text)
