"""Talks to the doctor's own server: answers are checked, errors become one sentence."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_PROBE_LIMIT_S = 2.0
_TOKENS = 8
_CANCELLED_TOKENS = 512
# Long enough for a lid to be closed, short enough for the starter's context.
_LONG_TOKENS = 4096
_ASK = ({"role": "user", "content": "Say hello."},)
# What a server that dies while it answers causes.
_BROKEN = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError)


class AnswerProblem(Exception):
    """The server's answer is missing or wrong; the text says what."""


class Client:
    """A client of the server at `root`; each request blocks for at most `limit_s`.

    `token` is the server's management token, which unloading needs.
    """

    def __init__(self, root: str, limit_s: float, token: str = "") -> None:
        self._root = root
        self._token = token
        self._limit_s = limit_s
        # No proxy reaches this machine's loopback.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_ready(self) -> bool:
        """Return whether the server accepts requests."""
        try:
            with self._opener.open(f"{self._root}/readyz", timeout=_PROBE_LIMIT_S) as answer:
                return bool(answer.status == 200)
        except _BROKEN:
            return False

    def models(self) -> Sequence[Mapping[str, Any]]:
        """Return the listed models."""
        data = self._ask("/v1/models")["data"]
        if not isinstance(data, list):
            raise AnswerProblem("/v1/models has no list of models.")
        return data

    def chat(self, model: str) -> str:
        """Ask for a short answer; return its length."""
        answer = self._ask(
            "/v1/chat/completions",
            {"model": model, "messages": _ASK, "max_tokens": _TOKENS, "temperature": 0},
        )
        try:
            count = int(answer["usage"]["completion_tokens"])
            reason = answer["choices"][0]["finish_reason"]
        except _BROKEN as problem:
            raise AnswerProblem(f"The answer has not the expected form: {problem!r}.") from None
        if count < 1 or not reason:
            raise AnswerProblem("The answer is empty.")
        return f"{count} tokens"

    def embed(self, model: str) -> str:
        """Ask for an embedding; return its dimensions."""
        answer = self._ask("/v1/embeddings", {"model": model, "input": "hello"})
        try:
            vector = [float(value) for value in answer["data"][0]["embedding"]]
        except _BROKEN as problem:
            raise AnswerProblem(f"The answer has not the expected form: {problem!r}.") from None
        if not any(vector):
            raise AnswerProblem("The embedding is zero.")
        return f"{len(vector)} dimensions"

    def cancel(self, model: str) -> str:
        """Leave a long stream after its first event; the next answer must not wait for its end."""
        body = {
            "model": model,
            "messages": _ASK,
            "max_tokens": _CANCELLED_TOKENS,
            "stream": True,
            "ignore_eos": True,
        }
        try:
            with self._open("/v1/chat/completions", body) as stream:
                if not stream.readline():
                    raise AnswerProblem("The stream is empty.")
        except _BROKEN as problem:
            raise AnswerProblem(_told(problem)) from None
        return self.chat(model)

    def stream(self, model: str, on_event: Callable[[], None]) -> None:
        """Stream a long answer to its end; `on_event` is called after each line of it."""
        body = {
            "model": model,
            "messages": _ASK,
            "max_tokens": _LONG_TOKENS,
            "stream": True,
            "ignore_eos": True,
        }
        last = b""
        try:
            with self._open("/v1/chat/completions", body) as stream:
                for line in stream:
                    last = line.strip() or last
                    on_event()
        except _BROKEN as problem:
            raise AnswerProblem(_told(problem)) from None
        if last != b"data: [DONE]":
            raise AnswerProblem(f"The stream ended with {last.decode('utf-8', 'replace')[:200]}")

    def unload(self, model: str) -> None:
        """Unload a model."""
        self._ask(f"/api/models/{urllib.parse.quote(model, safe='')}/unload", {})

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        try:
            with self._open(path, body) as answer:
                found = json.load(answer)
        except _BROKEN as problem:
            raise AnswerProblem(_told(problem)) from None
        if not isinstance(found, dict):
            raise AnswerProblem(f"{path} answers with something else than an object.")
        return found

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "X-Impetus-Token": self._token}
        request = urllib.request.Request(f"{self._root}{path}", data, headers)
        return self._opener.open(request, timeout=self._limit_s)


def _told(problem: Exception) -> str:
    """Return an error as the server words it, else what it is."""
    if isinstance(problem, urllib.error.HTTPError):
        try:
            with problem:
                return f"HTTP {problem.code}: {json.load(problem)['error']['message']}"
        except _BROKEN:
            return f"HTTP {problem.code} without an error's text."
    if isinstance(problem, TimeoutError):
        return "There was no answer in time."
    return f"The connection failed: {problem}."
