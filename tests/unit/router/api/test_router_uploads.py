"""`/api/uploads`: bodies of bytes with limits and hashes, conflicts, names that lead elsewhere."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from core.errors import NotFound, UploadConflict
from router.app import create_app
from router.http.upload_chunks import CHUNK_BYTES
from router.job_service import JobDetail
from router.upload_service import UploadFileView, UploadList, UploadView
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.router.api.test_router_jobs import JOB

ID = "0123456789abcdef" * 2
ONE = f"/api/uploads/{ID}"
BYTES = "application/octet-stream"
FILE = UploadFileView(number=3, path="page.html", size_bytes=50, sha256="", offset=10)
UPLOAD = UploadView(
    id=ID,
    name="tiny",
    is_finished=False,
    created_at=1.0,
    done_bytes=10,
    total_bytes=50,
    chunk_bytes=CHUNK_BYTES,
    files=(FILE,),
    ignored=(".DS_Store",),
)


class FakeUploads:
    """Knows one upload, and notes what it was sent."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.gate: asyncio.Event | None = None
        self.problem: Exception | None = None

    async def create(self, files: Sequence[tuple[str, int, str]], name: str) -> UploadView:
        self.calls.append(("create", *files, name))
        return UPLOAD

    async def uploads(self) -> UploadList:
        return UploadList(uploads=(UPLOAD,))

    async def upload(self, upload_id: str) -> UploadView:
        if upload_id != ID:
            raise NotFound("There is no such upload.", param="id")
        return UPLOAD

    async def write_chunk(
        self, upload_id: str, number: int, offset: int, data: bytes, sha256: bytes
    ) -> UploadFileView:
        self.calls.append(("chunk", upload_id, number, offset, len(data), sha256))
        if self.gate is not None:
            await self.gate.wait()
        if self.problem is not None:
            raise self.problem
        return FILE

    async def finish(self, upload_id: str) -> JobDetail:
        self.calls.append(("finish", upload_id))
        return JOB

    async def delete(self, upload_id: str) -> None:
        self.calls.append(("delete", upload_id))


@pytest.fixture
def uploads() -> FakeUploads:
    return FakeUploads()


Ask = Callable[..., Awaitable[httpx.Response]]


@asynccontextmanager
async def asking(uploads: FakeUploads, **settings: Any) -> AsyncIterator[Ask]:
    services = replace(make_services(**settings), management=FakeManagement())
    app = create_app(replace(services, uploads=uploads))
    async with client_of(app, **MANAGING) as client:
        yield client.request


@pytest.fixture
async def ask(uploads: FakeUploads) -> AsyncIterator[Ask]:
    async with asking(uploads) as send:
        yield send


def headers(data: bytes, offset: int = 0) -> dict[str, str]:
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    return {
        "content-type": BYTES,
        "upload-offset": str(offset),
        "content-digest": f"sha-256=:{digest}:",
    }


async def test_upload_is_created_shown_finished_and_deleted(ask: Ask, uploads: FakeUploads) -> None:
    body = {"files": [{"path": "m/é.gguf", "size_bytes": 5, "sha256": "A" * 64}], "name": "m"}
    begun = await ask("POST", "/api/uploads", json=body)
    assert (begun.status_code, begun.json()) == (201, UPLOAD.model_dump(mode="json"))
    assert (await ask("GET", "/api/uploads")).json()["uploads"] == [begun.json()]
    assert (await ask("GET", ONE)).json() == begun.json()
    finished = await ask("POST", f"{ONE}/finish", json={})
    assert (finished.status_code, finished.json()["id"]) == (202, JOB.id)
    assert (await ask("DELETE", ONE)).status_code == 204
    assert uploads.calls == [
        ("create", ("m/é.gguf", 5, "A" * 64), "m"),
        ("finish", ID),
        ("delete", ID),
    ]


async def test_chunk_larger_than_other_bodies_is_passed_on(uploads: FakeUploads) -> None:
    data = bytes(CHUNK_BYTES)
    async with asking(uploads, max_body="64KiB") as ask:
        answer = await ask("PUT", f"{ONE}/3", content=data, headers=headers(data, 7))
    assert (answer.status_code, answer.json()) == (200, FILE.model_dump())
    assert answer.headers["upload-offset"] == "10"
    assert uploads.calls == [("chunk", ID, 3, 7, CHUNK_BYTES, hashlib.sha256(data).digest())]


async def test_head_tells_the_offset(ask: Ask) -> None:
    answer = await ask("HEAD", f"{ONE}/3")
    assert (answer.headers["upload-offset"], answer.headers["upload-length"]) == ("10", "50")
    assert answer.content == b""
    assert (await ask("HEAD", f"{ONE}/4")).status_code == 404


