"""An agent's long prompt is computed once: also over an unload and a restart of the server."""

from pathlib import Path
from typing import Any

import httpx

from tests.integration.server import STARTER, Server, wait_until

SYSTEM = "You are a careful agent. " + " ".join(
    f"Rule {number}: never touch file {number * 7 % 13} before step {number % 11}."
    for number in range(40)
)


def ask(server: Server, *messages: tuple[str, str]) -> tuple[str, dict[str, Any]]:
    """Return the answer and the usage of a conversation after the system prompt."""
    roles = [("system", SYSTEM), *messages]
    body = {
        "model": STARTER,
        "messages": [{"role": role, "content": text} for role, text in roles],
        "max_tokens": 16,
        "temperature": 0,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["message"]["content"], found["usage"]


def cached(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def files(server: Server) -> list[Path]:
    return list((server.home / "cache" / "prefixes").rglob("*.block"))


def test_the_second_turn_is_cached_after_an_unload_and_a_restart(other_server: Server) -> None:
    server = other_server
    server.start(PREFIX_RAM="0")
    first, usage = ask(server, ("user", "What is rule 3?"))
    assert cached(usage) == 0
    whole = usage["prompt_tokens"] // 128 * 128
    wait_until(lambda: len(files(server)) >= whole // 128, "the first prompt is written")
    model = f"{STARTER}@gguf-q4_1"
    done = httpx.post(
        f"{server.url}/api/models/{model}/unload", json={}, headers=server.managing, timeout=60
    )
    assert done.is_success, done.text
    again, usage = ask(server, ("user", "What is rule 3?"))
    assert (again, cached(usage)) == (first, whole)
    assert server.shown("impetus_reused_prefix_tokens_total", source="disk") == whole
    assert server.stop() == 0

    server.start(PREFIX_RAM="0")
    turns = (("user", "What is rule 3?"), ("assistant", first), ("user", "And rule 4?"))
    _, usage = ask(server, *turns)
    assert cached(usage) >= whole
    assert server.stop() == 0
    assert {path.stat().st_mode & 0o777 for path in files(server)} == {0o600}
