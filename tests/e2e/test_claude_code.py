"""Claude Code edits a file, goes on in a new process and is stopped."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.e2e.conftest import WritePlan
from tests.e2e.plans import REPORT, REPORT_SCHEMA, tagged
from tests.e2e.record import Record
from tests.e2e.scripted import LONG, SMALL
from tests.e2e.terminal_agents import ClaudeCode

TASK = "greet the world"
NEW = 'return "grüße, \\"世界\\""'


def test_claude_code_edits_a_file_and_goes_on_in_a_new_process(
    claude_code: ClaudeCode,
    plan: WritePlan,
    workspace: Path,
    record: Record,
    answered: Callable[[], Mapping[str, int]],
) -> None:
    file, note = workspace / "greet.py", workspace / "note.md"
    plan(
        TASK,
        [
            "I read it first.\n" + tagged("Read", file_path=str(file)),
            tagged("Edit", file_path=str(file), old_string='return "hello"', new_string=NEW),
            "The function greets the world now.",
            tagged("Write", file_path=str(note), content="Done: 世界\n"),
            "It is noted.",
        ],
    )
    done = claude_code.work(SMALL, f"Make greet.py {TASK}.")
    assert done.code == 0, done
    assert file.read_text() == f"def greet():\n    {NEW}\n"
    result = done.events[-1]
    assert result["type"] == "result"
    assert result["result"] == "The function greets the world now."
    answers = record.answers(TASK)
    usage = result["usage"]
    assert usage["cache_read_input_tokens"] == sum(answer.cached for answer in answers)
    computed = sum(answer.prompt - answer.cached for answer in answers)
    assert usage["input_tokens"] + usage["cache_creation_input_tokens"] == computed

    resumed = claude_code.resume(SMALL, "Write a note.")
    assert resumed.code == 0, resumed
    assert note.read_text() == "Done: 世界\n"
    assert resumed.events[-1]["result"] == "It is noted."
    assert resumed.events[-1]["session_id"] == result["session_id"]
    record.check_reuse(TASK, 5)
    assert set(answered()) == {"200"}


def test_claude_code_gives_an_object(
    claude_code: ClaudeCode, plan: WritePlan, workspace: Path, record: Record
) -> None:
    """It offers the schema as a tool of its own."""
    plan(
        TASK,
        [
            tagged("Read", file_path=str(workspace / "greet.py")),
            tagged("StructuredOutput", **REPORT),
        ],
    )
    done = claude_code.report(SMALL, f"Would greet.py {TASK}?", REPORT_SCHEMA)
    assert done.code == 0, done
    assert done.events[-1]["structured_output"] == REPORT
    record.check_reuse(TASK, 2)


def test_claude_code_is_stopped(
    claude_code: ClaudeCode, plan: WritePlan, record: Record, answering: Callable[[], None]
) -> None:
    plan("count", [LONG])
    claude_code.stop_during(answering, SMALL, "Please count for a while.")
    record.wait_until_cancelled("count")
