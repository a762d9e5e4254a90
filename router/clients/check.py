"""Tests the connection as a client would: a stream, and a tool call with its result."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from router.clients.client import Wire
from router.clients.target import Model, Target

# Includes loading the model, which takes long for a large one.
_TIMEOUT_S = 300.0
_ANSWER_TOKENS = 64
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_NAME = "get_weather"
_ABOUT = "Tells the weather of a city."
_QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
_RESULT = "Sunny, 21 degrees."
# The kinds of tools in each request of Codex 0.171; those of OpenAI's models add apply_patch.
_CODEX_TOOLS = (
    {
        "type": "function",
        "name": _NAME,
        "description": _ABOUT,
        "strict": False,
        "parameters": _SCHEMA,
    },
    {
        "type": "namespace",
        "name": "multi_agent_v1",
        "description": "Tools for spawning and managing sub-agents.",
        "tools": [
            {
                "type": "function",
                "name": "close_agent",
                "description": "Closes an agent.",
                "strict": False,
                "parameters": {
                    "type": "object",
                    "properties": {"target": {"type": "string"}},
                    "required": ["target"],
                    "additionalProperties": False,
                },
            }
        ],
    },
    {"type": "web_search", "external_web_access": False},
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {
            "type": "grammar",
            "syntax": "lark",
            "definition": 'start: "*** Begin Patch\\n" LINE+ "*** End Patch"\nLINE: /[^\\n]*\\n/\n',
        },
    },
)


class CheckFailed(Exception):
    """The server's answer lacks something that a client needs; the text names it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one check; `problem` is empty if it passed."""

    name: str
    problem: str = ""


def run_checks(wire: Wire, target: Target, model: Model) -> Iterator[Outcome]:
    """Run the checks one by one and yield each outcome; blocks during each check."""
    with httpx.Client(timeout=_TIMEOUT_S) as client:
        if not model.chats:
            yield _outcome("embedding", lambda: _embedding(client, target, model))
        elif wire == "anthropic":
            yield _outcome("stream", lambda: _anthropic_stream(client, target, model))
            yield _outcome("tool round trip", lambda: _anthropic_tools(client, target, model))
        elif wire == "responses":
            yield _outcome("stream", lambda: _responses_stream(client, target, model))
            yield _outcome("tool round trip", lambda: _responses_tools(client, target, model))
        else:
            yield _outcome("stream", lambda: _openai_stream(client, target, model))
            yield _outcome("tool round trip", lambda: _openai_tools(client, target, model))


def _outcome(name: str, check: Callable[[], None]) -> Outcome:
    try:
        check()
    except (CheckFailed, httpx.HTTPError) as problem:
        return Outcome(name, str(problem) or type(problem).__name__)
    except (ValueError, KeyError, IndexError, TypeError) as problem:
        return Outcome(name, f"unexpected format of the answer: {problem!r}")
    return Outcome(name)


def _embedding(client: httpx.Client, target: Target, model: Model) -> None:
    body = {"model": model.id, "input": ["hello"]}
    answer = _post(client, f"{target.base_url}/embeddings", target.headers, body)
    if not answer["data"][0]["embedding"]:
        raise CheckFailed("the embedding is empty")


