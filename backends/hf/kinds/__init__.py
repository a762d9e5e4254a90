"""Tells what kind of model a Hugging Face folder holds, and refuses those that are not run."""
