"""Keeps control tokens' names in a chat's texts apart from those that the chat template writes.

A message may contain `<|im_end|>`, as a pasted log or a web page does.  Before the template runs,
names in the request's texts are disguised: some of their characters are exchanged for private-use
ones, so that they keep their length.  In the rendered prompt every name that is left was written
by the template; the disguised ones are restored as text.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from backends.answer.reasoning import reasoning_tags
from backends.control_tokens import PromptPart, any_of, control_names, is_bracketed
from core.errors import BrokenModel, EngineFailed, RequestError, TemplateRefused
from core.types import ChatMessage, ChatPrompt, JsonValue, Tool, ToolCall

# Planes 15 and 16 are for private use; the last blocks of plane 16 are the least likely in text.
_BLOCK_CHARACTERS = 0x800
_BLOCK_STARTS = range(0x10F000, 0x100000, -_BLOCK_CHARACTERS)
_REPLACEMENT = "\ufffd"
_BRACKETS = "<>[]{}()/|｜"
# A template that puts brackets around a variable, as Qwen3-Coder does around a schema's keys.
_WRITES_BRACKETS = re.compile(r"[<\[|/](?:['\"]\s*[~+%|,)\]]|\{\{|%s)")
# Escapes with which JSON may write a name's characters; `\\n` and the like are none of them.
_JSON_ESCAPE = re.compile(r"\\[u/]")
_MAX_NESTED_JSON = 3
_PROBE = "needle"
_LIMITATION = (
    "The chat template changes the messages' text so that control tokens' names in it cannot be "
    "told from the template's own: they are read as control tokens."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControlNames:
    """What to disguise for one model.

    `names` are the control tokens' texts; `inner` those without brackets, for templates that put
    brackets around a variable; `tags` begin and end the reasoning; `strips_reasoning` tells that
    the template searches an assistant's content for the end of its reasoning.
    """

    names: frozenset[str]
    inner: frozenset[str] = frozenset()
    tags: tuple[str, str] | None = None
    strips_reasoning: bool = False

    @classmethod
    def of(
        cls, tokens: Mapping[str, bool], markers: Collection[bytes], template: str
    ) -> "ControlNames":
        """Choose among `tokens`: the texts that are one token anywhere, and which are special.

        Of the others, such as Gemma's `<table>`, only those count that the template or the
        parsers use, or that look like `<|this|>`.
        """
        used = {marker.decode("utf-8", "replace") for marker in markers}
        names = control_names(tokens, template, used)
        inner: frozenset[str] = frozenset()
        if _WRITES_BRACKETS.search(template):
            inner = frozenset(
                each for name in names for each in (name[1:-1], name.strip(_BRACKETS)) if each
            )
        tags = reasoning_tags(template)
        if tags is None:
            return cls(names, inner)
        searched = rf"['\"]{re.escape(tags.close)}['\"]\s*(?:in\b|\))"
        return cls(names, inner, (tags.open, tags.close), re.search(searched, template) is not None)


class Disguise:
    """The characters that disguise one request's names."""

    def __init__(self, pattern: re.Pattern[str], characters: Mapping[str, str]) -> None:
        """Use `characters`, the private-use one of each character with which a name begins."""
        self._pattern = pattern
        self._there = {ord(each): to for each, to in characters.items()}
        self._back = {ord(to): each for each, to in characters.items()}

    def name(self, text: str) -> str:
        """Return `text`, a name, so that no name begins in it any more."""
        return text.translate(self._there)

    def text(self, rendered: str) -> str:
        """Return rendered text with the names as they were."""
        if "\\u" in rendered:
            # The template wrote JSON in ASCII.
            for to, each in self._back.items():
                rendered = rendered.replace(json.dumps(chr(to))[1:-1], each)
        return rendered.translate(self._back)

    def parts(self, rendered: str) -> list[PromptPart]:
        """Return the control tokens that the template wrote, and the texts between them."""
        parts: list[PromptPart] = []
        start = 0
        for found in self._pattern.finditer(rendered):
            if found.start() > start:
                parts.append(PromptPart(self.text(rendered[start : found.start()])))
            parts.append(PromptPart(found.group(), is_control=True))
            start = found.end()
        if start < len(rendered):
            parts.append(PromptPart(self.text(rendered[start:])))
        return parts


