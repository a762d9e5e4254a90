"""Client libraries run tools, give objects and vectors, go on in a new process and are stopped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import MakeSdk, WritePlan
from tests.e2e.plans import tagged
from tests.e2e.record import REUSED, Record
from tests.e2e.scripted import LONG, SMALL
from tests.e2e.sdk import Sdk

TASK = "write a note"
TEXT = 'caf\u00e9 "\u4e16\u754c" \\n\n'
WRITE = tagged("write_file", path="note.md", text=TEXT)
REPORT = {"file": "note.md", "words": 2}
SAID = json.dumps(REPORT)
AGAIN = {"file": "again.md", "words": 1}
GO_ON = [tagged("write_file", path="again.md", text="again"), json.dumps(AGAIN)]

# A tool task and its continuation, and what the two end with.
ENDS = ["It is written.", "It is there again."]
TOOL_TASK = [WRITE, ENDS[0], GO_ON[0], ENDS[1]]
# Some seconds of an object, for someone to stop.
LONG_OBJECT = {"regex": r'\{"file": "(tick ){5000}'}
EMBEDDED = ["cat", "kitten", "the stock market fell"]


def check_usage(runs: list[dict[str, Any]], record: Record) -> None:
    """Check that the client saw the engine's counts, and that every prompt reused the last."""
    prompts = [prompt for run in runs for prompt in run["prompts"]]
    cached = [count for run in runs for count in run["cached"]]
    answers = record.answers(TASK)
    assert prompts == [answer.prompt for answer in answers]
    assert cached == [answer.cached for answer in answers]
    assert len(prompts) > len(runs)
    for before, again in zip(prompts[:-1], cached[1:], strict=True):
        assert again >= REUSED * before, (prompts, cached)


def check_tool_task(sdk: Sdk, folder: Path, record: Record, *kind: str, ends: list[Any]) -> None:
    """Run a task and go on in a new process; `ends` are what the two must end with."""
    done = sdk.run(SMALL, *kind, "work", task=f"Please {TASK}.")
    assert (folder / "note.md").read_text() == TEXT
    again = sdk.run(SMALL, *kind, "resume", task="Do it again in again.md.")
    assert (folder / "again.md").read_text() == "again"
    assert [done["output"], again["output"]] == ends
    check_usage([done, again], record)


def check_object(sdk: Sdk, folder: Path, record: Record, *kind: str) -> None:
    """Run a task with a tool whose answer is an object."""
    done = sdk.run(SMALL, *kind, "object", task=f"Please {TASK}.")
    assert (folder / "note.md").read_text() == TEXT
    assert done["output"] == REPORT
    check_usage([done], record)


def test_openai_runs_tools(sdk: MakeSdk, plan: WritePlan, workspace: Path, record: Record) -> None:
    plan(TASK, TOOL_TASK)
    check_tool_task(sdk("run_openai.py"), workspace, record, ends=ENDS)


@pytest.mark.parametrize("script", ["run_openai.py", "run_tool_runner.py"])
def test_python_clients_give_objects_beside_tools(
    script: str, sdk: MakeSdk, plan: WritePlan, workspace: Path, record: Record
) -> None:
    plan(TASK, [WRITE, SAID])
    check_object(sdk(script), workspace, record)


def test_openai_agents_run_tools_and_give_objects(
    sdk: MakeSdk, plan: WritePlan, workspace: Path, record: Record
) -> None:
    plan(TASK, [WRITE, SAID, *GO_ON])
    check_tool_task(sdk("run_openai_agents.py"), workspace, record, ends=[REPORT, AGAIN])


def test_pydantic_ai_runs_tools_and_gives_objects(
    sdk: MakeSdk, plan: WritePlan, workspace: Path, record: Record
) -> None:
    plan(TASK, [WRITE, SAID, *GO_ON])
    check_tool_task(sdk("run_pydantic_ai.py"), workspace, record, ends=[REPORT, AGAIN])


def test_pydantic_ai_gives_objects_as_calls(
    sdk: MakeSdk, plan: WritePlan, workspace: Path, record: Record
) -> None:
    plan(TASK, [WRITE, tagged("final_result", **REPORT)])
    done = sdk("run_pydantic_ai.py").run(SMALL, "tool_output", task=f"Please {TASK}.")
    assert (workspace / "note.md").read_text() == TEXT
    assert done["output"] == REPORT
    check_usage([done], record)


