"""Computes when values of an ML program can be freed, and which updates can be in place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.coreml.mil.ops import VIEWS, Compute

_NEVER = 1 << 60
# Operations that write a state: the arguments with its name and with the value.
STORES = {"write_state": ("input", "data"), "coreml_update_state": ("state", "value")}
_SAME = ("cast", "identity")


@dataclass(frozen=True, slots=True)
class Name:
    """A reference to an earlier value by name."""

    name: str


@dataclass(slots=True)
class Step:
    """One operation ready to run: `names` are arguments computed earlier, `fixed` constants.

    `is_in_place` marks a slice update whose input is not read again; `done` are values that are
    not needed after this step.
    """

    type: str
    fixed: dict[str, Any]
    names: tuple[tuple[str, str], ...]
    lists: tuple[tuple[str, tuple[Any, ...]], ...]
    outputs: tuple[str, ...]
    compute: Compute | None
    is_in_place: bool = False
    done: list[str] = field(default_factory=list)


def _reads(step: Step) -> list[str]:
    listed = [item.name for _, items in step.lists for item in items if isinstance(item, Name)]
    return [name for _, name in step.names] + listed


def schedule(steps: list[Step], outputs: tuple[str, ...]) -> None:
    """Set `done` and `is_in_place` of every step.

    An update may be in place if no other value that may share its memory is read later; a
    state's memory only if the result is stored as the state.
    """
    last = {name: index for index, step in enumerate(steps) for name in _reads(step)}
    last |= dict.fromkeys(outputs, _NEVER)
    for name, index in last.items():
        if index != _NEVER:
            steps[index].done.append(name)
    _mark_in_place(steps, last)


def _mark_in_place(steps: list[Step], last: Mapping[str, int]) -> None:
    stored = _stored(steps)
    memory = _Memory()
    # For each memory, the last step that reads a value in it.
    needed: dict[str, int] = {}
    for index, step in enumerate(steps):
        root = memory.root(step)
        if step.type == "slice_update":
            is_kept = root not in memory.states.values() or step.outputs[0] in stored
            step.is_in_place = is_kept and root in needed and needed[root] <= index
            if not step.is_in_place:
                root = step.outputs[0]
        for output in step.outputs:
            memory.group[output] = root
            needed[root] = max(needed.get(root, -1), last.get(output, -1))


def _stored(steps: list[Step]) -> set[str]:
    """Return the values that are stored as a state, directly or after a cast."""
    stored: set[str] = set()
    for step in reversed(steps):
        if step.type in STORES or (step.type in _SAME and step.outputs[0] in stored):
            stored.update(_reads(step))
    return stored


@dataclass(slots=True)
class _Memory:
    """Tracks the memory of each value, and of each state at the current step."""

    group: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)

    def root(self, step: Step) -> str:
        """Return the memory of a step's output; update the memory of a written state."""
        names = dict(step.names)
        own = step.outputs[0] if step.outputs else ""
        if step.type == "read_state":
            name = names.get("input", "")
            return self.states.setdefault(name, f"state {name}")
        if step.type in STORES:
            state, value = (names.get(key, "") for key in STORES[step.type])
            self.states[state] = self.group.get(value, value)
            return self.states[state]
        if step.type in VIEWS or step.type == "slice_update":
            return self.group.get(names.get("x", ""), own)
        return own
