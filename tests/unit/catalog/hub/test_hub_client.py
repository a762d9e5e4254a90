"""Failures of a hub, each told apart (D8, D11)."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from catalog.hub.client import HubClient
from catalog.hub.problems import refusal
from core.errors import (
    HubAccessDenied,
    HubAnswerInvalid,
    HubNotFound,
    HubOffline,
    HubRateLimited,
    HubTokenRejected,
    HubTooSlow,
    HubUnavailable,
    ImpetusError,
)
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.unit.catalog.hub.conftest import LIMITS

ROOT = Path(__file__).parents[4]
INFO = "/api/models/org/tiny"


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> Hub:
    """A hub with one repository."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    hub.publish("org/tiny", tmp_path / "tiny")
    return hub


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Fault("drop"), HubUnavailable, "broke off"),
        (Fault("status", value="503", seconds=9), HubUnavailable, "fails at the moment"),
        (Fault("status", value="500"), HubUnavailable, "fails at the moment"),
        (Fault("status", value="429", seconds=7), HubRateLimited, "for 7 s"),
        (Fault("status", value="403"), HubAccessDenied, "token set"),
        (Fault("status", value="418"), HubAnswerInvalid, "unexpected status 418"),
        (Fault("stall", at=0), HubTooSlow, "did not answer in time"),
        (Fault("truncate", at=10), HubUnavailable, "broke off"),
        (Fault("html"), HubAnswerInvalid, "sign-in page"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_hub_failure_says_what_to_do_d11(
    published: Hub, client: HubClient, fault: Fault, kind: type[ImpetusError], said: str
) -> None:
    published.faults.add(fault)
    if fault.kind == "stall":
        client = HubClient(published.endpoint, "", replace(LIMITS, silence_s=0.3))
    with pytest.raises(kind, match=said) as problem:
        client.get_json(INFO, "org/tiny")
    assert type(problem.value) is kind
    if fault.value in ("429", "503"):
        assert problem.value.retry_after_s == fault.seconds
    published.faults.clear()
    assert client.get_json(INFO, "org/tiny").value["id"] == "org/tiny"


def test_hub_that_is_down_offline_or_no_address(
    published: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.stop()
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        client.get_json(INFO, "org/tiny")
    with pytest.raises(HubUnavailable, match="is not the address of a hub"):
        HubClient("nonsense", token="", limits=LIMITS).get_json(INFO, "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubOffline, match="HF_HUB_OFFLINE"):
        client.get_json(INFO, "org/tiny")


def test_hub_answer_over_the_limit_or_too_slow_in_all(published: Hub, client: HubClient) -> None:
    with pytest.raises(HubAnswerInvalid, match="more than 100 B"):
        HubClient(client.endpoint, "", replace(LIMITS, answer_bytes=100)).get_json(INFO, "a")
    published.faults.add(Fault("slow", value="20"))
    with pytest.raises(HubTooSlow, match=r"in 0\.3 s"):
        HubClient(client.endpoint, "", replace(LIMITS, total_s=0.3)).get_json(INFO, "a")


def test_hub_token_that_is_stale_is_left_out_where_none_is_needed_d11(published: Hub) -> None:
    client = HubClient(published.endpoint, "hf_stale", LIMITS)
    assert client.get_json(INFO, "org/tiny").value["id"] == "org/tiny"
    with pytest.raises(HubTokenRejected, match="does not know the token"):
        client.get_json("/api/models/org/none", "org/none")


def test_hub_gated_files_name_the_page_whose_terms_to_accept(published: Hub) -> None:
    published.publish("org/tiny", Path(__file__).parent, gated="manual")
    published.add_user("me", "hf_mine")
    for token, said in (("", "then store"), ("hf_mine", "has no access")):
        client = HubClient(published.endpoint, token, LIMITS)
        address = f"{published.endpoint}/org/tiny/resolve/main/conftest.py"
        with pytest.raises(HubAccessDenied, match=said), client.opened(address, "org/tiny"):
            pass
    with pytest.raises(HubNotFound, match="has no org/none"):
        client.get_json("/api/models/org/none", "org/none")


def test_hub_token_goes_to_the_hub_alone_d8(published: Hub, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "x.gguf").write_bytes(b"x" * 1000)
    published.publish("org/large", tmp_path / "large")
    published.add_user("me", "hf_mine")
    client = HubClient(published.endpoint, "hf_mine", LIMITS)
    address = f"{published.endpoint}/org/large/resolve/main/x.gguf"
    with client.opened(address, "org/large", {"Range": "bytes=10-19"}) as response:
        assert response.status_code == 206
        assert response.read() == b"x" * 10
    sent = {logged.host: logged.headers.get("authorization") for logged in published.requests}
    assert sent[published.cdn_origin.removeprefix("http://")] is None
    assert sent[published.endpoint.removeprefix("http://")] == "Bearer hf_mine"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://[::1", "gopher://x/", ""])
def test_hub_redirect_elsewhere_is_not_followed_d8(
    published: Hub, client: HubClient, target: str
) -> None:
    published.faults.add(Fault("redirect", value=target or "loop"))
    address = f"{published.endpoint}/org/tiny/resolve/main/config.json"
    said = "is not followed" if target else "more than 5 times"
    with pytest.raises(HubAnswerInvalid, match=said), client.opened(address, "org/tiny"):
        pass


def test_hub_of_the_internet_does_not_lead_into_this_network(published: Hub) -> None:
    addresses = {"127.0.0.1": ["8.8.8.8"], "localhost": ["127.0.0.1"], "cdn.test": ["1.1.1.1"]}

    def look_up(host: str, _: int) -> list[str]:
        return addresses[host]

    client = HubClient(published.endpoint, "", LIMITS, look_up)
    address = f"{published.endpoint}/org/tiny/resolve/main/config.json"
    said = "this machine or a private network"
    for target in ("http://localhost:1/x", "http://localhost:2/latest/meta-data"):
        published.faults.clear()
        published.faults.add(Fault("redirect", value=target))
        with pytest.raises(HubAnswerInvalid, match=said), client.opened(address, "org/tiny"):
            pass
    # A hub inside of the network may lead to its own storage.
    addresses["127.0.0.1"] = ["127.0.0.1"]
    published.faults.clear()
    published.faults.add(Fault("redirect", value=f"{published.cdn_origin}/repos/none"))
    with pytest.raises(HubNotFound), client.opened(address, "org/tiny"):
        pass


def test_hub_of_the_environment_is_used_with_its_token(published: Hub) -> None:
    published.add_user("me", "hf_mine")
    code = "from catalog.hub.client import HubClient; " + (
        f"print(HubClient().get_json({INFO!r}, 'x').value['id'])"
    )
    environment = {**os.environ, "HF_ENDPOINT": published.endpoint, "HF_TOKEN": "hf_mine"}
    environment["HF_HUB_OFFLINE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "org/tiny", done.stderr
    assert published.requests[-1].headers["authorization"] == "Bearer hf_mine"


def test_hub_refusal_never_repeats_what_the_hub_wrote() -> None:
    odd = {"x-error-message": "<script>", "retry-after": "9" * 400}
    for status in (301, 400, 401, 403, 404, 416, 429, 500, 503, 599):
        problem = refusal(status, odd, "hub.test", "org/tiny")
        assert "<script>" not in problem.message
        assert (problem.retry_after_s or 60) == 60
