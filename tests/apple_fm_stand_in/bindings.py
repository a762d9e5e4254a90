"""Stand-in for apple-fm-sdk's C bindings: a scripted model behind the same functions.

It follows FoundationModelsCBindings.swift of the SDK 0.2.1 in what the Python side can notice:
streams run on threads of their own, releasing a stream cancels it, a cancelled task calls back
once more, and objects are counted.  It proves nothing about Apple's model.
"""

import ctypes
import json
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SUCCESS, EXCEEDED, ASSETS, GUARDRAIL, GUIDE, LANGUAGE = range(6)
DECODING, RATE, CONCURRENT, REFUSAL, SCHEMA = range(6, 11)
UNKNOWN = 255
_ROLES = {"instructions": "tools", "user": "options", "response": "assets"}

FMGeneratedContentRef = ctypes.c_void_p
FMComposedPromptAddImageErrorUnsupportedSDK = 1
FMComposedPromptAddImageErrorUnsupportedOS = 2


class Status(Exception):
    """A script's way to fail with one of the codes."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Silence(Exception):
    """A script's way to end without a word, as a system that hangs."""


@dataclass(frozen=True)
class Turn:
    """What the model is asked: prompt, options, schema, and the transcript before."""

    prompt: str
    options: dict[str, Any]
    schema: dict[str, Any] | None
    entries: list[dict[str, Any]]


def _echo(turn: Turn) -> Iterator[str]:
    yield from (word + " " for word in turn.prompt.split())


@dataclass
class Model:
    """The scripted model; a test sets what it needs."""

    answer: Callable[[Turn], Iterator[str]] = _echo
    is_available: bool = True
    reason: int = UNKNOWN
    context: int = 4096
    can_count: bool = True
    turns: list[Turn] = field(default_factory=list)
    live: set["Ref"] = field(default_factory=set)
    late_calls: int = 0
    calls_into_freed_memory: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def living(self, kind: str) -> int:
        """Return how many objects of a kind were not released."""
        return sum(ref.kind == kind for ref in self.live)


model = Model()


def reset() -> Model:
    """Start over; return the model to script."""
    global model
    model = Model()
    return model


class Ref:
    """An object of the other side, with one reference."""

    def __init__(self, kind: str, **state: Any) -> None:
        self.kind = kind
        self.count = 1
        self.state = state
        self.stopped = threading.Event()
        self.home = model
        model.live.add(self)


