"""Anthropic's tool runner: a tool task, its continuation, an object, and a stop.

Usage: BASE_URL MODEL work|resume|object|stop STATE_FILE TASK; prints one line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from anthropic import Anthropic, beta_tool, omit
from pydantic import BaseModel


class Report(BaseModel):
    """What the model answers with."""

    file: str
    words: int


@beta_tool
def write_file(path: str, text: str) -> str:
    """Write a text file.

    Args:
        path: The file's path.
        text: All of its text.
    """
    Path(path).write_text(text)
    return f"{len(text)} characters written to {path}"


def main(base_url: str, model: str, phase: str, state: str, task: str) -> dict[str, Any]:
    """Run one phase; a resumed one continues from the messages in the file."""
    client = Anthropic(base_url=base_url.removesuffix("/v1"), api_key="any")
    messages = json.loads(Path(state).read_text()) if phase == "resume" else []
    messages.append({"role": "user", "content": task})
    runner = client.beta.messages.tool_runner(
        model=model, max_tokens=32_000, messages=list(messages), tools=[write_file],
        system="You write files.", stream=True,
        output_format=Report if phase == "object" else omit,
    )  # fmt: skip
    usages = []
    text = ""
    for stream in runner:
        for event in stream:
            if phase == "stop" and event.type == "content_block_delta":
                stream.close()
                return {"event": event.type}
        message: Any = stream.get_final_message()
        usages.append(message.usage)
        messages.append({"role": "assistant", "content": message.to_dict()["content"]})
        results = runner.generate_tool_call_response()
        if results is not None:
            messages.append(results)
        text = "".join(block.text for block in message.content if block.type == "text")
    Path(state).write_text(json.dumps(messages))
    return {
        "output": message.parsed_output.model_dump() if phase == "object" else text,
        "prompts": [usage.input_tokens + (usage.cache_read_input_tokens or 0) for usage in usages],
        "cached": [usage.cache_read_input_tokens for usage in usages],
    }


print(json.dumps(main(*sys.argv[1:])))
