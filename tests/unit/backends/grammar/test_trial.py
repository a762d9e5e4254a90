"""Tests of grammars that are too costly: they are refused in a child, and nothing else suffers."""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from backends.cancellation import Cancelled, cancelled_by
from backends.grammar import trial
from backends.grammar.compiler import output_constraint
from backends.grammar.cost import CostMeter
from backends.grammar.schema_limits import check_pattern
from backends.grammar.trial import MAX_RUNNING, MAX_WAITING, GrammarTrial, Verdict
from backends.hf.tokenizer import HfTokenizer
from backends.watch import StepWatch
from core.child import Child
from core.errors import RequestError, Unavailable, UnsupportedParameter
from core.types import ChoiceOutput, JsonOutput, JsonValue, RegexOutput
from tests.unit.backends.grammar.test_constraint import fits
from tests.unit.backends.grammar.test_constraint import read as read


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_cheap_schema(*schemas: Any) -> bool:
    meter = CostMeter()
    for schema in schemas:
        meter.add_schema(schema)
    return meter.is_cheap


def is_cheap_pattern(*patterns: str) -> bool:
    meter = CostMeter()
    for pattern in patterns:
        meter.add_pattern(pattern)
    return meter.is_cheap


def chain(length: int, link: str = "direct") -> dict[str, JsonValue]:
    """Return a schema that is a chain of references."""
    definitions: dict[str, JsonValue] = {f"d{length}": {"type": "string"}}
    for index in range(length):
        after: dict[str, JsonValue] = {"$ref": f"#/$defs/d{index + 1}"}
        if link != "direct":
            definitions[f"d{index}"] = {link: [after, after]}
            continue
        definitions[f"d{index}"] = {
            "type": "object", "properties": {"x": after}, "required": ["x"]
        }  # fmt: skip
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def optional(count: int) -> dict[str, JsonValue]:
    return {"type": "object", "properties": {f"a{i}": {"type": "string"} for i in range(count)}}


def nested(depth: int) -> dict[str, JsonValue]:
    schema: dict[str, JsonValue] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: dict[str, dict[str, JsonValue]] = {
    "a large divisor": {"type": "integer", "multipleOf": 99_400_891},
    "divisors that are combined": {
        "allOf": [{"type": "integer", "multipleOf": 9973}, {"type": "integer", "multipleOf": 9967}]
    },
    "many divisors": {
        "type": "object",
        "properties": {f"a{i}": {"type": "integer", "multipleOf": 90_000 + i} for i in range(300)},
    },
    "a chain of references": chain(5000),
    "alternatives that are combined": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"{k}{j}": {}}, "required": [f"{k}{j}"]}
                       for j in range(2)]}
            for k in range(20)
        ]
    },
    "5000 alternatives": {
        "anyOf": [
            {"type": "object", "properties": {f"k{i}": {"type": "string"}}, "required": [f"k{i}"]}
            for i in range(5000)
        ]
    },
    "deep nesting": nested(900),
}  # fmt: skip
ALLOWED: dict[str, dict[str, JsonValue]] = {
    "a divisor": {"type": "integer", "multipleOf": 30_011},
    "cents": {"type": "number", "multipleOf": 0.01, "minimum": 0},
    "many alternatives": {"anyOf": [{"const": f"v{index}"} for index in range(500)]},
    "references": chain(150),
    "a large enum": {"enum": [f"value{index}" for index in range(3000)]},
    "bounds": {"type": "array", "items": {"type": "integer"}, "minItems": 9000, "maxItems": 90_000},
    "a long text": {"type": "string", "minLength": 90_000, "maxLength": 100_000},
}


def combined(*divisors: float) -> dict[str, JsonValue]:
    """Return a schema whose numbers have to be multiples of all, on several levels."""
    schema: dict[str, JsonValue] = {"type": "number"}
    for divisor in divisors:
        schema = {"multipleOf": divisor, "allOf": [schema, {"minimum": 0}]}
    return schema


@pytest.mark.parametrize(
    "divisors",
    [
        (99_400_891,), (999_983,), (123_456_789,), (999_999_000,), (50_000.05,), (3.1415926535,),
        (10**400 + 1,), (9973, 9967), (97, 89, 83), (0.083, 8900, 97),
    ],
)  # fmt: skip
def test_divisors_with_too_many_remainders_are_refused_without_a_trial(
    divisors: tuple[float, ...],
) -> None:
    schema: dict[str, JsonValue] = {"items": combined(*divisors)}
    with pytest.raises(UnsupportedParameter, match=r"multipleOf .* takes over 500,000 states"):
        output_constraint(JsonOutput(schema))


