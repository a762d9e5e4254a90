"""Tool-call formats by model family, and detection of the family from a chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backends.answer.parser import Piece
from backends.tool_calls import harmony
from backends.tool_calls.bare_calls import answer_with_calls
from backends.tool_calls.collector import CallCollector
from backends.tool_calls.json_forms import deepseek, kimi, mistral, python_tag, tagged_json
from backends.tool_calls.literal_forms import gemma, pythonic
from backends.tool_calls.parser import CallParser, Main, Section
from backends.tool_calls.schemas import argument_checker
from backends.tool_calls.tagged_forms import GLM, LONGCAT, MINIMAX, QWEN_CODER, TagReader
from core.errors import RequestError
from core.types import Tool


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """One format of tool calls: its markers and its parser.

    `section` parses the text after `tool_call_start` or one of `starts`; `main`, if given, parses
    the whole answer.  A template that contains all of one group of `template_markers` belongs to
    the family.  `inner` are further markers that a vocabulary may have as control tokens.
    `is_start_ambiguous`: the start marker may also occur in ordinary text.
    """

    name: str
    tool_call_start: str
    tool_call_end: str
    section: Section
    template_markers: tuple[tuple[str, ...], ...] = ()
    starts: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    is_pythonic: bool = False
    is_start_ambiguous: bool = False
    main: Main | None = field(default=None, compare=False)

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers that the parser searches for in the text."""
        markers = (self.tool_call_start, *self.starts, self.tool_call_end, *self.inner)
        return tuple(marker for marker in markers if marker)

    def parser(self, tools: Sequence[Tool], *, is_parallel: bool = True) -> CallParser:
        """Return a parser of one answer in which `tools` may be called."""
        collector = CallCollector(tools, is_parallel=is_parallel, check=argument_checker(tools))
        if self.main is not None:
            return CallParser(self.main, collector)
        starts = (self.tool_call_start, *self.starts)
        main = answer_with_calls(starts, self.section, is_pythonic=self.is_pythonic)
        return CallParser(main, collector)

    def parse_tool_call(self, text: str, tools: Sequence[Tool]) -> list[Piece]:
        """Parse the complete text of a call, given without its outer markers, into pieces."""
        parser = self.parser(tools)
        pieces = parser.push(f"{self.tool_call_start}{text}{self.tool_call_end}")
        return [*pieces, *parser.flush()]


_FAMILIES = (
    ToolFamily(
        "harmony", harmony.CHANNEL, harmony.CALL, tagged_json(),
        template_markers=((harmony.CHANNEL, harmony.MESSAGE, "analysis"),),
        inner=harmony.MARKERS, main=harmony.read_harmony,
    ),
    ToolFamily(
        "kimi_k2", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", kimi,
        template_markers=(("<|tool_calls_section_begin|>",),),
        inner=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    ToolFamily(
        "deepseek_v3", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", deepseek,
        template_markers=(("<｜tool▁calls▁begin｜>", "```json"),),
        inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    ToolFamily(
        "deepseek_v31", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", deepseek,
        template_markers=(("<｜tool▁calls▁begin｜>",),),
        inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    ToolFamily(
        "minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", TagReader(MINIMAX),
        template_markers=(("<minimax:tool_call>",), ("minimax:tool_call", "<invoke")),
    ),
    ToolFamily(
        "qwen3_coder", "<tool_call>", "</tool_call>", TagReader(QWEN_CODER),
        template_markers=(("<function=", "<parameter="),),
        starts=("<function=",),
    ),
    ToolFamily(
        "glm4", "<tool_call>", "</tool_call>", TagReader(GLM), template_markers=(("<arg_key>",),)
    ),
    ToolFamily(
        "longcat", "<longcat_tool_call>", "</longcat_tool_call>", TagReader(LONGCAT),
        template_markers=(("<longcat_tool_call>",),),
    ),
    ToolFamily(
        "mistral", "[TOOL_CALLS]", "", mistral,
        template_markers=(("[TOOL_CALLS]", "[ARGS]"),), inner=("[ARGS]", "[CALL_ID]"),
    ),
    ToolFamily("mistral_json", "[TOOL_CALLS]", "", mistral, template_markers=(("[TOOL_CALLS]",),)),
    ToolFamily(
        "function_gemma", "<start_function_call>", "<end_function_call>",
        gemma("<escape>", "<end_function_call>"),
        template_markers=(("<start_function_call>",),), inner=("<escape>",),
    ),
    ToolFamily(
        "gemma4", "<|tool_call>", "<tool_call|>", gemma('<|"|>', "<tool_call|>"),
        template_markers=(("<|tool_call>",),), inner=('<|"|>',),
    ),
    ToolFamily(
        "cohere", "<|START_ACTION|>", "<|END_ACTION|>", tagged_json("<|END_ACTION|>"),
        template_markers=(("<|START_ACTION|>",),),
    ),
    ToolFamily(
        "command_r", "Action: ```json", "```", tagged_json("```"),
        template_markers=(("Action: ```json",),),
    ),
    ToolFamily(
        "phi4_mini", "<|tool_call|>", "<|/tool_call|>", tagged_json("<|/tool_call|>"),
        template_markers=(("<|/tool_call|>",),),
    ),
    ToolFamily("phi4", "functools", "", tagged_json(), (("functools[",),), is_start_ambiguous=True),
    ToolFamily(
        "granite", "<|tool_call|>", "", tagged_json(), template_markers=(("<|tool_call|>",),)
    ),
    ToolFamily(
        "hermes", "<tool_call>", "</tool_call>", tagged_json("</tool_call>"),
        template_markers=(("<tool_call>",),),
    ),
    ToolFamily(
        "lfm2", "<|tool_call_start|>", "<|tool_call_end|>", pythonic,
        template_markers=(("<|tool_call_start|>",), ("<|tool_list_start|>",)), is_pythonic=True,
    ),
    ToolFamily(
        "pythonic", "<|python_start|>", "<|python_end|>", pythonic,
        template_markers=(("<|python_start|>",), ("func_name1(params_name1",)), is_pythonic=True,
    ),
    ToolFamily(
        "llama3_json", "<|python_tag|>", "", python_tag,
        template_markers=(("<|python_tag|>",), ('"parameters"',)),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, ToolFamily] = {family.name: family for family in _FAMILIES}
DEFAULT = FAMILIES["hermes"]


def check_family(name: str | None) -> None:
    """Raise RequestError unless `name` is a family's name or None."""
    if name is not None and name not in FAMILIES:
        raise RequestError(
            f"There is no tool parser {name[:100]!r}. Use one of: {', '.join(FAMILIES)}.",
            param="tool_parser",
        )


def family_of(template: str) -> ToolFamily:
    """Return the tool-call family of a chat template; Hermes if none is detected."""
    for family in _FAMILIES:
        if any(all(needle in template for needle in group) for group in family.template_markers):
            return family
    return DEFAULT
