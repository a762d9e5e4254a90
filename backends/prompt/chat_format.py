"""Chat conventions of a model: prompt rendering, output parser and grammar from its template."""

import re
from collections.abc import Mapping, Sequence

from backends.answer.mask import ReasoningPlan
from backends.answer.parser import OutputParser
from backends.answer.reasoning import HARMONY, ReasoningParser, effort_variables, reasoning_tags
from backends.grammar.compiler import output_constraint
from backends.grammar.constraint import BareCallGrammar, Constraint
from backends.prompt.adaptation import render_adapted
from backends.prompt.continuation import (
    begun_output,
    begun_text,
    continued,
    is_in_call,
    is_reasoning,
    with_mark,
)
from backends.prompt.messages import (
    plain_text,
    template_message,
    template_tool,
    with_tools_in_text,
)
from backends.prompt.named_templates import reads_documents, reads_tools
from backends.prompt.settings_check import check_variables
from backends.prompt.templates import TemplateFailed, TemplateRenderer
from backends.tool_calls.bare_call_grammar import bare_call_grammar
from backends.tool_calls.families import DEFAULT, FAMILIES, check_family, family_of
from backends.tool_calls.grammar import call_constraint, output_or_calls, triggered_calls
from backends.tool_calls.harmony import FINAL
from core.errors import RequestError, TemplateRefused, UnsupportedParameter
from core.types import ChatMessage, ChatPrompt, JsonValue, Output, Tool

__all__ = ["ChatFormat", "OutputParser"]

_CONTENT_LOOP = re.compile(r"\bin\s+\w+(?:\.content\b|\[\s*['\"]content['\"]\s*\])")
_PROBE = "needle"


