"""The inspector refuses a file whose child process misbehaves, and goes on with a new one."""

import os
import sys
from pathlib import Path

import pytest

from catalog.scan import inspector
from catalog.scan.identify import Refused, Unknown
from catalog.scan.inspector import Inspector

ANSWER = """
import json, sys
for line in sys.stdin:
    if "bad" in json.loads(line)["path"]:
        {bad}
    print('{{"unknown": ["fine"]}}', flush=True)
"""


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ("import time; time.sleep(600)", "took longer than 0.3 s"),
        ("print('no JSON', flush=True)", "could not be read"),
        ("print('[]', flush=True)", "could not be read"),
        ("print('x' * 40_000_000, flush=True)", "could not be read"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise SystemExit(3)", "code 3"),
    ],
)
def test_a_misbehaving_child_is_replaced(bad: str, cause: str) -> None:
    limit_s = 0.3 if "0.3" in cause else 30.0
    code = ANSWER.format(bad=bad)
    checked = Inspector([], command=[sys.executable, "-c", code], file_limit_s=limit_s)
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    outcome = checked.examine(Path("/bad"))
    assert isinstance(outcome, Refused)
    assert cause in outcome.reason
    assert checked.examine(Path("/good")) == Unknown(("fine",))
    checked.close()
    checked.close()


def test_a_child_that_never_reads_meets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector, "START_LIMIT_S", 0.0)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    stuck = Inspector([], command=command, file_limit_s=0.3)
    outcome = stuck.examine(Path("x" * 1_000_000))
    stuck.close()
    assert isinstance(outcome, Refused)
    assert "took longer than 0.3 s" in outcome.reason


def test_the_childs_environment_holds_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import json, os\ninput()\nprint(json.dumps({'unknown': [*os.environ]}))"
    checked = Inspector([], command=[sys.executable, "-c", code])
    outcome = checked.examine(Path("/good"))
    checked.close()
    assert isinstance(outcome, Unknown)
    assert "HF_TOKEN" not in outcome.reasons
    assert ("PATH" in outcome.reasons) == ("PATH" in os.environ)