class ControlText:
    """Finds and disguises one model's control tokens in chat prompts.  Thread-safe."""

    def __init__(self, names: ControlNames) -> None:
        self._names = names

    @property
    def names(self) -> frozenset[str]:
        """The names of all control tokens."""
        return self._names.names

    def disguise(self, prompt: ChatPrompt) -> tuple[ChatPrompt, Disguise | None]:
        """Return the prompt with its names disguised; None, and `prompt`, if it has none.

        A search of its texts, about 1 ns a character; only a prompt with names takes longer.
        Reasoning tags around the start of an assistant's content stay: the template reads them.
        """
        if not self._names.names:
            return prompt, None
        try:
            if not self._occur_in(prompt):
                return prompt, None
            seen: list[str] = []

            def collect(text: str) -> str:
                seen.append(text)
                return text

            _Texts(collect, collect).prompt(prompt)
            disguise, clash = self._choose("".join(seen))
            texts = _Texts(self._text(disguise, clash), self._key(disguise, clash))
            spared = replace(
                prompt, messages=tuple(self._message(each, texts) for each in prompt.messages)
            )
            disguised = texts.rest(spared)
            return (prompt, None) if disguised == prompt else (disguised, disguise)
        except RecursionError:
            # Too deeply nested to be rendered; the renderer refuses it.
            return prompt, None

    def render(
        self, prompt: ChatPrompt, render: Callable[[ChatPrompt], str]
    ) -> tuple[str, Disguise | None]:
        """Return the rendered prompt with its disguise.

        None for a prompt without names, and for one that the template takes only without it.
        Raises as `render`.
        """
        disguised, disguise = self.disguise(prompt)
        if disguise is None:
            return render(prompt), None
        try:
            return render(disguised), disguise
        except (TemplateRefused, BrokenModel):
            rendered = render(prompt)
        logger.warning("A chat template takes a message only with its control tokens.")
        return rendered, None

    def limitations(self, render: Callable[[ChatPrompt], str]) -> tuple[str, ...]:
        """Return a sentence for the user if the template hides which text is a message's."""
        if not self._names.names:
            return ()
        name = max(self._names.names, key=lambda each: (is_bracketed(each), len(each), each))
        prompt = ChatPrompt((ChatMessage("user", f"{_PROBE}{name}{_PROBE}"),))
        try:
            rendered, disguise = self.render(prompt, render)
            if disguise is None:
                return (_LIMITATION,)
            texts = [part.text for part in disguise.parts(rendered) if not part.is_control]
            # A template may drop the message, or change its text so that no name is left.
            lost = not any(name in text for text in texts)
            return (_LIMITATION,) if lost and f"{_PROBE}{name}" in render(prompt) else ()
        except (RequestError, BrokenModel, EngineFailed):
            return ()

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds names, of several that begin at the same place the longest."""
        return any_of(self._names.names)

    @cached_property
    def _json_pattern(self) -> re.Pattern[str]:
        written = {json.dumps(name, ensure_ascii=False)[1:-1] for name in self._names.names}
        quoted = {json.dumps(each, ensure_ascii=False) for each in self._names.inner}
        return any_of(self._names.names | written | quoted)

    def _occur_in(self, prompt: ChatPrompt) -> bool:
        search, inner = self.pattern.search, self._names.inner
        for message in prompt.messages:
            if search(message.content) or search(message.reasoning or ""):
                return True
            if message.name is not None and (search(message.name) or message.name in inner):
                return True
            if search(message.tool_call_id or ""):
                return True
            for call in message.tool_calls:
                if self._occur_in_arguments(call):
                    return True
                if search(call.name) or search(call.id) or call.name in inner:
                    return True
        rest: list[JsonValue] = [dict(prompt.template_kwargs)] if prompt.template_kwargs else []
        rest += map(dict, prompt.documents)
        for tool in prompt.tools:
            if search(tool.description):
                return True
            rest += [tool.name, dict(tool.parameters)]
        return bool(rest and self._json_pattern.search(json.dumps(rest, ensure_ascii=False)))

    def _occur_in_arguments(self, call: ToolCall) -> bool:
        if self._json_pattern.search(call.arguments):
            return True
        if not _JSON_ESCAPE.search(call.arguments):
            return False
        seen: list[str] = []
        _Texts(*2 * (_collector(seen),)).call(call)
        return any(self.pattern.search(text) or text in self._names.inner for text in seen)

    def _choose(self, text: str) -> tuple[Disguise, str]:
        """Return characters that `text` does not contain, and those that it does nevertheless."""
        first = sorted({each[0] for each in (*self._names.names, *self._names.inner)})
        present = set(text)
        characters: dict[str, str] = {}
        for start in _BLOCK_STARTS:
            block = map(chr, range(start, start + min(len(first), _BLOCK_CHARACTERS)))
            characters = dict(zip(first, block, strict=False))
            if present.isdisjoint(characters.values()):
                break
        clash = "".join(present.intersection(characters.values()))
        return Disguise(self.pattern, characters), clash

    def _text(self, disguise: Disguise, clash: str) -> Callable[[str], str]:
        lost = str.maketrans(dict.fromkeys(clash, _REPLACEMENT))

        def change(text: str) -> str:
            text = text.translate(lost) if clash else text
            return self.pattern.sub(lambda found: disguise.name(found.group()), text)

        return change

    def _key(self, disguise: Disguise, clash: str) -> Callable[[str], str]:
        change = self._text(disguise, clash)

        def change_key(text: str) -> str:
            return disguise.name(text) if text in self._names.inner else change(text)

        return change_key

    def _message(self, message: ChatMessage, texts: "_Texts") -> ChatMessage:
        content = message.content
        spared = self._reasoning_tags(message) if message.role == "assistant" else []
        pieces, start = [], 0
        for begin, end in spared:
            pieces += [texts.text(content[start:begin]), content[begin:end]]
            start = end
        pieces.append(texts.text(content[start:]))
        return replace(
            message,
            content="".join(pieces),
            name=None if message.name is None else texts.key(message.name),
            reasoning=None if message.reasoning is None else texts.text(message.reasoning),
            tool_call_id=None if message.tool_call_id is None else texts.text(message.tool_call_id),
            tool_calls=tuple(texts.call(call) for call in message.tool_calls),
        )

    def _reasoning_tags(self, message: ChatMessage) -> list[tuple[int, int]]:
        """Return where the content's own reasoning begins and ends, as (start, end) of tags."""
        if self._names.tags is None:
            return []
        opens, closes = self._names.tags
        content = message.content
        lead = len(content) - len(content.lstrip())
        is_open = content.startswith(opens, lead)
        found = [(lead, lead + len(opens))] if is_open else []
        if is_open or self._names.strips_reasoning:
            at = content.find(closes, found[-1][1] if found else 0)
            found += [(at, at + len(closes))] if at >= 0 else []
        return found