class ChatFormat:
    """One model's chat conventions, read from its template; thread-safe.

    Without a template the prompt is plain text, `System: …`, a blank line, then `User: …` and
    `Assistant: …` lines, and `stop` ends the answer before the model continues as the user.

    For a template that does not support `tools`, tools, calls and results are written into the
    messages in the Hermes form (`messages.with_tools_in_text`).

    A model may have other templates for conversations with tools and with documents; their
    conventions are other ChatFormats, of which `for_prompt` chooses one.  All other methods apply
    this one's template.
    """

    _no_tools: JsonValue = None

    def __init__(
        self,
        template: str | None,
        bos_token: str,
        eos_token: str,
        *,
        tool_parser: str | None = None,
        tool_template: str | None = None,
        rag_template: str | None = None,
    ) -> None:
        """Read the templates; `tool_parser` overrides the tool-call family that they suggest.

        Raises RequestError for an unknown family.
        """
        self._for_tools = (
            _ToolChatFormat(tool_template, bos_token, eos_token, tool_parser=tool_parser)
            if tool_template
            else None
        )
        self._for_documents = (
            ChatFormat(rag_template, bos_token, eos_token, tool_parser=tool_parser)
            if rag_template
            else None
        )
        self._renderer = TemplateRenderer(template) if template else None
        self._bos_token = bos_token
        self._eos_token = eos_token
        text = template or ""
        self._supports_tools = reads_tools(text)
        self._supports_documents = reads_documents(text)
        self.template = text
        check_family(tool_parser)
        own = family_of(text) if self._supports_tools else DEFAULT
        self.family = own if tool_parser is None else FAMILIES[tool_parser]
        self._tags = HARMONY if self.family.name == "harmony" else reasoning_tags(text)
        # These models write the first call without a marker.
        self._starts_calls_bare = self.family.name == "llama3_json" or (
            self.family.is_pythonic and self.family.tool_call_start not in text
        )
        self._uses_content_parts: bool | None = None if _CONTENT_LOOP.search(text) else False
        self.stop: tuple[str, ...] = () if template else ("\nUser:",)

    @property
    def formats(self) -> tuple["ChatFormat", ...]:
        """This format, and those of the templates for tools and for documents, if any."""
        others = (self._for_tools, self._for_documents)
        return (self, *(each for each in others if each is not None))

    def for_prompt(self, prompt: ChatPrompt) -> "ChatFormat":
        """Return the format to render `prompt` with, and to parse its answer.

        It is that of the template for tools, if there is one, when tools are offered or the
        conversation has calls or results; with documents, one that reads them, and tools if
        possible.  Raises UnsupportedParameter for documents that no template reads.
        """
        uses_tools = bool(_visible_tools(prompt)) or any(
            message.tool_calls or message.role == "tool" for message in prompt.messages
        )
        if not prompt.documents:
            return self._for_tools if self._for_tools is not None and uses_tools else self
        wanted = (self._for_documents, self, self._for_tools)
        able = [each for each in wanted if each is not None and each.reads(prompt)]
        if not able:
            raise UnsupportedParameter(
                "documents: this model's chat templates read none; put their text into a message, "
                "or choose a model that is made for documents.",
                param="documents",
            )
        return next((each for each in able if uses_tools and each._supports_tools), able[0])

    def reads(self, prompt: ChatPrompt) -> bool:
        """Whether the template reads the documents of `prompt`, if it has any."""
        return self._supports_documents or not prompt.documents

    @property
    def markers(self) -> tuple[bytes, ...]:
        """The texts that the parsers search for; some vocabularies have them as control tokens."""
        reasoning = (self._tags.open, self._tags.close) if self._tags is not None else ()
        return tuple(text.encode() for text in (*reasoning, *self.family.markers))

    def render(self, prompt: ChatPrompt) -> str:
        """Return the prompt's text up to the start of the answer.

        Blocks, rarely up to some seconds.  A conversation that the template does not accept is
        adapted to it, see `render_adapted`.  Raises TemplateRefused with the template's message,
        and RequestError and BrokenModel as `TemplateRenderer.render` does.
        """
        check_variables(prompt.template_kwargs, "chat_template_kwargs")
        extra: dict[str, JsonValue] = {
            **effort_variables(self.template, prompt.reasoning_effort),
            **prompt.template_kwargs,
        }
        if prompt.documents:
            extra["documents"] = [dict(each) for each in prompt.documents]
        if not prompt.continues_answer:
            return self._rendered(prompt, prompt.messages, extra)
        if self.family.main is not None:
            raise UnsupportedParameter(
                "messages: this model's format of answers does not allow to continue a begun one; "
                "end the conversation with a user's message.",
                param="messages",
            )
        tools = _callable_tools(prompt)
        starts = (self.family.tool_call_start, *self.family.starts)
        begun = self.begun_output(prompt)
        if tools and is_in_call(begun, starts, self.family.tool_call_end, tools):
            raise UnsupportedParameter(
                "messages: the begun answer ends within a tool call, which cannot be continued; "
                "end it before the call, or send tool_choice none.",
                param="messages",
            )
        extra["add_generation_prompt"] = False
        text = self._rendered(prompt, with_mark(prompt.messages), extra)
        return continued(text, begun_text(prompt, self._tags))

    def begun_output(self, prompt: ChatPrompt) -> str:
        """Return the part of the begun answer that the format of `constraint` covers."""
        return begun_output(begun_text(prompt, self._tags), self._tags)

    def _rendered(
        self, prompt: ChatPrompt, messages: tuple[ChatMessage, ...], extra: dict[str, JsonValue]
    ) -> str:
        tools = _visible_tools(prompt)
        if not self._supports_tools:
            messages, tools = with_tools_in_text(messages, tools), ()
        if self._renderer is None:
            return plain_text(messages)
        renderer = self._renderer
        return render_adapted(
            lambda one: self._render(renderer, one.messages, one.tools, extra), messages, tools
        )

    def parser(self, prompt: ChatPrompt, rendered: str) -> OutputParser | None:
        """Return the parser of the answer to `prompt`, or None if all of it is plain text.

        `rendered` shows whether the template already opened the reasoning.
        """
        tools = _callable_tools(prompt)
        inner: OutputParser | None = None
        if tools or self.family.main is not None:
            inner = self.family.parser(tools, is_parallel=prompt.parallel_tool_calls is not False)
        if self._tags is None or self.family.main is not None:
            return inner
        return ReasoningParser(inner, is_open=self._is_open(prompt, rendered), tags=self._tags)

    def constraint(
        self, prompt: ChatPrompt, output: Output | None = None, rendered: str | None = None
    ) -> Constraint | None:
        """Return the grammar of the answer, or None if it is unconstrained.

        A forced tool choice allows exactly one call in the family's form, or several if
        tool_choice is required and parallel calls were requested; `output`, which then does not
        apply, allows only that format or, if there are tools, a call.  Reasoning that the prompt
        has opened precedes either.  Renders `prompt` if `rendered` is not given.  Raises
        RequestError, also as `render` does.
        """
        is_forced = prompt.tool_choice not in ("none", "auto")
        if not is_forced and output is None:
            return None
        tools = _callable_tools(prompt)
        rendered = self.render(prompt) if rendered is None else rendered
        is_open = self._is_open(prompt, rendered)
        reasoning = self._tags.close if is_open and self._tags is not None else None
        if output is not None and not is_forced:
            if tools:
                return output_or_calls(
                    self.family,
                    tools,
                    output,
                    is_bare=self._starts_calls_bare,
                    allows_several=prompt.parallel_tool_calls is not False,
                    reasoning=reasoning,
                )
            lead = FINAL if self.family.name == "harmony" else ()
            return output_constraint(output, lead=lead, reasoning=reasoning)
        return call_constraint(
            self.family,
            tools,
            is_bare=self._starts_calls_bare,
            allows_several=prompt.tool_choice == "required" and prompt.parallel_tool_calls is True,
            reasoning=reasoning,
        )

    def triggered(self, prompt: ChatPrompt) -> Mapping[str, Constraint]:
        """Return the grammars that apply after the texts that start a call, with `auto` tools."""
        if prompt.tool_choice != "auto" or not prompt.tools:
            return {}
        return triggered_calls(self.family, prompt.tools)

    def bare_call(self, prompt: ChatPrompt) -> BareCallGrammar | None:
        """Return the grammar of an answer that starts as an unmarked call, with `auto` tools."""
        if prompt.tool_choice != "auto" or self.begun_output(prompt):
            return None
        return bare_call_grammar(self.family, prompt.tools)

    def reasoning(self, prompt: ChatPrompt, rendered: str) -> ReasoningPlan | None:
        """Return how the answer's reasoning is delimited, if the model reasons.

        Raises UnsupportedParameter for a reasoning limit if it does not.
        """
        if self._tags is None:
            if prompt.reasoning_tokens is not None:
                raise UnsupportedParameter(
                    "This model's chat template has no reasoning to limit; leave the field out.",
                    param="reasoning.max_tokens",
                )
            return None
        return ReasoningPlan(self._tags, self._is_open(prompt, rendered), prompt.reasoning_tokens)

    def _is_open(self, prompt: ChatPrompt, rendered: str) -> bool:
        if self._tags is None:
            return False
        return is_reasoning(rendered, begun_text(prompt, self._tags), self._tags)

    def close(self) -> None:
        """Stop the templates' processes; idempotent."""
        if self._renderer is not None:
            self._renderer.close()
        for other in self.formats[1:]:
            other.close()

    def _render(
        self,
        renderer: TemplateRenderer,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        extra: Mapping[str, JsonValue],
    ) -> str:
        if self._uses_content_parts is None:
            self._uses_content_parts = self._needs_content_parts(renderer)
        as_parts = self._uses_content_parts
        return renderer.render(
            {
                **self._constants(),
                **extra,
                "messages": [template_message(m, as_parts=as_parts) for m in messages],
                "tools": [template_tool(tool) for tool in tools] or self._no_tools,
            }
        )

    def _constants(self) -> dict[str, JsonValue]:
        return {
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": self._bos_token,
            "eos_token": self._eos_token,
        }

    def _needs_content_parts(self, renderer: TemplateRenderer) -> bool:
        """Return whether the template drops content that is a string instead of a list of parts."""
        message: JsonValue = {"role": "user", "content": _PROBE}
        try:
            text = renderer.render(
                {**self._constants(), "messages": [message], "tools": self._no_tools}
            )
        except (TemplateRefused, TemplateFailed):
            return False
        return _PROBE not in text


class _ToolChatFormat(ChatFormat):
    """The conventions of a template named `tool_use`, which may expect a list of tools.

    The one of the Hermes models fails without.
    """

    _no_tools: JsonValue = []  # noqa: RUF012


def _visible_tools(prompt: ChatPrompt) -> tuple[Tool, ...]:
    return () if prompt.tool_choice == "none" else prompt.tools


def _callable_tools(prompt: ChatPrompt) -> tuple[Tool, ...]:
    """Return the tools that the answer may call.  Raises RequestError if the choice is invalid."""
    if prompt.tool_choice == "required" and not prompt.tools:
        raise RequestError(
            "tool_choice is required, but the request has no tools; add tools or send auto.",
            param="tool_choice",
        )
    if not isinstance(prompt.tool_choice, tuple):
        return _visible_tools(prompt)
    name = prompt.tool_choice[1]
    chosen = tuple(tool for tool in prompt.tools if tool.name == name)
    if not chosen:
        raise RequestError(
            f"tool_choice names {name[:100]!r}, which is not one of the tools; add it to tools.",
            param="tool_choice",
        )
    return chosen[:1]
