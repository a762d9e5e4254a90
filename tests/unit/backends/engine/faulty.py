"""A stepper, requests and receivers that fail where a test wants it."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from backends.answer.assembler import TextAssembler
from backends.base import EngineLoad, EventReceiver
from backends.echo import END_TOKEN, ByteTokenizer, echo_info
from backends.engine.request import EngineRequest
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Prepared, Preparer
from backends.stepper import SequenceSpec, StepOutput
from core.errors import ImpetusError, RequestFailed
from core.types import Finished, GenerationEvent, GenerationRequest, SamplingParams, TextPrompt

# Where one request can fail; the first character of its prompt says where.
FAULTS = {
    "refused": "a",
    "add raises": "b",
    "added, then raises": "c",
    "row problem": "d",
    "assembler": "e",
    "assembler at the end": "f",
    "first events": "g",
    "mask problem raises": "h",
    "end": "i",
    "remove": "j",
    "delivery": "k",
    "delivery of the end": "l",
    "two outputs a step": "m",
}
# Ends well in spite of its fault.
HARMLESS = frozenset({"remove", "two outputs a step"})


class Panic(BaseException):
    """What a runtime in Rust raises when it panics; it is no Exception."""


class FaultyStepper:
    """Repeats prompts byte by byte, and fails for those whose first byte says so."""

    def __init__(self, max_sequences: int = 3) -> None:
        self.max_sequences = max_sequences
        self.left: dict[int, list[int]] = {}
        self.specs: dict[int, SequenceSpec] = {}
        self.removals: Counter[int] = Counter()
        self.steps = 0
        self.stepped = threading.Condition()
        self.breaks: set[str] = set()
        self.closed = 0

    def add(self, spec: SequenceSpec) -> None:
        fault = chr(spec.prompt[0])
        if fault == FAULTS["refused"]:
            raise RequestFailed("refused by the stepper")
        if fault == FAULTS["add raises"]:
            raise Panic("no room in the stepper")
        self.specs[spec.id] = spec
        self.left[spec.id] = [END_TOKEN, *reversed(spec.prompt)]
        if fault == FAULTS["added, then raises"]:
            raise ValueError("the stepper noticed late")

    def remove(self, sequence_id: int) -> None:
        self.removals[sequence_id] += 1
        spec = self.specs.get(sequence_id)
        is_faulty = spec is not None and chr(spec.prompt[0]) == FAULTS["remove"]
        if is_faulty and self.removals[sequence_id] == 1:
            raise ValueError("the sequence does not want to go")
        self.left.pop(sequence_id, None)
        self.specs.pop(sequence_id, None)

    def step(self) -> list[StepOutput]:
        if "step" in self.breaks:
            raise RuntimeError("the device is gone")
        outputs: list[StepOutput] = []
        for sequence_id, left in self.left.items():
            fault = chr(self.specs[sequence_id].prompt[0])
            if fault == FAULTS["row problem"] and len(left) < 3:
                problem = RequestFailed("the row is broken")
                outputs.append(StepOutput(sequence_id, None, problem=problem))
                continue
            for _ in range(2 if fault == FAULTS["two outputs a step"] else 1):
                token_id = left.pop() if left else END_TOKEN
                outputs.append(StepOutput(sequence_id, token_id, is_end=token_id == END_TOKEN))
        with self.stepped:
            self.steps += 1
            self.stepped.notify_all()
        return outputs

    @property
    def has_chores(self) -> bool:
        self._may_break("has_chores")
        return "do_chore" in self.breaks

    def do_chore(self) -> None:
        self._may_break("do_chore")

    def limit_prefill(self, chunk_tokens: int | None) -> None:
        del chunk_tokens
        self._may_break("limit_prefill")

    def counters(self) -> EngineLoad:
        self._may_break("counters")
        return EngineLoad(steps=self.steps)

    def close(self) -> None:
        self.closed += 1
        self._may_break("close")

    def _may_break(self, place: str) -> None:
        if place in self.breaks:
            raise Panic(place)


class FaultyAssembler(TextAssembler):
    """Raises at its second token, or at the end."""

    __slots__ = ("at_end", "pushed")

    at_end: bool
    pushed: int

    def push(self, output: StepOutput) -> list[GenerationEvent]:
        self.pushed += 1
        if output.is_end if self.at_end else self.pushed == 2:
            raise RecursionError("too deep")
        return super().push(output)


class FaultyMask:
    """Masks nothing; its problem cannot be read."""

    is_active = False

    @property
    def problem(self) -> str:
        raise Panic("the grammar panicked")

    def apply(self, logits: Any) -> None:
        """Change nothing."""

    def accept(self, token_id: int) -> None:
        """Change nothing."""


class BrokenEvents(list[GenerationEvent]):
    """Events that cannot be iterated over."""

    def __iter__(self) -> Any:
        raise ValueError("broken events")


class BrokenAssembler(TextAssembler):
    """Cannot tell what its request's end is."""

    __slots__ = ()

    @property
    def mismatches(self) -> Any:
        raise KeyError("mismatches")


def break_prepared(prepared: Prepared) -> Prepared:
    """Let a prepared request fail where its first byte says."""
    fault = chr(prepared.prompt[0])
    tokenizer, count = ByteTokenizer(), prepared.max_tokens
    if fault in (FAULTS["assembler"], FAULTS["assembler at the end"]):
        assembler = FaultyAssembler(tokenizer.token_bytes, (), count)
        assembler.pushed, assembler.at_end = 0, fault == FAULTS["assembler at the end"]
        prepared.assembler = assembler
    if fault == FAULTS["first events"]:
        prepared.initial_events = BrokenEvents()
    if fault == FAULTS["mask problem raises"]:
        prepared.mask = FaultyMask()
    if fault == FAULTS["end"]:
        prepared.assembler = BrokenAssembler(tokenizer.token_bytes, (), count)
    return prepared


class FaultyPreparer(Preparer):
    """Prepares requests that fail where their first byte says."""

    def __init__(self) -> None:
        chat = ChatFormat(None, "", "")
        super().__init__(echo_info(), ByteTokenizer(), chat, context_tokens=256)

    def prepare(self, request: GenerationRequest) -> Prepared:
        return break_prepared(super().prepare(request))


class FaultyReceiver:
    """Takes the events of all requests; refuses a whole batch with those of a faulty one."""

    def __init__(self) -> None:
        self.events: dict[str, list[GenerationEvent]] = {}

    def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
        for request_id, events in batch:
            ends = any(isinstance(event, Finished) for event in events)
            is_end_refused = request_id.startswith(FAULTS["delivery of the end"]) and ends
            if request_id.startswith(FAULTS["delivery"]) or is_end_refused:
                raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        for request_id, events in batch:
            self.events.setdefault(request_id, []).extend(events)


class CountedRequest(EngineRequest):
    """A request that counts how often it was resolved, without an event loop."""

    __slots__ = ("outcomes",)

    outcomes: list[Finished | ImpetusError]

    def resolve(self, outcome: Finished | ImpetusError) -> None:
        self.outcomes.append(outcome)


def counted_request(text: str, receiver: EventReceiver, number: int) -> CountedRequest:
    """Return a request to repeat `text`, whose id begins with its first character."""
    generation = GenerationRequest(
        f"{text[0]}-{number}", "echo", TextPrompt(text), SamplingParams(), max_tokens=64
    )
    nothing: Any = None
    prepared = FaultyPreparer().prepare(generation)
    request = CountedRequest(generation, prepared, receiver, nothing, nothing, 0.0)
    request.outcomes = []
    return request


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until `condition` holds; a test that waits longer has hung."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)
