"""The process that owns memory, loads and limits."""
