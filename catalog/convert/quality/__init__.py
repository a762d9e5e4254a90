"""Measures how much a conversion changed a model."""
