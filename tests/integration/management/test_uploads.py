"""From a user's files to an answer: an upload that outlives the server, and imports."""

import base64
import hashlib
import shutil
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.integration.management.test_downloads import get
from tests.integration.server import HTTP, Server, wait_until
from tests.starter import starter_path
from tests.tiny_folders import write_model

NAME = "Mine-135M-Q4_1"
ID = "mine-135m@gguf-q4_1"
SETTINGS = {"STARTERS": "false", "FORMATS": "gguf,safetensors,echo", "SCAN_INTERVAL_S": "600"}


def put(server: Server, path: str, offset: int, data: bytes) -> httpx.Response:
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    headers = {
        **server.managing,
        "content-type": "application/octet-stream",
        "upload-offset": str(offset),
        "content-digest": f"sha-256=:{digest}:",
    }
    return HTTP.put(f"{server.url}{path}", content=data, headers=headers, timeout=60)


def post(server: Server, path: str, body: Any, status: int) -> Any:
    """Return the answer to a call, once the jobs' process gives one."""
    found: list[httpx.Response] = []

    def is_answered() -> bool:
        url = f"{server.url}{path}"
        found.append(HTTP.post(url, json=body, headers=server.managing, timeout=60))
        return found[-1].status_code != 503

    wait_until(is_answered, f"{path} is answered")
    assert found[-1].status_code == status, found[-1].text
    return found[-1].json()


def send_all(server: Server, upload: Any, files: dict[str, bytes]) -> None:
    """Send what the server does not have yet, as a client does that asks for the offsets."""
    for file in get(server, f"/api/uploads/{upload['id']}")["files"]:
        path = f"/api/uploads/{upload['id']}/{file['number']}"
        head = HTTP.head(f"{server.url}{path}", headers=server.managing, timeout=60)
        offset, data = int(head.headers["upload-offset"]), files[file["path"]]
        while offset < len(data):
            answer = put(server, path, offset, data[offset : offset + upload["chunk_bytes"]])
            assert answer.status_code == 200, answer.text
            offset = answer.json()["offset"]


def done(server: Server, job: Any) -> Any:
    path = f"/api/jobs/{job['id']}"
    wait_until(lambda: get(server, path)["state"] in ("done", "failed"), "the job ends", 120)
    found = get(server, path)
    assert (found["state"], found["reason"]) == ("done", "")
    return found


def said(server: Server, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    answer = HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_upload_outlives_the_server_and_answers(other_server: Server) -> None:
    server, whole = other_server, starter_path().read_bytes()
    server.start(**SETTINGS)
    announced = {
        "path": f"{NAME}.gguf",
        "size_bytes": len(whole),
        "sha256": hashlib.sha256(whole).hexdigest(),
    }
    upload = post(server, "/api/uploads", {"files": [announced]}, 201)
    one, size = f"/api/uploads/{upload['id']}", upload["chunk_bytes"]
    for number in range(3):
        assert put(server, f"{one}/0", number * size, whole[number * size :][:size]).is_success
    assert server.process is not None
    server.tree = psutil.Process(server.process.pid).children(recursive=True)
    server.kill()
    server.start(**SETTINGS)
    assert get(server, one)["done_bytes"] == 3 * size
    send_all(server, upload, {f"{NAME}.gguf": whole})
    job = done(server, post(server, f"{one}/finish", {}, 202))
    assert (job["kind"], job["model_ids"]) == ("upload", [ID])
    assert list((server.home / "incoming").iterdir()) == []
    assert said(server, ID)
    assert server.stop() == 0
    assert server.survivors() == []


def test_folders_are_uploaded_and_imported(other_server: Server, tmp_path: Path) -> None:
    server = other_server
    theirs = tmp_path / "theirs"
    server.start(**SETTINGS, BROWSE_PATH=str(theirs))
    (theirs / "Tiny Ä").mkdir(parents=True)
    tiny = write_model(theirs / "Tiny Ä", "Llama")
    (tiny / ".DS_Store").write_text("junk")
    files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.is_file()}
    announced = [
        {"path": f"Tiny Ä/{name}", "size_bytes": len(data)} for name, data in files.items()
    ]
    upload = post(server, "/api/uploads", {"files": announced}, 201)
    assert (upload["name"], upload["ignored"]) == ("Tiny Ä", ["Tiny Ä/.DS_Store"])
    send_all(server, upload, files)
    job = done(server, post(server, f"/api/uploads/{upload['id']}/finish", {}, 202))
    (uploaded,) = job["model_ids"]
    assert uploaded.endswith("@safetensors-f32")
    body: Any = {"model": uploaded, "prompt": "a b c", "max_tokens": 2}
    answer = HTTP.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    (theirs / "mine").mkdir()
    shutil.copyfile(starter_path(), theirs / "mine" / f"{NAME}.gguf")
    listed = HTTP.get(
        f"{server.url}/api/fs/browse",
        params={"path": str(theirs)},
        headers=server.managing,
        timeout=60,
    )
    assert [one["name"] for one in listed.json()["entries"]] == ["mine", "Tiny Ä"]
    body = {"path": str(theirs / "mine" / f"{NAME}.gguf"), "how": "clone"}
    cloned = done(server, post(server, "/api/imports", body, 202))
    assert cloned["model_ids"] == [ID]
    assert said(server, ID)
    body = {"path": str(theirs / "mine"), "how": "in_place"}
    in_place = done(server, post(server, "/api/imports", body, 202))
    assert in_place["folder"] == str(theirs / "mine")
    assert len(in_place["model_ids"]) == 1
    assert server.stop() == 0
    assert server.survivors() == []
