"""Tries a model while it is loaded: rows together, in pieces and from reused caches."""
