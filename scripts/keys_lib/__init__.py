"""The command line of API keys: `scripts/keys`."""
