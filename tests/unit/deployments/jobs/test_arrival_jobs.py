"""Uploads and imports as jobs: from chunks and local folders to the catalog; what is left."""

import asyncio
import hashlib
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from catalog.added_folders import added_folders
from catalog.store import CatalogStore
from catalog.uploads.store import KEPT_S, UploadStore
from catalog.uploads.upload import Announced
from core.errors import NotFound, PermissionDenied, RequestError, Unavailable, UploadConflict
from core.settings import Settings
from deployments.jobs.deployment import JobsReplica
from deployments.messages import ModelStates
from router.job_service import JobDetail
from tests.gguf_files import llama_gguf
from tests.unit.catalog.scan.folders import Shelf, write_model
from tests.unit.deployments.handles import FakeHandle

LIMIT_S = 120.0


class Machine:
    """A home folder with a scheduler that scans it, and a folder of the user's."""

    def __init__(self, folder: Path) -> None:
        self.theirs = folder / "theirs"
        self.theirs.mkdir()
        self.settings = Settings(
            home=folder / "home",
            formats=["safetensors", "gguf", "pytorch"],
            threads=1,
            starters=False,
            browse_path=[self.theirs],
        )
        self.settings.home.mkdir()
        self.store = UploadStore(self.settings.home)
        self.shelf = Shelf(self.settings.home, CatalogStore(self.settings.catalog_file))

        async def tell(version: int) -> ModelStates:
            await asyncio.sleep(60 if version == 1 else 0)
            return ModelStates(version=1)

        async def scan() -> None:
            await asyncio.to_thread(self.shelf.scan)

        self.scheduler: Any = FakeHandle(model_states=tell, rescan=scan)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[JobsReplica]:
        replica = JobsReplica(self.settings, self.scheduler)
        try:
            yield replica
        finally:
            await replica._supervisor.stop()
            replica.__del__()

    def uploaded(self, folder: Path) -> str:
        """Return the id of a finished upload of a folder."""
        files = {f"{folder.name}/{p.name}": p.read_bytes() for p in sorted(folder.iterdir())}
        announced = [Announced(path, len(data)) for path, data in files.items()]
        upload = self.store.create(announced, "").upload
        for number, data in enumerate(files.values()):
            self.store.write_chunk(upload.id, number, 0, data, hashlib.sha256(data).digest())
        return self.store.finish(upload.id).id

    def left(self) -> list[str]:
        """Return what is in quarantine, and which models were published."""
        home = self.settings.home
        folders = [home / "incoming", home / "models" / "uploads"]
        return sorted(path.name for one in folders if one.exists() for path in one.iterdir())


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.shelf.store.close()


async def result(call: Awaitable[Any]) -> Any:
    """Return what a method answers; its error is raised, as the router's calls do."""
    found = await call
    if isinstance(found, Exception):
        raise found
    return found


async def until(replica: JobsReplica, job: JobDetail, *states: str) -> JobDetail:
    async with asyncio.timeout(LIMIT_S):
        while (found := await result(replica.job(job.id))).state not in states:
            await asyncio.sleep(0.05)
    assert isinstance(found, JobDetail)
    return found


async def test_upload_ends_in_the_catalog(machine: Machine) -> None:
    upload_id = machine.uploaded(write_model(machine.theirs / "nice"))
    async with machine.running() as replica:
        job = await result(replica.finish_upload(upload_id))
        assert (job.kind, job.title) == ("upload", "nice")
        joined = await result(replica.finish_upload(upload_id))
        assert joined.id == job.id
        done = await until(replica, job, "done", "failed")
        assert (done.state, done.reason, done.model_ids) == ("done", "", ("nice@safetensors-f32",))
        assert done.folder == str(machine.settings.home / "models" / "uploads" / "nice")
        assert {file.path for file in done.files} == set(os.listdir(machine.theirs / "nice"))
        assert done.done_bytes == done.total_bytes == sum(f.size_bytes for f in done.files)
        assert machine.left() == ["nice"]
        with pytest.raises(NotFound):
            await result(replica.finish_upload(upload_id))


