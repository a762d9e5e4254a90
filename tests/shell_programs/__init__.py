"""Shells that run the scripts, and programs of a line or two that stand in for others."""