@pytest.mark.parametrize(
    "divisors",
    [
        (10**9,), (1e-9,), (0.01,), (0.25,), (480_013,), (300_007 * 2**12,), (1e300,), (0,),
        (float("nan"),), (97, 89), (9973, 9973, 99730), (0.01, 100, 5),
    ],
)  # fmt: skip
def test_other_divisors_are_not(divisors: tuple[float, ...]) -> None:
    assert output_constraint(JsonOutput(combined(*divisors))).grammar


@pytest.mark.parametrize("value", [True, "3", None, [7]])
def test_a_divisor_that_is_no_number_is_left_to_the_library(value: JsonValue) -> None:
    assert output_constraint(JsonOutput({"type": "number", "multipleOf": value})).grammar


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of low priority may get little processor time beside other tests."""
    monkeypatch.setattr("backends.grammar.trial.LIMIT_S", 200.0)


@pytest.mark.parametrize("name", REFUSED)
def test_schemas_that_would_take_minutes_gigabytes_or_the_stack_are_refused(
    read: HfTokenizer, name: str
) -> None:
    for _ in range(2):
        with pytest.raises(UnsupportedParameter, match="cannot be enforced"):
            read.mask(output_constraint(JsonOutput(REFUSED[name])))
    assert fits(read, JsonOutput({"const": 1}), "1")


@pytest.mark.parametrize("name", ALLOWED)
def test_large_schemas_that_are_affordable_are_not_refused(read: HfTokenizer, name: str) -> None:
    assert not read.mask(output_constraint(JsonOutput(ALLOWED[name]))).problem


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 300_007}, combined(97, 89), chain(200), chain(5, "allOf"),
        nested(60), optional(150), {"type": "string", "pattern": "a{5000}"},
        {"enum": ["x" * 100] * 700}, {"multipleOf": 1e-300}, {"multipleOf": 1e300},
        {"properties": {"a": {"multipleOf": 97}, "b": {"multipleOf": 89}, "c": {"multipleOf": 83}}},
    ],
)  # fmt: skip
def test_what_may_be_costly_is_tried_first(schema: dict[str, JsonValue]) -> None:
    assert not is_cheap_schema(schema)
    assert not output_constraint(JsonOutput(schema)).is_cheap


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_not_taken_for_cheap(name: str) -> None:
    assert not is_cheap_schema(REFUSED[name])


@pytest.mark.parametrize(
    "schema",
    [
        {}, {"type": "object", "properties": {"a": {"type": "string"}}}, {"multipleOf": 0.01},
        {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"multipleOf": True}, {"allOf": [{}]},
        {"multipleOf": float("nan")}, {"anyOf": 3, "properties": 4, "required": 5}, optional(40),
    ],
)  # fmt: skip
def test_usual_schemas_need_no_trial(schema: dict[str, JsonValue]) -> None:
    assert is_cheap_schema(schema)


def test_costs_of_all_tools_add_up() -> None:
    assert is_cheap_schema(*({"multipleOf": 0.01} for _ in range(100)))
    assert not is_cheap_schema(*({"multipleOf": 9000 + index} for index in range(100)))
    assert is_cheap_pattern(*["[a-z]{1,20}"] * 100)
    assert not is_cheap_pattern(*["[a-z]{1,900}"] * 100)
    assert not is_cheap_schema(*({"pattern": "[a-z]{1,900}"} for _ in range(100)))


def test_regexes_with_large_repetitions_are_tried_first() -> None:
    assert is_cheap_pattern(r"[a-z]{1,500}\d+")
    assert not is_cheap_pattern("(a{1,1000}){1,1000}")
    assert not is_cheap_pattern("a" * 600)
    assert not output_constraint(RegexOutput("a{1001}", "p")).is_cheap


def test_literals_that_would_force_too_much_text_are_refused() -> None:
    for output in (
        JsonOutput({"const": "a" * 100_000}),
        JsonOutput({"properties": {"x": {"enum": ["b", "a" * 5000]}}}),
        ChoiceOutput(("a" * 5000, "b"), "guided_choice"),
    ):
        with pytest.raises(RequestError, match="at most 4096 are allowed"):
            output_constraint(output)


@pytest.mark.parametrize("unread_bytes", [0, 4_000_000])
def test_a_trial_ends_when_its_request_is_cancelled(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch, unread_bytes: int
) -> None:
    gone, has_begun = threading.Event(), threading.Event()
    problems: list[BaseException] = []

    class Started(Child):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            has_begun.set()

    def work() -> None:
        try:
            with cancelled_by(gone):
                read.mask(output_constraint(JsonOutput({"type": "integer", "multipleOf": 10**9})))
        except BaseException as problem:
            problems.append(problem)

    # This one reads and answers nothing, however late the cancellation comes.
    monkeypatch.setattr(trial, "_WORKER", "import time; time.sleep(600)")
    monkeypatch.setattr(trial, "LIMIT_S", 600.0)
    monkeypatch.setattr(trial, "Child", Started)
    monkeypatch.setattr(GrammarTrial, "_payload", lambda *_: b"\n" + bytes(unread_bytes))
    thread = threading.Thread(target=work)
    thread.start()
    assert has_begun.wait(60)
    gone.set()
    thread.join(60)
    frame = sys._current_frames().get(thread.ident or 0) if thread.is_alive() else None
    assert not thread.is_alive(), "".join(traceback.format_stack(frame))
    assert [type(problem) for problem in problems] == [Cancelled]


class _Panic(BaseException):
    """Stands for pyo3_runtime.PanicException."""


class _Broken:
    """A matcher of a library that panics."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> None:
            raise _Panic(name)

        return fail


