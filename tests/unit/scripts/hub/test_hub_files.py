"""Files of the test hub, downloaded by huggingface_hub itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, http_get
from huggingface_hub.utils import get_session

from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub

SHA = "b" * 40
LARGE = "large.bin"


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Callable[..., bytes]:
    """Download a file of `org/tiny` and return its content."""

    def download(name: str = LARGE, **options: Any) -> bytes:
        options = {"token": False, "cache_dir": tmp_path / "cache", **options}
        return Path(
            hf_hub_download("org/tiny", name, endpoint=hub.endpoint, **options)
        ).read_bytes()

    return download


def test_hub_snapshot_is_the_folder(hub: Hub, folder: Path, tmp_path: Path) -> None:
    commit = hub.publish("org/tiny", folder, SHA)
    got = Path(
        snapshot_download(
            "org/tiny", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False
        )
    )
    assert got.name == SHA
    for source in folder.rglob("*"):
        if source.is_file():
            assert (got / source.relative_to(folder)).read_bytes() == source.read_bytes()
    # Blobs are named by the hashes that the hub states, as they are for the real one.
    assert (got / LARGE).resolve().name == commit.files[LARGE].etag


def test_hub_large_files_are_on_another_origin_which_gets_no_token(
    hub: Hub, folder: Path, fetch: Callable[..., bytes]
) -> None:
    hub.add_user("me", "hf_mine")
    hub.publish("org/tiny", folder, gated="manual", readers=frozenset({"me"}))
    with pytest.raises(GatedRepoError) as refused:
        fetch()
    assert refused.value.response.status_code == 401
    hub.add_user("other", "hf_other")
    with pytest.raises(GatedRepoError) as forbidden:
        fetch(token="hf_other")
    assert forbidden.value.response.status_code == 403
    hub.forget_requests()
    assert fetch(token="hf_mine") == (folder / LARGE).read_bytes()
    tokens = {logged.host: logged.headers.get("authorization") for logged in hub.requests}
    assert tokens == {
        hub.endpoint.removeprefix("http://"): "Bearer hf_mine",
        hub.cdn_origin.removeprefix("http://"): None,
    }


def test_hub_metadata_of_large_and_small_files(hub: Hub, folder: Path) -> None:
    commit = hub.publish("org/tiny", folder, SHA)
    for name, host in ((LARGE, hub.cdn_origin), ("config.json", hub.endpoint)):
        url = hf_hub_url("org/tiny", name, endpoint=hub.endpoint)
        found = get_hf_file_metadata(url, token=False)
        assert (found.commit_hash, found.size) == (SHA, (folder / name).stat().st_size)
        assert found.etag == commit.files[name].etag
        assert found.location.startswith(host)
        assert found.xet_file_data is None
    with pytest.raises(RemoteEntryNotFoundError) as absent:
        get_hf_file_metadata(hf_hub_url("org/tiny", "no.txt", endpoint=hub.endpoint), token=False)
    assert absent.value.response.headers["X-Repo-Commit"] == SHA


@pytest.mark.parametrize("kind", ["truncate", "stall"])
def test_hub_broken_download_is_resumed(
    hub: Hub,
    folder: Path,
    fetch: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.publish("org/tiny", folder)
    hub.faults.add(Fault(kind, file=LARGE, at=300_000, times=1))
    assert fetch() == (folder / LARGE).read_bytes()
    ranges = [logged.headers.get("range") for logged in hub.requests if logged.method == "GET"]
    assert ranges == [None, "bytes=300000-"]


def test_hub_range_with_another_validator_gets_the_whole_file(hub: Hub, folder: Path) -> None:
    commit = hub.publish("org/tiny", folder)
    url = hf_hub_url("org/tiny", LARGE, endpoint=hub.endpoint)
    data = (folder / LARGE).read_bytes()
    etag = f'"{commit.files[LARGE].etag}"'

    def get(**headers: str) -> httpx2.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        found: httpx2.Response = get_session().get(url, headers=names)
        return found

    same = get(range="bytes=10-19", if_range=etag)
    assert (same.status_code, same.content) == (206, data[10:20])
    assert same.headers["Content-Range"] == "bytes 10-19/700000"
    other = get(range="bytes=10-19", if_range='"other"')
    assert (other.status_code, other.content) == (200, data)
    assert get(range="bytes=700000-").status_code == 416
    hub.faults.add(Fault("ignore-range", file=LARGE, times=1))
    assert get(range="bytes=10-19").status_code == 200
    hub.faults.add(Fault("wrong-range", file=LARGE, times=1))
    assert get(range="bytes=10-19").headers["Content-Range"] == "bytes 0-9/700000"


def test_hub_corrupt_bytes_keep_their_length(
    hub: Hub, folder: Path, fetch: Callable[..., bytes]
) -> None:
    """As the client does not check hashes, it takes the damaged file (its issue 3643)."""
    hub.publish("org/tiny", folder)
    hub.faults.add(Fault("corrupt", file=LARGE, at=400_000))
    data = bytearray((folder / LARGE).read_bytes())
    data[400_000] ^= 0xFF
    assert fetch() == bytes(data)


def test_hub_wrong_size_is_noticed(hub: Hub, folder: Path, fetch: Callable[..., bytes]) -> None:
    hub.publish("org/tiny", folder)
    hub.faults.add(Fault("size", file=LARGE, value="5"))
    with pytest.raises(OSError, match="should be of size 700005 but has size 700000"):
        fetch()


def test_hub_redirect_without_an_end_or_to_nowhere(
    hub: Hub, folder: Path, fetch: Callable[..., bytes]
) -> None:
    hub.publish("org/tiny", folder)
    hub.faults.add(Fault("redirect", file="config.json", value="loop"))
    with pytest.raises(httpx2.TooManyRedirects):
        fetch("config.json")
    hub.faults.clear()
    hub.faults.add(Fault("redirect", file=LARGE, value="http://127.0.0.1:9/x"))
    with pytest.raises(httpx2.ConnectError):
        fetch()


def test_hub_drop_and_slow(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.publish("org/tiny", folder)
    url = hf_hub_url("org/tiny", "config.json", endpoint=hub.endpoint)
    hub.faults.add(Fault("drop", file="config.json", times=1))
    with pytest.raises(httpx2.RemoteProtocolError):
        get_hf_file_metadata(url, token=False)
    hub.faults.add(Fault("slow", file="config.json", value="300"))
    with (tmp_path / "got").open("wb") as stream:
        http_get(url, stream, headers={})
    assert (tmp_path / "got").read_bytes() == (folder / "config.json").read_bytes()


def test_hub_revision_that_moves_leaves_the_old_commit_readable(
    hub: Hub, api: HfApi, folder: Path, fetch: Callable[..., bytes]
) -> None:
    hub.publish("org/tiny", folder, SHA)
    hub.faults.add(Fault("move", file="config.json", times=1))
    fetch("config.json", revision="main")
    moved = api.model_info("org/tiny").sha
    assert moved not in (SHA, None)
    other = folder.with_name("other")
    other.mkdir()
    (other / "config.json").write_text("{}")
    newest = hub.publish("org/tiny", other)
    assert api.model_info("org/tiny").sha == newest.sha
    assert fetch("sub/notes.txt", revision=SHA) == b"notes"


def test_hub_sends_empty_files_over_connections_that_stay(hub: Hub, folder: Path) -> None:
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty.gguf").write_bytes(b"")
    hub.publish("org/tiny", folder)
    with httpx2.Client(follow_redirects=True) as client:
        for name in ("empty.txt", "empty.gguf", "config.json"):
            answer = client.get(f"{hub.endpoint}/org/tiny/resolve/main/{name}")
            assert (answer.status_code, answer.content) == (200, (folder / name).read_bytes())
