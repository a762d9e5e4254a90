"""Talks to an agent as an editor does: JSON-RPC over stdio, the Agent Client Protocol.

Source: agentclientprotocol.com, protocol version 1.
"""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 120.0
Update = Mapping[str, Any]


@dataclass
class AcpClient:
    """One agent's process; what it reports of its work is in `updates`, in order."""

    process: "subprocess.Popen[str]"
    folder: Path
    updates: list[Update] = field(default_factory=list)
    _sent: int = 0

    def request(
        self, method: str, on_update: Callable[[Update], None] | None = None, **params: Any
    ) -> dict[str, Any]:
        """Send a request and return its result; blocks, `on_update` sees updates meanwhile."""
        self._sent += 1
        self._send({"id": self._sent, "method": method, "params": params})
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if message.get("method") == "session/update":
                self.updates.append(message["params"]["update"])
                if on_update is not None:
                    on_update(self.updates[-1])
            elif "method" not in message and message.get("id") == self._sent:
                assert "error" not in message, message
                return dict(message["result"])
        raise AssertionError(f"the agent ended during {method}")

    def new_session(self) -> str:
        """Begin a session; returns its id."""
        return str(self.request("session/new", **self._place)["sessionId"])

    def load_session(self, session: str) -> None:
        """Go on with a session of an earlier process."""
        self.request("session/load", sessionId=session, **self._place)

    def ask(self, session: str, task: str, *, is_stopped: bool = False) -> str:
        """Give it a task; returns why it stopped.  `is_stopped`: cancel it at its first text."""

        def stop(update: Update) -> None:
            if is_stopped and update["sessionUpdate"] == "agent_message_chunk":
                self._send({"method": "session/cancel", "params": {"sessionId": session}})

        prompt = [{"type": "text", "text": task}]
        done = self.request("session/prompt", stop, sessionId=session, prompt=prompt)
        return str(done["stopReason"])

    @property
    def text(self) -> str:
        """All text that the agent wrote."""
        chunks = [each for each in self.updates if each["sessionUpdate"] == "agent_message_chunk"]
        return "".join(chunk["content"]["text"] for chunk in chunks)

    @property
    def _place(self) -> dict[str, Any]:
        return {"cwd": str(self.folder), "mcpServers": []}

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self.process.stdin.flush()


@contextmanager
def acp_client(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[AcpClient]:
    """Start an agent and open the connection; the agent does not outlive the block."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    # A read blocks without a limit, so the process is ended when it takes too long.
    limit = threading.Timer(LIMIT_S, process.kill)
    limit.start()
    try:
        client = AcpClient(process, folder)
        client.request("initialize", protocolVersion=1, clientCapabilities={})
        yield client
    finally:
        limit.cancel()
        process.kill()
        process.communicate()