def test_a_panic_of_the_library_fails_its_own_request(read: HfTokenizer) -> None:
    import numpy as np

    mask = read.mask(output_constraint(JsonOutput({"const": 1})))
    mask._sequence.matcher = _Broken()  # type: ignore[assignment]
    mask.accept(1)
    assert "the grammar library failed" in mask.problem
    logits = np.zeros(read.vocabulary_size, np.float32)
    mask.apply(logits)
    assert {int(each) for each in np.flatnonzero(np.isfinite(logits))} <= read.end_ids
    assert not mask.restart(b"1")
    assert mask.is_finished


def test_a_grammar_with_slow_tokens_is_given_up(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.setattr("backends.grammar.compiler._SLOW_MASK_S", -1.0)
    monkeypatch.setattr("backends.grammar.compiler._MAX_SLOW_S", -1.0)
    mask = read.mask(output_constraint(JsonOutput({"type": "string"})))
    logits = np.zeros(read.vocabulary_size, np.float32)
    mask.apply(logits.copy())
    assert not mask.problem
    mask.apply(logits.copy())
    assert "too long" in mask.problem


def test_regexes_are_checked_in_linear_time() -> None:
    for pattern in (
        "[" * 200_000,
        "[^]" * 100_000,
        "[\\" * 100_000,
        "{1" * 100_000,
        "(?" * 100_000,
    ):
        for _ in range(5):
            check_pattern(pattern, "p")
        assert not is_cheap_pattern(pattern)


@pytest.mark.parametrize("pattern", ["a**", "a{2}+", "[a]+*", "[^]]**"])
def test_repeated_repetitions_are_refused(pattern: str) -> None:
    with pytest.raises(RequestError, match="consecutive repetition"):
        check_pattern(pattern, "p")


def test_a_child_that_cannot_be_started_is_no_fault_of_the_grammar(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    wanted = output_constraint(JsonOutput({"type": "integer", "multipleOf": 10_007}))
    with monkeypatch.context() as patch:
        patch.setattr("backends.grammar.trial.Child", refuse)
        with pytest.raises(Unavailable, match="did not start"):
            read.mask(wanted)
    assert not read.mask(wanted).problem


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed"),
        ("import time; time.sleep(60)", "too busy"),
    ],
)
def test_a_child_that_is_killed_or_gets_no_time_is_no_fault_of_the_grammar(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch, worker: str, message: str
) -> None:
    divisor = 10_009 + len(message)
    wanted = output_constraint(JsonOutput({"type": "integer", "multipleOf": divisor}))
    with monkeypatch.context() as patch:
        patch.setattr(trial, "_WORKER", worker)
        if message == "too busy":
            patch.setattr(trial, "LIMIT_S", 0.3)
        with pytest.raises(Unavailable, match=message) as caught:
            read.mask(wanted)
    assert caught.value.retry_after_s == 5
    assert not read.mask(wanted).problem


