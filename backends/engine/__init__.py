"""Continuous batching, shared by all token formats."""