def _openai_stream(client: httpx.Client, target: Target, model: Model) -> None:
    body = {
        "model": model.id,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": _ANSWER_TOKENS,
        "stream": True,
    }
    events = _events(client, f"{target.base_url}/chat/completions", target.headers, body)
    if not events or events[-1] != "[DONE]":
        raise CheckFailed("the stream did not end with [DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    _raise_error(chunks)
    if not any(choice.get("finish_reason") for chunk in chunks for choice in chunk["choices"]):
        raise CheckFailed("the stream has no finish_reason")


def _openai_tools(client: httpx.Client, target: Target, model: Model) -> None:
    function = {"name": _NAME, "description": _ABOUT, "parameters": _SCHEMA}
    body: dict[str, Any] = {
        "model": model.id,
        "messages": [_QUESTION],
        "max_tokens": _ANSWER_TOKENS,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
    }
    url = f"{target.base_url}/chat/completions"
    message = _post(client, url, target.headers, body)["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    if not calls:
        raise CheckFailed("the model called no tool")
    _check_call(calls[0]["function"]["name"], json.loads(calls[0]["function"]["arguments"]))
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": _RESULT}
    call = {"role": "assistant", "content": message.get("content"), "tool_calls": calls[:1]}
    body |= {"messages": [_QUESTION, call, result], "tool_choice": "auto"}
    if not _post(client, url, target.headers, body)["choices"][0]["finish_reason"]:
        raise CheckFailed("the answer to the tool's result has no finish_reason")


def _responses_stream(client: httpx.Client, target: Target, model: Model) -> None:
    _response(client, target, model, [_message("Say hello.")], "auto")


def _responses_tools(client: httpx.Client, target: Target, model: Model) -> None:
    question = _message(_QUESTION["content"])
    choice = {"type": "function", "name": _NAME}
    output = _response(client, target, model, [question], choice)["output"]
    calls = [item for item in output if item["type"] == "function_call"]
    if not calls:
        raise CheckFailed("the model called no tool")
    _check_call(calls[0]["name"], json.loads(calls[0]["arguments"]))
    result = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": _RESULT}
    _response(client, target, model, [question, calls[0], result], "auto")


def _response(
    client: httpx.Client, target: Target, model: Model, items: Sequence[object], choice: object
) -> dict[str, Any]:
    """Return the complete response of a stream with the fields and tools that Codex sends."""
    body = {
        "model": model.id,
        "input": items,
        "tools": _CODEX_TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "scripts-connect",
        "max_output_tokens": _ANSWER_TOKENS,
    }
    events = _events(client, f"{target.base_url}/responses", target.headers, body)
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


def _anthropic_stream(client: httpx.Client, target: Target, model: Model) -> None:
    body = {
        "model": model.id,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": _ANSWER_TOKENS,
        "stream": True,
    }
    events = _events(client, f"{target.base_url}/messages", _anthropic_headers(target), body)
    chunks = [json.loads(event) for event in events]
    _raise_error(chunks)
    if not chunks or chunks[-1].get("type") != "message_stop":
        raise CheckFailed("the stream did not end with message_stop")


def _anthropic_tools(client: httpx.Client, target: Target, model: Model) -> None:
    body: dict[str, Any] = {
        "model": model.id,
        "messages": [_QUESTION],
        "max_tokens": _ANSWER_TOKENS,
        "tools": [{"name": _NAME, "description": _ABOUT, "input_schema": _SCHEMA}],
        "tool_choice": {"type": "any"},
    }
    url, headers = f"{target.base_url}/messages", _anthropic_headers(target)
    answer = _post(client, url, headers, body)
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    if not calls:
        raise CheckFailed("the model called no tool")
    _check_call(calls[0]["name"], calls[0]["input"])
    result = {"type": "tool_result", "tool_use_id": calls[0]["id"], "content": _RESULT}
    call = {"role": "assistant", "content": calls[:1]}
    body["messages"] = [_QUESTION, call, {"role": "user", "content": [result]}]
    body["tool_choice"] = {"type": "auto"}
    if not _post(client, url, headers, body)["stop_reason"]:
        raise CheckFailed("the answer to the tool's result has no stop_reason")


def _check_call(name: str, arguments: object) -> None:
    if name != _NAME or arguments != {"city": "Paris"}:
        raise CheckFailed(f"the call {name}({json.dumps(arguments)}) does not match the tool")


def _post(
    client: httpx.Client, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> dict[str, Any]:
    answer = client.post(url, headers=dict(headers), json=body)
    _raise_status(answer)
    found: dict[str, Any] = answer.json()
    return found


def _events(
    client: httpx.Client, url: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> list[str]:
    """Return the `data` fields of all events in a stream."""
    with client.stream("POST", url, headers=dict(headers), json=body) as answer:
        if answer.is_error:
            answer.read()
        _raise_status(answer)
        lines = [line for line in answer.iter_lines() if line.startswith("data:")]
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
