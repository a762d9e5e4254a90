"""Reads the server's log and samples what its charts show."""