async def test_conflict_tells_the_offset_to_go_on_from_p2(ask: Ask, uploads: FakeUploads) -> None:
    """P2: a chunk out of order is answered with what the server has."""
    uploads.problem = UploadConflict.at("The server has 10 bytes.", 10)
    answer = await ask("PUT", f"{ONE}/3", content=b"x", headers=headers(b"x"))
    assert (answer.status_code, answer.headers["upload-offset"]) == (409, "10")
    assert error_of(answer)["code"] == "upload_conflict"
    uploads.problem = UploadConflict("It is finished.")
    answer = await ask("PUT", f"{ONE}/3", content=b"x", headers=headers(b"x"))
    assert answer.status_code == 409
    assert "upload-offset" not in answer.headers


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"content-type": "application/json"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"upload-offset": ""}, 400),
        ({"upload-offset": "-1"}, 400),
        ({"upload-offset": "٣"}, 400),
        ({"upload-offset": "9" * 30}, 400),
        ({"content-digest": ""}, 400),
        ({"content-digest": "sha-256=:AAAA:"}, 400),
        ({"content-digest": "md5=:AAAAAAAAAAAAAAAAAAAAAA==:"}, 400),
    ],
)
async def test_chunk_without_its_headers_is_refused(
    ask: Ask, uploads: FakeUploads, changes: dict[str, str], status: int
) -> None:
    sent = {**headers(b"x"), **changes}
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    answer = await ask("PUT", f"{ONE}/3", content=b"x", headers=raw)
    assert answer.status_code == status
    assert uploads.calls == []


async def test_chunk_over_the_limit_is_refused(ask: Ask, uploads: FakeUploads) -> None:
    data = bytes(CHUNK_BYTES + 1)
    answer = await ask("PUT", f"{ONE}/3", content=data, headers=headers(data))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield bytes(CHUNK_BYTES // 8)

    answer = await ask("PUT", f"{ONE}/3", content=pieces(), headers=headers(data))
    assert answer.status_code == 413
    assert uploads.calls == []


@pytest.mark.parametrize(
    "path",
    [
        "/api/uploads/..%2f..%2fetc/0",
        "/api/uploads/%2e%2e/0",
        f"{ONE}/..%2fupload.json",
        f"{ONE}/-1",
        f"{ONE}/99999",
        f"{ONE}/%D9%A3",
        f"/api/uploads/{'A' * 32}/0",
        f"{ONE}/0/x",
    ],
)
async def test_paths_that_lead_elsewhere_reach_nothing_p1(
    ask: Ask, uploads: FakeUploads, path: str
) -> None:
    """P1: traversal in the address of a chunk; only ids of the server and numbers are taken."""
    answer = await ask("PUT", path, content=b"x", headers=headers(b"x"))
    assert answer.status_code in (404, 415)
    assert uploads.calls == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"files": []},
        {"files": [{"path": "a", "size_bytes": -1}]},
        {"files": [{"path": "", "size_bytes": 1}]},
        {"files": [{"path": "a", "size_bytes": 1, "sha256": "short"}]},
        {"files": [{"path": "a", "size_bytes": 1 << 50}]},
        {"files": [{"path": "a", "size_bytes": 1, "target": "/etc"}]},
        {"files": [{"path": "a", "size_bytes": 1}] * 1001},
        {"files": [{"path": "a", "size_bytes": 1}], "id": "x"},
    ],
)
async def test_announcements_are_strict(ask: Ask, body: Any) -> None:
    assert (await ask("POST", "/api/uploads", json=body)).status_code == 400


async def test_thousand_files_can_be_announced(ask: Ask, uploads: FakeUploads) -> None:
    file = {"path": "x" * 50, "size_bytes": 1, "sha256": "a" * 64}
    body: dict[str, Any] = {
        "files": [{**file, "path": f"m/{number:050}"} for number in range(1000)]
    }
    assert (await ask("POST", "/api/uploads", json=body)).status_code == 201
    assert len(uploads.calls[0]) == 1002
    body["files"][0]["path"] = "x" * (1 << 20)
    assert (await ask("POST", "/api/uploads", json=body)).status_code == 413


async def test_chunks_in_memory_are_bounded(ask: Ask, uploads: FakeUploads) -> None:
    uploads.gate = asyncio.Event()
    sent = [
        asyncio.ensure_future(ask("PUT", f"{ONE}/3", content=b"x", headers=headers(b"x")))
        for _ in range(8)
    ]
    while len(uploads.calls) < 8:
        await asyncio.sleep(0)
    refused = await ask("PUT", f"{ONE}/3", content=b"x", headers=headers(b"x"))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    uploads.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*sent)] == [200] * 8
    assert (await ask("PUT", f"{ONE}/3", content=b"x", headers=headers(b"x"))).status_code == 200


async def test_uploaded_pages_are_never_served_p5(ask: Ask) -> None:
    """P5: no route gives the bytes of an uploaded file; what names it is JSON, not sniffed."""
    for path in ("/api/uploads", ONE, f"{ONE}/3"):
        answer = await ask("GET", path)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.json()
    for path in (f"{ONE}/page.html", "/incoming/page.html", "/models/uploads/tiny/page.html"):
        assert (await ask("GET", path)).status_code == 404


async def test_uploads_need_a_credential(uploads: FakeUploads) -> None:
    app = create_app(replace(make_services(), management=FakeManagement(), uploads=uploads))
    async with client_of(app) as client:
        refused = await client.put(f"{ONE}/3", content=b"x", headers=headers(b"x"))
        assert refused.status_code == 401
        assert (await client.post("/api/uploads", json={})).status_code == 401
    assert uploads.calls == []
