"""Work of an engine that nobody waits for, done in small pieces while it is idle."""

from typing import Protocol, runtime_checkable

from backends.base import Stepper


@runtime_checkable
class HasChores(Protocol):
    """A stepper that has such work at times; called on the engine's thread."""

    @property
    def has_chores(self) -> bool:
        """Whether there is any."""
        ...

    def do_chore(self) -> None:
        """Do one piece, some milliseconds at most."""
        ...


def has_chores(stepper: Stepper) -> bool:
    """Whether the stepper has such work now."""
    return isinstance(stepper, HasChores) and stepper.has_chores


def do_chore(stepper: Stepper) -> None:
    """Do a piece of it, if there is one."""
    if isinstance(stepper, HasChores) and stepper.has_chores:
        stepper.do_chore()
