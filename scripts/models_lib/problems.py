"""The errors that end a command, besides those of the client; the text is the user's message."""


class CommandFailed(Exception):
    """What was asked for did not come about; `is_told` if the JSON document has said so."""

    def __init__(self, message: str, *, is_told: bool = False) -> None:
        super().__init__(message)
        self.is_told = is_told


class WrongUsage(Exception):
    """The command line does not say what is needed."""


class StillRunning(Exception):
    """A person stopped following a job, which goes on in the server."""
