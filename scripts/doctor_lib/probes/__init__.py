"""Probes: programs of the virtual environment that import the server and tell one result."""