def test_instructor_gives_objects(sdk: MakeSdk, plan: WritePlan, record: Record) -> None:
    client = sdk("run_instructor.py", "instructor")
    plan(TASK, [tagged("Report", **REPORT), tagged("Report", **AGAIN)])
    done = client.run(SMALL, "work", task=f"Please {TASK}.")
    again = client.run(SMALL, "resume", task="And another.")
    assert [done["output"], again["output"]] == [REPORT, AGAIN]
    assert again["cached"][0] >= REUSED * done["prompts"][0]
    assert [answer.prompt for answer in record.answers(TASK)] == done["prompts"] + again["prompts"]


def test_instructor_gives_objects_in_pieces(sdk: MakeSdk, plan: WritePlan) -> None:
    plan(TASK, [SAID])
    done = sdk("run_instructor.py", "instructor").run(SMALL, "partial", task=f"Please {TASK}.")
    assert done["output"] == REPORT
    assert done["parts"] > 1


def test_anthropics_tool_runner_runs_tools(
    sdk: MakeSdk, plan: WritePlan, workspace: Path, record: Record
) -> None:
    plan(TASK, TOOL_TASK)
    check_tool_task(sdk("run_tool_runner.py"), workspace, record, ends=ENDS)


@pytest.mark.parametrize("provider", ["responses", "compatible"])
def test_ai_sdk_runs_tools(
    provider: str, ai_sdk: Sdk, plan: WritePlan, workspace: Path, record: Record
) -> None:
    plan(TASK, TOOL_TASK)
    check_tool_task(ai_sdk, workspace, record, provider, ends=ENDS)


@pytest.mark.parametrize("provider", ["responses", "compatible"])
def test_ai_sdk_gives_objects_beside_tools(
    provider: str, ai_sdk: Sdk, plan: WritePlan, workspace: Path, record: Record
) -> None:
    plan(TASK, [WRITE, SAID])
    check_object(ai_sdk, workspace, record, provider)


@pytest.mark.parametrize(
    "script",
    ["run_openai.py", "run_openai_agents.py", "run_pydantic_ai.py", "run_tool_runner.py"],
)
def test_python_clients_stop_an_answer(
    script: str, sdk: MakeSdk, plan: WritePlan, record: Record
) -> None:
    plan(TASK, [LONG])
    sdk(script).run(SMALL, "stop", task=f"Please {TASK}.")
    record.wait_until_cancelled(TASK)


def test_instructor_stops_an_object(sdk: MakeSdk, plan: WritePlan, record: Record) -> None:
    plan(TASK, [LONG_OBJECT])
    done = sdk("run_instructor.py", "instructor").run(SMALL, "stop", task=f"Please {TASK}.")
    assert done["file"].startswith("t")
    record.wait_until_cancelled(TASK)


@pytest.mark.parametrize("provider", ["responses", "compatible"])
def test_ai_sdk_stops_an_answer(
    provider: str, ai_sdk: Sdk, plan: WritePlan, record: Record
) -> None:
    plan(TASK, [LONG])
    assert ai_sdk.run(SMALL, provider, "stop", task=f"Please {TASK}.") == {"ends": "abort"}
    record.wait_until_cancelled(TASK)


def check_vectors(sdk: Sdk, model: str, *kind: str) -> None:
    """Check that the vectors of like texts are alike."""
    found = sdk.run(model, *kind, "embed", task="\n".join(EMBEDDED))
    vectors = np.array(found["vectors"])
    assert vectors.shape == (len(EMBEDDED), 384)
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]
    assert found["tokens"] > len(EMBEDDED)


@pytest.mark.parametrize("script", ["run_openai.py", "run_pydantic_ai.py"])
def test_python_clients_embed(script: str, sdk: MakeSdk, embedding_model: str) -> None:
    check_vectors(sdk(script), embedding_model)


@pytest.mark.parametrize("provider", ["responses", "compatible"])
def test_ai_sdk_embeds(provider: str, ai_sdk: Sdk, embedding_model: str) -> None:
    check_vectors(ai_sdk, embedding_model, provider)
