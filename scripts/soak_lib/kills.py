"""Kills the processes of the server, one kind after the other, and measures its recovery."""

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import psutil

from scripts.soak_lib.server import END_LIMIT_S, Server

# By what a process's command line or title contains.
RESTARTED = {
    "format replica": "ServeReplica:impetus:gguf",
    "router": "ServeReplica:impetus:router",
    "scheduler": "ServeReplica:impetus:scheduler",
    "Serve's controller": "ServeController",
    "template worker": "template_worker",
}
# Without these the server ends; whoever started it starts it again.
ENDING = {
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
    "dashboard agent": "ray::DashboardAgent",
    "launcher": "deployments.start.launcher",
}
RECOVERY_LIMIT_S = 60.0
_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: when (monotonic seconds), what, and the seconds until requests were answered.

    `recovery_s` is None if that took longer than the limit.  `left` counts processes that
    outlived the server.
    """

    kind: str
    at: float
    recovery_s: float | None
    left: int = 0

    @property
    def is_good(self) -> bool:
        """Whether the server recovered and left nothing."""
        return self.recovery_s is not None and not self.left


def find(server: Server, kind: str) -> list[psutil.Process]:
    """Return the running processes of a kind."""
    wanted = {**RESTARTED, **ENDING}[kind]
    return [one for one in server.note_members() if wanted in _described(one)]


def _described(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def kill_one(server: Server, kind: str, body: dict[str, object]) -> Kill | None:
    """Kill a process of this kind; return once requests are answered.  None: there is none.

    A server that ends must do so within END_LIMIT_S, with an error's code and no process left;
    it is then started again.
    """
    targets = await asyncio.to_thread(find, server, kind)
    if not targets:
        return None
    at = time.monotonic()
    targets[0].send_signal(signal.SIGKILL)
    left = 0
    if kind in ENDING:
        code = await asyncio.to_thread(server.wait_for_end)
        if code == 0 or code is None:
            left += 1
        left += len(await asyncio.to_thread(server.survivors, END_LIMIT_S))
        if left:
            await asyncio.to_thread(server.stop)
        server.members.clear()
        await asyncio.to_thread(server.start)
    recovered = await _until_answered(server, body)
    return Kill(kind, at, time.monotonic() - at if recovered else None, left)


async def _until_answered(server: Server, body: dict[str, object]) -> bool:
    end = time.monotonic() + RECOVERY_LIMIT_S
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as client:
        while time.monotonic() < end:
            try:
                answer = await client.post("/v1/chat/completions", json=body)
                if answer.status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            await asyncio.sleep(_POLL_S)
    return False


def kinds(chosen: Sequence[str]) -> list[str]:
    """Return the kinds to kill, in turn; raises ValueError for an unknown name."""
    known = [*RESTARTED, *ENDING]
    unknown = set(chosen) - set(known)
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return list(chosen) or known
