"""Child process that compiles one grammar under limits and reports what that took.

Input: a line of JSON with `grammar`, `ends` (token ids) and limits; another one with `special`
(token ids) and `lengths` (bytes of each token); then the bytes of all tokens.  Output: a line of
JSON, see `Report`.
"""

import json
import random
import resource
import sys
import time
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypedDict

from backends.grammar.vocabulary import Vocabulary
from core.child import die_with_input, die_with_parent, limit_cpu, limit_process, take_stdout
from core.errors import is_panic
from core.stack import call_with_stack
from core.units import MIB

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# Half of what the compiler in the engine's process has: what fits here fits there.
STACK_BYTES = 32 * MIB
# A step of a mask with this fuel takes up to 40 ms; a state of the automaton takes 1 to 2 KiB.
_STEP_FUEL, _MAX_STATES = 40_000, 50_000
_WALKED_TOKENS = 12


class Report(TypedDict):
    """The result of a trial: llguidance's error if there is one, and what the grammar took."""

    error: str
    compile_s: float
    mask_s: float
    grown_bytes: int


def main() -> None:
    """Answer one request."""
    die_with_parent()
    request = json.loads(sys.stdin.buffer.readline())
    request |= json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read(sum(request["lengths"]))
    stream = take_stdout()
    die_with_input(sys.stdin)
    limit_process(data_bytes=request["memory_bytes"], file_bytes=0)
    limit_cpu(request["cpu_s"])
    report = _report(request, _vocabulary(request, data))
    stream.write(json.dumps(report) + "\n")
    stream.flush()


def _vocabulary(request: dict[str, Any], data: bytes) -> Vocabulary:
    ends = list(accumulate(request["lengths"]))
    tokens = [data[start:end] for start, end in pairwise([0, *ends])]
    return Vocabulary(tokens, request["special"], request["ends"])


def _report(request: dict[str, Any], vocabulary: Vocabulary) -> Report:
    """Return the result of the trial, also if the library panics."""
    try:
        return call_with_stack(STACK_BYTES, lambda: _try(request, vocabulary))
    except BaseException as problem:
        if not is_panic(problem):
            raise
        return Report(
            error=f"the grammar library failed: {str(problem)[:200]}",
            compile_s=0.0,
            mask_s=0.0,
            grown_bytes=0,
        )


def _try(request: dict[str, Any], vocabulary: Vocabulary) -> Report:
    from llguidance import LLMatcher

    tokenizer = vocabulary.tokenizer()
    before, started = _peak_bytes(), time.thread_time()
    matcher = LLMatcher(
        tokenizer,
        LLMatcher.grammar_from_lark(request["grammar"]),
        log_level=0,
        limits=parser_limits(),
    )
    compiled = time.thread_time()
    mask_s = 0.0
    # Any way through the grammar: states further on may be costlier than the first.
    choose = random.Random(0)
    for _ in range(_WALKED_TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        at = time.thread_time()
        allowed = _ids(matcher.compute_bitmask())
        mask_s = max(mask_s, time.thread_time() - at)
        few = [choose.choice(allowed) for _ in range(4)] if allowed else [vocabulary.eos_token_id]
        matcher.consume_token(max(few, key=lambda each: len(vocabulary.tokens[each])))
    return Report(
        error=matcher.get_error(),
        compile_s=compiled - started,
        mask_s=mask_s,
        grown_bytes=_peak_bytes() - before,
    )


def parser_limits() -> "LLParserLimits":
    """Return llguidance's limits, the same in a trial as in the engine's process."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        verbose_errors=False,
        step_lexer_fuel=_STEP_FUEL,
        max_lexer_states=_MAX_STATES,
    )


def _ids(mask: bytes) -> list[int]:
    return [
        8 * index + bit
        for index, byte in enumerate(mask)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    ]


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
