"""What the scripted models computed: the record that their plug-in writes."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.integration.server import wait_until

REUSED = 0.98


@dataclass(frozen=True, slots=True)
class Answer:
    """One request with a plan; its tokens as the engine counted them, 0 when cancelled."""

    plan: str
    end: str
    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """The answers since the test began."""

    path: Path

    def answers(self, key: str) -> list[Answer]:
        """Return the ended requests whose plan has this key, in order."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [Answer(**line) for line in lines if line["plan"] == key]

    def wait_until_cancelled(self, key: str) -> None:
        """Return once the last request with this key was cancelled in the engine."""

        def is_cancelled() -> bool:
            return [answer.end for answer in self.answers(key)][-1:] == ["cancelled"]

        wait_until(is_cancelled, f"the request {key!r} was cancelled", 30)

    def check_reuse(self, key: str, count: int) -> None:
        """Check that there are `count` answers, each of whose prompts reuses the one before."""
        answers = self.answers(key)
        assert len(answers) == count, answers
        for before, after in pairwise(answers):
            assert after.prompt > before.prompt, answers
            assert after.cached >= REUSED * before.prompt, answers
