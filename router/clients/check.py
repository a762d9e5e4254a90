"""Tests the connection as a client would: a stream, and a tool call with its result."""

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx

from core.awake_time import AwakeTimeout
from router.clients.check_tools import ABOUT, CODEX_TOOLS, NAME, SCHEMA
from router.clients.client import Wire
from router.clients.target import Model, Target

# In seconds; includes loading the model, which takes long for a large one.
LIMIT_S = 300.0
_ANSWER_TOKENS = 64
_QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
_RESULT = "Sunny, 21 degrees."


Check: TypeAlias = Callable[[httpx.AsyncClient, Target, Model], Awaitable[None]]


class CheckFailed(Exception):
    """The server's answer lacks something that a client needs; the text names it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one check; `problem` is empty if it passed, `ms` is how long it took."""

    name: str
    problem: str = ""
    ms: int = field(default=0, compare=False)


async def run_checks(
    http: httpx.AsyncClient, wire: Wire, target: Target, model: Model
) -> AsyncGenerator[Outcome, None]:
    """Run the checks one by one and yield each outcome; none takes longer than `LIMIT_S`."""
    for name, check in checks_of(wire, model):
        yield await checked(name, check(http, target, model))


def checks_of(wire: Wire, model: Model) -> Sequence[tuple[str, Check]]:
    """Return the names of the checks for a client of this API, and the checks."""
    if not model.chats:
        return [("embedding", _embedding)]
    stream, tools = _CHECKS[wire]
    return [("stream", stream), ("tool round trip", tools)]


async def checked(name: str, check: Awaitable[None], limit_s: float = LIMIT_S) -> Outcome:
    """Return the outcome of a check, which is cancelled after `limit_s` seconds."""
    begun = time.monotonic()
    try:
        async with AwakeTimeout(limit_s):
            await check
        problem = ""
    except TimeoutError:
        problem = f"no complete answer within {limit_s:g} s; is the model being loaded?"
    except (CheckFailed, httpx.HTTPError) as error:
        problem = str(error) or type(error).__name__
    except (ValueError, KeyError, IndexError, TypeError) as error:
        problem = f"unexpected format of the answer: {error!r}"
    return Outcome(name, problem, round((time.monotonic() - begun) * 1000))


