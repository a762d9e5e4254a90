"""Downloads from plain web addresses: what is connected to, redirects, names, resuming (D8, D9)."""

import socket
import ssl
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from catalog.hub.client import HubLimits
from catalog.hub.download.job import DownloadJob
from catalog.hub.download.run import run_download
from catalog.hub.download.transfer import Transfer
from catalog.hub.download.url import UrlSource, _file_name
from catalog.hub.entries import RepositoryFile
from catalog.hub.public_address import parse_address
from core.errors import (
    ChecksumFailed,
    HubAccessDenied,
    HubAnswerInvalid,
    HubNotFound,
    HubOffline,
    HubRateLimited,
    HubUnavailable,
    ImpetusError,
    RequestError,
)
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.unit.catalog.hub.download.conftest import LARGE, SIZE, Download

LIMITS = HubLimits(connect_s=20.0, silence_s=20.0, total_s=60.0)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test hub stands for a server of the internet."""
    monkeypatch.setattr(
        "catalog.hub.public_address.is_public", lambda ip: ip in ("127.0.0.1", "::1")
    )


@pytest.fixture
def url(download: Download) -> str:
    """The address of the large file, which is redirected to another host."""
    return f"{download.hub.endpoint}/org/tiny/resolve/main/{LARGE}"


def by_address(download: Download, url: str) -> Transfer:
    """Return the same transfer from a plain address, with nothing known of the content."""
    return replace(download.transfer, client=UrlSource(url, LIMITS))


@pytest.mark.usefixtures("trusted")
def test_download_from_an_address_is_whole(download: Download, url: str) -> None:
    source = UrlSource(url, LIMITS)
    file = source.probe()
    assert file == RepositoryFile(LARGE, SIZE, "")
    by_address(download, url).fetch(file)
    assert (download.transfer.work / LARGE).read_bytes() == download.content
    assert all("authorization" not in each.headers for each in download.hub.requests)
    hosts = {each.host for each in download.hub.requests}
    assert hosts == {
        download.hub.endpoint.removeprefix("http://"),
        download.hub.cdn_origin.removeprefix("http://"),
    }


@pytest.mark.usefixtures("trusted")
def test_download_from_an_address_goes_on_with_its_validator(download: Download, url: str) -> None:
    file = RepositoryFile(LARGE, SIZE, "")
    download.hub.faults.add(Fault("truncate", file=LARGE, at=300_000, times=1))
    by_address(download, url).fetch(file)
    assert (download.transfer.work / LARGE).read_bytes() == download.content
    assert download.ranges == [None, "bytes=300000-"]
    assert download.hub.requests[-1].headers["if-range"].startswith('"')


@pytest.mark.usefixtures("trusted")
def test_download_from_an_address_without_a_validator_begins_anew(
    download: Download, url: str
) -> None:
    download.part.write_bytes(b"x" * 300_000)
    by_address(download, url).fetch(RepositoryFile(LARGE, SIZE, ""))
    assert (download.transfer.work / LARGE).read_bytes() == download.content
    assert download.ranges == [None]
    assert sum(download.grown) == SIZE


@pytest.mark.usefixtures("trusted")
def test_download_from_an_address_checks_what_the_user_stated(download: Download, url: str) -> None:
    with pytest.raises(ChecksumFailed):
        by_address(download, url).fetch(RepositoryFile(LARGE, SIZE, "", "0" * 64))
    by_address(download, url).fetch(RepositoryFile(LARGE, SIZE, "", download.file().sha256))


def test_download_from_a_named_host_of_a_private_network(download: Download, url: str) -> None:
    with pytest.raises(RequestError, match="IMPETUS_DOWNLOAD_HOSTS"):
        UrlSource(url, LIMITS).probe()
    with pytest.raises(RequestError):
        UrlSource(url, LIMITS, private_hosts=["127.0.0.1:1", "example.com"]).probe()
    source = UrlSource(url, LIMITS, private_hosts=["127.0.0.1", "LOCALHOST"])
    assert source.probe().path == LARGE
    replace(download.transfer, client=source).fetch(RepositoryFile(LARGE, SIZE, ""))
    assert (download.transfer.work / LARGE).read_bytes() == download.content


@pytest.mark.parametrize(
    "target",
    [
        *("http://169.254.169.254/latest", "http://127.0.0.1:1/x", "http://[::1]:1/x"),
        *("file:///etc/passwd", "http://2130706433:1/x", "http://user@127.0.0.1/x"),
    ],
)
def test_download_redirected_into_this_network_connects_to_nothing_d8(
    download: Download, url: str, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """D8: each hop is checked, not the first one alone."""
    connected: list[Any] = []
    connect = socket.create_connection
    own = int(download.hub.endpoint.rpartition(":")[2])

    def spy(address: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
        connected.append(address)
        return connect(("127.0.0.1", own), *rest, **options)

    monkeypatch.setattr(socket, "create_connection", spy)
    download.hub.faults.add(Fault("redirect", file=LARGE, value=target))

    def look_up(host: str, port: int) -> list[str]:
        # The first hop is on the internet, as the test has it.
        first = (host, port) == ("127.0.0.1", own)
        return ["8.8.8.8"] if first else [item[4][0] for item in socket.getaddrinfo(host, port)]  # type: ignore[misc]

    # Nor does the user's own server count that an address of the internet leads to.
    for private_hosts in ((), ("169.254.169.254", "127.0.0.1:1", "::1")):
        connected.clear()
        source = UrlSource(url, LIMITS, look_up, private_hosts)
        with pytest.raises(RequestError), source.opened(url, "x"):
            pass
        assert connected == [("8.8.8.8", own)]


def test_download_connects_to_the_address_that_was_checked_d9(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """D9: a name that is resolved differently a second time gets no second time."""
    answers = iter([["8.8.8.8"], ["127.0.0.1"], ["127.0.0.1"]])
    connected: list[Any] = []

    def spy(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
        connected.append(address)
        raise OSError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", spy)
    source = UrlSource("https://flips.test/m.gguf", LIMITS, lambda _host, _port: next(answers))
    with pytest.raises(HubUnavailable):
        source.probe()
    assert connected == [("8.8.8.8", 443)]


def test_download_by_https_asks_for_the_name_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the checked IP address, the certificate has to be the host's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            connection, _ = server.accept()
            with connection, pytest.raises(OSError):  # noqa: PT011
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setattr("catalog.hub.public_address.is_public", lambda _: True)
        source = UrlSource(f"https://models.test:{port}/m.gguf", LIMITS, lambda *_: ["127.0.0.1"])
        with pytest.raises(HubUnavailable):
            source.probe()
        thread.join()
    assert names == ["models.test"]


@pytest.mark.usefixtures("trusted")
def test_download_redirected_without_end_or_to_plain_http_d8(download: Download, url: str) -> None:
    download.hub.faults.add(Fault("redirect", file=LARGE, value="loop"))
    with pytest.raises(HubAnswerInvalid, match="more than 5 times"):
        UrlSource(url, LIMITS).probe()
    source = UrlSource("https://a.test/m.gguf")
    with pytest.raises(HubAnswerInvalid, match="from https to http"):
        source._target(parse_address("https://a.test/m.gguf"), "http://a.test/m.gguf")


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("404", HubNotFound),
        ("403", HubAccessDenied),
        ("429", HubRateLimited),
        ("500", HubUnavailable),
    ],
)
def test_download_from_an_address_that_refuses(
    download: Download, url: str, value: str, kind: type[ImpetusError]
) -> None:
    download.hub.faults.add(Fault("status", file=LARGE, value=value, seconds=9))
    with pytest.raises(kind) as problem:
        UrlSource(url, LIMITS).probe()
    assert type(problem.value) is kind
    assert "HF_TOKEN" not in problem.value.message


@pytest.mark.usefixtures("trusted")
def test_download_of_a_page_or_another_file_is_refused(
    download: Download, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="is not a model's file by its name"):
        UrlSource(url.replace(LARGE, "config.json"), LIMITS).probe()
    download.hub.faults.add(Fault("html", file=LARGE))
    with pytest.raises(RequestError, match="is that of a web page"):
        UrlSource(url, LIMITS).probe()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubOffline):
        UrlSource(url, LIMITS).probe()


@pytest.mark.parametrize(
    ("header", "address", "name"),
    [
        ("", "https://a.test/x/Model-Q8_0.gguf?download=1", "Model-Q8_0.gguf"),
        ('attachment; filename="My Model.gguf"', "https://a.test/x", "My Model.gguf"),
        ("attachment; filename*=UTF-8''n%C3%A4he.gguf", "https://a.test/x", "nähe.gguf"),
        ('attachment; filename="../../etc/x.gguf"', "https://a.test/x", "x.gguf"),
        ('attachment; filename="..\\\\..\\\\x.gguf"', "https://a.test/x", "x.gguf"),
        ("", "https://a.test/%2e%2e%2f.hidden.gguf", "hidden.gguf"),
        ("", "https://a.test/" + "x" * 500 + ".gguf", "x" * 195 + ".gguf"),
    ],
)
def test_download_has_a_plain_file_name(header: str, address: str, name: str) -> None:
    """P1: whatever a server calls its file, it is written into the model's own folder."""
    assert _file_name(header, address) == name


