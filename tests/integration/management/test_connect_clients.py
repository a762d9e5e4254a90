"""A running server checks itself as a client would, and shows how the client is set up."""

import httpx
import pytest

from tests.integration.server import STARTER, Server


@pytest.mark.parametrize("client", ["openai", "codex", "claude-code"])
def test_the_server_checks_its_own_connection(server: Server, client: str) -> None:
    checked = httpx.post(
        f"{server.url}/api/connect/{client}/check",
        json={"model": STARTER},
        headers=server.managing,
        timeout=120,
    )
    steps = checked.json()["steps"]
    assert [step["name"] for step in steps] == ["model list", "stream", "tool round trip"]
    assert checked.json()["ok"], steps
    assert steps[1]["ms"] > 0


def test_the_setup_names_the_server_that_runs(server: Server) -> None:
    listed = httpx.get(f"{server.url}/api/connect", timeout=60).json()["clients"]
    (openai,) = [one for one in listed if one["client"] == "openai"]
    assert openai["recommended"].startswith(STARTER)
    shown = httpx.get(f"{server.url}/api/connect/openai", timeout=60).json()
    assert shown["url"] == f"{server.url}/v1"
    assert f"OPENAI_BASE_URL={server.url}/v1" in shown["text"]