async def check_model_list(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    """Raise CheckFailed unless `/v1/models` has the model, under its id, an alias or its name."""
    answer = await http.get(f"{target.base_url}/models", headers=dict(target.headers))
    _raise_status(answer)
    entries = answer.json()["data"]
    known = {str(entry["id"]) for entry in entries}
    aliases = {str(alias) for entry in entries for alias in entry.get("aliases", ())}
    if model.id not in known | aliases | {name.partition("@")[0] for name in known}:
        raise CheckFailed(f"the list does not have the model {model.id}")


async def _embedding(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    body = {"model": model.id, "input": ["hello"]}
    answer = await _post(http, f"{target.base_url}/embeddings", target.headers, body)
    if not answer["data"][0]["embedding"]:
        raise CheckFailed("the embedding is empty")


async def _openai_stream(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    body = {
        "model": model.id,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": _ANSWER_TOKENS,
        "stream": True,
    }
    events = await _events(http, f"{target.base_url}/chat/completions", target.headers, body)
    if not events or events[-1] != "[DONE]":
        raise CheckFailed("the stream did not end with [DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    _raise_error(chunks)
    if not any(choice.get("finish_reason") for chunk in chunks for choice in chunk["choices"]):
        raise CheckFailed("the stream has no finish_reason")


async def _openai_tools(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    function = {"name": NAME, "description": ABOUT, "parameters": SCHEMA}
    body: dict[str, Any] = {
        "model": model.id,
        "messages": [_QUESTION],
        "max_tokens": _ANSWER_TOKENS,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
    }
    url = f"{target.base_url}/chat/completions"
    message = (await _post(http, url, target.headers, body))["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    if not calls:
        raise CheckFailed("the model called no tool")
    _check_call(calls[0]["function"]["name"], json.loads(calls[0]["function"]["arguments"]))
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": _RESULT}
    call = {"role": "assistant", "content": message.get("content"), "tool_calls": calls[:1]}
    body |= {"messages": [_QUESTION, call, result], "tool_choice": "auto"}
    if not (await _post(http, url, target.headers, body))["choices"][0]["finish_reason"]:
        raise CheckFailed("the answer to the tool's result has no finish_reason")


async def _responses_stream(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    await _response(http, target, model, [_message("Say hello.")], "auto")


async def _responses_tools(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    question = _message(_QUESTION["content"])
    choice = {"type": "function", "name": NAME}
    output = (await _response(http, target, model, [question], choice))["output"]
    calls = [item for item in output if item["type"] == "function_call"]
    if not calls:
        raise CheckFailed("the model called no tool")
    _check_call(calls[0]["name"], json.loads(calls[0]["arguments"]))
    result = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": _RESULT}
    await _response(http, target, model, [question, calls[0], result], "auto")


async def _response(
    http: httpx.AsyncClient, target: Target, model: Model, items: Sequence[object], choice: object
) -> dict[str, Any]:
    """Return the complete response of a stream with the fields and tools that Codex sends."""
    body = {
        "model": model.id,
        "input": items,
        "tools": CODEX_TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "scripts-connect",
        "max_output_tokens": _ANSWER_TOKENS,
    }
    events = await _events(http, f"{target.base_url}/responses", target.headers, body)
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    _raise_error(chunks)
    last = chunks[-1] if chunks else {}
    if last.get("type") == "response.failed":
        raise CheckFailed(f"the response failed: {last['response']['error']['message']}")
    # Cut off at the limit of tokens is complete for this purpose.
    if last.get("type") not in ("response.completed", "response.incomplete"):
        raise CheckFailed("the stream did not end with response.completed")
    response: dict[str, Any] = last["response"]
    return response


def _message(text: str) -> Mapping[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "role": "user", "content": content}


def _anthropic_headers(target: Target) -> Mapping[str, str]:
    return {**target.headers, "anthropic-version": "2023-06-01"}


async def _anthropic_stream(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    body = {
        "model": model.id,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": _ANSWER_TOKENS,
        "stream": True,
    }
    events = await _events(http, f"{target.base_url}/messages", _anthropic_headers(target), body)
    chunks = [json.loads(event) for event in events]
    _raise_error(chunks)
    if not chunks or chunks[-1].get("type") != "message_stop":
        raise CheckFailed("the stream did not end with message_stop")


async def _anthropic_tools(http: httpx.AsyncClient, target: Target, model: Model) -> None:
    body: dict[str, Any] = {
        "model": model.id,
        "messages": [_QUESTION],
        "max_tokens": _ANSWER_TOKENS,
        "tools": [{"name": NAME, "description": ABOUT, "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
    }
    url, headers = f"{target.base_url}/messages", _anthropic_headers(target)
    answer = await _post(http, url, headers, body)
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    if not calls:
        raise CheckFailed("the model called no tool")
    _check_call(calls[0]["name"], calls[0]["input"])
    result = {"type": "tool_result", "tool_use_id": calls[0]["id"], "content": _RESULT}
    call = {"role": "assistant", "content": calls[:1]}
    body["messages"] = [_QUESTION, call, {"role": "user", "content": [result]}]
    body["tool_choice"] = {"type": "auto"}
    if not (await _post(http, url, headers, body))["stop_reason"]:
        raise CheckFailed("the answer to the tool's result has no stop_reason")


def _check_call(name: str, arguments: object) -> None:
    if name != NAME or arguments != {"city": "Paris"}:
        raise CheckFailed(f"the call {name}({json.dumps(arguments)}) does not match the tool")


async def _post(
    http: httpx.AsyncClient, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> dict[str, Any]:
    answer = await http.post(url, headers=dict(headers), json=body)
    _raise_status(answer)
    found: dict[str, Any] = answer.json()
    return found


async def _events(
    http: httpx.AsyncClient, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> list[str]:
    """Return the `data` fields of all events in a stream."""
    async with http.stream("POST", url, headers=dict(headers), json=body) as answer:
        if answer.is_error:
            await answer.aread()
        _raise_status(answer)
        lines = [line async for line in answer.aiter_lines() if line.startswith("data:")]
    return [line.removeprefix("data:").strip() for line in lines]


def _raise_status(answer: httpx.Response) -> None:
    if answer.is_error:
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = answer.text[:200]
        raise CheckFailed(f"HTTP {answer.status_code}: {message}")


def _raise_error(chunks: Sequence[Mapping[str, Any]]) -> None:
    for chunk in chunks:
        if "error" in chunk:
            raise CheckFailed(f"an error in the stream: {chunk['error'].get('message')}")


_CHECKS: Mapping[Wire, tuple[Check, Check]] = {
    "openai": (_openai_stream, _openai_tools),
    "responses": (_responses_stream, _responses_tools),
    "anthropic": (_anthropic_stream, _anthropic_tools),
}