@pytest.mark.parametrize(
    "worker",
    [
        "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)",
        "import os; os.abort()",
        "raise MemoryError",
        "print('x' * 3_000_000)",
    ],
)
def test_a_child_that_reaches_its_own_limits_refuses_the_grammar(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    monkeypatch.setattr(trial, "_WORKER", worker)
    monkeypatch.setattr(GrammarTrial, "_payload", lambda *_: b"\n")
    with pytest.raises(UnsupportedParameter, match="cannot be enforced"):
        read.mask(output_constraint(JsonOutput({"type": "integer", "multipleOf": 10_037})))


@pytest.mark.parametrize(
    ("problem", "message"),
    [("MemoryError", "processor time, memory or stack"), ("Panic('oh')", "library failed: oh")],
)
def test_whatever_the_library_raises_in_the_child_refuses_the_grammar(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch, problem: str, message: str
) -> None:
    worker = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from backends.grammar import trial_worker\n"
        "class Panic(BaseException): pass\n"
        "def fail(*_):\n"
        f"    raise {problem}\n"
        "trial_worker._try = fail\n"
        "trial_worker.main()\n"
    )
    monkeypatch.setattr(trial, "_WORKER", worker)
    divisor = 10_061 + len(message)
    with pytest.raises(UnsupportedParameter, match=message):
        read.mask(output_constraint(JsonOutput({"type": "integer", "multipleOf": divisor})))


def test_a_child_that_takes_too_much_memory_is_ended_where_the_system_has_no_limit(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This worker sets no limits, as if the system had none.
    monkeypatch.setattr(
        trial, "_WORKER", "import sys, time; sys.stdin.buffer.read(1); time.sleep(60)"
    )
    monkeypatch.setattr(trial, "_MEMORY_LIMIT_BYTES", 2**20)
    monkeypatch.setattr(GrammarTrial, "_payload", lambda *_: b"\n")
    with pytest.raises(UnsupportedParameter, match="memory or stack"):
        read.mask(output_constraint(JsonOutput({"type": "integer", "multipleOf": 10_069})))


def test_a_child_that_has_used_its_processor_time_at_the_deadline_refuses_the_grammar(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This worker has no limit of its own.
    monkeypatch.setattr(trial, "_WORKER", "import sys; sys.stdin.buffer.read(1)\nwhile True: pass")
    monkeypatch.setattr(trial, "CPU_LIMIT_S", 0.01)
    monkeypatch.setattr(trial, "LIMIT_S", 2.0)
    monkeypatch.setattr(GrammarTrial, "_payload", lambda *_: b"\n")
    with pytest.raises(UnsupportedParameter, match="processor time"):
        read.mask(output_constraint(JsonOutput({"type": "integer", "multipleOf": 60_013})))


def test_few_trials_run_at_once_and_few_wait(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, running = threading.Event(), threading.Semaphore(0)

    def hold(_: object, grammar: str) -> Verdict:
        running.release()
        assert release.wait(60)
        return Verdict(f"as the test wants it: {len(grammar)}")

    def work(divisor: int) -> None:
        try:
            read.mask(output_constraint(JsonOutput({"type": "integer", "multipleOf": divisor})))
        except (Unavailable, UnsupportedParameter) as problem:
            problems.append(problem)

    problems: list[Exception] = []
    monkeypatch.setattr(GrammarTrial, "_run", hold)
    count = MAX_RUNNING + MAX_WAITING
    threads = [threading.Thread(target=work, args=(20_011 + each,)) for each in range(count)]
    for thread in threads:
        thread.start()
    for _ in range(MAX_RUNNING):
        assert running.acquire(timeout=60)
    while trial._queue._count < count:
        assert not problems
    work(40_009)
    assert isinstance(problems[0], Unavailable)
    assert not running.acquire(blocking=False)
    # What is cheap needs no trial.
    assert fits(read, JsonOutput({"const": 1}), "1")
    release.set()
    for thread in threads:
        thread.join(60)
    assert len(problems) == count + 1


def test_waiting_for_a_turn_does_not_count_as_hung(
    read: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, running = threading.Event(), threading.Semaphore(0)

    def hold(_: object, grammar: str) -> Verdict:
        running.release()
        assert release.wait(60)
        return Verdict(f"as the test wants it: {len(grammar)}")

    def work(watch: StepWatch, divisor: int) -> None:
        with watch.running("prepare"), contextlib.suppress(UnsupportedParameter):
            read.mask(output_constraint(JsonOutput({"type": "integer", "multipleOf": divisor})))

    monkeypatch.setattr(GrammarTrial, "_run", hold)
    watches = [StepWatch() for _ in range(MAX_RUNNING + 1)]
    threads = [
        threading.Thread(target=work, args=(watch, 50_021 + index))
        for index, watch in enumerate(watches)
    ]
    for thread in threads[:MAX_RUNNING]:
        thread.start()
        assert running.acquire(timeout=60)
    threads[-1].start()
    wait_until(lambda: trial._queue._count == len(threads) and not watches[-1].lasted_s)
    assert all(watch.lasted_s for watch in watches[:-1])
    release.set()
    for thread in threads:
        thread.join(60)
    assert running.acquire(timeout=60)
