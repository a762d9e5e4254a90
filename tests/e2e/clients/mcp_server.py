"""An MCP server on stdio with one tool, which appends a line to a file.  Argument: the file.

Source: modelcontextprotocol.io, specification of 2025-06-18, stdio transport and tools.
"""

import json
import sys
from pathlib import Path
from typing import Any

TOOL = {
    "name": "add_note",
    "description": "Add a line to the notes.",
    "inputSchema": {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
        "additionalProperties": False,
    },
}


def answer(method: str, params: dict[str, Any], notes: Path) -> dict[str, Any] | None:
    """Return the result of a request, None for a method that this server does not have."""
    match method:
        case "initialize":
            return {
                "protocolVersion": params["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "notes", "version": "1"},
            }
        case "ping":
            return {}
        case "tools/list":
            return {"tools": [TOOL]}
        case "tools/call":
            with notes.open("a", encoding="utf-8") as file:
                file.write(params["arguments"]["text"] + "\n")
            return {"content": [{"type": "text", "text": "noted"}], "isError": False}
    return None


def main() -> None:
    """Answer requests, a line each, until stdin ends; notifications have no answer."""
    for line in sys.stdin:
        request = json.loads(line)
        if "id" not in request or "method" not in request:
            continue
        result = answer(request["method"], request.get("params") or {}, Path(sys.argv[1]))
        unknown = {"error": {"code": -32601, "message": "there is no such method"}}
        body = unknown if result is None else {"result": result}
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **body}), flush=True)


if __name__ == "__main__":
    main()
