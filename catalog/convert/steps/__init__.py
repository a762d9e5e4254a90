"""The single steps of conversions, each run in a child process."""
