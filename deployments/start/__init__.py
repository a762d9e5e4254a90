"""Command line: starts and stops the server."""
