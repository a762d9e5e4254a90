"""Sensors: heat, power, memory pressure and process memory."""
