"""A clock that a test sets."""


class Clock:
    """Returns `now`, in seconds of whichever kind of time is read, until a test changes it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
