"""What ends the script with a message, nothing having been changed."""


class ConnectError(Exception):
    """A message for the person at the terminal."""
