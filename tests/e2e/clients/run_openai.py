"""OpenAI's client over chat completions: a tool task, its continuation, an object, embeddings.

Usage: BASE_URL MODEL work|resume|object|stop|embed STATE_FILE TASK; prints one line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel


class Report(BaseModel):
    """What the model answers with."""

    file: str
    words: int


class WriteFile(BaseModel):
    """Write a text file."""

    path: str
    text: str


TOOL = pydantic_function_tool(WriteFile, name="write_file")


def embed(client: OpenAI, model: str, texts: list[str]) -> dict[str, Any]:
    """Return the vectors of the texts."""
    found = client.embeddings.create(model=model, input=texts)
    vectors = [entry.embedding for entry in found.data]
    return {"vectors": vectors, "tokens": found.usage.prompt_tokens}


def main(base_url: str, model: str, phase: str, state: str, task: str) -> dict[str, Any]:
    """Run one phase; a resumed one continues from the messages in the file, not streamed."""
    client = OpenAI(base_url=base_url, api_key="any", max_retries=0)
    if phase == "embed":
        return embed(client, model, task.splitlines())
    messages = json.loads(Path(state).read_text()) if phase == "resume" else []
    messages.append({"role": "user", "content": task})
    options: dict[str, Any] = {"model": model, "messages": messages, "tools": [TOOL]}
    if phase == "object":
        options["response_format"] = Report
    answers: list[Any] = []
    while not answers or answers[-1].choices[0].message.tool_calls:
        if phase == "resume":
            answers.append(client.chat.completions.parse(**options))
        else:
            with client.chat.completions.stream(
                **options, stream_options={"include_usage": True}
            ) as stream:
                for event in stream:
                    if phase == "stop" and event.type == "content.delta":
                        return {"text": event.delta}
                answers.append(stream.get_final_completion())
        messages += turn(answers[-1].choices[0].message)
    Path(state).write_text(json.dumps(messages))
    message = answers[-1].choices[0].message
    return {
        "output": message.parsed.model_dump() if phase == "object" else message.content,
        "prompts": [answer.usage.prompt_tokens for answer in answers],
        "cached": [answer.usage.prompt_tokens_details.cached_tokens for answer in answers],
    }


def turn(message: Any) -> list[dict[str, Any]]:
    """Run the calls of an answer; return it and their results as messages."""
    said = {"role": "assistant", "content": message.content}
    if not message.tool_calls:
        return [said]
    results = []
    for call in message.tool_calls:
        wanted = call.function.parsed_arguments
        Path(wanted.path).write_text(wanted.text)
        results.append({"role": "tool", "tool_call_id": call.id, "content": "Written."})
    calls = [
        call.model_dump(exclude={"function": {"parsed_arguments"}}) for call in message.tool_calls
    ]
    return [{**said, "tool_calls": calls}, *results]


print(json.dumps(main(*sys.argv[1:])))
