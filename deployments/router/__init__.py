"""The process that answers HTTP."""
