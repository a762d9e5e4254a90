"""Child process that renders one chat template on request; its parent may kill it at any time.

Protocol: frames over stdin and stdout, each a 4-byte big-endian length and ASCII JSON.  The first
frame has the template and the limits, each later one the variables of one render.  Each gets one
frame in reply: `{"text": …}` or `{"error": kind, "message": …}`, where kind is "raised" (the
template called `raise_exception`), "broken", "large" or "memory".  The process exits at the end of
stdin.
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
    """Raised by `raise_exception` in a template."""


class TooLarge(Exception):
    """The rendered text is over the limit."""


class GenerationTag(Extension):
    """Ignores the tags `{% generation %}…{% endgeneration %}`, which only training uses."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: object) -> NoReturn:
    """The template function `raise_exception`."""
    raise TemplateRefusal(str(message))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The template filter `tojson`, which unlike Jinja's does not escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(pattern: str) -> str:
    """The template function `strftime_now`: the local time in the given format."""
    return datetime.now().strftime(pattern)


def compile_template(source: str) -> Template:
    """Compile the template in the environment of Hugging Face's apply_chat_template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def render(template: Template, variables: dict[str, Any], limit_bytes: int) -> str:
    """Return the rendered text; raises TooLarge as soon as it exceeds the limit."""
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
    """Run `work` and return the reply: its text, or its error."""
    try:
        return {"text": work()}
    except TemplateRefusal as error:
        return {"error": "raised", "message": (error.message or "")[:2000]}
    except TooLarge:
        return {"error": "large", "message": ""}
    except MemoryError:
        return {"error": "memory", "message": "it needs more memory than the limit"}
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
        # If the parent has died, the alarm's default action ends the process, even in a C loop.
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