async def test_hostile_upload_ends_with_the_reason_and_leaves_nothing(machine: Machine) -> None:
    """M7: a model that wants code of its own is refused; nothing of it stays."""
    source = write_model(machine.theirs / "evil")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    config["model_type"] = "evil"
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_evil.py").write_text(f"open({str(machine.theirs / 'canary')!r}, 'w')")
    upload_id = machine.uploaded(source)
    async with machine.running() as replica:
        job = await result(replica.finish_upload(upload_id))
        failed = await until(replica, job, "done", "failed")
    assert (failed.state, failed.code, failed.model_ids) == ("failed", "broken_model", ())
    assert failed.reason
    assert machine.left() == []
    assert not (machine.theirs / "canary").exists()


async def test_upload_goes_on_in_the_next_process(machine: Machine) -> None:
    upload_id = machine.uploaded(write_model(machine.theirs / "nice"))
    async with machine.running() as replica:
        job = await result(replica.finish_upload(upload_id))
        await until(replica, job, "running")
    async with machine.running() as replica:
        assert (await until(replica, job, "done", "failed")).model_ids == ("nice@safetensors-f32",)


async def test_upload_is_given_up_before_and_after_its_end(machine: Machine) -> None:
    unfinished = machine.store.create([Announced("a.gguf", 10)], "a").upload.id
    finished = machine.uploaded(write_model(machine.theirs / "nice"))
    async with machine.running() as replica:
        with pytest.raises(UploadConflict, match="is not finished"):
            await result(replica.finish_upload(unfinished))
        await result(replica.forget_upload(unfinished))
        job = await result(replica.finish_upload(finished))
        await result(replica.forget_upload(finished))
        assert (await result(replica.job(job.id))).state == "cancelled"
        async with asyncio.timeout(LIMIT_S):
            while machine.left():
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["clone", "copy"])
async def test_import_ends_in_the_catalog(machine: Machine, how: Any) -> None:
    source = write_model(machine.theirs / "nice")
    async with machine.running() as replica:
        job = await result(replica.import_model(str(source), how, "mine"))
        done = await until(replica, job, "done", "failed")
        assert (done.state, done.reason, done.kind) == ("done", "", "import")
        assert done.model_ids == ("mine@safetensors-f32",)
        assert machine.left() == ["mine"]
        with pytest.raises(UploadConflict, match="'mine' was uploaded or imported before"):
            await result(replica.import_model(str(source), how, "Mine"))


async def test_file_of_a_cache_is_copied_under_its_own_name(machine: Machine) -> None:
    cache = machine.theirs / "models--org--nice"
    (cache / "blobs").mkdir(parents=True)
    llama_gguf(cache / "blobs" / "abc123")
    (cache / "snapshots" / "1").mkdir(parents=True)
    link = cache / "snapshots" / "1" / "nice-Q8_0.gguf"
    link.symlink_to(cache / "blobs" / "abc123")
    async with machine.running() as replica:
        job = await result(replica.import_model(str(link), "copy", ""))
        done = await until(replica, job, "done", "failed")
    assert (done.state, done.reason, machine.left()) == ("done", "", ["nice"])
    assert sorted(os.listdir(done.folder)) == ["nice-Q8_0.gguf", "upload.json"]
    assert not (Path(done.folder) / "nice-Q8_0.gguf").is_symlink()


async def test_folder_in_place_is_scanned_from_now_on(machine: Machine) -> None:
    source = write_model(machine.theirs / "nice")
    async with machine.running() as replica:
        job = await result(replica.import_model(str(source), "in_place", ""))
        done = await until(replica, job, "done", "failed")
        assert (done.state, done.reason, done.folder) == ("done", "", str(source))
        assert done.model_ids == ("nice@safetensors-f32",)
        assert added_folders(machine.settings) == [source]
        assert machine.left() == []
        shown = await result(replica.model_folders())
        assert [(one.path, one.is_added) for one in shown.folders] == [
            (str(machine.settings.home / "models"), False),
            (str(source), True),
        ]
        await result(replica.remove_model_folder(str(source)))
        assert added_folders(machine.settings) == []
        with pytest.raises(NotFound, match="IMPETUS_MODELS_PATH"):
            await result(replica.remove_model_folder(str(machine.settings.home / "models")))


