"""Codex edits a file, goes on in a new process and is stopped, with its own defaults."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.e2e.conftest import WritePlan
from tests.e2e.plans import REPORT, REPORT_SCHEMA, tagged
from tests.e2e.record import Record
from tests.e2e.scripted import LONG, SMALL
from tests.e2e.sdk import SCRIPTS
from tests.e2e.terminal_agents import Codex, items

TASK = "greet the world"


def test_codex_edits_a_file_and_goes_on_in_a_new_process(
    codex: Codex,
    plan: WritePlan,
    workspace: Path,
    record: Record,
    answered: Callable[[], Mapping[str, int]],
) -> None:
    file = workspace / "greet.py"
    plan(
        TASK,
        [
            "I read it first.\n" + tagged("exec_command", cmd="cat greet.py"),
            tagged("exec_command", cmd="sed -i.bak 's/hello/grüße, \"世界\"/' greet.py"),
            "The function greets the world now.",
            tagged("exec_command", cmd="cat greet.py > copy.py"),
            "It is copied.",
        ],
    )
    codex.configure(SMALL)
    done = codex.work(f"Make greet.py {TASK}.")
    assert done.code == 0, done
    assert file.read_text() == 'def greet():\n    return "grüße, "世界""\n'
    read, changed = items(done, "command_execution")
    assert 'return "hello"' in read["aggregated_output"]
    assert changed["exit_code"] == 0
    assert items(done, "agent_message")[-1]["text"] == "The function greets the world now."
    (usage,) = [event["usage"] for event in done.events if event["type"] == "turn.completed"]
    prompts = record.answers(TASK)
    assert usage["input_tokens"] == sum(answer.prompt for answer in prompts)
    assert usage["cached_input_tokens"] == sum(answer.cached for answer in prompts)

    resumed = codex.resume("Copy it to copy.py.")
    assert resumed.code == 0, resumed
    assert (workspace / "copy.py").read_text() == file.read_text()
    assert items(resumed, "agent_message")[-1]["text"] == "It is copied."
    threads = [
        event["thread_id"]
        for run in (done, resumed)
        for event in run.events
        if event["type"] == "thread.started"
    ]
    assert threads[0] == threads[1]
    record.check_reuse(TASK, 5)
    assert set(answered()) == {"200"}


def test_codex_calls_a_tool_of_an_mcp_server(
    codex: Codex, plan: WritePlan, workspace: Path, record: Record
) -> None:
    """Codex offers such tools in a namespace, by which it must find the server again."""
    notes = workspace / "notes.txt"
    plan("remember", [tagged("mcp__notes__add_note", text='grüße, "世界"'), "It is noted."])
    codex.configure(SMALL, {"notes": (sys.executable, str(SCRIPTS / "mcp_server.py"), str(notes))})
    done = codex.work("Please remember to greet the world.")
    assert done.code == 0, done
    assert notes.read_text(encoding="utf-8") == 'grüße, "世界"\n'
    (call,) = items(done, "mcp_tool_call")
    assert (call["server"], call["tool"], call["status"]) == ("notes", "add_note", "completed")
    assert items(done, "agent_message")[-1]["text"] == "It is noted."
    record.check_reuse("remember", 2)


def test_codex_gives_an_object(
    codex: Codex, plan: WritePlan, workspace: Path, record: Record
) -> None:
    schema = workspace / "schema.json"
    schema.write_text(json.dumps(REPORT_SCHEMA))
    plan(TASK, [tagged("exec_command", cmd="cat greet.py"), json.dumps(REPORT)])
    codex.configure(SMALL)
    done = codex.report(f"Would greet.py {TASK}?", schema)
    assert done.code == 0, done
    assert json.loads(items(done, "agent_message")[-1]["text"]) == REPORT
    record.check_reuse(TASK, 2)


def test_codex_is_stopped(
    codex: Codex, plan: WritePlan, record: Record, answering: Callable[[], None]
) -> None:
    plan("count", [LONG])
    codex.configure(SMALL)
    assert codex.stop_during(answering, "Please count for a while.") != 0
    record.wait_until_cancelled("count")
