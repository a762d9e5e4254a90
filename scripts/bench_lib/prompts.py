"""Generates prompts that are in no prefix cache and equal for both servers of a round."""

from hashlib import blake2s
from typing import Any

SUBJECTS = (
    "a lighthouse keeper", "the sea in winter", "a train across the desert", "two old friends",
    "the first telescope", "a village market", "the history of bread", "a storm at night",
    "an orchestra on tour", "the making of paper", "a garden in spring", "a long river",
    "the city under snow", "a clockmaker's shop", "an island school", "the flight of geese",
)  # fmt: skip
TOOLS = ("read_file", "write_file", "list_folder", "search_text", "run_command", "open_page")


def stream_bodies(run: str, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Return one request per stream; `run` makes their first words unique."""
    return [
        _body(
            [
                {"role": "system", "content": f"{_word(run, index)}: you are a patient author."},
                {
                    "role": "user",
                    "content": f"Write a very long and detailed story about "
                    f"{SUBJECTS[index % len(SUBJECTS)]}, in many chapters, without ending it.",
                },
            ],
            max_tokens,
        )
        for index in range(count)
    ]


def constrained(body: dict[str, Any]) -> dict[str, Any]:
    """Return `body` with its answer constrained to a JSON schema that needs a long answer.

    Its first word differs, so the prefix of the unconstrained prompt is not reused.
    """
    first, *others = body["messages"]
    word, colon, rest = first["content"].partition(":")
    messages = [{**first, "content": word[::-1] + colon + rest}, *others]
    chapter = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 80},
            "pages": {"type": "integer", "minimum": 1, "maximum": 99},
            "text": {"type": "string", "minLength": 200, "maxLength": 2000},
            "mood": {"enum": ["calm", "tense", "glad", "sad"]},
        },
        "required": ["title", "pages", "text", "mood"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": chapter, "minItems": 40}
    chosen = {"type": "json_schema", "json_schema": {"name": "story", "schema": schema}}
    return {**body, "messages": messages, "response_format": chosen}


def short_body(run: str) -> dict[str, Any]:
    """Return a request with a short prompt, so the server's overhead is visible next to prefill."""
    return _body([{"role": "user", "content": f"{_word(run, 0)}?"}], max_tokens=4)


def _word(run: str, index: int) -> str:
    """Return a first word that is unique to this prompt."""
    return blake2s(f"{run} {index}".encode()).hexdigest()[:10]


def agent_system_text(run: str, characters: int) -> str:
    """Return an agent's instructions with tool descriptions, about `characters` long."""
    parts = [f"{_word(run, 0)}. You are a careful coding agent. Use one tool at a time.\n"]
    length = len(parts[0])
    number = 0
    while length < characters:
        name = f"{TOOLS[number % len(TOOLS)]}_{number}"
        part = (
            f"\n## {name}\nDescription: request to use {name} on the project's files. Use it when "
            f"the task needs step {number}, never to guess.\nParameters:\n"
            "- path: (required) the path relative to the current folder.\n"
            f"- limit: (optional) how many results to return, at most {number + 10}.\n"
            f"Example: <{name}><path>src/module_{number}.py</path></{name}>\n"
        )
        parts.append(part)
        length += len(part)
        number += 1
    return "".join(parts)[:characters]


def first_turn(system_text: str, max_tokens: int) -> dict[str, Any]:
    """Return the agent's first request."""
    return _body(
        [
            {"role": "system", "content": system_text},
            {"role": "user", "content": "List the files that you would look at first."},
        ],
        max_tokens,
    )


def second_turn(first: dict[str, Any], answer: str) -> dict[str, Any]:
    """Return the request that follows `first` and its answer."""
    messages = [
        *first["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Good. Now explain the next step."},
    ]
    return {**first, "messages": messages}


def next_turn(body: dict[str, Any], answer: str) -> dict[str, Any]:
    """Return the request that follows `answer`, with a numbered question."""
    number = len(body["messages"]) // 2 + 1
    messages = [
        *body["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": f"Good. Now explain step {number} of your plan."},
    ]
    return {**body, "messages": messages}


def _body(messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    return {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
