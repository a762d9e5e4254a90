"""`scripts/models add`: imports by path, uploads in chunks that go on where they ended."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import ImpetusError, NotFound, PermissionDenied, Unavailable
from core.settings import Settings
from deployments.router.uploads import RouterUploads
from router.app import create_app
from router.job_service import JobDetail
from router.upload_service import FolderListing, ImportHow, ModelFolders, UploadFileView
from scripts.models_lib import upload as sending
from tests.fakes import MANAGING, make_services
from tests.live_server import serving
from tests.unit.models_cli.conftest import JOB, Run, ScriptedJobs, Stand
from tests.unit.router.api.test_router_api import FakeManagement

CHUNK = 1000
KEY = "canary-key-1234"
# Marks a problem that comes when the chunk has been written.
AFTERWARDS = "afterwards"


class FinishedUploads:
    """The jobs of finished uploads."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    async def finish_upload(self, upload_id: str) -> JobDetail:
        self.finished.append(upload_id)
        return JOB.model_copy(update={"kind": "upload"})


class FragileUploads(RouterUploads):
    """The real uploads, of which chunks get lost or refused as a test says."""

    def __init__(self, jobs: FinishedUploads) -> None:
        super().__init__(Settings(), jobs)  # type: ignore[arg-type]
        self.created: list[str] = []
        self.sent: list[tuple[int, int, int]] = []
        self.problems: list[ImpetusError | None] = []

    async def create(self, files: Any, name: str) -> Any:
        made = await super().create(files, name)
        self.created.append(made.name)
        return made.model_copy(update={"chunk_bytes": CHUNK})

    async def uploads(self) -> Any:
        found = await super().uploads()
        small = tuple(one.model_copy(update={"chunk_bytes": CHUNK}) for one in found.uploads)
        return found.model_copy(update={"uploads": small})

    async def write_chunk(
        self, upload_id: str, number: int, offset: int, data: bytes, sha256: bytes
    ) -> UploadFileView:
        problem = self.problems.pop(0) if self.problems else None
        if problem is not None and problem.param != AFTERWARDS:
            raise problem
        self.sent.append((number, offset, len(data)))
        answer = await super().write_chunk(upload_id, number, offset, data, sha256)
        if problem is not None:
            raise problem
        return answer


class FakeFiles:
    """Notes imports, and refuses folders that nobody allowed."""

    def __init__(self) -> None:
        self.imported: list[tuple[str, str, str]] = []
        self.problem: Exception | None = None

    async def browse(self, path: str) -> FolderListing:
        raise NotFound(path)

    async def import_model(self, path: str, how: ImportHow, name: str) -> JobDetail:
        if self.problem is not None:
            raise self.problem
        self.imported.append((path, how, name))
        return JOB.model_copy(update={"kind": "import"})

    async def model_folders(self) -> ModelFolders:
        raise NotFound("none")

    async def remove_model_folder(self, path: str) -> ModelFolders:
        raise NotFound(path)


@dataclass
class Remote:
    """A server that takes models."""

    incoming: Path
    files: FakeFiles
    uploads: FragileUploads
    finished: FinishedUploads
    jobs: ScriptedJobs = field(default_factory=ScriptedJobs)
    other: tuple[str, ...] = ()

    def has(self, name: str) -> bytes:
        """Return the bytes of a file that has arrived."""
        (found,) = self.incoming.rglob(name)
        return found.read_bytes()


@pytest.fixture
async def remote(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Remote]:
    """A server of another machine; `other` are the arguments that name it."""
    del stand
    monkeypatch.setattr(sending, "_PAUSE_S", 0.0)
    finished = FinishedUploads()
    made = Remote(tmp_path / "incoming", FakeFiles(), FragileUploads(finished), finished)
    services = replace(
        make_services(api_key=KEY),
        management=FakeManagement(),
        jobs=made.jobs,
        uploads=made.uploads,
        files=made.files,
        management_token=MANAGING["x-impetus-token"],
    )
    async with serving(create_app(services)) as port:
        made.other = ("--url", f"http://127.0.0.1:{port}", "--key", KEY)
        monkeypatch.setenv("IMPETUS_API_KEY", KEY)
        monkeypatch.setenv("IMPETUS_PORT", "9")
        yield made


