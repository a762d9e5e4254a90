"""Scheduler process: memory ledger, loads and unloads, thermal limits, conversions."""
