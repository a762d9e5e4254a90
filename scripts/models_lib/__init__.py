"""The command line of models: finding, getting, converting and deleting them on a server."""
