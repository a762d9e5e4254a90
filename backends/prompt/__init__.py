"""Builds prompt tokens from chat messages: templates, normalization and limits."""
