"""Stand-ins for what the router is built over: a catalog, a dispatcher and a health check."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from core.errors import ModelNotFound
from core.settings import Settings
from core.types import (
    DEFAULT_EMBEDDING,
    Capability,
    ChatPrompt,
    EmbeddingParams,
    Embeddings,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Priority,
    Prompt,
    Relevance,
    RerankInputs,
    TextDelta,
    TextPrompt,
    TokenizedPrompt,
    TokenizeOptions,
    TokenPrompt,
    Usage,
)
from router.services import (
    EventCallback,
    LibraryEntry,
    LibraryView,
    ModelView,
    Services,
    SettingsView,
)

ScriptItem: TypeAlias = GenerationEvent | Exception | asyncio.Event

CHAT_MODEL = "tiny@gguf-q8_0"
EMBEDDING_MODEL = "mini@gguf-f16"
RERANK_MODEL = "ranker@gguf-f16"


# What a client of `make_services` sends to manage.
MANAGING = {"x-impetus-token": "test-management-token"}


def make_view(model_id: str = CHAT_MODEL, **changes: Any) -> ModelView:
    """Return a chat model's view."""
    fields: dict[str, Any] = {
        "id": model_id,
        "name": model_id.partition("@")[0],
        "format": "gguf",
        "architecture": "llama",
        "quantization": "Q8_0",
        "parameters": 1000,
        "size_bytes": 2000,
        "context_length": 4096,
        "max_model_len": 2048,
        "capabilities": frozenset({Capability.CHAT, Capability.COMPLETION}),
        "state": "available",
        "reason": "",
        "aliases": (model_id.partition("@")[0],),
        "license": "Apache-2.0",
        "created_at": 1_700_000_000,
    }
    return ModelView(**{**fields, **changes})


def finished(
    reason: FinishReason = "stop", *, prompt: int = 7, completion: int = 2, cached: int = 3
) -> Finished:
    """Return the last event of a generation."""
    return Finished(reason, Usage(prompt, completion, cached))


class FakeCatalog:
    """Knows the views it was given, by id and alias."""

    def __init__(self, *views: ModelView) -> None:
        self._views = views
        self.asked: list[str] = []
        self.settings: Mapping[str, SettingsView] = {}

    async def resolve(self, name: str) -> ModelView:
        self.asked.append(name)
        for view in self._views:
            if name == view.id or name in view.aliases:
                return view
        raise ModelNotFound.of(name, [view.id for view in self._views])

    async def models(self) -> Sequence[ModelView]:
        return self._views

    async def library(self) -> LibraryView:
        entries = [
            LibraryEntry(view, self.settings.get(view.id, SettingsView()))
            for view in sorted(self._views, key=lambda view: view.id)
        ]
        return LibraryView(entries, {})


