"""What the routes need from the rest, as Protocols, so that their tests need no Ray."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from core.settings import Settings
from core.types import Capability, Embeddings, GenerationEvent, GenerationRequest

ModelState: TypeAlias = Literal["resident", "loading", "available", "unavailable", "refused"]


@dataclass(frozen=True, slots=True)
class ModelView:
    """A catalog entry as the API shows it.

    `context_length` is the trained one, `max_model_len` the one granted or foreseen, both in
    tokens.  `reason` says why a model is unavailable or refused.  `created_at` is unix seconds.
    """

    id: str
    name: str
    format: str
    architecture: str
    quantization: str
    parameters: int
    size_bytes: int
    context_length: int
    max_model_len: int
    capabilities: frozenset[Capability]
    state: ModelState
    reason: str
    aliases: tuple[str, ...]
    license: str
    created_at: int


class Catalog(Protocol):
    """Which models there are."""

    async def resolve(self, name: str) -> ModelView:
        """Return the model that an id or alias means.

        Raises ModelNotFound with the nearest names, BrokenModel for a refused file,
        BackendUnavailable with the reason.
        """
        ...

    async def models(self) -> Sequence[ModelView]:
        """Return all models, by id."""
        ...


class Dispatcher(Protocol):
    """Runs requests on the engine that holds the model, loading it first where needed."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield events, `Finished` last.  Closing the generator cancels the work."""
        ...

    async def embed(self, model_id: str, inputs: Sequence[str | Sequence[int]]) -> Embeddings:
        """Return one vector per input, in order."""
        ...


class Health(Protocol):
    """Whether the server can take requests."""

    async def not_ready_because(self) -> str:
        """Return why not, or an empty string."""
        ...


class Telemetry(Protocol):
    """Figures that live in other processes."""

    async def refresh(self) -> None:
        """Fetch them, for the metrics that are shown next; never raises, never takes long."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the HTTP application is built over."""

    settings: Settings
    catalog: Catalog
    dispatcher: Dispatcher
    health: Health
    telemetry: Telemetry
