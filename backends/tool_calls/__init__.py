"""Parses, validates and constrains tool calls in the formats of each model family."""
