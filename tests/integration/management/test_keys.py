"""API keys, sessions and limits of a running server that listens for other machines."""

import json
import os
import re
import subprocess
import sys
import time

import httpx
import psutil

from tests.integration.server import HTTP, ROOT, Server, wait_until

CHAT = {"model": "echo@echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


def keys(server: Server, *arguments: str) -> dict[str, str]:
    """Run `scripts/keys` on the server's data folder."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.keys_lib", "--json", *arguments],
        cwd=ROOT,
        env={**os.environ, "IMPETUS_HOME": str(server.home), "IMPETUS_PORT": str(server.port)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def chat(server: Server, root: str = "", **headers: str) -> httpx.Response:
    return HTTP.post(
        f"{root or server.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=60
    )


def own_address() -> str:
    """Return an address of this machine on which others would reach it; empty if it has none."""
    found = [
        one.address
        for links in psutil.net_if_addrs().values()
        for one in links
        if one.family.name == "AF_INET" and not one.address.startswith("127.")
    ]
    return next(iter(found), "")


def test_other_machines_use_a_key_and_a_browser_its_link(other_server: Server) -> None:
    server = other_server
    made = keys(server, "create", "laptop", "--scope", "inference")
    bearer = {"authorization": f"Bearer {made['key']}"}
    server.start(HOST="0.0.0.0", FORMATS="echo", RATE_LIMIT_REQUESTS="1000")

    answer = chat(server, **bearer)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ratelimit-limit-requests"] == "1000"
    assert chat(server).status_code == 401
    if address := own_address():
        root = f"http://{address}:{server.port}"
        assert chat(server, root, **bearer).status_code == 200
        assert chat(server, root).status_code == 401
    assert HTTP.post(f"{server.url}/api/drain", json={}, headers=bearer).status_code == 403

    link = keys(server, "link")["link"]
    typed = {"sec-fetch-site": "none"}
    signed_in = HTTP.get(link, headers=typed, follow_redirects=False)
    assert signed_in.status_code == 303
    cookie = {"cookie": signed_in.headers["set-cookie"].partition(";")[0]}
    HTTP.cookies.clear()
    page = {**cookie, "origin": server.url, "sec-fetch-site": "same-origin"}
    listed = HTTP.get(f"{server.url}/api/keys", headers=page).json()["keys"]
    assert [(one["id"], one["name"]) for one in listed] == [(made["id"], "laptop")]
    assert abs(listed[0]["last_used_at"] - time.time()) < 60
    assert HTTP.get(link, headers=typed).status_code == 403

    keys(server, "revoke", made["id"])
    wait_until(lambda: chat(server, **bearer).status_code == 401, "the key is revoked", 5)
    assert HTTP.get(f"{server.url}/api/keys", headers=server.managing).json() == {"keys": []}
    assert server.stop() == 0
    assert server.process is not None
    assert server.process.stdout is not None
    printed = server.process.stdout.read()
    assert re.search(
        rf"Sign in +http://127\.0\.0\.1:{server.port}/session\?code=\S{{43}}\n", printed
    )
