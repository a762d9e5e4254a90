"""`/api/fs/browse`, `/api/imports`, `/api/folders`: what is asked, answers, refusals."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from core.errors import PermissionDenied
from router.app import create_app
from router.job_service import JobDetail
from router.upload_service import FolderEntry, FolderListing, ImportHow, ModelFolder, ModelFolders
from tests.fakes import MANAGING, make_services
from tests.live_server import client_of, error_of
from tests.unit.router.api.test_router_api import FakeManagement
from tests.unit.router.api.test_router_jobs import JOB, FakeJobs

ENTRY = FolderEntry(name="é", path="/m/é", is_folder=True, size_bytes=0, modified_at=1.0)
LISTING = FolderListing(path="/m", parent=None, entries=(ENTRY,), is_truncated=False)
FOLDERS = ModelFolders(folders=(ModelFolder(path="/m", is_added=True),))


class FakeFiles:
    """Shows one folder, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    async def browse(self, path: str) -> FolderListing:
        self.calls.append(("browse", path))
        if path == "/etc":
            raise PermissionDenied("'/etc' may not be looked at.", param="path")
        return LISTING

    async def import_model(self, path: str, how: ImportHow, name: str) -> JobDetail:
        self.calls.append(("import", path, how, name))
        return JOB

    async def model_folders(self) -> ModelFolders:
        return FOLDERS

    async def remove_model_folder(self, path: str) -> ModelFolders:
        self.calls.append(("remove", path))
        return FOLDERS


@pytest.fixture
def files() -> FakeFiles:
    return FakeFiles()


Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
async def ask(files: FakeFiles) -> AsyncIterator[Ask]:
    services = replace(make_services(), management=FakeManagement(), files=files, jobs=FakeJobs())
    async with client_of(create_app(services), **MANAGING) as client:
        yield client.request


async def test_folder_is_listed(ask: Ask, files: FakeFiles) -> None:
    assert (await ask("GET", "/api/fs/browse")).json() == LISTING.model_dump(mode="json")
    await ask("GET", "/api/fs/browse", params={"path": "/m/é &"})
    assert files.calls == [("browse", ""), ("browse", "/m/é &")]


async def test_what_may_not_be_looked_at_is_forbidden_p4(ask: Ask) -> None:
    """P4: 403 outside of the roots."""
    answer = await ask("GET", "/api/fs/browse", params={"path": "/etc"})
    assert (answer.status_code, error_of(answer)["param"]) == (403, "path")


async def test_folders_of_the_user_are_not_shown_without_a_credential() -> None:
    services = replace(make_services(), management=FakeManagement(), files=FakeFiles())
    async with client_of(create_app(replace(services, jobs=FakeJobs()))) as client:
        assert (await client.get("/api/fs/browse")).status_code == 401
        assert (await client.get("/api/folders")).status_code == 200


async def test_import_begins_with_its_job(ask: Ask, files: FakeFiles) -> None:
    body = {"path": "/m/a.gguf", "how": "clone", "name": "mine"}
    answer = await ask("POST", "/api/imports", json=body)
    assert (answer.status_code, answer.json()["id"]) == (202, JOB.id)
    await ask("POST", "/api/imports", json={"path": "/m", "how": "in_place"})
    assert files.calls == [
        ("import", "/m/a.gguf", "clone", "mine"),
        ("import", "/m", "in_place", ""),
    ]
    assert (await ask("GET", "/api/imports")).json() == {"jobs": []}


async def test_folders_are_listed_and_removed(ask: Ask, files: FakeFiles) -> None:
    assert (await ask("GET", "/api/folders")).json() == FOLDERS.model_dump(mode="json")
    assert (await ask("DELETE", "/api/folders", params={"path": "/m"})).status_code == 200
    assert files.calls == [("remove", "/m")]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"path": "/m"},
        {"path": "/m", "how": "move"},
        {"path": "", "how": "copy"},
        {"path": "/" + "x" * 4096, "how": "copy"},
        {"path": "/m", "how": "copy", "target": "/etc"},
    ],
)
async def test_imports_are_strict(ask: Ask, files: FakeFiles, body: Any) -> None:
    assert (await ask("POST", "/api/imports", json=body)).status_code == 400
    assert files.calls == []


@pytest.mark.parametrize("query", ["?path=", "?folder=/m", "?path=/m&path=/n", ""])
async def test_removing_needs_one_folder(ask: Ask, files: FakeFiles, query: str) -> None:
    assert (await ask("DELETE", f"/api/folders{query}")).status_code == 400
    assert files.calls == []
