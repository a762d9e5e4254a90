"""The error that ends `scripts/connect` with a message; no file was changed."""


class ConnectError(Exception):
    """A message for the user: what was wrong and what to do next."""
