"""What a chat model needs around its tokens: prompt, output parser and grammar."""

import re
from collections.abc import Mapping, Sequence

from backends.answer.mask import ReasoningPlan
from backends.answer.parser import OutputParser
from backends.answer.reasoning import HARMONY, ReasoningParser, effort_variables, reasoning_tags
from backends.grammar.compiler import output_constraint
from backends.grammar.constraint import Constraint, OpeningCall
from backends.prompt.messages import (
    folded,
    plain_text,
    template_message,
    template_tool,
    with_written_tools,
)
from backends.prompt.templates import TemplateRefused, TemplateRenderer
from backends.tool_calls.bare_call_grammar import opening_call
from backends.tool_calls.families import DEFAULT, FAMILIES, check_family, family_of
from backends.tool_calls.grammar import call_constraint, triggered_calls
from backends.tool_calls.harmony import FINAL
from core.errors import RequestError, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, JsonValue, Output, Tool

__all__ = ["ChatFormat", "OutputParser"]

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

    def __init__(
        self,
        template: str | None,
        bos_token: str,
        eos_token: str,
        *,
        tool_parser: str | None = None,
    ) -> None:
        """Read the template; `tool_parser` names the family of tool calls in its place.

        Raises RequestError for a family that nobody knows.
        """
        self._renderer = TemplateRenderer(template) if template else None
        self._bos_token = bos_token
        self._eos_token = eos_token
        text = template or ""
        self._knows_tools = _TOOLS.search(text) is not None
        self._template = text
        check_family(tool_parser)
        own = family_of(text) if self._knows_tools else DEFAULT
        self.family = own if tool_parser is None else FAMILIES[tool_parser]
        self._tags = HARMONY if self.family.name == "harmony" else reasoning_tags(text)
        # These models write the first call without a marker.
        self._calls_bare = self.family.name == "llama3_json" or (
            self.family.is_pythonic and self.family.tool_call_start not in text
        )
        self._wants_parts: bool | None = None if _ITERATED_CONTENT.search(text) else False
        self.stop: tuple[str, ...] = () if template else ("\nUser:",)

    @property
    def markers(self) -> tuple[bytes, ...]:
        """The texts that the parsers look for; some vocabularies hide them as control tokens."""
        reasoning = (self._tags.open, self._tags.close) if self._tags is not None else ()
        return tuple(text.encode() for text in (*reasoning, *self.family.markers))

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
        extra = {
            **effort_variables(self._template, prompt.reasoning_effort),
            **prompt.template_kwargs,
        }
        tools = _offered(prompt)
        messages = prompt.messages
        if not self._knows_tools:
            messages, tools = with_written_tools(messages, tools), ()
        if self._renderer is None:
            return plain_text(messages)
        try:
            return self._render(self._renderer, messages, tools, extra)
        except TemplateRefused as refusal:
            again = folded(messages)
            if again == messages:
                raise
            try:
                return self._render(self._renderer, again, tools, extra)
            except TemplateRefused:
                raise refusal from None

    def parser(self, prompt: ChatPrompt, rendered: str) -> OutputParser | None:
        """Return what splits the answer to `prompt`, or None where all of it is plain text.

        `rendered` tells whether the template opened the reasoning already.
        """
        tools = _callable(prompt)
        inner: OutputParser | None = None
        if tools or self.family.main is not None:
            inner = self.family.parser(tools, is_parallel=prompt.parallel_tool_calls is not False)
        if self._tags is None or self.family.main is not None:
            return inner
        return ReasoningParser(inner, is_open=self._is_open(rendered), tags=self._tags)

    def constraint(
        self, prompt: ChatPrompt, output: Output | None = None, rendered: str | None = None
    ) -> Constraint | None:
        """Return the grammar of the answer, or None where it is free.

        A forced tool choice allows exactly one call in the family's form, or several where any
        function must be called and parallel calls were asked for; `output` allows what was asked
        for alone.  Reasoning that the prompt has opened goes before either.  Renders
        `prompt` if `rendered` is not given.  Raises RequestError, also as `render` does.
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
        is_open = self._is_open(rendered)
        reasoning = self._tags.close if is_open and self._tags is not None else None
        if output is not None:
            opening = FINAL if self.family.name == "harmony" else ()
            return output_constraint(output, opening=opening, reasoning=reasoning)
        return call_constraint(
            self.family,
            tools,
            is_bare=self._calls_bare,
            is_many=prompt.tool_choice == "required" and prompt.parallel_tool_calls is True,
            reasoning=reasoning,
        )

    def triggered(self, prompt: ChatPrompt) -> Mapping[str, Constraint]:
        """Return what must follow the texts that begin a call, where calling is free."""
        if prompt.tool_choice != "auto" or not prompt.tools:
            return {}
        return triggered_calls(self.family, prompt.tools)

    def opening(self, prompt: ChatPrompt) -> OpeningCall | None:
        """Return what must follow where the answer begins as a call, if calling is free."""
        if prompt.tool_choice != "auto":
            return None
        return opening_call(self.family, prompt.tools)

    def reasoning(self, prompt: ChatPrompt, rendered: str) -> ReasoningPlan | None:
        """Return how the answer's reasoning is told apart, if the model reasons.

        Raises UnsupportedParameter for a bound where it does not.
        """
        if self._tags is None:
            if prompt.reasoning_tokens is not None:
                raise UnsupportedParameter(
                    "This model's chat template marks no reasoning that could be bounded.",
                    param="reasoning.max_tokens",
                )
            return None
        return ReasoningPlan(self._tags, self._is_open(rendered), prompt.reasoning_tokens)

    def _is_open(self, rendered: str) -> bool:
        return self._tags is not None and rendered.rstrip().endswith(self._tags.open)

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
