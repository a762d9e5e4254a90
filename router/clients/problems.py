"""The error of a client that cannot be set up; no file was changed."""


class ConnectError(Exception):
    """A message for the user: what was wrong and what to do next."""
