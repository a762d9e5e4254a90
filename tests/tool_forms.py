"""How each model family's chat template writes an answer with tool calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends.prompt.template_worker import compile_template
from core.types import Tool

EDIT = Tool(
    "edit_file",
    "Change a file.",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "ratio": {"type": "number"},
            "is_final": {"type": "boolean"},
            "lines": {"type": "array"},
            "options": {"type": "object"},
        },
    },
)
LIST = Tool("list_files", "List files.", {"type": "object", "properties": {}})
TOOLS = (EDIT, LIST)

Calls = Sequence[tuple[str, Mapping[str, Any]]]

_LOOP = "{% for c in calls %}"
_XML_VALUE = "{{ v if v is string else v | tojson }}"
_GEMMA_MACRO = (
    "{%- macro show(v) -%}{%- if v is string -%}QUOTE{{ v }}QUOTE"
    "{%- elif v is mapping -%}{ {%- for k, i in v.items() -%}"
    "{{ k }}:{{ show(i) }}{% if not loop.last %},{% endif %}{%- endfor -%} }"
    "{%- elif v is sequence -%}[{%- for i in v -%}{{ show(i) }}"
    "{% if not loop.last %},{% endif %}{%- endfor -%}]"
    "{%- else -%}{{ v | tojson }}{%- endif -%}{%- endmacro -%}"
)


def _gemma(opening: str, quote: str, closing: str) -> str:
    return (
        _GEMMA_MACRO.replace("QUOTE", quote)
        + _LOOP
        + opening
        + "call:{{ c.name }}{{ show(c.arguments) }}"
        + closing
        + "{% endfor %}"
    )


def _json(
    name: str = "name", arguments: str = "arguments", extra: str = "", behind: str = ""
) -> str:
    return (
        "{"
        + extra
        + f'"{name}": "{{{{ c.name }}}}", "{arguments}": {{{{ c.arguments | tojson }}}}'
        + behind
        + "}"
    )


def _list(opening: str, closing: str, one: str) -> str:
    return f"{opening}[{_LOOP}{one}{{% if not loop.last %}}, {{% endif %}}{{% endfor %}}]{closing}"


_PYTHON = (
    "[" + _LOOP + "{{ c.name }}({% for k, v in c.arguments.items() %}{{ k }}={{ v | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}"
    "{% endfor %}]"
)
_DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"

TEMPLATES: Mapping[str, str] = {
    "hermes": _LOOP + "<tool_call>\n" + _json() + "\n</tool_call>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}",
    "llama3_json": "<|python_tag|>" + _LOOP + _json("name", "parameters")
    + "{% if not loop.last %}; {% endif %}{% endfor %}",
    "pythonic": f"<|python_start|>{_PYTHON}<|python_end|>",
    "lfm2": f"<|tool_call_start|>{_PYTHON}<|tool_call_end|>",
    "mistral": _LOOP + "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}{% endfor %}",
    "mistral_json": _list("[TOOL_CALLS] ", "", _json(behind=', "id": "{{ loop.index }}"')),
    "qwen3_coder": _LOOP + "<tool_call>\n<function={{ c.name }}>\n"
    "{% for k, v in c.arguments.items() %}<parameter={{ k }}>{{ '\n' }}" + _XML_VALUE
    + "{{ '\n' }}</parameter>\n{% endfor %}</function>\n</tool_call>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}",
    "glm4": _LOOP + "{{ '\n' }}<tool_call>{{ c.name }}{{ '\n' }}"
    "{% for k, v in c.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>" + _XML_VALUE
    + "</arg_value>\n{% endfor %}</tool_call>{% endfor %}",
    "longcat": _LOOP + "<longcat_tool_call>{{ c.name }}{{ '\n' }}"
    "{% for k, v in c.arguments.items() %}<longcat_arg_key>{{ k }}</longcat_arg_key>\n"
    "<longcat_arg_value>" + _XML_VALUE
    + "</longcat_arg_value>\n{% endfor %}</longcat_tool_call>{% endfor %}",
    "minimax_m2": "<minimax:tool_call>\n" + _LOOP + '<invoke name="{{ c.name }}">\n'
    '{% for k, v in c.arguments.items() %}<parameter name="{{ k }}">' + _XML_VALUE
    + "</parameter>\n{% endfor %}</invoke>\n{% endfor %}</minimax:tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|>" + _LOOP
    + "<|tool_call_begin|>functions.{{ c.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
    "{{ c.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>",
    "deepseek_v3": _DEEPSEEK.format(
        _LOOP + "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.name }}\n```json\n"
        "{{ c.arguments | tojson }}\n```<｜tool▁call▁end｜>"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
    "deepseek_v31": _DEEPSEEK.format(
        _LOOP + "<｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>{{ c.arguments | tojson }}"
        "<｜tool▁call▁end｜>{% endfor %}"
    ),
    "function_gemma": _gemma("<start_function_call>", "<escape>", "<end_function_call>"),
    "gemma4": _gemma("<|tool_call>", '<|"|>', "<tool_call|>"),
    "cohere": _list(
        "<|START_ACTION|>", "<|END_ACTION|>",
        _json("tool_name", "parameters", extra='"tool_call_id": "{{ loop.index0 }}", '),
    ),
    "command_r": _list("Action: ```json\n", "\n```", _json("tool_name", "parameters")),
    "granite": _list("<|tool_call|>", "", _json()),
    "phi4_mini": _list("<|tool_call|>", "<|/tool_call|>", _json()),
    "phi4": _list("functools", "", _json()),
    "harmony": _LOOP + "{% if not loop.first %}<|start|>assistant{% endif %}"
    "<|channel|>commentary to=functions.{{ c.name }} <|constrain|>json<|message|>"
    "{{ c.arguments | tojson }}<|call|>{% endfor %}",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says: perhaps reasoning, text and calls, in this order."""

    calls: Calls
    text: str = ""
    reasoning: str | None = None


def written(family: str, answer: Answer) -> str:
    """Return the answer as the family's models write it."""
    template = compile_template(TEMPLATES[family])
    calls = [{"name": name, "arguments": arguments} for name, arguments in answer.calls]
    text = template.render(calls=calls)
    if family == "harmony":
        return _in_channels(answer, text)
    before = f"{answer.text}\n\n" if answer.text and answer.calls else answer.text
    thought = "" if answer.reasoning is None else f"<think>{answer.reasoning}</think>\n\n"
    return f"{thought}{before}{text if answer.calls else ''}"


def _in_channels(answer: Answer, calls: str) -> str:
    parts = []
    if answer.reasoning is not None:
        parts.append(f"<|channel|>analysis<|message|>{answer.reasoning}<|end|>")
    if answer.text:
        channel = "commentary" if answer.calls else "final"
        parts.append(f"<|channel|>{channel}<|message|>{answer.text}<|end|>")
    if answer.calls:
        parts.append(calls)
    return "<|start|>assistant".join(parts)
