"""`scripts/models`: which server is asked with which credential, and what a terminal gets."""

import asyncio
import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from router.app import create_app
from tests.fakes import make_services
from tests.live_server import free_port, serving
from tests.unit.models_cli.conftest import JOB, Run, Stand

ROOT = Path(__file__).parents[3]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


async def test_no_server_is_told_with_what_starts_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPETUS_HOME", str(tmp_path))
    monkeypatch.setenv("IMPETUS_PORT", str(free_port()))
    shown = await run("list")
    assert (shown.code, shown.out) == (3, "")
    assert "scripts/serve" in shown.err
    told = await run("list", "--json")
    assert (told.code, told.document["error"]["code"]) == (3, "unreachable")
    other = await run("list", "--url", f"http://127.0.0.1:{free_port()}")
    assert (other.code, "Check --url" in other.err) == (3, True)
    # Asking leaves nothing behind.
    assert list(tmp_path.iterdir()) == []


async def test_something_else_on_the_port_is_no_server(run: Run) -> None:
    async def hello(scope: object, receive: object, send: object) -> None:
        del scope, receive
        start = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"hello"})  # type: ignore[operator]

    async with serving(hello) as port:
        shown = await run("list", "--url", f"http://127.0.0.1:{port}")
    assert (shown.code, "is not this server" in shown.err) == (3, True)


@pytest.mark.parametrize(
    "arguments", [(), ("nothing",), ("get",), ("alias", "set", "x"), ("--url", "127.0.0.1", "list")]
)
async def test_wrong_usage_has_its_code(run: Run, arguments: tuple[str, ...]) -> None:
    shown = await run(*arguments)
    assert (shown.code, shown.out, bool(shown.err)) == (2, "", True)


async def test_key_is_sent_where_the_server_needs_one(
    stand: Stand, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "canary-key-1234"
    services = replace(
        make_services(api_key=key), management=stand.management, jobs=stand.jobs, hub=stand.hub
    )
    async with serving(create_app(services)) as port:
        url = f"http://127.0.0.1:{port}/v1/"
        assert (await run("list", "--url", url, "--key", key)).code == 0
        wrong = await run("list", "--url", url, "--key", "wrong")
        assert (wrong.code, "--key" in wrong.err, "wrong." in wrong.err) == (1, True, False)
        monkeypatch.setenv("IMPETUS_API_KEY", key)
        assert (await run("list", "--url", url)).code == 0


def in_terminal(columns: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run the command line in a terminal of a width; return its exit code and what it wrote."""
    values = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **environment}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        command = [sys.executable, "-m", "scripts.models_lib", *arguments]
        os.execve(sys.executable, command, values)
    output = b""
    try:
        while data := os.read(terminal, 65536):
            output += data
    except OSError:
        # Linux's way to tell that the other end is closed.
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode().replace("\r\n", "\n")


@pytest.mark.usefixtures("stand")
async def test_terminal_gets_tables_of_its_width() -> None:
    code, text = await asyncio.to_thread(in_terminal, 78, "list")
    lines = ESCAPE.sub("", text).splitlines()
    assert (code, lines[0].split()) == (0, ["MODEL", "SIZE", "FORMAT", "CONTEXT", "STATE"])
    assert max(map(len, lines)) <= 78
    code, text = await asyncio.to_thread(in_terminal, 40, "list", NO_COLOR="1")
    lines = ESCAPE.sub("", text).splitlines()
    assert "state: cannot run: It needs 90 GiB." in "".join(lines)
    assert max(map(len, lines)) <= 40
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)


async def test_terminal_gets_a_bar_that_leaves_only_the_result(stand: Stand) -> None:
    stand.jobs.script = [JOB.model_copy(update={"done_bytes": 2048}), stand.jobs.script[0]]
    code, text = await asyncio.to_thread(in_terminal, 100, "get", "org/tiny")
    assert code == 0
    assert "25%" in text
    assert "2.0 KiB/s, 2 s left" in text
    assert ESCAPE.sub("", text).strip().endswith("Ready: tiny@gguf-q8_0 (4.0 KiB)")
    # The cursor is shown again.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    code, text = await asyncio.to_thread(in_terminal, 100, "get", "org/tiny", TERM="dumb")
    assert (code, "\x1b" in text) == (0, False)


async def test_commands_in_messages_are_not_wrapped(stand: Stand) -> None:
    stand.jobs.begun = JOB.model_copy(update={"state": "queued"})
    code, text = await asyncio.to_thread(in_terminal, 30, "get", "org/tiny", "--no-wait")
    assert (code, "  scripts/models jobs follow a1" in text) == (0, True)


async def test_reader_that_ends_early_ends_the_command_quietly(stand: Stand) -> None:
    stand.jobs.begun = JOB.model_copy(update={"title": "x" * 100_000})
    command = f"{shlex.quote(sys.executable)} -m scripts.models_lib list --json | head -c 1"
    done = await asyncio.to_thread(
        subprocess.run, ["/bin/sh", "-c", command], cwd=ROOT, capture_output=True, check=False
    )
    assert (done.stdout, done.stderr) == (b"{", b"")
