"""The model families' forms of tool calls, and which one a model's chat template asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backends.answer.parser import Piece
from backends.tool_calls import harmony
from backends.tool_calls.bare_calls import answer_with_calls
from backends.tool_calls.collector import CallCollector
from backends.tool_calls.json_forms import deepseek, kimi, mistral, python_tag, tagged_json
from backends.tool_calls.literal_forms import gemma, pythonic
from backends.tool_calls.parser import CallParser, Main, Section
from backends.tool_calls.schemas import fitting
from backends.tool_calls.tagged_forms import GLM, LONGCAT, MINIMAX, QWEN_CODER, TagReader
from core.errors import RequestError
from core.types import Tool


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """One form of calls: what begins and ends it, and what reads it.

    `section` reads what follows `tool_call_start` or another of `starts`; `main`, where it is
    given, a whole answer.  A template that holds all of one group of `needles` asks for it.
    `inner` are further markers that a vocabulary may hide as control tokens.  `is_word`: what
    begins a call may stand in any text.
    """

    name: str
    tool_call_start: str
    tool_call_end: str
    section: Section
    needles: tuple[tuple[str, ...], ...] = ()
    starts: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    is_pythonic: bool = False
    is_word: bool = False
    main: Main | None = field(default=None, compare=False)

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers that the reader looks for in the text."""
        marks = (self.tool_call_start, *self.starts, self.tool_call_end, *self.inner)
        return tuple(mark for mark in marks if mark)

    def parser(self, tools: Sequence[Tool], *, is_parallel: bool = True) -> CallParser:
        """Return a parser of one answer in which `tools` may be called."""
        collector = CallCollector(tools, is_parallel=is_parallel, check=fitting(tools))
        if self.main is not None:
            return CallParser(self.main, collector)
        starts = (self.tool_call_start, *self.starts)
        main = answer_with_calls(starts, self.section, is_pythonic=self.is_pythonic)
        return CallParser(main, collector)

    def parse_tool_call(self, text: str, tools: Sequence[Tool]) -> list[Piece]:
        """Return the pieces of a call's whole text, given without its two outer markers."""
        parser = self.parser(tools)
        pieces = parser.push(f"{self.tool_call_start}{text}{self.tool_call_end}")
        return [*pieces, *parser.flush()]


_FAMILIES = (
    ToolFamily(
        "harmony", harmony.CHANNEL, harmony.CALL, tagged_json(),
        needles=((harmony.CHANNEL, harmony.MESSAGE, "analysis"),),
        inner=harmony.MARKERS, main=harmony.read_harmony,
    ),
    ToolFamily(
        "kimi_k2", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", kimi,
        needles=(("<|tool_calls_section_begin|>",),),
        inner=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    ToolFamily(
        "deepseek_v3", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", deepseek,
        needles=(("<｜tool▁calls▁begin｜>", "```json"),),
        inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    ToolFamily(
        "deepseek_v31", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", deepseek,
        needles=(("<｜tool▁calls▁begin｜>",),),
        inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    ToolFamily(
        "minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", TagReader(MINIMAX),
        needles=(("<minimax:tool_call>",), ("minimax:tool_call", "<invoke")),
    ),
    ToolFamily(
        "qwen3_coder", "<tool_call>", "</tool_call>", TagReader(QWEN_CODER),
        needles=(("<function=", "<parameter="),), starts=("<function=",),
    ),
    ToolFamily("glm4", "<tool_call>", "</tool_call>", TagReader(GLM), needles=(("<arg_key>",),)),
    ToolFamily(
        "longcat", "<longcat_tool_call>", "</longcat_tool_call>", TagReader(LONGCAT),
        needles=(("<longcat_tool_call>",),),
    ),
    ToolFamily(
        "mistral", "[TOOL_CALLS]", "", mistral,
        needles=(("[TOOL_CALLS]", "[ARGS]"),), inner=("[ARGS]", "[CALL_ID]"),
    ),
    ToolFamily("mistral_json", "[TOOL_CALLS]", "", mistral, needles=(("[TOOL_CALLS]",),)),
    ToolFamily(
        "function_gemma", "<start_function_call>", "<end_function_call>",
        gemma("<escape>", "<end_function_call>"),
        needles=(("<start_function_call>",),), inner=("<escape>",),
    ),
    ToolFamily(
        "gemma4", "<|tool_call>", "<tool_call|>", gemma('<|"|>', "<tool_call|>"),
        needles=(("<|tool_call>",),), inner=('<|"|>',),
    ),
    ToolFamily(
        "cohere", "<|START_ACTION|>", "<|END_ACTION|>", tagged_json("<|END_ACTION|>"),
        needles=(("<|START_ACTION|>",),),
    ),
    ToolFamily(
        "command_r", "Action: ```json", "```", tagged_json("```"), needles=(("Action: ```json",),)
    ),
    ToolFamily(
        "phi4_mini", "<|tool_call|>", "<|/tool_call|>", tagged_json("<|/tool_call|>"),
        needles=(("<|/tool_call|>",),),
    ),
    ToolFamily("phi4", "functools", "", tagged_json(), (("functools[",),), is_word=True),
    ToolFamily("granite", "<|tool_call|>", "", tagged_json(), needles=(("<|tool_call|>",),)),
    ToolFamily(
        "hermes", "<tool_call>", "</tool_call>", tagged_json("</tool_call>"),
        needles=(("<tool_call>",),),
    ),
    ToolFamily(
        "lfm2", "<|tool_call_start|>", "<|tool_call_end|>", pythonic,
        needles=(("<|tool_call_start|>",), ("<|tool_list_start|>",)), is_pythonic=True,
    ),
    ToolFamily(
        "pythonic", "<|python_start|>", "<|python_end|>", pythonic,
        needles=(("<|python_start|>",), ("func_name1(params_name1",)), is_pythonic=True,
    ),
    ToolFamily(
        "llama3_json", "<|python_tag|>", "", python_tag,
        needles=(("<|python_tag|>",), ('"parameters"',)),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, ToolFamily] = {family.name: family for family in _FAMILIES}
DEFAULT = FAMILIES["hermes"]


def check_family(name: str | None) -> None:
    """Raise RequestError for a name that is no family's; None is fine."""
    if name is not None and name not in FAMILIES:
        raise RequestError(
            f"There is no tool parser {name[:100]!r}; known are {', '.join(FAMILIES)}.",
            param="tool_parser",
        )


def family_of(template: str) -> ToolFamily:
    """Return the family that a chat template writes calls for; Hermes where it shows none."""
    for family in _FAMILIES:
        if any(all(needle in template for needle in group) for group in family.needles):
            return family
    return DEFAULT