class Callback:
    """A C callback: gone with the last Python reference, whoever still wants to call it."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        self.function(*arguments)


FMLanguageModelSessionResponseCallback = Callback
FMLanguageModelSessionStructuredResponseCallback = Callback
FMSystemLanguageModelTokenCountCallback = Callback


class Content(bytes):
    """A C string as ctypesgen wraps it."""

    @property
    def data(self) -> bytes:
        """The bytes."""
        return bytes(self)

    def __getitem__(self, key: Any) -> Any:
        return Content(bytes.__getitem__(self, key))


def FMRetain(ref: Ref) -> None:
    ref.count += 1


def FMRelease(ref: Ref) -> None:
    ref.count -= 1
    assert ref.count >= 0, f"{ref.kind} was released once too often"
    if ref.count == 0:
        ref.home.live.discard(ref)
        if ref.kind == "stream":
            ref.stopped.set()


def FMFreeString(text: Any) -> None:
    del text


def FMTaskCancel(task: Ref) -> None:
    task.stopped.set()


def FMSystemLanguageModelCreate(use_case: int, guardrails: int) -> Ref:
    return Ref("model", use_case=use_case, guardrails=guardrails)


def FMSystemLanguageModelIsAvailable(ref: Ref, reason: Any) -> bool:
    reason._obj.value = ref.home.reason
    return ref.home.is_available


def FMSystemLanguageModelGetContextSize(ref: Ref) -> int:
    return ref.home.context


def FMComposedPromptInitialize() -> Ref:
    return Ref("prompt", text="")


def FMComposedPromptAddText(prompt: Ref, text: bytes) -> None:
    prompt.state["text"] += text.split(b"\0")[0].decode()


def FMLanguageModelSessionCreateFromSystemLanguageModel(
    _model: Ref | None, instructions: bytes | None, _tools: Any, _count: int
) -> Ref:
    entries = []
    if instructions is not None:
        entries.append(_entry("instructions", instructions.decode()))
    return Ref("session", entries=entries)


def FMTranscriptCreateFromJSONString(text: str, code: Any, _description: Any) -> Ref | None:
    try:
        entries = _entries_of(json.loads(text))
    except (AssertionError, KeyError, ValueError):
        code._obj.value = DECODING
        return None
    return Ref("session", entries=entries)


def FMLanguageModelSessionCreateFromTranscript(
    transcript: Ref, _model: Ref | None, _tools: Any, _count: int
) -> Ref:
    return Ref("session", entries=list(transcript.state["entries"]))


def FMLanguageModelSessionGetTranscriptJSONString(session: Ref, _code: Any, _text: Any) -> str:
    return json.dumps(_document(session.state["entries"]))


def FMLanguageModelSessionIsResponding(session: Ref) -> bool:
    del session
    return False


def FMLanguageModelSessionReset(session: Ref) -> None:
    del session


def FMLanguageModelSessionStreamResponse(session: Ref, prompt: Ref, options: bytes | None) -> Ref:
    return Ref("stream", session=session, prompt=prompt, options=options)


def FMLanguageModelSessionResponseStreamIterate(
    stream: Ref, _info: Any, callback: Callback
) -> None:
    called, home = weakref.ref(callback), stream.home

    def call(status: int, text: bytes) -> None:
        target = called()
        if stream.stopped.is_set():
            home.late_calls += 1
        if target is None:
            home.calls_into_freed_memory += 1
            return
        target(status, Content(text), len(text), None)

    def run() -> None:
        text = ""
        try:
            for delta in _answer(home, stream.state):
                if stream.stopped.is_set():
                    raise Status(UNKNOWN)
                text += delta
                call(SUCCESS, text.encode())
            call(SUCCESS, b"")
        except Silence:
            return
        except Status as status:
            call(status.code, b"failed")
        finally:
            if stream.stopped.is_set():
                home.cancelled.set()

    threading.Thread(target=run, daemon=True).start()


def FMLanguageModelSessionRespondWithSchemaFromJSON(
    session: Ref, prompt: Ref, schema: bytes, options: bytes | None, handle: Any, callback: Callback
) -> Ref:
    task, home = Ref("task"), session.home
    state = {"session": session, "prompt": prompt, "options": options, "schema": schema}

    def run() -> None:
        try:
            text = ""
            for delta in _answer(home, state):
                if task.stopped.is_set():
                    raise Status(UNKNOWN)
                text += delta
            callback(SUCCESS, Ref("content", text=text), handle)
        except Silence:
            return
        except Status as status:
            callback(status.code, None, handle)
        finally:
            if task.stopped.is_set():
                home.cancelled.set()

    threading.Thread(target=run, daemon=True).start()
    return task


def FMGeneratedContentGetJSONString(content: Ref) -> str:
    return str(content.state["text"])


def FMSystemLanguageModelTokenCountForPrompt(
    ref: Ref, prompt: Ref, handle: Any, callback: Callback
) -> Ref:
    return _count(ref.home, prompt.state["text"], handle, callback)


def FMSystemLanguageModelTokenCountForTranscript(
    ref: Ref, session: Ref, handle: Any, callback: Callback
) -> Ref:
    texts = [entry["contents"][0]["text"] for entry in session.state["entries"]]
    return _count(ref.home, " ".join(texts), handle, callback)


def _count(home: Model, text: str, handle: Any, callback: Callback) -> Ref:
    """Count words."""
    if home.can_count:
        callback(SUCCESS, len(text.split()), None, handle)
    else:
        callback(UNKNOWN, 0, None, handle)
    return Ref("task")


def _answer(home: Model, state: dict[str, Any]) -> Iterator[str]:
    """Run the script, and add to the transcript."""
    prompt, entries = state["prompt"].state["text"], state["session"].state["entries"]
    schema = json.loads(state["schema"]) if "schema" in state else None
    options = json.loads(state["options"]) if state["options"] else {}
    turn = Turn(prompt, options, schema, list(entries))
    home.turns.append(turn)
    text = ""
    for delta in home.answer(turn):
        text += delta
        yield delta
    entries += [_entry("user", prompt), _entry("response", text)]


def _entry(role: str, text: str) -> dict[str, Any]:
    content = {"type": "text", "id": str(uuid.uuid4()), "text": text}
    extra: Any = {} if role == "user" else []
    return {"id": str(uuid.uuid4()), "role": role, "contents": [content], _ROLES[role]: extra}


def _document(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "version": 1,
        "type": "FoundationModels.Transcript",
        "transcript": {"entries": entries},
    }


def _entries_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = document["transcript"]["entries"]
    assert document == _document(entries)
    for entry in entries:
        (content,) = entry["contents"]
        assert content["type"] == "text"
        assert isinstance(content["text"], str)
        assert uuid.UUID(entry["id"]) != uuid.UUID(content["id"])
        assert set(entry) == {"id", "role", "contents", _ROLES[entry["role"]]}
    return entries
