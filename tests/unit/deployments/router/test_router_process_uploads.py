"""Chunks are written by the router's process on threads: slow and hung disks hold nothing up."""

import asyncio
import base64
import hashlib
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from catalog.uploads.upload import CHUNK_BYTES as STORED_CHUNK_BYTES
from core.errors import Unavailable
from core.settings import Settings
from deployments.router.jobs import JobsClient
from deployments.router.uploads import RouterUploads
from router.app import create_app
from router.http.upload_chunks import CHUNK_BYTES
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of, error_of
from tests.unit.deployments.handles import FakeHandle, answering
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.router.api.test_router_jobs import JOB

DATA = b"0123456789" * 1000


@pytest.fixture
def handle() -> Any:
    return FakeHandle(finish_upload=answering(JOB), forget_upload=answering(None))


@pytest.fixture
def uploads(tmp_path: Path, handle: Any) -> RouterUploads:
    return RouterUploads(Settings(home=tmp_path), JobsClient(handle))


@pytest.fixture
async def http(uploads: RouterUploads) -> AsyncIterator[httpx.AsyncClient]:
    services = replace(make_services(), management=FakeManagement(), uploads=uploads)
    async with client_of(create_app(services), **MANAGING) as client:
        yield client


def headers(data: bytes, offset: int) -> dict[str, str]:
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    return {
        "content-type": "application/octet-stream",
        "upload-offset": str(offset),
        "content-digest": f"sha-256=:{digest}:",
    }


async def begin(http: httpx.AsyncClient) -> str:
    files = [{"path": "m/.DS_Store", "size_bytes": 3}, {"path": "m/a.gguf", "size_bytes": 10_000}]
    answer = await http.post("/api/uploads", json={"files": files})
    assert answer.status_code == 201, answer.text
    assert answer.json()["ignored"] == ["m/.DS_Store"]
    assert [file["number"] for file in answer.json()["files"]] == [1]
    return f"/api/uploads/{answer.json()['id']}"


async def test_client_that_lost_its_place_goes_on_from_the_offset_p2(
    http: httpx.AsyncClient, handle: Any
) -> None:
    """P2: 409 and 422 tell what the server has, HEAD too, and the upload ends in a job."""
    one = await begin(http)
    sent = await http.put(f"{one}/1", content=DATA[:6000], headers=headers(DATA[:6000], 0))
    assert (sent.status_code, sent.json()["offset"]) == (200, 6000)
    again = await http.put(f"{one}/1", content=DATA[:6000], headers=headers(DATA[:6000], 0))
    assert (again.status_code, again.headers["upload-offset"]) == (409, "6000")
    lying = await http.put(f"{one}/1", content=DATA[6000:], headers=headers(DATA, 6000))
    assert (lying.status_code, error_of(lying)["code"]) == (422, "chunk_rejected")
    early = await http.post(f"{one}/finish", json={})
    assert (early.status_code, error_of(early)["code"]) == (409, "upload_conflict")
    there = (await http.head(f"{one}/1")).headers["upload-offset"]
    assert there == "6000"
    rest = await http.put(f"{one}/1", content=DATA[6000:], headers=headers(DATA[6000:], 6000))
    assert rest.json()["offset"] == 10_000
    finished = await asyncio.gather(*(http.post(f"{one}/finish", json={}) for _ in range(2)))
    assert [answer.status_code for answer in finished] == [202, 202]
    assert handle.finish_upload.calls == [(one.rpartition("/")[2],)] * 2
    assert (await http.get("/api/uploads")).json()["uploads"][0]["is_finished"]
    assert (await http.delete(one)).status_code == 204
    assert handle.forget_upload.calls == [(one.rpartition("/")[2],)]


async def test_unfinished_upload_is_deleted(http: httpx.AsyncClient, tmp_path: Path) -> None:
    one = await begin(http)
    assert (await http.delete(one)).status_code == 204
    assert (await http.get(one)).status_code == 404
    assert list((tmp_path / "incoming").iterdir()) == []


async def test_slow_disk_delays_no_other_request_p3(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: the event loop answers while a chunk is hashed and written."""
    one = await begin(http)
    gate, writes = threading.Event(), threading.Semaphore(0)
    real = os.fsync

    def slow(descriptor: int) -> None:
        writes.release()
        gate.wait()
        real(descriptor)

    monkeypatch.setattr("catalog.uploads.store.os.fsync", slow)
    sending = asyncio.create_task(http.put(f"{one}/1", content=DATA, headers=headers(DATA, 0)))
    await asyncio.to_thread(writes.acquire)
    for _ in range(20):
        assert (await http.get("/healthz")).status_code == 200
    assert not sending.done()
    gate.set()
    assert (await sending).status_code == 200


async def test_hung_disk_is_told(uploads: RouterUploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.router.uploads._LIMIT_S", 0.05)
    gate = threading.Event()
    monkeypatch.setattr(uploads._store, "uploads", gate.wait)
    with pytest.raises(Unavailable, match="did not answer within"):
        await uploads.uploads()
    gate.set()


def test_both_sides_have_the_same_limit() -> None:
    assert CHUNK_BYTES == STORED_CHUNK_BYTES
