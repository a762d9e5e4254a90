"""Readings of heat, power, memory pressure and process memory."""
