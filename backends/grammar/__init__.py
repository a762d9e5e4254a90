"""Grammars that bound which tokens may come next."""
