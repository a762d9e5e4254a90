"""Decisions about memory, pure and without a clock."""
