"""Checks a machine and an installation for what stops or slows the server.

Runs with any Python since 3.9 and the standard library, because it is wanted most where set-up
failed.  Only `probes`, which run in processes of their own, import the server.
"""
