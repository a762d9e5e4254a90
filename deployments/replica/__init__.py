"""The process that runs the models of one format."""