@pytest.fixture
def own(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """The same server as that of this machine."""
    monkeypatch.setenv("IMPETUS_PORT", remote.other[1].rpartition(":")[2])
    return remote


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder."""
    folder = tmp_path / "My Model"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(250)) * 10)
    (folder / "sub" / "config.json").write_text("{}")
    (folder / "empty.txt").write_text("")
    (folder / ".DS_Store").write_text("junk")
    (folder / "tokenizer.json").symlink_to(folder / "sub" / "config.json")
    return folder


async def test_own_server_is_told_the_path(own: Remote, run: Run, model: Path) -> None:
    file = model / "weights.safetensors"
    assert (await run("add", str(model))).out == "Ready: tiny@gguf-q8_0 (4.0 KiB)\n"
    await run("add", str(file))
    await run("add", str(model), "--copy", "--name", "Mine")
    assert own.files.imported == [
        (str(model), "in_place", ""),
        (str(file), "clone", ""),
        (str(model), "copy", "Mine"),
    ]
    assert (await run("add", str(model), "--no-wait", "--json")).document["kind"] == "import"


async def test_folder_that_may_not_be_looked_at_can_be_sent(
    own: Remote, run: Run, model: Path
) -> None:
    own.files.problem = PermissionDenied("It is in none of the folders that may be looked at.")
    shown = await run("add", str(model))
    assert shown.code == 1
    assert "none of the folders" in shown.err
    assert "--upload" in shown.err
    assert (await run("add", str(model), "--upload")).code == 0
    assert len(own.finished.finished) == 1


async def test_other_server_gets_every_file(remote: Remote, run: Run, model: Path) -> None:
    shown = await run("add", str(model), *remote.other)
    assert (shown.code, shown.out) == (0, "Ready: tiny@gguf-q8_0 (4.0 KiB)\n"), shown.err
    assert remote.uploads.created == ["My Model"]
    assert remote.has("weights.safetensors") == bytes(range(250)) * 10
    assert remote.has("config.json") == remote.has("tokenizer.json") == b"{}"
    assert not list(remote.incoming.rglob(".DS_Store"))
    assert [size for _, _, size in remote.uploads.sent] == [2, 2, 1000, 1000, 500]


async def test_upload_goes_on_where_the_last_one_ended(
    remote: Remote, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_SILENCE_LIMIT_S", 0.0)
    file = model / "weights.safetensors"
    remote.uploads.problems = [None, Unavailable("The disk does not answer.")]
    broken = await run("add", str(file), *remote.other)
    assert (broken.code, "run the same command again" in broken.err) == (3, True)
    assert (await run("add", str(file), *remote.other)).code == 0
    assert remote.uploads.sent == [(0, 0, 1000), (0, 1000, 1000), (0, 2000, 500)]
    assert remote.uploads.created == ["weights"]
    assert remote.has("weights.safetensors") == file.read_bytes()


async def test_changed_file_is_not_mixed_with_what_was_sent(
    remote: Remote, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_SILENCE_LIMIT_S", 0.0)
    file = model / "weights.safetensors"
    remote.uploads.problems = [None, Unavailable("The disk does not answer.")]
    await run("add", str(file), *remote.other)
    file.write_bytes(b"x" * 2500)
    refused = await run("add", str(file), *remote.other)
    assert (refused.code, "is not finished" in refused.err) == (1, True)
    (_, (upload_id, *shown)) = (await run("uploads", *remote.other)).lines
    assert shown == ["2.4", "KiB", "40%", "weights"]
    assert (await run("uploads", "rm", upload_id, *remote.other)).code == 0
    assert (await run("uploads", *remote.other)).out == "No upload is unfinished.\n"
    assert (await run("add", str(file), *remote.other)).code == 0
    assert remote.has("weights.safetensors") == b"x" * 2500


async def test_answer_that_got_lost_is_no_harm(remote: Remote, run: Run, model: Path) -> None:
    """The chunk is there, so that the server refuses it the second time and tells the offset."""
    file = model / "weights.safetensors"
    remote.uploads.problems = [None, Unavailable("The answer is lost.", param=AFTERWARDS)]
    shown = await run("add", str(file), *remote.other)
    assert shown.code == 0, shown.err
    assert remote.has("weights.safetensors") == file.read_bytes()


async def test_ctrl_c_keeps_what_was_sent(
    remote: Remote, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("scripts.server_lib.client.ServerClient.put_bytes", interrupt)
        shown = await run("add", str(model), *remote.other)
    assert (shown.code, "the same command goes on" in shown.err) == (130, True)
    assert (await run("add", str(model), *remote.other)).code == 0
    assert remote.uploads.created == ["My Model"]


async def test_wrong_paths_and_ways_are_refused(remote: Remote, run: Run, model: Path) -> None:
    empty = model / "nothing"
    empty.mkdir()
    for arguments, told in (
        (("add", "/nowhere/model.gguf"), "There is no"),
        (("add", str(empty), *remote.other), "no files"),
        (("add", str(model), "--clone", *remote.other), "--upload"),
        (("add", str(model), "--clone", "--copy"), "not allowed with"),
    ):
        shown = await run(*arguments)
        assert (shown.code, told in shown.err) == (2, True), shown.err
    assert remote.uploads.created == []
