"""What a chat model needs around its tokens: prompt, output parser and grammar."""

import re
from collections.abc import Mapping, Sequence

from backends.base import Constraint
from backends.constraint import call_constraint, json_constraint
from backends.messages import (
    folded,
    plain_text,
    template_message,
    template_tool,
    with_written_tools,
)
from backends.reasoning import THINK_CLOSE, THINK_OPEN, ReasoningParser
from backends.templates import TemplateRefused, TemplateRenderer
from backends.text import OutputParser
from backends.tool_calls import CALL_CLOSE, CALL_OPEN, BareCallParser, ToolCallParser
from core.errors import RequestError
from core.types import ChatMessage, ChatPrompt, JsonOutput, JsonValue, Tool

__all__ = ["MARKERS", "ChatFormat", "OutputParser"]

# Tags that the parsers look for; some vocabularies hide them as control tokens.
MARKERS = tuple(tag.encode() for tag in (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE))

_RESERVED = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "chat_template",
        "tokenize",
        "raise_exception",
        "strftime_now",
    ]
)
_TOOLS = re.compile(r"\btools\b")
_ITERATED_CONTENT = re.compile(r"\bin\s+\w+(?:\.content\b|\[\s*['\"]content['\"]\s*\])")
_NEEDLE = "needle"


class ChatFormat:
    """One model's chat conventions, read from its template; thread-safe.

    Without a template the prompt is plain text, `System: …`, a blank line, then `User: …` and
    `Assistant: …` lines, and `stop` ends the answer before the model speaks for the user.

    A template that does not know `tools` gets tools, calls and results written into the
    messages in the Hermes form (`messages.with_written_tools`).
    """

    def __init__(self, template: str | None, bos_token: str, eos_token: str) -> None:
        self._renderer = TemplateRenderer(template) if template else None
        self._bos_token = bos_token
        self._eos_token = eos_token
        text = template or ""
        self._knows_tools = _TOOLS.search(text) is not None
        self._is_reasoning = THINK_OPEN in text or THINK_CLOSE in text
        self._calls_bare = (
            self._knows_tools
            and CALL_OPEN not in text
            and ("<|python_tag|>" in text or '"parameters"' in text)
        )
        self._wants_parts: bool | None = None if _ITERATED_CONTENT.search(text) else False
        self.stop: tuple[str, ...] = () if template else ("\nUser:",)

    def render(self, prompt: ChatPrompt) -> str:
        """Return the prompt's text, up to where the answer begins.

        Blocks, rarely up to some seconds.  Messages that the template itself refuses are tried
        once more with system messages folded into the user's.  Raises RequestError with the
        template's own words, and BrokenModel as `TemplateRenderer.render` does.
        """
        reserved = sorted(_RESERVED & prompt.template_kwargs.keys())
        if reserved:
            raise RequestError(
                f"chat_template_kwargs cannot set {reserved[0]}.", param="chat_template_kwargs"
            )
        tools = _offered(prompt)
        messages = prompt.messages
        if not self._knows_tools:
            messages, tools = with_written_tools(messages, tools), ()
        if self._renderer is None:
            return plain_text(messages)
        try:
            return self._render(self._renderer, messages, tools, prompt.template_kwargs)
        except TemplateRefused as refusal:
            again = folded(messages)
            if again == messages:
                raise
            try:
                return self._render(self._renderer, again, tools, prompt.template_kwargs)
            except TemplateRefused:
                raise refusal from None

    def parser(self, prompt: ChatPrompt, rendered: str) -> OutputParser | None:
        """Return what splits the answer to `prompt`, or None where all of it is plain text.

        `rendered` tells whether the template opened the reasoning already.
        """
        names = frozenset(tool.name for tool in _callable(prompt))
        inner: OutputParser | None = None
        if names:
            calls = ToolCallParser(names, is_parallel=prompt.parallel_tool_calls)
            inner = BareCallParser(names, calls)
        is_open = _ends_with(rendered, THINK_OPEN)
        if is_open or self._is_reasoning:
            return ReasoningParser(inner, is_open=is_open)
        return inner

    def constraint(
        self, prompt: ChatPrompt, output: JsonOutput | None = None, rendered: str | None = None
    ) -> Constraint | None:
        """Return the grammar of the answer, or None where it is free.

        A forced tool choice allows exactly one call, bare for models that write it so and else
        within <tool_call>; `output` allows JSON alone.  Reasoning that the prompt has opened
        goes before either.  Renders `prompt` if `rendered` is not given.  Raises RequestError,
        also as `render` does.
        """
        is_forced = prompt.tool_choice not in ("none", "auto")
        if not is_forced and output is None:
            return None
        if is_forced and output is not None:
            raise RequestError(
                "response_format cannot be combined with a forced tool_choice.",
                param="response_format",
            )
        tools = _callable(prompt)
        rendered = self.render(prompt) if rendered is None else rendered
        reasoning = THINK_CLOSE if _ends_with(rendered, THINK_OPEN) else None
        if output is not None:
            return json_constraint(output.schema, reasoning=reasoning)
        opening, closing = ("", "") if self._calls_bare else (f"{CALL_OPEN}\n", f"\n{CALL_CLOSE}")
        return call_constraint(tools, opening, closing, reasoning=reasoning)

    def close(self) -> None:
        """Stop the template's process; twice is fine."""
        if self._renderer is not None:
            self._renderer.close()

    def _render(
        self,
        renderer: TemplateRenderer,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        extra: Mapping[str, JsonValue],
    ) -> str:
        if self._wants_parts is None:
            self._wants_parts = self._finds_parts(renderer)
        as_parts = self._wants_parts
        return renderer.render(
            {
                **extra,
                **self._constants(),
                "messages": [template_message(m, as_parts=as_parts) for m in messages],
                "tools": [template_tool(tool) for tool in tools] or None,
            }
        )

    def _constants(self) -> dict[str, JsonValue]:
        return {
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": self._bos_token,
            "eos_token": self._eos_token,
        }

    def _finds_parts(self, renderer: TemplateRenderer) -> bool:
        """Return whether the template loses content that is text and no list of parts."""
        message: JsonValue = {"role": "user", "content": _NEEDLE}
        try:
            text = renderer.render({**self._constants(), "messages": [message], "tools": None})
        except TemplateRefused:
            return False
        return _NEEDLE not in text


def _offered(prompt: ChatPrompt) -> tuple[Tool, ...]:
    return () if prompt.tool_choice == "none" else prompt.tools


def _callable(prompt: ChatPrompt) -> tuple[Tool, ...]:
    """Return the tools that the answer may call.  Raises RequestError for a choice of none."""
    if prompt.tool_choice == "required" and not prompt.tools:
        raise RequestError("tool_choice is required, but there are no tools.", param="tool_choice")
    if not isinstance(prompt.tool_choice, tuple):
        return _offered(prompt)
    name = prompt.tool_choice[1]
    chosen = tuple(tool for tool in prompt.tools if tool.name == name)
    if not chosen:
        raise RequestError(f"tool_choice names {name!r}, which is no tool.", param="tool_choice")
    return chosen[:1]


def _ends_with(rendered: str, tag: str) -> bool:
    return rendered.rstrip().endswith(tag)
