"""Renders one chat template on request; runs alone in a process that its parent may kill.

Speaks frames over stdin and stdout: a 4-byte big-endian length, then ASCII JSON.  The first
frame in holds the template and the limits, every later one the variables of one render; each is
answered by one frame: `{"text": …}` or `{"error": kind, "message": …}`, kind being "raised" (the
template's own refusal), "broken", "large" or "memory".  The end of stdin ends the process.
"""

import json
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.child import limit_process

LENGTH = struct.Struct(">I")


class TemplateRefusal(TemplateError):
    """What `raise_exception` in a template raises."""


class TooLarge(Exception):
    """The rendered text is over the limit."""


class GenerationTag(Extension):
    """Passes `{% generation %}…{% endgeneration %}` through; training alone has a use for it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the tag's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: object) -> NoReturn:
    """Serve the template as `raise_exception`."""
    raise TemplateRefusal(str(message))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serve the template as filter `tojson`, which unlike Jinja's escapes nothing for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(pattern: str) -> str:
    """Serve the template as `strftime_now`: the local time in its pattern."""
    return datetime.now().strftime(pattern)


def compile_template(source: str) -> Template:
    """Return the template, in the environment that Hugging Face's apply_chat_template gives."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def render(template: Template, variables: dict[str, Any], limit_bytes: int) -> str:
    """Return the rendered text; raises TooLarge as soon as it passes the limit."""
    pieces: list[str] = []
    length = 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > limit_bytes:
            raise TooLarge
        pieces.append(piece)
    text = "".join(pieces)
    if len(text.encode("utf-8", "surrogatepass")) > limit_bytes:
        raise TooLarge
    return text


def answer_frame(work: Callable[[], str]) -> dict[str, str]:
    """Return the frame that tells how `work` went."""
    try:
        return {"text": work()}
    except TemplateRefusal as error:
        return {"error": "raised", "message": (error.message or "")[:2000]}
    except TooLarge:
        return {"error": "large", "message": ""}
    except MemoryError:
        return {"error": "memory", "message": "it needs too much memory"}
    except Exception as error:
        return {"error": "broken", "message": f"{type(error).__name__}: {error}"[:2000]}


def read_frame() -> bytes:
    """Return the next frame; ends the process at the end of stdin."""
    head = sys.stdin.buffer.read(LENGTH.size)
    if len(head) < LENGTH.size:
        sys.exit(0)
    (length,) = LENGTH.unpack(head)
    return sys.stdin.buffer.read(length)


def write_frame(answer: dict[str, str]) -> None:
    """Send one answer; blocks while the pipe is full."""
    data = json.dumps(answer).encode("ascii")
    sys.stdout.buffer.write(LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def main() -> None:
    """Compile the template, then answer renders until stdin ends."""
    write_frame({"text": "ready"})
    start = json.loads(read_frame())
    limit_process(address_space_bytes=start["memory_bytes"], file_bytes=0)
    compiled: list[Template] = []

    def compile_once() -> str:
        compiled.append(compile_template(start["template"]))
        return ""

    work: Callable[[], str] = compile_once
    while True:
        # The alarm's default action ends even a C loop, should the parent be gone by then.
        signal.alarm(start["self_limit_s"])
        answer = answer_frame(work)
        write_frame(answer)
        signal.alarm(0)
        if answer.get("error") == "memory" or not compiled:
            return
        frame = read_frame()

        def render_once(frame: bytes = frame) -> str:
            return render(compiled[0], json.loads(frame), start["output_bytes"])

        work = render_once
