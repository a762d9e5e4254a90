"""Constrained decoding: grammars that restrict the next token."""
