"""Turns sampled tokens into text, reasoning and tool-call events."""