@dataclass(frozen=True, slots=True)
class _Texts:
    """Changes every text of a prompt with `text`, and names and keys with `key`."""

    text: Callable[[str], str]
    key: Callable[[str], str]

    def prompt(self, prompt: ChatPrompt) -> None:
        """Pass every text to the functions."""
        for message in prompt.messages:
            for each in (message.content, message.reasoning, message.name, message.tool_call_id):
                self.text(each or "")
            for call in message.tool_calls:
                self.call(call)
        self.rest(prompt)

    def rest(self, prompt: ChatPrompt) -> ChatPrompt:
        """Change tools, documents and template variables."""
        return replace(
            prompt,
            documents=tuple(
                {self.key(name): self.value(value) for name, value in each.items()}
                for each in prompt.documents
            ),
            tools=tuple(self._tool(each) for each in prompt.tools),
            template_kwargs={
                name: self.value(value) for name, value in prompt.template_kwargs.items()
            },
        )

    def _tool(self, tool: Tool) -> Tool:
        parameters = {self.key(key): self.value(each) for key, each in tool.parameters.items()}
        return Tool(self.key(tool.name), self.text(tool.description), parameters)

    def call(self, call: ToolCall) -> ToolCall:
        """Change a call; JSON's escapes in its arguments may write a name as well."""
        return ToolCall(self.text(call.id), self.key(call.name), self._json(call.arguments, 0))

    def _json(self, text: str, depth: int) -> str:
        try:
            value: JsonValue = json.loads(text)
        except ValueError:
            return self.text(text)
        if isinstance(value, str) and depth < _MAX_NESTED_JSON:
            changed: JsonValue = self._json(value, depth + 1)
        else:
            changed = self.value(value)
        return text if changed == value else json.dumps(changed, ensure_ascii=False)

    def value(self, value: JsonValue) -> JsonValue:
        """Change a JSON value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.key(key): self.value(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.value(each) for each in value]
        return value


def _collector(seen: list[str]) -> Callable[[str], str]:
    def collect(text: str) -> str:
        seen.append(text)
        return text

    return collect
