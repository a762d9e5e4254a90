"""HTTP answers of the test hub, and the errors in the Hub's form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.hub_lib.faults import Fault
from scripts.hub_lib.search import Query


@dataclass(frozen=True, slots=True)
class Request:
    """One request; header names are in lower case, the path is as it was sent."""

    method: str
    path: str
    query: Query
    headers: Mapping[str, str]
    origin: str
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class FileBody:
    """`count` bytes of a file from `start`."""

    source: Path
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `faults` are what happens while its body is sent, by kind."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | FileBody = b""
    faults: Mapping[str, Fault] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of bytes of the body."""
        return self.body.count if isinstance(self.body, FileBody) else len(self.body)


def json_answer(value: Any, headers: Mapping[str, str] | None = None) -> Answer:
    """Return an answer with a JSON body."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(headers={**kind, **(headers or {})}, body=json.dumps(value).encode())


def error(
    status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None
) -> Answer:
    """Return an error as the Hub writes it: in two headers and as JSON."""
    found = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
    found |= {"X-Error-Code": code} if code else {}
    return Answer(status, {**found, **(headers or {})}, json.dumps({"error": message}).encode())


def too_many(status: int, seconds: int) -> Answer:
    """Return the answer of a status fault; 429 and 503 tell when to try again."""
    if status == 429:
        headers = {
            "Retry-After": str(seconds),
            "RateLimit": f'"api";r=0;t={seconds}',
            "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
        }
        return error(status, "We had to rate limit your IP.", headers=headers)
    headers = {"Retry-After": str(seconds)} if status == 503 else {}
    return error(status, f"Injected status {status}.", headers=headers)


def web_page() -> Answer:
    """Return what a network's sign-in page answers in place of the Hub."""
    page = b"<!doctype html><title>Sign in to the network</title>"
    return Answer(200, {"Content-Type": "text/html", "ETag": '"page"'}, page)