class FakeDispatcher:
    """Plays a script for every request: gives events, raises exceptions, waits for gates."""

    def __init__(self, *script: ScriptItem) -> None:
        self.script: Sequence[ScriptItem] = script or (TextDelta("Hello"), finished())
        self.scripts: dict[str, Sequence[ScriptItem]] = {}
        self.requests: list[GenerationRequest] = []
        self.embedded: list[Sequence[str | Sequence[int]]] = []
        self.params: list[EmbeddingParams] = []
        self.reranked: list[RerankInputs] = []
        self.priorities: list[Priority] = []
        self.deadlines: list[float | None] = []
        self.vectors: Any = None
        self.counted: list[Prompt] = []
        self.tokenized: list[tuple[str, Prompt, TokenizeOptions]] = []
        self.count_error: Exception | None = None
        self.embed_gate: asyncio.Event | None = None
        self.played = 0
        self.running = 0
        self.began = asyncio.Event()
        self.idle = asyncio.Event()

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        self._enter()
        self.requests.append(request)
        try:
            for item in self.scripts.get(request.id.rpartition("-")[2], self.script):
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    self.played += 1
                    on_events([item])
        finally:
            self._leave()

    async def embed(
        self,
        model_id: str,
        inputs: Sequence[str | Sequence[int]],
        priority: Priority = "interactive",
        deadline_s: float | None = None,
        params: EmbeddingParams = DEFAULT_EMBEDDING,
    ) -> Embeddings:
        del model_id
        self.params.append(params)
        self.priorities.append(priority)
        self.deadlines.append(deadline_s)
        self._enter()
        self.embedded.append(inputs)
        try:
            if self.embed_gate is not None:
                await self.embed_gate.wait()
        finally:
            self._leave()
        vectors = self.vectors
        if vectors is None:
            vectors = [[index, 0.5, -1.25] for index in range(len(inputs))]
        return Embeddings(np.asarray(vectors, dtype=np.float32), prompt_tokens=5)

    async def rerank(
        self,
        model_id: str,
        inputs: RerankInputs,
        priority: Priority = "interactive",
        deadline_s: float | None = None,
    ) -> Relevance:
        del model_id
        self.reranked.append(inputs)
        self.priorities.append(priority)
        self.deadlines.append(deadline_s)
        self._enter()
        try:
            if self.embed_gate is not None:
                await self.embed_gate.wait()
        finally:
            self._leave()
        scores = self.vectors
        if scores is None:
            scores = [len(text) / 100 for text in inputs.documents]
        return Relevance(np.asarray(scores, np.float32), prompt_tokens=9, truncated_tokens=2)

    async def count_tokens(
        self, model_id: str, prompt: Prompt, deadline_s: float | None = None
    ) -> int:
        del model_id
        self.deadlines.append(deadline_s)
        self.counted.append(prompt)
        if self.count_error is not None:
            raise self.count_error
        return 42

    async def tokenize(
        self,
        model_id: str,
        prompt: Prompt,
        options: TokenizeOptions,
        deadline_s: float | None = None,
    ) -> TokenizedPrompt:
        """Tokens are bytes; a conversation is the text of its messages, a line each."""
        self.deadlines.append(deadline_s)
        self.tokenized.append((model_id, prompt, options))
        if self.count_error is not None:
            raise self.count_error
        match prompt:
            case ChatPrompt():
                data = "".join(f"{one.role}: {one.content}\n" for one in prompt.messages).encode()
            case TextPrompt(text):
                data = text.encode()
            case TokenPrompt(token_ids):
                data = bytes(token_ids)
            case _:
                raise AssertionError(prompt)
        pieces = tuple(bytes([byte]) for byte in data)
        return TokenizedPrompt(data.decode("utf-8", "replace"), tuple(data), pieces)

    def _enter(self) -> None:
        self.running += 1
        self.idle.clear()
        self.began.set()

    def _leave(self) -> None:
        self.running -= 1
        if not self.running:
            self.idle.set()


class FakeHealth:
    """Says what it was told to say."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    async def not_ready_because(self) -> str:
        return self.reason


class FakeTelemetry:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.refreshed = 0

    async def refresh(self) -> None:
        self.refreshed += 1


def make_services(
    dispatcher: FakeDispatcher | None = None,
    *,
    views: Sequence[ModelView] | None = None,
    not_ready: str = "",
    **settings: Any,
) -> Services:
    """Return services with a chat model, an embedding model and a reranking model."""
    embedder = make_view(EMBEDDING_MODEL, capabilities=frozenset({Capability.EMBEDDING}))
    ranker = make_view(RERANK_MODEL, capabilities=frozenset({Capability.RERANK}))
    return Services(
        settings=Settings(**settings),
        catalog=FakeCatalog(*(views or (make_view(), embedder, ranker))),
        dispatcher=dispatcher or FakeDispatcher(),
        health=FakeHealth(not_ready),
        telemetry=FakeTelemetry(),
        management_token=MANAGING["x-impetus-token"],
    )