async def test_folder_without_a_model_is_not_added(machine: Machine) -> None:
    (machine.theirs / "notes").mkdir()
    (machine.theirs / "notes" / "a.txt").write_text("hello")
    async with machine.running() as replica:
        job = await result(replica.import_model(str(machine.theirs / "notes"), "in_place", ""))
        failed = await until(replica, job, "done", "failed")
    assert (failed.state, failed.code) == ("failed", "broken_model")
    assert added_folders(machine.settings) == []
    assert (machine.theirs / "notes" / "a.txt").exists()


async def test_imports_outside_of_the_roots_are_refused_p4(
    machine: Machine, tmp_path: Path
) -> None:
    """P4: only what may be looked at may be imported."""
    secret = write_model(tmp_path / "secret")
    (machine.theirs / "link").symlink_to(secret)
    file = machine.theirs / "a.gguf"
    file.write_bytes(b"GGUF")
    os.mkfifo(machine.theirs / "pipe")
    refused: list[tuple[str, Any, str, type[Exception]]] = [
        (str(secret), "copy", "", PermissionDenied),
        (str(machine.theirs / "link"), "in_place", "", PermissionDenied),
        (str(machine.theirs / "none"), "copy", "", NotFound),
        (str(machine.theirs / "pipe"), "copy", "", RequestError),
        (str(file), "in_place", "", RequestError),
        (str(file), "copy", "../x", RequestError),
    ]
    async with machine.running() as replica:
        for path, how, name, error in refused:
            with pytest.raises(error):
                await result(replica.import_model(path, how, name))
        assert await result(replica.jobs()) == []


async def test_folders_are_browsed_from_the_roots(machine: Machine) -> None:
    write_model(machine.theirs / "nice")
    (machine.settings.home / "models").mkdir()
    async with machine.running() as replica:
        begin = await result(replica.browse(""))
        assert [one.name for one in begin.entries] == ["theirs", "models"]
        assert (begin.path, begin.parent) == (None, None)
        inner = await result(replica.browse(str(machine.theirs / "nice")))
        assert "config.json" in {one.name for one in inner.entries}
        assert inner.parent == str(machine.theirs)
        with pytest.raises(PermissionDenied):
            await result(replica.browse("/etc"))


async def test_disk_that_does_not_answer_holds_nothing_up_p4(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4: a network mount that hangs costs its own request alone, for a limited time."""
    gate = threading.Event()
    monkeypatch.setattr("deployments.jobs.local_files._LIMIT_S", 0.1)
    monkeypatch.setattr("deployments.jobs.local_files._MOST_WAITING", 2)
    monkeypatch.setattr("deployments.jobs.local_files.browse", lambda *_: gate.wait())
    async with machine.running() as replica:
        files = replica._files
        hung = [asyncio.create_task(files._look(gate.wait, 0.05)) for _ in range(2)]
        for task in hung:
            with pytest.raises(Unavailable, match="did not answer within"):
                await task
        with pytest.raises(Unavailable, match="2 looks at disks wait already"):
            await result(replica.browse(str(machine.theirs)))
        # Everything else goes on.
        assert await result(replica.jobs()) == []
        gate.set()
        async with asyncio.timeout(LIMIT_S):
            while files._waiting:
                await asyncio.sleep(0.01)
        assert [one.name for one in (await result(replica.browse(""))).entries] == ["theirs"]


async def test_uploads_that_were_given_up_are_swept_at_the_start(machine: Machine) -> None:
    old = machine.store.create([Announced("a.gguf", 10)], "old").upload.id
    new = machine.store.create([Announced("a.gguf", 10)], "new").upload.id
    past = time.time() - KEPT_S - 60
    for path in (machine.store.folder(old), *machine.store.folder(old).rglob("*")):
        os.utime(path, (past, past))
    async with machine.running():
        async with asyncio.timeout(LIMIT_S):
            while old in machine.left():
                await asyncio.sleep(0.05)
    assert machine.left() == [new]
