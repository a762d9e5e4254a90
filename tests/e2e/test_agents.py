"""Cline and Continue drive real tasks to their end: every byte of the protocol is real."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.e2e.agents import Cline, Continue
from tests.e2e.conftest import WritePlan
from tests.e2e.plans import fenced, tagged
from tests.e2e.record import Record
from tests.e2e.scripted import FREE, LONG, MODEL, SMALL

Answered = Callable[[], Mapping[str, int]]

TASK = "greet the world"
OLD = '    return "hello"'
NEW = '    # 世界 \\ "grüße"\n    return "hello, world"'
CHANGED = f"def greet():\n{NEW}\n"


def test_cline_edits_a_file(
    cline: Cline, plan: WritePlan, workspace: Path, record: Record, answered: Answered
) -> None:
    file = workspace / "greet.py"
    note = workspace / "note.md"
    plan(
        TASK,
        [
            "I read it first.\n" + tagged("read_files", files=[{"path": str(file)}]),
            tagged("editor", path=str(file), old_text=OLD, new_text=NEW)
            + "\n"
            + tagged("editor", path=str(note), new_text="Two calls in one answer.\n"),
            "The function greets the world now.",
        ],
    )
    cline.configure(MODEL)
    done = cline.work(MODEL, "Make greet.py greet the world.")
    assert file.read_text() == CHANGED
    assert note.read_text() == "Two calls in one answer.\n"
    assert done.code == 0, done
    (result,) = [event for event in done.events if event["type"] == "run_result"]
    assert result["finishReason"] == "completed"
    assert result["text"] == "The function greets the world now."
    assert answered() == {"200": 3}
    record.check_reuse(TASK, 3)


def test_cline_goes_on_in_a_new_process(
    cline: Cline, plan: WritePlan, workspace: Path, record: Record
) -> None:
    """Its command line opens a session again only for its terminal interface and for editors."""
    file, note = workspace / "greet.py", workspace / "note.md"
    plan(
        TASK,
        [
            "I read it first.\n" + tagged("read_files", files=[{"path": str(file)}]),
            "It says hello.",
            tagged("editor", path=str(note), new_text="Done: 世界\n"),
            "It is noted.",
        ],
    )
    cline.configure(SMALL)
    with cline.served(SMALL) as first:
        session = first.new_session()
        assert first.ask(session, f"How would greet.py {TASK}?") == "end_turn"
        assert first.text.endswith("It says hello.")
    with cline.served(SMALL) as second:
        second.load_session(session)
        assert second.ask(session, "Write a note.") == "end_turn"
        assert second.text.endswith("It is noted.")
    assert note.read_text() == "Done: 世界\n"
    record.check_reuse(TASK, 4)


def test_cline_is_stopped(
    cline: Cline, plan: WritePlan, record: Record, answering: Callable[[], None]
) -> None:
    plan("count", [LONG])
    cline.configure(SMALL)
    cline.stop_during(answering, SMALL, "Please count for a while.")
    record.wait_until_cancelled("count")


def test_cline_in_an_editor_is_stopped(cline: Cline, plan: WritePlan, record: Record) -> None:
    plan("count", [LONG])
    cline.configure(SMALL)
    with cline.served(SMALL) as client:
        session = client.new_session()
        task = "Please count for a while."
        assert client.ask(session, task, is_stopped=True) == "cancelled"
        record.wait_until_cancelled("count")


def test_continue_edits_a_file_and_goes_on_in_a_new_process(
    continue_cli: Continue, plan: WritePlan, workspace: Path, record: Record, answered: Answered
) -> None:
    file = workspace / "greet.py"
    plan(
        TASK,
        [
            tagged("Read", filepath="greet.py"),
            tagged("Edit", file_path=str(file), old_string=OLD, new_string=NEW),
            "The function greets the world now.",
            tagged("Write", filepath=str(workspace / "note.md"), content="Done: 世界\n"),
            "It is noted.",
        ],
    )
    continue_cli.configure(MODEL)
    done = continue_cli.work("Make greet.py greet the world.")
    assert file.read_text() == CHANGED
    assert done.code == 0, done
    assert "The function greets the world now." in done.output

    resumed = continue_cli.resume("Write a note.")
    assert (workspace / "note.md").read_text() == "Done: 世界\n"
    assert resumed.code == 0, resumed
    assert "It is noted." in resumed.output
    assert answered() == {"200": 5}
    record.check_reuse(TASK, 5)


def test_continue_is_stopped(
    continue_cli: Continue, plan: WritePlan, record: Record, answering: Callable[[], None]
) -> None:
    plan("count", [LONG])
    continue_cli.configure(SMALL)
    continue_cli.stop_during(answering, "Please count for a while.")
    record.wait_until_cancelled("count")


def test_continue_takes_a_call_in_a_code_fence(
    continue_cli: Continue, plan: WritePlan, workspace: Path, answered: Answered
) -> None:
    plan(
        "write a note",
        [fenced("Write", filepath=str(workspace / "note.md"), content="fenced\n"), "It is there."],
    )
    continue_cli.configure(MODEL)
    done = continue_cli.work("Please write a note.")
    assert (workspace / "note.md").read_text() == "fenced\n"
    assert done.code == 0, done
    assert answered() == {"200": 2}


def test_cline_runs_on_the_models_own_words(
    cline: Cline, plan: WritePlan, answered: Answered
) -> None:
    plan("Say hello", [FREE])
    cline.configure(MODEL)
    done = cline.work(MODEL, "Say hello in one sentence.")
    assert done.code in (0, 1), done
    assert done.events[-1]["type"] in ("run_result", "error"), done
    assert set(answered()) == {"200"}


def test_continue_runs_on_the_models_own_words(
    continue_cli: Continue, plan: WritePlan, answered: Answered
) -> None:
    plan("Say hello", [FREE])
    continue_cli.configure(MODEL)
    done = continue_cli.work("Say hello in one sentence.")
    assert done.code in (0, 1), done
    assert set(answered()) == {"200"}
