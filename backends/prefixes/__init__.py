"""Computed prompt prefixes: matching them, and keeping them in RAM and on disk."""
