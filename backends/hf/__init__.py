"""Hugging Face folders: configuration, tokenizer, weights' headers."""
