"""One line of the doctor's table: what was checked, its value, its problem and the cure."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"
NEEDS_MAC = "only a Mac can show it"


@dataclass(frozen=True)
class Row:
    """The result of one check.

    `state`: ok; warn (works, but worse or not for all); FAIL (stops the server); skip, with the
    reason in `value`.  `cure` says what to type or do.  `detail` is for the report only.
    """

    what: str
    state: str
    value: str
    problem: str = ""
    cure: str = ""
    detail: str = ""

    def lines(self) -> list[str]:
        """Return the row as text: the table's line, then the problem and the cure, if any."""
        value = " ".join(self.value.split())
        text = [f"{self.state:4}  {self.what:26}  {value}".rstrip()]
        if self.problem:
            text.append(f"      {self.problem}")
        if self.cure:
            text.append(f"      ({self.cure})")
        return text


def judged(what: str, value: object, problem: str, cure: str = "", state: str = FAIL) -> Row:
    """Return an ok row if `problem` is empty, else one of `state`."""
    if not problem:
        return Row(what, OK, str(value))
    return Row(what, state, str(value), problem, cure)


def skipped(what: str, reason: str) -> Row:
    """Return the row of a check that was not made."""
    return Row(what, SKIP, reason)
