"""A server's stand-in for the doctor: its launcher, one process of a format, and HTTP.

Usage: python stand_in_server.py MODE.  `MODE` is what goes wrong, or `healthy`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODE = sys.argv[1]
MODELS = [
    {"id": "chat@gguf", "format": "gguf", "capabilities": ["chat"], "parameters": 5},
    {"id": "large@gguf", "format": "gguf", "capabilities": ["chat"], "parameters": 50},
    {"id": "vectors@onnx", "format": "onnx", "capabilities": ["embedding"], "parameters": 1},
]


def start_replica() -> "subprocess.Popen[bytes]":
    """Start a process that `ps` shows as a format's, with the id of the tests' process."""
    return subprocess.Popen(
        ["ray::ServeReplica:impetus:gguf", f"60.{os.getppid()}"],
        executable="/bin/sleep",
        start_new_session=True,
    )


class Handler(BaseHTTPRequestHandler):
    """Answers as the server does, or wrongly."""

    def do_GET(self) -> None:
        if self.path == "/readyz" and MODE == "never_ready":
            self.answer({"error": {"message": "scanning"}}, 503)
        elif self.path == "/v1/models":
            self.answer({"data": MODELS})
        else:
            self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/embeddings":
            self.answer({"data": [{"embedding": [0.0 if MODE == "zero_embedding" else 1.0]}]})
        elif self.path.endswith("/unload"):
            self.answer({})
        elif body.get("stream"):
            self.answer({"choices": []})
        else:
            self.chat(str(body["model"]))

    def chat(self, model: str) -> None:
        """Answer, with a new process if the old one was killed."""
        assert model == "chat@gguf"
        global replica
        if replica.poll() is not None:
            if MODE == "not_replaced":
                self.answer({"error": {"message": "The process ended."}}, 503)
                return
            replica = start_replica()
        count = 0 if MODE == "empty_answer" else 8
        choice = {"finish_reason": "length"}
        self.answer({"usage": {"completion_tokens": count}, "choices": [choice]})

    def answer(self, value: Any, status: int = 200) -> None:
        """Send JSON."""
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def stop(*_: object) -> None:
    """End as the launcher does on Ctrl-C."""
    if MODE == "does_not_stop":
        return
    if MODE != "leaves_a_process":
        replica.kill()
    os._exit(3 if MODE == "ends_with_code" else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    os.makedirs(os.path.join(os.environ["IMPETUS_HOME"], "logs"))
    # As processes of Ray leave it that are ended.
    tempfile.mkdtemp(prefix=f"stand-in-{os.getppid()}-")
    sys.stdout.write("Starting, with IMPETUS_API_KEY set: %s\n" % ("IMPETUS_API_KEY" in os.environ))
    sys.stdout.flush()
    if MODE == "dies":
        sys.exit("The port cannot be used.")
    if MODE == "hangs":
        time.sleep(60)
    replica = start_replica()
    ThreadingHTTPServer(("127.0.0.1", int(os.environ["IMPETUS_PORT"])), Handler).serve_forever()
