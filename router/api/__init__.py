"""The management API: what a model may use, what is in memory, and why."""
