"""A hub on the loopback interface that serves local folders to huggingface_hub's own client."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest


class LocalHub:
    """Repositories by name: each is a local folder at one revision."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.revisions: dict[str, str] = {}

    def publish(self, name: str, folder: Path, revision: str) -> None:
        """Make `folder` the main revision of the repository `name`."""
        self.folders[f"{name}@{revision}"] = folder
        self.revisions[name] = revision

    def answer(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """Return body and headers for a path of the hub's API, None for 404."""
        parts = unquote(path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            revision = self.revisions.get(name)
            if revision is None:
                return None
            folder = self.folders[f"{name}@{revision}"]
            files = sorted(one for one in folder.rglob("*") if one.is_file())
            body: Any = {
                "id": name,
                "sha": revision,
                "siblings": [{"rfilename": str(one.relative_to(folder))} for one in files],
            }
            if "tree" in parts:
                body = [
                    {
                        "type": "file",
                        "path": str(one.relative_to(folder)),
                        "size": one.stat().st_size,
                        "oid": hashlib.sha256(one.read_bytes()).hexdigest(),
                    }
                    for one in files
                ]
            return json.dumps(body).encode(), {"Content-Type": "application/json"}
        if len(parts) < 5 or parts[2] != "resolve":
            return None
        folder = self.folders[f"{'/'.join(parts[:2])}@{parts[3]}"]
        data = folder.joinpath(*parts[4:]).read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        return data, {"ETag": f'"{tag}"', "X-Repo-Commit": parts[3]}


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LocalHub, str]]:
    """Serve a hub on a free port; yield it with its address."""
    hub = LocalHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._send(with_body=False)

        def do_GET(self) -> None:
            self._send(with_body=True)

        def _send(self, *, with_body: bool) -> None:
            answer = hub.answer(self.path)
            body, headers = answer or (b"", {})
            self.send_response(200 if answer else 404)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # The tests forbid the client to use a network; this hub is none.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
