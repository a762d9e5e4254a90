"""Finds the running server and talks to its management API, for the scripts that need it."""
