"""Replica process: loads models of one format and runs requests on them."""
