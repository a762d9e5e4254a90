"""Computed prompt prefixes: matching prompts, and storing their state in RAM and on disk."""
