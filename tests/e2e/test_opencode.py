"""opencode edits a file, goes on in a new process and is stopped."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.e2e.conftest import WritePlan
from tests.e2e.plans import REPORT, REPORT_SCHEMA, tagged
from tests.e2e.record import Record
from tests.e2e.scripted import LONG, SMALL
from tests.e2e.terminal_agents import OpenCode

TASK = "greet the world"
NEW = 'return "grüße, \\"世界\\""'


def test_opencode_edits_a_file_and_goes_on_in_a_new_process(
    opencode: OpenCode,
    plan: WritePlan,
    workspace: Path,
    record: Record,
    answered: Callable[[], Mapping[str, int]],
) -> None:
    file, note = workspace / "greet.py", workspace / "note.md"
    plan(
        TASK,
        [
            "I read it first.\n" + tagged("read", filePath=str(file)),
            tagged("edit", filePath=str(file), oldString='return "hello"', newString=NEW),
            "The function greets the world now.",
            tagged("write", content="Done: 世界\n", filePath=str(note)),
            "It is noted.",
        ],
    )
    opencode.configure(SMALL)
    done = opencode.work(f"Make greet.py {TASK}.")
    assert done.code == 0, done
    assert file.read_text() == f"def greet():\n    {NEW}\n"
    assert done.texts[-1] == "The function greets the world now."

    resumed = opencode.resume("Write a note.")
    assert resumed.code == 0, resumed
    assert note.read_text() == "Done: 世界\n"
    assert resumed.texts[-1] == "It is noted."
    assert {event["sessionID"] for event in (*done.events, *resumed.events)} == {
        done.events[0]["sessionID"]
    }
    record.check_reuse(TASK, 5)
    assert set(answered()) == {"200"}


def test_opencode_gives_an_object(
    opencode: OpenCode, plan: WritePlan, workspace: Path, record: Record
) -> None:
    """Its server takes a schema and offers it as a tool; its command line has no option for it."""
    plan(
        TASK,
        [
            tagged("read", filePath=str(workspace / "greet.py")),
            tagged("StructuredOutput", **REPORT),
        ],
    )
    opencode.configure(SMALL)
    assert opencode.report(f"Would greet.py {TASK}?", REPORT_SCHEMA)["structured"] == REPORT
    record.check_reuse(TASK, 2)


def test_opencode_is_stopped(
    opencode: OpenCode, plan: WritePlan, record: Record, answering: Callable[[], None]
) -> None:
    plan("count", [LONG])
    opencode.configure(SMALL)
    opencode.stop_during(answering, "Please count for a while.")
    record.wait_until_cancelled("count")