async def test_download_from_this_machine_is_refused_in_the_process_too(
    hub: Hub, tmp_path: Path
) -> None:
    target = tmp_path / "models" / "m"
    file = RepositoryFile("m.gguf", 10, "")
    job = DownloadJob("", "m", "", (file,), target, url=f"{hub.endpoint}/m.gguf")
    with pytest.raises(RequestError, match="private network"):
        await run_download(job, "", lambda _: None)
    assert hub.requests == []
    assert not target.exists()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "is a part of a model"),
        ("pytorch_model.bin", "is a part of a model"),
        ("model.onnx", "is a part of a model"),
        ("m-00001-of-00003.gguf", "is a part of a model"),
        ("mmproj-model-f16.gguf", "is a part of a model"),
    ],
)
def test_download_of_a_part_of_a_model_is_refused_before_it_begins(
    download: Download, url: str, name: str, said: str
) -> None:
    """The scan would refuse it, and it would be removed."""
    (download.source / name).write_bytes(b"x")
    download.hub.publish("org/tiny", download.source)
    with pytest.raises(RequestError, match=said):
        UrlSource(url.replace(LARGE, name), LIMITS).probe()


@pytest.mark.usefixtures("trusted")
def test_download_connects_to_another_address_of_the_host_where_one_is_dead(url: str) -> None:
    """Such as IPv6 of a network that has it by name only."""
    own = urlsplit(url)
    source = UrlSource(url, LIMITS, lambda _host, _port: ["::1", "127.0.0.1"])
    with source.opened(url, "x") as response:
        assert response.status_code == 200
    dead = f"{own.scheme}://{own.hostname}:1{own.path}"
    with pytest.raises(HubUnavailable), UrlSource(dead, LIMITS).opened(dead, "x"):
        pass
