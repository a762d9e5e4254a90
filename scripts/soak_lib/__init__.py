"""Soak test of the whole server: load, hostile requests and killed processes for a long time."""
